"""What one optimizer step asks of an attachment besides transforms: hiding gradients, unscaling, nesting."""

from __future__ import annotations

import inspect
import sys
from types import FrameType

import torch
from torch import Tensor


class SetAside:
    """Gradients hidden from the optimizer for one step, so that its step does nothing.

    torch's optimizers leave a parameter without gradient alone: no update, no weight decay, no moment, no
    count. Settings in the groups (some optimizers count there) are put back as well.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
        self._grads = [(param, param.grad) for param in params]
        self._settings = [
            (group, key, value, value.clone() if isinstance(value, Tensor) else None)
            for group in optimizer.param_groups
            for key, value in group.items()
            if key != "params"
        ]
        for param in params:
            param.grad = None

    def restore(self) -> None:
        """Give the parameters their gradients back, and the groups their settings."""
        for param, grad in self._grads:
            param.grad = grad
        with torch.no_grad():
            for group, key, value, copy in self._settings:
                group[key] = value if copy is None else value.copy_(copy)


def overflowed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``GradScaler`` found an overflow and a fused kernel is about to leave this step out."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def unscale(optimizer: torch.optim.Optimizer, grads: list[Tensor]) -> None:
    """Take over the unscaling that ``GradScaler`` left to a fused kernel."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    inverse = scale.double().reciprocal().float()  # as GradScaler.unscale_ does
    for grad in grads:
        grad.mul_(inverse.to(grad.device))
    vars(optimizer)["grad_scale"] = None  # to GradScaler and the kernel: unscaled already


def steps_on_stack(optimizer: torch.optim.Optimizer) -> int:
    """How many calls of this optimizer's step are under way: 2 inside a subclass's ``super().step()``."""
    count = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_qualname.startswith("Optimizer.profile_hook_step."):
            count += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return count


def inside_line_search() -> bool:
    """Whether the closure of ``LBFGS`` is under way, which that optimizer evaluates several times per step."""
    code = inspect.unwrap(torch.optim.LBFGS.step).__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False


def check_optimizer(optimizer: object) -> None:
    """Refuse what transforms cannot attach to.

    Raises:
        TypeError: if it is no torch optimizer, is ``LBFGS``, or is a wrapper without step hooks.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}. "
            "Pass the torch optimizer that the wrapper holds."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "optimizer must evaluate its closure once per step, got LBFGS, whose line search compares "
            "gradients of "
            "several evaluations. Call transform.update_(params) inside the closure, or use another "
            "optimizer."
        )
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise TypeError(
            f"optimizer must have torch's step hooks, got the wrapper {type(optimizer).__name__} without "
            "them. "
            "Pass the torch optimizer that it holds."
        )
