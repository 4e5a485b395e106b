"""What a diffusion model predicts at one state and time: one conditional expectation in several readings.

Noise, clean data, score and velocity are affine in each other once the state and the coefficients of the path are known
(Lai et al. 2025, arXiv:2510.21890). A `Prediction` holds the one that was computed and gives the others on demand, each
by a route that divides by no small number where there is one:

    x0 = (x - sigma eps) / alpha      eps = (x - alpha x0) / sigma      score = -eps / sigma
    v = alpha' x0 + sigma' eps        x0 = (sigma' x - sigma v) / D     eps = (alpha v - alpha' x) / D
    with D = alpha sigma' - alpha' sigma > 0; v is the velocity dx/dt of the probability flow.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pullback.core.checks import choice
from pullback.core.gaussian_path import Coefficients, GaussianPath, Number
from pullback.core.kinds.field import Field

Kind: TypeAlias = Literal["eps", "x0", "score", "v"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What can be predicted: noise, clean data, score, velocity of the probability flow."""

Weight: TypeAlias = Literal["uniform", "eps", "x0", "score", "v", "elbo", "edm"]
Weighting: TypeAlias = Callable[[Coefficients], Tensor]


@dataclass(frozen=True, eq=False)
class Prediction:
    """A prediction at the states ``x``; the readings `x0`, `eps`, `score` and `velocity` have the shape of ``x``.

    Args:
        x: states [batch, ...].
        value: what was predicted, in the shape of ``x``.
        kind: which of `KINDS` ``value`` is.
        at: the path's coefficients, numbers or tensors that multiply ``x``.
    """

    x: Tensor
    value: Tensor
    kind: Kind
    at: Coefficients

    @property
    def x0(self) -> Tensor:
        """Expected clean data.

        Raises:
            ValueError: for noise or score at alpha = 0, where the state holds no data.
        """
        at, x, value = self.at, self.x, self.value
        match self.kind:
            case "x0":
                return value
            case "eps":
                return _mix(x, 1.0 / _above_zero("alpha", at.alpha, self.kind), value, -at.sigma / at.alpha)
            case "score":
                return _mix(x, 1.0 / _above_zero("alpha", at.alpha, self.kind), value, at.sigma**2 / at.alpha)
            case _:
                d = at.determinant
                return _mix(x, at.dsigma / d, value, -at.sigma / d)

    @property
    def eps(self) -> Tensor:
        """Expected noise.

        Raises:
            ValueError: for clean data at sigma = 0, where the state holds no noise.
        """
        at, x, value = self.at, self.x, self.value
        match self.kind:
            case "eps":
                return value
            case "x0":
                return _mix(x, 1.0 / _above_zero("sigma", at.sigma, self.kind), value, -at.alpha / at.sigma)
            case "score":
                return -at.sigma * value
            case _:
                d = at.determinant
                return _mix(x, -at.dalpha / d, value, at.alpha / d)

    @property
    def score(self) -> Tensor:
        """Gradient of the log-density of the states at this time, -eps / sigma.

        Raises:
            ValueError: at sigma = 0.
        """
        if self.kind == "score":
            return self.value
        return self.eps * (-1.0 / _above_zero("sigma", self.at.sigma, self.kind))

    @property
    def velocity(self) -> Tensor:
        """dx/dt of the probability flow, alpha' x0 + sigma' eps.

        Raises:
            ValueError: for clean data at sigma = 0, and for noise or score at alpha = 0.
        """
        at, x, value = self.at, self.x, self.value
        match self.kind:
            case "v":
                return value
            case "x0":  # (sigma' x - D x0) / sigma
                sigma = _above_zero("sigma", at.sigma, self.kind)
                return _mix(x, at.dsigma / sigma, value, -at.determinant / sigma)
            case "eps":  # (alpha' x + D eps) / alpha
                alpha = _above_zero("alpha", at.alpha, self.kind)
                return _mix(x, at.dalpha / alpha, value, at.determinant / alpha)
            case _:
                alpha = _above_zero("alpha", at.alpha, self.kind)
                return _mix(x, at.dalpha / alpha, value, -at.determinant * at.sigma / alpha)

    def reading(self, kind: Kind) -> Tensor:
        """The reading named as in `KINDS`."""
        return self.velocity if kind == "v" else getattr(self, kind)

    def with_value(self, value: Tensor) -> Prediction:
        """The same state and kind with another value."""
        return Prediction(self.x, value, self.kind, self.at)

    def with_score_added(self, gradient: Tensor) -> Prediction:
        """The prediction whose score is larger by ``gradient``, in the kind that it has.

        Args:
            gradient: in the shape of ``x``; for example that of log p(y | x_t), which makes a posterior score.
        """
        return self.with_value(self.value + gradient * per_score(self.at, self.kind))


