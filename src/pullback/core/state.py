"""Versioned state: checked whole before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from pullback.core.checks import shown


class StateError(ValueError):
    """A saved state does not fit: wrong version, keys, types, shapes or dtypes."""


def check_version(owner: str, state: Mapping[str, Any], newest: int, *, oldest: int = 1) -> int:
    """Check ``state["format_version"]`` against the versions this code can read.

    Returns:
        The version of the state.

    Raises:
        StateError: if it is missing, no integer, older than ``oldest`` or newer than ``newest``.
    """
    version = state.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int):
        raise StateError(
            f"{owner}: format_version must be an integer from {oldest} to {newest}, got {shown(version)}. "
            "Pass what state_dict() returned."
        )
    if version > newest:
        raise StateError(
            f"{owner}: format_version must be <= {newest}, got {version}. "
            "It was written by a newer pullback: update this one."
        )
    if version < oldest:
        raise StateError(
            f"{owner}: format_version must be >= {oldest}, got {version}. This state is too old to read."
        )
    return version


def check_counts(owner: str, state: Mapping[str, Any], *keys: str) -> None:
    """Check that counters are not negative: a step before the first one would only fail later, in a run.

    Raises:
        StateError: at the first one that is.
    """
    for key in keys:
        if state[key] < 0:
            raise StateError(
                f"{owner}.{key} must be >= 0, got {state[key]}. Pass what state_dict() returned."
            )


def check_state(
    owner: str,
    state: object,
    reference: Mapping[str, Any],
    *,
    version: int | None = None,
    open_keys: Iterable[str] = (),
) -> None:
    """Check that ``state`` has exactly the keys, types, shapes and dtypes of ``reference``; change nothing.

    Args:
        owner: who loads, for the message.
        state: the saved state.
        reference: a state of the same form, usually the present one.
        version: newest ``format_version`` that is understood; ``None`` when the state carries none.
        open_keys: keys whose value must be a mapping that someone else checks.

    Raises:
        StateError: at the first part that does not fit.
    """
    if not isinstance(state, Mapping):
        raise StateError(
            f"{owner}: state must be a mapping, got {shown(state)}. Pass what state_dict() returned."
        )
    if version is not None:
        check_version(owner, state, version)
    missing = sorted(set(reference) - set(state), key=str)
    unknown = sorted(set(state) - set(reference), key=str)
    if missing or unknown:
        raise StateError(
            f"{owner}: state must have the keys {sorted(reference, key=str)}, "
            f"got missing {missing} and unknown {unknown}. "
            "Load the state into the same composition that saved it."
        )
    opened = set(open_keys)
    for key, wanted in reference.items():
        given = state[key]
        if key in opened:
            if not isinstance(given, Mapping):
                raise StateError(f"{owner}.{key} must be a mapping, got {shown(given)}.")
        else:
            _check_value(f"{owner}.{key}", given, wanted)


def _check_value(where: str, given: object, wanted: object) -> None:
    if isinstance(wanted, Tensor):
        if not isinstance(given, Tensor):
            raise StateError(f"{where} must be a tensor, got {shown(given)}.")
        if given.shape != wanted.shape or given.dtype != wanted.dtype:
            raise StateError(
                f"{where} must have shape {tuple(wanted.shape)} and dtype {wanted.dtype}, "
                f"got {tuple(given.shape)} and {given.dtype}. Load it into the same model that saved it."
            )
    elif isinstance(wanted, Mapping):
        check_state(where, given, wanted)
    elif isinstance(wanted, list | tuple):
        if not isinstance(given, list | tuple) or len(given) != len(wanted):
            raise StateError(f"{where} must be a list of {len(wanted)} items, got {shown(given)}.")
        for position, (one, other) in enumerate(zip(given, wanted, strict=True)):
            _check_value(f"{where}[{position}]", one, other)
    elif wanted is not None and type(given) is not type(wanted):
        whole_as_float = isinstance(wanted, float) and isinstance(given, int) and not isinstance(given, bool)
        if not whole_as_float:
            raise StateError(f"{where} must be of type {type(wanted).__name__}, got {shown(given)}.")
