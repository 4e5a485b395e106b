"""Transforms in the ``Trainer`` of Hugging Face transformers, as a callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pullback.adapters.driver import Driver
from pullback.adapters.required import required
from pullback.core.checks import NonFinite
from pullback.core.kinds import Transform


class Hooks:
    """The hooks of a Trainer callback; `transform_callback` joins them to the Trainer's own base class."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self.driver = driver

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the Trainer's optimizer; gradients are then edited inside its step, after clipping.

        Raises:
            ValueError: if the Trainer made no optimizer.
        """
        optimizer = kwargs.get("optimizer")
        self.driver.start([] if optimizer is None else [optimizer], kwargs.get("model"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks off the optimizer."""
        self.driver.stop()

    def state_dict(self) -> dict[str, Any]:
        """State of the transforms; the Trainer does not save it, so keep it beside its checkpoint."""
        return self.driver.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state before ``Trainer.train(resume_from_checkpoint=...)``."""
        self.driver.load(state)


def transform_callback(*transforms: Transform, nonfinite: NonFinite = "raise") -> Any:
    """A Trainer callback that runs ``transforms`` in every optimizer step, after the Trainer clipped gradients.

    Args:
        *transforms: what to run, in order.
        nonfinite: what to do when a gradient holds NaN or Inf.

    Returns:
        A ``transformers.TrainerCallback`` for ``Trainer(callbacks=[...])``.

    Raises:
        ImportError: if transformers is not installed.
        TypeError: if something is no transform.
    """
    base = required("transformers", package="transformers", user="The Trainer callback")
    made = type("TransformCallback", (Hooks, base.TrainerCallback), {"__doc__": Hooks.__doc__})
    return made(Driver(transforms, nonfinite))
