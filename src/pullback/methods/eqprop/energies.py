"""Energies, costs that nudge them, and relaxation to a stationary state.

A system has states s = [s_1, ..., s_K], each [batch, ...], and an energy E(theta, x, s) for every example. With a nudge
the energy is F = E + beta C (Scellier and Bengio 2017, arXiv:1602.05179); the cost C sees
the last state alone. beta may be complex where E and C are holomorphic.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from pullback.core.checks import choice, integer, positive, shown
from pullback.core.costs import Cost, CustomCost, SquaredError, cost_of
from pullback.core.holomorphic import derivative, is_holomorphic, wide
from pullback.core.implicit import implicit_gradient

Minimizer: TypeAlias = Literal["auto", "async", "euler"]
States: TypeAlias = list[Tensor]
FAR = sys.float_info.max


class Nudge:
    """beta C: a cost, its targets [batch, n] and a strength [batch, 1] for every example, real or complex."""

    def __init__(self, cost: Cost, target: Tensor, beta: Tensor) -> None:
        self.cost, self.target, self.beta = cost, target, beta
        if isinstance(cost, SquaredError):  # beta y and 1 / (1 + beta) are the same in every step
            self.pushed, self.shrink = beta * target, 1.0 / (1.0 + beta)

    def force(self, output: Tensor) -> Tensor:
        """Beta dC/ds_K."""
        return self.beta * self.cost.pull(output, self.target)


class EnergyModel(nn.Module, ABC):
    """Base of systems with an energy: write `energy` and `shapes`, or use `EnergyFunction`.

    The last state is the output. Its force is found by autograd; `HopfieldMLP` and `HopfieldConvNet` have closed forms.

    Attributes:
        bounds: interval in which every state is held, or None.
        readout: linear map from the output to classes for the cost "cross_entropy", or None.
        closed_form: whether ``minimizer="async"`` is known.
    """

    bounds: tuple[float, float] | None = None
    closed_form: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.readout: nn.Linear | None = None

    @property
    def is_clipped(self) -> bool:
        """Whether states are held in an interval."""
        return self.bounds is not None

    @abstractmethod
    def energy(self, x: Tensor, states: States) -> Tensor:
        """E for each example [batch], of states [batch, ...]."""

    @abstractmethod
    def shapes(self, x: Tensor) -> list[tuple[int, ...]]:
        """Shape of every state of one example."""

    def forward(self, x: Tensor, states: States) -> Tensor:
        """The energy; called with other parameters by `torch.func.functional_call`."""
        return self.energy(x, states)

    def output(self, states: States) -> Tensor:
        """The last state as [batch, n]."""
        return states[-1].flatten(1)

    def prediction(self, states: States) -> Tensor:
        """What the cost judges: the output, or the logits of the read-out."""
        return self.output(states) if self.readout is None else self.readout(self.output(states))

    def initial(self, x: Tensor) -> States:
        """Zeros, or the nearest bound."""
        low, high = self.bounds or (0.0, 0.0)
        start = min(max(0.0, low), high)
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), x.dtype)
        return [x.new_full((len(x), *shape), start, dtype=dtype) for shape in self.shapes(x)]

    def admit(self, x: Tensor) -> Tensor:
        """The inputs in the dtype of the parameters.

        Raises:
            TypeError: if they are no floating tensor.
            ValueError: if the batch is empty, or wants a gradient.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x must be a floating tensor, got {shown(x)}. Convert it with .float().")
        if x.dim() < 2 or not len(x):
            raise ValueError(f"x must hold one example or more, got {shown(x)}. Leave empty batches out.")
        if x.requires_grad:
            raise ValueError(
                "x must not require a gradient, got one that does: pass x.detach(), it is clamped."
            )
        return x.to(next((p.dtype for p in self.parameters() if p.is_floating_point()), x.dtype))

    def check_nudge(self, estimator: str, beta: float, cost: Cost, minimizer: str, *, in_plane: bool) -> None:
        """Refuse what cannot work: half precision, and in networks a nudge that their layers cannot follow.

        Raises:
            TypeError: if parameters are in half precision.
        """
        del estimator, beta, cost, minimizer, in_plane
        for name, p in self.named_parameters():
            if p.dtype in {torch.float16, torch.bfloat16}:
                raise TypeError(
                    f"parameters must be float32 or float64, got {p.dtype} in {name!r}. Nudges drown in its rounding: "
                    "call model.float()."
                )

    def movable(self, states: States) -> States:
        """Where units are free to move: not at a bound."""
        low, high = self.bounds or (-math.inf, math.inf)
        return [(each > low) & (each < high) for each in states]

    def hold(self, x: Tensor) -> Any:
        """What a phase needs of the clamped input; computed once, for it does not change."""
        return x

    def repeat(self, held: Any, times: int) -> Any:
        """What was held, for ``times`` copies of the batch one after the other."""
        return held.repeat(times, *[1] * (held.dim() - 1))

    def sweep(
        self, held: Any, states: States, nudge: Nudge | None, minimizer: str, step_size: float
    ) -> States:
        """One step of the relaxation: s <- clip(s - step_size dF/ds), all states at once."""
        del minimizer
        with torch.enable_grad():
            free = [each.detach().requires_grad_() for each in states]
            forces = derivative(self.energy(held, free), free)
        if nudge is not None:
            forces[-1] = forces[-1] + nudge.force(self.output(states)).view_as(states[-1])
        new = torch._foreach_sub(states, torch._foreach_mul(forces, step_size))
        return list(new) if self.bounds is None else [each.clamp(*self.bounds) for each in new]

    def contrast(self, x: Tensor, free: States, nudged: States, weights: Tensor) -> list[Tensor | None]:
        """Re sum_p weights_p (dE/dtheta(s_p) - dE/dtheta(s_0)), the batch mean, for every parameter.

        Evaluated in float64 by autograd: the terms are nearly equal.

        Args:
            x: inputs [batch, ...].
            free: the free state s_0.
            nudged: states of all phases, one after the other: [phases * batch, ...].
            weights: [phases], real or complex.

        Returns:
            One gradient for each parameter; None where it is frozen or unused.
        """
        inputs, count = wide(x), len(x)
        call = {name: wide(each.detach()) for name, each in (*self.named_parameters(), *self.named_buffers())}
        wanted = {name: call[name].requires_grad_() for name, p in self.named_parameters() if p.requires_grad}
        each = wide(weights)
        with torch.enable_grad():
            again = inputs.repeat(len(each), *[1] * (x.dim() - 1))
            values = torch.func.functional_call(self, call, (again, [wide(s.detach()) for s in nudged]))
            total = (values.view(len(each), count).sum(1) * each).sum()
            total = total.real if total.is_complex() else total
            rest = float(each.sum().real if each.is_complex() else each.sum())
            if abs(rest) > 1e-9 * float(each.abs().sum()):
                base = torch.func.functional_call(self, call, (inputs, [wide(s.detach()) for s in free]))
                total = total - rest * base.sum()
            found = torch.autograd.grad(total / count, list(wanted.values()), allow_unused=True)
        grads = dict(zip(wanted, found, strict=True))
        named = ((name, p, grads.get(name)) for name, p in self.named_parameters())
        return [None if grad is None else grad.to(p.dtype) for _, p, grad in named]

    def exact(
        self, x: Tensor, free: States, cost: Cost, target: Tensor, steps: int, tolerance: float = FAR
    ) -> list[Tensor | None]:
        """Exact gradient of the mean cost of stationary states for every parameter: `implicit_gradient`."""
        del steps
        params = [p for p in self.parameters() if p.requires_grad]
        found = implicit_gradient(
            lambda s: self.energy(x, s),
            lambda s: cost.value(self.output(s), target),
            free, params, free=self.movable(free), tolerance=tolerance,
        )  # fmt: skip
        known = dict(zip(params, found.grads, strict=True))
        return [known.get(p) for p in self.parameters()]


