"""Orders and splits that depend on nothing but names and content: equal on every machine and version."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def _fraction(content: bytes, salt: str) -> float:
    """A number in [0, 1) that is fixed by ``content`` and ``salt``."""
    digest = hashlib.blake2b(content, digest_size=8, person=salt.encode()[:16]).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def fixed_permutation(n: int, salt: str) -> Tensor:
    """A permutation of ``n`` positions that is the same everywhere.

    Args:
        n: number of positions.
        salt: names the permutation; its first 16 bytes count.

    Returns:
        int64 tensor [n].
    """
    keys = [_fraction(index.to_bytes(8, "big"), salt) for index in range(n)]
    return torch.tensor(sorted(range(n), key=keys.__getitem__), dtype=torch.int64)


def split(
    examples: Tensor | Sequence[str], fractions: Mapping[str, float], *, salt: str = "split"
) -> dict[str, Tensor]:
    """Part examples by a hash of their content, so that a part never depends on position or on other examples.

    Equal examples fall into the same part, so no duplicate crosses from training to test.

    Args:
        examples: tensor [n, ...] or n strings.
        fractions: share of each part, by name; they must sum to 1.
        salt: another salt gives another split; its first 16 bytes count.

    Returns:
        Positions (int64 tensor, ascending) of each part, by name.

    Raises:
        ValueError: if a fraction is negative or they do not sum to 1.
    """
    total = sum(fractions.values())
    if any(share < 0 for share in fractions.values()) or abs(total - 1) > 1e-9:
        raise ValueError(
            f"fractions must be >= 0 and sum to 1, got {dict(fractions)} (sum {total:g}). Adjust one part."
        )
    parts: dict[str, list[int]] = {name: [] for name in fractions}
    bounds, edge = [], 0.0
    for name, share in fractions.items():
        edge += share
        bounds.append((edge, name))
    last = bounds[-1][1]
    for index, content in enumerate(_contents(examples)):
        place = _fraction(content, salt)
        parts[next((name for bound, name in bounds if place < bound), last)].append(index)
    return {name: torch.tensor(positions, dtype=torch.int64) for name, positions in parts.items()}


def _contents(examples: Tensor | Sequence[str]) -> list[bytes]:
    if isinstance(examples, Tensor):
        return [row.tobytes() for row in examples.detach().cpu().contiguous().numpy()]
    return [text.encode() for text in examples]
