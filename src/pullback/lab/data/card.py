"""What a reader must know of a data set before trusting a number measured on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetCard:
    """Where a data set comes from.

    Args:
        name: the loader's name.
        source: the package or archive it was taken from, with its version where that is fixed.
        licence: the licence of that source.
        citation: who made the data.
        examples: number of examples.
        counts: examples per class, domain or file, by name.
    """

    name: str
    source: str
    licence: str
    citation: str
    examples: int
    counts: dict[str, int]
