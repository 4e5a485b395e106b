"""Tensors that belong to single examples of a data set, kept by its index, never by its place in a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pullback.core.checks import shown
from pullback.core.state import StateError

_HERE = "pass each example's own position in the data set as index"


class SampleStore:
    """Rows of tensors by example. It grows with the largest index, and notices when an index means another example.

    A weighted sum of every example's input is kept beside its rows. An index that comes back with another input is
    refused: then the index is a position in a batch or in an order that changed, and what is kept belongs to others.
    """

    def __init__(self) -> None:
        self.rows: list[Tensor] = []  # each [capacity, ...]
        self.prints: Tensor | None = None  # [capacity], NaN where nothing is kept

    def check(self, index: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The index on the device of ``x``, and the prints of ``x``; the store is not changed.

        Args:
            index: int64 [batch], distinct and not negative.
            x: inputs [batch, ...].

        Raises:
            TypeError: if the index is no int64 tensor.
            ValueError: if it has another shape, repeats, is negative, or stood for another input before.
        """
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            raise TypeError(f"index must be an int64 tensor, got {shown(index)}. Please {_HERE}.")
        if index.shape != x.shape[:1]:
            raise ValueError(f"index must have shape ({len(x)},), got {tuple(index.shape)}. Please {_HERE}.")
        place = index.to(x.device)
        if len(place) and (int(place.min()) < 0 or len(place.unique()) < len(place)):
            raise ValueError(f"index must be distinct and >= 0, got {place.tolist()!r:.80}. Please {_HERE}.")
        flat = x.detach().flatten(1)
        prints = flat @ torch.linspace(0.5, 1.5, flat.shape[1], dtype=flat.dtype, device=flat.device)
        if self.prints is not None and len(place):
            known = place < len(self.prints)
            kept = self.prints[place.clamp(max=len(self.prints) - 1)].to(prints)
            moved = known & ~kept.isnan() & ((kept - prints).abs() > 1e-3 * (1 + prints.abs()))
            if bool(moved.any()):
                first = int(place[moved][0])
                raise ValueError(
                    f"index must stand for the same example every time, got {first} with another input than before. "
                    f"What is kept belongs to examples: {_HERE}; keep nothing where inputs change (augmentation)."
                )
        return place, prints

    def read(self, place: Tensor, default: Sequence[Tensor]) -> list[Tensor]:
        """Rows of the examples at ``place``; those of ``default`` [batch, ...] where nothing is kept yet."""
        if self.prints is None or not len(place):
            return list(default)
        near = place.clamp(max=len(self.prints) - 1)
        kept = (place < len(self.prints)) & ~self.prints[near].isnan()
        found = []
        for row, other in zip(self.rows, default, strict=True):
            mask = kept.view(-1, *[1] * (other.dim() - 1))
            found.append(torch.where(mask, row[near].to(other.device, other.dtype), other))
        return found

    def write(self, place: Tensor, prints: Tensor, rows: Sequence[Tensor]) -> None:
        """Keep ``rows`` [batch, ...] for the examples at ``place``."""
        if not len(place):
            return
        most = int(place.max()) + 1
        if self.prints is None:
            self.rows = [row.new_zeros((0, *row.shape[1:])) for row in rows]
            self.prints = prints.new_zeros(0)
        if most > len(self.prints):
            more = max(most, 2 * len(self.prints)) - len(self.prints)
            self.rows = [torch.cat([kept, kept.new_zeros((more, *kept.shape[1:]))]) for kept in self.rows]
            self.prints = torch.cat([self.prints, self.prints.new_full((more,), torch.nan)])
        for kept, row in zip(self.rows, rows, strict=True):
            kept[place] = row.to(kept.dtype)
        self.prints[place] = prints.to(self.prints.dtype)

    def state_dict(self) -> dict[str, Any]:
        """What is kept, as tensors of its own."""
        prints = torch.zeros(0) if self.prints is None else self.prints.clone()
        return {"rows": [row.clone() for row in self.rows], "prints": prints}

    @staticmethod
    def check_state(owner: str, state: Mapping[str, Any]) -> None:
        """Check a saved state.

        Raises:
            StateError: if it does not fit.
        """
        rows, prints = state.get("rows"), state.get("prints")
        good = isinstance(prints, Tensor) and prints.dim() == 1 and isinstance(rows, list | tuple)
        good = good and all(isinstance(row, Tensor) and len(row) == len(prints) for row in rows)
        if not good or set(state) != {"rows", "prints"}:
            raise StateError(
                f"{owner} must hold rows and prints of equal length, got {shown(state)}. Pass what was saved."
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checked state."""
        self.rows = [row.clone() for row in state["rows"]]
        self.prints = state["prints"].clone() if len(state["prints"]) else None
