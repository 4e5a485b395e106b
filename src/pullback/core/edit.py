"""The identity whose backward pass edits the gradient: the one place where a learning signal is altered per use.

Put it on an activation and everything before it learns from the edited gradient; put it on a weight, in front of
the layer's own kernel, and only that weight does, while the layer's other gradients stay as they are::

    y = F.conv2d(x, edit_gradient(weight, edit, x, lam), bias)

Such an edit acts on every use of the weight by itself (every micro-batch, every call of a shared layer).
`edit_arriving` edits once, at the leaf, what all uses of one backward pass together brought there; the two agree
for edits that are linear and the same at every use, such as a fixed mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pullback.core.checks import instance

Edit: TypeAlias = Callable[..., Tensor]
"""``edit(grad, *context) -> grad`` of the same shape; a new tensor, and differentiable where double backward is."""


class _Edited(torch.autograd.Function):
    """Identity forwards, ``edit`` backwards; keeps nothing but the context."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, edit: Edit, *context: Tensor) -> Tensor:  # noqa: ARG004
        # A view, not x itself: returned unchanged, the input would be aliased by the output.
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        _, ctx.edit, *context = inputs
        ctx.save_for_backward(*context)
        ctx.others = len(context)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        back = ctx.edit(grad, *ctx.saved_tensors)  # autograd casts it to the dtype of x
        return back, None, *(None,) * ctx.others


def edit_gradient(x: Tensor, edit: Edit, *context: Tensor) -> Tensor:
    """Return ``x``; the gradient that comes back through this use of it is ``edit(grad, *context)``.

    The edit runs in the backward pass only, so that nothing is paid under ``no_grad`` and in evaluation. It may be
    differentiated (``create_graph=True``) when it is made of differentiable operations, with respect to the context
    as well; in an ordinary backward pass the context gets no gradient. ``torch.autograd.grad`` with respect to
    ``x``, ``torch.func`` and ``torch.compile`` see an ordinary function of explicit inputs.

    Args:
        x: any floating tensor; an activation or a parameter.
        edit: ``edit(grad, *context)``, a plain function or a ``functools.partial`` of one; its result has the shape
            of ``grad`` and is cast to the dtype of ``grad``.
        context: tensors that the edit needs. They are kept until backward, and nothing else is; editing one in
            place before then is an error that autograd reports.

    Returns:
        A view of ``x``, of the same shape and dtype.
    """
    return _Edited.apply(x, edit, *context)


def edit_arriving(leaf: Tensor, edit: Edit, *context: Tensor) -> RemovableHandle:
    """Edit the gradient that arrives at a leaf in each backward pass, before it is accumulated into ``leaf.grad``.

    The edit sees the sum over all uses of the leaf in that backward pass; what ``leaf.grad`` already holds is left
    alone. ``torch.autograd.grad(loss, leaf)`` gives the edited gradient as well. Under DistributedDataParallel it
    sees the gradient of its own rank, so only linear edits that are equal on all ranks commute with the averaging.

    Args:
        leaf: a leaf tensor that requires a gradient, such as a parameter.
        edit: ``edit(grad, *context)``; its result has the shape of ``grad`` and is cast to the dtype of ``grad``.
        context: tensors that the edit needs, read at the time of the backward pass.

    Returns:
        A handle; ``handle.remove()`` restores the plain gradient.

    Raises:
        TypeError: if ``leaf`` is no tensor.
        ValueError: if ``leaf`` is no leaf or requires no gradient.
    """
    leaf = instance("leaf", leaf, Tensor, fix="Pass the parameter itself.")
    if not leaf.is_leaf:
        raise ValueError(
            f"leaf must be a leaf of the graph, got the result of {type(leaf.grad_fn).__name__}. "
            "Pass the parameter itself, or use edit_gradient on the tensor."
        )
    if not leaf.requires_grad:
        raise ValueError(
            "leaf must require a gradient, got requires_grad=False. Unfreeze it first, or leave it alone."
        )
    return leaf.register_hook(lambda grad: edit(grad, *context).to(grad.dtype))
