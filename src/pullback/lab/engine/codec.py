"""Results as JSON and back, with the schema taken from the dataclasses and checked on the way in."""

from __future__ import annotations

import base64
import dataclasses
import math
import re
import types
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

_ABSENT = object()


class EvidenceError(ValueError):
    """Evidence that cannot be read: the message names the place, what was found and what was expected."""


def encode(value: Any) -> Any:
    """Plain JSON for a result: arrays as base64, numbers that are not finite as text, keys as strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value)
        text = base64.b64encode(data.tobytes()).decode("ascii")
        return {"dtype": data.dtype.str, "shape": list(value.shape), "base64": text}
    if isinstance(value, Mapping):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [encode(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def decode(expected: Any, data: Any, where: str) -> Any:
    """Build a value of the type ``expected`` from parsed JSON.

    Args:
        expected: a type of a result's field.
        data: parsed JSON.
        where: path in the document, for the message.

    Raises:
        EvidenceError: if something is missing, unknown or of another type.
    """
    origin, args = get_origin(expected), get_args(expected)
    if expected is Any:
        return data
    if origin is Literal:
        return _expect(data in args, data, where, " or ".join(map(repr, args)))
    if origin in {Union, types.UnionType}:
        return None if data is None else decode(next(a for a in args if a is not type(None)), data, where)
    if dataclasses.is_dataclass(expected):
        return _decode_dataclass(expected, data, where)
    if expected is np.ndarray:
        return _decode_array(data, where)
    if expected is float:
        return _decode_float(data, where)
    if origin is tuple and args[-1] is not Ellipsis:
        _expect(isinstance(data, list) and len(data) == len(args), data, where, f"a list of {len(args)}")
        return tuple(decode(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, data, strict=True)))
    if origin in {list, tuple}:
        _expect(isinstance(data, list), data, where, "a list")
        return origin(decode(args[0], v, f"{where}[{i}]") for i, v in enumerate(data))
    if origin is not None:
        _expect(isinstance(data, dict), data, where, "an object")
        return {k: decode(args[1], v, f"{where}.{k}") for k, v in data.items()}
    right = isinstance(data, expected) and not (expected is int and isinstance(data, bool))
    if expected is int and right:
        right = -(2**63) <= data < 2**63
    return _expect(right, data, where, f"a value of type {expected.__name__}")


def _expect(right: bool, data: Any, where: str, what: str) -> Any:
    if not right:
        shown = "nothing" if data is _ABSENT else repr(data)[:60]
        raise EvidenceError(f"{where} must be {what}, got {shown}. Export the evidence again.")
    return data


@lru_cache(maxsize=32)
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _decode_dataclass(cls: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), data, where, f"an object with the fields of {cls.__name__}")
    hints = _hints(cls)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise EvidenceError(
            f"{where} has an unknown field {unknown[0]!r}. Read it with the version that wrote it."
        )
    required = {
        f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING
    }
    for name in sorted(required - set(data)):
        _expect(False, _ABSENT, f"{where}.{name}", "present")
    values = {name: decode(hints[name], value, f"{where}.{name}") for name, value in data.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:  # a declaration that refuses its own fields
        raise EvidenceError(f"{where} is no {cls.__name__}: {error} Export the evidence again.") from error


def _decode_float(data: Any, where: str) -> float:
    named = data in {"nan", "inf", "-inf"} if isinstance(data, str) else False
    number = isinstance(data, float) or (type(data) is int and -(2**63) <= data < 2**63)
    return float(_expect(named or number, data, where, "a number"))


def numeric_dtype(text: str) -> np.dtype:
    """The dtype of a kept array; `numpy.dtype` itself would parse whatever text a damaged file holds.

    Raises:
        ValueError: if it is not the short name of a numeric type.
    """
    if not isinstance(text, str) or re.fullmatch(r"[<>|=]?[biufc][0-9]{1,2}", text) is None:
        raise ValueError(f"dtype must be a short name such as '<f4', got {text!r}")
    return np.dtype(text)


def _decode_array(data: Any, where: str) -> np.ndarray:
    _expect(
        isinstance(data, dict) and set(data) == {"dtype", "shape", "base64"}, data, where, "an encoded array"
    )
    try:
        dtype = numeric_dtype(data["dtype"])
        raw = base64.b64decode(data["base64"], validate=True)
        array = np.frombuffer(raw, dtype).reshape(data["shape"]).copy()
    except (ValueError, TypeError) as error:
        raise EvidenceError(f"{where} is no valid array: {error}. Export the evidence again.") from error
    return array
