"""The optimizer in the user's own loop: state, copies, scalers, closures, compile, memory, and what is refused."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch

from pullback.core.checks import NonFiniteError
from pullback.core.state import StateError
from pullback.methods.lanton import LANTON, geometry, lmo_groups
from pullback.testing.tools import tensors_left_by


def network(dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8),
        torch.nn.Tanh(),
        torch.nn.Linear(8, 8),
        torch.nn.LayerNorm(8),
        torch.nn.Linear(8, 3),
    )
    return model.to(dtype)


def batch(step, dtype=torch.float32):
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(step)).to(dtype)


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        model(batch(step, next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()


def make(model, **settings):
    return LANTON(lmo_groups(model), **dict[str, Any]({"lr": 0.02, **settings}))


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def through_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- state -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("settings", [{"alpha": 0.01}, {"noise_every": 3}, {}])
@pytest.mark.parametrize("stop", [1, 3, 22])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(dtype, settings, stop):
    whole = network(dtype)
    train(whole, make(whole, **settings), range(stop + 10))
    first = network(dtype)
    optimizer = make(first, **settings)
    train(first, optimizer, range(stop))
    weights, state = through_file((first.state_dict(), optimizer.state_dict()))
    second = network(dtype)
    second.load_state_dict(weights)
    fresh = make(second, alpha=9.0)  # settings come with the state
    fresh.load_state_dict(state)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        if "noise" in optimizer.state[p]:
            assert fresh.state[q]["noise"].dtype == torch.float32
            assert torch.equal(fresh.state[q]["noise"], optimizer.state[p]["noise"])
    train(second, fresh, range(stop, stop + 10))
    assert equal(second, whole)


def test_copies_and_pickles_go_on():
    model = network()
    optimizer = make(model, alpha=0.01, nonfinite="skip")
    train(model, optimizer, range(4))
    twin, copied = copy.deepcopy((model, optimizer))
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    third, loaded = torch.load(file, weights_only=False)
    train(model, optimizer, range(4, 8))
    for one, its in ((twin, copied), (third, loaded)):
        assert its.defaults["nonfinite"] == "skip"
        train(one, its, range(4, 8))
        assert equal(one, model)


def test_the_state_of_another_optimizer_is_refused_and_changes_nothing():
    model = network()
    optimizer = make(model)
    train(model, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    other = torch.optim.AdamW(model.parameters()).state_dict()
    with pytest.raises(StateError, match=r"groups must hold \['adjust_lr_fn'.*Load LANTON's state"):
        optimizer.load_state_dict(other)
    assert str(optimizer.state_dict()) == str(before)


def test_a_distributed_checkpoint_carries_everything():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    whole, first = network(), network()
    train(whole, make(whole, alpha=0.01), range(8))
    optimizer = make(first, alpha=0.01)
    train(first, optimizer, range(4))
    state = get_optimizer_state_dict(first, optimizer)
    second = network()
    second.load_state_dict(first.state_dict())
    fresh = make(second, alpha=0.01)
    set_optimizer_state_dict(second, fresh, state)
    train(second, fresh, range(4, 8))
    assert equal(second, whole)


def test_memory_is_one_gradient_more_than_muons():
    """Bytes of state, counted: momentum and one gradient, and four bytes per layer."""
    params = [torch.nn.Parameter(torch.zeros(64, 64)) for _ in range(3)]

    def held(optimizer):
        for step in range(3):
            for p in params:
                p.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        kept = [t for state in optimizer.state.values() for t in state.values()]
        return sum(t.untyped_storage().nbytes() for t in kept if t.dim()), sum(t.dim() == 0 for t in kept)

    size = 3 * 64 * 64 * 4
    assert held(torch.optim.Muon(params)) == (size, 0)
    assert held(LANTON(params, noise_every=None)) == (size, 0)
    assert held(LANTON(params)) == (2 * size, 3)
    assert held(LANTON(params, noise_every=4)) == (size, 0)  # nothing was worth keeping yet


def test_steps_leave_no_tensors_and_work_in_bounded_chunks(monkeypatch):
    model = network()
    optimizer = make(model)
    train(model, optimizer, range(25))
    assert tensors_left_by(lambda: train(model, optimizer, range(25))) < 60
    seen, plain = [], geometry.stacked
    monkeypatch.setattr(geometry, "CHUNK", 130)
    monkeypatch.setattr(geometry, "stacked", lambda some, wide: seen.append(len(some)) or plain(some, wide))
    params = [torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(5)]
    chunked = LANTON(params)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn(8, 8)
        chunked.step()
    assert max(seen) == 2


# --- the user's loop -------------------------------------------------------------------------------------


def test_closures_give_ordinary_steps():
    model, other = network(), network()
    plain, optimizer = make(model, alpha=0.01), make(other, alpha=0.01)
    train(model, plain, range(4))
    for step in range(4):

        def closure(step=step):
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = other(batch(step)).square().mean()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0
    assert equal(model, other)


def test_grad_scaler_gives_unscaled_noise_and_skips_whole_steps():
    model, other = network(), network()
    plain, optimizer = make(model, alpha=0.01), make(other, alpha=0.01)
    train(model, plain, range(4))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for step in (0, 1, math.inf, 2, 3):
        optimizer.zero_grad()
        overflow = step == math.inf
        scaler.scale(
            other(batch(0 if overflow else step)).square().mean() * (math.inf if overflow else 1)
        ).backward()
        scaler.step(optimizer)
        scaler.update(2.0**10)
    assert equal(model, other)
    assert plain.noise() == optimizer.noise()


@pytest.mark.parametrize("policy", ["raise", "skip", "warn", None])
def test_nonfinite_gradients(policy):
    model = network()
    optimizer = make(model, alpha=0.01, nonfinite=policy)
    train(model, optimizer, range(3))
    twin, untouched = copy.deepcopy((model, optimizer))
    model(batch(3)).square().mean().backward()
    model[2].weight.grad[0, 0] = math.nan
    if policy == "raise":
        with pytest.raises(
            NonFiniteError, match=r"LANTON, step 3: the gradient of '2.weight' holds NaN in 1 of 64"
        ):
            optimizer.step()
    elif policy == "warn":
        with pytest.warns(RuntimeWarning, match="the gradient of '2.weight' holds NaN"):
            optimizer.step()
    else:
        optimizer.step()
    noise = optimizer.noise()
    assert all(
        math.isfinite(value) for value in noise.values()
    )  # a measurement that is not finite is left out
    if policy in {"raise", "skip"}:
        assert noise == untouched.noise()
        train(model, optimizer, range(3, 6))
        train(twin, untouched, range(3, 6))
        assert equal(model, twin)
    else:
        assert noise["2.weight"] == untouched.noise()["2.weight"]
        assert noise["0.weight"] != untouched.noise()["0.weight"]


def test_added_groups_schedulers_and_tensor_rates():
    model = network()
    optimizer = make(model, alpha=0.01, lr=torch.tensor(0.02))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=9, cycle_momentum=False)
    train(model, optimizer, range(3))
    scheduler.step()
    extra = torch.nn.Parameter(torch.ones(4, 4))
    optimizer.add_param_group({"params": [("extra", extra)], "alpha": math.inf, "lr": 0.5})
    for step in (3, 4):
        optimizer.zero_grad()
        (model(batch(step)).square().mean() + extra.diagonal().sum()).backward()
        optimizer.step()
    wanted = 1 - 2 * 0.5 * geometry.newton_schulz(torch.eye(4)[None], dtype=torch.bfloat16)[0].float()
    assert torch.allclose(extra, wanted, atol=0.02)
    assert optimizer.layer_rates()["extra"] == 0.5
    assert all(p.isfinite().all() for p in model.parameters())


def test_maximize_and_settings_by_group():
    up = torch.nn.Parameter(torch.zeros(3, 3))
    down = torch.nn.Parameter(torch.zeros(3, 3))
    optimizer = LANTON(
        [{"params": [up], "maximize": True}, {"params": [down], "weight_decay": 0.5, "my_key": 1}], alpha=0.1
    )
    for step in range(4):
        up.grad = torch.randn(3, 3, generator=torch.Generator().manual_seed(step))
        down.grad = up.grad.clone()
        optimizer.step()
        if step == 0:
            assert torch.equal(up, -down)
    assert not torch.equal(up, -down)
    assert optimizer.param_groups[1]["my_key"] == 1


def test_the_step_compiles_whole_without_a_host_read():
    model, other = network(), network()
    plain = make(model, alpha=0.01, nonfinite=None, noise_every=2)
    optimizer = make(other, alpha=0.01, nonfinite=None, noise_every=2)
    train(model, plain, range(8))
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(optimizer.step, backend=count, fullgraph=True)
    for number in range(8):
        optimizer.zero_grad()
        other(batch(number)).square().mean().backward()
        step()
    torch._dynamo.reset()
    assert equal(model, other)
    assert len(graphs) <= 6  # first steps, keeping, measuring; not one per step


class Picture(torch.nn.Module):
    """Kernels, a scalar and an empty parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3)
        self.scalar, self.empty = torch.nn.Parameter(torch.tensor(1.0)), torch.nn.Parameter(torch.zeros(0, 3))

    def forward(self, x):
        return self.second(self.first(x).relu()) * self.scalar


