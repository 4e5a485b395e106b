"""The state of an interrupted gradient inversion: written between two blocks, read only by the attack it belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pullback.core.inversion_descent import Descent, Trial
from pullback.core.inversion_problem import PixelProblem
from pullback.core.state import StateError, check_version

_VERSION = 1


class Journal:
    """Writes and reads the state of an attack between two blocks, and knows which attack it belongs to.

    Args:
        settings: what makes another attack of this one.
        problem: what it searches for.
    """

    def __init__(self, settings: Mapping[str, Any], problem: PixelProblem) -> None:
        self.settings, self.problem = settings, problem
        self._marks: dict[str, Any] | None = None

    @property
    def marks(self) -> dict[str, Any]:
        """What tells this attack from others; computed once, when it is first asked for."""
        if self._marks is None:
            victim, problem = self.problem.victim, self.problem
            fixed = [] if problem.labels is None else [problem.labels]
            self._marks = {
                "settings": _digest([], repr((dict(self.settings), problem.shape, problem.terms))),
                "gradients": _digest([*victim.gradients.values(), *fixed, *problem.fixed()], ""),
                "model": _digest(victim.model.state_dict().values(), ""),
                "seed": problem.seed,
            }
        return self._marks

    def write(self, trials: Sequence[Trial], descent: Descent) -> dict[str, Any]:
        """The state: tensors and plain values."""
        ended = [dict(vars(trial)) for trial in trials]
        return {"format_version": _VERSION, **self.marks, "trials": ended, "descent": descent.state()}

    def read(self, state: Mapping[str, Any]) -> tuple[list[Trial], Mapping[str, Any]]:
        """Ended trials and the state of the one that was interrupted.

        Raises:
            StateError: if the state is another attack's, or not whole.
        """
        if not isinstance(state, Mapping):
            raise StateError(
                f"resume must be a mapping, got {type(state).__name__}. Pass Progress.state_dict()."
            )
        check_version("resume", state, _VERSION)
        missing = [key for key in (*self.marks, "trials", "descent") if key not in state]
        if missing:
            raise StateError(
                f"resume must hold {missing[0]!r}, got {sorted(state)}. Pass Progress.state_dict()."
            )
        for key, mark in self.marks.items():
            if state[key] != mark:
                raise StateError(
                    f"resume must be a state of this attack, got one with other {key} ({state[key]!r}, not {mark!r}). "
                    "Give the same model, gradients, labels, settings and seed, or begin anew."
                )
        return [Trial(**trial) for trial in state["trials"]], state["descent"]


def _digest(tensors: Iterable[Any], text: str) -> str:
    found = hashlib.blake2b(text.encode(), digest_size=16)
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
