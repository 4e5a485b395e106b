"""Look at gradients in every n-th step of an optimizer, between backward and update, in the user's own loop."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, final

import torch

from pullback.core.checks import integer
from pullback.core.stepping import check_optimizer, overflowed, steps_on_stack


@final
class StepReader:
    """Calls ``read(step, scale)`` before every n-th update; the handle to remove it.

    Gradients are only looked at. ``scale`` is what they are still multiplied by: 1, or the factor of a ``GradScaler``
    whose unscaling a fused kernel does. A step that the scaler leaves out because of an overflow is not read, and a
    closure is evaluated first. Other steps cost one addition.

    Args:
        optimizer: any ``torch.optim.Optimizer`` that evaluates its closure once per step.
        read: gets the number of the step and a 0-dim tensor or 1.0.
        every: distance of the steps that are read; the first one is number ``first``.
        first: number of the next step, for a run that is resumed.

    Raises:
        TypeError: if the optimizer is none of torch's, or is LBFGS.
        ValueError: if ``every`` or ``first`` is too small.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        read: Callable[[int, Any], None],
        *,
        every: int = 1,
        first: int = 0,
    ) -> None:
        check_optimizer(optimizer)
        self.every = integer("every", every, minimum=1)
        self.steps = integer("first", first, minimum=0)
        self._read = read
        self._optimizer = weakref.ref(optimizer)
        self._inside = False
        self._handles = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._done),
        )

    @property
    def attached(self) -> bool:
        """Whether it still reads."""
        return bool(self._handles)

    def remove(self) -> None:
        """Read no more; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "" if self.attached else ", removed"
        return f"StepReader(every={self.every}, steps={self.steps}{state})"

    def _before(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._inside and steps_on_stack(optimizer) > 1:
            return None  # a subclass called super().step(): its outer step is the one that counts
        self._inside = True
        step = self.steps
        self.steps += 1
        return None if step % self.every else self._due(optimizer, step, args, kwargs)

    def _done(self, *_: Any) -> None:
        self._inside = False

    @torch.compiler.disable
    def _due(
        self, optimizer: torch.optim.Optimizer, step: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._after(optimizer, step, args[1]), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._after(optimizer, step, kwargs["closure"])}
        self._look(optimizer, step)
        return None

    def _after(
        self, optimizer: torch.optim.Optimizer, step: int, closure: Callable[[], Any]
    ) -> Callable[[], Any]:
        """The closure, followed by one look."""
        looked = False

        def evaluated() -> Any:
            nonlocal looked
            value = closure()
            if not looked:
                looked = True
                self._look(optimizer, step)
            return value

        return evaluated

    def _look(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        if overflowed(optimizer):
            return
        scale = getattr(optimizer, "grad_scale", None)
        with torch.no_grad():
            self._read(step, 1.0 if scale is None else scale)
