"""A network that predicts on a Gaussian path: its readings, its training loss, and guidance of what it predicts.

Equations after Lai et al. 2025 (arXiv:2510.21890); preconditioning after Karras et al. 2022 (arXiv:2206.00364),
classifier-free guidance after Ho and Salimans 2022, posterior sampling after Chung et al. 2023 (arXiv:2209.14687).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from pullback.core.checks import choice, finite, floating, fraction, instance, positive
from pullback.core.field_network import call_network, data_of, per_row, state_of
from pullback.core.gaussian_path import Coefficients, GaussianPath, Number
from pullback.core.prediction import (
    GaussianField,
    Prediction,
    Weight,
    Weighting,
    edm_coefficients,
    loss_weight,
    target_of,
)

Predicts: TypeAlias = Literal["eps", "x0", "score", "v", "edm", "v_angle"]


class Denoiser(nn.Module, GaussianField):
    """A user's network as a model on a path: ``model(x, t, **cond)`` is a `Prediction` with all four readings.

    The network is called as ``net(x, t, **cond)`` with states [batch, ...] and times [batch], and returns a tensor of
    the states' shape. States stay in float32 or wider, also where the network runs in half precision.

    Args:
        net: the network.
        path: the path.
        predicts: what the network's output is: "eps", "x0", "score" or "v" (the velocity alpha' x0 + sigma' eps);
            "edm": F of x0 = c_skip x + c_out F(c_in x, log(sigma / alpha) / 4); "v_angle": alpha eps - sigma x0,
            called v-prediction by Salimans and Ho and by diffusers.
        sigma_data: standard deviation of the data, for "edm".
        null: for every condition the value that means "none", for example ``{"y": 10}`` where labels are 0 to 9; a
            number or a tensor of one condition's shape. Needed by ``dropout`` and `cfg`.

    Raises:
        TypeError: if ``net`` is no module or ``path`` no path.
        ValueError: if ``predicts`` is unknown or ``sigma_data`` is not positive.
    """

    def __init__(
        self,
        net: nn.Module,
        path: GaussianPath,
        predicts: Predicts = "eps",
        *,
        sigma_data: float = 0.5,
        null: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.net = instance("net", net, nn.Module, fix="Wrap a function in a module.")
        self.path = instance("path", path, GaussianPath, fix="Use GaussianPath.cosine(), for example.")
        self.predicts: Predicts = choice("predicts", predicts, get_args(Predicts))
        self.sigma_data = positive("sigma_data", sigma_data)
        self.null = dict(null or {})

    def extra_repr(self) -> str:
        """What is shown beside the network."""
        return f"path={self.path!r}, predicts={self.predicts!r}"

    def forward(self, x: Tensor, t: Number, **cond: Any) -> Prediction:
        """The prediction at states ``x`` [batch, ...] and one time (a number or 0-dim tensor) or times [batch].

        Raises:
            TypeError: if ``x`` is no floating tensor.
            ValueError: if a time lies outside the path or ``t`` has another length than ``x``, or the network returns
                another shape.
        """
        x = state_of(x)
        at = self.path(t)
        if isinstance(t, Tensor) and t.dim() and t.shape != x.shape[:1]:
            raise ValueError(
                f"t must be one time or of shape ({len(x)},), got {tuple(t.shape)}. Give a time for each row."
            )
        return self._read(x, t, at, cond)

    def _read(self, x: Tensor, t: Number, at: Coefficients, cond: Mapping[str, Any]) -> Prediction:
        """What the network says, in the state's dtype."""
        rows = at.over(x)
        if self.predicts == "edm":
            skip, out, scale = edm_coefficients(rows, self.sigma_data)
            level = -0.25 * torch.as_tensor(at.log_snr, dtype=x.dtype, device=x.device)
            raw = call_network(self.net, x * scale, (level,), cond)
            return Prediction(x, raw * out + x * skip, "x0", rows)
        value = call_network(self.net, x, (torch.as_tensor(t, dtype=x.dtype, device=x.device),), cond)
        if self.predicts == "v_angle":  # x0 = (alpha x - sigma v) / (alpha^2 + sigma^2)
            square = rows.alpha**2 + rows.sigma**2
            return Prediction(x, x * (rows.alpha / square) - value * (rows.sigma / square), "x0", rows)
        return Prediction(x, value, self.predicts, rows)

    def loss(
        self,
        x0: Tensor,
        t: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        eps: Tensor | None = None,
        weight: Weight | Weighting = "uniform",
        dropout: float = 0.0,
        reduction: Literal["mean", "none"] = "mean",
        **cond: Any,
    ) -> Tensor:
        """Weighted squared error of the network's own output, the mean over entries and over the batch.

        E w(t) ||prediction - target||^2 with the target that belongs to ``predicts``. The four kinds have the same loss
        at a fixed predictor when the weights follow: ``||d eps||^2 = (alpha / sigma)^2 ||d x0||^2 =
        sigma^2 ||d score||^2 = (alpha / D)^2 ||d v||^2``.

        Args:
            x0: data [batch, ...].
            t: times [batch]; uniform between the path's ``first`` and ``last`` unless given.
            generator: where times, noise and dropout come from; another one on every rank.
            eps: the noise, in the shape of ``x0``, unless it is to be drawn.
            weight: "uniform": 1 in the form that the network predicts. "eps", "x0", "score", "v": 1 in that form,
                whatever the network predicts. "elbo": -d log_snr / dt in the form of eps. "edm":
                (s^2 + sd^2) / (s sd)^2 in the form of x0, with s = sigma / alpha. Or a function of `Coefficients`,
                the weight in the form of eps.
            dropout: chance of a row's conditions to be replaced by ``null``.
            reduction: "none" gives the loss of every row, [batch].
            **cond: conditions, handed to the network.

        Raises:
            ValueError: if the batch is empty, random numbers are needed and there is no generator, or dropout has no
                null values.
        """
        x0 = data_of(x0)
        choice("reduction", reduction, ("mean", "none"))
        if t is None:
            t = self.path.sample_t(len(x0), generator=_needed(generator, "t")).to(x0.device)
        if eps is None:
            given = _needed(generator, "eps")
            eps = torch.randn(x0.shape, generator=given, dtype=x0.dtype, device=given.device).to(x0.device)
        if fraction("dropout", dropout) > 0:
            cond = self._dropped(cond, len(x0), dropout, _needed(generator, "dropout"))
        at = self.path(t)
        rows = at.over(x0)
        prediction = self._read(rows.alpha * x0 + rows.sigma * eps, t, at, cond)
        target = target_of(prediction.kind, rows, x0, eps)
        error = (prediction.value - target).square().flatten(1).mean(1)
        each = error * loss_weight(at, prediction.kind, weight, self.sigma_data).to(error.dtype)
        return each.mean() if reduction == "mean" else each

    def _dropped(
        self, cond: dict[str, Any], size: int, rate: float, generator: torch.Generator
    ) -> dict[str, Any]:
        empty = self.without(cond, size)
        if not cond:
            raise ValueError(
                f"dropout must be 0 without conditions, got {rate:g}. Pass the labels, loss(x0, y=labels)."
            )
        lost = torch.rand(size, generator=generator, device=generator.device) < rate
        return {
            name: torch.where(lost.to(value.device).view(-1, *[1] * (value.dim() - 1)), empty[name], value)
            for name, value in cond.items()
        }

    def without(self, cond: Mapping[str, Any], size: int) -> dict[str, Tensor]:
        """The null value of every condition, repeated for ``size`` rows.

        Raises:
            ValueError: if a condition has no null value.
        """
        missing = sorted(set(cond) - set(self.null))
        if missing:
            raise ValueError(
                f"null must give the value that means 'none' for every condition, got none for {missing}. "
                'Write Denoiser(net, path, null={"y": 10}) and train with dropout=0.1.'
            )
        found = {}
        for name, value in cond.items():
            value = instance(name, value, Tensor, fix="Give one condition for each row.")
            one = torch.as_tensor(self.null[name], dtype=value.dtype, device=value.device)
            found[name] = one.expand(size, *value.shape[1:])
        return found


