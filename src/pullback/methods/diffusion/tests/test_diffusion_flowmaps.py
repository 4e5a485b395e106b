"""Flow maps: the identity that MeanFlow learns, targets without gradient, boundaries, jumps, calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pullback.methods.diffusion import ConsistencyMap, GaussianMixture, GaussianPath, MeanFlow
from pullback.methods.diffusion.flowmap import _two_times
from pullback.methods.diffusion.tests import reference
from pullback.methods.diffusion.tests.cases import PATHS, Toy

MEAN, STD = torch.tensor([[0.7, -0.4]], dtype=torch.float64), 0.6
TIMES = {"cosine": (0.8, 0.3), "linear": (0.9, 0.2), "vp": (0.7, 0.3), "ve": (2.0, 0.4)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def points(count=5, seed=0):
    return torch.randn(count, 2, generator=seeded(seed), dtype=torch.float64)


class Exact(nn.Module):
    """The average velocity of a Gaussian, in closed form and differentiable by all arguments."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def forward(self, x, s, t):
        a, b = self.path(s).over(x), self.path(t).over(x)
        ratio = ((b.alpha**2 * STD**2 + b.sigma**2) / (a.alpha**2 * STD**2 + a.sigma**2)).sqrt()
        there = b.alpha * MEAN + ratio * (x - a.alpha * MEAN)
        gap = (t - s).view(-1, 1)
        velocity = GaussianMixture(MEAN, STD).denoiser(self.path)(x, s).velocity
        return torch.where(gap == 0, velocity, (there - x) / torch.where(gap == 0, 1.0, gap))


