"""The whole method in a user's own loop, against the literal reference, in both modes and in trouble."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

from pullback.core.checks import NonFiniteError
from pullback.core.state import StateError
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


def flat(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


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
    for options in ({"thresholds": (-1.0, -1.0, -1.0)}, {"thresholds": (-1.0, -1.0, -1.0), "momentum": 0.0}):
        conductor = GradientConductor(net, WEIGHTS, accumulate=4, mode=mode, **options)
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
    assert weight.grad.tolist() == pytest.approx([2.0, 1.1])
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
        assert (weight.grad / size).tolist() == pytest.approx([2.0, 0.1, 0.0], abs=1e-6)
        assert info.stability == pytest.approx({"a": 1.0, "b": 1.0})


# --- the user's loop -----------------------------------------------------------------------------------------------


def test_resume_is_bitwise_at_every_step():
    data = batches(6, 4)
    options = {"dominance_window": 2, "stability_reference": "resolved", "accumulate": 4}
    for cut in range(7):
        whole, net = model(), model()
        straight = GradientConductor(whole, WEIGHTS, **options)
        infos = train(straight, whole, adamw(whole), data)
        first, optimizer = GradientConductor(net, WEIGHTS, **options), adamw(net)
        train(first, net, optimizer, data[:cut])
        file = io.BytesIO()
        torch.save({"c": first.state_dict(), "o": optimizer.state_dict(), "m": net.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        fresh = model(seed=5)
        second, optimizer = GradientConductor(fresh, WEIGHTS, **options), adamw(fresh)
        fresh.load_state_dict(saved["m"])
        second.load_state_dict(saved["c"])
        optimizer.load_state_dict(saved["o"])
        assert train(second, fresh, optimizer, data[cut:]) == infos[cut:]
        assert all(map(torch.equal, fresh.parameters(), whole.parameters()))


def test_a_saved_state_is_a_snapshot_and_a_wrong_one_changes_nothing():
    net, data = model(), batches(4, 2)
    conductor = GradientConductor(net, WEIGHTS, accumulate=2)
    train(conductor, net, adamw(net), data[:2])
    state = conductor.state_dict()
    kept = copy.deepcopy(state)
    train(conductor, net, adamw(net), data[2:])
    expect_same(state, kept, "a saved state")
    now = conductor.state_dict()
    for wrong in (
        {**state, "format_version": 2},
        {**state, "tasks": ["size", "fit"]},
        {**state, "previous": []},
        {**state, "winners": [7]},
        {**state, "averages": [1.0]},
        {**state, "writer": {**state["writer"], "sizes": [[1]]}},
        {key: value for key, value in state.items() if key != "reference"},
        {"nonsense": 1},
    ):
        with pytest.raises(StateError):
            conductor.load_state_dict(wrong)
        expect_same(conductor.state_dict(), now, "the state")
    with pytest.raises(TypeError, match="winners must be of type"):
        conductor.load_state_dict({**state, "winners": 3})


def test_a_deep_copy_goes_on_alike():
    net, data = model(), batches(4, 2)
    conductor = GradientConductor(net, WEIGHTS, accumulate=2)
    train(conductor, net, adamw(net), data[:2])
    twin_net, twin = copy.deepcopy((net, conductor))
    train(conductor, net, adamw(net), data[2:])
    train(twin, twin_net, adamw(twin_net), data[2:])
    assert all(map(torch.equal, net.parameters(), twin_net.parameters()))


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.AdamW(p, betas=(0.0, 0.95), fused=True),
    lambda p: torch.optim.AdamW(p, betas=(0.0, 0.95), foreach=True), lambda p: torch.optim.RMSprop(p),
])  # fmt: skip
def test_any_optimizer_scheduler_and_closure(make):
    data = batches(3, 2)
    nets = model(dtype=torch.float32), model(dtype=torch.float32)
    for closure, net in enumerate(nets):
        conductor, optimizer = GradientConductor(net, WEIGHTS, accumulate=2), make(net.parameters())
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
        for micro_batches in data.float():
            if closure:
                optimizer.step(lambda b=micro_batches, n=net, c=conductor: run_step(c, n, b).min_cosine)
            else:
                run_step(conductor, net, micro_batches)
                optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=bool(closure))
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))


def test_the_closure_of_a_line_search_is_refused():
    net, micro_batches = model(), batches(1, 2)[0]
    conductor = GradientConductor(net, WEIGHTS, accumulate=2)
    with pytest.raises(RuntimeError, match="got a call inside the closure of LBFGS"):
        torch.optim.LBFGS(net.parameters()).step(lambda: run_step(conductor, net, micro_batches))


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_scales_nothing_but_the_written_gradient(fused):
    """float32 losses and a scale of 2**16: training must be bitwise that without a scaler; an overflow is left out."""
    data = batches(5, 2).float()
    plain, scaled = model(dtype=torch.float32), model(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
    one = GradientConductor(plain, WEIGHTS, accumulate=2)
    two = GradientConductor(scaled, WEIGHTS, accumulate=2)
    first, second = (
        torch.optim.AdamW(n.parameters(), betas=(0.0, 0.95), fused=fused) for n in (plain, scaled)
    )
    for step, micro_batches in enumerate(data):
        if step == 3:  # an overflow in one task
            before = two.state_dict()
            with two.accumulate("fit"):
                scaler.scale(LOSSES["fit"](scaled(micro_batches[0]))).backward()
            with two.accumulate("size"):
                (scaled[0].bias[0] * math.inf).backward()
            assert two.step(scaler).skipped
            scale = scaler.get_scale()
            scaler.step(second)
            scaler.update()
            assert scaler.get_scale() == scale / 2
            two.skipped = 0
            expect_same(two.state_dict(), before, "the state")
        info = run_step(one, plain, micro_batches)
        first.step()
        assert run_step(two, scaled, micro_batches, scaler) == info
        scaler.step(second)
        scaler.update()
        assert all(map(torch.equal, plain.parameters(), scaled.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision_parameters(dtype):
    data = batches(3, 2)
    nets = model(), model(dtype=torch.float32), model(dtype=dtype)
    found = []
    for net, kind in zip(nets, (None, dtype, None), strict=True):
        conductor = GradientConductor(net, WEIGHTS, accumulate=2)
        for micro_batches in data.to(net[0].weight.dtype):
            with torch.autocast("cpu", dtype=kind or torch.bfloat16, enabled=kind is not None):
                run_step(conductor, net, micro_batches)
        assert all(p.grad.dtype == p.dtype for p in net.parameters())
        assert all(
            rows.dtype == (torch.float64 if net is nets[0] else torch.float32)
            for rows in conductor.accumulator.sums
        )
        found.append(flat(net).double())
    for half in found[1:]:
        torch.testing.assert_close(half, found[0], rtol=0.1, atol=0.02)


def test_a_compiled_model_and_batch_norm_are_the_callers():
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, backend="eager")
    one, two = (GradientConductor(n, WEIGHTS, accumulate=2) for n in (net, twin))
    for micro_batches in batches(2, 2):
        run_step(one, net, micro_batches)
        run_step(two, compiled, micro_batches)
        assert torch.equal(flat(net), flat(twin))
    assert net.training
    assert int(net[1].num_batches_tracked) == 4  # every micro-batch was seen in train mode
    assert torch.equal(net[1].running_mean, twin[1].running_mean)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"accumulate": 3},
            ValueError,
            "accumulate must be a multiple of the 2 tasks in stochastic mode, got 3. Use 4",
        ),
        ({"accumulate": 0}, ValueError, "accumulate must be >= 1, got 0"),
        ({"accumulate": 2.0}, TypeError, "accumulate must be an integer"),
        ({"accumulate": 2, "mode": "stochastik"}, ValueError, "Did you mean 'stochastic'"),
        (
            {"accumulate": 2, "nonfinite": "warn"},
            ValueError,
            "nonfinite must be one of 'raise', 'skip', got 'warn'",
        ),
        ({"accumulate": 2, "momentum": 1.0}, ValueError, "beta must be < 1, got 1"),
        ({"accumulate": 2, "thresholds": (0.0, -0.5, -0.8)}, ValueError, "thresholds must ascend"),
        ({"accumulate": 2, "treshold": 1}, TypeError, "treshold"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        GradientConductor(model(), WEIGHTS, **options)


def test_steps_need_all_micro_batches_and_no_more():
    net, x = model(), batches(1, 4)[0]
    conductor = GradientConductor(net, WEIGHTS, accumulate=4)
    with pytest.raises(RuntimeError, match="got fit 0 of 2, size 0 of 2"):
        conductor.step()
    for k in range(2):
        with conductor.accumulate("fit"):
            LOSSES["fit"](net(x[k])).backward()
    with pytest.raises(RuntimeError, match=r"accumulate\('fit'\) must be called 2 times per step"):
        conductor.accumulate("fit")
    with pytest.raises(RuntimeError, match="got size 0 of 2"):
        conductor.step()
    with (
        pytest.raises(ValueError, match="task must be one of fit, size, got 'fitt'"),
        conductor.accumulate("fitt"),
    ):
        pass
    conductor.reset()
    assert run_step(conductor, net, x).step == 0


@pytest.mark.parametrize(("count", "got"), [(0, "0"), (3, "3"), (5, "more")])
def test_a_schedule_needs_exactly_k_micro_batches(count, got):
    conductor = GradientConductor(model(), WEIGHTS, accumulate=4)
    with pytest.raises(ValueError, match=f"batches must hold 4 micro-batches per step, got {got}"):
        list(conductor.schedule(iter(range(count))))


def test_shared_losses_need_sequential_mode_and_all_tasks():
    net, x = model(), batches(1, 1)[0][0]
    with pytest.raises(RuntimeError, match=r"must be used with mode='sequential', got 'stochastic'"):
        GradientConductor(net, WEIGHTS, accumulate=2).backward({"fit": net(x).sum()})
    conductor = GradientConductor(net, WEIGHTS, accumulate=2, mode="sequential")
    with pytest.raises(ValueError, match="losses must be those of fit, size, got fit"):
        conductor.backward({"fit": net(x).sum()})


def test_repr():
    text = repr(GradientConductor(model(), WEIGHTS, accumulate=2))
    assert text.startswith("GradientConductor(TaskAccumulator({fit: 0.7, size: 0.3}, parameters=44, ranks=1)")