def test_convolution_kernels_scalars_and_empty_parameters():
    model = Picture()
    kernels = model.first.weight, model.second.weight
    flat = [torch.nn.Parameter(p.detach().flatten(1).clone()) for p in kernels]
    optimizer, matrices = LANTON(model.named_parameters(), alpha=0.1), LANTON(flat, alpha=0.1)
    for step in range(3):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x.contiguous(memory_format=torch.channels_last)).square().mean().backward()
        for p, q in zip(kernels, flat, strict=True):
            assert p.grad is not None
            q.grad = p.grad.flatten(1).clone()
        before = model.scalar.item()
        optimizer.step()
        matrices.step()
        assert abs(model.scalar.item() - before) <= 0.02 * 1.0001
    assert all(torch.allclose(p.flatten(1), q, atol=1e-6) for p, q in zip(kernels, flat, strict=True))


# --- refused ---------------------------------------------------------------------------------------------


def test_sparse_and_complex_gradients_are_refused_by_name_and_change_nothing():
    model = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = LANTON(model.named_parameters())
    model(torch.tensor([1, 2])).sum().backward()
    before = model.weight.detach().clone()
    with pytest.raises(TypeError, match=r"gradient of weight must be dense, got a sparse one.*sparse=False"):
        optimizer.step()
    assert torch.equal(model.weight, before)
    with pytest.raises(TypeError, match=r"params must be real.*got shape \(2, 2\) of torch.complex64"):
        LANTON([torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -0.1}, "lr must be >= 0, got -0.1"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be in \[0, 1\), got 1.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] must be in \[0, 1\], got -0.1"),
        ({"alpha": 0.0}, "alpha must be > 0, got 0.0. Use 'auto'"),
        ({"alpha": -1.0}, "alpha must be > 0, got -1.0"),
        ({"geometry": "rmss"}, "geometry must be one of .*got 'rmss'. Did you mean 'rms'"),
        ({"noise_every": 0}, "noise_every must be >= 1, got 0. Use None"),
        ({"weight_decay": -1}, "weight_decay must be >= 0, got -1"),
        ({"fused": True}, "fused must be False, got True"),
        ({"capturable": True}, "capturable must be False, got True"),
        ({"differentiable": True}, "differentiable must be False, got True"),
        ({"ns_dtype": "float8"}, "ns_dtype must be one of .*got 'float8'"),
        ({"nonfinite": "ignore"}, "nonfinite must be one of .*got 'ignore'"),
    ],
)
def test_bad_settings_are_refused_in_the_constructor_and_in_groups(settings, message):
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=message):
        LANTON([weight], **settings)
    flags = {"fused", "capturable", "differentiable"}
    if not flags & settings.keys():
        optimizer = LANTON([weight])
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2, 2))], **settings})
        assert len(optimizer.param_groups) == 1


def test_parameters_that_fit_no_geometry_are_refused():
    with pytest.raises(ValueError, match="empty parameter list"):
        LANTON([])
    optimizer = LANTON([torch.nn.Parameter(torch.zeros(2, 2))])
    with pytest.raises(
        ValueError, match=r"two or more dimensions where geometry is 'spectral', got shape \(3,\)"
    ):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))], "geometry": "spectral"})
    assert len(optimizer.param_groups) == 1


def test_independent_gradients_must_be_recorded():
    model = network()
    with pytest.raises(
        ValueError, match="difference must be 'independent' to record gradients, got 'previous'"
    ):
        make(model).record_independent()
    optimizer = make(model, difference="independent")
    with pytest.raises(ValueError, match="gradients must be there, got none"):
        optimizer.record_independent()
    train(model, optimizer, [0])
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"needs record_independent\(\) before step\(\), got none in 1"):
        train(model, optimizer, [1])
    assert equal(model, before)
    optimizer.record_independent()
    train(model, optimizer, [1, 2])  # one measurement, then none: the average stays
    assert optimizer.param_groups[0]["measured"] == 1
    with pytest.raises(ValueError, match="grad_scale must be > 0, got 0"):
        optimizer.record_independent(grad_scale=0)
