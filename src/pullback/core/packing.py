"""Take a nested state apart into tensors and plain JSON values, and put it together again.

The states of optimizers, schedulers and loops mix tensors with numbers, tuples and integer keys; a checkpoint
keeps tensors and JSON apart. ``unpack(*pack(state))`` gives back an equal state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pullback.core.checks import shown


def pack(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a nested state.

    Args:
        state: dictionaries, lists and tuples of tensors and plain Python values.

    Returns:
        Tensors by path, and the JSON tree that names them. Tensors are not copied.

    Raises:
        TypeError: if a value is neither tensor nor plain value.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, {"tree": _take(state, "", tensors)}


def unpack(tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> dict[str, Any]:
    """Put a state together that :func:`pack` took apart.

    Args:
        tensors: the tensors by path.
        scalars: the JSON tree.

    Returns:
        The nested state.

    Raises:
        ValueError: if the tree is not one of :func:`pack`, or names a tensor that is missing.
    """
    state = _give(scalars.get("tree"), tensors)
    if not isinstance(state, dict):
        raise ValueError(f"scalars must be what pack() returned, got {shown(scalars)}.")
    return state


def _take(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, Mapping):
        rows = []
        for number, (key, item) in enumerate(value.items()):
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise TypeError(f"state{path} must have string or integer keys, got {shown(key)}.")
            rows.append([key, _take(item, f"{path}/{number}:{key}", tensors)])
        return {"map": rows}
    if isinstance(value, list | tuple):
        items = [_take(item, f"{path}/{number}", tensors) for number, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is not None and type(value) not in {str, int, float, bool}:
        raise TypeError(f"state{path} must be a tensor or a plain value, got {shown(value)}. Convert it.")
    return value


def _give(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    if len(tree) != 1:
        raise ValueError(f"scalars must be what pack() returned, got a node with {len(tree)} tags.")
    tag, inside = next(iter(tree.items()))
    if tag == "tensor" and inside in tensors:
        return tensors[inside]
    if tag == "map" and isinstance(inside, list):
        return {key: _give(item, tensors) for key, item in inside}
    if tag in {"list", "tuple"} and isinstance(inside, list):
        items = [_give(item, tensors) for item in inside]
        return tuple(items) if tag == "tuple" else items
    raise ValueError(f"scalars must be what pack() returned, got {shown(tag)}: {shown(inside)}.")
