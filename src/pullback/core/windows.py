"""What a convolution's kernel sees: a view of all its windows, for any number of dimensions, padding and dilation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def sliding_windows(
    x: Tensor,
    kernel: Sequence[int],
    *,
    stride: Sequence[int],
    dilation: Sequence[int],
    pads: Sequence[tuple[int, int]],
    mode: str = "zeros",
) -> Tensor:
    """A view [N, C, *out, *kernel] of the windows of ``x`` [N, C, *spatial]; only the padding makes a copy.

    Args:
        x: input of the convolution, with a batch dimension.
        kernel: size of the kernel by spatial dimension.
        stride: by spatial dimension.
        dilation: by spatial dimension.
        pads: padding before and after, by spatial dimension.
        mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
    """
    if any(map(any, pads)):
        flat = [pad for both in reversed(pads) for pad in both]  # torch begins at the last dimension
        x = F.pad(x, flat, mode="constant" if mode == "zeros" else mode)
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    for position, (extent, step) in enumerate(zip(extents, stride, strict=True)):
        x = x.unfold(2 + position, extent, step)
    dilated: tuple[Any, ...] = tuple(slice(None, None, d) for d in dilation)
    return x[(..., *dilated)]


def padding_of(layer: Any) -> tuple[tuple[int, int], ...]:
    """Padding before and after, by spatial dimension, of a convolution module of torch."""
    if layer.padding == "same":
        spans = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        return tuple((span // 2, span - span // 2) for span in spans)  # the odd one goes behind, as in torch
    if layer.padding == "valid":
        return tuple((0, 0) for _ in layer.kernel_size)
    return tuple((pad, pad) for pad in layer.padding)
