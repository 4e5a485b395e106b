"""Equilibrium propagation: gradients from the difference of two equilibria (arXiv:1602.05179).

    dJ/dtheta = lim (1/beta) [dF/dtheta(s_beta, beta) - dF/dtheta(s_0, 0)],    F = E + beta C,

estimated with one nudge, two opposite ones, or N on a circle in the complex plane (arXiv:2209.00530).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pullback.core.checks import (
    NON_FINITE_POLICIES,
    NonFinite,
    choice,
    finite,
    instance,
    integer,
    positive,
    shown,
)
from pullback.core.costs import cost_of
from pullback.core.finite import admit
from pullback.core.gradient_check import Gradient, GradientCheck, check_gradient
from pullback.core.kinds import Learner
from pullback.core.learner_state import check_learner_state, learner_state, load_learner_state
from pullback.core.norms import total_norm
from pullback.core.nudges import nudges
from pullback.core.once import Reporter
from pullback.core.ranks import Ranks
from pullback.core.samples import SampleStore
from pullback.core.streams import generator
from pullback.methods.eqprop.energies import (
    EnergyModel,
    Minimizer,
    Nudge,
    Relaxed,
    States,
    asymmetry,
    check_holomorphic,
    minimizer_of,
    settle,
)

Estimator: TypeAlias = Literal["positive", "negative", "random_sign", "centered", "holomorphic", "implicit"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
BENT = {False: 0.8, True: 1.2}  # an asymmetry above this is reported; units at a bound move to one side only
SETTLED = 0.1  # a free residual of more than this times beta is reported
SETTLING, STILL = (
    50,
    1e-15,
)  # a check relaxes in chunks of so many steps until units change by no more than that
SMALLEST_BETA = 1e-3  # of float32 states: their rounding of 1e-7 is divided by beta


@dataclass(frozen=True)
class Outcome:
    """What one call of `EquilibriumProp.backward` found.

    Args:
        prediction: outputs, or logits of the read-out, of the free state [batch, classes].
        cost: mean cost of the free state.
        residual_free: root mean square change of a unit in the last step of the free phase.
        residual_nudged: the same of the nudged phases; NaN for "implicit".
        asymmetry: ``|s_+ + s_- - 2 s_0| / |s_+ - s_-|``: 0 where states follow the nudge linearly, 1 where only one
            of two opposite nudges moves them. NaN where none are opposite.
        skipped: whether NaN or Inf made this call leave everything as it was.
    """

    prediction: Tensor
    cost: float
    residual_free: float
    residual_nudged: float
    asymmetry: float
    skipped: bool = False


class EquilibriumProp(Learner):
    """Fill ``p.grad`` with the contrast of equilibria, for any optimizer; or learn by itself, with `step`.

    Relaxation keeps no autograd graph; memory does not depend on the number of steps. Autocast is switched off inside:
    nudges are small differences. One read by the host per call serves residuals and the test for NaN.

    Args:
        model: `HopfieldMLP`, `HopfieldConvNet`, `EnergyFunction` or your own `EnergyModel`; possibly inside
            DistributedDataParallel.
        optimizer: only needed for `step`.
        cost: "mse" for ``|s_out - y|^2 / 2``, "cross_entropy" with the read-out, or ``cost(output, y) -> [batch]``
            without parameters of its own.
        estimator: "positive" (0, b) and "negative" (0, -b): error O(b); "random_sign": one of them by chance per call,
            O(b^2) in the mean; "centered" (-b, b): O(b^2); "holomorphic": N points, O(b^N); "implicit": the exact
            gradient by recurrent back-propagation, for comparison.
        beta: strength b of the nudge.
        n_points: N of "holomorphic".
        free_steps: steps of the free phase.
        nudge_steps: steps of every nudged phase, which begins at the free state; of "implicit", of the adjoint system.
        minimizer: "async", "euler" or "auto" (async where closed forms are known).
        step_size: of Euler.
        persistent: begin the free phase of an example where it ended the last time; needs ``index``.
        nonfinite: what to do about NaN or Inf; "skip" leaves gradients, states and counters as they were.
        unsettled: what to do when the free residual is above 0.1 b, or the asymmetry above 0.8 (1.2 where states are
            clipped): "warn" (once), "raise", or "ignore".
        seed: of the random signs.
        process_group: over which gradients are averaged; "auto": that of DistributedDataParallel.

    Raises:
        TypeError: if parameters are in half precision.
        ValueError: if an argument is out of range, or does not fit the model.

    Example:
        >>> from pullback import HopfieldMLP
        >>> net = HopfieldMLP([8, 16, 2])
        >>> optimizer = torch.optim.SGD(net.layer_groups(lrs=[0.1, 0.05]))
        >>> ep = EquilibriumProp(net, beta=0.5, free_steps=20, nudge_steps=4)
        >>> out = ep.backward(torch.rand(4, 8), torch.tensor([0, 1, 1, 0]))  # instead of loss.backward()
        >>> optimizer.step()
    """

    format_version = 1

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        cost: str | Callable[[Tensor, Tensor], Tensor] = "mse",
        estimator: Estimator = "centered",
        beta: float = 0.5,
        n_points: int = 4,
        free_steps: int = 20,
        nudge_steps: int = 4,
        minimizer: Minimizer = "auto",
        step_size: float = 0.5,
        persistent: bool = False,
        nonfinite: NonFinite = "raise",
        unsettled: Literal["warn", "raise", "ignore"] = "warn",
        seed: int = 0,
        process_group: Any = "auto",
    ) -> None:
        self.ranks = Ranks(model, process_group)
        inner = getattr(model, "module", model)
        fix = "Pass HopfieldMLP(...), or an EnergyFunction for an energy of your own."
        self.model: EnergyModel = instance("model", inner, EnergyModel, fix=fix)
        self.optimizer = optimizer
        self._cost, self.cost = cost, cost_of(cost, self.model.readout)
        self.estimator: Estimator = choice("estimator", estimator, ESTIMATORS)
        self.beta = positive("beta", beta, fix="Two equal states have no difference: use 0.1 to 0.5.")
        self.n_points = integer("n_points", n_points, minimum=2)
        self.free_steps = integer("free_steps", free_steps, minimum=1)
        self.nudge_steps = integer("nudge_steps", nudge_steps, minimum=1)
        self.minimizer = minimizer_of(minimizer, self.model)
        self.step_size = positive("step_size", step_size)
        self.persistent = instance("persistent", persistent, bool)
        self.nonfinite: NonFinite = choice("nonfinite", nonfinite, NON_FINITE_POLICIES)
        self.unsettled = choice("unsettled", unsettled, ("warn", "raise", "ignore"))
        self.seed = integer("seed", seed)
        self.steps = 0
        self.store = SampleStore()
        self._say = Reporter(self.unsettled)
        self._complex_checked = False
        self.model.check_nudge(self.estimator, self.beta, self.cost, self.minimizer, in_plane=self._complex)
        single = any(p.dtype == torch.float32 for p in self.model.parameters())
        if single and self.beta < SMALLEST_BETA and self.unsettled == "warn":
            self._say(
                "beta",
                f"beta={self.beta:g} is lost in the rounding of float32 states. Use >= {SMALLEST_BETA:g}.",
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(estimator={self.estimator!r}, beta={self.beta:g}, minimizer={self.minimizer!r})"

    @property
    def _complex(self) -> bool:
        return self.estimator == "holomorphic" and self.n_points > 2

    @torch.no_grad()
    def backward(
        self, x: Tensor, y: Tensor, *, index: Tensor | None = None, weight: float | Tensor = 1.0
    ) -> Outcome:
        """Add the estimated gradient of the batch's mean cost to ``p.grad`` of every parameter.

        Args:
            x: inputs [batch, ...].
            y: class numbers [batch], or targets [batch, outputs].
            index: each example's position in the data set, int64 [batch]; needed and allowed if ``persistent``.
            weight: factor of the gradient: 1/k for k accumulated batches, ``scaler.get_scale()`` under a GradScaler.

        Returns:
            Prediction, cost and how well both phases have settled.

        Raises:
            TypeError: if ``x`` is no floating tensor.
            ValueError: if the batch is empty, shapes do not fit, or ``index`` is missing or belonged to other inputs.
            NonFiniteError: if the gradient holds NaN or Inf, and ``nonfinite="raise"``.
            RuntimeError: if a phase has not settled, and ``unsettled="raise"``.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = self.model.admit(x)
            if (index is None) == self.persistent:
                raise ValueError(
                    f"index must be given if and only if persistent=True, got {shown(index)} with persistent="
                    f"{self.persistent}. States belong to examples: pass each one's position in the data set."
                )
            begin, place = self.model.initial(x), None
            if index is not None:
                place = self.store.check(index, x)
                begin = self.store.read(place[0], begin)
            held, target = self.model.hold(x), self.cost.target(y, self.model.output(begin))
            free = settle(self.model, held, begin, None, self.free_steps, self.minimizer, self.step_size)
            grads, nudged, bend = self._gradients(x, held, free.states, target, self.nudge_steps)
            return self._finish(grads, weight, free, target, (nudged, bend), place)

    def _gradients(
        self, x: Tensor, held: Any, free: States, target: Tensor, steps: int
    ) -> tuple[list[Tensor | None], Tensor, Tensor]:
        """Gradients in the order of the parameters, residual of the nudged phases, asymmetry."""
        none = x.new_full((), math.nan)
        if self.estimator == "implicit":
            return self.model.exact(x, free, self.cost, target, steps), none, none
        sign = 1
        if self.estimator == "random_sign":
            drawn = torch.randint(2, (1,), generator=generator("eqprop-sign", self.seed, self.steps))
            sign = 2 * int(drawn) - 1
        betas, weights = nudges(self.estimator, self.beta, self.n_points, sign)
        times, count = len(betas), len(x)
        dtype = torch.promote_types(free[-1].dtype, torch.complex64) if self._complex else free[-1].dtype
        if self._complex and not self._complex_checked:
            check_holomorphic(self.model, self.cost, x, free, target)
            self._complex_checked = True
        begin = [each.repeat(times, *[1] * (each.dim() - 1)).to(dtype) for each in free]
        strengths = torch.tensor(betas, dtype=dtype, device=x.device).repeat_interleave(count)[:, None]
        goal = target.repeat(times, *[1] * (target.dim() - 1))
        nudge = Nudge(self.cost, goal, strengths)
        again = self.model.repeat(held, times)
        nudged = settle(self.model, again, begin, nudge, steps, self.minimizer, self.step_size)
        factors = torch.tensor(weights, dtype=dtype, device=x.device)
        grads = self.model.contrast(x, free, nudged.states, factors)
        share = factors.repeat_interleave(count)[:, None] * strengths / count
        own = self.cost.gradients(self.model.output(nudged.states), goal, share)
        grads = [own.get(p, g) for p, g in zip(self.model.parameters(), grads, strict=True)]
        opposite = abs(betas[0] + betas[-1]) < 1e-6 * self.beta
        return grads, nudged.residual, asymmetry(free, nudged.states, times) if opposite else none

    def _finish(
        self,
        grads: list[Tensor | None],
        weight: float | Tensor,
        free: Relaxed,
        target: Tensor,
        quality: tuple[Tensor, Tensor],
        place: tuple[Tensor, Tensor] | None,
    ) -> Outcome:
        """Average over ranks, admit, and only then change anything."""
        named = zip(self.model.named_parameters(), grads, strict=True)
        found = [(name, p, grad) for (name, p), grad in named if grad is not None]
        new, world = [grad for _, _, grad in found], self.ranks.world
        factor = weight if isinstance(weight, Tensor) else finite("weight", weight)
        if new and (world > 1 or isinstance(factor, Tensor) or factor != 1.0):
            new = list(torch._foreach_mul(new, factor / world))
        value = self.cost.value(self.model.output(free.states), target).mean()
        numbers = torch.stack([each.to(value.dtype) for each in (value, free.residual, *quality)]) / world
        self.ranks.sum_([*new, numbers])  # every rank decides alike
        norm = total_norm(new) if new else torch.zeros_like(value)
        *numbers, size = torch.cat([numbers, norm.to(value.dtype)[None]]).tolist()  # the one read of the host
        prediction = self.model.prediction(free.states)
        if not math.isfinite(size):
            names = [name for name, _, _ in found]
            if not admit(new, names, policy=self.nonfinite, owner=repr(self), step=self.steps):
                return Outcome(prediction, *numbers, skipped=True)
        self._report(numbers[1], numbers[3])
        for (_, p, _), grad in zip(found, new, strict=True):
            p.grad = grad if p.grad is None else p.grad.add_(grad)
        if place is not None:
            self.store.write(*place, free.states)
        self.steps += 1
        return Outcome(prediction, *numbers)

    def _report(self, residual: float, bend: float) -> None:
        """Say that a phase has not settled, once for each reason."""
        where, limit, most = f"{self!r}, step {self.steps}", SETTLED * self.beta, BENT[self.model.is_clipped]
        if residual > limit:
            self._say(
                "free",
                f"{where}: the free phase has not settled: residual {residual:.2g} is above {SETTLED:g} beta = "
                f"{limit:.2g}, so that the contrast holds its drift. Raise free_steps (deep networks need many), lower "
                "step_size, or use persistent=True.",
            )
        elif bend > most:  # of settled states: otherwise it is drift
            self._say(
                "branch",
                f"{where}: nudges of +beta and -beta do not follow one branch: asymmetry {bend:.2g} is above {most:g}. "
                f"Lower beta from {self.beta:g}, and look at check_gradient(x, y).",
            )

    def check_gradient(
        self,
        x: Tensor,
        y: Tensor,
        betas: Sequence[float] = (0.1, 0.05, 0.025),
        *,
        estimators: Sequence[Estimator] | None = None,
        others: Mapping[str, Callable[[float], Gradient]] | None = None,
        settled: bool = True,
    ) -> GradientCheck:
        """Errors of the estimators at several beta and their fitted orders, against the exact implicit gradient.

        All in float64, on a copy of the model; nothing is changed. `pullback.core.gradient_check.check_gradient` does
        the same for any estimators and any exact gradient.

        Args:
            x: inputs [batch, ...].
            y: targets.
            betas: nudges.
            estimators: which ones; default: all with a fixed order that the model allows.
            others: ``estimate(beta) -> gradients`` of your own, in the order of ``model.parameters()``.
            settled: relax until rounding; False: with ``free_steps`` and ``nudge_steps``, as in training.

        Raises:
            ValueError: if the free phase does not become stationary.
        """
        twin, inputs = copy.deepcopy(self.model).double(), self.model.admit(x).double()
        cost, how = cost_of(self._cost, twin.readout), (self.minimizer, self.step_size)
        with torch.no_grad():
            held, begin = twin.hold(inputs), twin.initial(inputs)
            target = cost.target(y.double() if y.is_floating_point() else y, twin.output(begin))
            phase, taken = settle(twin, held, begin, None, SETTLING, *how), SETTLING
            while float(phase.residual) > STILL and taken < 100 * SETTLING:
                phase, taken = settle(twin, held, phase.states, None, SETTLING, *how), taken + SETTLING
            still, steps = phase.states, 2 * taken if settled else self.nudge_steps
            start = still if settled else settle(twin, held, begin, None, self.free_steps, *how).states
        exact = EnergyModel.exact(twin, inputs, still, cost, target, steps, tolerance=1e-6)

        def estimate(name: Estimator, beta: float) -> list[Tensor | None]:
            ep = copy.copy(self)
            ep.model, ep.cost, ep.estimator, ep.beta = twin, cost, name, positive("betas", beta)
            with torch.no_grad():
                return ep._gradients(inputs, held, start, target, steps)[0]

        names = list(estimators or ("positive", "negative", "centered"))
        if estimators is None and getattr(twin, "is_holomorphic", self._complex):
            names.append("holomorphic")
        rows: dict[str, Callable[[float], Gradient]] = {
            choice("estimators", name, ESTIMATORS): partial(estimate, name) for name in names
        }
        return check_gradient({**rows, **(others or {})}, exact, betas)

    def step(self, batch: Any) -> dict[str, float]:
        """Learn from ``(x, y)``, or ``(index, x, y)`` if persistent, with the optimizer that was given.

        Returns:
            ``loss`` (mean cost of the free state before the update) and ``residual``.

        Raises:
            RuntimeError: if there is no optimizer.
        """
        if self.optimizer is None:
            raise RuntimeError(
                "optimizer must be given for step(), got None. Pass EquilibriumProp(model, optimizer)."
            )
        *index, x, y = batch
        self.optimizer.zero_grad()
        out = self.backward(x, y, index=index[0] if index else None)
        if not out.skipped:
            self.optimizer.step()
        return {"loss": out.cost, "residual": out.residual_free}

    @torch.no_grad()
    def predict(self, inputs: Tensor, steps: int | None = None) -> Tensor:
        """Outputs, or logits of the read-out, after a free phase of ``steps`` (default: four times ``free_steps``)."""
        count = 4 * self.free_steps if steps is None else integer("steps", steps, minimum=1)
        with torch.autocast(inputs.device.type, enabled=False):
            x, model = self.model.admit(inputs), self.model
            free = settle(model, model.hold(x), model.initial(x), None, count, self.minimizer, self.step_size)
            return model.prediction(free.states)

    def state_dict(self) -> dict[str, Any]:
        """Counter and persistent states; with an optimizer also its state and the model's (else the user's)."""
        own = {"steps": self.steps, "states": self.store.state_dict()}
        return learner_state(self.format_version, own, self.model, self.optimizer)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state, or nothing of it when a part does not fit.

        Raises:
            StateError: if a part does not fit.
        """
        own, name, parts = {"steps": 0, "states": {}}, type(self).__name__, (self.model, self.optimizer)
        check_learner_state(name, state, self.format_version, own, *parts, open_keys=("states",))
        SampleStore.check_state(f"{name}.states", state["states"])
        load_learner_state(name, state, *parts)
        self.store.load_state_dict(state["states"])
        self.steps = int(state["steps"])