def _needed(generator: torch.Generator | None, what: str) -> torch.Generator:
    if not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator must be given where {what} is drawn, got {generator!r}. Write "
            "generator=torch.Generator(device).manual_seed(seed + rank), or pass t and eps."
        )
    return generator


class ReversedTime(nn.Module):
    """A velocity network of the other convention (data at time 1, velocity data minus noise) for a `Denoiser`.

    ``Denoiser(ReversedTime(net), GaussianPath.linear(), "v")``: the velocity at time t is minus that of ``net`` at
    1 - t. Some libraries of flow matching use that convention; nothing is guessed from a network.

    Args:
        net: called as ``net(x, 1 - t, **cond)``.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """Noise minus data."""
        return -self.net(x, 1.0 - t, **cond)


# --- guidance ---------------------------------------------------------------------------------------------------------


class Guided(GaussianField):
    """A model whose prediction is bent by a condition; made by `cfg`, `classifier_guidance`, `posterior_sampling`.

    Args:
        model: the model.
        strength: of the guidance.
        name: shown in the repr.
        rule: ``rule(model, strength, x, t, cond) -> Prediction``.
        needs_gradient: whether the rule differentiates by the states.
    """

    def __init__(
        self,
        model: GaussianField,
        strength: float,
        name: str,
        rule: Callable[[Any, float, Tensor, Number, dict[str, Any]], Prediction],
        *,
        needs_gradient: bool,
    ) -> None:
        self.model, self.path, self.strength, self.name, self._rule = model, model.path, strength, name, rule
        self.needs_gradient = needs_gradient or model.needs_gradient

    def __repr__(self) -> str:
        return f"Guided({self.name}, strength={self.strength:g})"

    def __call__(self, x: Tensor, t: Number, **cond: Any) -> Prediction:
        """The guided prediction, without a graph.

        Raises:
            RuntimeError: where a gradient is needed, under ``torch.inference_mode``.
        """
        if self.needs_gradient and torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{self.name} must run outside torch.inference_mode, got it enabled: the guidance is a gradient. "
                "Use torch.no_grad(), or nothing; samplers keep no graph."
            )
        return self._rule(self.model, self.strength, x, t, cond)


def cfg(model: Denoiser, w: float, cond: Mapping[str, Tensor]) -> Guided:
    """Classifier-free guidance, ``eps_0 + w (eps_c - eps_0)``: w = 0 unconditional, 1 conditional, > 1 sharper.

    One call of the network for both halves. Some libraries count w from the conditional model: theirs is w - 1.

    Args:
        model: a model with null values, trained with dropout of its conditions.
        w: strength.
        cond: the conditions, for example ``{"y": labels}`` with a label for each row.

    Raises:
        TypeError: if the model knows no null values.
        ValueError: if there is no condition, or no null value for one; when called, if conditions and states differ in
            their number of rows.
    """
    instance("model", model, Denoiser, fix="Guide the Denoiser itself, and that first.")
    if not cond:
        raise ValueError(
            f"cond must hold the conditions to guide to, got {cond!r}. Pass the labels, cond={{'y': labels}}."
        )
    cond = dict(cond)
    model.without(cond, 1)  # refuses now what would be refused in the first step
    return Guided(model, finite("w", w), "cfg", _ClassifierFree(cond), needs_gradient=False)


class _ClassifierFree:
    def __init__(self, cond: Mapping[str, Tensor]) -> None:
        self.cond = cond

    def __call__(self, model: Any, w: float, x: Tensor, t: Number, extra: dict[str, Any]) -> Prediction:
        for name, value in self.cond.items():
            if len(value) != len(x):
                raise ValueError(
                    f"{name} must hold one condition for each of {len(x)} states, got {len(value)}."
                )
        if w == 1.0:
            return model(x, t, **self.cond, **extra)
        empty = model.without(self.cond, len(x))
        if w == 0.0:
            return model(x, t, **empty, **extra)
        both = {name: torch.cat([empty[name], value]) for name, value in self.cond.items()}
        both |= {
            name: torch.cat([each, each]) if per_row(each, len(x)) else each for name, each in extra.items()
        }
        times = torch.cat([t, t]) if isinstance(t, Tensor) and t.dim() else t
        found = model(torch.cat([x, x]), times, **both)
        nothing, wanted = found.value.chunk(2)
        at = found.at
        if isinstance(at.alpha, Tensor) and len(at.alpha.shape) and len(at.alpha) == 2 * len(x):
            at = Coefficients(
                at.alpha[: len(x)], at.sigma[: len(x)], at.dalpha[: len(x)], at.dsigma[: len(x)]
            )
        # Affine combinations are the same in every form, so that none is converted.
        return Prediction(x, torch.lerp(nothing, wanted, w), found.kind, at)


def classifier_guidance(
    model: GaussianField, log_prob: Callable[[Tensor, Number], Tensor], w: float = 1.0
) -> Guided:
    """Guidance by a classifier of noisy states: score + w grad_x log p(c | x_t).

    With w = 1 and the true likelihood of the condition at every noise level the samples follow the posterior.

    Args:
        model: the model.
        log_prob: ``log_prob(x, t)``, log p(c | x_t) [batch] of the wanted condition for states at time t.
        w: strength.
    """

    def rule(model: Any, w: float, x: Tensor, t: Number, cond: dict[str, Any]) -> Prediction:
        found = model(x, t, **cond)
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_prob(point, t).sum(), point)
        return found.with_score_added(w * gradient)

    return Guided(model, finite("w", w), "classifier_guidance", rule, needs_gradient=True)


def posterior_sampling(
    model: GaussianField,
    operator: Callable[[Tensor], Tensor],
    y: Tensor,
    zeta: float = 1.0,
    *,
    variance: float | None = None,
) -> Guided:
    """Guidance to a measurement y = A(x0) + noise: score - zeta grad_x ||y - A(x0(x_t))||, through the network.

    Norms are taken per sample, so that the guidance of a sample does not depend on its batch.

    Args:
        model: the model.
        operator: A, differentiable, from data [batch, ...] to measurements [batch, ...].
        y: measurements [batch, ...], or [...] for all rows.
        zeta: strength.
        variance: of the measurement's noise; then the gradient is that of ||.||^2 / (2 variance), a Gaussian
            likelihood at the expected data.
    """
    floating("y", y)
    if variance is not None:
        variance = positive("variance", variance)

    def rule(model: Any, zeta: float, x: Tensor, t: Number, cond: dict[str, Any]) -> Prediction:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            found = model(point, t, **cond)
            gaps = (y - operator(found.x0)).flatten(1)
            if variance is None:
                size = torch.linalg.vector_norm(gaps, dim=1)
            else:
                size = gaps.square().sum(1) / (2.0 * variance)
            (gradient,) = torch.autograd.grad(size.sum(), point)
        plain = Prediction(x, found.value.detach(), found.kind, found.at)
        return plain.with_score_added(-zeta * gradient)

    return Guided(model, finite("zeta", zeta), "posterior_sampling", rule, needs_gradient=True)
