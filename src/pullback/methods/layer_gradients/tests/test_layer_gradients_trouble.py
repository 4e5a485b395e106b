"""What a block leaves behind, what does not matter to it, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pullback.core.checks import NonFiniteError
from pullback.methods.layer_gradients import STATISTICS, GradientSpectrum
from pullback.methods.layer_gradients.tests import cases as models

PATTERN = models.LINEAR


def x_of(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same_records(one, other, rel=1e-4):
    for a, b in zip(one, other, strict=True):
        for name, rows in a.values.items():
            for proj, row in rows.items():
                assert row == pytest.approx(b.values[name][proj], rel=rel, abs=1e-7), (name, proj)


# --- no trace -------------------------------------------------------------------------------------------------------


def test_gradients_flags_and_graphs_of_the_user_survive():
    model, x = models.mlp(layers=3), x_of(2, 6)
    model.layers[0].weight.grad = torch.ones(6, 6)
    model.layers[1].weight.requires_grad_(False)
    calls = []
    model.layers[2].weight.register_hook(calls.append)
    model.layers[2].weight.register_post_accumulate_grad_hook(calls.append)
    before = model(x).sum()  # a graph that waits for its backward pass
    for route in ("auto", "dense"):
        GradientSpectrum(model, PATTERN, reduction="batch", route=route).measure(lambda: model(x).sum())
    assert calls == []
    assert torch.equal(model.layers[0].weight.grad, torch.ones(6, 6))
    assert [each.weight.requires_grad for each in model.layers] == [True, False, True]
    assert model.layers[2].weight.grad is None
    before.backward()
    assert len(calls) == 2
    assert model.layers[2].weight.grad.any()


def test_a_frozen_model_is_measured_all_the_same():
    model, x = models.llama(), models.ids()
    trained = GradientSpectrum(model).measure(lambda: models.logits(model, x).sum()).records
    model.requires_grad_(False)
    same_records(
        GradientSpectrum(model).measure(lambda: models.logits(model, x).sum()).records, trained, rel=1e-6
    )
    assert not any(each.requires_grad for each in model.parameters())


def test_dropout_is_off_by_default_and_repeats_when_on():
    model = models.seeded(lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6))).train()
    pattern, x = r"(?P<layer>\d+)\.(?P<proj>weight)", x_of(4, 6)

    def record(**settings):
        spec = GradientSpectrum(model, pattern, **settings)
        return spec.measure(lambda: model(x).square().sum(1)).records

    still = record()
    assert model.training
    model.eval()
    same_records(still, record(training=None), rel=1e-6)
    model.train()
    noisy = record(training=None)
    assert noisy == record(training=True)
    assert noisy != record(training=None, seed=1)
    assert noisy[0].values["nuclear"]["weight"][0] != pytest.approx(
        still[0].values["nuclear"]["weight"][0], rel=1e-3
    )


# --- trouble --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["auto", "dense", "low_rank"])
def test_nan_is_recorded_for_its_matrix_and_counted(route):
    model, x = models.mlp(), x_of(1, 3, 6)
    model.layers[1].register_full_backward_hook(lambda module, inward, outward: (inward[0] * math.nan,))
    spec = GradientSpectrum(model, PATTERN, route=route)
    spec.measure(lambda: model(x).sum(), "t")
    first, second = spec.records[0].values["nuclear"]["weight"]
    assert math.isnan(first)
    assert second > 0
    assert spec.records[0].nonfinite == 1
    assert spec.curve(tag="t").dropped == {"weight": 1}
    strict = GradientSpectrum(model, PATTERN, route=route, nonfinite="raise")
    with pytest.raises(NonFiniteError, match="NaN or Inf in 1 of 2 matrices"):
        strict.measure(lambda: model(x).sum())
    assert strict.records == []


def test_zero_gradients_are_zero_in_every_statistic():
    model, x = models.mlp(), x_of(2, 3, 6)
    for route in ("auto", "dense"):
        spec = GradientSpectrum(model, PATTERN, stats=STATISTICS, route=route, reduction="batch")
        record = spec.measure(lambda: model(x).sum() * 0.0 + 1.0).records[0]
        assert {each for rows in record.values.values() for row in rows.values() for each in row} == {0.0}


def run(spec, inside, outside=None):
    with outside or torch.enable_grad(), spec.sample():
        inside()


def no_grad_inside(model, x):
    with torch.no_grad():
        model(x)


def overwritten(model, x):
    out = model(x)
    x.add_(1.0)
    out.sum().backward()


class Flat(nn.Module):
    """Flattens batch and tokens before its layer."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6)])

    def forward(self, x):
        return self.layers[0](x.flatten(0, -2)).view(x.shape)


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        (lambda m, x: None, "a sample must run the model"),
        (lambda m, x: m(x), "must run a backward pass through the watched weights, got none"),
        (lambda m, x: m.layers[1](x).sum().backward(), "got no call of 'layers.0.weight'"),
        (no_grad_inside, "must run with gradients, got a call under no_grad"),
        (
            lambda m, x: checkpoint(m, x.requires_grad_(), use_reentrant=True).sum().backward(),
            "use_reentrant=False",
        ),
        (overwritten, "'layers.0.weight' must not be overwritten after its call"),
    ],
    ids=["nothing", "forward", "half", "no_grad", "reentrant", "in_place"],
)
def test_blocks_in_which_nothing_can_be_seen_are_refused(inside, message):
    model, x = models.mlp(), x_of(1, 6)
    spec = GradientSpectrum(model, PATTERN)
    with pytest.raises(RuntimeError, match=message):
        run(spec, lambda: inside(model, x))
    assert spec.records == []
    spec.measure(lambda: model(x_of(1, 6)).sum())  # nothing is left of the refusal
    assert len(spec.records) == 1


