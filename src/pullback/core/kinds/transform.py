"""Transforms: edits of the gradient before an optimizer's step, or of the parameters after it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from pullback.core.checks import NonFinite
from pullback.core.finite import admit
from pullback.core.state import check_counts, check_state

if TYPE_CHECKING:
    from pullback.core.attachment import Attachment

Parameters: TypeAlias = nn.Module | Mapping[str, Tensor] | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
"""What :meth:`Transform.update_` takes: a module, a mapping, tensors, or (name, tensor) pairs."""


@dataclass(frozen=True)
class StepBatch:
    """What one real optimizer step works on; parameters without a gradient are left out.

    Args:
        params: the parameters that have a gradient, in the optimizer's order.
        grads: their gradients, unscaled, edited in place (never rebind ``p.grad``).
        names: their names.
        indices: their positions among all parameters of the optimizer, the key of random streams: a parameter
            keeps its index when others have no gradient in this step.
        groups: the optimizer's own group of each parameter, so that a group may override a setting.
        step: how many real steps this transform has seen before this one (0 at the first).
        optimizer: the optimizer, or ``None`` when the transform is used without one.
    """

    params: list[Tensor]
    grads: list[Tensor]
    names: list[str]
    indices: list[int]
    groups: list[dict[str, Any]]
    step: int
    optimizer: torch.optim.Optimizer | None = None


class Transform:
    """Base of all transforms.

    A transform implements :meth:`pre_step_` (``when = "pre"``: it edits gradients), :meth:`post_step_`
    (``when = "post"``: it edits parameters) or both (``when = "both"``). Both run without autograd. State
    beyond the step counter goes through :meth:`extra_state` and :meth:`load_extra_state`.

    Attributes:
        name: name in printed orders and in saved states; the class name unless a class or an instance sets
            it.
        steps: how many real steps this transform has taken part in.
        format_version: version of the saved state; raise it whenever the meaning of the state changes.
    """

    kind: ClassVar[str] = "transform"
    refuses: ClassVar[Mapping[str, str]] = {}
    when: ClassVar[Literal["pre", "post", "both"]] = "pre"
    format_version: ClassVar[int] = 1
    name: str = "Transform"
    steps: int = 0
    _owner: weakref.ref[Attachment] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.when not in {"pre", "post", "both"}:
            raise TypeError(f"{cls.__name__}.when must be 'pre', 'post' or 'both', got {cls.when!r}.")
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    def pre_step_(self, batch: StepBatch) -> None:
        """Edit ``batch.grads`` in place, before the optimizer's step."""

    def post_step_(self, batch: StepBatch) -> None:
        """Edit ``batch.params`` in place, after the optimizer's step."""

    # --- use ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_(self, params: Parameters, *, nonfinite: NonFinite = "raise") -> None:
        """Apply the transform once, by hand, and count the step.

        Call it between ``loss.backward()`` and ``optimizer.step()`` (``when = "pre"``), or after
        ``optimizer.step()`` and before ``zero_grad()`` (``when = "post"``). A transform that is attached to
        an optimizer runs by itself and must not be called by hand.

        Args:
            params: a module, a mapping of names, tensors, or (name, tensor) pairs; the position of a
                parameter is the key of its random streams, so pass all of them every time, in the same order.
            nonfinite: what to do when a gradient holds NaN or Inf; ``"skip"`` neither edits nor counts.

        Raises:
            RuntimeError: if the transform is attached to an optimizer.
            ValueError: if no parameter has a gradient.
            NonFiniteError: if a gradient holds NaN or Inf and ``nonfinite="raise"``.
        """
        if self.owner is not None:
            raise RuntimeError(
                f"{self.name}.update_: this transform is attached to an optimizer and runs in its step(). "
                "Leave the call out, or detach it with attachment.remove()."
            )
        named = _named(params)
        group: dict[str, Any] = {"params": [tensor for _, tensor in named]}
        rows = [(i, n, p) for i, (n, p) in enumerate(named) if p.grad is not None]
        if not rows:
            raise ValueError(
                f"{self.name}.update_: none of {len(named)} parameters has a gradient. "
                "Call it after loss.backward(), with the parameters of that loss."
            )
        batch = StepBatch(
            params=[p for _, _, p in rows],
            grads=[p.grad for _, _, p in rows if p.grad is not None],
            names=[n for _, n, _ in rows],
            indices=[i for i, _, _ in rows],
            groups=[group] * len(rows),
            step=self.steps,
        )
        if admit(batch.grads, batch.names, policy=nonfinite, owner=self.name, step=self.steps):
            if self.when in {"pre", "both"}:
                self.pre_step_(batch)
            if self.when in {"post", "both"}:
                self.post_step_(batch)
            self.steps += 1

    @property
    def owner(self) -> Attachment | None:
        """The attachment that this transform works for, if any."""
        return None if self._owner is None else self._owner()

    def attach(self, optimizer: torch.optim.Optimizer, **kwargs: Any) -> Attachment:
        """Run this transform in every step of ``optimizer``; see :func:`pullback.core.attachment.attach`."""
        from pullback.core.attachment import attach

        return attach(optimizer, self, **kwargs)

    # --- state ----------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """State beyond the step counter: tensors and plain Python values only."""
        return {}

    def check_extra_state(self, state: Mapping[str, Any]) -> None:
        """Check a saved :meth:`extra_state` before anything is changed: same keys, types, shapes and dtypes.

        Override it when the state's keys depend on what the transform has seen.
        """
        check_state(f"{self.name}.state", state, self.extra_state())

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over a checked :meth:`extra_state`."""

    def state_dict(self) -> dict[str, Any]:
        """The versioned state: step counter and :meth:`extra_state`."""
        return {"format_version": self.format_version, "steps": self.steps, "state": self.extra_state()}

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check a saved state without taking it over.

        Raises:
            StateError: if a key is missing, unknown or of another type, or the version is newer.
        """
        reference = {"format_version": self.format_version, "steps": 0, "state": {}}
        check_state(self.name, state, reference, version=self.format_version, open_keys=("state",))
        check_counts(self.name, state, "steps")
        self.check_extra_state(state["state"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`, or nothing of it when any part does not fit.

        Raises:
            StateError: if a key is missing, unknown or of another type, or the version is newer.
        """
        self.check_state_dict(state)
        self.load_extra_state(state["state"])
        self.steps = int(state["steps"])

    def __repr__(self) -> str:
        return f"{self.name}()"

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles belong to no optimizer."""
        return {key: value for key, value in self.__dict__.items() if key != "_owner"}


def _named(params: Parameters) -> list[tuple[str, Tensor]]:
    """Names and tensors of what the user passed; plain tensors are named by position."""
    if isinstance(params, Tensor):
        raise TypeError(
            "params must be a module, a mapping or a list of tensors, got one tensor. Pass [tensor]."
        )
    if isinstance(params, nn.Module):
        return list(params.named_parameters())
    rows: list[Any] = list(params.items() if isinstance(params, Mapping) else params)
    return [row if isinstance(row, tuple) else (f"param{i}", row) for i, row in enumerate(rows)]
