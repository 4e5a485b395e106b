"""The landscapes: gradients against finite differences, landmarks of the papers, several points at once."""

from __future__ import annotations

import numpy as np
import pytest

from pullback.lab.models import landscapes


@pytest.mark.parametrize("toy", [1, 2])
def test_gradients_by_hand_are_the_slopes(toy):
    rng = np.random.default_rng(0)
    points = rng.uniform(-9, 9, (2, 400))
    found = landscapes.evaluate(points, toy).gradients
    step = 1e-6
    for coordinate in (0, 1):
        shift = np.zeros((2, 1))
        shift[coordinate] = step
        up, down = (landscapes.evaluate(points + sign * shift, toy).losses for sign in (1, -1))
        smooth = np.abs(points[1]) > 2 * step
        slope = (up - down) / (2 * step)
        near = np.abs(slope[:, smooth]) < 1e3  # beside a valley differences mean nothing
        np.testing.assert_allclose(
            found[:, coordinate][:, smooth][near], slope[:, smooth][near], rtol=2e-4, atol=1e-5
        )
        assert near.mean() > 0.99


def test_landmarks():
    at_zero = landscapes.evaluate(np.zeros((2, 1)), 1)
    assert not at_zero.losses.any()
    bottom = landscapes.evaluate(np.array([[0.0], [-8.35]]), 1)
    np.testing.assert_allclose(bottom.losses, -15.09, atol=0.01)
    assert np.abs(bottom.gradients.sum(0)).max() < 1e-3
    # inside the cut-off the logarithm is flat
    inside = landscapes.evaluate(np.array([[-7.0 + 2 * np.tanh(5.0)], [5.0]]), 1)
    assert inside.losses[0, 0] == pytest.approx((np.log(5e-6) + 6) * np.tanh(2.5))
    assert inside.gradients[0, 0, 0] == 0.0


def test_second_toy_has_two_optima_beside_a_saddle():
    line = np.linspace(-12, 12, 481)
    a, b = np.meshgrid(line, np.linspace(-14, -4, 201))
    total = landscapes.evaluate(np.stack([a.ravel(), b.ravel()]), 2).losses.sum(0).reshape(a.shape)
    assert total.min() == pytest.approx(-74.13, abs=0.02)
    lowest = line[total.min(0).argsort()[:2]]
    around = landscapes.evaluate(np.array([[0.0, 0.0], [-10.845, -10.83]]), 2)
    slope_a, slope_b = around.gradients.sum(0)
    np.testing.assert_allclose(slope_a, 0.0, atol=1e-12)
    assert slope_b[0] < 0 < slope_b[1]  # a minimum along b at -10.84 ...
    beside = landscapes.evaluate(np.array([[0.0, 0.5], [-10.84, -10.84]]), 2).losses.sum(0)
    assert beside[1] < beside[0]  # ... and a maximum along a
    assert beside[0] > total.min() + 10
    assert abs(lowest[0]) > 1


def test_starts_are_the_papers_and_bad_arguments_are_refused():
    assert [len(starts) for starts in landscapes.STARTS.values()] == [7, 6]
    with pytest.raises(ValueError, match="toy must be 1 or 2, got 3"):
        landscapes.evaluate(np.zeros((2, 1)), 3)
    with pytest.raises(ValueError, match=r"points must be of shape \(2, m\), got \(3, 2\)"):
        landscapes.evaluate(np.zeros((3, 2)), 1)
