"""Singular values of many matrices at once, also of products that are never formed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Route: TypeAlias = Literal["auto", "dense", "low_rank"]

_MOST_ENTRIES = 2**24  # of one stacked call: 64 MB in float32
_STEP = 8  # numbers of rows are rounded up to a multiple, so that equal shapes meet in one call


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least: no SVD is made for half precision, and small differences would be lost."""
    return tensor if tensor.dtype in {torch.float32, torch.float64} else tensor.float()


def singular_values(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Singular values of stacks of matrices; all of equal shape go through one call.

    Args:
        matrices: tensors [S, m, n] of any real floating dtype.

    Returns:
        For each a tensor [S, min(m, n)], descending, in float32 or float64; NaN where a matrix is not finite.
    """
    return _in_batches(_safe_values, [wide(each) for each in matrices])


def product_values(pairs: Sequence[tuple[Tensor, Tensor]], *, route: Route = "auto") -> list[Tensor]:
    """Singular values of ``errors^T inputs``, the gradient of a linear layer, sample by sample.

    Rows whose errors are all exactly zero add nothing and are left out. With fewer rows T than either width, the
    product is not formed: with thin QR decompositions of both transposes, ``inputs^T = Q_a R_a`` and ``errors^T = Q_b
    R_b``, the values are those of the T x T core ``R_b R_a^T``. That is exact: orthogonal factors change no singular
    value, and, unlike eigenvalues of Gram matrices, nothing is squared. (Gram matrices in float64 were measured too: as
    accurate, but at 128 rows of 576 entries slower, 8.5 against 5.3 ms for the four projections of a layer, because
    float64 products cost more than float32 Householder steps.)

    Args:
        pairs: inputs [S, T, n] and errors [S, T, m]. Inputs that several pairs share, as one object, are
            decomposed once.
        route: ``"auto"`` as above, ``"dense"`` forms every product, ``"low_rank"`` none.

    Returns:
        For each pair a tensor [S, r] with r <= min(m, n), descending, in float32 or float64; values beyond r are zero.
        NaN where the product is not finite.

    One read of the host per call: how many rows have errors.
    """
    counted = _count(pairs)
    found: dict[int, Tensor] = {}
    cores: dict[int, tuple[tuple[int, int], int]] = {}
    rows: dict[tuple[int, int], Tensor] = {}  # reduced inputs by (inputs, mask)
    left: list[tuple[tuple[int, int], Tensor]] = []
    right: dict[int, Tensor] = {}
    products: dict[int, Tensor] = {}
    for index, (x, errors) in enumerate(pairs):
        most, mask, used = counted[index]
        if most == 0:
            found[index] = wide(errors).new_zeros(len(errors), 1)
            continue
        key = (id(x), mask)
        order = _order(used, most)
        if key not in rows:
            rows[key] = _taken(wide(x), order, used)
        taken = _taken(wide(errors), order, None)
        width = taken.shape[1]
        if route == "low_rank" or (route == "auto" and width < min(x.shape[2], errors.shape[2])):
            right[index] = taken
            cores[index] = (key, width)
        else:
            products[index] = taken.mT @ rows[key]
    wanted = {key for key, _ in cores.values()}
    left = [(key, rows[key]) for key in rows if key in wanted]
    factors = _in_batches(_triangle, [each for _, each in left] + list(right.values()))
    of_inputs = {key: factor for (key, _), factor in zip(left, factors, strict=False)}
    of_errors = dict(zip(right, factors[len(left) :], strict=True))
    for index, (key, _) in cores.items():
        products[index] = of_errors[index] @ of_inputs[key].mT
    found |= dict(zip(products, singular_values(list(products.values())), strict=True))
    return [found[index] for index in range(len(pairs))]


def product_cosine(
    first: tuple[Tensor | None, Tensor], second: tuple[Tensor | None, Tensor], norm: Tensor, other: Tensor
) -> Tensor | None:
    """Cosine between two gradients as flat vectors, sample by sample, without forming them where factors are known.

    ``<B^T A, D^T C> = sum (B D^T) * (A C^T)``: two products over the widths instead of a gradient each.

    Args:
        first: inputs [S, T, n] and errors [S, T, m], or None and the gradient [S, m, n].
        second: the same, with any number of rows.
        norm: Frobenius norm of the first [S].
        other: Frobenius norm of the second [S].

    Returns:
        [S], 0 where a gradient is zero; None if the shapes differ or only one of the two has factors.
    """
    (a, b), (c, d) = first, second
    if (a is None) != (c is None):
        return None
    b, by = _scaled(b)
    d, dy = _scaled(d)
    if a is None or c is None:
        if b.shape != d.shape:
            return None
        inner = (b * d).flatten(1).sum(1)
    else:
        if a.shape[2] != c.shape[2] or b.shape[2] != d.shape[2]:
            return None
        inner = ((b @ d.to(b.device).mT) * (wide(a) @ wide(c).to(a.device).mT)).flatten(1).sum(1)
    length = norm * other
    cosine = inner.to(norm) * by.to(norm) * dy.to(norm) / torch.where(length == 0, 1.0, length)
    return torch.where(length == 0, 0.0, cosine)


def _scaled(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The tensor over its largest entry, so that products of tiny ones do not vanish, and that entry [S]."""
    tensor = wide(tensor)
    largest = tensor.flatten(1).abs().amax(1)
    return tensor / torch.where(largest == 0, 1.0, largest)[:, None, None], largest


_Counted: TypeAlias = tuple[int, int, Tensor]  # most rows with errors of a sample, mask's number, mask


def _count(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[_Counted]:
    """Rows with errors of every pair; pairs with one input and equal rows get one mask number."""
    used = [(errors != 0).any(-1) for _, errors in pairs]  # NaN counts as an error
    first: dict[int, int] = {}
    owner = [first.setdefault(id(x), index) for index, (x, _) in enumerate(pairs)]
    told = []
    for index, mask in enumerate(used):
        most = mask.sum(-1).amax()
        same = (mask == used[owner[index]]).all()
        told.append(torch.stack([most, same.to(most.dtype)]))
    read = _host(told)
    return [(most, owner[index] if same else index, used[index]) for index, (most, same) in enumerate(read)]


def _host(rows: list[Tensor]) -> list[list[int]]:
    if not rows:
        return []
    return torch.stack([each.to(rows[0].device) for each in rows]).tolist()


def _order(used: Tensor, most: int) -> Tensor | None:
    """Positions [S, width] with those of errors first, or None where the few others may stay: they add zeros."""
    total = used.shape[1]
    width = min(total, -(-most // _STEP) * _STEP)
    if width == total:
        return None
    return used.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :width]


def _taken(tensor: Tensor, order: Tensor | None, used: Tensor | None) -> Tensor:
    """Rows in that order; with ``used`` those without errors become zero, whatever they held."""
    if order is None:
        return tensor
    rows = tensor.gather(1, order[..., None].expand(-1, -1, tensor.shape[2]))
    if used is None:
        return rows
    return rows.masked_fill(~used.gather(1, order)[..., None], 0.0)


def _triangle(rows: Tensor) -> Tensor:
    """R of the thin QR decomposition of each transpose."""
    return torch.linalg.qr(rows.mT, mode="r").R


def _safe_values(matrices: Tensor) -> Tensor:
    """Singular values; a matrix with NaN or Inf gives NaN instead of an error of the whole batch."""
    bad = ~torch.isfinite(matrices).flatten(1).all(1)
    values = torch.linalg.svdvals(matrices.masked_fill(bad[:, None, None], 0.0))
    return values.masked_fill(bad[:, None], torch.nan)


def _in_batches(act: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """``act`` on stacks of all tensors [S, a, b] that agree in a, b, dtype and device."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, each in enumerate(tensors):
        groups.setdefault((each.shape[1:], each.dtype, each.device), []).append(index)
    found: dict[int, Tensor] = {}
    for members in groups.values():
        for some in _chunks(members, tensors):
            stacked = tensors[some[0]] if len(some) == 1 else torch.cat([tensors[index] for index in some])
            sizes = [len(tensors[index]) for index in some]
            found |= dict(zip(some, act(stacked).split(sizes), strict=True))
    return [found[index] for index in range(len(tensors))]


def _chunks(members: list[int], tensors: Sequence[Tensor]) -> list[list[int]]:
    """Members in groups whose stack stays small."""
    chunks: list[list[int]] = [[]]
    entries = 0
    for index in members:
        size = tensors[index].numel()
        if chunks[-1] and entries + size > _MOST_ENTRIES:
            chunks.append([])
            entries = 0
        chunks[-1].append(index)
        entries += size
    return chunks
