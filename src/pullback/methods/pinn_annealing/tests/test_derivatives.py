"""Taylor mode against nested autograd, closed forms and torch.func; the equations against their exact solutions."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from pullback.lab.models import taylor
from pullback.lab.models.pde import Helmholtz, KleinGordon, Poisson, relative_l2
from pullback.lab.models.taylor import Derivatives
from pullback.methods.pinn_annealing import ModifiedMLP, glorot_normal_
from pullback.methods.pinn_annealing.tests import reference

derivatives: Any = taylor.derivatives  # also with arguments that must be refused
PROBLEMS = (Helmholtz(), KleinGordon(), Poisson(), Helmholtz(a1=2.0, a2=3.0, k=4.0), Poisson(c=1.0))


def perceptron(inputs=2, depth=2, bias=True):
    sizes = [inputs, *[6] * depth]
    layers = [each for a, b in pairwise(sizes) for each in (nn.Linear(a, b, bias=bias), nn.Tanh())]
    net = nn.Sequential(*layers, nn.Linear(sizes[-1], 1, bias=bias)).double()
    glorot_normal_(net, seed=depth)
    return net


NETWORKS = {
    "plain": perceptron,
    "deep": lambda: perceptron(depth=4),
    "linear": lambda: perceptron(depth=0),
    "no bias": lambda: perceptron(bias=False),
    "one input": lambda: perceptron(inputs=1),
    "three inputs": lambda: perceptron(inputs=3),
    "official": lambda: ModifiedMLP(2, 5, 1, dtype=torch.float64),
    "paper": lambda: ModifiedMLP(2, 5, 1, variant="paper", dtype=torch.float64),
}


def points(net, count=5):
    inputs = next(net.parameters()).shape[1] if not isinstance(net, ModifiedMLP) else 2
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_derivatives_and_their_gradients_equal_nested_autograd(build, order):
    net = build()
    x = points(net).requires_grad_()
    wanted = reference.nested_derivatives(net, x)
    found = derivatives(net, x, order=order)
    assert (found.second is None) == (order == 1)
    used = found[: order + 1]
    mix = [torch.randn(each.shape, generator=torch.Generator().manual_seed(9)).double() for each in used]
    leaves = [*net.parameters(), x]
    for one, other in zip(used, wanted, strict=False):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-13)

    def total(parts):
        return torch.stack([(m * p).sum() for m, p in zip(mix, parts, strict=False)]).sum()

    ours = torch.autograd.grad(total(used), leaves, allow_unused=True)
    nested = total(reference.nested_derivatives_at(net, x))
    theirs = torch.autograd.grad(nested, leaves, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        zero = torch.zeros(())
        assert torch.allclose(
            zero if one is None else one, zero if other is None else other, rtol=1e-10, atol=1e-12
        )


def test_slopes_are_those_of_the_chain_rule():
    net, x = perceptron(), points(perceptron())
    shift, scale = torch.tensor([0.3, -1.0]).double(), torch.tensor([0.5, 2.0]).double()
    wanted = reference.nested_derivatives(lambda x: net((x - shift) / scale), x)
    found = derivatives(net, (x - shift) / scale, slopes=1 / scale)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-11)
        ours, theirs = (
            torch.autograd.grad(y.square().sum(), net[0].weight, retain_graph=True) for y in (one, other)
        )
        assert torch.allclose(ours[0], theirs[0], rtol=1e-10)


def test_laplacian_of_one_tanh_layer_three_ways():
    net, x = perceptron(depth=1), points(perceptron())
    first, last = net[0], net[2]
    s = torch.tanh(first(x))
    closed = (-2 * s * (1 - s * s) * first.weight.square().sum(1)) @ last.weight.T
    hessian = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(lambda point: net(point)[0])))(x)
    ours = derivatives(net, x).second.sum(0)
    assert torch.allclose(ours, closed, rtol=1e-12)
    assert torch.allclose(ours[:, 0], hessian.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-11)


def test_derivatives_under_autocast_stay_wide():
    net = perceptron().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = derivatives(net, points(net).float())
    assert all(each.dtype == torch.float32 for each in found)
    assert torch.allclose(
        found.second.double(), derivatives(net.double(), points(net)).second, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (nn.Linear(2, 1), "model must be an nn.Sequential or a gated network, got Linear"),
        (nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), "got Linear, ReLU, Linear"),
        (nn.Sequential(nn.Linear(2, 3), nn.Tanh()), "got Linear, Tanh"),
        (nn.Sequential(), "got nothing"),
        (ModifiedMLP(2, 3, 1, activation=torch.sin), "torch.tanh"),
    ],
)
def test_other_networks_are_refused(model, match):
    with pytest.raises(TypeError, match=match):
        derivatives(model, torch.zeros(4, 2))


def test_bad_points_and_third_derivatives_are_refused():
    net = perceptron()
    with pytest.raises(ValueError, match="2 dimensions"):
        derivatives(net, torch.zeros(4).double())
    with pytest.raises(ValueError, match="order must be one of 1, 2"):
        derivatives(net, points(net), order=3)
    x = points(net).requires_grad_()
    (slope,) = torch.autograd.grad(derivatives(net, x).value.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


# --- equations ------------------------------------------------------------------------------------------------------


def exactly(problem):
    """The exact solution in place of a network."""

    def evaluate(x, order):
        u, first, second = reference.nested_derivatives(lambda x: problem.exact(x)[:, None], x)
        return Derivatives(u, first, second if order == 2 else None)

    return evaluate


def drawn(problem, count=64, dtype=torch.float64):
    found = problem.draw(count, 2, torch.Generator().manual_seed(0), dtype)
    return {name: (x[1], data[1]) for name, (x, data) in found.items()}


@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_exact_solutions_have_no_loss(problem):
    losses = problem.losses(drawn(problem), exactly(problem))
    assert set(losses) == {"residual", *problem.terms}
    assert max(loss.item() for loss in losses.values()) < 1e-20


@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_points_lie_where_they_should(problem):
    sets = drawn(problem)
    low, high = (torch.tensor(each).double() for each in (problem.low, problem.high))
    for x, data in sets.values():
        assert data.shape == x.shape[:-1]
        assert bool(((x >= low) & (x <= high)).all())
    boundary = sets["boundary"][0]
    touching = ((boundary == low) | (boundary == high)).any(1)
    assert bool(touching.all())
    assert len({tuple(row) for row in sets["residual"][0].tolist()}) == 64
    for axis in range(len(low)) if isinstance(problem, Helmholtz) else ():
        for end in (low, high):
            assert (boundary[:, axis] == end[axis]).sum() >= 64


def test_klein_gordon_faces():
    sets = drawn(KleinGordon())
    assert sorted(set(sets["boundary"][0][:, 1].tolist())) == [0.0, 1.0]
    assert set(sets["initial"][0][:, 0].tolist()) == {0.0}
    assert torch.equal(sets["initial"][1], sets["initial"][0][:, 1])  # u(x, 0) = x


def test_each_face_counts_with_its_own_mean():
    problem = Helmholtz()
    sets = drawn(problem)

    def ones(x, order):
        return Derivatives(
            torch.ones(len(x), 1).double(), torch.zeros(2, len(x), 1), torch.zeros(2, len(x), 1).double()
        )

    losses = problem.losses(sets, ones)
    data = sets["boundary"][1].reshape(4, -1)
    assert losses["boundary"].item() == pytest.approx((1 - data).square().mean(1).sum().item())
    assert losses["residual"].item() == pytest.approx((1 - sets["residual"][1]).square().mean().item())


def test_klein_gordon_starts_at_rest():
    problem, sets = KleinGordon(), drawn(KleinGordon())

    def moving(x, order):
        right = exactly(problem)(x, order)
        return right._replace(first=right.first + torch.tensor([3.0, 5.0]).double()[:, None, None])

    losses = problem.losses(sets, moving)
    assert losses["initial"].item() == pytest.approx(9.0)
    assert losses["boundary"].item() < 1e-20


@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_wrong_solutions_have_a_loss(problem):
    class Wrong(type(problem)):
        def exact(self, x):
            return 1.01 * super().exact(x) + 0.01

    wrong = exactly(Wrong())
    losses = problem.losses(drawn(problem), wrong)
    assert min(loss.item() for loss in losses.values()) > 1e-6


def test_dtypes_share_their_points_and_second_derivatives_are_asked_for():
    problem = Helmholtz()
    single, double = drawn(problem, dtype=torch.float32), drawn(problem)
    assert torch.equal(single["residual"][0], double["residual"][0].float())
    with pytest.raises(ValueError, match="second derivatives"):
        problem.losses(double, lambda x, order: exactly(problem)(x, 1))


def test_grid_moments_and_error():
    problem = Helmholtz()
    grid = problem.grid(100, torch.float64)
    assert grid.shape == (10_000, 2)
    shift, scale = problem.moments(torch.float64)
    sample = problem.draw(20_000, 1, torch.Generator().manual_seed(1), torch.float64)["residual"][0][0]
    assert ((sample.mean(0) - shift).abs() < 0.02).all()
    assert ((sample.std(0) - scale).abs() < 0.01).all()
    exact = problem.exact(grid)
    assert relative_l2(exact, exact) == 0.0
    assert relative_l2(torch.zeros_like(exact), exact) == 1.0
    assert relative_l2(1.1 * exact.float(), exact.float()) == pytest.approx(0.1, rel=1e-5)
    assert exact.abs().max() <= 1.0
    assert math.isclose(exact.square().mean().item(), 0.25, rel_tol=0.03)
