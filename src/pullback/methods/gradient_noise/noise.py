"""Annealed Gaussian gradient noise as a transform for any optimizer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, TypeAlias, final

import torch
from torch import Tensor

from pullback.core.checks import choice, integer, non_negative
from pullback.core.kinds import StepBatch, Transform
from pullback.core.streams import generator
from pullback.methods.gradient_noise.sampling import add_to_bucket_, buckets

Schedule: TypeAlias = Literal["annealed", "constant"] | Callable[[int], float]
Exclude: TypeAlias = Callable[[str], bool] | str | Iterable[str]

_OFF = "Use 0 to switch the noise off."
_POSITIONAL = re.compile(r"group\d+\.\d+|param\d+")


@dataclass(frozen=True)
class NoiseReport:
    """Size of the noise of one step beside the gradient it was added to (both Euclidean norms)."""

    step: int
    std: float
    noise_norm: float
    grad_norm: float

    @property
    def ratio(self) -> float:
        """Norm of the noise over norm of the gradient; infinite for a zero gradient."""
        return self.noise_norm / self.grad_norm if self.grad_norm > 0 else math.inf


@final
class GradientNoise(Transform):
    r"""Add Gaussian noise of decaying variance to every gradient before the step.

    At step t = 0, 1, ... every entry of every gradient gets an independent draw of variance
    ``eta / (1 + t) ** gamma`` (paper, section 3), in the unit of the squared gradient. A complex entry
    gets half the variance in each part; a sparse gradient gets noise on its stored values only.

    Noise is computed from (seed, step, parameters), so it is equal on all ranks, moves no global generator,
    and a resumed run goes on exactly (build it with the same settings and load the attachment's state). It
    is drawn in float32 (float64 for float64 gradients) and rounded once, after the addition. Put it after
    clipping.

    Args:
        eta: variance at step 0. 0 leaves gradients bitwise unchanged and draws nothing.
        gamma: decay exponent of ``"annealed"``; 0 is constant variance.
        schedule: ``"annealed"``, ``"constant"`` (variance ``eta`` at all steps), or a function of the
            step that gives the factor by which ``eta`` is multiplied.
        seed: stream of this noise, not the global seed.
        exclude: parameters without noise: a glob on their names, several of them, or a predicate of the name.
        record: keep both norms of the last step for `report`; they stay on the device until asked for.

    A parameter group may override two settings by the keys ``noise_eta`` and ``noise_gamma``.

    Raises:
        ValueError: if ``eta`` or ``gamma`` is negative or not finite, or ``schedule`` is unknown.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(4))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> attachment = GradientNoise(eta=0.01, seed=0).attach(optimizer)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> attachment.steps
        1
    """

    when: ClassVar[Literal["pre", "post", "both"]] = "pre"

    def __init__(
        self,
        eta: float = 0.01,
        gamma: float = 0.55,
        *,
        schedule: Schedule = "annealed",
        seed: int = 0,
        exclude: Exclude = (),
        record: bool = False,
    ) -> None:
        self.eta = non_negative("eta", eta, fix=_OFF)
        self.gamma = non_negative("gamma", gamma, fix="Use 0 for a constant variance.")
        self.schedule = (
            schedule if callable(schedule) else choice("schedule", schedule, ("annealed", "constant"))
        )
        self.seed = integer("seed", seed)
        self.exclude = (
            exclude if callable(exclude) else (exclude,) if isinstance(exclude, str) else tuple(exclude)
        )
        self.record = record
        self._last: tuple[int, float, list[Tensor], Tensor] | None = None

    # --- schedule ----------------------------------------

    def std(self, t: int | None = None, group: dict[str, Any] | None = None) -> float:
        """Standard deviation of the noise at step ``t`` (0 is the first; ``None``: the next one).

        Args:
            t: step, or ``None``.
            group: a parameter group whose ``noise_eta`` and ``noise_gamma`` are honoured.

        Returns:
            The square root of the variance, in the unit of the gradient.

        Raises:
            ValueError: if ``t`` is negative, or an override or the schedule's value is negative or not finite.
        """
        step = self.steps if t is None else integer("t", t, minimum=0)
        override = group or {}
        eta = non_negative("noise_eta", override.get("noise_eta", self.eta), fix=_OFF)
        if callable(self.schedule):
            factor = non_negative(f"schedule({step})", self.schedule(step), fix="Return a factor >= 0.")
            return math.sqrt(eta * factor)
        if self.schedule == "constant":
            return math.sqrt(eta)
        gamma = non_negative("noise_gamma", override.get("noise_gamma", self.gamma))
        return math.sqrt(eta / (1.0 + step) ** gamma)

    # --- the edit ----------------------------------------

    def pre_step_(self, batch: StepBatch) -> None:
        """Add this step's noise to ``batch.grads``, in place."""
        distinct = {id(group): group for group in batch.groups}
        by_group = {key: self.std(batch.step, group) for key, group in distinct.items()}
        stds = [by_group[id(group)] for group in batch.groups]
        if self.exclude:
            stds = [0.0 if self._excluded(name) else std for name, std in zip(batch.names, stds, strict=True)]
        found = buckets(batch.grads, stds, batch.names, batch.indices)
        before = _norm(batch.grads) if self.record else None
        squares: list[Tensor] = []
        for (device, drawn, place), targets in found.items():
            stream = generator(
                "gradient noise", self.seed, batch.step, targets[0].index, *place, device=device
            )
            square = add_to_bucket_(targets, drawn, stream, norm=self.record)
            if square is not None:
                squares.append(square)
        if before is not None:
            self._last = (batch.step, max(stds, default=0.0), squares, before)

    def _excluded(self, name: str) -> bool:
        if callable(self.exclude):
            return bool(self.exclude(name))
        if _POSITIONAL.fullmatch(name):
            raise ValueError(
                f"exclude={list(self.exclude)!r} needs parameter names, got the positional name {name!r}. "
                "Build the optimizer from model.named_parameters()."
            )
        return any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def report(self) -> NoiseReport | None:
        """Norms of noise and gradient at the last step (reads the device), or ``None`` before the first one.

        With sharded gradients call it on every rank; the noise's norm is then that of the rank's own shards.

        Raises:
            RuntimeError: if the norms are not recorded.
        """
        if not self.record:
            raise RuntimeError(
                "report needs the recorded norms, got record=False. Use GradientNoise(record=True)."
            )
        if self._last is None:
            return None
        step, std, squares, before = self._last
        noise_norm = math.sqrt(sum(float(square) for square in squares))
        gather = getattr(before, "full_tensor", None)
        return NoiseReport(step, std, noise_norm, float(before if gather is None else gather()))

    def __repr__(self) -> str:
        shown = self.schedule if isinstance(self.schedule, str) else "callable"
        return f"GradientNoise(eta={self.eta:g}, gamma={self.gamma:g}, schedule={shown!r}, seed={self.seed})"


def _norm(grads: list[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, left on the device."""
    return torch.nn.utils.get_total_norm([g.coalesce().values() if g.is_sparse else g for g in grads])
