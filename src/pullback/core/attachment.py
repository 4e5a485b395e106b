"""Attach transforms to any ``torch.optim`` optimizer through its own step hooks.

The optimizer stays the user's: nothing is wrapped or subclassed, so schedulers, ``GradScaler``, trainers and
checkpoints go on as before. In each step the order is: unscale (fused optimizers under ``GradScaler`` only),
test for NaN and Inf, transforms before the step, the optimizer, transforms after the step.
:class:`Attachment` prints it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from pullback.core.checks import NON_FINITE_POLICIES, NonFinite, choice, shown
from pullback.core.finite import admit
from pullback.core.kinds.transform import StepBatch, Transform
from pullback.core.parameters import ParameterSource, named_parameters, optimizer_rows
from pullback.core.state import check_counts, check_state
from pullback.core.stepping import SetAside, check_optimizer, overflowed, steps_on_stack, unscale

FORMAT_VERSION = 1


class Attachment:
    """Transforms at work in an optimizer; the handle to print, save, move and remove them.

    Made by :func:`attach`. A copy or pickle that contains both optimizer and attachment keeps working; a copy
    of the optimizer alone has lost its hooks, as torch never copies them: see :meth:`reattach`.

    A step counts when at least one parameter had a gradient and the update really happened: steps left out by
    ``nonfinite="skip"`` or by ``GradScaler`` advance nothing, neither counters nor random streams nor
    moments.

    Attributes:
        transforms: the transforms in their order.
        nonfinite: what happens when an unscaled gradient holds NaN or Inf.
        steps: how many real steps happened so far.
        skipped: how many steps were left out because of NaN or Inf.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        transforms: tuple[Transform, ...],
        nonfinite: NonFinite,
        given_names: Mapping[Tensor, str],
    ) -> None:
        self.transforms = transforms
        self.nonfinite: NonFinite = nonfinite
        self.steps = 0
        self.skipped = 0
        self._given_names = dict(given_names)
        self._names: list[str] = []
        self._register(optimizer)

    # --- hooks ----------------------------------------------------------------------------------------------

    def _register(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._batch: StepBatch | None = None
        self._aside: SetAside | None = None
        self._inside = False
        self._nested = 0
        for transform in self.transforms:
            transform._owner = weakref.ref(self)
        disable = (
            torch.compiler.disable
        )  # a compiled step breaks its graph here: the test for NaN reads the host
        self._edit_eagerly = disable(self._edit)
        self._handles = (
            optimizer.register_step_pre_hook(disable(self._before)),
            optimizer.register_step_post_hook(disable(self._after)),
        )

    def _before(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Edit the gradients now, or after the closure that will make them."""
        if self._inside and steps_on_stack(optimizer) > 1:
            self._nested += 1  # a subclass called super().step(): one step, two rounds of hooks
            return None
        self._inside, self._nested = True, 0
        self._batch = self._aside = None
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._wrapped(optimizer, args[1]), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._wrapped(optimizer, kwargs["closure"])}
        self._edit(optimizer)
        return None

    def _wrapped(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        evaluated = False

        def edited() -> Any:
            nonlocal evaluated
            if evaluated:
                raise RuntimeError(
                    f"{type(optimizer).__name__}.step evaluated its closure twice in one step, but attached "
                    "transforms edit the gradient once per step. Remove the attachment for this optimizer, "
                    "or call "
                    "transform.update_(params) inside the closure."
                )
            evaluated = True
            loss = closure()
            self._edit_eagerly(optimizer)
            return loss

        return edited

    def _after(self, *_: Any) -> None:
        """Edit the parameters, count the step, put gradients back that were set aside."""
        if self._nested:
            self._nested -= 1
            return
        self._inside = False
        batch, aside = self._batch, self._aside
        self._batch = self._aside = None
        if aside is not None:
            aside.restore()
        if batch is None:
            return
        with torch.no_grad():
            for transform in self.transforms:
                if transform.when != "pre":
                    transform.post_step_(_at(batch, transform.steps))
        for transform in self.transforms:
            transform.steps += 1
        self.steps += 1

    @torch.no_grad()
    def _edit(self, optimizer: torch.optim.Optimizer) -> None:
        batch = self._collect(optimizer)
        if not batch.params or overflowed(optimizer):
            return  # nothing to do, or GradScaler's kernel leaves this step out
        unscale(optimizer, batch.grads)
        owner = f"attachment to {type(optimizer).__name__}"
        if not admit(batch.grads, batch.names, policy=self.nonfinite, owner=owner, step=self.steps):
            self.skipped += 1
            self._aside = SetAside(optimizer, batch.params)
            return
        for transform in self.transforms:
            if transform.when != "post":
                transform.pre_step_(_at(batch, transform.steps))
        self._batch = batch

    def _collect(self, optimizer: torch.optim.Optimizer) -> StepBatch:
        """Gather the parameters that have a gradient; gradients are looked up afresh in every step."""
        params: list[Tensor] = []
        grads: list[Tensor] = []
        indices: list[int] = []
        groups: list[dict[str, Any]] = []
        index = 0
        for group in optimizer.param_groups:
            for param in group["params"]:
                grad = param.grad
                if grad is not None:
                    params.append(param)
                    grads.append(grad)
                    indices.append(index)
                    groups.append(group)
                index += 1
        names = self._all_names(optimizer, index)
        return StepBatch(params, grads, [names[i] for i in indices], indices, groups, self.steps, optimizer)

    def _all_names(self, optimizer: torch.optim.Optimizer, count: int) -> list[str]:
        if len(self._names) != count:  # the first step, or a group was added
            kept = self._names if len(self._names) < count else []
            rows = optimizer_rows(optimizer)[len(kept) :]
            self._names = kept + [self._given_names.get(tensor, name) for name, tensor in rows]
        return self._names

    # --- handle ---------------------------------------------------------------------------------------------

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that the transforms are attached to.

        Raises:
            ReferenceError: if it does not exist any more.
        """
        optimizer = self._optimizer()
        if optimizer is None:
            raise ReferenceError(
                "the optimizer of this attachment is gone. Use reattach(optimizer) with a new one."
            )
        return optimizer

    @property
    def attached(self) -> bool:
        """Whether the transforms take part in steps."""
        return bool(self._handles) and self._optimizer() is not None

    def remove(self) -> None:
        """Take the transforms out of the optimizer; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()
        if self._aside is not None:
            self._aside.restore()
        self._batch = self._aside = None
        for transform in self.transforms:
            if transform.owner is self:
                transform._owner = None

    def reattach(self, optimizer: torch.optim.Optimizer) -> Self:
        """Move the transforms, with counters and state, to ``optimizer``, for example a copy of the old one.

        Raises:
            TypeError: if it is no optimizer that transforms can attach to.
            ValueError: if it has fewer parameters than the old one, or a transform was attached elsewhere.
        """
        check_optimizer(optimizer)
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        if count < len(self._names):
            raise ValueError(
                f"optimizer must have the {len(self._names)} parameters of the old one, got {count}. "
                "Attach new transforms to it instead."
            )
        _check_free(self.transforms, self)
        self.remove()
        self._register(optimizer)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        optimizer = self._optimizer()
        before = [f"before the step: {each!r}" for each in self.transforms if each.when != "post"]
        after = [f"after the step: {each!r}" for each in self.transforms if each.when != "pre"]
        count = 0 if optimizer is None else sum(len(group["params"]) for group in optimizer.param_groups)
        middle = (
            "the step: optimizer is gone"
            if optimizer is None
            else (
                f"the step: {type(optimizer).__name__} ({len(optimizer.param_groups)} groups, {count} "
                "parameters)"
            )
        )
        lines = [f"  {n}. {line}" for n, line in enumerate([*before, middle, *after], start=1)]
        state = f"nonfinite={self.nonfinite!r}, steps={self.steps}, skipped={self.skipped}"
        return "\n".join(["Attachment(", *lines, f"  {state}{'' if self.attached else ', removed'}", ")"])

    # --- state ----------------------------------------------------------------------------------------------

    def _keyed(self) -> dict[str, Transform]:
        """Transforms by name; repeated names get their number."""
        keyed: dict[str, Transform] = {}
        for transform in self.transforms:
            same = sum(1 for other in keyed.values() if other.name == transform.name)
            keyed[transform.name if not same else f"{transform.name}#{same + 1}"] = transform
        return keyed

    def state_dict(self) -> dict[str, Any]:
        """Versioned state of counters and transforms: tensors and plain values, none of the optimizer's."""
        return {
            "format_version": FORMAT_VERSION,
            "steps": self.steps,
            "skipped": self.skipped,
            "transforms": {key: transform.state_dict() for key, transform in self._keyed().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`, or nothing of it when any part does not fit.

        Raises:
            StateError: if the version is newer, or a key, transform, type, shape or dtype differs.
        """
        reference = {"format_version": FORMAT_VERSION, "steps": 0, "skipped": 0, "transforms": {}}
        check_state("Attachment", state, reference, version=FORMAT_VERSION, open_keys=("transforms",))
        check_counts("Attachment", state, "steps", "skipped")
        keyed = self._keyed()
        check_state("Attachment.transforms", state["transforms"], dict.fromkeys(keyed), open_keys=keyed)
        for key, transform in keyed.items():
            transform.check_state_dict(state["transforms"][key])
        for key, transform in keyed.items():
            transform.load_state_dict(state["transforms"][key])
        self.steps = state["steps"]
        self.skipped = state["skipped"]

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or pickle carries: the optimizer itself instead of hooks."""
        fields = ("transforms", "nonfinite", "steps", "skipped", "_given_names", "_names")
        kept = {name: getattr(self, name) for name in fields}
        return {**kept, "optimizer": self._optimizer() if self._handles else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        fields = dict(state)
        optimizer = fields.pop("optimizer")
        self.__dict__.update(fields)
        if optimizer is not None:
            self._register(optimizer)
        else:
            self._optimizer, self._handles, self._batch, self._aside = _gone, (), None, None


def attach(
    optimizer: torch.optim.Optimizer,
    *transforms: Transform,
    nonfinite: NonFinite = "raise",
    names: ParameterSource | None = None,
) -> Attachment:
    """Run ``transforms`` in every step of ``optimizer``, in the order given.

    A further call on the same optimizer adds its transforms inside the same step: those before the step run
    after the earlier ones, those after the step likewise.

    Args:
        optimizer: any ``torch.optim.Optimizer`` that evaluates its closure at most once per step.
        *transforms: what to run; each instance belongs to one optimizer at a time. None at all makes a plain
            guard.
        nonfinite: what to do when an unscaled gradient holds NaN or Inf, tested before any transform:
            ``"raise"``; ``"skip"`` leaves weights, moments, step counts and random streams as if the step had
            not happened; ``"warn"`` goes on. ``"skip"`` hides all gradients from the optimizer for that step,
            which torch's optimizers answer by doing nothing; hold back ``scheduler.step()`` yourself where it
            matters (compare ``attachment.skipped``).
        names: where parameter names come from, usually the model; else the names the optimizer was given,
            else ``group0.3``.

    Returns:
        The handle; the transforms stay attached whether or not it is kept.

    Raises:
        TypeError: if the optimizer is none, or is ``LBFGS``, or a transform is no :class:`Transform`.
        ValueError: if a transform is given twice or attached elsewhere, if the policy is unknown, or if
            ``names`` names no parameter of this optimizer.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> handle = attach(torch.optim.SGD([weight], lr=0.1), nonfinite="skip")
        >>> handle.steps
        0
    """
    check_optimizer(optimizer)
    choice("nonfinite", nonfinite, NON_FINITE_POLICIES)
    for transform in transforms:
        if not isinstance(transform, Transform):
            raise TypeError(
                f"transforms must be Transform instances, got {shown(transform)}. Call its class first."
            )
    _check_free(transforms, None)
    given: dict[Tensor, str] = {}
    if names is not None:
        given = {tensor: name for name, tensor in named_parameters(names).items()}
        if not any(param in given for group in optimizer.param_groups for param in group["params"]):
            raise ValueError(
                f"names must name parameters of the optimizer, got {len(given)} others. Pass the model that "
                "it trains."
            )
    return Attachment(optimizer, transforms, nonfinite, given)


def _at(batch: StepBatch, step: int) -> StepBatch:
    """The batch as a transform with its own count of steps sees it."""
    return batch if batch.step == step else replace(batch, step=step)


def _gone() -> None:
    """Stand in for the reference to an optimizer that a copy did not carry along."""


def _check_free(transforms: tuple[Transform, ...], attachment: Attachment | None) -> None:
    """Refuse transforms that are given twice or that work for another attachment."""
    for position, transform in enumerate(transforms):
        if any(transform is other for other in transforms[:position]):
            raise ValueError(f"transforms must be distinct, got {transform!r} twice. Make a second instance.")
        owner = transform.owner
        if owner is not None and owner is not attachment:
            raise ValueError(
                f"{transform!r} is attached to another optimizer already. "
                "Remove that attachment first, or make a second instance."
            )
