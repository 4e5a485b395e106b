"""Inner products of a few long vectors, and vectors in their span that are changed without touching the long ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Rows: TypeAlias = Sequence[Sequence[float]]
"""A small matrix on the host, row by row."""

_FEW = 4  # below it, single dot products (each pair once) are faster than one product of matrices


def inner_products(
    parts: Sequence[Tensor], others: Sequence[Tensor] = (), *, pairs: bool = False
) -> tuple[list[float], list[list[float]], list[list[float]]]:
    """Norms and cosines of N long vectors, and their products with N others; one transfer to the host.

    Sums run in the dtype of the parts. Where squares leave its range although entries do not, the vectors are scaled
    and read again in float64.

    Args:
        parts: the vectors as rows, cut into one or more real tensors ``[N, n_k]`` (one per device and dtype).
        others: as many other vectors, cut alike; or nothing.
        pairs: multiply each vector with all others instead of with its own counterpart only.

    Returns:
        Norms ``[N]``; cosines ``[N][N]``, 0 in rows of zero vectors; and ``cross[i][j]``, the product of *unit* vector
        i with other j (only ``j == i`` unless ``pairs``; empty without others). A vector with NaN or Inf has a norm
        that is not finite, and its rows mean nothing.
    """
    count = parts[0].shape[0]
    home = parts[0].device
    sums = [_products(each) for each in parts]
    crosses = [_cross(a, b, pairs) for a, b in zip(parts, others, strict=True)] if others else []
    pieces = [piece.to(home) for piece in (*sums, *crosses)]
    values = (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).tolist()  # the one read by the host
    width = len(sums[0])
    table = _table(_added(values[: width * len(parts)], width), count)
    cross = _cross_table(_added(values[width * len(parts) :], count**2 if pairs else count), count, pairs)
    kept = [torch.finfo(part.dtype) for part in parts]
    tiny, huge = max(each.tiny for each in kept) * 1e12, min(each.max for each in kept)
    if all(tiny <= table[i][i] <= huge for i in range(count)):
        norms, cosines = normalised(table)
        return norms, cosines, _over(cross, norms)
    scales = _largest(parts)
    lost = (s > 0 and not tiny <= table[i][i] <= huge for i, s in enumerate(scales))
    if any(lost) or not all(map(math.isfinite, scales)):
        return _scaled(parts, others, scales, pairs)
    norms, cosines = normalised(table)
    return norms, cosines, _over(cross, norms)


def normalised(gram: Rows) -> tuple[list[float], list[list[float]]]:
    """Norms and cosines of vectors with this Gram matrix; cosines with a zero vector are 0.

    Args:
        gram: ``[N][N]``.

    Returns:
        Norms ``[N]`` and cosines ``[N][N]`` in [-1, 1].
    """
    norms = [math.sqrt(row[i]) if row[i] > 0 else abs(row[i]) * 0.0 for i, row in enumerate(gram)]
    cosines = [
        [float(norms[i] > 0) if i == j else _cosine(value, norms[i], norms[j]) for j, value in enumerate(row)]
        for i, row in enumerate(gram)
    ]
    return norms, cosines


def _cosine(inner: float, a: float, b: float) -> float:
    return max(-1.0, min(1.0, inner / a / b)) if a > 0 and b > 0 else 0.0


# --- the long vectors ----------------------------------------------------------------------------------------------


def _products(part: Tensor) -> Tensor:
    """All products of rows, flat: the upper triangle for few rows, else the whole matrix."""
    count = part.shape[0]
    if count < _FEW:
        return torch.stack([torch.dot(part[i], part[j]) for i in range(count) for j in range(i, count)])
    return torch.mm(part, part.T).flatten()


def _cross(part: Tensor, other: Tensor, pairs: bool) -> Tensor:
    if pairs:
        return torch.mm(part, other.T).flatten()
    return torch.stack([torch.dot(a, b) for a, b in zip(part, other, strict=True)])


def _added(values: Sequence[float], width: int) -> list[float]:
    """Sum of consecutive runs of ``width`` numbers."""
    return [sum(values[k::width]) for k in range(width)] if values else []


def _table(values: Sequence[float], count: int) -> list[list[float]]:
    if count >= _FEW:
        return [list(values[i * count : (i + 1) * count]) for i in range(count)]
    table = [[0.0] * count for _ in range(count)]
    upper = iter(values)
    for i in range(count):
        for j in range(i, count):
            table[i][j] = table[j][i] = next(upper)
    return table


def _cross_table(values: Sequence[float], count: int, pairs: bool) -> list[list[float]]:
    if not values:
        return []
    if pairs:
        return [list(values[i * count : (i + 1) * count]) for i in range(count)]
    return [[value if i == j else 0.0 for j in range(count)] for i, value in enumerate(values)]


def _over(cross: list[list[float]], norms: list[float]) -> list[list[float]]:
    return [[v / norm if norm > 0 else 0.0 for v in row] for row, norm in zip(cross, norms, strict=False)]


def _largest(parts: Sequence[Tensor]) -> list[float]:
    """Largest absolute entry of every vector; NaN where there is one."""
    home = parts[0].device
    each = [part.abs().amax(1).to(home, torch.float64) for part in parts if part.shape[1]]
    return torch.stack(each).amax(0).tolist() if each else [0.0] * parts[0].shape[0]


def _scaled(
    parts: Sequence[Tensor], others: Sequence[Tensor], scales: list[float], pairs: bool
) -> tuple[list[float], list[list[float]], list[list[float]]]:
    """The same from vectors divided by their largest entries, in float64: slow, and right for any finite entries."""
    count, home = len(scales), parts[0].device
    divisors = [s if s > 0 and math.isfinite(s) else 1.0 for s in scales]
    gram = torch.zeros(count, count, dtype=torch.float64, device=home)
    cross = torch.zeros(count, count, dtype=torch.float64, device=home)
    for k, part in enumerate(parts):
        rows = part.double() / torch.tensor(divisors, dtype=torch.float64, device=part.device)[:, None]
        gram += (rows @ rows.T).to(home)
        if others:
            cross += (rows @ others[k].double().T).to(home)
    norms, cosines = normalised(gram.tolist())
    table = cross.tolist() if others else []
    if others and not pairs:
        table = [[v if i == j else 0.0 for j, v in enumerate(row)] for i, row in enumerate(table)]
    sizes = [n * d if math.isfinite(s) else math.nan for n, d, s in zip(norms, divisors, scales, strict=True)]
    return sizes, cosines, _over(table, norms)


# --- vectors in their span -----------------------------------------------------------------------------------------


class Span:
    """Vectors that begin as N unit vectors and are replaced by combinations of each other.

    Their Gram matrix is updated with them, so that no combination reads the long vectors again.

    Args:
        cosines: cosines of the unit vectors at the start.
        alive: which of them take part; the others keep still.
        tiny: vectors of at most this squared length count as zero.
    """

    def __init__(self, cosines: Rows, alive: Sequence[bool], tiny: float) -> None:
        self.alive = list(alive)
        self.rows = [[float(i == j) for j in range(len(self.alive))] for i in range(len(self.alive))]
        self._tiny = tiny
        self._gram = [list(row) for row in cosines]

    def length(self, i: int) -> float:
        """Length of vector i; 1 at the start, 0 when it counts as zero."""
        square = self._gram[i][i]
        return math.sqrt(square) if self.alive[i] and square > self._tiny else 0.0

    def inner(self, i: int, j: int) -> float:
        """Product of two vectors."""
        return self._gram[i][j]

    def worst_pair(self) -> tuple[float, int, int]:
        """Least cosine of two vectors and their positions, the first pair on a tie; (2, 0, 0) when no two are left."""
        lengths = [self.length(i) for i in range(len(self.rows))]
        worst = (2.0, 0, 0)
        for i, row in enumerate(self._gram):
            if lengths[i]:
                for j in range(i + 1, len(row)):
                    if lengths[j] and row[j] < worst[0] * lengths[i] * lengths[j]:
                        worst = (max(-1.0, row[j] / (lengths[i] * lengths[j])), i, j)
        return worst

    def combine(self, i: int, j: int, block: tuple[tuple[float, float], tuple[float, float]]) -> None:
        """Replace vectors i and j by ``block @ (vector i, vector j)``."""
        for table in (self.rows, self._gram):
            a, b = table[i], table[j]
            table[i], table[j] = ([p * x + q * y for x, y in zip(a, b, strict=True)] for p, q in block)
        for row in self._gram:
            a, b = row[i], row[j]
            row[i], row[j] = (p * a + q * b for p, q in block)

    def along(self, table: Rows) -> list[float]:
        """Cosine of every current vector i with direction i, given ``table[k][i]``, its cosine with unit vector k."""
        found = []
        for i, row in enumerate(self.rows):
            length = self.length(i)
            inner = sum(a * other[i] for a, other in zip(row, table, strict=True))
            found.append(inner / length if length else 0.0)
        return found

    def over(self, norms: Sequence[float], sizes: Sequence[float]) -> list[list[float]]:
        """Current vectors, begun with ``sizes``, as combinations of the long vectors, which have ``norms``."""
        table = [
            [size * a / norm if alive else 0.0 for a, norm, alive in zip(row, norms, self.alive, strict=True)]
            for size, row in zip(sizes, self.rows, strict=True)
        ]
        for i, alive in enumerate(self.alive):
            if not alive:  # kept still
                table[i][i] = sizes[i] / norms[i] if norms[i] > 0 else 1.0
        return table


def product(a: Rows, b: Rows) -> list[list[float]]:
    """Product of two small matrices on the host."""
    columns = list(zip(*b, strict=True))
    return [[sum(x * y for x, y in zip(row, column, strict=True)) for column in columns] for row in a]
