"""What the adapters share: attach transforms to the trainer's own optimizers, once, and keep their state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pullback.core.attachment import Attachment, attach
from pullback.core.checks import NonFinite
from pullback.core.kinds import Transform
from pullback.core.parameters import ParameterSource, named_parameters


def plain(optimizer: Any) -> torch.optim.Optimizer:
    """The ``torch.optim`` optimizer inside a trainer's wrapper.

    Lightning and Accelerate keep it as ``.optimizer``, possibly more than once.

    Raises:
        TypeError: if there is none inside, as with DeepSpeed, which steps outside torch.
    """
    inner = optimizer
    while not isinstance(inner, torch.optim.Optimizer) or type(inner).__module__.startswith("accelerate"):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer or a wrapper of one, got {type(optimizer).__name__}. "
                "Engines with a step of their own, such as DeepSpeed, cannot run transforms."
            )
    return inner


def only_one(optimizers: Sequence[Any]) -> Any:
    """The trainer's optimizer.

    Raises:
        ValueError: if there are several or none.
    """
    if len(optimizers) != 1:
        raise ValueError(
            f"the callback drives one optimizer, got {len(optimizers)}. "
            "Attach by hand in configure_optimizers: pullback.attach(optimizer, ...)."
        )
    return optimizers[0]


def _names_any(names: ParameterSource, optimizer: torch.optim.Optimizer) -> bool:
    known = set(named_parameters(names).values())
    return any(parameter in known for group in optimizer.param_groups for parameter in group["params"])


class Driver:
    """Attachments of one trainer run.

    A transform keeps state for one optimizer, so the trainer must have only one.

    Args:
        transforms: what to run, in order.
        nonfinite: what to do with a gradient that holds NaN or Inf; ``"skip"`` suits loss scaling.
    """

    def __init__(self, transforms: Sequence[Transform], nonfinite: NonFinite) -> None:
        wrong = [type(item).__name__ for item in transforms if not isinstance(item, Transform)]
        if wrong or not transforms:
            raise TypeError(f"transforms must be one or more Transform objects, got {wrong or 'none'}.")
        self.transforms = tuple(transforms)
        self.nonfinite: NonFinite = nonfinite
        self.attachment: Attachment | None = None
        self._waiting: Mapping[str, Any] | None = None

    def start(self, optimizers: Sequence[Any], names: ParameterSource | None = None) -> None:
        """Attach to the trainer's optimizer, and take over a state that was loaded before there was one.

        Raises:
            ValueError: if the trainer has several optimizers.
        """
        self.stop()
        optimizer = plain(only_one(optimizers))
        if names is not None and not _names_any(names, optimizer):
            names = None  # a wrapper trains tensors of its own, such as flattened ones: they have no names
        self.attachment = attach(optimizer, *self.transforms, nonfinite=self.nonfinite, names=names)
        if self._waiting is not None:
            self.attachment.load_state_dict(self._waiting)
            self._waiting = None

    def stop(self) -> None:
        """Take the hooks off again; the transforms keep their state."""
        if self.attachment is not None:
            self._waiting = self.attachment.state_dict()
            self.attachment.remove()
            self.attachment = None

    def state(self) -> dict[str, Any]:
        """State of the attachment, empty before the first start."""
        if self.attachment is not None:
            return self.attachment.state_dict()
        return dict(self._waiting or {})

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :meth:`state`, now or at the next start."""
        if not state:
            return
        if self.attachment is None:
            self._waiting = state
        else:
            self.attachment.load_state_dict(state)
