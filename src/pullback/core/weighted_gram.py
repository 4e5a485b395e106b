r"""Gram matrices of the same rows under many weights, damped, and solves with all of them.

With weights :math:`\delta_i^2 / c_i`, where :math:`c_i = E[\delta_i^2]`, these are the Fisher matrices of single units
(Clevert et al. 2016, section 2) up to their scale: :math:`E[\delta^2 a a^T] / c`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

MEMORY = 2**26
"""Bytes of one array of all matrices of a chunk of units on an accelerator; up to four such arrays live at a time."""

_CACHE = 2**20  # the same on the host, where large arrays cost more than small calls
_WORK = 2**18  # entries of weighted rows at a time: they stay in the cache until they are multiplied
_BLOCKS = 2  # of rows of a matrix; its upper triangle is left out but for the blocks on the diagonal


@dataclass(frozen=True)
class Solved:
    """Solutions [k, u, n + 1] in float64, iterations taken and the largest relative residual (0 when direct)."""

    x: Tensor
    iterations: int = 0
    residual: float = 0.0


class SingularError(RuntimeError):
    """A matrix cannot be factorised at this damping."""


@final
class WeightedGrams:
    """Matrices ``G_i = rows^T diag(weights_i) rows / R`` of u units that see the same rows.

    Args:
        rows: what the units see, [R, n].
        weights: of every row and unit, >= 0, [R, u].
        damping: the multiple of the mean of the diagonal that is added to the diagonal.
        bias: append a constant 1 to every row.

    Attributes:
        width: entries of a vector, n + bias.
        absolute: what is added to each diagonal, [u], float64.
    """

    def __init__(self, rows: Tensor, weights: Tensor, *, damping: float, bias: bool = True) -> None:
        self.rows, self.weights, self.bias = rows, weights, bias
        self.width = rows.shape[1] + bias
        size = torch.linalg.vector_norm(rows, dim=1).square().add(float(bias))
        trace = (size @ weights).to(torch.float64) / len(rows)
        self.absolute = damping * trace / self.width

    def solve(self, right: Tensor) -> Solved:
        """Solve ``(G + damping) x = right`` by Cholesky factors in float64.

        With fewer rows than columns the same is solved in the space of the rows (Woodbury), whose Gram matrix is the
        same for all units but for the weights on its two sides.

        Args:
            right: right-hand sides, [k, u, n + bias].

        Raises:
            SingularError: if a matrix is singular (damping 0, or far below a rounding error of the largest eigenvalue).
        """
        by_rows = len(self.rows) < self.width and bool((self.absolute > 0).all())
        side = len(self.rows) if by_rows else self.width
        most = MEMORY if self.rows.is_cuda else _CACHE
        chunk = max(1, most // (8 * side * side))
        space = self._row_space() if by_rows else self._column_space()
        parts = [
            space.solve(weights, damping, each.to(torch.float64).movedim(0, -1))
            for weights, damping, each in zip(
                self.weights.split(chunk, dim=1),
                self.absolute.split(chunk),
                right.split(chunk, dim=1),
                strict=True,
            )
        ]
        return Solved(torch.cat(parts).movedim(-1, 0))

    def _row_space(self) -> _RowSpace:
        rows = self.rows.to(torch.float64)
        return _RowSpace(torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if self.bias else rows)

    def _column_space(self) -> _ColumnSpace:
        mean = self.rows.mean(0)  # any constant will do, but the same one everywhere
        return _ColumnSpace((self.rows - mean).T.contiguous(), mean.to(torch.float64), self.bias)


# --- direct solves --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ColumnSpace:
    """n x n matrices per unit, formed from centred rows.

    A common mean is what makes G ill-conditioned: formed about it, in the rows' own dtype, nothing small is lost beside
    it, and its part is put back in float64.
    """

    centred: Tensor  # [n, R]
    mean: Tensor
    bias: bool

    def matrices(self, weights: Tensor) -> Tensor:
        """``G`` [u, n + bias, n + bias] in float64 of units with ``weights`` [R, u]; the lower triangle counts."""
        n, count = self.centred.shape
        shares = weights.T.contiguous() / count  # [u, R]
        out = self.mean.new_empty(len(shares), n + self.bias, n + self.bias)
        self._covariances(shares.sqrt(), out)
        total = shares.sum(1, keepdim=True).to(
            torch.float64
        )  # 1 up to rounding, which a large mean magnifies
        off = (shares @ self.centred.T).to(torch.float64)  # weighted mean - mean, [u, n]
        last = off + total * self.mean
        left, right = (
            torch.stack([off, self.mean.expand_as(off)], 2),
            torch.stack([self.mean.expand_as(off), last], 1),
        )
        out[:, :n, :n].baddbmm_(left, right)
        if self.bias:
            out[:, n, :n] = last
            out[:, n, n] = total[:, 0]
        return out

    def _covariances(self, roots: Tensor, out: Tensor) -> None:
        """Write weighted means of the centred outer products, a few units at a time, block by block."""
        n, count = self.centred.shape
        some, step = max(1, _WORK // max(1, n * count)), max(1, -(-n // _BLOCKS))
        buffer = self.centred.new_empty(some, n, count)
        for start in range(0, len(roots), some):
            few = roots[start : start + some]
            weighted = torch.mul(self.centred, few.unsqueeze(1), out=buffer[: len(few)])
            for low in range(0, n, step):
                high = min(low + step, n)
                block = torch.bmm(weighted[:, low:high], weighted[:, :high].mT)
                out[start : start + len(few), low:high, :high] = block

    def solve(self, weights: Tensor, damping: Tensor, right: Tensor) -> Tensor:
        """Solutions [u, n + bias, k]."""
        matrices = self.matrices(weights)
        matrices.diagonal(dim1=1, dim2=2).add_(damping[:, None])
        return torch.cholesky_solve(right, _factor(matrices))


@dataclass(frozen=True)
class _RowSpace:
    """R x R matrices per unit: ``G = U U^T`` with U = rows^T sqrt(weights / R)."""

    rows: Tensor

    def solve(self, weights: Tensor, damping: Tensor, right: Tensor) -> Tensor:
        """Solutions [u, n + bias, k] by ``(v - U (damping + U^T U)^-1 U^T v) / damping``."""
        root = (weights.T.to(torch.float64) / len(self.rows)).sqrt()  # [u, R]
        inner = (self.rows @ self.rows.T) * (root.unsqueeze(1) * root.unsqueeze(2))
        inner.diagonal(dim1=1, dim2=2).add_(damping[:, None])
        seen = root.unsqueeze(2) * (self.rows @ right)
        back = self.rows.T @ (root.unsqueeze(2) * torch.cholesky_solve(seen, _factor(inner)))
        return (right - back) / damping[:, None, None]


def _factor(matrices: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrices)
    if bool(info.any()):
        raise SingularError(f"{int(info.count_nonzero())} of {len(info)} matrices of units are singular")
    return factor


# --- conjugate gradients --------------------------------------------------------------------------------------------


def conjugate_gradients(grams: WeightedGrams, right: Tensor, *, tolerance: float, limit: int) -> Solved:
    """Solve ``(G + damping) x = right`` for all units at once, without forming a matrix of any unit.

    A product with all matrices is two matrix products over the rows: G_i v_i = X^T (w_i * (X v_i)). The rows are first
    turned into the eigenvectors of the units' mean matrix, in which the diagonals are a good preconditioner for every
    unit (on networks for digits the original axes need several times the iterations).

    Args:
        grams: the units' matrices; products are taken in the dtype of its rows.
        right: right-hand sides, [k, u, n + bias].
        tolerance: stop when every preconditioned residual is below this part of the first one.
        limit: largest number of iterations.

    Returns:
        Solutions, the number of iterations, and the largest relative residual, computed anew at the end.
    """
    rows, weights = grams.rows, grams.weights.T / len(grams.rows)  # [u, R]
    if grams.bias:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    mean = (rows.T @ (rows * weights.mean(0).unsqueeze(1))).to(torch.float64)
    axes = torch.linalg.eigh(mean).eigenvectors.to(rows.dtype)
    rows = rows @ axes
    damping = grams.absolute.to(rows.dtype)[:, None]
    inverse = (weights @ rows.square() + damping).reciprocal()  # of the diagonals

    def product(v: Tensor) -> Tensor:
        return ((v @ rows.T).mul_(weights) @ rows).add_(v * damping)

    b = right.to(rows.dtype) @ axes
    x, iterations = _iterate(product, inverse, b, tolerance=tolerance, limit=limit)
    left = b - product(x)
    ratio = ((left.square() * inverse).sum(-1) / (b.square() * inverse).sum(-1)).nan_to_num(0.0)
    return Solved((x @ axes.T).to(torch.float64), iterations, float(ratio.max().sqrt()))


def _iterate(
    product: Callable[[Tensor], Tensor], inverse: Tensor, b: Tensor, *, tolerance: float, limit: int
) -> tuple[Tensor, int]:
    """Preconditioned conjugate gradients (Hestenes and Stiefel 1952) on every vector of ``b`` [k, u, n] by itself."""
    x, r = torch.zeros_like(b), b.clone()
    z = inverse * r
    p, size = z.clone(), (r * z).sum(-1, keepdim=True)
    goal = size * tolerance**2
    for iteration in range(limit):
        if bool((size <= goal).all()):  # the one read by the host
            return x, iteration
        q = product(p)
        curvature = (p * q).sum(-1, keepdim=True)
        step = torch.where(curvature > 0, size / curvature, 0.0)  # 0: solved exactly, or nothing to solve
        x.addcmul_(step, p)
        r.addcmul_(step, q, value=-1.0)
        z = inverse * r
        new = (r * z).sum(-1, keepdim=True)
        p = torch.where(size > 0, new / size, 0.0) * p + z
        size = new
    return x, limit
