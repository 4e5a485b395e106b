"""Does a loss depend on the scale of some parameters? Measured on the parameters themselves, which stay as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_SCALE = 3.0  # by how much the parameters are scaled


def scale_deviation(name: str, tensors: Sequence[Tensor], loss: Callable[[], Tensor]) -> float:
    """How far a loss is from being invariant under a joint scaling of some of its parameters.

    Where f(c theta) = f(theta) for all c > 0, the gradient is orthogonal to theta, and grad f(c theta) is that at theta
    over c. The deviation is the larger of the cosine between theta and gradient, and of the relative error of the
    second equation at c = 3. Takes two backward passes; both draw the same random numbers, and parameters, their
    ``.grad`` and the states of the generators of CPU and CUDA are the same afterwards.

    Args:
        name: of the parameters, for the message.
        tensors: parameters that require a gradient.
        loss: computes the loss, a scalar, from them.

    Returns:
        0 for an invariant loss, up to rounding; of order 1 for others.

    Raises:
        RuntimeError: if the gradient is zero, not finite or missing.
    """
    first = _gradient(name, tensors, loss)
    theta = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])
    values = [tensor.detach().clone() for tensor in tensors]
    try:
        with torch.no_grad():
            torch._foreach_mul_(list(tensors), _SCALE)
        scaled = _gradient(name, tensors, loss)
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
    size = float(first.norm())
    radial = abs(float(theta @ first)) / (float(theta.norm()) * size)
    return max(radial, float((_SCALE * scaled - first).norm()) / size)


def _gradient(name: str, tensors: Sequence[Tensor], loss: Callable[[], Tensor]) -> Tensor:
    """The gradient as one float64 vector."""
    devices = {t.device.index for t in tensors if t.device.type == "cuda" and t.device.index is not None}
    with torch.random.fork_rng(devices=sorted(devices)), torch.enable_grad():
        grads = torch.autograd.grad(loss(), list(tensors), allow_unused=True)
    flat = [torch.zeros_like(t) if g is None else g.detach() for g, t in zip(grads, tensors, strict=True)]
    found = torch.cat([each.reshape(-1).double() for each in flat])
    size = float(found.norm())
    if not 0 < size < math.inf:
        raise RuntimeError(
            f"the gradient of {name} must be finite and not zero, got norm {size:g}. Let the loss use these "
            "parameters, on a batch that reaches them."
        )
    return found
