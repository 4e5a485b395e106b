"""Checks of arguments, with messages that name the argument, its value and the fix.

Every check returns the value in the plain type the caller wants, so that a constructor reads
``self.eta = non_negative("eta", eta)``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

NonFinite: TypeAlias = Literal["raise", "skip", "warn"]
"""What to do about NaN or Inf: stop with an error, leave the step out, or warn and go on."""

NON_FINITE_POLICIES: tuple[NonFinite, ...] = ("raise", "skip", "warn")

_T = TypeVar("_T")
_LONGEST_REPR = 80


class NonFiniteError(ValueError):
    """A gradient, a loss or a state holds NaN or Inf, and the policy is ``"raise"``."""


def shown(value: object) -> str:
    """Short printable form of a value for an error message (at most 80 characters)."""
    if isinstance(value, Tensor) and value.dim() > 0:
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    try:
        text = repr(value)
    except Exception:  # a repr that raises, or a number of too many digits: the message must still come
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= _LONGEST_REPR else f"{text[: _LONGEST_REPR - 3]}..."


def _message(name: str, wanted: str, value: object, fix: str) -> str:
    text = f"{name} must be {wanted}, got {shown(value)}."
    return f"{text} {fix}" if fix else text


# --- numbers ------------------------------------------------------------------------------------------------


def _number(name: str, value: object, wanted: str, fix: str) -> float:
    """Read a real number from a Python, NumPy or 0-dim tensor scalar; bools are no numbers."""
    if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        kind = type(value).__name__
        advice = fix or f"Pass a plain number instead of a {kind}."
        raise TypeError(_message(name, f"a number {wanted}".rstrip(), value, advice))
    try:
        return float(value)
    except OverflowError:  # a whole number beyond the largest float
        return math.inf if value > 0 else -math.inf


def finite(name: str, value: object, *, fix: str = "") -> float:
    """Check that ``value`` is a finite real number.

    Args:
        name: argument name for the message.
        value: Python number, NumPy scalar or 0-dim tensor.
        fix: what the user should do instead, as one sentence.

    Returns:
        The value as a Python float.

    Raises:
        TypeError: if ``value`` is no number (bools are none).
        ValueError: if ``value`` is NaN or infinite.
    """
    number = _number(name, value, "that is finite", fix)
    if not math.isfinite(number):
        raise ValueError(_message(name, "finite", number, fix))
    return number


def _bounded(
    name: str, value: object, wanted: str, fix: str, *, low: float, high: float, open_low: bool
) -> float:
    number = _number(name, value, wanted, fix)
    inside = math.isfinite(number) and low <= number <= high and not (open_low and number == low)
    if not inside:
        raise ValueError(_message(name, wanted, number if isinstance(value, Tensor) else value, fix))
    return number


def non_negative(name: str, value: object, *, fix: str = "") -> float:
    """Check that ``value`` is finite and >= 0; see :func:`finite` for arguments and errors.

    Raises:
        TypeError: if ``value`` is no number.
        ValueError: if ``value`` is negative, NaN or infinite.
    """
    return _bounded(name, value, ">= 0", fix, low=0.0, high=math.inf, open_low=False)


def positive(name: str, value: object, *, fix: str = "") -> float:
    """Check that ``value`` is finite and > 0; see :func:`finite` for arguments and errors.

    Raises:
        TypeError: if ``value`` is no number.
        ValueError: if ``value`` is zero, negative, NaN or infinite.
    """
    return _bounded(name, value, "> 0", fix, low=0.0, high=math.inf, open_low=True)


def fraction(name: str, value: object, *, fix: str = "") -> float:
    """Check that ``value`` lies in [0, 1]; see :func:`finite` for arguments and errors.

    Raises:
        TypeError: if ``value`` is no number.
        ValueError: if ``value`` lies outside [0, 1] or is NaN.
    """
    return _bounded(name, value, "in [0, 1]", fix, low=0.0, high=1.0, open_low=False)


def integer(name: str, value: object, *, minimum: int | None = None, fix: str = "") -> int:
    """Check that ``value`` is a whole number of an integer type, at least ``minimum``.

    Raises:
        TypeError: if ``value`` is no integer (bools and floats are none).
        ValueError: if ``value`` is below ``minimum``.
    """
    if isinstance(value, np.integer) or (
        isinstance(value, Tensor)
        and value.dim() == 0
        and not value.dtype.is_floating_point
        and not value.dtype.is_complex
        and value.dtype is not torch.bool
    ):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(_message(name, "an integer", value, fix))
    if minimum is not None and value < minimum:
        raise ValueError(_message(name, f">= {minimum}", value, fix))
    return value


# --- choices and types --------------------------------------------------------------------------------------


def choice(name: str, value: object, options: Iterable[_T], *, fix: str = "") -> _T:
    """Check that ``value`` is one of ``options`` and return it.

    Raises:
        ValueError: if it is not; the message lists the options and the nearest one.
    """
    known = tuple(options)
    for option in known:
        if type(value) is type(option) and value == option:
            return option
    listed = ", ".join(repr(option) for option in known)
    near = difflib.get_close_matches(
        value if isinstance(value, str) else shown(value), [str(option) for option in known], n=1
    )
    advice = fix or (f"Did you mean {near[0]!r}?" if near else "")
    raise ValueError(_message(name, f"one of {listed}", value, advice))


def instance(name: str, value: object, types: type[_T] | tuple[type, ...], *, fix: str = "") -> Any:
    """Check that ``value`` is an instance of ``types`` and return it.

    Raises:
        TypeError: if it is not.
    """
    if not isinstance(value, types):
        wanted = types if isinstance(types, tuple) else (types,)
        names = " or ".join(each.__name__ for each in wanted)
        raise TypeError(
            f"{name} must be of type {names}, got {type(value).__name__}.{' ' + fix if fix else ''}"
        )
    return value


# --- tensors ------------------------------------------------------------------------------------------------


def floating(
    name: str,
    tensor: object,
    *,
    ndim: int | None = None,
    shape: Sequence[int | None] | None = None,
    fix: str = "",
) -> Tensor:
    """Check that ``tensor`` is a real floating tensor of the wanted shape.

    Args:
        name: argument name for the message.
        tensor: the value to check.
        ndim: wanted number of dimensions, ``None`` for any.
        shape: wanted sizes, ``None`` for a free dimension.
        fix: what the user should do instead.

    Returns:
        The same tensor, untouched.

    Raises:
        TypeError: if it is no tensor, or not of a real floating dtype.
        ValueError: if its shape differs.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(_message(name, "a floating tensor", tensor, fix))
    if not tensor.dtype.is_floating_point:
        raise TypeError(_message(name, "a floating tensor", tensor, fix or "Convert it with .float()."))
    if ndim is not None and tensor.dim() != ndim:
        raise ValueError(_message(name, f"a tensor with {ndim} dimensions", tensor, fix))
    if shape is not None:
        sizes = tuple(tensor.shape)
        if len(sizes) != len(shape) or any(
            w is not None and w != s for w, s in zip(shape, sizes, strict=True)
        ):
            free = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(_message(name, f"of shape ({free})", tensor, fix))
    return tensor
