"""Argument checks: what passes, what is refused, and that messages name argument, value and fix."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pullback.core import checks

NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


@given(NUMBERS)
@example(math.inf)
@example(math.nan)
@example(0.0)
@example(1.0)
def test_bounds_accept_exactly_their_range(value):
    for check, inside in [
        (checks.finite, math.isfinite(value)),
        (checks.non_negative, math.isfinite(value) and value >= 0),
        (checks.positive, math.isfinite(value) and value > 0),
        (checks.fraction, 0 <= value <= 1),
    ]:
        if inside:
            assert check("x", value) == value
        else:
            with pytest.raises(ValueError, match=r"^x must be .*, got"):
                check("x", value)


@pytest.mark.parametrize(
    "scalar",
    [
        1,
        1.0,
        np.float32(1),
        np.int64(1),
        np.array(1.0),
        torch.tensor(1.0),
        torch.tensor(1),
        torch.tensor([1.0])[0],
    ],
)
def test_scalars_of_all_libraries_become_floats(scalar):
    for check in (checks.finite, checks.non_negative, checks.positive, checks.fraction):
        result = check("x", scalar)
        assert type(result) is float
        assert result == 1.0


@pytest.mark.parametrize(
    "wrong", [True, False, np.bool_(1), torch.tensor(True), "1", None, [1], 1j, torch.ones(2), np.ones(1)]
)
def test_no_numbers(wrong):
    for check in (checks.finite, checks.non_negative, checks.positive, checks.fraction):
        with pytest.raises(TypeError, match=r"^eta must be a number.*, got "):
            check("eta", wrong)


def test_messages_name_argument_value_and_fix():
    with pytest.raises(ValueError, match=r"^eta must be >= 0, got -0\.1\. Use 0 to switch the noise off\.$"):
        checks.non_negative("eta", -0.1, fix="Use 0 to switch the noise off.")


def test_integer():
    assert checks.integer("n", np.int32(3)) == 3
    assert type(checks.integer("n", torch.tensor(3), minimum=3)) is int
    with pytest.raises(ValueError, match=r"^n must be >= 1, got 0"):
        checks.integer("n", 0, minimum=1)
    for wrong in (1.0, True, "1", torch.tensor(1.0), torch.tensor(True), torch.ones(2, dtype=torch.int64)):
        with pytest.raises(TypeError, match=r"^n must be an integer"):
            checks.integer("n", wrong)


def test_choice():
    assert checks.choice("mode", "raise", checks.NON_FINITE_POLICIES) == "raise"
    with pytest.raises(
        ValueError, match=r"^mode must be one of 'raise', 'skip', 'warn', got 'rais'\. Did you mean 'raise'"
    ):
        checks.choice("mode", "rais", checks.NON_FINITE_POLICIES)
    with pytest.raises(ValueError, match="one of 0, 1"):
        checks.choice("n", True, (0, 1))


def test_instance():
    assert checks.instance("x", 3, int) == 3
    with pytest.raises(TypeError, match=r"^x must be of type int or str, got list\. Try a number\.$"):
        checks.instance("x", [], (int, str), fix="Try a number.")


def test_floating():
    tensor = torch.ones(2, 3)
    assert checks.floating("x", tensor, ndim=2, shape=(2, None)) is tensor
    for wrong in ([1.0], 1.0, None):
        with pytest.raises(TypeError, match=r"^x must be a floating tensor"):
            checks.floating("x", wrong)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=r"Convert it with \.float\(\)"):
            checks.floating("x", torch.ones(2, dtype=dtype))
    with pytest.raises(ValueError, match=r"3 dimensions, got a tensor of shape \(2, 3\)"):
        checks.floating("x", tensor, ndim=3)
    for shape in ((2, 4), (2,), (None, 2)):
        with pytest.raises(ValueError, match=r"^x must be of shape"):
            checks.floating("x", tensor, shape=shape)


def test_values_are_shown_short():
    assert len(checks.shown("x" * 10_000)) <= 80
    assert "shape (1000,)" in checks.shown(torch.ones(1000))


class Mute:
    """An object that cannot be printed."""

    def __repr__(self):
        raise ValueError("no text")


@pytest.mark.parametrize(
    "value", [Mute(), [Mute()], 10**5000, -(10**400)], ids=["mute", "listed", "long", "large"]
)
def test_what_cannot_be_shown_or_held_is_still_refused_by_name(value):
    assert len(checks.shown(value)) <= 80
    for check in (checks.positive, checks.fraction, checks.finite):
        with pytest.raises((TypeError, ValueError), match=r"^x must be "):
            check("x", value)
    with pytest.raises(ValueError, match=r"^x must be one of 'a', 'b', got "):
        checks.choice("x", value, ("a", "b"))
