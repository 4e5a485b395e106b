"""Global-norm clipping as a transform, so that its place among other transforms can be written down."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from pullback.core.checks import choice, positive
from pullback.core.kinds.transform import StepBatch, Transform
from pullback.core.norms import by_mesh, total_norm


@final
class ClipGradNorm(Transform):
    """Scale all gradients down together when their joint norm exceeds ``max_norm``.

    The same arithmetic as :func:`torch.nn.utils.clip_grad_norm_`: gradients are multiplied by
    ``min(1, max_norm / (norm + 1e-6))``. Nothing is read by the host. Sharded gradients have the norm of all shards;
    sparse (COO) gradients that of their coalesced entries.

    Args:
        max_norm: largest joint norm that is left alone, in the unit of the gradient; ``inf`` never clips.
        norm_type: 2 for the Euclidean norm, ``inf`` for the largest entry.

    Raises:
        ValueError: if ``max_norm`` is not positive or ``norm_type`` is neither 2 nor inf.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> ClipGradNorm(1.0).update_([weight])
        >>> weight.grad.norm().round(decimals=4)
        tensor(1.)
    """

    def __init__(self, max_norm: float, *, norm_type: float = 2.0) -> None:
        unlimited = isinstance(max_norm, float) and max_norm == math.inf
        self.max_norm = (
            math.inf if unlimited else positive("max_norm", max_norm, fix="Use inf to never clip.")
        )
        order = float(norm_type) if isinstance(norm_type, int) else norm_type
        self.norm_type = choice("norm_type", order, (2.0, math.inf))

    def pre_step_(self, batch: StepBatch) -> None:
        """Clip the gradients of this step."""
        if self.max_norm == math.inf:
            return
        grads = [grad for grad in batch.grads if grad.numel()]
        if not grads:
            return
        norm = total_norm([_values(grad) for grad in grads], self.norm_type)
        if len(by_mesh(grads)) == 1:
            torch.nn.utils.clip_grads_with_norm_(batch.params, self.max_norm, norm)
            return
        factor = torch.clamp(self.max_norm / (norm + 1e-6), max=1.0)  # as torch does, which takes no mixture
        for grad in grads:
            to_local = getattr(grad, "to_local", None)  # a DTensor's shard shares its memory
            local = grad if to_local is None else to_local()
            local.mul_(factor.to(local.device))

    def __repr__(self) -> str:
        return f"ClipGradNorm(max_norm={self.max_norm:g}, norm_type={self.norm_type:g})"


def _values(grad: Tensor) -> Tensor:
    """The entries of a gradient; those of a sparse one with repeated rows added up."""
    return grad.coalesce().values() if grad.layout is torch.sparse_coo else grad
