"""Gaussian corruption paths ``x_t = alpha_t x_0 + sigma_t eps``: one object for coefficients, noise levels and grids.

Time runs from data (t = 0) to noise (t = end). Everything that a diffusion model is at a fixed time follows from four
numbers, alpha, sigma and their derivatives, and everything along time from ``log_snr = log(alpha / sigma)``, which
falls strictly. Notation of Lai et al. 2025 (arXiv:2510.21890).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pullback.core import gaussian_rules as rules
from pullback.core.checks import choice, finite, integer, positive

Number: TypeAlias = float | Tensor
Rule: TypeAlias = Callable[[Any, ModuleType], rules.Four]
Grid: TypeAlias = Literal["logsnr", "uniform", "karras"]
TimeSampler: TypeAlias = Literal["uniform", "logit_normal", "edm"]

_STEEPNESS = 7.0  # rho of Karras et al. 2022
_PROBES = 513  # where a user's schedule is looked at
_HALVINGS = 80  # of the bracket, when a user's schedule is inverted


@dataclass(frozen=True)
class Coefficients:
    """A path at one time, or at one time per row.

    Args:
        alpha: factor of the data.
        sigma: standard deviation of the noise.
        dalpha: derivative of alpha by time.
        dsigma: derivative of sigma by time.
    """

    alpha: Any
    sigma: Any
    dalpha: Any
    dsigma: Any

    @property
    def determinant(self) -> Any:
        """D = alpha sigma' - alpha' sigma, positive on every path."""
        return self.alpha * self.dsigma - self.dalpha * self.sigma

    @property
    def log_snr(self) -> Any:
        """log(alpha / sigma); +inf at sigma = 0 and -inf at alpha = 0."""
        if isinstance(self.alpha, Tensor):
            return self.alpha.log() - self.sigma.log()
        if not self.sigma > 0:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf

    @property
    def drift(self) -> Any:
        """F = alpha' / alpha of the forward equation dx = f x dt + g dW; needs alpha > 0."""
        return self.dalpha / self.alpha

    @property
    def diffusion(self) -> Any:
        """G squared = 2 sigma sigma' - 2 f sigma^2 = 2 sigma D / alpha; needs alpha > 0."""
        return 2.0 * self.sigma * self.determinant / self.alpha

    def over(self, x: Tensor) -> Coefficients:
        """The same coefficients, shaped to multiply ``x`` row by row and in its dtype; plain numbers stay."""
        if not isinstance(self.alpha, Tensor):
            return self
        shape = (-1, *[1] * (x.dim() - 1)) if self.alpha.dim() else ()
        four = (self.alpha, self.sigma, self.dalpha, self.dsigma)
        return Coefficients(*(each.to(x.dtype).view(shape) for each in four))


