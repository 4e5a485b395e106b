"""Divergence of a field whose rows are independent: exact, or by one probe."""

from __future__ import annotations

import torch
from torch import Tensor


def divergence_of(value: Tensor, x: Tensor, probe: Tensor | None = None) -> Tensor:
    """Tr d value / d x of every row, [batch].

    Args:
        value: the field at ``x``, in its shape [batch, ...], with a graph; a row must not depend on other rows.
        x: the points, which require a gradient.
        probe: a tensor in the shape of ``x`` with mean 0 and covariance I, for Hutchinson's estimate by one
            vector-Jacobian product; without one the trace is exact, by one product for every entry of a row, batched.
    """
    if probe is not None:
        (product,) = torch.autograd.grad(value, x, probe)
        return (product * probe).flatten(1).sum(1)
    size = x[0].numel() if len(x) else 0
    if not size:
        return x.new_zeros(len(x))
    rows = torch.eye(size, dtype=x.dtype, device=x.device).view(size, 1, *x.shape[1:]).expand(size, *x.shape)
    (jacobian,) = torch.autograd.grad(value, x, rows, is_grads_batched=True)
    return jacobian.flatten(2).diagonal(dim1=0, dim2=2).sum(1)
