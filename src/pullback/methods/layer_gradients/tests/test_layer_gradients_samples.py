"""Per-sample spectra, losses of responses, and precision."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from pullback.core.responses import response_batch, response_loss, response_mask
from pullback.methods.layer_gradients import STATISTICS, GradientSpectrum
from pullback.methods.layer_gradients.tests import cases as models
from pullback.methods.layer_gradients.tests import reference

_loss: Any = response_loss  # with arguments of wrong types
_mask: Any = response_mask
PAIRS = [([3, 4, 5], [6, 7]), ([8, 9], [10, 11, 12, 13, 14]), ([1, 2, 3, 4, 5, 6], [7])]
PATTERN = models.LINEAR


def x_of(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def losses(model, batch, chosen=slice(None)):
    out = model(input_ids=batch.input_ids[chosen], attention_mask=batch.attention_mask[chosen])
    return response_loss(out.logits, batch.labels[chosen])


def same_records(one, other, rel=1e-4):
    for a, b in zip(one, other, strict=True):
        for name, rows in a.values.items():
            for proj, row in rows.items():
                assert row == pytest.approx(b.values[name][proj], rel=rel, abs=1e-7), (name, proj)


# --- oracle 6: per sample -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [models.llama, models.gpt2], ids=["llama", "gpt2"])
def test_a_batch_equals_a_loop_over_its_examples(build):
    model, batch = build(), response_batch(PAIRS)
    stats = tuple(each for each in STATISTICS if each != "sigma_min")
    spec = GradientSpectrum(model, stats=stats)
    together = spec.measure(lambda: losses(model, batch), tag="t", key=["a", "b", "c"]).records
    assert [each.key for each in together] == ["a", "b", "c"]
    assert spec.seen("b", "t")
    assert not spec.seen("b", "u")
    loop = GradientSpectrum(model, stats=stats)
    for index in range(3):
        loop.measure(lambda i=index: losses(model, batch, slice(i, i + 1)))
    same_records(together, loop.records)
    assert [each.loss for each in together] == pytest.approx([each.loss for each in loop.records], rel=1e-5)
    assert together[0].values["nuclear_per_loss"]["q"][0] == pytest.approx(
        together[0].values["nuclear"]["q"][0] / together[0].loss, rel=1e-6
    )


def test_per_sample_equals_backpacks_batch_grad():
    backpack: Any = pytest.importorskip("backpack")
    extensions: Any = pytest.importorskip("backpack.extensions")

    model: Any = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    x, y = x_of(5, 6), torch.tensor([0, 1, 2, 3, 0])
    spec = GradientSpectrum(model, r"(?P<layer>\d+)\.(?P<proj>weight)")
    records = spec.measure(lambda: nn.functional.cross_entropy(model(x), y, reduction="none")).records
    loss = nn.CrossEntropyLoss(reduction="sum")
    backpack.extend(model), backpack.extend(loss)
    with backpack.backpack(extensions.BatchGrad()):
        loss(model(x.requires_grad_()), y).backward()
    for place, layer in enumerate((0, 2)):
        values = torch.linalg.svdvals(model[layer].weight.grad_batch.double())
        found = [record.values["nuclear"]["weight"][place] for record in records]
        assert found == pytest.approx(values.sum(1).tolist(), rel=1e-5)


@pytest.mark.parametrize("tokens", [3, 40], ids=["core", "formed"])
def test_sequences_longer_than_the_layer_are_split_as_well(tokens):
    model, x = models.mlp(), x_of(4, tokens, 6)
    records = GradientSpectrum(model, PATTERN).measure(lambda: model(x).square().sum((1, 2))).records
    for index, record in enumerate(records):
        wanted = reference.gradients(model(x[index : index + 1]).square().sum(), [model.layers[0].weight])[0]
        assert record.values["nuclear"]["weight"][0] == pytest.approx(
            reference.statistics(wanted)["nuclear"], rel=1e-5
        )


def test_other_axis_of_the_batch():
    model, x = models.mlp(), x_of(4, 7, 6)
    first = GradientSpectrum(model, PATTERN).measure(lambda: model(x).square().sum((1, 2))).records
    turned = x.transpose(0, 1)
    spec = GradientSpectrum(model, PATTERN, batch_dim=1)
    same_records(first, spec.measure(lambda: model(turned).square().sum((0, 2))).records)


def test_the_gradient_of_a_batch_has_no_larger_norm_than_its_examples():
    model, batch = models.llama(), response_batch(PAIRS)
    single = GradientSpectrum(model).measure(lambda: losses(model, batch)).records
    whole = GradientSpectrum(model, reduction="batch").measure(lambda: losses(model, batch).mean()).records
    assert (len(whole), whole[0].reduction, single[0].reduction) == (1, "batch", "per_sample")
    for proj, row in whole[0].values["nuclear"].items():
        for layer, value in enumerate(row):
            mean = sum(each.values["nuclear"][proj][layer] for each in single) / 3
            assert value <= mean * (1 + 1e-5)
            assert value > 0


def test_a_layer_called_twice_adds_up_sample_by_sample():
    model, x = models.mlp(), x_of(3, 6)
    records = GradientSpectrum(model, PATTERN).measure(lambda: model(model(x)).sum(1)).records
    for index, record in enumerate(records):
        row = x[index : index + 1]
        wanted = reference.gradients(model(model(row)).sum(), [model.layers[0].weight])[0]
        assert record.values["nuclear"]["weight"][0] == pytest.approx(
            reference.statistics(wanted)["nuclear"], rel=1e-5
        )


def test_two_backward_passes_add_up():
    model, x = models.mlp(), x_of(1, 6)
    spec = GradientSpectrum(model, PATTERN)
    with spec.sample():
        out = model(x)
        out.sum().backward(retain_graph=True)
        out.square().sum().backward()
    wanted = reference.gradients(model(x).sum() + model(x).square().sum(), [model.layers[0].weight])[0]
    assert spec.records[0].values["nuclear"]["weight"][0] == pytest.approx(
        reference.statistics(wanted)["nuclear"], rel=1e-5
    )


def test_similarity_is_the_cosine_of_neighbours():
    model, x = models.mlp(layers=3), x_of(4, 6)
    stats = ("similarity", "nuclear")
    grads = reference.gradients(model(x).sum(), [each.weight for each in model.layers])
    wanted = [float((a * b).sum() / (a.norm() * b.norm())) for a, b in itertools.pairwise(grads)]
    for route in ("auto", "dense", "low_rank"):
        spec = GradientSpectrum(model, PATTERN, stats=stats, reduction="batch", route=route)
        spec.measure(lambda: model(x).sum() * 1e-18)
        assert spec.curve("similarity")["weight"].tolist() == pytest.approx(wanted, rel=1e-5)
        assert spec.curve("similarity").layers["weight"] == (0, 1)


# --- oracle 7 and the ids of responses ------------------------------------------------------------------------------


def test_masked_loss_equals_slicing_by_hand_and_ignores_prompt_labels():
    model, batch = models.llama(), response_batch(PAIRS)
    model.requires_grad_(True)
    weight = model.model.layers[0].self_attn.v_proj.weight
    records = GradientSpectrum(model).measure(lambda: losses(model, batch)).records
    for index, (prompt, response) in enumerate(PAIRS):
        scores = model(input_ids=torch.tensor([prompt + response])).logits[0]
        by_hand = reference.masked_loss(scores, prompt, response)
        assert records[index].loss == pytest.approx(float(by_hand.detach()), rel=1e-5)
        wanted = reference.statistics(reference.gradients(by_hand, [weight])[0])
        assert records[index].values["nuclear"]["v"][0] == pytest.approx(wanted["nuclear"], rel=1e-4)
    logits = x_of(2, 5, 7).requires_grad_()
    labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, 1, 2, 3, 4]])
    response_loss(logits, labels).sum().backward()
    assert not logits.grad[0, [0, 3, 4]].any()
    assert logits.grad[0, [1, 2]].any(1).all()
    logits = logits.detach()
    rows = response_loss(logits, labels)
    assert float(response_loss(logits, labels, reduction="mean")) == pytest.approx(float(rows.mean()))
    assert float(response_loss(logits[0], labels[0])[0]) == pytest.approx(float(rows[0]))
    assert response_loss(logits.bfloat16(), labels).dtype == torch.float32


def test_responses_are_joined_as_ids():
    # the response "5" occurs in the prompt's end: a search in text or ids would find the wrong place
    assert response_mask([1, 5, 5], [5]).tolist() == [False, False, False, True]
    assert response_mask([], torch.tensor([5, 6])).tolist() == [True, True]
    cut = response_batch(PAIRS[:2], pad_id=9, max_length=6)
    assert cut.input_ids.tolist() == [[3, 4, 5, 6, 7, 9], [8, 9, 10, 11, 12, 13]]
    assert cut.labels.tolist() == [[-100, -100, -100, 6, 7, -100], [-100, -100, 10, 11, 12, 13]]
    assert cut.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert cut.mask.sum(1).tolist() == [2, 4]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: response_mask([1], []), "response_ids must hold at least one token"),
        (lambda: _mask("text", [1]), "prompt_ids must be a list of token ids, got 'text'"),
        (lambda: _mask([1], [0.5]), "response_ids must be a list of token ids"),
        (lambda: response_batch([]), "at least one prompt"),
        (lambda: response_batch(PAIRS, max_length=6), "got 6 with a prompt of 6 tokens in example 2"),
        (lambda: response_loss(torch.zeros(1, 3, 5), torch.full((1, 3), -100)), "none in example 0"),
        (lambda: response_loss(torch.zeros(1, 3, 5), torch.tensor([[4, -100, -100]])), "none in example 0"),
        (lambda: response_loss(torch.zeros(1, 3, 5), torch.zeros(1, 2, dtype=torch.long)), "Do not shift"),
        (lambda: _loss(torch.zeros(1, 3, 5), None), "labels must be a tensor of integers, got None"),
        (
            lambda: response_loss(torch.zeros(1, 3, 5), torch.zeros(1, 3)),
            "labels must be a tensor of integers",
        ),
    ],
    ids=["empty", "text", "floats", "none", "long", "ignored", "first", "shifted", "missing", "float"],
)
def test_bad_responses_are_refused(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_decomposed_in_float32(dtype):
    model, x = models.mlp().to(dtype), x_of(1, 4, 6).to(dtype)
    for route in ("auto", "dense"):
        record = (
            GradientSpectrum(model, PATTERN, route=route).measure(lambda: model(x).float().sum()).records[0]
        )
        (wanted,) = reference.gradients(model(x).float().sum(), [model.layers[0].weight])
        assert record.values["nuclear"]["weight"][0] == pytest.approx(
            reference.statistics(wanted)["nuclear"], rel=0.02
        )


def test_loss_scale_saves_tiny_half_gradients_and_is_divided_out():
    model, x = models.mlp().half(), x_of(1, 4, 6).half()
    loss = lambda: model(x).float().sum() * 2.0**-26  # noqa: E731
    plain = GradientSpectrum(model, PATTERN).measure(loss).records[0]
    scaled = GradientSpectrum(model, PATTERN, loss_scale=2.0**26).measure(loss).records[0]
    big = GradientSpectrum(model, PATTERN).measure(lambda: model(x).float().sum()).records[0]
    assert plain.values["nuclear"]["weight"][0] == 0
    assert scaled.values["nuclear"]["weight"][0] * 2.0**26 == pytest.approx(
        big.values["nuclear"]["weight"][0], rel=1e-6
    )
    assert scaled.values["sigma1_ratio"] == big.values["sigma1_ratio"]
    assert scaled.loss == pytest.approx(big.loss * 2.0**-26)


def test_loss_times_k_scales_sizes_alone():
    model, batch = models.llama(), response_batch(PAIRS)
    spec = GradientSpectrum(model)
    spec.measure(lambda: losses(model, batch), "one")
    spec.measure(lambda: 8.0 * losses(model, batch), "eight")
    for name, factor in (
        ("nuclear", 8.0),
        ("frobenius", 8.0),
        ("sigma1_ratio", 1.0),
        ("effective_rank", 1.0),
    ):
        one, eight = spec.curve(name, tag="one"), spec.curve(name, tag="eight")
        for proj in "qkvo":
            assert eight[proj].tolist() == pytest.approx((factor * one[proj]).tolist(), rel=1e-5)


def test_autocast_gives_the_gradients_that_autocast_computes():
    model, x = models.mlp(), x_of(1, 5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        record = GradientSpectrum(model, PATTERN).measure(lambda: model(x).float().sum()).records[0]
        loss = model(x).float().sum()
    (wanted,) = reference.gradients(loss, [model.layers[1].weight])
    assert record.values["nuclear"]["weight"][1] == pytest.approx(
        reference.statistics(wanted)["nuclear"], rel=0.01
    )
