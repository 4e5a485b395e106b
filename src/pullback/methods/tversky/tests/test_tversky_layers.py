"""Shapes, precision, trouble, the user's loop, two processes."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pullback.methods.tversky import EncodedRows, FeatureBank, TverskyProjection, TverskySimilarity
from pullback.methods.tversky.forms import FLOOR
from pullback.testing import run_ranks


def rows(*size, seed=0, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def head(d=6, m=4, k=9, **options) -> Any:
    torch.manual_seed(0)
    return TverskyProjection(d, m, k, **options)


# --- shapes and precision ---------------------------------------


def test_leading_sizes_are_kept():
    layer = head()
    x = rows(2, 3, 5, 6)
    out = layer(x)
    assert out.shape == (2, 3, 5, 4)
    torch.testing.assert_close(out[1, 2], layer(x[1, 2]))
    torch.testing.assert_close(out[1, 2, 3], layer(x[1, 2, 3]))


def test_normalising_is_over_the_last_axis():
    layer = head(normalize=True)
    x = rows(2, 5, 6)
    torch.testing.assert_close(layer(x), layer(7.0 * x))
    torch.testing.assert_close(layer(x)[1], layer(x[1]))


@pytest.mark.parametrize(
    "form",
    [{}, {"gate": "tanh"}, {"intersection": "max", "difference": "subtractmatch", "reduce": "feature"}],
)
def test_batches_of_pairs(form):
    layer = TverskySimilarity(6, 9, **form)
    x, y = rows(2, 5, 6), rows(2, 4, 6, seed=1)
    out = layer(x, y)
    assert out.shape == (2, 5, 4)
    torch.testing.assert_close(out[1], layer(x[1], y[1]))
    together = torch.autograd.grad(out.square().sum(), layer.feature_bank.weight)[0]
    alone = torch.autograd.grad(
        sum(layer(x[i], y[i]).square().sum() for i in (0, 1)), layer.feature_bank.weight
    )[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x, y[0])[1], layer(x[1], y[0]))


@pytest.mark.parametrize("reduce", ["aggregate", "feature"])
@pytest.mark.parametrize("intersection", ["product", "min", "softmin"])
def test_empty_batches_and_one_prototype(intersection, reduce):
    layer = head(m=1, intersection=intersection, difference="subtractmatch", reduce=reduce)
    for size in ((0, 6), (2, 0, 6)):
        x = torch.zeros(size, requires_grad=True)
        out = layer(x)
        assert out.shape == (*size[:-1], 1)
        grads = torch.autograd.grad(out.sum(), [x, *layer.parameters()])
        assert all(not bool(g.any()) for g in grads)


def test_bfloat16_is_rounded_once():
    """256 features in common and 257 of the input alone: -1, though bfloat16 holds no 257."""
    layer = head(d=513, m=1, k=513, alpha=1.0).bfloat16()
    with torch.no_grad():
        layer.feature_bank.weight.copy_(torch.eye(513))
        layer.prototypes.weight.copy_(torch.where(torch.arange(513) < 256, 1.0, -1.0))
    out = layer(torch.ones(2, 513, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert out.flatten().tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("form", [{"difference": "subtractmatch"}, {"model": "ratio"}, {"reduce": "feature"}])
def test_bfloat16_of_the_other_forms(form):
    layer, x = head(k=64, intersection="min", **form).bfloat16(), rows(16, 6).bfloat16()
    out, exact = layer(x).detach(), copy.deepcopy(layer).double()(x.double()).detach()
    assert out.dtype == torch.bfloat16
    assert float((out.double() - exact).abs().max() / exact.abs().max()) < 0.02


def test_first_weights():
    torch.manual_seed(0)
    for init, low, high in (("symmetric", -1 / 8, 1 / 8), ("official", 0.0, 1.0)):
        layer: Any = TverskyProjection(64, 100, 200, init=init)
        for weight in (layer.feature_bank.weight, layer.prototypes.weight):
            for found, wanted in ((weight.min(), low), (weight.max(), high)):
                assert found.item() == pytest.approx(wanted, abs=0.01 * (high - low))
    before = layer.feature_bank.weight.detach().clone()
    layer.feature_bank.reset_parameters()
    assert not torch.equal(before, layer.feature_bank.weight)
    assert layer.feature_bank.weight.min().item() >= 0


def test_autocast_keeps_parameters_in_float32():
    layer, x = head(k=64), rows(16, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        F.cross_entropy(out.float(), torch.zeros(16, dtype=torch.long)).backward()
    assert out.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


# --- trouble ----------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: head()(rows(3, 5)), r"x must be \[\.\.\., 6\], got shape \(3, 5\)"),
        (lambda: head()(torch.zeros(3, 6, dtype=torch.long)), "x must be a floating tensor"),
        (lambda: head()([1.0]), "x must be a floating tensor"),
        (lambda: TverskySimilarity(6, 9)(rows(3, 6), rows(6)), "y must be"),
        (lambda: TverskySimilarity(6, 9)(rows(3, 6), rows(2, 4, 6)), "y must be"),
        (lambda: TverskySimilarity(6, 9, model="ratio", beta=-1.0), "beta must be >= 0"),
        (lambda: EncodedRows(torch.zeros(3), nn.Identity()), r"inputs must be \[rows"),
        (lambda: head().explain(rows(2, 6), 0), "x must be of shape"),
        (lambda: head().explain(rows(6), 4), "index must be below 4, got 4"),
    ],
)
def test_refusals(call, message):
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        call()


def test_a_vanishing_denominator_is_held():
    """Learned weights may turn negative; the official quotient then passes through infinity."""
    layer = head(model="ratio", d=2, k=2, m=1)
    with torch.no_grad():
        layer.feature_bank.weight.copy_(torch.eye(2))
        layer.prototypes.weight.copy_(torch.tensor([[2.0, 0.0]]))
        layer.beta.fill_(-0.5)  # denominator: common + 0.5 mine - 0.5 * 2 + 1
    x = torch.tensor([[0.0, -1.0], [1e-3, -1.0], [1.0, 1.0]], requires_grad=True)
    out = layer(x)
    assert out[0].item() == 0.0
    assert out[1].item() == pytest.approx(
        2e-3 / (2e-3 + 1), rel=1e-3
    )  # feature 0 is shared: nothing is theirs
    with torch.no_grad():
        layer.beta.fill_(-1.0)
        layer.alpha.fill_(-4.0)
    out = layer(x)
    assert out[2].item() == pytest.approx(2.0 / FLOOR)  # 2 - 4 * 1 + 1 = -1 without the floor
    assert layer.diagnostics(x.detach()).floored == pytest.approx(2 / 3)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.sum(), [x, layer.alpha, layer.beta]))


def test_dead_inputs_get_constant_logits_and_no_gradient():
    layer = head()
    with torch.no_grad():
        layer.feature_bank.weight.abs_()
    x = -rows(3, 6).abs()
    x.requires_grad_()
    out = layer(x)
    t = layer.feature_bank(layer.prototypes.weight).relu()
    torch.testing.assert_close(out, (-0.5 * t.sum(1)).expand(3, 4))
    assert not bool(torch.autograd.grad(out.sum(), x)[0].any())
    assert layer.diagnostics(x.detach()).dead_inputs == 1.0


def test_gates_that_tell_nothing_apart_are_warned_of_once():
    torch.manual_seed(0)
    x = rows(32, 16).abs()
    layer = TverskyProjection(16, 10, 24, init="official")
    with pytest.warns(RuntimeWarning, match="has every feature") as caught:
        layer(x)
    assert len(caught) == 2  # inputs and prototypes
    dead = TverskyProjection(16, 10, 24)
    with torch.no_grad():
        dead.feature_bank.weight.abs_()
    with pytest.warns(RuntimeWarning, match="every input has no feature"):
        dead(-x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        dead(-x)
        TverskyProjection(16, 10, 24)(rows(32, 16))
        TverskyProjection(16, 10, 24)(torch.zeros(32, 16))
        TverskyProjection(16, 10, 24, init="official").eval()(x)


# --- learning ---------------------------------------------------


def test_prototypes_and_features_as_inputs_are_trained_through_the_encoder():
    torch.manual_seed(0)
    linear = nn.Linear(9, 6)
    encoder = nn.Sequential(nn.Flatten(), linear)
    images, features, x = rows(4, 3, 3), rows(12, 3, 3, seed=1), rows(7, 3, 3, seed=2)
    layer: Any = TverskyProjection(
        6, 4, feature_bank=EncodedRows(features, encoder), prototypes=EncodedRows(images, encoder)
    )
    names = dict(layer.named_parameters())
    assert set(names) == {"theta", "alpha", "beta", "feature_bank.inputs", "prototypes.inputs"}
    plain = TverskySimilarity(6, 12)
    with torch.no_grad():
        plain.feature_bank.weight.copy_(encoder(features))
    out = layer(encoder(x))
    torch.testing.assert_close(out, plain(encoder(x), encoder(images)))
    grads = torch.autograd.grad(out.square().sum(), [*names.values(), linear.weight])
    assert all(bool(g.any()) for g in grads)
    assert layer.prototypes.inputs.data_ptr() != images.data_ptr()
    assert 0 < layer.diagnostics(encoder(x)).prototype_active < 1


def train(model, part=slice(None), scheduler=None, start=0, steps=6, state=None):
    x, y = rows(6, 8, 6, dtype=torch.float64), torch.arange(8).remainder(4)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    if state is not None:
        optimizer.load_state_dict(state)
    for step in range(start, steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x[step][part]), y[part]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("form", [{}, {"intersection": "min", "difference": "subtractmatch"}])
def test_resuming_is_bitwise(form):
    through, stopped = (head(**form).double() for _ in range(2))
    train(through)
    state = train(stopped, steps=3)
    fresh = head(**form).double()
    fresh.load_state_dict(stopped.state_dict())
    train(fresh, start=3, state=state)
    for p, q in zip(through.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q)


def test_accumulation_equals_the_whole_batch():
    layer, x = head().double(), rows(8, 6, dtype=torch.float64)
    layer(x).square().sum().backward()
    whole = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    for part in x.split(2):
        layer(part).square().sum().backward()
    for p, grad in zip(layer.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_frozen_parts_get_no_gradient_and_the_rest_is_unchanged():
    layer, x = head().double(), rows(8, 6, dtype=torch.float64)
    named = dict(layer.named_parameters())
    full = dict(zip(named, torch.autograd.grad(layer(x).square().sum(), list(named.values())), strict=True))
    for size in (1, 2, 4):
        for frozen in itertools.combinations(named, size):
            for name, p in named.items():
                p.requires_grad_(name not in frozen)
            live = {name: p for name, p in named.items() if p.requires_grad}
            grads = torch.autograd.grad(layer(x).square().sum(), list(live.values()))
            for name, grad in zip(live, grads, strict=True):
                torch.testing.assert_close(grad, full[name])


def test_a_loss_scale_changes_nothing():
    layer, x = head(), rows(8, 6)
    plain = torch.autograd.grad(layer(x).square().sum(), layer.prototypes.weight)[0]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    scaler.scale(layer(x).square().sum()).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(layer.prototypes.weight.grad, plain)


def stacked():
    bank = FeatureBank(6, 9)  # one bank in two layers: its gradient arrives twice
    return nn.Sequential(
        TverskyProjection(6, 6, feature_bank=bank), TverskyProjection(6, 4, feature_bank=bank)
    )


def trained_on(rank):
    torch.manual_seed(3)
    inner = stacked().double()
    train(nn.parallel.DistributedDataParallel(inner), slice(rank, None, 2))
    return torch.cat([p.detach().reshape(-1) for p in inner.parameters()])


@pytest.mark.timeout(240)
def test_two_ranks_equal_one_process():
    first, second = run_ranks(trained_on)
    assert torch.equal(first, second)
    torch.manual_seed(3)
    alone = stacked().double()
    train(alone)
    alone = torch.cat([p.detach().reshape(-1) for p in alone.parameters()])
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-9)
