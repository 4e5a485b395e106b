"""The damped input covariance of a layer: summed over chunks, never from all patches at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pullback.core.windows import sliding_windows

CHUNK = 2**19
"""Entries of the patch matrix that are held at a time (2 MB in float32); more changes neither speed nor result."""


@dataclass(frozen=True)
class Rows:
    """Inputs of a linear map: every leading index is a sample.

    Args:
        width: n, entries of one sample.
    """

    width: int
    groups: int = 1

    def count(self, x: Tensor) -> int:
        """Number b of samples in ``x`` [..., n]."""
        return x.numel() // self.width

    def blocks(self, x: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        """Samples of ``x`` [..., n] as columns, in blocks [1, n, r] of ``dtype``."""
        for part in x.reshape(-1, self.width).split(max(1, CHUNK // self.width)):
            yield part.to(dtype).mT.unsqueeze(0)


@dataclass(frozen=True)
class Patches:
    """Inputs of a convolution: every patch that the kernel sees is a sample.

    Args:
        channels: of the input.
        groups: of the convolution; each has samples of its own channels.
        kernel: size of the kernel by spatial dimension.
        stride: by spatial dimension.
        dilation: by spatial dimension.
        pads: padding before and after, by spatial dimension.
        mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
    """

    channels: int
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    mode: str

    @property
    def width(self) -> int:
        """n, entries of one sample of one group."""
        return self.channels // self.groups * math.prod(self.kernel)

    def out(self, x: Tensor) -> tuple[int, ...]:
        """Spatial size of the convolution's output."""
        sizes = zip(x.shape[-len(self.kernel) :], self.pads, self._extents(), self.stride, strict=True)
        return tuple((size + sum(pads) - extent) // stride + 1 for size, pads, extent, stride in sizes)

    def _extents(self) -> tuple[int, ...]:
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    def count(self, x: Tensor) -> int:
        """Number b of patches of one group in ``x`` [(N,) C, *spatial]."""
        batch = 1 if x.dim() == len(self.kernel) + 1 else x.shape[0]
        return batch * math.prod(self.out(x))

    def blocks(self, x: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        """Patches of ``x`` [(N,) C, *spatial] as columns, in blocks [groups, n, r] of ``dtype``."""
        if x.dim() == len(self.kernel) + 1:
            x = x.unsqueeze(0)
        out = self.out(x)
        sample = self.groups * self.width * math.prod(out)  # patch entries of one sample
        pieces = min(out[0], -(-sample // CHUNK))  # of one sample, along its first spatial dimension
        for part in x.split(max(1, CHUNK // sample)):
            windows = self._windows(part.to(dtype))
            for block in windows.tensor_split(pieces, dim=2):
                yield self._columns(block)

    def _windows(self, x: Tensor) -> Tensor:
        """A view [N, C, *out, *kernel] of the padded ``x`` [N, C, *spatial]."""
        return sliding_windows(
            x, self.kernel, stride=self.stride, dilation=self.dilation, pads=self.pads, mode=self.mode
        )

    def _columns(self, windows: Tensor) -> Tensor:
        """The one copy: [N, C, *out, *kernel] to [groups, n, N * prod(out)], long runs innermost."""
        spatial = len(self.kernel)
        out = range(3, 3 + spatial)
        kernel = range(3 + spatial, 3 + 2 * spatial)
        grouped = windows.unflatten(1, (self.groups, self.channels // self.groups))
        return grouped.permute(1, 2, *kernel, 0, *out).reshape(self.groups, self.width, -1)


Samples = Rows | Patches


def moments(x: Tensor, samples: Samples, dtype: torch.dtype) -> Tensor:
    """Sums over samples of the outer products of their entries, [groups, n, n] (X^T X of each group)."""
    total: Tensor | None = None
    for block in samples.blocks(x, dtype):
        total = block @ block.mT if total is None else torch.baddbmm(total, block, block.mT)
        del block  # or it would live until the next one is there
    if total is None:
        return x.new_zeros((samples.groups, samples.width, samples.width), dtype=dtype)
    return total


def damped_factor(matrix: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    r"""Cholesky factor of ``matrix + lam I`` and the damping that was used.

    The damping is ``lam``, but at least 16 rounding errors of the trace: less would be lost in the sum, and the
    factorisation could fail; with that much the result is right to a few per cent even for a matrix of rank one. A
    matrix with NaN or Inf gives NaN throughout instead of an error, so that nothing is read back from the device and
    the caller's own policy meets a gradient that is plainly not finite.

    Args:
        matrix: symmetric positive semi-definite, [..., k, k].
        lam: 0-dim, > 0.

    Returns:
        The lower factor [..., k, k] and the damping [..., 1, 1].
    """
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    floor = 16 * torch.finfo(matrix.dtype).eps * trace
    damping = torch.maximum(lam.to(matrix.dtype), floor)[..., None, None]  # NaN where the trace is
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.cholesky_ex(matrix + damping * eye).L, damping  # an infinite damping times 0 is NaN


def precondition(
    grad: Tensor, x: Tensor, lam: Tensor, *, samples: Samples, process_group: Any = None
) -> Tensor:
    r"""``grad C^-1`` with the damped input covariance :math:`C = X^T X / b + \lambda I` (paper eq. 9).

    With fewer samples than entries (b < n) the same is computed from the b x b Gram matrix by the Woodbury identity;
    the samples are then smaller than C and are held whole. All in float32, or float64 where a float64 tensor comes in.

    Args:
        grad: gradient of the weight, [m, ...] with n entries in a row; groups are consecutive blocks of rows.
        x: input of the layer.
        lam: 0-dim damping, > 0.
        samples: how ``x`` is read.
        process_group: group over whose processes the covariance is averaged, or None.

    Returns:
        The preconditioned gradient, of the shape of ``grad``, in the computation's dtype.
    """
    if grad.numel() == 0:
        return grad
    wide = torch.float64 if torch.float64 in {grad.dtype, x.dtype} else torch.float32
    count = samples.count(x)
    with torch.autocast(grad.device.type, enabled=False):
        rows = grad.to(wide).reshape(samples.groups, -1, samples.width)
        if process_group is not None:
            mean = _mean_over_ranks(moments(x, samples, wide), count, process_group)
            return _solve(rows, damped_factor(mean, lam)[0]).reshape(grad.shape)
        if count == 0:
            return grad  # nothing was seen: zeros
        if count >= samples.width:
            return _solve(rows, damped_factor(moments(x, samples, wide) / count, lam)[0]).reshape(grad.shape)
        columns = torch.cat(list(samples.blocks(x, wide)), dim=-1)  # [groups, n, b]
        factor, damping = damped_factor(columns.mT @ columns / count, lam)
        inner = _solve(rows @ columns / count, factor)
        return ((rows - inner @ columns.mT) / damping).reshape(grad.shape)


def _solve(rows: Tensor, factor: Tensor) -> Tensor:
    """``rows (L L^T)^-1``."""
    return torch.cholesky_solve(rows.mT, factor).mT


def _mean_over_ranks(total: Tensor, count: int, process_group: Any) -> Tensor:
    """Sums and counts of all ranks in one reduction: unequal and empty shares weigh what they hold."""
    if total.requires_grad:
        raise RuntimeError(
            "process_group must be None where the backward pass is differentiated with respect to the layer's input, "
            "got a group: reductions have no derivative. Detach the input, or average the covariance nowhere."
        )
    packed = torch.cat([total.reshape(-1), total.new_tensor([float(count)])])
    torch.distributed.all_reduce(packed, group=process_group)
    return packed[:-1].reshape(total.shape) / packed[-1].clamp_min(1.0)
