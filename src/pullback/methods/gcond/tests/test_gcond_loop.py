"""The conductor in a user's own loop: resume, optimizers, closures, mixed precision, compilation, and refusals."""

from __future__ import annotations

import copy
import io
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from pullback.core.state import StateError
from pullback.methods.gcond import GradientConductor
from pullback.methods.gcond.tests.test_gcond_conductor import (
    LOSSES,
    WEIGHTS,
    adamw,
    batches,
    flat,
    model,
    run_step,
    train,
)
from pullback.testing.tools import expect_same

# --- the user's loop -----------------------------------------------------------------------------------------------


def test_resume_is_bitwise_at_every_step():
    data = batches(6, 4)
    options: Any = {"dominance_window": 2, "stability_reference": "resolved", "accumulate": 4}
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
    norm = nn.BatchNorm1d(6)
    net = nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 2)).double()
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, backend="eager")
    one, two = (GradientConductor(n, WEIGHTS, accumulate=2) for n in (net, twin))
    for micro_batches in batches(2, 2):
        run_step(one, net, micro_batches)
        run_step(two, compiled, micro_batches)
        assert torch.equal(flat(net), flat(twin))
    assert net.training
    assert norm.num_batches_tracked is not None
    assert int(norm.num_batches_tracked) == 4  # every micro-batch was seen in train mode
    assert all(map(torch.equal, net.buffers(), twin.buffers()))


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


def test_without_torchjd_the_import_says_what_to_install():
    code = "import sys; sys.modules['torchjd'] = None; import pullback.methods.gcond"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 1
    assert 'Aggregators need torchjd. Install it with: pip install "pullback[torchjd]".' in found.stderr
