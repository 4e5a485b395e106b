"""Add Gaussian noise to many gradients at once: one flat stream, cut into chunks, added through views.

All gradients on one device are treated as one long vector. Its noise is drawn chunk by chunk into a small
buffer, so that 200 tensors cost about as much as one ``torch.randn`` of their total size, and memory stays
bounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from pullback.core.checks import non_negative
from pullback.core.parameters import named_parameters

CHUNK = 1 << 18
"""Entries drawn at a time; a multiple of 16, so that chunks join to what one call would draw on a CPU."""

Bucket: TypeAlias = tuple[torch.device, torch.dtype, tuple[int, ...]]
"""What shares one stream: device, dtype of the draw, and the place of the shard in its device mesh."""

Piece: TypeAlias = tuple[Tensor, float | Tensor, int, int]
"""Flat entries of a gradient within one chunk, their std, and where their noise starts and stops in it."""

_HALF = math.sqrt(0.5)


class Target(NamedTuple):
    """Real entries of one gradient that get noise.

    Args:
        entries: a real view of the gradient (edited in place), any shape and stride.
        std: standard deviation of the noise of one real entry.
        index: position of the parameter among all parameters.
        size: number of real entries.
    """

    entries: Tensor
    std: float | Tensor
    index: int
    size: int


# --- what gets noise ----------------------------------------


def _shard(grad: Tensor, name: str) -> tuple[Tensor, tuple[int, ...]]:
    """The local part of a DTensor and its place among the shards; replicas share a place, hence the noise."""
    if not hasattr(grad, "placements"):
        return grad, ()
    sharded: Any = grad  # a DTensor, whose module is too slow to import for a type test
    placements = sharded.placements
    if any(placement.is_partial() for placement in placements):
        raise RuntimeError(
            f"gradient of {name} must be sharded or replicated, got {tuple(placements)}. "
            "Reduce it over its mesh (grad.redistribute) before noise is added."
        )
    coordinate = sharded.device_mesh.get_coordinate()
    place = tuple(c for c, placement in zip(coordinate, placements, strict=True) if placement.is_shard())
    return sharded.to_local(), place


def _stored(grad: Tensor, name: str) -> Tensor:
    """The coalesced values of a sparse (COO) gradient."""
    if grad.layout is not torch.sparse_coo:
        raise TypeError(
            f"gradient of {name} must be dense or sparse COO, got {grad.layout}. "
            "Convert it with .to_sparse_coo() or exclude the parameter."
        )
    if not grad.is_coalesced():  # a repeated row is one entry and gets one draw
        grad.copy_(grad.coalesce())
    return grad._values()


def buckets(
    grads: Sequence[Tensor], stds: Sequence[float | Tensor], names: Sequence[str], indices: Sequence[int]
) -> dict[Bucket, list[Target]]:
    """Sort gradients by the stream that serves them; empty ones and those with zero std are left out."""
    found: dict[Bucket, list[Target]] = {}
    for grad, std, name, index in zip(grads, stds, names, indices, strict=True):
        if isinstance(std, float) and std == 0.0:
            continue
        local, place = (grad, ()) if type(grad) is Tensor else _shard(grad, name)
        entries = local if local.layout is torch.strided else _stored(local, name)
        if entries.dtype.is_complex:  # real and imaginary part share the variance
            entries, std = torch.view_as_real(entries), std * _HALF
        size = entries.numel()
        if size == 0:
            continue
        drawn = torch.float64 if entries.dtype is torch.float64 else torch.float32
        found.setdefault((entries.device, drawn, place), []).append(Target(entries, std, index, size))
    return found


# --- drawing and adding ----------------------------------------


def _pieces(targets: Sequence[Target], chunk: int) -> Iterator[list[Piece]]:
    """Cut the flat stream at multiples of ``chunk``: one list per chunk."""
    row: list[Piece] = []
    filled = 0
    for entries, std, _, size in targets:
        flat = entries if entries.dim() == 1 else entries.view(-1)
        done = 0
        while done < size:
            take = min(chunk - filled, size - done)
            piece = flat if take == size else flat[done : done + take]
            row.append((piece, std, filled, filled + take))
            filled, done = filled + take, done + take
            if filled == chunk:
                yield row
                row, filled = [], 0
    if row:
        yield row


def _draw_(buffer: Tensor, row: list[Piece], generator: torch.Generator | None) -> None:
    """Fill ``buffer`` with the noise of one chunk; runs of equal std are scaled in one call."""
    runs: list[tuple[int, float | Tensor]] = []
    last: float | Tensor | None = None
    for _, std, start, _ in row:
        if std is not last and (last is None or isinstance(std, Tensor) or std != last):
            runs.append((start, std))
            last = std
    if len(runs) == 1 and isinstance(last, float):
        buffer.normal_(std=last, generator=generator)
        return
    buffer.normal_(generator=generator)
    for (start, std), (stop, _) in zip(runs, [*runs[1:], (len(buffer), 0.0)], strict=True):
        buffer[start:stop].mul_(std)


def add_to_bucket_(
    targets: Sequence[Target],
    drawn: torch.dtype,
    generator: torch.Generator | None,
    *,
    foreach: bool = True,
    chunk: int = CHUNK,
    norm: bool = False,
) -> Tensor | None:
    """Add noise to the targets of one bucket, in place.

    Args:
        targets: what gets noise, all on one device.
        drawn: dtype of the draw; the sum is rounded once to the gradient's own dtype.
        generator: where the numbers come from; ``None`` is torch's global generator.
        foreach: add all pieces of a chunk in one call, or one by one (bitwise the same).
        chunk: entries drawn at a time.
        norm: also return the sum of squares of the noise.

    Returns:
        A 0-dim tensor with the squared norm of the noise, or ``None``.
    """
    plain = [t for t in targets if t.entries.is_contiguous()]
    other = [] if len(plain) == len(targets) else [t for t in targets if not t.entries.is_contiguous()]
    copies = [  # no flat view exists: collect their noise first
        t._replace(entries=torch.zeros(t.entries.shape, dtype=drawn, device=t.entries.device)) for t in other
    ]
    everything = [*plain, *copies]
    device, size = targets[0].entries.device, min(chunk, sum(t.size for t in targets))
    buffer = torch.empty(size, dtype=drawn, device=device)
    total = torch.zeros((), dtype=drawn, device=device) if norm else None
    for row in _pieces(everything, chunk):
        noise = buffer[: row[-1][3]]
        _draw_(noise, row, generator)
        if total is not None:
            total += noise.dot(noise)
        pieces = [piece for piece, _, _, _ in row]
        noises = noise.split([stop - start for _, _, start, stop in row])
        if foreach:
            torch._foreach_add_(pieces, noises)
        else:
            for piece, part in zip(pieces, noises, strict=True):
                piece.add_(part)
    for target, copy in zip(other, copies, strict=True):
        target.entries.add_(copy.entries)
    return total


@torch.no_grad()
def add_gradient_noise_(
    params: nn.Module | Mapping[str, Tensor] | Iterable[Tensor],
    std: float | Tensor,
    generator: torch.Generator | None = None,
) -> None:
    """Add independent N(0, std^2) noise to the gradient of every parameter, in place.

    The plain function behind `GradientNoise`, for loops that keep their own schedule. Call it once per
    optimizer step, after unscaling and clipping. Parameters without a gradient are left out. On several
    ranks pass generators in equal states, otherwise replicas drift apart.

    Args:
        params: a module, a mapping of names, or tensors.
        std: standard deviation (not variance), in the unit of the gradient: a number, or a 0-dim tensor,
            which is not read by the host. Zero changes nothing and draws nothing.
        generator: where the numbers come from, on the gradients' device; ``None`` uses torch's global one.

    Raises:
        ValueError: if ``std`` is a negative or non-finite number.
        TypeError: if a gradient has a layout other than dense or sparse COO.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(3))
        >>> weight.grad = torch.zeros(3)
        >>> add_gradient_noise_([weight], std=0.1, generator=torch.Generator().manual_seed(0))
        >>> weight.grad.count_nonzero()
        tensor(3)
    """
    amount = (
        std if isinstance(std, Tensor) else non_negative("std", std, fix="Use 0 to switch the noise off.")
    )
    tensors = _tensors(params)
    rows = [(name, i, p.grad) for i, (name, p) in enumerate(tensors.items()) if p.grad is not None]
    names, indices, grads = [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]
    for (_, drawn, _), targets in buckets(grads, [amount] * len(grads), names, indices).items():
        add_to_bucket_(targets, drawn, generator)


def _tensors(params: nn.Module | Mapping[str, Tensor] | Iterable[Tensor]) -> dict[str, Tensor]:
    """Names and tensors; tensors of a plain iterable are named by position."""
    if isinstance(params, nn.Module | Mapping):
        return named_parameters(cast(nn.Module, params))
    return named_parameters([(f"param{i}", p) for i, p in enumerate(params)])
