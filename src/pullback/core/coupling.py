"""One coupling step: what it reads, what it rewrites, and what its function may not do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pullback.core.checks import integer, shown

State: TypeAlias = Sequence[Tensor | None]
"""One tensor for each slot; None for a slot that is empty, which stands for an exact zero."""

HALF = (torch.bfloat16, torch.float16)


class CouplingStep(nn.Module):
    r"""One step ``s[slot] = scale * s[slot] + fn(*[s[j] for j in reads], *[context[k] for k in context])``.

    Args:
        slot: which tensor of the state is rewritten.
        reads: slots that ``fn`` is given, in this order; not ``slot`` itself, or the step could not be undone.
        fn: a module, or a function without weights of its own. It keeps the shape of the slot (stride 1, as many
            channels), does not overwrite what it is given, and gives the same again when it is called again: dropout
            and batch normalisation do (their random numbers and statistics are replayed), spectral normalisation
            does not.
        scale: the factor a: None for 1, a number, or a tensor (a parameter is learned) that broadcasts to the slot,
            such as [1, channels, 1, 1]. It must stay away from zero; see `away_from_zero_`.
        context: positions of the further tensors that ``fn`` is given after the slots it reads; these never change.
        tap: also give out the new value of the slot, for a head in mid-sequence.

    Raises:
        TypeError: if an argument is of a wrong type.
        ValueError: if ``slot`` is among ``reads``, a position is negative, or ``scale`` is zero or not finite.
    """

    def __init__(
        self,
        slot: int,
        reads: Sequence[int],
        fn: Callable[..., Tensor],
        scale: float | Tensor | None = None,
        *,
        context: Sequence[int] = (),
        tap: bool = False,
    ) -> None:
        super().__init__()
        self.slot = integer("slot", slot, minimum=0)
        self.reads = tuple(integer("reads", each, minimum=0) for each in reads)
        self.context = tuple(integer("context", each, minimum=0) for each in context)
        self.tap = tap
        if self.slot in self.reads:
            raise ValueError(
                f"reads must leave out the slot that is rewritten, got slot={self.slot} and reads={self.reads}. "
                "A function of its own slot cannot be undone: split the tensor into two slots."
            )
        if not callable(fn):
            raise TypeError(f"fn must be a module or a function, got {shown(fn)}. Pass the module itself.")
        self.fn = fn
        if isinstance(scale, Tensor) and not isinstance(scale, nn.Parameter):
            self.register_buffer("scale", scale)
        else:
            self.scale = scale if scale is None or isinstance(scale, nn.Parameter) else _factor(scale)

    def extra_repr(self) -> str:
        """Slot, reads and context."""
        return f"slot={self.slot}, reads={list(self.reads)}, context={list(self.context)}"

    def given(self, state: State, context: Sequence[Tensor]) -> list[Tensor]:
        """What ``fn`` is called with.

        Raises:
            ValueError: if a slot that is read is empty.
        """
        values = [state[each] for each in self.reads]
        if any(each is None for each in values):
            raise ValueError(
                f"reads must name slots that hold a tensor, got {list(self.reads)} of which one is empty (None). "
                "Fill it by an earlier step, or pass a tensor of zeros."
            )
        return [*values, *(context[each] for each in self.context)]  # ty: ignore[invalid-return-type]

    def update(self, state: State, context: Sequence[Tensor]) -> Tensor:
        """``fn`` of the slots and context it reads, checked.

        Raises:
            TypeError: if the result is no tensor.
            ValueError: if it has another shape than the slot.
            RuntimeError: if ``fn`` has overwritten what it was given.
        """
        given = self.given(state, context)
        before = [_version(each) for each in given]
        update = self.fn(*given)
        if before != [_version(each) for each in given]:
            raise RuntimeError(
                f"fn of the step on slot {self.slot} must not overwrite its input, got one that was changed in place. "
                "Make its first operation one that makes a new tensor, for example ReLU(inplace=False)."
            )
        value = state[self.slot]
        if not isinstance(update, Tensor):
            raise TypeError(
                f"fn must return one tensor, got {shown(update)}. Wrap it to return the tensor alone."
            )
        if value is not None and update.shape != value.shape:
            raise ValueError(
                f"fn must keep the shape {tuple(value.shape)} of slot {self.slot}, got {tuple(update.shape)}. "
                "Use stride 1 and as many channels as the slot has; change sizes between two sequences."
            )
        return update

    def couple(self, value: Tensor | None, update: Tensor, scale: Any, *, raised: bool = False) -> Tensor:
        """``scale * value + update``; an empty slot takes the update, in float32 where ``raised`` and it is shorter.

        Raises:
            ValueError: if the slot would change its shape or dtype.
        """
        if value is None:
            return update.float() if raised and update.dtype in HALF else update
        new = value + update if scale is None else value * scale + update
        if new.shape != value.shape or new.dtype != value.dtype:
            raise ValueError(
                f"The step on slot {self.slot} must keep its shape and dtype, got {tuple(value.shape)}, {value.dtype} "
                f"before and {tuple(new.shape)}, {new.dtype} after. Give the state the wider dtype, and scale a shape "
                "that broadcasts to the slot."
            )
        return new


class _Unused(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, other: Tensor) -> Tensor:  # noqa: ARG004
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], 0.0 * ctx.saved_tensors[0]


def unused(value: Tensor, other: Any) -> Tensor:
    """``value``; if ``other`` is a tensor that learns, its gradient is exactly zero instead of missing.

    So is that of a factor in front of an empty slot, which stands for zero: every parameter then has a gradient, as
    DistributedDataParallel expects.
    """
    return _Unused.apply(value, other) if isinstance(other, Tensor) and other.requires_grad else value


@torch._disable_dynamo
@torch.no_grad()
def away_from_zero_(scales: Tensor | Sequence[Tensor], minimum: float = 1e-3) -> None:
    """Raise every ``|scale|`` to at least ``minimum`` in place, keeping signs; an exact zero becomes ``+minimum``.

    Call it in front of the forward pass. Autograd does not notice the edit, so that two forward passes may come
    before one backward pass: entries that are large enough stay bitwise what they are.

    Args:
        scales: the factors of one coupling step or of several.
        minimum: smallest size, > 0.
    """
    rows = [each.data for each in ([scales] if isinstance(scales, Tensor) else scales)]
    kinds = {(each.device, each.dtype) for each in rows}
    for kind in kinds:  # one pass for all of a kind: there may be a hundred small ones
        same = [each for each in rows if (each.device, each.dtype) == kind]
        flat = torch.cat([each.reshape(-1) for each in same])
        size = flat.abs().clamp_min(minimum)
        parts = torch.where(flat < 0, -size, size).split([each.numel() for each in same])
        torch._foreach_copy_(same, [part.view_as(each) for part, each in zip(parts, same, strict=True)])


def _factor(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be None, a number or a tensor, got {shown(scale)}. Use None for 1.")
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"scale must be finite and not 0, got {scale}. Undoing the step divides by it.")
    return float(scale)


def _version(tensor: Tensor) -> int:
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version