@pytest.mark.parametrize("name", PATHS)
def test_the_closed_form_solves_the_identity(name):
    """h = v - (s - t) (dh/dx v + dh/ds), the derivative by our own product: sign and factor."""
    path, (s, t) = PATHS[name](), TIMES[name]
    flow, x = MeanFlow(Exact(path), path), points()
    first, second = torch.full((5,), s, dtype=torch.float64), torch.full((5,), t, dtype=torch.float64)
    velocity = GaussianMixture(MEAN, STD).denoiser(path)(x, s).velocity
    rise = flow._along(x, first, second, velocity, {}, "forward")
    average = flow.average_velocity(x, s, t)
    residual = average - (velocity - (s - t) * rise)
    assert float(residual.abs().max()) < 1e-13
    torch.testing.assert_close(
        average, reference.mean_velocity(x, s, t, name, MEAN, STD), rtol=1e-10, atol=1e-11
    )
    differences = flow._along(x, first, second, velocity, {}, "difference")
    torch.testing.assert_close(differences, rise, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", PATHS)
def test_exact_jumps_compose_end_where_the_flow_does_and_stand_still_at_once(name):
    path, (s, t) = PATHS[name](), TIMES[name]
    flow, x, u = MeanFlow(Exact(path), path), points(), 0.5 * (s + t)
    wanted = reference.gaussian_flow(x, s, t, name, MEAN, STD)
    torch.testing.assert_close(flow(x, s, t), wanted, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(GaussianMixture(MEAN, STD).flow(path, x, s, t), wanted, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(flow(flow(x, s, u), u, t), wanted, rtol=1e-11, atol=1e-11)
    assert torch.equal(flow(x, s, s), x)
    near = flow.average_velocity(x, s, s - 1e-6)
    torch.testing.assert_close(near, flow.average_velocity(x, s, s), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("derivative", ["forward", "difference"])
@pytest.mark.parametrize("same", [0.0, 0.5, 1.0])
def test_the_loss_is_the_literal_one_and_its_target_has_no_gradient(same, derivative):
    path, x0, size = GaussianPath.cosine(), points(6), 6
    net = Toy(2, times=2).double()
    flow = MeanFlow(net, path)
    loss = flow.loss(x0, generator=seeded(4), same=same, derivative=derivative)
    gradients = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)

    again = seeded(4)
    s, t = _two_times(path, size, round(same * size), again, x0)
    eps = torch.randn(x0.shape, generator=again, dtype=x0.dtype)
    total = x0.new_zeros(())
    for row in range(size):
        alpha, sigma, dalpha, dsigma = reference.coefficients("cosine", float(s[row]))
        x, v = alpha * x0[row] + sigma * eps[row], dalpha * x0[row] + dsigma * eps[row]
        at = lambda x, s, row=row: net(x[None], s[None], t[row : row + 1])[0]  # noqa: E731
        step = 1e-5
        rise = (at(x + step * v, s[row] + step) - at(x - step * v, s[row] - step)) / (2 * step)
        target = (v - (s[row] - t[row]) * rise).detach()
        total = total + ((at(x, s[row]) - target) ** 2).mean() / size
    torch.testing.assert_close(loss, total, rtol=1e-8, atol=1e-9)
    wanted = torch.autograd.grad(total, list(net.parameters()), allow_unused=True)
    for one, other in zip(gradients, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


def test_adaptive_weights_divide_by_the_detached_error():
    path, x0 = GaussianPath.linear(), points(6)
    flow = MeanFlow(Toy(2, times=2).double(), path)
    alone = flow.loss(x0[:1], generator=seeded(9), same=1.0)
    weighted = flow.loss(x0[:1], generator=seeded(9), same=1.0, power=1.0, small=1e-3)
    error = 2 * alone.detach()  # the sum over two entries
    torch.testing.assert_close(weighted.detach(), alone.detach() / (error + 1e-3))
    params = list(flow.net.first.parameters())
    plain, scaled = torch.autograd.grad(alone, params), torch.autograd.grad(weighted, params)
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(other, one / (error + 1e-3))


def test_the_second_time_is_never_later_and_the_stated_share_is_equal():
    s, t = _two_times(GaussianPath.ve(end=4.0), 1000, 300, seeded(), torch.zeros(()))
    assert bool((t <= s).all() and (s <= 4.0).all() and (t >= 0.0).all())
    assert int((s == t).sum()) == 300
    assert bool((s[700:] == t[700:]).all())


def test_attention_has_a_forward_derivative():
    """Fused kernels have none; the loss takes torch's plain form."""

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(4, 12)

        def forward(self, x, s, t):
            q, k, v = self.mix(x + (s + t).view(-1, 1, 1)).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
            return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    flow = MeanFlow(Attending(), GaussianPath.linear())
    x0 = torch.randn(3, 5, 4, generator=seeded())
    forward = flow.loss(x0, generator=seeded(1), same=0.0)
    difference = flow.loss(x0, generator=seeded(1), same=0.0, derivative="difference")
    torch.testing.assert_close(forward, difference, rtol=2e-3, atol=1e-3)


def test_an_operation_without_a_forward_derivative_needs_differences():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, grad):  # ty: ignore[incompatible-method-override]
            return grad * 3 * ctx.saved_tensors[0] ** 2

    class Net(Toy):
        def forward(self, x, s, t):  # ty: ignore[incompatible-method-override]
            return Cube.apply(super().forward(x, s, t))

    flow = MeanFlow(Net(2, times=2).double(), GaussianPath.linear())
    with pytest.raises(RuntimeError):
        flow.loss(points(), generator=seeded(), same=0.0)
    assert bool(flow.loss(points(), generator=seeded(), same=0.0, derivative="difference").isfinite())


def test_the_network_is_called_once_with_a_graph_and_once_on_the_rows_that_need_it():
    calls = []

    class Watching(Toy):
        def forward(self, x, s, t):  # ty: ignore[incompatible-method-override]
            calls.append((len(x), torch.is_grad_enabled()))
            return super().forward(x, s, t)

    flow = MeanFlow(Watching(2, times=2).double(), GaussianPath.linear())
    flow.loss(points(8), generator=seeded(), same=0.75)
    assert calls == [(8, True), (2, False)]
    calls.clear()
    flow.loss(points(8), generator=seeded(), same=1.0)
    assert calls == [(8, True)]
    calls.clear()
    flow.sample((3, 2), steps=4)
    assert calls == [(3, False)] * 4


# --- consistency ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATHS)
def test_a_consistency_map_is_the_identity_at_zero(name):
    flow = ConsistencyMap(Toy(2), PATHS[name]())
    if name == "vp":
        return  # its sigma has an infinite derivative there, the map itself is tested by the loss below
    x = points().float()
    torch.testing.assert_close(flow(x, 0.0), x)
    torch.testing.assert_close(flow(x, torch.zeros(5)), x)


class Jump(ConsistencyMap):
    """The exact jump of a Gaussian to its data."""

    def forward(self, x, s, t=0.0, **cond):
        rows = []
        for row in range(len(x)):
            at = float(s[row])
            rows.append(reference.gaussian_flow(x[row], at, 0.0, "linear", MEAN[0], STD))
        return torch.stack(rows)


def test_along_a_teachers_trajectory_the_exact_jump_is_consistent():
    """With fine levels a DDIM step stays on the trajectory: the loss of the exact jump tends to 0, of order 2."""
    path = GaussianPath.linear()
    teacher = GaussianMixture(MEAN, STD).denoiser(path)
    losses = [
        float(
            Jump(Toy(2), path, levels=levels).loss(
                GaussianMixture(MEAN, STD).sample(64, generator=seeded()),
                generator=seeded(1),
                teacher=teacher,
            )
        )
        for levels in (40, 160)
    ]
    assert losses[1] < losses[0] / 50
    assert losses[1] < 1e-6


def test_the_target_of_consistency_has_no_gradient():
    path = GaussianPath.linear()
    flow, x0 = ConsistencyMap(Toy(2).double(), path, levels=5), points(6)
    loss = flow.loss(x0, generator=seeded(2))
    again = seeded(2)
    picks = torch.randint(5, (6,), generator=again)
    eps = torch.randn(x0.shape, generator=again, dtype=x0.dtype)
    s, t = flow.times[picks].double(), flow.times[picks + 1].double()
    with torch.no_grad():
        target = flow(path.corrupt(x0, eps, t), t)
    wanted = ((flow(path.corrupt(x0, eps, s), s) - target) ** 2).mean()
    torch.testing.assert_close(loss, wanted)
    params = list(flow.net.first.parameters())
    for one, other in zip(
        torch.autograd.grad(loss, params), torch.autograd.grad(wanted, params), strict=True
    ):
        torch.testing.assert_close(one, other)
    huber = flow.loss(x0, generator=seeded(2), huber=0.1)
    rows = ((flow(path.corrupt(x0, eps, s), s) - target) ** 2).sum(1)
    torch.testing.assert_close(huber, ((rows + 0.01).sqrt() - 0.1).mean(), rtol=1e-5, atol=1e-7)


def test_levels_are_exact_after_a_cast():
    flow = ConsistencyMap(Toy(2), GaussianPath.cosine()).bfloat16()
    assert flow.times.dtype == torch.float32
    assert bool(flow.loss(points().float(), generator=seeded()).isfinite())


# --- samples and refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: MeanFlow(Toy(2, times=2), GaussianPath.linear()),
        lambda: ConsistencyMap(Toy(2), GaussianPath.linear()),
    ],
)
def test_samples_follow_their_seed(make):
    flow = make()
    first, again, other = (flow.sample((6, 2), steps=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not first.requires_grad
    with pytest.raises(ValueError, match=r"shape must be given where x is not, got None"):
        flow.sample()
    with pytest.raises(ValueError, match=r"steps must be >= 1, got 0"):
        flow.sample((2, 2), steps=0)
    with pytest.raises(TypeError, match=r"generator must be of type Generator, got NoneType"):
        flow.loss(torch.zeros(2, 2), generator=None)


def test_times_and_arguments_outside_are_refused():
    flow = MeanFlow(Toy(2, times=2), GaussianPath.linear())
    x = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\] .* got 1.5"):
        flow(x, 1.5, 0.0)
    loss: Any = flow.loss  # takes arguments that make no sense
    for changed in ({"same": 1.5}, {"power": -1.0}, {"derivative": "double"}):
        with pytest.raises(ValueError, match="got"):
            loss(x, generator=seeded(), **changed)
    with pytest.raises(ValueError, match=r"t must be 0 for a consistency map, got 0.5"):
        ConsistencyMap(Toy(2), GaussianPath.linear())(x, 0.9, 0.5)
