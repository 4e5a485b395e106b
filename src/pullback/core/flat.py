"""Parameters in a few flat rows: one long vector per device and dtype, seen as tensors of the parameters' shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn

from pullback.core.checks import shown
from pullback.core.parameters import ParameterSource, named_parameters
from pullback.core.state import StateError

Parameters: TypeAlias = ParameterSource | Iterable[Tensor]
"""Where parameters may come from; plain tensors are named by their position."""


@dataclass(frozen=True)
class FlatGroup:
    """Parameters of one device and dtype, one behind the other.

    Args:
        device: of all of them.
        dtype: of all of them.
        params: the parameters.
        names: their names.
        offsets: where each begins in a row.
        strides: how each lies there: as in memory, so that a copy runs straight through.
        size: entries of a row.
    """

    device: torch.device
    dtype: torch.dtype
    params: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    strides: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Entries of a row."""
        return self.offsets[-1] + self.params[-1].numel()

    @property
    def wide(self) -> torch.dtype:
        """The dtype for sums: float32 for half precision, else the parameters' own."""
        return torch.float32 if self.dtype in {torch.float16, torch.bfloat16} else self.dtype

    def rows(self, count: int, dtype: torch.dtype | None = None) -> Tensor:
        """``count`` rows of zeros ``[count, size]``, in the wide dtype unless another is given."""
        return torch.zeros(count, self.size, dtype=dtype or self.wide, device=self.device)

    def views(self, row: Tensor) -> list[Tensor]:
        """A row ``[size]`` as tensors of the parameters' shapes and strides; they share its memory."""
        start = row.storage_offset()
        return [
            row.as_strided(p.shape, stride, start + offset)
            for p, stride, offset in zip(self.params, self.strides, self.offsets, strict=True)
        ]


class FlatLayout:
    """Trainable parameters, grouped by device and dtype for work on long rows instead of many tensors.

    Frozen parameters are left out and tied ones counted once. The layout is fixed when it is made: make it after
    ``model.to(...)`` and after freezing.

    Args:
        source: a module, an optimizer, a mapping, (name, tensor) pairs, or plain tensors.

    Raises:
        TypeError: if an entry is no real dense tensor on this process alone, or the source is none of these.
        ValueError: if no parameter is trainable, or two share a name.
    """

    def __init__(self, source: Parameters) -> None:
        named = _named(source)
        trainable = {name: p for name, p in named.items() if p.requires_grad}
        if not trainable:
            raise ValueError(
                f"parameters must include a trainable one, got {len(named)} frozen. Set requires_grad_() first."
            )
        found: dict[tuple[torch.device, torch.dtype], FlatGroup] = {}
        for name, p in trainable.items():
            _check(name, p)
            group = found.setdefault((p.device, p.dtype), FlatGroup(p.device, p.dtype))
            group.offsets.append(group.size if group.params else 0)
            group.params.append(p)
            group.names.append(name)
            group.strides.append(torch.empty_like(p, device="meta").stride())
        self.groups = list(found.values())

    @property
    def size(self) -> int:
        """Entries of all parameters."""
        return sum(group.size for group in self.groups)

    def sizes(self) -> list[list[int]]:
        """Entries of every parameter, group by group: what a saved state is compared by."""
        return [[p.numel() for p in group.params] for group in self.groups]

    def check_sizes(self, owner: str, saved: object) -> None:
        """Refuse the `sizes` of other parameters.

        Raises:
            StateError: if they differ.
        """
        if saved != self.sizes():
            raise StateError(
                f"{owner}: sizes must be those of the parameters, got others. Load it into the same model."
            )

    def check_places(self, owner: str) -> None:
        """Refuse parameters that were moved or cast since.

        Raises:
            RuntimeError: if a parameter has another device or dtype than when the layout was made.
        """
        for group in self.groups:
            for name, p in zip(group.names, group.params, strict=True):
                if p.device != group.device or p.dtype != group.dtype:
                    raise RuntimeError(
                        f"{owner}: {shown(name)} must stay on {group.device} in {group.dtype}, got {p.device} and "
                        f"{p.dtype}. Move or cast the model first, then make a new {owner}."
                    )


def _named(source: Parameters) -> dict[str, Tensor]:
    if isinstance(source, nn.Module | Mapping | torch.optim.Optimizer | Tensor | str) or not isinstance(
        source, Iterable
    ):
        return named_parameters(source)  # ty: ignore[invalid-argument-type]  # refuses what it cannot read
    rows: Sequence[object] = list(source)
    return named_parameters(
        [(f"param{i}", row) if isinstance(row, Tensor) else row for i, row in enumerate(rows)]
    )


def _check(name: str, p: Tensor) -> None:
    if not p.dtype.is_floating_point:
        raise TypeError(
            f"parameter {shown(name)} must be real, got {p.dtype}. Leave it out, or view it as real numbers."
        )
    if p.layout != torch.strided or type(p).__name__ == "DTensor":
        raise TypeError(
            f"parameter {shown(name)} must be a dense tensor held whole by this process, got {type(p).__name__} of "
            f"layout {p.layout}. Sharded parameters (FSDP, tensor parallel) are not supported: use DDP."
        )