def test_outer_no_grad_and_inference_mode_do_not_matter():
    model = models.mlp()
    wanted = GradientSpectrum(model, PATTERN).measure(lambda: model(x_of(1, 6)).sum())
    for outside in (torch.no_grad(), torch.inference_mode()):
        with outside:
            assert GradientSpectrum(model, PATTERN).measure(lambda: model(x_of(1, 6)).sum()) == wanted


def test_checkpoints_without_reentry_work():
    model, x = models.mlp(), x_of(2, 4, 6)
    plain = GradientSpectrum(model, PATTERN).measure(lambda: model(x).square().sum((1, 2)))

    def forward():
        hidden = checkpoint(model.layers[0], x, use_reentrant=False)
        return torch.tanh(model.layers[1](torch.tanh(hidden))).square().sum((1, 2))

    spec = GradientSpectrum(model, PATTERN)
    same_records(spec.measure(forward).records, plain.records, rel=1e-6)


def test_a_compiled_model_is_measured_eagerly():
    model, x = models.mlp(), x_of(1, 6)
    wanted = GradientSpectrum(model, PATTERN).measure(lambda: model(x).sum())
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    spec = GradientSpectrum(compiled, PATTERN)
    assert spec.measure(lambda: compiled(x).sum()) == wanted


def test_samples_of_one_probe_do_not_nest():
    model, x = models.mlp(), x_of(1, 6)
    spec = GradientSpectrum(model, PATTERN)
    with pytest.raises(RuntimeError, match="must not be nested"), spec.sample(), spec.sample():
        pass
    with spec.sample() as sample:
        sample.backward(model(x).sum())
    assert len(spec.records) == 1
    with pytest.raises(RuntimeError, match=r"inside the sample's with block"):
        sample.backward(model(x).sum())


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda s, m, x: s.measure(lambda: m(x).sum(1), tag=["a"]),
            "tag must be one string or one per example, got 1 for 2",
        ),
        (lambda s, m, x: s.measure(lambda: m(x).sum(1), key=[1, 2]), "key must be of type str"),
        (lambda s, m, x: s.measure(lambda: m(x).sum()), "one number per example, got 1 for 2"),
        (lambda s, m, x: s.measure(lambda: m(x).sum().detach()), "without a graph"),
        (lambda s, m, x: s.measure(lambda: 3.0), "loss must be of type Tensor"),
        (lambda s, m, x: s.measure(lambda: m.layers[1](m.layers[0](x)).sum(1)), "Call the model as a whole"),
        (lambda s, m, x: s.measure(lambda: m(x).sum(1) + m(x[:1]).sum()), r"got sizes \[1, 2\]"),
        (lambda s, m, x: run(s, lambda: m(x).sum().backward()), None),
    ],
    ids=["tags", "keys", "loss", "detached", "number", "parts", "unequal", "own backward"],
)
def test_per_sample_requests_that_do_not_fit(act, message):
    model, x = models.mlp(), x_of(2, 6)
    spec = GradientSpectrum(model, PATTERN)
    if message is None:
        act(spec, model, x)
        assert math.isnan(spec.records[1].loss)
        return
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        act(spec, model, x)
    assert spec.records == []


def test_axes_that_are_lost_inside_the_model_are_refused():
    model = models.seeded(Flat)
    with pytest.raises(
        RuntimeError, match=r"'layers.0.weight' must have the 2 samples along axis 0, got the shape \(8, 6\)"
    ):
        GradientSpectrum(model, PATTERN).measure(lambda: model(x_of(2, 4, 6)).sum((1, 2)))
    assert len(GradientSpectrum(model, PATTERN).measure(lambda: model(x_of(1, 4, 6)).sum()).records) == 1
    encoder = models.encoder()
    with pytest.raises(RuntimeError, match="need one example per sample, got 2"):
        GradientSpectrum(encoder).measure(lambda: encoder(models.ids(2)).sum((1, 2)))
    assert GradientSpectrum(encoder, reduction="batch").measure(lambda: encoder(models.ids(2)).sum()).records


def test_a_required_loss_that_is_missing_is_refused():
    model, x = models.mlp(), x_of(1, 6)
    spec = GradientSpectrum(model, PATTERN, stats=("nuclear_per_loss",))
    with pytest.raises(RuntimeError, match=r"the loss must be known for 'nuclear_per_loss'"):
        run(spec, lambda: model(x).sum().backward())
    with spec.sample(loss=2.0):
        model(x).sum().backward()
    with spec.sample() as sample:
        loss = model(x).sum()
        loss.backward()
        sample.loss = 4.0
    one, two = (each.values["nuclear_per_loss"]["weight"][0] for each in spec.records)
    assert one == pytest.approx(2 * two)


def test_an_error_in_the_block_passes_on_and_records_nothing():
    model = models.mlp()
    spec = GradientSpectrum(model, PATTERN)

    def fails():
        model(x_of(1, 6)).sum().backward()
        raise ArithmeticError("mine")

    with pytest.raises(ArithmeticError, match="mine"):
        run(spec, fails)
    assert spec.records == []
    assert not model.layers[0]._forward_hooks
    assert all(each.grad is None and each.requires_grad for each in model.parameters())
