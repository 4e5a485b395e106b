"""Named parameters of a model, a mapping or an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pullback.core.checks import shown

ParameterSource: TypeAlias = (
    nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | torch.optim.Optimizer
)
"""Where named parameters may come from."""


def optimizer_rows(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """Name and tensor of every parameter of ``optimizer``, in its order.

    Names are the ones the optimizer was given (``named_parameters()``), else ``group<g>.<position>``.
    """
    rows: list[tuple[str, Tensor]] = []
    for g, group in enumerate(optimizer.param_groups):
        names = group.get("param_names")
        for position, tensor in enumerate(group["params"]):
            rows.append((names[position] if names else f"group{g}.{position}", tensor))
    return rows


def _rows(source: ParameterSource) -> list[Any]:
    if isinstance(source, torch.optim.Optimizer):
        return optimizer_rows(source)
    if isinstance(source, nn.Module):
        return list(source.named_parameters())
    if isinstance(source, Mapping):
        return list(source.items())
    if isinstance(source, Tensor) or not isinstance(source, Iterable):
        raise TypeError(
            f"parameters must be a module, a mapping, (name, tensor) pairs or an optimizer, got "
            f"{shown(source)}. "
            "Pass model or model.named_parameters()."
        )
    return list(source)


def named_parameters(source: ParameterSource) -> dict[str, Tensor]:
    """Names and parameters of ``source``, in order, a tied parameter once under its first name.

    Args:
        source: a module, a mapping, (name, tensor) pairs, or an optimizer.

    Returns:
        A new dictionary; the tensors are the source's own.

    Raises:
        TypeError: if the source is none of these, or an entry is no (str, Tensor) pair.
        ValueError: if there is no parameter, or two different parameters share a name.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for row in _rows(source):
        if not (
            isinstance(row, tuple)
            and len(row) == 2
            and isinstance(row[0], str)
            and isinstance(row[1], Tensor)
        ):
            raise TypeError(
                f"parameters must be (name, tensor) pairs, got {shown(row)}. Pass model.named_parameters()."
            )
        name, tensor = row
        if id(tensor) in seen:
            continue
        if name in found:
            raise ValueError(f"parameter names must be distinct, got {name!r} twice. Rename one of them.")
        seen.add(id(tensor))
        found[name] = tensor
    if not found:
        raise ValueError(
            f"parameters must not be empty, got none from {type(source).__name__}. "
            "An iterator that was read before is empty: pass list(model.named_parameters())."
        )
    return found
