"""The noise has the law, the schedule and the order that the paper gives it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pullback.core.attachment import attach
from pullback.core.clip import ClipGradNorm
from pullback.core.streams import generator
from pullback.methods.gradient_noise import GradientNoise
from pullback.methods.gradient_noise.tests import reference


def parameter(*shape, dtype=torch.float32, grad=0.0):
    p = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    p.grad = torch.full_like(p, grad)
    return p


def at(noise, t):
    noise.steps = t
    return noise


# --- the schedule ------------------------------------------------------------------------------------


@given(eta=st.floats(0, 10), gamma=st.floats(0, 2), t=st.integers(0, 10**6))
def test_std_is_the_root_of_the_papers_variance(eta, gamma, t):
    assert GradientNoise(eta, gamma).std(t) == pytest.approx(reference.std(t, eta, gamma), rel=1e-12)


def test_defaults_are_the_papers():
    noise = GradientNoise()
    assert (noise.eta, noise.gamma, noise.schedule) == (0.01, 0.55, "annealed")
    assert noise.std(0) == pytest.approx(0.1)  # the first draw is the largest: t starts at 0


def test_constant_and_callable_schedules():
    assert GradientNoise(0.04, schedule="constant").std(999) == pytest.approx(0.2)
    halving = GradientNoise(0.04, schedule=lambda t: 0.25**t)
    assert [halving.std(t) for t in range(3)] == pytest.approx([0.2, 0.1, 0.05])


@pytest.mark.parametrize("t", [0, 10, 1000])
def test_drawn_std_follows_the_schedule(t):
    p = parameter(1_000_000)
    at(GradientNoise(0.3, 0.55, seed=t), t).update_([p])
    assert p.grad.std().item() == pytest.approx(reference.std(t, 0.3, 0.55), rel=0.01)
    assert abs(p.grad.mean().item()) < 4 * reference.std(t, 0.3, 0.55) / 1000


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(sum),
    eta=st.floats(0.01, 2),
    gamma=st.floats(0, 1),
    t=st.integers(0, 100),
    seed=st.integers(0, 2**63),
)
def test_result_is_gradient_plus_std_times_the_stream(sizes, eta, gamma, t, seed):
    params = [parameter(n, dtype=torch.float64, grad=0.5 + i) for i, n in enumerate(sizes)]
    first = next(i for i, n in enumerate(sizes) if n)
    draws = torch.empty(sum(sizes), dtype=torch.float64)
    draws.normal_(generator=generator("gradient noise", seed, t, first))
    before = [g for p in params for g in p.grad.tolist()]
    at(GradientNoise(eta, gamma, seed=seed), t).update_(params)
    expected = reference.noisy(before, draws.tolist(), t, eta, gamma)
    assert [g for p in params for g in p.grad.tolist()] == pytest.approx(expected, rel=1e-12, abs=1e-12)


# --- what it does to training --------------------------------------------------------------------------


def test_walk_of_the_weights_has_the_predicted_variance():
    lr, eta, steps, size = 0.1, 0.01, 40, 200_000
    p = parameter(size)
    optimizer = torch.optim.SGD([p], lr=lr)
    GradientNoise(eta, seed=1).attach(optimizer)
    for _ in range(steps):
        p.grad.zero_()
        optimizer.step()
    ratio = p.detach().double().var().item() / reference.walk_variance(lr, eta, 0.55, steps)
    assert abs(ratio - 1) < 4 * math.sqrt(2 / size)  # chi-square, four standard errors
    assert abs(p.detach().mean().item()) < 4 * p.detach().std().item() / math.sqrt(size)


def test_noise_is_unbiased_on_linear_regression():
    """The mean over 4096 seeds (columns) of the noisy iterate is the noiseless iterate."""
    seeds, lr, eta, steps = 4096, 0.1, 0.5, 20
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 3, generator=rng).double(), torch.randn(16, 1, generator=rng).double()
    theta = torch.nn.Parameter(torch.zeros(3, seeds, dtype=torch.float64))
    plain = torch.zeros(3, 1, dtype=torch.float64)
    optimizer = torch.optim.SGD([theta], lr=lr)
    GradientNoise(eta, seed=5).attach(optimizer)
    for _ in range(steps):
        theta.grad = x.T @ (x @ theta.detach() - y) / 16
        optimizer.step()
        plain -= lr * x.T @ (x @ plain - y) / 16
    theta = theta.detach()
    error = (theta.mean(1, keepdim=True) - plain).abs() / (theta.std(1, keepdim=True) / math.sqrt(seeds))
    assert error.max() < 4
    assert theta.std() > 0.05


def zero_network():
    layers = [layer for _ in range(4) for layer in (torch.nn.Linear(6, 6), torch.nn.ReLU())]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(6, 3))
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    return model


@pytest.mark.parametrize("eta", [0.0, 0.01])
def test_all_zero_network_leaves_zero_only_with_noise(eta):
    model = zero_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GradientNoise(eta).attach(optimizer)
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        x, y = torch.randn(8, 6, generator=rng), torch.randint(3, (8,), generator=rng)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        moved = {name for name, p in model.named_parameters() if p.grad.any()}
        assert moved == {"8.bias"} or eta > 0
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if p.any()}
    assert moved == ({"8.bias"} if eta == 0 else {name for name, _ in model.named_parameters()})


def test_noise_comes_after_clipping():
    size, limit, eta = 100_000, 5.0, 0.01
    p = parameter(size, grad=1e3)
    optimizer = torch.optim.SGD([p], lr=0.0)
    attach(optimizer, ClipGradNorm(limit), GradientNoise(eta))
    optimizer.step()
    before = reference.clipped([1e3] * size, limit)
    expected = sum(g * g for g in before) + eta * size
    assert p.grad.square().sum().item() == pytest.approx(expected, rel=4 * math.sqrt(2 / size) + 1e-3)


# --- overrides and refusals ----------------------------------------------------------------------------


def test_groups_override_eta_and_gamma():
    params = [parameter(200_000) for _ in range(3)]
    groups = [{"params": params[0]}, {"params": params[1], "noise_eta": 0.25}, {"params": params[2]}]
    groups[2] |= {"noise_gamma": 0.0}
    optimizer = torch.optim.SGD(groups, lr=0.0)
    attach(optimizer, at(GradientNoise(0.04, 1.0), 3))
    optimizer.step()
    expected = [math.sqrt(0.04 / 4), math.sqrt(0.25 / 4), math.sqrt(0.04)]
    assert [p.grad.std().item() for p in params] == pytest.approx(expected, rel=0.02)


def test_bad_override_is_refused_by_name():
    p = parameter(3)
    optimizer = torch.optim.SGD([{"params": [p], "noise_eta": -1.0}], lr=0.1)
    GradientNoise().attach(optimizer)
    with pytest.raises(ValueError, match=r"noise_eta must be >= 0, got -1"):
        optimizer.step()


@pytest.mark.parametrize("exclude", ["*.bias", ("*.bias",), lambda name: name.endswith("bias")])
def test_excluded_parameters_keep_their_gradient(exclude):
    model = zero_network()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    GradientNoise(exclude=exclude).update_(model)
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, torch.ones_like(p)) == name.endswith("bias")


def test_globs_on_nameless_parameters_are_refused():
    optimizer = torch.optim.SGD([parameter(3)], lr=0.1)
    GradientNoise(exclude="*.bias").attach(optimizer)
    with pytest.raises(ValueError, match=r"needs parameter names.*named_parameters"):
        optimizer.step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eta": -0.1}, r"eta must be >= 0, got -0\.1\. Use 0 to switch the noise off"),
        ({"gamma": float("inf")}, "gamma must be >= 0, got inf"),
        ({"schedule": "anealed"}, "schedule must be one of 'annealed', 'constant', got 'anealed'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradientNoise(**arguments)


def test_bad_schedule_value_is_refused():
    with pytest.raises(ValueError, match=r"schedule\(7\) must be >= 0, got -1"):
        GradientNoise(schedule=lambda t: -1.0).std(7)


# --- the report ------------------------------------------------------------------------------------------


def test_report_gives_both_norms():
    params = [parameter(30_000, grad=2.0), parameter(20_000, grad=1.0)]
    noise = GradientNoise(0.04, record=True)
    assert noise.report() is None
    kept = torch.cat([p.grad.clone() for p in params])
    noise.update_(params)
    report = noise.report()
    assert report is not None
    added = torch.cat([p.grad for p in params]) - kept
    assert (report.step, report.std) == (0, pytest.approx(0.2))
    assert report.grad_norm == pytest.approx(kept.norm().item(), rel=1e-5)
    assert report.noise_norm == pytest.approx(added.norm().item(), rel=1e-4)
    assert report.ratio == pytest.approx(report.noise_norm / report.grad_norm)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_report_counts_the_entries_of_sparse_gradients_once():
    p = torch.nn.Parameter(torch.zeros(4, 1))
    p.grad = torch.sparse_coo_tensor(torch.tensor([[1, 1, 3]]), torch.ones(3, 1), (4, 1))
    noise = GradientNoise(0.01, record=True)
    noise.update_([p])
    report = noise.report()
    assert report is not None
    assert report.grad_norm == pytest.approx(5**0.5)


def test_report_without_recording_is_refused():
    with pytest.raises(RuntimeError, match="record=True"):
        GradientNoise().report()