class EnergyFunction(EnergyModel):
    """A system whose energy is a function of the user's own.

    Args:
        energy: ``energy(parameters, x, states) -> [batch]``: examples independent, differentiable in the states. For
            complex states (estimator "holomorphic") it must be holomorphic: no abs, no conj, no clamp.
        parameters: tensors by name; those that are `torch.nn.Parameter` stay the same objects.
        shapes: shape of every state of one example; the last one is the output.
        bounds: interval in which all states are held. Leave clamps out of the energy itself: torch's derivative of
            ``clamp`` is 0 at the bound, and a unit that starts there would never move.

    Raises:
        TypeError: if ``energy`` is no function.
        ValueError: if there is no state, or the bounds are no interval.

    Example:
        >>> weight = torch.eye(2)
        >>> def energy(p, x, states):
        ...     return 0.5 * states[0].pow(2).sum(1) - (states[0] * (x @ p["weight"])).sum(1)
        >>> model = EnergyFunction(energy, {"weight": weight}, shapes=[(2,)])
        >>> relax(model, torch.tensor([[1.0, -2.0]]), steps=60).states[0].round(decimals=3)
        tensor([[ 1., -2.]])
    """

    def __init__(
        self,
        energy: Callable[[Mapping[str, Tensor], Tensor, States], Tensor],
        parameters: Mapping[str, Tensor],
        shapes: Sequence[tuple[int, ...]],
        *,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if not callable(energy):
            raise TypeError(
                f"energy must be a function of (parameters, x, states), got {shown(energy)}. Pass one."
            )
        if not shapes:
            raise ValueError(
                f"shapes must hold the shape of one state or more, got {shapes}. Pass [(outputs,)]."
            )
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ValueError(
                f"bounds must be (low, high) with low < high, got {bounds}. Pass (0.0, 1.0), or None."
            )
        self.function, self._shapes, self.bounds = energy, [tuple(each) for each in shapes], bounds
        self.values = nn.ParameterDict()
        for name, p in parameters.items():  # one by one: a mapping as a whole would be sorted
            self.values[name] = p if isinstance(p, nn.Parameter) else nn.Parameter(p)

    def energy(self, x: Tensor, states: States) -> Tensor:
        """The user's function.

        Raises:
            ValueError: if it does not give one number for each example.
        """
        values = dict(self.values.items())
        if states[0].is_complex():  # products of real and complex tensors are not defined everywhere
            values, x = {name: p.to(states[0].dtype) for name, p in values.items()}, x.to(states[0].dtype)
        found = self.function(values, x, states)
        if found.shape != states[0].shape[:1]:
            raise ValueError(
                f"energy must return one number for each of {len(states[0])} examples, got {shown(found)}. "
                "Sum over units, not over the batch."
            )
        return found

    def shapes(self, x: Tensor) -> list[tuple[int, ...]]:
        """The shapes that were given."""
        del x
        return self._shapes


@dataclass(frozen=True)
class Relaxed:
    """States after a phase, and the root mean square change of a unit in its last step (0-dim, on the device)."""

    states: States
    residual: Tensor


def settle(
    model: EnergyModel,
    held: Any,
    states: States,
    nudge: Nudge | None,
    steps: int,
    minimizer: str,
    step_size: float,
) -> Relaxed:
    """Take ``steps`` relaxation steps; the checked and unrolled core of `relax`, differentiable if autograd is on."""
    before = states
    for _ in range(steps):
        before, states = states, model.sweep(held, states, nudge, minimizer, step_size)
    with torch.no_grad():
        change = torch._foreach_norm(torch._foreach_sub(states, before))
        units = sum(each.numel() for each in states)
        return Relaxed(states, torch.stack(change).norm() / math.sqrt(max(units, 1)))


def asymmetry(free: States, nudged: States, times: int) -> Tensor:
    """``|s_+ + s_- - 2 s_0| / |s_+ - s_-|`` of the first and the last of ``times`` phases."""
    ends = [each.view(times, len(s), *s.shape[1:]) for each, s in zip(nudged, free, strict=True)]
    first, last = ([e[i].real if e.is_complex() else e[i] for e in ends] for i in (0, -1))
    middle = torch._foreach_sub(torch._foreach_add(first, last), torch._foreach_mul(free, 2.0))
    bend, span = torch._foreach_norm(middle), torch._foreach_norm(torch._foreach_sub(first, last))
    return torch.stack(bend).norm() / torch.stack(span).norm().clamp_min(torch.finfo(free[-1].dtype).tiny)


def check_holomorphic(model: EnergyModel, cost: Cost, x: Tensor, free: States, target: Tensor) -> None:
    """An energy or a cost of the user's own must obey the Cauchy-Riemann equations for complex nudges.

    Raises:
        ValueError: if one does not.
    """
    tests: dict[str, Any] = {} if model.closed_form else {"energy": lambda s: model.energy(x, s)}
    if isinstance(cost, CustomCost):
        tests["cost"] = lambda s: cost.value(model.output(s), target)
    for name, function in tests.items():
        if not is_holomorphic(function, free):
            raise ValueError(
                f"{name} must be holomorphic for nudges in the complex plane, got one that is not. Use no abs, conj, "
                "clamp or norm, or estimator='centered'."
            )


def minimizer_of(minimizer: str, model: EnergyModel) -> str:
    """The minimiser that ``"auto"`` stands for.

    Raises:
        ValueError: if it is unknown, or has no closed form in this model.
    """
    name = choice("minimizer", minimizer, ("auto", "async", "euler"))
    if name == "async" and not model.closed_form:
        raise ValueError(
            f"minimizer must be 'euler' where layers have no closed-form minimiser, got 'async' for "
            f"{type(model).__name__}. Pass 'euler', or 'auto'."
        )
    return ("async" if model.closed_form else "euler") if name == "auto" else name


@torch.no_grad()
def relax(
    model: EnergyModel,
    x: Tensor,
    *,
    steps: int = 20,
    y: Tensor | None = None,
    beta: complex = 0.0,
    cost: str | Callable[[Tensor, Tensor], Tensor] = "mse",
    states: States | None = None,
    minimizer: Minimizer = "auto",
    step_size: float = 0.5,
) -> Relaxed:
    """Let the states settle at a minimum of E + beta C.

    Args:
        model: the system.
        x: inputs [batch, ...], clamped.
        steps: steps of Euler, or sweeps over all layers.
        y: targets, needed if ``beta`` is not 0.
        beta: strength of the nudge; complex only where the energy is holomorphic.
        cost: "mse", "cross_entropy", or ``cost(output, y) -> [batch]``.
        states: where to begin; default: ``model.initial(x)``.
        minimizer: "async" (exact minimisers of every second layer, then of the others), "euler", or "auto".
        step_size: of Euler.

    Returns:
        The states and the residual.

    Raises:
        ValueError: if an argument is out of range, or ``y`` is missing.
    """
    how, count = minimizer_of(minimizer, model), integer("steps", steps, minimum=1)
    begin, nudge = model.initial(x) if states is None else states, None
    if beta != 0:
        if y is None:
            raise ValueError(
                f"y must be given where beta is not 0, got None with beta={beta}. Pass the targets."
            )
        judge, like = cost_of(cost, model.readout), begin[-1].dtype
        target = judge.target(y, model.output(begin))
        if isinstance(beta, complex):
            like = torch.promote_types(like, torch.complex64)
            begin = [each.to(like) for each in begin]
        nudge = Nudge(judge, target, torch.full((len(x), 1), beta, dtype=like, device=x.device))
    return settle(model, model.hold(x), begin, nudge, count, how, positive("step_size", step_size))
