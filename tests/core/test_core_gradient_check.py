"""Fitted orders of gradient estimators, and the exact gradient of stationary states that they are held to."""

import math

import pytest
import torch

from pullback.core.gradient_check import check_gradient
from pullback.core.implicit import implicit_gradient
from pullback.core.nudges import nudges

DOUBLE = torch.float64
X = torch.tensor([0.3, 1.1, -0.4], dtype=DOUBLE)


def quotient(estimator, n_points=4):
    """The derivative of exp at X by the rule of ``estimator``."""

    def at(size):
        points, weights = nudges(estimator, size, n_points)
        terms = [w * ((X + b).exp() - X.exp()) for b, w in zip(points, weights, strict=True)]
        total = sum(terms[1:], terms[0])
        return total.real if total.is_complex() else total

    return at


# --- rules and orders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "n_points", "order"),
    [("positive", 2, 1), ("negative", 2, 1), ("centered", 2, 2), ("holomorphic", 2, 2), ("holomorphic", 3, 3),
     ("holomorphic", 4, 4), ("holomorphic", 5, 5), ("holomorphic", 6, 6)],
)  # fmt: skip
def test_rules_have_their_orders(estimator, n_points, order):
    found = check_gradient(quotient(estimator, n_points), X.exp(), (0.4, 0.2, 0.1))
    assert found["estimator"].order == pytest.approx(order, abs=0.15)
    assert found["estimator"].cosines[-1] == pytest.approx(1.0, abs=1e-3)


def test_errors_are_relative_and_exact():
    found = check_gradient(lambda h: X.exp() * (1 + h), X.exp(), (0.2, 0.1))["estimator"]
    assert found.errors == pytest.approx((0.2, 0.1))
    assert found.order == pytest.approx(1.0)
    assert found.sizes == (0.2, 0.1)


def test_a_wrong_factor_is_no_order_at_all():
    found = check_gradient({"twice": lambda h: 2 * X.exp(), "sign": lambda h: -X.exp()}, X.exp(), (0.2, 0.1))
    assert found["twice"].errors == pytest.approx((1.0, 1.0))
    assert found["sign"].cosines == pytest.approx((-1.0, -1.0))
    assert all(math.isnan(row.order) for row in found.rows)


def test_rounding_and_lost_estimates_are_not_fitted():
    errors = {0.8: 0.9, 0.4: 0.16, 0.2: 0.04, 0.1: 0.01, 1e-3: 0.02, 1e-4: 1e-3}
    found = check_gradient(lambda h: X * (1 + errors[h]), X, errors)["estimator"]
    assert found.used == (False, True, True, True, False, False)  # lost, three good ones, rising, behind it
    assert found.order == pytest.approx(2.0)
    single = check_gradient(lambda h: X.float() * (1 + 1e-7 / h), X.float(), (1e-2, 1e-3))["estimator"]
    assert not any(single.used)


def test_nan_counts_as_lost():
    found = check_gradient(lambda h: X * (math.nan if h > 0.3 else 1 + h), X, (0.4, 0.2, 0.1))["estimator"]
    assert found.errors[0] == math.inf
    assert found.used == (False, True, True)


def test_forms_of_gradients():
    exact = {"a": X, "b": None}
    found = check_gradient(lambda h: {"a": X * (1 + h), "b": None}, exact, (0.2, 0.1))
    assert found["estimator"].errors == pytest.approx((0.2, 0.1))
    both = check_gradient(lambda h: (X, X * (1 + h)), [X, X], (0.2, 0.1))
    assert both["estimator"].errors == pytest.approx((0.2 / 2**0.5, 0.1 / 2**0.5))
    text = str(both)
    assert "estimator" in text
    assert "norm" in text
    with pytest.raises(KeyError, match="name must be one of estimator, got 'other'"):
        both["other"]


@pytest.mark.parametrize(
    ("estimators", "exact", "sizes", "error", "text"),
    [
        ({}, X, (0.2, 0.1), ValueError, "estimators must hold at least one function"),
        (lambda h: X, X, (0.1, 0.1), ValueError, "sizes must hold two distinct numbers or more"),
        (lambda h: X, X, (0.1, 0.0), ValueError, "sizes must be > 0, got 0.0"),
        (lambda h: X, 0 * X, (0.2, 0.1), ValueError, "exact must be a finite gradient that is not zero"),
        (lambda h: X[:2], X, (0.2, 0.1), TypeError, r"must have shape \(3,\), got \(2,\)"),
        (lambda h: [X, X], X, (0.2, 0.1), TypeError, "must give the pieces"),
        (lambda h: "much", X, (0.2, 0.1), TypeError, "must give a tensor, a sequence or a mapping"),
    ],
)
def test_what_cannot_be_compared_is_refused(estimators, exact, sizes, error, text):
    with pytest.raises(error, match=text):
        check_gradient(estimators, exact, sizes)


