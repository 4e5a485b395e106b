"""The one autograd function behind `pullback.core.reversible`: forward without a graph, backward step by step.

The sweep of the backward pass undoes the last step first. Each step's function runs once more, with a graph of its
own, which gives both the gradients and the value that has to be taken off the slot; then that graph is dropped.
Values that were kept (anchors) are used as soon as the sweep arrives at them, so that with an anchor in front of
every column nothing is rebuilt at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pullback.core.coupling import CouplingStep
from pullback.core.replay import (
    Autocast,
    Generators,
    RandomState,
    Replay,
    hidden_leaf,
    moved,
    trained_tensors,
)

_Key: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True)
class Drift:
    """How far rebuilt values were off, over all that could be compared: anchors and the input.

    Args:
        absolute: largest absolute error, 0-dim.
        relative: largest absolute error of a tensor divided by its largest entry, 0-dim.
        compared: number of tensors that were compared.
    """

    absolute: Tensor
    relative: Tensor
    compared: int


@dataclass(frozen=True)
class Options:
    """Settings of one call; see ``ReversibleSequence``. ``raised``: new slots are float32 at least."""

    anchor_every: int
    preserve_rng_state: bool
    drift_check: bool
    raised: bool


@dataclass
class _Record:
    """What the sweep has to know of one step beside tensors.

    Args:
        step: the step.
        replay: the modules of its function.
        scale: its factor as it was.
        trained: position of the factor among the trained tensors, or None.
        own: positions of the trained tensors of its function.
        previous: number of the step that last wrote the slot; -1: the input.
        empty: whether the slot was empty.
        live: for the slot, whether its old value depends on something that requires a gradient.
        needs: the same for every tensor that the function is given.
        rng: number of generator states that were saved.
    """

    step: CouplingStep
    replay: Replay
    scale: Any
    trained: int | None
    own: list[int]
    previous: int
    empty: bool
    live: bool
    needs: list[bool]
    rng: int = 0


@dataclass
class _Run:
    """One call: the plan of the sweep, filled by the forward pass."""

    steps: list[CouplingStep]
    slots: list[bool]
    contexts: int
    trained: int
    options: Options
    autocast: Autocast
    generators: Generators
    seen: set[int]
    report: Callable[[Drift], None]
    needs: Sequence[bool] = ()
    records: list[_Record] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    taps: dict[int, int] = field(default_factory=dict)
    keys: list[_Key] = field(default_factory=list)
    rng: RandomState = ()

    def unpack(self, tensors: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """State with None for empty slots, context, parameters."""
        rest = iter(tensors)
        state = [next(rest) if filled else None for filled in self.slots]
        context = [next(rest) for _ in range(self.contexts)]
        return state, context, list(rest)

    def forward(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[bool], dict[_Key, Tensor]]:
        """Outputs, whether each depends on something that requires a gradient, and what has to be kept."""
        state, context, params = self.unpack(tensors)
        live, needs, _ = self.unpack(self.needs)
        index = {id(each): position for position, each in enumerate(params)}
        version = [-1] * len(state)
        final = {step.slot: number for number, step in enumerate(self.steps)}
        kept: dict[_Key, Tensor] = {}
        if self.options.drift_check:
            kept |= {("input", i): s for i, s in enumerate(state) if s is not None}
        taps, marks = [], []
        self.rng = self.generators.read() if self.options.preserve_rng_state else ()
        for number, step in enumerate(self.steps):
            every = self.options.anchor_every
            if every and number and number % every == 0:
                kept |= {("value", i, version[i]): s for i, s in enumerate(state) if s is not None}
            record = self._record(number, index, version, state, live, needs)
            new = self._step(number, record, state, context, kept)
            i = step.slot
            state[i], version[i] = new, number
            live[i] = bool(record.own) or record.trained is not None or any(record.needs) or record.live
            if step.tap and final[i] != number:
                self.taps[number] = len(taps)
                taps.append(new)
                marks.append(live[i])
        self.last = version
        self.outputs = [i for i, s in enumerate(state) if s is not None]
        kept |= {("value", i, version[i]): state[i] for i in self.outputs}
        kept |= {("context", k): each for k, each in enumerate(context)}
        kept |= {("param", k): each for k, each in enumerate(params)}
        return [*(state[i] for i in self.outputs), *taps], [*(live[i] for i in self.outputs), *marks], kept

    def _record(
        self,
        number: int,
        index: dict[int, int],
        version: list[int],
        state: list[Any],
        live: list[Any],
        needs: list[bool],
    ) -> _Record:
        step = self.steps[number]
        replay = Replay(step.fn, index, f"step {number} (slot {step.slot})")
        record = _Record(
            step=step,
            replay=replay,
            scale=step.scale,
            trained=index.get(id(step.scale)),
            own=list(dict.fromkeys(position for *_, position in replay.trained)),
            previous=version[step.slot],
            empty=state[step.slot] is None,
            live=bool(live[step.slot]),
            needs=[*(bool(live[j]) for j in step.reads), *(needs[k] for k in step.context)],
        )
        self.records.append(record)
        return record

    def _step(
        self, number: int, record: _Record, state: list[Any], context: list[Any], kept: dict[_Key, Tensor]
    ) -> Tensor:
        before = self.rng
        with self.autocast.applied():
            update = record.step.update(state, context)
        record.replay.check_buffers()
        self.rng = self.generators.read() if before else ()
        if moved(before, self.rng):
            record.rng = len(before)
            kept |= {("rng", number, k): each for k, each in enumerate(before)}
        return record.step.couple(state[record.step.slot], update, record.scale, raised=self.options.raised)

    def first(self) -> int:
        """Number of the first step that has anything to differentiate or to pass on."""
        for number, record in enumerate(self.records):
            if record.own or record.trained is not None or record.live or any(record.needs):
                return number
        return len(self.records)


class _Sweep:
    """The backward pass of one run."""

    def __init__(self, run: _Run, kept: dict[_Key, Tensor], grads: Sequence[Tensor | None]) -> None:
        self.run, self.kept = run, kept
        self.state: list[Tensor | None] = [
            kept.get(("value", i, number)) for i, number in enumerate(run.last)
        ]
        self.grads: list[Tensor | None] = [None] * len(run.last)
        for i, grad in zip(run.outputs, grads, strict=False):
            self.grads[i] = grad
        extra = grads[len(run.outputs) :]
        self.taps = {number: extra[position] for number, position in run.taps.items()}
        _, wanted, _ = run.unpack(run.needs)
        self.context = [_leaf(kept["context", k], needed) for k, needed in enumerate(wanted)]
        self.context_grads: list[Tensor | None] = [None] * run.contexts
        self.leaves = [_leaf(kept["param", k], True) for k in range(run.trained)]
        self.leaf_grads: list[Tensor | None] = [None] * run.trained
        self.errors: list[tuple[Tensor, Tensor]] = []

    def run_all(self) -> list[Tensor | None]:
        """Gradients of state, context and parameters."""
        run = self.run
        drawn = any(record.rng for record in run.records)
        ambient = run.generators.read() if drawn else ()
        try:
            for number in reversed(range(run.first(), len(run.records))):
                self.undo(number, run.records[number])
        finally:
            if drawn:
                run.generators.write(ambient)
        if run.options.drift_check:
            run.report(self._drift())
        state = [grad for grad, filled in zip(self.grads, run.slots, strict=True) if filled]
        return [*state, *self.context_grads, *self.leaf_grads]

    def undo(self, number: int, record: _Record) -> None:
        """Pass the gradient of one step on, and put its slot back to what it was."""
        i = record.step.slot
        grad = _plus(self.grads[i], self.taps.get(number))
        update = self._again(number, record, grad)
        old = self._rebuilt(i, number, record, update)
        if grad is not None and record.trained is not None:
            scale = self.leaves[record.trained]
            found = torch.zeros_like(scale) if old is None else (grad * old).sum_to_size(scale.shape)
            self.leaf_grads[record.trained] = _plus(self.leaf_grads[record.trained], found)
        scaled = grad if record.scale is None or grad is None else grad * self._scale(record)
        self.grads[i] = scaled if record.live and not record.empty else None
        self.state[i] = old

    def _again(self, number: int, record: _Record, grad: Tensor | None) -> Tensor:
        """The function once more: spreads ``grad`` over what it was given and over its weights, returns its value."""
        step, run = record.step, self.run
        reads = [_leaf(self.state[j], need) for j, need in zip(step.reads, record.needs, strict=False)]
        given = [*reads, *(self.context[k] for k in step.context)]
        leaves = [self.leaves[position] for position in record.own]
        wanted = [each for each in (*given, *leaves) if each.requires_grad]
        if record.rng:
            run.generators.write(tuple(self.kept["rng", number, k] for k in range(record.rng)))
        with record.replay.applied(self.leaves):
            with run.autocast.applied(), torch.set_grad_enabled(bool(wanted) and grad is not None):
                update = step.fn(*given)
            if not update.requires_grad or grad is None:
                return update.detach()
            self._refuse_hidden(number, record, update, wanted)
            found = torch.autograd.grad(update, wanted, grad.to(update.dtype), allow_unused=True)
        by_id = {id(leaf): each for leaf, each in zip(wanted, found, strict=True)}
        for j, leaf in zip(step.reads, reads, strict=True):
            self.grads[j] = _plus(self.grads[j], by_id.get(id(leaf)))
        for k in dict.fromkeys(step.context):
            self.context_grads[k] = _plus(self.context_grads[k], by_id.get(id(self.context[k])))
        for position, leaf in zip(record.own, leaves, strict=True):
            self.leaf_grads[position] = _plus(self.leaf_grads[position], by_id.get(id(leaf)))
        return update.detach()

    def _refuse_hidden(self, number: int, record: _Record, update: Tensor, wanted: Sequence[Tensor]) -> None:
        if number in self.run.seen:
            return
        leaf = hidden_leaf(update, wanted)
        if leaf is not None:
            raise RuntimeError(
                f"fn of {record.replay.name} must take every tensor that requires a gradient as an argument or own it "
                f"as a parameter, got one of shape {tuple(leaf.shape)} that it only refers to. Make fn a module that "
                "holds it, or pass it as context."
            )
        self.run.seen.add(number)

    def _rebuilt(self, i: int, number: int, record: _Record, update: Tensor) -> Tensor | None:
        if record.empty:
            return None
        exact = self.kept.get(("value", i, record.previous))
        if exact is not None and not self.run.options.drift_check:
            return exact
        new = self.state[i]
        if new is None:
            raise RuntimeError(f"Slot {i} is empty after step {number}, which wrote it.")
        old = new - update
        old = old if record.scale is None else old / self._scale(record)
        true = self.kept.get(("input", i)) if record.previous < 0 else exact
        if true is not None:
            self.errors.append(((old - true).abs().max(), true.abs().max()))
        return old if exact is None else exact

    def _scale(self, record: _Record) -> Any:
        return record.scale if record.trained is None else self.leaves[record.trained].detach()

    def _drift(self) -> Drift:
        if not self.errors:
            return Drift(torch.zeros(()), torch.zeros(()), 0)
        off = torch.stack([error.double().cpu() for error, _ in self.errors])
        size = torch.stack([largest.double().cpu() for _, largest in self.errors])
        return Drift(
            off.max(), (off / size.clamp_min(torch.finfo(torch.float64).tiny)).max(), len(self.errors)
        )


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        run.needs = ctx.needs_input_grad[1:]
        outputs, live, kept = run.forward(tensors)
        run.keys = list(kept)
        ctx.run = run
        ctx.save_for_backward(*kept.values())
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(each for each, alive in zip(outputs, live, strict=True) if not alive))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        with torch.no_grad():
            found = _Sweep(ctx.run, dict(zip(ctx.run.keys, saved, strict=True)), grads).run_all()
        return None, *(_refusing(found, (*saved, *grads)) if torch.is_grad_enabled() else found)


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
        return tuple(each.view_as(each) for each in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
        raise RuntimeError(
            f"A reversible sequence must be differentiated once, got a second derivative ({len(grads)} gradients): its "
            "backward pass is not recorded. Call set_reversible(net, False), which keeps the activations."
        )


def _refusing(found: list[Tensor | None], sources: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients, for ``create_graph=True``: an error to whoever differentiates them, instead of a wrong number.

    They hang on everything that they were computed from (the outputs among ``sources`` lead to the input state):
    autograd passes by a node from which no way leads to what it was asked for, and gives zero without a word.
    """
    given = [each for each in found if each is not None]
    rest = iter(_Refusal.apply(len(given), *given, *(each for each in sources if each is not None)))
    return [None if each is None else next(rest) for each in found]


