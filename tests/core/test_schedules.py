"""Schedules against the printed formulas, their limits, and what they refuse."""

from __future__ import annotations

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback.core import schedules

progress = st.floats(0, 1)


def printed(p, gamma, low, high):
    h = high - low
    return 2 * h / (1 + math.exp(-gamma * p)) - h + low


def test_dann_has_the_papers_values():
    lam = schedules.dann()
    assert lam(0) == 0.0
    assert lam(0.1) == pytest.approx(0.462117, abs=1e-6)
    assert lam(1.0) == pytest.approx(0.9999092, abs=1e-7)


@given(p=progress, gamma=st.floats(0, 50), low=st.floats(-2, 2), high=st.floats(-2, 2))
def test_dann_is_the_printed_formula(p, gamma, low, high):
    assert schedules.dann(gamma, low, high)(p) == pytest.approx(printed(p, gamma, low, high), abs=1e-12)


def test_dann_starts_at_low_exactly_and_survives_a_steep_gamma():
    assert schedules.dann(low=0.3, high=2.0)(0) == 0.3
    assert schedules.dann(gamma=1e6, high=3.0)(1.0) == 3.0


def test_inverse_decay_has_the_papers_values():
    mu = schedules.inverse_decay()
    assert mu(0) == 0.01
    assert mu(1) == pytest.approx(0.01 / 11**0.75, rel=1e-14)


@given(p=progress)
def test_constant_stays(p):
    assert schedules.constant(0.7)(p) == 0.7


@pytest.mark.parametrize(
    "schedule", [schedules.constant(1.0), schedules.dann(5.0, 0.1, 0.9), schedules.inverse_decay(1.0)]
)
def test_schedules_are_values(schedule):
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert hash(pickle.loads(pickle.dumps(schedule))) == hash(schedule)
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"progress must be in \[0, 1\], got"):
            schedule(p)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.dann(gamma=-1.0), "gamma must be >= 0, got -1"),
        (lambda: schedules.dann(high=math.inf), "high must be finite, got inf"),
        (lambda: schedules.inverse_decay(start=0.0), "start must be > 0, got 0"),
        (lambda: schedules.inverse_decay(beta=-0.5), "beta must be >= 0, got -0.5"),
        (lambda: schedules.constant(math.nan), "value must be finite, got nan"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