# --- implicit differentiation -----------------------------------------------------------------------------------


def quadratic(seed=0):
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(5, 5, generator=g, dtype=DOUBLE)
    a = (root @ root.T / 5 + torch.eye(5, dtype=DOUBLE)).requires_grad_()
    b = torch.randn(3, 5, generator=g, dtype=DOUBLE).requires_grad_()
    return a, b, torch.randn(3, 5, generator=g, dtype=DOUBLE)


@pytest.mark.parametrize("dense_units", [100, 0])
def test_a_quadratic_problem_is_differentiated_through_its_solution(dense_units):
    a, b, y = quadratic()
    solution = torch.linalg.solve(a, b.T).T
    cost = 0.5 * (solution - y).square().sum(1).mean() + 0.1 * a.square().sum()
    wanted = torch.autograd.grad(cost, [a, b])
    found = implicit_gradient(
        lambda s: 0.5 * (torch.cat(s, 1) @ a * torch.cat(s, 1)).sum(1) - (b * torch.cat(s, 1)).sum(1),
        lambda s: 0.5 * (torch.cat(s, 1) - y).square().sum(1) + 0.1 * a.square().sum(),
        [solution.detach()[:, :2], solution.detach()[:, 2:]],
        [a, b],
        dense_units=dense_units,
    )
    for one, other in zip(found.grads, wanted, strict=True):
        # a enters as s^T a s, so that only its symmetric part is seen
        one = one if one.shape != (5, 5) else (one + one.T) / 2
        other = other if other.shape != (5, 5) else (other + other.T) / 2
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert found.residual < 1e-12


def test_units_at_a_bound_do_not_move():
    """s = clip(w, 0, 1) for E = s^2/2 - w s: dJ/dw is s - y inside and 0 at the bound."""
    w = torch.tensor([[0.4, 1.7, -0.3]], dtype=DOUBLE).requires_grad_()
    s, y = w.detach().clamp(0, 1), torch.tensor([[1.0, 0.0, 0.5]], dtype=DOUBLE)
    found = implicit_gradient(
        lambda states: (0.5 * states[0].square() - w * states[0]).sum(1),
        lambda states: 0.5 * (states[0] - y).square().sum(1),
        [s],
        [w],
        free=[(s > 0) & (s < 1)],
    )
    torch.testing.assert_close(found.grads[0], torch.tensor([[-0.6, 0.0, 0.0]], dtype=DOUBLE))


def test_a_saddle_is_differentiated_too_and_conjugate_gradients_refuse_it():
    w = torch.ones(2, 2, dtype=DOUBLE, requires_grad=True)
    sign = torch.tensor([1.0, -1.0], dtype=DOUBLE)

    def energy(states):
        return (0.5 * sign * states[0].square() - w * states[0]).sum(1)

    def cost(states):
        return 0.5 * states[0].square().sum(1)

    s = (w * sign).detach()
    found = implicit_gradient(energy, cost, [s], [w])
    torch.testing.assert_close(found.grads[0], w.detach() / 2)  # batch mean
    with pytest.raises(ValueError, match="energy must be strictly convex"):
        implicit_gradient(energy, cost, [s], [w], dense_units=0)


def test_states_that_are_not_stationary_and_flat_energies_are_refused():
    w = torch.ones(1, 2, dtype=DOUBLE, requires_grad=True)

    def cost(states):
        return states[0].square().sum(1)

    with pytest.raises(ValueError, match=r"states must be stationary: .* got 1"):
        implicit_gradient(
            lambda s: (0.5 * s[0].square() - w * s[0]).sum(1), cost, [torch.zeros(1, 2, dtype=DOUBLE)], [w]
        )
    with pytest.raises(ValueError, match="energy must have a regular Hessian"):
        implicit_gradient(lambda s: ((s[0] - w) ** 4).sum(1), cost, [w.detach().clone()], [w])
