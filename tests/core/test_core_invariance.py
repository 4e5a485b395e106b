"""Scale invariance as measured: both of its consequences are looked at, and nothing is left changed."""

import pytest
import torch
from torch import nn

from pullback.core.invariance import scale_deviation

TARGET = torch.tensor([0.3, -0.2, 0.9, 0.5], dtype=torch.float64)


def start():
    return nn.Parameter(torch.tensor([1.0, 2.0, -0.5, 0.7], dtype=torch.float64))


def direction(theta):
    return (theta / theta.norm() @ TARGET).square()


def test_a_function_of_the_direction_is_invariant():
    theta = start()
    assert scale_deviation("theta", [theta], lambda: direction(theta)) < 1e-14


def test_a_gradient_that_only_shrinks_as_it_should_is_not_enough():
    theta = start()  # the gradient of log ||theta|| is theta / ||theta||^2: radial, and a third at 3 theta
    found = scale_deviation("theta", [theta], lambda: theta.norm().log())
    assert found == pytest.approx(1.0)


def test_a_gradient_that_is_only_orthogonal_here_is_not_enough():
    theta = start()
    first = theta.detach().norm()
    found = scale_deviation("theta", [theta], lambda: direction(theta) + (theta.norm() - first).square())
    assert found > 1.0


def test_tensors_are_scaled_together():
    a, b = start(), nn.Parameter(torch.tensor([2.0, 1.0, 0.4, -3.0], dtype=torch.float64))

    def loss():
        return a @ b / (a.square().sum() + b.square().sum())

    assert scale_deviation("both", [a, b], loss) < 1e-14
    assert scale_deviation("a", [a], loss) > 0.1


def test_parameters_and_generators_come_back_also_after_an_error():
    theta, calls = start(), []
    before, state = theta.detach().clone(), torch.get_rng_state()

    def loss():
        calls.append(torch.rand(()).item())
        if len(calls) == 2:
            raise KeyError("second")
        return direction(theta)

    with pytest.raises(KeyError):
        scale_deviation("theta", [theta], loss)
    assert torch.equal(theta.detach(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert calls[0] == calls[1]  # both passes draw the same
    with pytest.raises(RuntimeError, match="gradient of theta must be finite and not zero, got norm 0"):
        scale_deviation("theta", [theta], lambda: 0 * theta.sum())
