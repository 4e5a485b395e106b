"""Sampling along a Gaussian path, and likelihood by its probability flow.

Every sampler gets a list of falling times and looks up the path's coefficients once, as plain numbers: a step is a few
tensor operations, with no read by the host. Equations: Lai et al. 2025 (arXiv:2510.21890) for the flow and its
stochastic twin; Song et al. 2021 for DDIM; Karras et al. 2022, algorithm 1, for "edm"; Lu et al. 2022
(arXiv:2211.01095) for DPM-Solver++(2M); Zhao et al. 2023 (arXiv:2302.04867) for UniPC-2 (B2(h), data prediction).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pullback.core.checks import choice, finite, floating, integer, non_negative
from pullback.core.divergence import divergence_of
from pullback.core.gaussian_path import Coefficients, Grid
from pullback.core.integrators import runge_kutta_step
from pullback.core.prediction import GaussianField
from pullback.core.streams import generator as stream

Solver: TypeAlias = Literal["ddim", "euler", "heun", "rk4", "edm", "dpmpp_2m", "unipc", "sde"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
Predict: TypeAlias = Callable[[Tensor, float], Any]
Draw: TypeAlias = Callable[[], Tensor]
States: TypeAlias = Iterator[Tensor]


def sample(
    model: GaussianField,
    shape: Sequence[int] | None = None,
    *,
    solver: Solver = "dpmpp_2m",
    steps: int = 20,
    grid: Grid | Sequence[float] = "logsnr",
    start: float | None = None,
    stop: float = 0.0,
    x: Tensor | None = None,
    eta: float = 0.0,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    trajectory: bool = False,
    cond: Mapping[str, Any] | None = None,
) -> Tensor:
    """Samples of a model, by the probability flow or its stochastic twin.

    Calls of the model for N steps: N for "ddim", "euler", "dpmpp_2m", "unipc" and "sde"; 2N for "heun" and "edm", 4N
    for "rk4", where a last step to sigma = 0 takes one call: 2N - 1 and 4N - 3. No graph is kept and the model stays in
    the mode it is in: call ``eval()`` first where it has dropout or batch normalisation.

    Args:
        model: a `Denoiser`, a guided one, or the exact model of a mixture.
        shape: of the samples, [batch, ...]; not needed with ``x``.
        solver: "ddim" (with ``eta=1`` ancestral, DDPM), "euler", "heun", "rk4" on the velocity in time, "edm" (Heun in
            sigma / alpha), "dpmpp_2m", "unipc", or "sde" (Euler-Maruyama on the reverse equation).
        steps: number of steps, where ``grid`` is a name.
        grid: "logsnr", "uniform", "karras" (see `GaussianPath.grid`), or the falling times themselves.
        start: first time; the path's ``last`` unless given.
        stop: last time; 0 is the terminal state without noise.
        x: states at the first time, [batch, ...]; noise of the path's sigma there unless given.
        eta: share of fresh noise in "ddim".
        seed: of the stream that start and steps draw from; a new one for new samples.
        device: of the samples; that of ``x`` or of the model's parameters unless given.
        dtype: of the samples without ``x``, float32 or float64. Half precision ``x`` is continued in float32.
        trajectory: return the states at all times, [times, batch, ...], instead of the last.
        cond: conditions, handed to the model.

    Returns:
        Samples in the shape asked for.

    Raises:
        TypeError: if ``x`` is no floating tensor.
        ValueError: if the grid repeats a time, rises, or leaves the path, or an argument is out of range.
        RuntimeError: under ``torch.inference_mode`` with a guidance that is a gradient.
    """
    choice("solver", solver, SOLVERS)
    times = times_of(model, grid, steps, start, stop)
    eta = non_negative("eta", eta)
    if eta and solver != "ddim":
        raise ValueError(f"eta must be 0 with solver={solver!r}, got {eta:g}. Use solver='ddim', or 'sde'.")
    x = _first_state(model, shape, x, times[0], seed, device, dtype)
    noise = stream("diffusion.steps", integer("seed", seed), device=x.device)
    at = [model.path(time) for time in times]
    given = dict(cond or {})
    with torch.no_grad():
        states = _RULES[solver](
            lambda state, time: model(state, time, **given),
            x,
            times,
            at,
            eta=eta,
            draw=lambda: torch.randn(x.shape, generator=noise, dtype=x.dtype, device=x.device),
            path=model.path,
        )
        if trajectory:
            return torch.stack([x, *states])
        for last in states:
            x = last
        return x


def times_of(
    model: GaussianField,
    grid: Grid | Sequence[float],
    steps: int,
    start: float | None = None,
    stop: float = 0.0,
) -> list[float]:
    """The falling times of a sampler, checked.

    Raises:
        ValueError: if times are fewer than two, repeat, rise, are not finite or lie outside the path.
    """
    if isinstance(grid, str):
        kind: Any = grid
        return model.path.grid(steps, kind, start=start, stop=stop)
    times = [float(time) for time in (grid.tolist() if isinstance(grid, Tensor) else grid)]
    if len(times) < 2:
        raise ValueError(f"grid must hold at least two times, got {times}. Give start and stop.")
    for time in (times[0], times[-1]):
        model.path(time)  # inside the path
    for i, (s, t) in enumerate(pairwise(times)):
        if not t < s:
            raise ValueError(
                f"grid must fall strictly from noise to data, got {s!r} and then {t!r} at positions {i} and {i + 1}. "
                "Remove repeated points (rounding makes some), or turn the grid round."
            )
    return times


def _first_state(
    model: GaussianField,
    shape: Sequence[int] | None,
    x: Tensor | None,
    start: float,
    seed: int,
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> Tensor:
    if x is not None:
        x = floating("x", x).detach()
        return x if x.dtype in (torch.float32, torch.float64) else x.float()
    if shape is None:
        raise ValueError(
            "shape must be given where x is not, got None. Write sample(model, (64, 1, 28, 28))."
        )
    choice(
        "dtype", dtype, (torch.float32, torch.float64), fix="Samplers keep their state in float32 or float64."
    )
    if device is None:
        inner = getattr(model, "model", model)
        params = inner.parameters() if isinstance(inner, torch.nn.Module) else iter(())
        device = next((p.device for p in params), torch.device("cpu"))
    drawn = stream("diffusion.start", integer("seed", seed), device=device)
    noise = torch.randn(tuple(shape), generator=drawn, device=device, dtype=dtype)
    return noise * float(model.path(start).sigma)


# --- samplers: each yields the state after every step -----------------------------------------------------------------


def _ddim(
    predict: Predict,
    x: Tensor,
    times: Sequence[float],
    at: Sequence[Coefficients],
    *,
    eta: float,
    draw: Draw,
    **_: Any,
) -> States:
    """The step b x0 + sqrt(sigma_t^2 - c^2) eps + c z with a = alpha_s, b = alpha_t and eps = (x - a x0) / sigma_s.

    c^2 = eta^2 (sigma_t / sigma_s)^2 (sigma_s^2 - (a / b)^2 sigma_t^2).
    """
    for s, (a, b) in zip(times, pairwise(at), strict=False):
        fresh = (
            eta**2 * (b.sigma / a.sigma) ** 2 * (a.sigma**2 - (a.alpha / b.alpha) ** 2 * b.sigma**2)
            if eta
            else 0.0
        )
        kept = math.sqrt(max(b.sigma**2 - fresh, 0.0)) / a.sigma
        x = torch.mul(x, kept).add_(predict(x, s).x0, alpha=b.alpha - a.alpha * kept)
        if fresh > 0.0:
            x.add_(draw(), alpha=math.sqrt(fresh))
        yield x


def _runge_kutta(method: Any) -> Callable[..., States]:
    def steps(
        predict: Predict, x: Tensor, times: Sequence[float], at: Sequence[Coefficients], **_: Any
    ) -> States:
        """On dx/dt = v; no stage stands at sigma = 0, where some predictions have no velocity."""
        for (s, t), b in zip(pairwise(times), at[1:], strict=True):
            chosen = method if b.sigma > 0.0 else "euler"
            (x,) = runge_kutta_step(lambda state, time: [predict(state[0], time).velocity], [x], s, t, chosen)
            yield x

    return steps


def _edm(predict: Predict, x: Tensor, times: Sequence[float], at: Sequence[Coefficients], **_: Any) -> States:
    """Heun on dy / d level = (y - x0) / level with y = x / alpha and level = sigma / alpha; Euler to level 0."""
    for (s, t), (a, b) in zip(pairwise(times), pairwise(at), strict=True):
        high, low = a.sigma / a.alpha, b.sigma / b.alpha
        y = x / a.alpha
        slope = (y - predict(x, s).x0) / high
        moved = torch.add(y, slope, alpha=low - high)
        if low > 0.0:
            x = moved * b.alpha
            slope = slope.add_((moved - predict(x, t).x0) / low)
            moved = torch.add(y, slope, alpha=0.5 * (low - high))
        x = moved.mul_(b.alpha)
        yield x


def _dpmpp_2m(
    predict: Predict, x: Tensor, times: Sequence[float], at: Sequence[Coefficients], **_: Any
) -> States:
    """The step (sigma_t / sigma_s) x - alpha_t (e^-h - 1) D, D = x0_s + (h / h_before) (x0_s - x0_before) / 2."""
    before: Tensor | None = None
    h_before = math.inf
    for s, (a, b) in zip(times, pairwise(at), strict=False):
        x0 = predict(x, s).x0
        h = b.log_snr - a.log_snr
        share = -b.alpha * math.expm1(-h)
        extra = 0.0 if before is None or b.sigma == 0.0 else 0.5 * h / h_before
        x = torch.mul(x, b.sigma / a.sigma).add_(x0, alpha=share * (1.0 + extra))
        if extra and before is not None:
            x.add_(before, alpha=-share * extra)
        before, h_before = x0, h
        yield x


def _unipc(
    predict: Predict, x: Tensor, times: Sequence[float], at: Sequence[Coefficients], **_: Any
) -> States:
    """Order 2 with B(h) = e^-h - 1: a predictor, one call, and a corrector of the same step with what was called.

    The first and the last step have order 1. The model is not called again at the corrected state.
    """
    before: Tensor | None = None
    h_before = math.inf
    now, last = predict(x, times[0]).x0, len(times) - 2
    for i, (a, b) in enumerate(pairwise(at)):
        h = b.log_snr - a.log_snr
        p = math.expm1(-h)
        base = torch.mul(x, b.sigma / a.sigma).add_(now, alpha=-b.alpha * p)
        ratio = -h_before / h  # of the earlier point: (lambda_before - lambda_s) / h
        older = None if before is None else before - now
        first_order = older is None or i == last
        guess = base if first_order else torch.add(base, older, alpha=-0.5 * b.alpha * p / ratio)
        if i == last:
            yield guess
            return
        following = predict(guess, times[i + 1]).x0
        if older is None:
            x = base.add_(following - now, alpha=-0.5 * b.alpha * p)
        else:
            first, second = _corrector(-h, p, ratio)
            x = base.add_(older, alpha=-b.alpha * p * first / ratio).add_(
                following - now, alpha=-b.alpha * p * second
            )
        before, now, h_before = now, following, h
        yield x


def _corrector(hh: float, p: float, r: float) -> tuple[float, float]:
    """Solve [[1, 1], [r, 1]] rho = [(p / hh - 1) / p, 2 ((p / hh - 1) / hh - 1/2) / p]."""
    one = (p / hh - 1.0) / p
    two = 2.0 * ((p / hh - 1.0) / hh - 0.5) / p
    first = (two - one) / (r - 1.0)
    return first, one - first


def _sde(
    predict: Predict, x: Tensor, times: Sequence[float], at: Sequence[Coefficients], *, draw: Draw, **_: Any
) -> States:
    """Euler-Maruyama on dx = [f x - g^2 score] dt + g dW, backwards; a last step to sigma = 0 gives alpha x0."""
    for (s, t), (a, b) in zip(pairwise(times), pairwise(at), strict=True):
        found = predict(x, s)
        if b.sigma == 0.0:
            x = found.x0 * b.alpha
        else:
            step = t - s
            x = torch.mul(x, 1.0 + a.drift * step).add_(found.score, alpha=-a.diffusion * step)
            x.add_(draw(), alpha=math.sqrt(-a.diffusion * step))
        yield x


_RULES: dict[Solver, Callable[..., States]] = {
    "ddim": _ddim,
    "euler": _runge_kutta("euler"),
    "heun": _runge_kutta("heun"),
    "rk4": _runge_kutta("rk4"),
    "edm": _edm,
    "dpmpp_2m": _dpmpp_2m,
    "unipc": _unipc,
    "sde": _sde,
}


# --- likelihood -------------------------------------------------------------------------------------------------------

EXACT_UP_TO = 16  # entries per sample up to which the divergence is exact


def log_prob(
    model: GaussianField,
    x: Tensor,
    *,
    steps: int = 100,
    solver: Literal["euler", "heun", "rk4"] = "rk4",
    grid: Grid | Sequence[float] = "logsnr",
    start: float | None = None,
    stop: float | None = None,
    divergence: Literal["auto", "exact", "hutchinson"] = "auto",
    prior: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    cond: Mapping[str, Any] | None = None,
) -> Tensor:
    """Log-density of data by the probability flow, log p(x) = log p_start(x_start) + int div v dt, in nats.

    ``x`` is taken for a state at the smallest time, where the data carry the path's least noise.

    Args:
        model: the model, whose prediction at a row must not depend on the other rows.
        x: data [batch, ...].
        steps: number of steps.
        solver: "euler" (1 evaluation a step), "heun" (2) or "rk4" (4).
        grid: a name, or falling times from noise to data.
        start: largest time; the path's ``last`` unless given.
        stop: smallest time; the path's ``first`` unless given.
        divergence: "exact": one vector-Jacobian product for every entry of a sample; "hutchinson": one, with one
            Rademacher probe that is the same at all times; "auto": exact up to 16 entries.
        prior: log-density [batch] of states at ``start``; normal with the path's sigma there unless given.
        seed: of the probe.
        cond: conditions, handed to the model.

    Returns:
        Log-densities [batch], without a graph.

    Raises:
        RuntimeError: under ``torch.inference_mode``, because the divergence is a gradient.
        ValueError: if an argument is out of range.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "log_prob must run outside torch.inference_mode, got it enabled: the divergence is a gradient. "
            "Use torch.no_grad(), or nothing; no graph is kept."
        )
    choice("solver", solver, ("euler", "heun", "rk4"))
    choice("divergence", divergence, ("auto", "exact", "hutchinson"))
    x = floating("x", x).detach()
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    stop = model.path.first if stop is None else finite("stop", stop)
    times = times_of(model, grid, steps, start, stop)[::-1]
    if not model.path(times[0]).sigma > 0:
        raise ValueError(f"stop must be a time with sigma > 0, got {times[0]:g}. Use {model.path.first:g}.")
    size = x[0].numel() if len(x) else 0
    exact = divergence == "exact" or (divergence == "auto" and size <= EXACT_UP_TO)
    probe = (
        torch.empty_like(x).bernoulli_(0.5, generator=stream("diffusion.probe", seed, device=x.device)) * 2
        - 1
    )
    given = dict(cond or {})

    def slope(state: Sequence[Tensor], time: float) -> list[Tensor]:
        with torch.enable_grad():
            point = state[0].detach().requires_grad_()
            velocity = model(point, time, **given).velocity
            rate = divergence_of(velocity, point, None if exact else probe)
        return [velocity.detach(), rate]

    state = [x, torch.zeros(len(x), dtype=x.dtype, device=x.device)]
    with torch.no_grad():
        for s, t in pairwise(times):
            state = runge_kutta_step(slope, state, s, t, solver)
        end, gained = state
        sigma = model.path(times[-1]).sigma
        if prior is None:
            normal = -0.5 * (
                (end / sigma).square().flatten(1).sum(1) + size * math.log(2 * math.pi * sigma**2)
            )
        else:
            normal = prior(end)
    return normal + gained