def reversibly(
    steps: list[CouplingStep],
    state: list[Tensor | None],
    context: tuple[Tensor, ...],
    options: Options,
    seen: set[int],
    report: Callable[[Drift], None],
) -> tuple[Tensor, ...] | None:
    """Run steps as one autograd function; the new state, then the taps. None if nothing requires a gradient."""
    filled = [each for each in state if each is not None]
    params = trained_tensors(part for step in steps for part in (step.fn, step.scale))
    if not any(each.requires_grad for each in (*filled, *context, *params)):
        return None
    devices = list(dict.fromkeys(each.device for each in (*filled, *context, *params)))
    run = _Run(
        steps=steps,
        slots=[each is not None for each in state],
        contexts=len(context),
        trained=len(params),
        options=options,
        autocast=Autocast.read(devices),
        generators=Generators(devices),
        seen=seen,
        report=report,
    )
    outputs = _Reversible.apply(run, *filled, *context, *params)
    rest = iter(outputs)
    final: list[Any] = [next(rest) if i in run.outputs else None for i in range(len(state))]
    extra = list(rest)
    last = {step.slot: number for number, step in enumerate(steps)}
    taps = [
        final[step.slot] if last[step.slot] == number else extra[run.taps[number]]
        for number, step in enumerate(steps)
        if step.tap
    ]
    return (*final, *taps)


def _leaf(tensor: Tensor | None, needed: bool) -> Any:
    return None if tensor is None else tensor.detach().requires_grad_(needed)


def _plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other