class GaussianPath:
    """The path ``x_t = alpha_t x_0 + sigma_t eps`` for t in [0, end], data at 0 and noise at the end.

    Use one of the constructors `cosine`, `linear`, `vp` and `ve`, or give two functions of your own. Calling the path
    gives its `Coefficients`.

    Args:
        alpha: ``alpha(t)``, elementwise in torch, differentiable by forward mode; >= 0.
        sigma: ``sigma(t)``, likewise; >= 0, with ``alpha / sigma`` strictly falling.
        end: the time of noise.
        first: smallest positive time that training and sampling use.
        last: largest time that training and sampling use; 0.999 end unless given, because alpha may be 0 at the end.

    Raises:
        ValueError: if the functions give no such path, or times are not ``0 < first < last <= end``.

    Example:
        >>> path = GaussianPath.linear()
        >>> path(0.25).alpha
        0.75
        >>> path(torch.tensor([0.25, 0.5])).sigma
        tensor([0.2500, 0.5000])
    """

    def __init__(
        self,
        alpha: Callable[[Tensor], Tensor],
        sigma: Callable[[Tensor], Tensor],
        *,
        end: float = 1.0,
        first: float = 1e-3,
        last: float | None = None,
    ) -> None:
        self._take("GaussianPath(...)", partial(rules.own, alpha, sigma), None, end, first, last)
        _check_rule(self)

    def _take(
        self,
        name: str,
        rule: Rule,
        inverse: Callable[[Any, ModuleType], Any] | None,
        end: float,
        first: float,
        last: float | None,
    ) -> None:
        self._name, self._rule, self._inverse = name, rule, inverse
        self.end, self.first = positive("end", end), positive("first", first)
        self.last = 0.999 * self.end if last is None else positive("last", last)
        if not self.first < self.last <= self.end:
            raise ValueError(
                f"first and last must satisfy 0 < first < last <= end = {self.end:g}, got first={self.first:g} and "
                f"last={self.last:g}. Choose times inside the path."
            )

    # --- constructors -------------------------------------------------------------------------------------------------

    @classmethod
    def _made(
        cls, name: str, rule: Rule, inverse: Any, end: float, first: float, last: float
    ) -> GaussianPath:
        path = cls.__new__(cls)
        path._take(name, rule, inverse, end, first, last)
        return path

    @classmethod
    def cosine(cls) -> GaussianPath:
        """Variance preserving: alpha = cos(pi t / 2), sigma = sin(pi t / 2), end 1."""
        return cls._made("GaussianPath.cosine()", rules.cosine, rules.cosine_time, 1.0, 1e-3, 0.999)

    @classmethod
    def linear(cls) -> GaussianPath:
        """Flow matching: alpha = 1 - t, sigma = t, end 1. The velocity is noise minus data."""
        return cls._made("GaussianPath.linear()", rules.linear, rules.linear_time, 1.0, 1e-3, 0.999)

    @classmethod
    def vp(cls, b0: float = 0.1, b1: float = 20.0) -> GaussianPath:
        """Variance preserving with a linear rate of noise b0 + (b1 - b0) t, end 1.

        Args:
            b0: rate at t = 0, > 0.
            b1: rate at t = 1, > 0.
        """
        b0, b1 = positive("b0", b0), positive("b1", b1)
        name = f"GaussianPath.vp(b0={b0:g}, b1={b1:g})"
        return cls._made(name, partial(rules.vp, b0, b1), partial(rules.vp_time, b0, b1), 1.0, 1e-3, 1.0)

    @classmethod
    def ve(cls, end: float = 80.0, first: float = 2e-3) -> GaussianPath:
        """Variance exploding, the path of EDM: alpha = 1, sigma = t.

        Args:
            end: largest noise level.
            first: smallest noise level that samplers use before 0.
        """
        return cls._made(f"GaussianPath.ve(end={end:g})", rules.ve, rules.ve_time, end, first, end)

    def within(self, first: float, last: float) -> GaussianPath:
        """The same path with other bounds for training and sampling.

        Args:
            first: smallest positive time that training and sampling use.
            last: largest time that training and sampling use.
        """
        return self._made(self._name, self._rule, self._inverse, self.end, first, last)

    # --- values -------------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return self._name

    def __call__(self, t: Number) -> Coefficients:
        """Coefficients at time ``t``.

        Args:
            t: a number, for coefficients that are numbers; or a tensor of any shape, for tensors of at least float32.

        Raises:
            TypeError: if ``t`` is no number and no floating tensor.
            ValueError: if a time is NaN or lies outside [0, end].
        """
        if not isinstance(t, Tensor):
            t = self._inside(finite("t", t))
            return Coefficients(*self._rule(t, math))
        if not t.is_floating_point():
            raise TypeError(
                f"t must be a floating tensor of times, got dtype {t.dtype}. Scale steps to [0, {self.end:g}]."
            )
        self._check_times(t)
        return Coefficients(*self._rule(t if t.dtype == torch.float64 else t.float(), torch))

    def _inside(self, t: float) -> float:
        if not 0.0 <= t <= self.end:
            raise ValueError(
                f"t must lie in [0, {self.end:g}] on {self!r}, got {t!r}. Data are at 0 and noise at {self.end:g}; "
                "for a model with data at 1 use ReversedTime."
            )
        return t

    def _check_times(self, t: Tensor) -> None:
        """On the CPU at once, elsewhere by an assertion on the device, under compilation and torch.func not at all."""
        if (
            not t.numel()
            or torch.compiler.is_compiling()
            or torch._C._functorch.is_functorch_wrapped_tensor(t)
        ):
            return
        inside = ((t >= 0) & (t <= self.end)).all()
        if t.device.type != "cpu":
            torch._assert_async(inside, f"t must lie in [0, {self.end:g}].")
        elif not bool(inside):
            wrong = t.detach()[~((t >= 0) & (t <= self.end))].flatten()[0]
            self._inside(float(wrong) if not bool(wrong.isnan()) else math.nan)

    def log_snr(self, t: Number) -> Any:
        """log(alpha_t / sigma_t), falling in t."""
        return self(t).log_snr

    def time_of(self, log_snr: Number) -> Any:
        """The time at which the log signal-to-noise ratio is ``log_snr``, inside [0, end].

        Args:
            log_snr: a number or a tensor.
        """
        if isinstance(log_snr, Tensor):
            if self._inverse is not None:
                return self._inverse(log_snr, torch).clamp(0.0, self.end)
            return self._bisected(log_snr)
        level = finite("log_snr", log_snr)
        if self._inverse is not None:
            return min(max(self._inverse(level, math), 0.0), self.end)
        return float(self._bisected(torch.tensor(level, dtype=torch.float64)))

    def _bisected(self, level: Tensor) -> Tensor:
        low, high = torch.zeros_like(level), torch.full_like(level, self.end)
        for _ in range(_HALVINGS):
            middle = 0.5 * (low + high)
            alpha, sigma, _, _ = self._rule(middle, torch)
            above = alpha > level.exp() * sigma  # still too clean: later
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return 0.5 * (low + high)

    # --- along the path -----------------------------------------------------------------------------------------------

    def corrupt(self, x0: Tensor, eps: Tensor, t: Number) -> Tensor:
        """``alpha_t x0 + sigma_t eps``.

        Args:
            x0: data [batch, ...].
            eps: noise of the same shape.
            t: one time, or times [batch].
        """
        at = self(t).over(x0)
        return at.alpha * x0 + at.sigma * eps

    def grid(
        self, steps: int, kind: Grid = "logsnr", *, start: float | None = None, stop: float = 0.0
    ) -> list[float]:
        """Falling times of a sampler: ``steps + 1`` of them, the first ``start``, the last ``stop``.

        With ``stop=0`` the kinds "logsnr" and "karras", which have no place for a noise level of 0, go to ``first`` in
        ``steps - 1`` steps and then to 0.

        Args:
            steps: number of steps.
            kind: "logsnr" equal steps of log(alpha / sigma); "uniform" equal steps of time; "karras" equal steps of
                (sigma / alpha)^(1/7) (Karras et al. 2022, equation 5).
            start: first time; `last` unless given.
            stop: last time.

        Raises:
            ValueError: if start and stop are no falling times of the path, or its noise level there is not finite.
        """
        steps = integer("steps", steps, minimum=1)
        choice("grid", kind, ("logsnr", "uniform", "karras"))
        start = self.last if start is None else self._inside(finite("start", start))
        stop = self._inside(finite("stop", stop))
        if not stop < start:
            raise ValueError(
                f"stop must be below start, got start={start:g} and stop={stop:g}. Samplers go to 0."
            )
        if kind == "uniform":
            return [start + (stop - start) * i / steps for i in range(steps)] + [stop]
        if stop > 0.0:
            return self._spaced(steps, kind, start, stop)
        if steps == 1:
            return [start, 0.0]
        if not self.first < start:
            raise ValueError(
                f"start must be above first = {self.first:g}, got {start:g}. Use grid='uniform'."
            )
        return [*self._spaced(steps - 1, kind, start, self.first), 0.0]

    def _spaced(self, steps: int, kind: Grid, start: float, stop: float) -> list[float]:
        high, low = self.log_snr(start), self.log_snr(stop)
        if not (math.isfinite(high) and math.isfinite(low)):
            raise ValueError(
                f"start and stop must have finite noise levels for grid={kind!r}, got log_snr {high:g} and {low:g}. "
                f"Start at {self.last:g}, or use grid='uniform'."
            )
        shares = [i / steps for i in range(1, steps)]
        if kind == "logsnr":
            inner = [self.time_of(high + (low - high) * share) for share in shares]
        else:
            a, b = math.exp(-high / _STEEPNESS), math.exp(-low / _STEEPNESS)
            inner = [self.time_of(-_STEEPNESS * math.log(a + (b - a) * share)) for share in shares]
        return [start, *inner, stop]

    def sample_t(
        self,
        size: int,
        *,
        generator: torch.Generator,
        how: TimeSampler = "uniform",
        mean: float | None = None,
        std: float | None = None,
    ) -> Tensor:
        """Training times [size] in [first, last], float32, on the generator's device.

        Args:
            size: how many.
            generator: where random numbers come from.
            how: "uniform"; "logit_normal": t / end is the logistic function of a normal variable; "edm":
                log(sigma / alpha) is a normal variable.
            mean: of the normal variable; 0, and -1.2 for "edm", unless given.
            std: of the normal variable; 1, and 1.2 for "edm", unless given.
        """
        choice("how", how, ("uniform", "logit_normal", "edm"))
        device = generator.device
        if how == "uniform":
            return self.first + (self.last - self.first) * torch.rand(
                size, generator=generator, device=device
            )
        default = (-1.2, 1.2) if how == "edm" else (0.0, 1.0)
        mean = default[0] if mean is None else finite("mean", mean)
        std = default[1] if std is None else positive("std", std)
        normal = mean + std * torch.randn(size, generator=generator, device=device)
        t = self.time_of(-normal) if how == "edm" else self.end * normal.sigmoid()
        return t.clamp(self.first, self.last)


def _check_rule(path: GaussianPath) -> None:
    """Look at a user's schedule at many times."""
    times = torch.linspace(path.first, path.last, _PROBES, dtype=torch.float64)
    at = Coefficients(*path._rule(times, torch))
    shapes = {tuple(each.shape) for each in (at.alpha, at.sigma, at.dalpha, at.dsigma)}
    if shapes != {tuple(times.shape)}:
        raise ValueError(
            f"alpha and sigma must be elementwise, got shapes {sorted(shapes)} for times {tuple(times.shape)}."
        )
    good = (at.alpha >= 0) & (at.sigma > 0) & (at.determinant > 0)
    if not bool(good.all()):
        where, *four = (float(each[~good][0]) for each in (times, at.alpha, at.sigma, at.determinant))
        raise ValueError(
            "alpha / sigma must fall strictly, with alpha >= 0 and sigma > 0, between first and last, got alpha = "
            f"{four[0]:.4g}, sigma = {four[1]:.4g} and alpha sigma' - alpha' sigma = {four[2]:.4g} at t = {where:.4g}. "
            f"Data are at t = 0, noise at t = {path.end:g}."
        )
