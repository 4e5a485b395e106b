"""The weights against the paper's equations: every statistic and variant, fixed points, scalings, edge cases."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from pullback.core.checks import NonFiniteError
from pullback.methods.pinn_annealing import GradientAnnealing, weight_matrices
from pullback.methods.pinn_annealing.tests import reference

SHAPES = ((3, 2), (4, 3), (1, 4))


def linear_losses(seed, scales=(5.0, 1.0, 0.2), params=None):
    """Losses whose gradients are fixed: each is the inner product of the parameters with a fixed direction."""
    g = torch.Generator().manual_seed(seed)
    directions = [
        [scale * torch.randn(shape, generator=g, dtype=torch.float64) for shape in SHAPES] for scale in scales
    ]
    params: list[Any] = params or [nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in SHAPES]

    def losses(names):
        return {
            name: torch.stack([(p * d).sum() for p, d in zip(params, row, strict=True)]).sum()
            for name, row in zip(names, directions, strict=True)
        }

    return params, directions, losses


NAMES = ("residual", "boundary", "initial")


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("statistics", ["layer-mean", "global-mean", "cavity"])
@pytest.mark.parametrize("alpha", [0.1, 0.9])
def test_recursion_is_the_papers(statistics, inside, alpha):
    params, directions, losses = linear_losses(1)
    balance = GradientAnnealing(
        NAMES[1:],
        params=params,
        alpha=alpha,
        update_every=1,
        statistics=statistics,
        variant="siam" if inside else "arxiv-v1",
        initial={"boundary": 2.0},
    )
    lam = [2.0, 1.0]
    for _ in range(6):
        balance(losses(NAMES))
        target = reference.targets(directions[:1], directions[1:], lam, statistics=statistics, inside=inside)
        lam = reference.moved(lam, target, alpha)
        assert balance.lam.tolist() == pytest.approx([1.0, *lam], rel=1e-12)


@pytest.mark.parametrize("inside", [False, True])
def test_norm_rule_weighs_the_reference_as_well(inside):
    params, directions, losses = linear_losses(2)
    balance = GradientAnnealing(
        NAMES[1:],
        params=params,
        update_every=1,
        statistics="norm",
        alpha=0.1,
        variant="siam" if inside else None,
    )
    assert balance.variant == ("siam" if inside else "arxiv-v1")
    lam = [1.0, 1.0, 1.0]
    for _ in range(4):
        balance(losses(NAMES))
        lam = reference.moved(lam, reference.norm_targets(directions, lam, inside=inside), 0.1)
        assert balance.lam.tolist() == pytest.approx(lam, rel=1e-12)


@pytest.mark.parametrize("statistics", ["layer-mean", "cavity"])
def test_several_references_count_with_their_largest_entry(statistics):
    params, directions, losses = linear_losses(3, scales=(1.0, 4.0, 0.5))
    balance = GradientAnnealing(
        "data", ["momentum x", "momentum y"], params=params, alpha=1.0, update_every=1, statistics=statistics
    )
    balance(losses(("momentum x", "momentum y", "data")))
    (wanted,) = reference.targets(directions[:2], directions[2:], [1.0], statistics=statistics)
    assert balance.weights["data"].item() == pytest.approx(wanted, rel=1e-12)
    assert balance.weights["momentum x"].item() == balance.weights["momentum y"].item() == 1.0


def settled(alpha, updates, *, scales=(5.0, 1.0, 0.2), **settings):
    params, directions, losses = linear_losses(4, scales)
    balance = GradientAnnealing(NAMES[1:], params=params, alpha=alpha, update_every=1, **settings)
    trace = []
    for _ in range(updates):
        balance(losses(NAMES))
        trace.append(balance.lam[1].item())
    ratios = [
        reference.largest(directions[0]) / reference.mean_of_layer_means(each) for each in directions[1:]
    ]
    return balance, trace, ratios


def test_frozen_gradients_settle_at_the_root_of_the_ratio():
    balance, _, ratios = settled(0.1, 400)
    assert balance.lam[1:].tolist() == pytest.approx([math.sqrt(r) for r in ratios], rel=1e-9)


def test_half_is_herons_iteration():
    _, trace, ratios = settled(0.5, 6)
    assert trace == pytest.approx(reference.heron(ratios[0], 1.0, 6), rel=1e-12)


def test_large_alpha_oscillates_about_the_root():
    _, trace, ratios = settled(0.9, 60)
    signs = [math.copysign(1, lam - math.sqrt(ratios[0])) for lam in trace[20:40]]
    assert all(a != b for a, b in pairwise(signs))
    gaps = [abs(lam - math.sqrt(ratios[0])) for lam in trace[30:40]]
    assert gaps[1] / gaps[0] == pytest.approx(0.8, rel=0.02)


def test_first_preprint_settles_at_the_ratio_geometrically():
    _, trace, ratios = settled(0.3, 12, variant="arxiv-v1")
    gaps = [ratios[0] - lam for lam in trace]
    assert [b / a for a, b in pairwise(gaps)] == pytest.approx([0.7] * 11, rel=1e-9)


@pytest.mark.parametrize(("variant", "term", "residual"), [("siam", 0.5, 0.5), ("arxiv-v1", 1.0, 1.0)])
def test_weights_under_rescaled_losses(variant, term, residual):
    factor = 16.0
    usual, _, _ = settled(0.2, 300, variant=variant)
    louder, _, _ = settled(0.2, 300, variant=variant, scales=(5.0, factor, 0.2))
    stiffer, _, _ = settled(0.2, 300, variant=variant, scales=(5.0 * factor, 1.0, 0.2))
    assert louder.lam[1].item() == pytest.approx(usual.lam[1].item() / factor**term, rel=1e-9)
    assert stiffer.lam[1].item() == pytest.approx(usual.lam[1].item() * factor**residual, rel=1e-9)


# --- edges ----------------------------------------------------------------------------------------------------------


def test_a_term_without_gradient_is_capped():
    params, _, losses = linear_losses(5, scales=(5.0, 0.0, 0.2))
    balance = GradientAnnealing(NAMES[1:], params=params, update_every=1, lam_max=50.0)
    for _ in range(3):
        balance(losses(NAMES))
    assert balance.weights["boundary"].item() == pytest.approx(1 + (50 - 1) * (1 - 0.9**3))
    for _ in range(200):
        balance(losses(NAMES))
    assert balance.weights["boundary"].item() == pytest.approx(50.0, rel=1e-6)
    assert balance.skipped.item() == 0


def test_a_residual_without_gradient_lets_weights_decay_to_the_least():
    params, _, losses = linear_losses(6, scales=(0.0, 1.0, 0.2))
    balance = GradientAnnealing(NAMES[1:], params=params, update_every=1, lam_min=0.5)
    balance(losses(NAMES))
    assert balance.lam[1].item() == pytest.approx(0.9)
    for _ in range(20):
        balance(losses(NAMES))
    assert balance.lam.tolist() == [1.0, 0.5, 0.5]


def test_bounds_hold_from_both_sides():
    params, _, losses = linear_losses(7, scales=(5.0, 1e-9, 1e9))
    balance = GradientAnnealing(
        NAMES[1:], params=params, alpha=1.0, update_every=1, lam_min=0.1, lam_max=10.0
    )
    balance(losses(NAMES))
    assert balance.lam.tolist() == pytest.approx([1.0, 10.0, 0.1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_statistics_that_are_not_finite_keep_the_weight_and_are_counted(bad, where):
    params, directions, losses = linear_losses(8)
    balance = GradientAnnealing(NAMES[1:], params=params, update_every=1)
    balance(losses(NAMES))
    before = balance.lam.clone()
    directions[where][1][0, 0] = bad
    balance(losses(NAMES))
    assert balance.lam[1] == before[1]
    assert (balance.lam[2] == before[2]) == (
        where == 0
    )  # a bad residual touches all terms, a bad term itself
    assert (balance.updates.item(), balance.skipped.item(), balance.steps.item()) == (2, 1, 2)


def test_raise_stops_before_anything_changes():
    params, directions, losses = linear_losses(9)
    balance = GradientAnnealing(NAMES[1:], params=params, update_every=1, nonfinite="raise")
    balance(losses(NAMES))
    before = {name: buffer.clone() for name, buffer in balance.named_buffers()}
    directions[2][0][0, 0] = math.nan
    for call in (balance, balance.backward, balance.update):
        with pytest.raises(NonFiniteError, match=r"step 1: the gradient of initial is NaN"):
            call(losses(NAMES))
    assert all(torch.equal(before[name], buffer) for name, buffer in balance.named_buffers())
    assert all(p.grad is None for p in params)
    warning = GradientAnnealing(NAMES[1:], params=params, update_every=1, nonfinite="warn")
    with pytest.warns(RuntimeWarning, match="initial"):
        warning(losses(NAMES))


def test_a_loss_that_is_a_constant_keeps_its_weight():
    params, _, losses = linear_losses(10)
    balance = GradientAnnealing(NAMES[1:], params=params, update_every=1)
    with_constant = {**losses(NAMES), "initial": torch.zeros((), dtype=torch.float64)}
    total = balance.backward(with_constant)
    assert total == with_constant["residual"] + with_constant["boundary"]
    assert balance.lam[2] == 1.0
    assert balance.lam[1] != 1.0
    assert balance.skipped.item() == 1


def test_half_precision_gradients_are_measured_in_float32():
    values = torch.linspace(-1, 1, 60_000).to(torch.bfloat16)
    w = nn.Parameter(torch.zeros(300, 200, dtype=torch.bfloat16))
    balance = GradientAnnealing("data", params={"w": w}, alpha=1.0, update_every=1)
    balance({"residual": 3 * w.sum(), "data": (w * values.reshape(300, 200)).sum()})
    assert balance.lam.dtype == torch.float32
    assert balance.weights["data"].item() == pytest.approx(3 / values.abs().double().mean().item(), rel=1e-5)


# --- choice of parameters -------------------------------------------------------------------------------------------


def test_biases_change_the_weights():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 9), nn.Tanh(), nn.Linear(9, 1))
    x = torch.randn(32, 2)
    found = []
    for params in (weight_matrices(net), dict(net.named_parameters())):
        balance = GradientAnnealing("data", params=params, alpha=1.0, update_every=1)
        balance({"residual": (5 * net(x)).square().mean(), "data": (net(x) - 1).square().mean()})
        found.append(balance.weights["data"].item())
    assert abs(found[0] / found[1] - 1) > 0.05


def test_tied_parameters_count_once_and_frozen_ones_not_at_all():
    params, directions, losses = linear_losses(11)
    balance = GradientAnnealing(NAMES[1:], params=[*params, params[0]], alpha=1.0, update_every=1)
    assert len(balance.layers) == 3
    params[1].requires_grad_(False)
    balance(losses(NAMES))
    kept = [[row[0], row[2]] for row in directions]
    assert balance.lam[1:].tolist() == pytest.approx(
        reference.targets(kept[:1], kept[1:], [1.0, 1.0]), rel=1e-12
    )
    assert balance.stats.terms["boundary"].isnan().tolist() == [False, True, False]
    for p in params:
        p.requires_grad_(False)
    params[0].requires_grad_(True)
    balance._params = params[1:]
    with pytest.raises(ValueError, match="got 2 frozen ones"):
        balance.update(losses(NAMES))


def test_statistics_can_be_read():
    params, directions, losses = linear_losses(12)
    balance = GradientAnnealing(NAMES[1:], params=params, update_every=1)
    assert balance.stats.reference["residual"].isnan().all()
    balance(losses(NAMES))
    stats = balance.stats
    assert stats.layers == ("param0", "param1", "param2")
    assert stats.reference["residual"].tolist() == pytest.approx(
        [reference.largest([layer]) for layer in directions[0]]
    )
    assert stats.terms["initial"].tolist() == pytest.approx(
        [reference.mean_of_all([layer]) for layer in directions[2]]
    )


def test_no_gradient_flows_through_the_weights():
    params, directions, losses = linear_losses(13)
    balance = GradientAnnealing(NAMES[1:], params=params, alpha=0.7, update_every=1, apply="now")
    total = balance(losses(NAMES))
    assert not balance.lam.requires_grad
    total.backward()
    lam = balance.lam.tolist()
    for at, p in enumerate(params):
        wanted = directions[0][at] + lam[1] * directions[1][at] + lam[2] * directions[2][at]
        assert torch.allclose(p.grad, wanted, rtol=1e-12, atol=0)


def test_no_warning_and_no_host_read_in_the_default_policy(monkeypatch):
    params, _, losses = linear_losses(14)
    balance = GradientAnnealing(NAMES[1:], params=params, update_every=1)
    named = losses(NAMES)
    reads = []
    for name in ("item", "__bool__", "__float__", "__int__", "tolist"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, o=original, n=name: reads.append(n) or o(self, *a)
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balance(named)
        balance.backward(named)
    assert reads == []
