"""What evaluation makes of parameters alone, kept from call to call until a parameter changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_T = TypeVar("_T")


class _FusedSteps:
    """How many steps fused optimizers have taken in this process: they leave no trace in a tensor's version."""

    count = 0
    counting = False

    @classmethod
    def begin(cls) -> None:
        """Count from now on."""
        if not cls.counting:
            register_optimizer_step_post_hook(cls._stepped)
            cls.counting = True

    @classmethod
    def _stepped(cls, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        cls.count += any(group.get("fused") for group in optimizer.param_groups)


class Kept(Generic[_T]):
    """A value with the tensors that it was made of.

    It is made anew when one of them is another tensor or has been written to (by an optimizer, ``load_state_dict``, a
    move), under another autocast, and in or out of inference mode. Not noticed are edits through ``.data`` and by
    optimizers that are none of torch's: call `clear` after those. Copies and files of it are empty.

    The first value that is kept registers one hook for all optimizers of the process, which counts fused steps.

    Example:
        >>> weight, kept = torch.nn.Parameter(torch.ones(2)), Kept()
        >>> kept.get([weight], lambda: weight.detach() * 2)
        tensor([2., 2.])
        >>> torch.nn.init.zeros_(weight) is kept.get([weight], lambda: weight)
        True
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget it."""
        self._owners: tuple[weakref.ref[Tensor], ...] = ()
        self._stamp: tuple[Any, ...] = ()
        self._value: _T | None = None

    @property
    def full(self) -> bool:
        """Whether there is a value, be it current or not."""
        return self._value is not None

    def get(self, owners: Sequence[Tensor], make: Callable[[], _T]) -> _T:
        """What is kept if nothing has changed since, else what ``make`` gives.

        Args:
            owners: all tensors that the value depends on.
            make: makes the value, without an autograd graph.
        """
        try:
            stamp = _stamp(owners)
        except (
            RuntimeError
        ):  # tensors without version or storage: inside torch.func, or made in inference mode
            return make()
        same = len(self._owners) == len(owners) and all(
            ref() is each for ref, each in zip(self._owners, owners, strict=True)
        )
        if self._value is None or not same or self._stamp != stamp:
            _FusedSteps.begin()
            self._value = make()
            self._owners, self._stamp = tuple(weakref.ref(each) for each in owners), stamp
        return self._value

    def __deepcopy__(self, memo: Any) -> Kept[_T]:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept[_T]], tuple[()]]:
        return Kept, ()


def _stamp(owners: Sequence[Tensor]) -> tuple[Any, ...]:
    kind = owners[0].device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    where = tuple((each._version, each.data_ptr(), each.dtype) for each in owners)
    steps = _FusedSteps.count if any(each.requires_grad for each in owners) else 0
    return (*where, cast, torch.is_inference_mode_enabled(), steps)
