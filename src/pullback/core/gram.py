"""Inner products of several tasks' gradients, group by group: one pass over the gradients, bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 18
"""Entries per task that are looked at together: the working memory is ``tasks * CHUNK`` float64 numbers."""

_NOISE, _SQUARED_NOISE = 64.0, 8.0
"""Rounding units of gradients, and roots of rounding units of their squares, that a remainder must exceed."""


class _Piece(NamedTuple):
    """Entries ``start`` to ``stop`` of the parameter at ``position``, placed at ``at`` of a chunk."""

    position: int
    start: int
    stop: int
    at: int


@torch.no_grad()
def gram(
    gradients: Sequence[Sequence[Tensor | None]],
    params: Sequence[Tensor],
    group_of: Sequence[int],
    groups: int,
    *,
    names: Sequence[str],
    average: bool = False,
) -> Tensor:
    r"""Gram matrices :math:`\langle g_i, g_j \rangle` of the tasks' gradients in every group of parameters.

    The gradients are copied chunk by chunk into one small float64 buffer ``[tasks, CHUNK]`` and multiplied with
    its transpose: every gradient is read once, whatever the number of pairs, no copy of all parameters is made,
    and products of gradients between 1e-150 and 1e150 neither underflow nor overflow. Nothing is read by the host.

    Args:
        gradients: ``gradients[task][position]``, shaped as ``params[position]``; ``None`` is a zero gradient.
        params: the parameters.
        group_of: number of the group of every parameter, in ``range(groups)``.
        groups: how many groups there are.
        names: names of the parameters, for messages.
        average: take the mean of the gradients over all ranks first (one all-reduce per chunk).

    Returns:
        ``[groups, tasks, tasks]``, float64 (float32 on devices without it), on the device of the first parameter.

    Raises:
        TypeError: if a gradient is sparse.
    """
    home = params[0].device
    dtype = torch.float32 if home.type == "mps" else torch.float64
    tasks = len(gradients)
    total = torch.zeros(groups, tasks, tasks, dtype=dtype, device=home)
    places: dict[tuple[int, torch.device], list[int]] = {}
    for position, param in enumerate(params):
        places.setdefault((group_of[position], param.device), []).append(position)
    for (group, device), positions in places.items():
        flat = [[_flat(row[position], names[position]) for position in positions] for row in gradients]
        sizes = [params[p].numel() * (2 if params[p].is_complex() else 1) for p in positions]
        with _plain_precision(device):
            found = _group(flat, sizes, dtype, device, average)
        total[group] += found.to(home, non_blocking=True)
    return total


@torch.no_grad()
def with_remainder(found: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    r"""Gram matrices of :math:`g_1, \ldots, g_{N-1}, g_N` out of those of :math:`g_1, \ldots, g_{N-1}, c \sum_i g_i`.

    The last row and column follow by bilinearity. In float64 that loses no more than the gradients' own rounding. A
    remainder :math:`g_N` within that rounding, relative to the largest of the given norms, is set to zero.

    Args:
        found: matrices ``[groups, tasks, tasks]`` of `gram` with the scaled sum in the last place.
        scale: the factor c, 0-dim, not zero.
        dtype: the coarsest dtype among the gradients.

    Returns:
        ``[groups, tasks, tasks]``.
    """
    scale = scale.to(found)
    others, crossed, square = found[..., :-1, :-1], found[..., :-1, -1] / scale, found[..., -1, -1] / scale**2
    mixed = torch.empty_like(found)
    mixed[..., :-1, :-1] = others
    mixed[..., -1, :-1] = mixed[..., :-1, -1] = crossed - others.sum(-1)
    mixed[..., -1, -1] = square - 2 * crossed.sum(-1) + others.sum((-1, -2))
    limit = max(_NOISE * torch.finfo(dtype).eps, _SQUARED_NOISE * torch.finfo(found.dtype).eps ** 0.5)
    squares = mixed.diagonal(dim1=-2, dim2=-1)
    largest = torch.maximum(squares[..., :-1].amax(-1), square)
    is_noise = squares[..., -1] <= limit**2 * largest  # false for NaN, which stays
    last = torch.zeros_like(mixed, dtype=torch.bool)
    last[..., -1, :] = last[..., -1] = True
    return torch.where(last & is_noise[..., None, None], 0.0, mixed)


def _plain_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Keep an autocast region of the user's away from the products (float32 is what it would lower)."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def _flat(gradient: Tensor | None, name: str) -> Tensor | None:
    """The real entries of a gradient in logical order, as a view where there is one."""
    if gradient is None:
        return None
    if gradient.layout is not torch.strided:
        raise TypeError(
            f"gradient of {name} must be dense, got layout {gradient.layout}. Leave this parameter out of the groups, "
            "or build its layer with sparse=False."
        )
    return (torch.view_as_real(gradient) if gradient.is_complex() else gradient).reshape(-1)


def _chunks(sizes: Sequence[int]) -> Iterator[list[_Piece]]:
    """Cut parameters of these sizes, laid end to end, at multiples of `CHUNK`."""
    pieces: list[_Piece] = []
    filled = 0
    for position, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + CHUNK - filled)
            pieces.append(_Piece(position, start, stop, filled))
            filled += stop - start
            start = stop
            if filled == CHUNK:
                yield pieces
                pieces, filled = [], 0
    if pieces:
        yield pieces


def _group(
    flat: Sequence[Sequence[Tensor | None]],
    sizes: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    average: bool,
) -> Tensor:
    """Gram matrix of one group on one device."""
    tasks = len(flat)
    found = torch.zeros(tasks, tasks, dtype=dtype, device=device)
    store = torch.empty(tasks * min(CHUNK, sum(sizes)), dtype=dtype, device=device)
    for pieces in _chunks(sizes):
        width = pieces[-1].at + pieces[-1].stop - pieces[-1].start
        block = store[: tasks * width].view(tasks, width)
        _fill(block, flat, pieces)
        if average:
            torch.distributed.all_reduce(block)
            block.div_(torch.distributed.get_world_size())
        found.addmm_(block, block.T)
    return found


def _fill(block: Tensor, flat: Sequence[Sequence[Tensor | None]], pieces: Sequence[_Piece]) -> None:
    """Copy one chunk of all tasks into ``block`` ``[tasks, width]``."""
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for row, gradients in zip(block, flat, strict=True):
        for position, start, stop, at in pieces:
            target, gradient = row[at : at + stop - start], gradients[position]
            if gradient is None:
                target.zero_()
            else:
                targets.append(target)
                sources.append(gradient[start:stop])
    if targets:
        torch._foreach_copy_(targets, sources)
