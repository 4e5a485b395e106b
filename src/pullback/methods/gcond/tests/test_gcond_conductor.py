"""The whole method in a user's own loop, against the literal reference, in both modes and in trouble."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from pullback.core.checks import NonFiniteError
from pullback.methods.gcond import GradientConductor
from pullback.methods.gcond.tests import reference
from pullback.testing.tools import expect_same

WEIGHTS = {"fit": 0.7, "size": 0.3}


def model(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


def batches(steps, count, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(steps, count, 6, 4, generator=g, dtype=torch.float64).to(dtype)


LOSSES = {
    "fit": lambda out: (out - 1).square().mean(),
    "size": lambda out: (out + 1).abs().mean(),
    "third": lambda out: out.exp().mean(),
}


def written(p):
    assert p.grad is not None
    return p.grad


def flat(net):
    return torch.cat([written(p).flatten() for p in net.parameters()])


def gradient(net, name, x):
    return torch.cat([g.flatten() for g in torch.autograd.grad(LOSSES[name](net(x)), list(net.parameters()))])


def run_step(conductor, net, micro_batches, scaler=None):
    for task, x in conductor.schedule(micro_batches):
        with conductor.accumulate(task):
            loss = LOSSES[task](net(x))
            (loss if scaler is None else scaler.scale(loss)).backward()
    return conductor.step() if scaler is None else conductor.step(scaler)


def train(conductor, net, optimizer, data):
    found = []
    for micro_batches in data:
        found.append(run_step(conductor, net, micro_batches))
        optimizer.step()
        optimizer.zero_grad()
    return found


def adamw(net):
    return torch.optim.AdamW(net.parameters(), lr=0.02, betas=(0.0, 0.95))


def accumulated(net, tasks, mode, micro_batches):
    """Weighted means by autograd alone."""
    rows = []
    for i, (name, weight) in enumerate(tasks.items()):
        share = len(micro_batches) // len(tasks)
        mine = micro_batches if mode == "sequential" else micro_batches[i * share : (i + 1) * share]
        rows.append(weight * torch.stack([gradient(net, name, x) for x in mine]).mean(0))
    return rows


# --- the method ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["stochastic", "sequential"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dominance_window": 2, "momentum": 0.0, "max_iters": None},
        {"stability_reference": "resolved", "norm_cap": 0.5},
        {"smooth": False, "ema_bias_correction": True, "thresholds": (-0.5, -0.2, 0.3)},
    ],
    ids=str,
)
@pytest.mark.parametrize("tasks", [WEIGHTS, {"fit": 1.0, "size": 2.0, "third": 0.5}], ids=len)
def test_training_equals_the_reference(tasks, options, mode):
    net = model()
    conductor = GradientConductor(net, tasks, accumulate=6, mode=mode, **options)
    literal = reference.Conductor(len(tasks), **options)
    optimizer, rounds = adamw(net), 0
    for micro_batches in batches(12, 6):
        rows = accumulated(net, tasks, mode, micro_batches)
        info = run_step(conductor, net, micro_batches)
        torch.testing.assert_close(flat(net), literal.step(rows), rtol=1e-7, atol=1e-10)
        assert list(info.norms.values()) == pytest.approx([float(g.norm()) for g in rows])
        rounds += info.rounds
        optimizer.step()
        optimizer.zero_grad()
    assert rounds >= 6


def test_blocks_of_the_schedule():
    stochastic = GradientConductor(model(), ("fit", "size"), accumulate=4)
    assert list(stochastic.schedule("abcd")) == [("fit", "a"), ("fit", "b"), ("size", "c"), ("size", "d")]
    sequential = GradientConductor(model(), ("fit", "size"), accumulate=2, mode="sequential")
    assert list(sequential.schedule(iter("ab"))) == [("fit", "a"), ("size", "a"), ("fit", "b"), ("size", "b")]


def test_a_shared_forward_pass_gives_the_same_gradient():
    data = batches(4, 3)
    apart, together = model(), model()
    one = GradientConductor(apart, WEIGHTS, accumulate=3, mode="sequential")
    two = GradientConductor(together, WEIGHTS, accumulate=3, mode="sequential")
    for micro_batches in data:
        first = run_step(one, apart, micro_batches)
        for x in micro_batches:
            out = together(x)
            two.backward({name: LOSSES[name](out) for name in WEIGHTS})
        assert two.step() == first
        assert torch.equal(flat(apart), flat(together))


@pytest.mark.parametrize("mode", ["stochastic", "sequential"])
def test_without_conflicts_or_with_thresholds_off_it_is_the_weighted_sum(mode):
    net, micro_batches = model(), batches(1, 4)[0]
    for momentum in (0.9, 0.0):
        off = (-1.0, -1.0, -1.0)
        conductor = GradientConductor(
            net, WEIGHTS, accumulate=4, mode=mode, thresholds=off, momentum=momentum
        )
        info = run_step(conductor, net, micro_batches)
        assert info.rounds == 0
        assert info.min_cosine < 0
        torch.testing.assert_close(flat(net), sum(accumulated(net, WEIGHTS, mode, micro_batches)))
    agreeing = GradientConductor(
        net, {"fit": 1.0, "again": 2.0}, accumulate=2, mode="sequential", momentum=0.0
    )
    for task, x in agreeing.schedule(micro_batches[:2]):
        with agreeing.accumulate(task):
            LOSSES["fit"](net(x)).backward()
    assert agreeing.step().winner is None
    torch.testing.assert_close(
        flat(net), 3 * torch.stack([gradient(net, "fit", x) for x in micro_batches[:2]]).mean(0)
    )


def test_info_tells_what_happened():
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    conductor = GradientConductor([weight], ("a", "b", "c"), accumulate=3, momentum=0.0)
    slopes = {"a": (2.0, 0.0), "b": (-0.9, 0.1), "c": (0.0, 1.0)}
    for task, slope in conductor.schedule(slopes.values()):
        with conductor.accumulate(task):
            (weight @ torch.tensor(slope, dtype=torch.float64)).backward()
    info = conductor.step()
    assert (info.step, info.skipped, info.rounds, info.winner) == (0, False, 1, "a")
    assert (info.conflicts[0].winner, info.conflicts[0].loser) == ("a", "b")
    assert info.conflicts[0].cosine == info.min_cosine == pytest.approx(-0.9 / math.hypot(0.9, 0.1))
    assert info.norms == pytest.approx({"a": 2.0, "b": math.hypot(0.9, 0.1), "c": 1.0})
    assert info.cosines[0] == pytest.approx((1.0, info.min_cosine, 0.0))
    assert info.stability == {"a": 0.0, "b": 0.0, "c": 0.0}
    assert info.weights == pytest.approx({"a": 1.45, "b": 1.0, "c": 1.0})
    assert written(weight).tolist() == pytest.approx([2.0, 1.1])
    for task, slope in conductor.schedule(slopes.values()):
        with conductor.accumulate(task):
            (weight @ torch.tensor(slope, dtype=torch.float64)).backward()
    assert conductor.step().stability == pytest.approx({"a": 1.0, "b": 1.0, "c": 1.0})


# --- edge cases ----------------------------------------------------------------------------------------------------


def test_one_task_is_plain_accumulation_and_momentum():
    net, data, momentum = model(), batches(3, 2), 0.0
    conductor = GradientConductor(net, ("fit",), accumulate=2)
    for step, micro_batches in enumerate(data, start=1):
        info = run_step(conductor, net, micro_batches)
        assert (info.min_cosine, info.winner, info.rounds) == (1.0, None, 0)
        momentum = 0.9 * momentum + 0.1 * accumulated(net, {"fit": 1.0}, "sequential", micro_batches)[0]
        torch.testing.assert_close(flat(net), momentum / (1 - 0.9**step))
    assert conductor.accumulator.previous == []


def test_a_zero_gradient_and_a_task_without_gradients():
    net, x = model(), batches(1, 1)[0][0]
    conductor = GradientConductor(net, ("fit", "zero", "none"), accumulate=3, momentum=0.0)
    for _ in range(3):
        with conductor.accumulate("fit"):
            LOSSES["fit"](net(x)).backward()
        with conductor.accumulate("zero"):
            (0.0 * net(x)).sum().backward()
        with conductor.accumulate("none", allow_empty=True):
            pass
        info = conductor.step()
        assert info.rounds == 0
        assert (info.norms["zero"], info.norms["none"]) == (0.0, 0.0)
        torch.testing.assert_close(flat(net), gradient(net, "fit", x))


def test_parallel_and_opposite_tasks():
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    direction = torch.tensor([3.0, 4.0], dtype=torch.float64)
    for sign, wanted in ((1.0, 3.0), (-1.0, -2.0)):
        conductor = GradientConductor([weight], ("a", "b"), accumulate=2, momentum=0.0)
        for task, size in (("a", 1.0), ("b", 2.0 * sign)):
            with conductor.accumulate(task):
                (size * weight @ direction).backward()
        conductor.step()
        torch.testing.assert_close(
            weight.grad, wanted * direction
        )  # opposed: the larger wins, the other vanishes


def test_dominance_lets_the_other_win_every_fourth_time():
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    conductor = GradientConductor([weight], ("a", "b"), accumulate=2, dominance_window=3)
    winners = []
    for _ in range(8):
        for task, slope in (("a", (2.0, 0.0)), ("b", (-1.0, 0.1))):
            with conductor.accumulate(task):
                (weight @ torch.tensor(slope, dtype=torch.float64)).backward()
        winners.append(conductor.step().winner)
    assert winners == ["a", "a", "a", "b", "a", "a", "a", "b"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_is_raised_by_name_or_skipped_without_a_trace(bad):
    data = batches(4, 2)
    for policy in ("raise", "skip"):
        net = model()
        conductor = GradientConductor(net, WEIGHTS, accumulate=2, nonfinite=policy, dominance_window=2)
        optimizer = adamw(net)
        train(conductor, net, optimizer, data[:3])
        state, moments = conductor.state_dict(), copy.deepcopy(optimizer.state_dict())
        values = [p.detach().clone() for p in net.parameters()]
        with conductor.accumulate("fit"):
            LOSSES["fit"](net(data[3][0])).backward()
        with conductor.accumulate("size"):
            (net[2].bias[0] * bad).backward()
        if policy == "raise":
            words = (
                r"GradientConductor, step 3: the gradient of '2.bias for task size' holds (NaN|Inf) in 1 of 2"
            )
            with pytest.raises(NonFiniteError, match=words):
                conductor.step()
            conductor.reset()
        else:
            info = conductor.step()
            assert (info.skipped, info.step, info.winner, info.norms) == (True, 3, None, {})
            assert all(p.grad is None for p in net.parameters())
            optimizer.step()
            assert conductor.skipped == 1
            conductor.skipped = 0
        expect_same(conductor.state_dict(), state, "the state")
        expect_same(optimizer.state_dict(), moments, "the optimizer")
        assert all(map(torch.equal, net.parameters(), values))
        untouched = model()
        twin = GradientConductor(untouched, WEIGHTS, accumulate=2, dominance_window=2)
        other = adamw(untouched)
        train(twin, untouched, other, data)
        train(conductor, net, optimizer, data[3:])
        assert all(map(torch.equal, net.parameters(), untouched.parameters()))


def test_gradients_beyond_the_range_of_their_squares_are_no_trouble():
    weight = nn.Parameter(torch.zeros(3))
    for size in (1e-25, 1e25):
        conductor = GradientConductor([weight], ("a", "b"), accumulate=2, momentum=0.0, norm_cap=None)
        for _ in range(2):
            for task, slope in (("a", (2.0, 0.0, 0.0)), ("b", (-0.9, 0.1, 0.0))):
                with conductor.accumulate(task):
                    (weight @ (torch.tensor(slope) * size)).backward()
            info = conductor.step()
        assert (written(weight) / size).tolist() == pytest.approx([2.0, 0.1, 0.0], abs=1e-6)
        assert info.stability == pytest.approx({"a": 1.0, "b": 1.0})
