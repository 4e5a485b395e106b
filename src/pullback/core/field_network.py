"""What models on a path share: the precision of their states, and the call of the user's network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core.checks import floating


def state_of(x: Any) -> Tensor:
    """States in float32 or wider: what is narrower is widened.

    Raises:
        TypeError: if ``x`` is no floating tensor.
    """
    x = floating("x", x, fix="Scale the data and convert them with .float().")
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def data_of(x0: Any) -> Tensor:
    """Data to learn from: `state_of` what must hold one example or more.

    Raises:
        TypeError: if ``x0`` is no floating tensor.
        ValueError: if it is empty, where a mean over the batch would be NaN.
    """
    x0 = state_of(x0)
    if not x0.numel():
        raise ValueError(
            f"x0 must hold one example or more, got shape {tuple(x0.shape)}. Leave empty batches out."
        )
    return x0


def call_network(net: nn.Module, x: Tensor, times: Sequence[Tensor], cond: Mapping[str, Any]) -> Tensor:
    """``net(x, *times, **cond)`` in the network's own precision, answered in that of the state.

    Args:
        net: the user's network; under autocast it gets the state as it is.
        x: states [batch, ...].
        times: each [batch] or 0-dim.
        cond: conditions.

    Returns:
        A tensor of the shape and dtype of ``x``.

    Raises:
        ValueError: if the network returns anything of another shape.
    """
    inside = x
    if not torch.is_autocast_enabled(x.device.type):
        dtype = next((p.dtype for p in net.parameters() if p.is_floating_point()), x.dtype)
        inside, times = x.to(dtype), [time.to(dtype) for time in times]
    value = net(inside, *(time.expand(len(x)) for time in times), **cond)
    if not isinstance(value, Tensor) or value.shape != x.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"net must return a tensor of the states' shape {tuple(x.shape)}, got {got}. Reshape it."
        )
    return value.to(x.dtype)


def per_row(value: Any, size: int) -> bool:
    """Whether a condition has one entry for each of ``size`` rows."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == size