def per_score(at: Coefficients, kind: Kind) -> Any:
    """D value / d score at fixed state and time: how a change of the score reads in another kind."""
    match kind:
        case "score":
            return 1.0
        case "eps":
            return -at.sigma
        case "x0":
            return at.sigma**2 / _above_zero("alpha", at.alpha, kind)
        case _:
            return -at.determinant * at.sigma / _above_zero("alpha", at.alpha, kind)


def target_of(kind: Kind, at: Coefficients, x0: Tensor, eps: Tensor) -> Tensor:
    """What a prediction of this kind should be for one pair (x0, eps)."""
    match kind:
        case "eps":
            return eps
        case "x0":
            return x0
        case "score":
            return eps * (-1.0 / at.sigma)
        case _:
            return at.dalpha * x0 + at.dsigma * eps


def size_per(at: Coefficients, kind: str) -> Any:
    """||d eps|| / ||d kind||: one difference between predictions, measured in eps over measured in ``kind``."""
    match kind:
        case "x0":
            return at.alpha / at.sigma
        case "score":
            return at.sigma
        case "v":
            return at.alpha / at.determinant
        case _:
            return torch.ones_like(at.alpha)


def edm_coefficients(at: Coefficients, sigma_data: float) -> tuple[Any, Any, Any]:
    """c_skip, c_out and c_in of Karras et al. 2022 for a state on any path (there: x / alpha and sigma / alpha).

    x0 = c_skip x + c_out F(c_in x, .); nothing is divided by alpha, so that they hold to the end of the path.
    """
    square = at.sigma**2 + (at.alpha * sigma_data) ** 2
    root = square**0.5
    return at.alpha * sigma_data**2 / square, at.sigma * sigma_data / root, 1.0 / root


def loss_weight(at: Coefficients, kind: Kind, weight: Weight | Weighting, sigma_data: float = 0.5) -> Tensor:
    """The weight of a squared error in the form ``kind``.

    Args:
        at: coefficients at times [batch].
        kind: form in which the error is measured.
        weight: "uniform": 1 in the form ``kind``. "eps", "x0", "score", "v": 1 in that form, whatever ``kind``.
            "elbo": -d log_snr / dt in the form of eps. "edm": (s^2 + sd^2) / (s sd)^2 in the form of x0, with
            s = sigma / alpha. Or a function that gives the weight in the form of eps.
        sigma_data: standard deviation of the data, for "edm".
    """
    if callable(weight):
        return weight(at) * size_per(at, kind) ** 2
    choice("weight", weight, get_args(Weight))
    if weight == "uniform":
        return torch.ones_like(at.alpha)
    if weight == "elbo":
        return at.determinant / (at.alpha * at.sigma) * size_per(at, kind) ** 2
    if weight == "edm":
        level = at.sigma / at.alpha
        return (
            (level**2 + sigma_data**2)
            / (level * sigma_data) ** 2
            * (size_per(at, kind) / size_per(at, "x0")) ** 2
        )
    return (size_per(at, kind) / size_per(at, weight)) ** 2


def _mix(x: Tensor, a: Any, value: Tensor, b: Any) -> Tensor:
    """A x + b value."""
    if isinstance(a, Tensor):
        return (value * b).addcmul(x, a.expand_as(x) if a.dim() == 0 else a)
    return (value * b).add(x, alpha=a)


def _above_zero(name: str, value: Any, kind: str) -> Any:
    """Refuse a plain number that is zero; tensors of times give Inf instead, as division does."""
    if not isinstance(value, Tensor) and not value > 1e-12:
        fix = {
            "alpha": "Begin a little later than the end of the path (its default), or predict x0 or v.",
            "sigma": "End at the first positive time, or let sigma = 0 be the terminal state of a sampler.",
        }
        raise ValueError(
            f"{name} must be positive to convert a prediction of {kind}, got {value:g}. {fix[name]}"
        )
    return value


class GaussianField(Field):
    """Base of models that predict on a `GaussianPath`.

    ``field(x, t, **cond)`` with states [batch, ...] and one time (a number or 0-dim tensor) or times [batch] gives a
    `Prediction`. ``needs_gradient`` says that a prediction itself differentiates by ``x``.
    """

    path: GaussianPath
    needs_gradient: bool = False

    @abstractmethod
    def __call__(self, x: Tensor, t: Number, **cond: Any) -> Prediction:  # ty: ignore[incompatible-method-override]
        """The prediction at the given states and times."""
