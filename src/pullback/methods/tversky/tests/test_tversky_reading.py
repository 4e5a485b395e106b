"""Explanations, diagnostics, nearest inputs, set expressions, and the swap of linear layers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from pullback.methods.tversky import (
    FeatureBank,
    TverskyProjection,
    nearest_inputs,
    replace_linear,
    semantic_field,
)
from pullback.methods.tversky.forms import DIFFERENCES, INTERSECTIONS


def rows(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(d=6, m=4, k=9, **options) -> Any:
    torch.manual_seed(0)
    return TverskyProjection(d, m, k, theta=1.3, alpha=0.7, beta=0.2, **options).double()


# --- explain ----------------------------------------------------


@pytest.mark.parametrize("model", ["contrast", "ratio"])
@pytest.mark.parametrize("gate", ["hard", "tanh"])
@pytest.mark.parametrize("reduce", ["aggregate", "feature"])
@pytest.mark.parametrize(
    ("intersection", "difference"), list(itertools.product(INTERSECTIONS, DIFFERENCES[:2]))
)
def test_contributions_sum_to_the_logit(intersection, difference, reduce, gate, model):
    layer = head(
        intersection=intersection, difference=difference, reduce=reduce, gate=gate, sharpness=2.0, model=model
    )
    for x in rows(5, 6):
        logits = layer(x).detach()
        for index in range(4):
            said = layer.explain(x, index)
            total = said.common + said.input_only + said.prototype_only
            assert said.logit == pytest.approx(float(logits[index]), abs=1e-9)
            assert float(total.sum()) + said.offset == pytest.approx(said.logit, abs=1e-9)


def test_a_contribution_belongs_to_its_feature():
    layer = head(d=3, m=1, k=3)
    with torch.no_grad():
        layer.feature_bank.weight.copy_(torch.eye(3))
        layer.prototypes.weight.copy_(torch.tensor([[2.0, 3.0, -1.0]]))
    said = layer.explain(torch.tensor([5.0, -1.0, 4.0], dtype=torch.float64), 0)
    assert said.common.tolist() == pytest.approx([1.3 * 10, 0, 0])
    assert said.input_only.tolist() == pytest.approx([0, 0, -0.7 * 4])
    assert said.prototype_only.tolist() == pytest.approx([0, -0.2 * 3, 0])
    assert said.offset == 0.0
    assert [k for k, _ in said.top(2)] == [0, 2]


def test_only_softmin_leaves_an_offset():
    for intersection in INTERSECTIONS:
        said = head(intersection=intersection).explain(rows(6), 1)
        assert (said.offset != 0) == (intersection == "softmin")


def test_at_the_floor_the_common_features_are_the_whole():
    layer = head(d=2, m=1, k=2, model="ratio")
    with torch.no_grad():
        layer.feature_bank.weight.copy_(torch.eye(2))
        layer.prototypes.weight.copy_(torch.tensor([[2.0, 0.0]]))
        layer.alpha.fill_(-4.0)
    x = torch.tensor([1.0, 1.0], dtype=torch.float64)
    said = layer.explain(x, 0)
    assert said.logit == pytest.approx(float(layer(x).detach()))
    assert said.common.tolist() == pytest.approx([8.0, 0.0])


# --- diagnostics ------------------------------------------------


def test_diagnostics_count_what_lives():
    layer = head(d=3, m=2, k=4)
    with torch.no_grad():
        layer.feature_bank.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]]))
        layer.prototypes.weight.copy_(torch.tensor([[1.0, 1, 0], [1, 2, 0]]))
    x = torch.tensor([[1.0, 0, 0], [2, 1, 0], [1, 1, 0], [1, -1, 0]], dtype=torch.float64)
    said = layer.diagnostics(x)
    assert said.input_active == pytest.approx(6 / 16)
    assert said.prototype_active == pytest.approx(4 / 8)
    assert said.dead_inputs == 0.0
    assert said.dead_prototypes == 0.0
    assert said.dead_features.tolist() == [2, 3]
    assert said.saturated_features.tolist() == [0]
    assert (said.theta, said.alpha, said.beta) == pytest.approx((1.3, 0.7, 0.2))
    assert said.floored == 0.0
    assert said.feature_grad_norms is None
    layer(x).sum().backward()
    said = layer.diagnostics(x.reshape(2, 2, 3))
    torch.testing.assert_close(said.feature_grad_norms, layer.feature_bank.weight.grad.norm(dim=1))
    torch.testing.assert_close(said.prototype_grad_norms, layer.prototypes.weight.grad.norm(dim=1))
    assert layer.diagnostics(x[:0]).input_active == 0.0


# --- what features and prototypes stand for ---------------------


def test_nearest_inputs():
    layer, x = head(), rows(20, 6)
    found = nearest_inputs(layer, x, 3)
    assert found.prototypes.shape == (4, 3)
    assert found.features.shape == (9, 3)
    logits, scores = layer(x).detach(), layer.feature_bank(x).detach()
    for j, k in itertools.product(range(4), range(9)):
        assert found.prototypes[j].tolist() == sorted(range(20), key=lambda i: -float(logits[i, j]))[:3]
        assert found.features[k].tolist() == sorted(range(20), key=lambda i: -float(scores[i, k]))[:3]
    with pytest.raises(ValueError, match="count must be at most the 20 inputs, got 21"):
        nearest_inputs(layer, x, 21)


def test_a_set_expression():
    bank = FeatureBank(6, 40).double()
    a, b, c = rows(3, 6, seed=1)
    others = rows(10, 6, seed=2)
    found = semantic_field(bank, others, torch.stack([a, b]), c[None])
    wanted = [k for k, f in enumerate(bank.weight.detach()) if a @ f > 0 and b @ f > 0 and c @ f <= 0]
    assert wanted
    assert found.features.nonzero().flatten().tolist() == wanted
    sums = [sum(float(o @ bank.weight[k].detach()) for k in wanted) for o in others]
    assert found.scores.tolist() == pytest.approx(sums)
    assert found.order.tolist() == sorted(range(10), key=lambda i: -sums[i])
    empty = semantic_field(bank, others, torch.stack([a, -a]))
    assert not bool(empty.features.any() or empty.scores.any())
    assert empty.order.tolist() == list(range(10))
    with pytest.raises(ValueError, match="having must hold at least one object"):
        semantic_field(bank, others, a[None][:0])
    with pytest.raises(ValueError, match=r"lacking must be of shape \(any, 6\)"):
        semantic_field(bank, others, a[None], c)


# --- the swap ---------------------------------------------------


class Tied(nn.Module):
    """A tiny language model whose head shares its weight with the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.mix = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.lm_head = nn.Linear(6, 11, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.lm_head(self.mix(self.embedding(tokens)))


def tied() -> Any:
    return Tied()


def test_a_tied_weight_stays_tied():
    model, bank = tied(), FeatureBank(6, 8)
    assert replace_linear(model, ["lm_head"], features=8, bank=bank) == 1
    assert model.lm_head.prototypes.weight is model.embedding.weight
    assert model.lm_head.feature_bank is bank
    model(torch.arange(5)).square().sum().backward()
    assert bool(model.embedding.weight.grad[7:].any())  # rows of tokens that were no input


def test_one_bank_for_several_layers():
    model, bank = tied().double().eval(), FeatureBank(6, 8).double()
    before = model.mix[0].weight
    assert replace_linear(model, lambda name, layer: "mix" in name, bank=bank, intersection="mean") == 2
    assert model.mix[0].feature_bank is model.mix[2].feature_bank is bank
    assert model.mix[0].form.intersection == "mean"
    assert not model.mix[0].training
    assert model.mix[0].prototypes.weight is not before
    assert model.mix[0].prototypes.weight.dtype == torch.float64
    assert isinstance(model.lm_head, nn.Linear)


def test_one_layer_at_two_places_becomes_one_layer():
    shared = nn.Linear(4, 4)
    model: Any = nn.Sequential(shared, nn.ReLU(), shared)
    assert replace_linear(model, ["0"], features=5) == 1
    assert model[0] is model[2]
    assert isinstance(model[2], TverskyProjection)


@pytest.mark.parametrize(
    ("names", "options", "error", "message"),
    [
        ([], {"features": 5}, ValueError, "names must pick a linear layer"),
        (lambda n, m: False, {"features": 5}, ValueError, "names must pick a linear layer"),
        (["head"], {"features": 5}, ValueError, "names must be names of modules, got 'head'"),
        (["mix"], {"features": 5}, TypeError, "names must be of linear layers, got 'mix', a Sequential"),
        ("lm_head", {"features": 5}, TypeError, "names must be a list of names"),
        (["lm_head"], {}, ValueError, "features must be given"),
        (["lm_head"], {"bank": FeatureBank(5, 8)}, ValueError, "feature_bank must have in_features=6, got 5"),
        (
            ["lm_head"],
            {"features": 7, "bank": FeatureBank(6, 8)},
            ValueError,
            "features must be the bank's 8",
        ),
        (["mix.0", "lm_head"], {"features": 5, "gate": "soft"}, ValueError, "gate must be one of"),
    ],
)
def test_refused_swaps_change_nothing(names, options, error, message):
    model: Any = Tied()
    modules = list(model.modules())
    with pytest.raises(error, match=message):
        replace_linear(model, names, **options)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))


def test_tversky_all_in_a_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2, attn_pdrop=0, resid_pdrop=0
    )
    model: Any = GPT2LMHeadModel(config)
    bank = FeatureBank(8, 12)
    count = replace_linear(
        model, lambda name, layer: name.endswith("attn.c_proj") or name == "lm_head", bank=bank
    )
    assert count == 3
    assert model.lm_head.prototypes.weight is model.transformer.wte.weight
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert bank.weight.grad is not None
    assert bool(bank.weight.grad.any())
    with torch.no_grad():
        model.eval()
        assert model(input_ids=tokens).logits.shape == (2, 9, 50)
