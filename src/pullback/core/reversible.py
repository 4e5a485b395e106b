r"""Coupling steps over a tuple of tensors: invertible whatever the functions inside are, so that little is kept.

A step rewrites one slot of the state and reads others,

.. math:: s_i \leftarrow a \odot s_i + F(s_j, \ldots, \text{context}), \qquad i \notin \{j, \ldots\},

so that its input is :math:`s_i = (s_i^{new} - F(s_j, \ldots)) / a`: F itself is computed forwards only. Two steps on
two slots with a = 1 are a block of a RevNet (Gomez et al. 2017, arXiv:1707.04585), one step for each level of a
feature pyramid is a column of a RevCol (Cai et al. 2023, arXiv:2212.11696). `ReversibleSequence` runs many of them
and keeps the last state for the backward pass instead of everything inside::

    seq = ReversibleSequence([CouplingStep(slot=0, reads=[1], fn=f), CouplingStep(slot=1, reads=[0], fn=g)])
    y1, y2 = seq((x1, x2))
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from pullback.core.checks import instance, integer, shown
from pullback.core.coupling import HALF, CouplingStep, State, away_from_zero_, unused
from pullback.core.kinds.recompute import Recompute
from pullback.core.replay import Autocast, Generators, Replay, moved
from pullback.core.reversible_sweep import Drift, Options, reversibly

__all__ = ["CouplingStep", "Drift", "ReversibleSequence", "away_from_zero_", "set_reversible"]


class ReversibleSequence(nn.Module, Recompute):
    """Coupling steps in a row, whose activations are rebuilt in the backward pass instead of being kept.

    Outputs are bitwise those of plain automatic differentiation, and so are random numbers and running statistics
    after the call. Gradients are equal up to rounding: what a step read is rebuilt by undoing the later ones, each
    of which divides by its scale. With scales below 1 rounding errors grow geometrically; ``anchor_every`` bounds
    that. Parameters are explicit inputs of one autograd function, so that ``torch.autograd.grad``, accumulation,
    frozen and shared modules, DistributedDataParallel and retained graphs behave as they do elsewhere. A second
    derivative is refused. Nothing is rebuilt, and nothing special kept, without a graph, under ``torch.func``
    transforms, and after `set_reversible` switched it off: then the same steps run under plain automatic
    differentiation.

    Args:
        steps: the steps, in order.
        anchor_every: keep the state in front of every such step number (k, 2k, ...); 0: of none. Memory grows by one
            state for each, and what is kept exactly need not be rebuilt.
        preserve_rng_state: replay the random numbers of steps that draw some. Of the global torch generators only,
            not NumPy's or Python's.
        drift_check: also keep the input, and say in ``drift`` after every backward pass how far off the rebuilt is.

    Attributes:
        drift: a `Drift` after a backward pass with ``drift_check``, else None.
        reversible: whether anything is rebuilt at all; `set_reversible` sets it for a whole network.

    Raises:
        TypeError: if a step is no `CouplingStep`, or an argument is of a wrong type.
        ValueError: if there are no steps, or ``anchor_every`` is negative.
    """

    refuses: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        steps: Sequence[CouplingStep],
        anchor_every: int = 0,
        preserve_rng_state: bool = True,
        drift_check: bool = False,
    ) -> None:
        super().__init__()
        each: Any
        for each in steps:
            instance("steps", each, CouplingStep, fix="Wrap functions as CouplingStep(slot, reads, fn).")
        if not steps:
            raise ValueError(
                "steps must hold at least one CouplingStep, got none. Pass [CouplingStep(...), ...]."
            )
        self.steps = nn.ModuleList(steps)
        self._slots = 1 + max(max(each.slot, *each.reads, 0) for each in steps)
        self._contexts = 1 + max(max(-1, -1, *each.context) for each in steps)
        self.anchor_every = integer("anchor_every", anchor_every, minimum=0, fix="Use 0 for no anchors.")
        self.preserve_rng_state = preserve_rng_state
        self.drift_check = drift_check
        self.reversible = True
        self.drift: Drift | None = None
        self._warned = False
        self._seen: set[int] = set()

    def extra_repr(self) -> str:
        """What differs from the default."""
        return f"anchor_every={self.anchor_every}, reversible={self.reversible}"

    def forward(self, state: State, context: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
        """Run all steps.

        Args:
            state: one floating tensor for each slot, of any shapes; None for a slot that begins empty (an exact
                zero). Under autocast half-precision slots are raised to float32: only the functions run in half
                precision.
            context: tensors that steps read and none rewrites.

        Returns:
            The new state, then the tapped values in the order of their steps. A slot that stays empty gives None.

        Raises:
            TypeError: if the state holds something else than floating tensors.
            ValueError: if a step names a slot or context that is not there, reads an empty slot, or changes a shape.
            RuntimeError: if a function overwrites its input, or changes buffers from call to call.
        """
        if self.reversible and torch.is_grad_enabled() and not _transformed():
            found = _rebuilding(self, state, context)
            if found is not None:
                return found
        values, taps = self.advance(state, context)
        return (*values, *taps)  # ty: ignore[invalid-return-type]

    def advance(
        self, state: State, context: Sequence[Tensor] = (), start: int = 0, stop: int | None = None
    ) -> tuple[list[Tensor | None], list[Tensor]]:
        """Run some steps under plain automatic differentiation.

        Args:
            state: one tensor a slot, as :meth:`forward`.
            context: as :meth:`forward`.
            start: number of the first step.
            stop: number behind the last one; None: all that there are.

        Returns:
            The state after them, and what they tapped.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`forward`.
        """
        values, context, raised = self._checked(state, context)
        taps = []
        for step in self._plan()[start:stop]:
            update = step.update(values, context)
            new = step.couple(values[step.slot], update, step.scale, raised=raised)
            new = new if values[step.slot] is not None else unused(new, step.scale)
            values[step.slot] = new
            if step.tap:
                taps.append(new)
        return values, taps

    def inverse(self, state: Sequence[Tensor], context: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
        """The state that :meth:`forward` was given, from the one it returned (without taps), up to rounding.

        Running statistics stay as they are; a graph is built as anywhere else. A slot that began empty gives zero.

        Raises:
            TypeError, ValueError: as :meth:`forward`.
            RuntimeError: if a function draws random numbers: what it drew is not known here.
        """
        values, context, _ = self._checked(state, context)
        devices = [each.device for each in (*values, *context) if each is not None]
        generators = Generators(devices)
        for number, step in reversed(list(enumerate(self._plan()))):
            before = generators.read()
            with Replay(step.fn, {}, f"step {number}").applied(()):
                update = step.update(values, context)
            if moved(before, generators.read()):
                raise RuntimeError(
                    f"Step {number} must not draw random numbers to be inverted, got a function that does. "
                    "Call eval() first, or switch dropout off."
                )
            value = values[step.slot]
            if value is None:
                raise ValueError(
                    f"state must hold a tensor in slot {step.slot}, got None. Pass what forward returned."
                )
            old = value - update
            values[step.slot] = old if step.scale is None else old / step.scale
        return tuple(values)  # ty: ignore[invalid-return-type]

    def _plan(self) -> list[CouplingStep]:
        return cast("list[CouplingStep]", list(self.steps))

    def _checked(
        self, state: State, context: Sequence[Tensor]
    ) -> tuple[list[Tensor | None], tuple[Tensor, ...], bool]:
        if isinstance(state, Tensor):
            raise TypeError(
                f"state must be a sequence with one tensor a slot, got {shown(state)}. Pass (x1, x2)."
            )
        for each in (*state, *context):
            if each is not None and not isinstance(each, Tensor):
                raise TypeError(
                    f"state and context must hold tensors, got {shown(each)}. Convert it with torch.as_tensor."
                )
        if any(each is not None and not each.is_floating_point() for each in state):
            raise TypeError(
                f"state must hold floating tensors, got {[getattr(each, 'dtype', None) for each in state]}. "
                "Use .float()."
            )
        if len(state) < self._slots:
            raise ValueError(
                f"state must have {self._slots} slots, got {len(state)}. Pass None for a slot that begins empty."
            )
        if len(context) < self._contexts:
            raise ValueError(
                f"context must have {self._contexts} tensors, got {len(context)}. Pass seq(state, [...])."
            )
        given = (each for each in (*state, *context) if each is not None)
        raised = Autocast.read(each.device for each in given).enabled
        values = [s.float() if raised and s is not None and s.dtype in HALF else s for s in state]
        return values, tuple(context), raised

    def _warn_of_half(self, values: list[Tensor | None]) -> None:
        short = next((each.dtype for each in values if each is not None and each.dtype in HALF), None)
        if short is None or self._warned:
            return
        self._warned = True
        warnings.warn(
            f"The state is {short}: what is rebuilt, and every gradient in front of it, is off by about a per cent "
            "after a few steps. Keep state and parameters in float32 and run under autocast, or use anchor_every.",
            stacklevel=4,
        )


@torch._disable_dynamo
def _rebuilding(
    sequence: ReversibleSequence, state: State, context: Sequence[Tensor]
) -> tuple[Tensor, ...] | None:
    """The autograd function, which a compiler leaves alone; functions inside may be compiled by themselves."""
    values, context, raised = sequence._checked(state, context)
    sequence._warn_of_half(values)
    options = Options(sequence.anchor_every, sequence.preserve_rng_state, sequence.drift_check, raised)

    def report(drift: Drift) -> None:
        sequence.drift = drift

    return reversibly(sequence._plan(), values, context, options, sequence._seen, report)


def set_reversible(module: nn.Module, reversible: bool = True) -> int:
    """Switch all reversible sequences of a network on or off; off, the same weights train under plain autograd.

    Args:
        module: the network.
        reversible: whether activations are rebuilt (True) or kept (False).

    Returns:
        How many sequences there are.

    Raises:
        ValueError: if there is none.
    """
    found = [each for each in module.modules() if isinstance(each, ReversibleSequence)]
    if not found:
        raise ValueError(
            f"module must hold a ReversibleSequence, got {type(module).__name__} without one. Pass the whole network."
        )
    for each in found:
        each.reversible = reversible
    return len(found)


def _transformed() -> bool:
    # A compiler finds an interpreter of its own while it traces; the graph that it breaks runs without one.
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
