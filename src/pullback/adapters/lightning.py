"""Transforms in a Lightning ``Trainer``, as a callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pullback.adapters.driver import Driver, only_one
from pullback.adapters.required import required
from pullback.core.checks import NonFinite
from pullback.core.kinds import Transform
from pullback.core.state import StateError


class Hooks:
    """The hooks of a Lightning callback; `transform_callback` joins them to Lightning's own base class."""

    def __init__(self, driver: Driver, before_clipping: bool) -> None:
        super().__init__()
        self.driver = driver
        self.before_clipping = before_clipping

    @property
    def state_key(self) -> str:
        """The name of this callback's state; Lightning refuses two callbacks that share one."""
        names = ", ".join(transform.name for transform in self.driver.transforms)
        return f"pullback.TransformCallback[{names}; before_clipping={self.before_clipping}]"

    def on_train_start(self, trainer: Any, pl_module: torch.nn.Module) -> None:
        """Attach to the trainer's optimizer; gradients are then edited inside its step, after clipping.

        Raises:
            ValueError: if the trainer has several optimizers.
        """
        if self.before_clipping:
            only_one(trainer.optimizers)
        else:
            self.driver.start(trainer.optimizers, pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: torch.nn.Module, optimizer: Any) -> None:
        """Edit the gradients before Lightning clips them, if that order was asked for."""
        if self.before_clipping:
            for transform in self.driver.transforms:
                transform.update_(pl_module, nonfinite=self.driver.nonfinite)

    def on_train_end(self, trainer: Any, pl_module: torch.nn.Module) -> None:
        """Take the hooks off the optimizer."""
        self.driver.stop()

    def on_exception(self, trainer: Any, pl_module: torch.nn.Module, exception: BaseException) -> None:
        """Take the hooks off the optimizer."""
        self.driver.stop()

    def state_dict(self) -> dict[str, Any]:
        """State of the transforms; Lightning keeps it in its checkpoint."""
        if self.before_clipping:
            return {"updates": [transform.state_dict() for transform in self.driver.transforms]}
        return self.driver.state()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state from Lightning's checkpoint, or nothing of it when any part does not fit.

        Raises:
            StateError: if it was saved by a callback with other transforms or another ``before_clipping``.
        """
        if not self.before_clipping:
            self.driver.load(state_dict)
            return
        states = state_dict.get("updates")
        transforms = self.driver.transforms
        if not isinstance(states, list) or len(states) != len(transforms):
            raise StateError(
                f"state must hold {len(transforms)} transforms of a callback with before_clipping=True, got the keys "
                f"{sorted(state_dict)}. Load it into the callback that saved it."
            )
        for transform, state in zip(transforms, states, strict=True):
            transform.check_state_dict(state)
        for transform, state in zip(transforms, states, strict=True):
            transform.load_state_dict(state)


def transform_callback(
    *transforms: Transform, nonfinite: NonFinite = "raise", before_clipping: bool = False
) -> Any:
    """A Lightning callback that runs ``transforms`` in every optimizer step.

    Args:
        *transforms: what to run, in order.
        nonfinite: what to do when a gradient holds NaN or Inf.
        before_clipping: edit gradients in ``on_before_optimizer_step``, which Lightning calls before it clips them,
            instead of inside the step, after clipping. Only for transforms that edit gradients, in float32 or
            bfloat16 (with float16 Lightning calls that hook before the optimizer knows whether the step happens).

    Returns:
        A ``lightning.pytorch.Callback`` for ``Trainer(callbacks=[...])``.

    Raises:
        ImportError: if Lightning is not installed.
        TypeError: if something is no transform.
        ValueError: if ``before_clipping`` is asked of a transform that edits parameters after the step.
    """
    late = [each.name for each in transforms if isinstance(each, Transform) and each.when != "pre"]
    if before_clipping and late:
        raise ValueError(
            f"before_clipping needs transforms that only edit gradients, got {', '.join(late)}. Leave it off for them."
        )
    base = required(
        "lightning.pytorch", "pytorch_lightning", package="lightning", user="The Lightning callback"
    )
    made = type("TransformCallback", (Hooks, base.Callback), {"__doc__": Hooks.__doc__})
    return made(Driver(transforms, nonfinite), before_clipping)
