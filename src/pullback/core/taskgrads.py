"""Gradients of several losses with respect to the same parameters, beside the user's own backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pullback.core.checks import floating


def scalar_loss(name: str, value: object) -> Tensor:
    """Check that ``value`` is a scalar with a graph.

    Args:
        name: argument name for the message.
        value: the loss.

    Returns:
        The loss, untouched.

    Raises:
        TypeError: if it is no floating tensor.
        ValueError: if it has dimensions or no graph.
    """
    tensor = floating(name, value, shape=(), fix="Reduce it with .mean().")
    if not tensor.requires_grad:
        raise ValueError(
            f"{name} must have a graph, got a tensor without one. Compute it outside torch.no_grad() and do not "
            "detach() it; call the monitor before the backward pass."
        )
    return tensor


def factors_in(losses: Sequence[Tensor], tasks: Sequence[str], total: Tensor) -> list[Tensor | None]:
    """Derivatives of the total with respect to the losses: a look at the few nodes between them.

    Args:
        losses: scalars, none computed from another.
        tasks: their names, for messages.
        total: scalar computed from them.

    Returns:
        One 0-dim tensor per loss.

    Raises:
        ValueError: if a loss occurs twice, or is no part of the total.
    """
    if len({id(loss) for loss in losses}) < len(losses):
        raise ValueError(
            "losses must be different tensors, got the same one twice. Give each task a loss of its own."
        )
    found = torch.autograd.grad(total, losses, retain_graph=True, allow_unused=True)
    for task, factor in zip(tasks, found, strict=True):
        if factor is None:
            raise ValueError(
                f"losses[{task!r}] must be a part of total, got one that total was not computed from. Sum these very "
                "tensors, or call the monitor without total to watch a task that is not trained."
            )
    return [factor.detach() for factor in found]


def task_gradients(
    losses: Sequence[Tensor], factors: Sequence[Tensor | None], params: Sequence[Tensor]
) -> list[list[Tensor | None]]:
    """One backward pass per loss to ``params``; ``.grad``, global generators and the graph stay as they are.

    Args:
        losses: scalars with a graph.
        factors: what each pass begins with, 0-dim; ``None`` is 1.
        params: leaves that require gradients.

    Returns:
        ``gradients[loss][param]``; ``None`` where a loss does not reach a parameter.

    Raises:
        RuntimeError: if a compiled model gave away the buffers that a second pass needs.
    """
    devices = {param.device.index for param in params if param.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):  # backward passes may draw, as in checkpoints
        return [_gradient(loss, factor, params) for loss, factor in zip(losses, factors, strict=True)]


def _gradient(loss: Tensor, factor: Tensor | None, params: Sequence[Tensor]) -> list[Tensor | None]:
    try:
        found = torch.autograd.grad(loss, params, grad_outputs=factor, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "donated buffer" not in str(error):
            raise
        raise RuntimeError(
            "the compiled model must let its graph be used twice, got one whose backward pass was compiled to give its "
            "buffers away. Set torch._functorch.config.donated_buffer = False before the first backward pass."
        ) from error
    return list(found)


def count_present(gradients: Sequence[Tensor | None]) -> int:
    """How many of them are gradients."""
    return sum(gradient is not None for gradient in gradients)


def shares(rows: Sequence[Sequence[Tensor | None]]) -> bool:
    """Whether some parameter has a gradient from two tasks; a host's question, no value is read."""
    return any(count_present(column) > 1 for column in zip(*rows, strict=True))


def ranks() -> int:
    """Number of processes that train together."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1
