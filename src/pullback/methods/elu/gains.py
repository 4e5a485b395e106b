"""Gains that keep the variance from layer to layer, the initialisation that uses them, and the paper's other units."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from pullback.core.checks import choice, instance, positive, shown
from pullback.core.layer_rows import named_layers
from pullback.core.streams import generator

Activation: TypeAlias = nn.Module | Callable[[Tensor], Tensor]
"""An elementwise function of a tensor."""

Moments: TypeAlias = tuple[float, float]
"""E f(z) and E f(z)^2."""

_REACH, _PANELS, _NODES = 12.0, 96, 16
_SELU_SCALE, _SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717


# --- the paper's other units ------------------------------------------------------------------------------------------


@final
class LReLU(nn.LeakyReLU):
    """Leaky ReLU with the paper's slope: x for x > 0, 0.1 x otherwise (torch's default is 0.01).

    Args:
        negative_slope: slope for negative inputs.
        inplace: overwrite the input.
    """

    def __init__(self, negative_slope: float = 0.1, inplace: bool = False) -> None:
        super().__init__(negative_slope, inplace)


@final
class SReLU(nn.Module):
    """Shifted ReLU, ``max(-1, x)``: as ELU(1) it saturates at -1, but at once.

    The gradient is 1 for x > -1 and 0 for x < -1; at the kink it is torch's (that of ``clamp``).

    Args:
        inplace: overwrite the input.
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        """Values of the shape of ``input``."""
        return torch.clamp_(input, min=-1.0) if self.inplace else torch.clamp(input, min=-1.0)

    def extra_repr(self) -> str:
        """Arguments as they are printed."""
        return "inplace=True" if self.inplace else ""


# --- closed forms ---------------------------------------------------------------------------------------------------


def _phi(x: float) -> float:
    """Density of the standard normal distribution."""
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _cdf(x: float) -> float:
    """Its distribution function."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _tail(x: float) -> float:
    """``exp(x^2 / 2) Phi(-x)`` without overflow."""
    return 0.5 * float(torch.special.erfcx(torch.tensor(x / math.sqrt(2), dtype=torch.float64)))


def _exponential(alpha: float, s: float, *, scale: float = 1.0, width: float = 1.0) -> Moments:
    """Of ``scale`` times x for x > 0 and alpha (exp(x / width) - 1) for x <= 0: ELU, CELU and SELU."""
    one, two = _tail(s / width), _tail(2 * s / width)
    mean = s / math.sqrt(2 * math.pi) + alpha * (one - 0.5)
    square = s * s / 2 + alpha * alpha * (two - 2 * one + 0.5)
    return scale * mean, scale * scale * square


def _two_slopes(slope: float, s: float) -> Moments:
    """Of x for x > 0 and slope x for x <= 0."""
    return (1 - slope) * s / math.sqrt(2 * math.pi), (1 + slope * slope) * s * s / 2


def _clamped(low: float, high: float, s: float) -> Moments:
    """Of x held between ``low`` and ``high``; ``high`` may be infinite."""
    a, b = low / s, high / s
    above, edge, upper = 1 - _cdf(b), _phi(b), 0.0 if math.isinf(high) else high
    b = 0.0 if math.isinf(b) else b
    mean = low * _cdf(a) + s * (_phi(a) - edge) + upper * above
    inside = 1 - above - _cdf(a) + a * _phi(a) - b * edge
    return mean, low * low * _cdf(a) + s * s * inside + upper * upper * above


def _closed_form(f: Activation, s: float) -> Moments | None:
    """Moments of the activations whose integrals are known; None for all others."""
    kind: Any = type(f)
    module: Any = f
    if kind is nn.Identity:
        return 0.0, s * s
    if kind is nn.ReLU:
        return _two_slopes(0.0, s)
    if isinstance(f, nn.LeakyReLU):
        return _two_slopes(float(module.negative_slope), s)
    if kind is nn.PReLU and module.weight.numel() == 1:
        return _two_slopes(float(module.weight.detach()), s)
    if kind is SReLU:
        return _clamped(-1.0, math.inf, s)
    if kind in (nn.Hardtanh, nn.ReLU6):
        return _clamped(float(module.min_val), float(module.max_val), s)
    if kind is nn.ELU:
        return _exponential(float(module.alpha), s)
    if kind is nn.CELU:
        return _exponential(float(module.alpha), s, width=float(module.alpha))
    if kind is nn.SELU:
        return _exponential(_SELU_ALPHA, s, scale=_SELU_SCALE)
    return None


# --- quadrature -----------------------------------------------------------------------------------------------------


@cache
def _half_line() -> tuple[Tensor, Tensor]:
    """Nodes and weights of E over the positive half-line of N(0, 1): Gauss-Legendre on panels of an eighth."""
    off = torch.arange(1, _NODES, dtype=torch.float64)
    beta = 0.5 / (1 - (2 * off) ** -2).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))  # Golub and Welsch
    width = _REACH / _PANELS
    left = torch.arange(_PANELS, dtype=torch.float64)[:, None] * width
    x = (left + (nodes + 1) * width / 2).flatten()
    weights = (vectors[0].square() * width).repeat(_PANELS)
    return x, weights * (-x * x / 2).exp() / math.sqrt(2 * math.pi)


def _integrated(f: Activation, s: float) -> Moments:
    """Both half-lines by themselves: a rule that is smooth across zero converges slowly at the kink there."""
    x, weights = _half_line()
    points = torch.cat([-s * x.flip(0), s * x])
    values = _values(f, points).to(torch.float64)
    both = torch.cat([weights.flip(0), weights])
    return float((values * both).sum()), float((values.square() * both).sum())


@torch.no_grad()
def _values(f: Activation, points: Tensor) -> Tensor:
    """``f`` at ``points``, in float64 where it can be; modules as in evaluation, so that nothing is random."""
    if isinstance(f, nn.Module):
        f = copy.deepcopy(f).to("cpu", torch.float64).eval()
    try:
        values = f(points.clone())
    except (RuntimeError, IndexError) as error:  # a layer of given width, for example
        raise ValueError(
            f"activation must map every entry by itself, got {shown(f)}, which does not take a vector of any length. "
            "Pass an elementwise function such as nn.ELU()."
        ) from error
    if not isinstance(values, Tensor) or values.shape != points.shape:
        raise ValueError(
            f"activation must map every entry by itself, got {shown(values)} for a tensor of shape "
            f"{tuple(points.shape)}. Pass an elementwise function such as nn.ELU()."
        )
    part = f(points[:7].clone())
    if not torch.allclose(part, values[:7], rtol=1e-6, atol=1e-9, equal_nan=True):
        raise ValueError(
            f"activation must map every entry by itself, got {shown(f)}, whose values depend on the other entries. "
            "Pass an elementwise function such as nn.ELU()."
        )
    return values


def activation_moments(activation: Activation, *, std: float = 1.0) -> Moments:
    """Mean and mean square of ``activation(z)`` for z ~ N(0, std^2).

    In closed form for Identity, ReLU, LeakyReLU, PReLU with one weight, SReLU, Hardtanh, ReLU6, ELU, CELU and SELU; by
    Gauss-Legendre quadrature on either half-line for everything else (error under 1e-12 where the function is smooth
    but at 0, under 1e-4 with further kinks).

    Args:
        activation: module or elementwise function; a module is read in evaluation mode, on a copy.
        std: standard deviation of the pre-activation, > 0.

    Raises:
        TypeError: if ``activation`` cannot be called or ``std`` is no number.
        ValueError: if it is not elementwise, or a moment is not finite.
    """
    s = positive("std", std)
    if not callable(activation) or isinstance(activation, type):
        raise TypeError(
            f"activation must be a module or an elementwise function, got {shown(activation)}. "
            "Pass nn.ELU(), not nn.ELU."
        )
    mean, square = _closed_form(activation, s) or _integrated(activation, s)
    if not (math.isfinite(mean) and math.isfinite(square)):
        raise ValueError(
            f"activation must have finite moments, got {mean} and {square} for {shown(activation)} at std={s}. "
            "Lower std, or use an activation that grows less."
        )
    return mean, square


def activation_gain(activation: Activation, *, std: float = 1.0, centred: bool = False) -> float:
    """Factor on ``1 / sqrt(fan_in)`` with which pre-activations of standard deviation ``std`` keep it.

    With weights ~ N(0, gain^2 / fan_in) the next pre-activation has the variance gain^2 E f(z)^2, so that the gain is
    ``std / sqrt(E f(z)^2)``: 1.41421 for ReLU (He), 1.24520 for ELU(1), 1 for SELU. ``torch.nn.init.calculate_gain``
    has no ELU.

    Args:
        activation: module or elementwise function, see `activation_moments`.
        std: standard deviation of the pre-activation.
        centred: divide by the standard deviation of f instead, which leaves its mean out (1.27085 for ELU(1)).

    Raises:
        TypeError: as `activation_moments`.
        ValueError: as `activation_moments`, and if the activation is constant.
    """
    mean, square = activation_moments(activation, std=std)
    power = square - mean * mean if centred else square
    if power <= 1e-24 * max(square, 1.0):
        raise ValueError(
            f"activation must vary with its input, got {shown(activation)} with a mean square of {power}. "
            "No gain can make up for that."
        )
    return float(std) / math.sqrt(power)


# --- initialisation -------------------------------------------------------------------------------------------------


@torch.no_grad()
def init_gain_(
    model: nn.Module,
    activation: Activation,
    *,
    mode: Literal["fan_in", "fan_out"] = "fan_in",
    layers: Iterable[str] | None = None,
    gain: float | None = None,
    seed: int = 0,
) -> int:
    """Draw the weights of linear and convolutional layers from N(0, gain^2 / fan); biases become zero.

    Numbers come from counted streams: the k-th layer gets the same standard normal draw whatever the gain, so that
    arms of a comparison start from equal draws; the global generators are not moved. All layers get the same gain, the
    first included, whose inputs are data: standardise them.

    Args:
        model: module whose layers are initialised in place.
        activation: what stands between the layers, see `activation_gain`.
        mode: ``"fan_in"`` (inputs of a unit) keeps the variance forwards, ``"fan_out"`` backwards; groups of a
            convolution are taken into account.
        layers: names of the layers, or None for every Linear, Conv1d, Conv2d and Conv3d.
        gain: use this number instead of the activation's gain, for example ``2 ** 0.5`` for He's.
        seed: of the draws.

    Returns:
        The number of weights drawn; a weight that several layers share is drawn once.

    Raises:
        TypeError: if an argument has a wrong type, or a named layer is neither linear nor convolutional.
        ValueError: if there is no such layer, a name is unknown, or a weight is parametrised or uninitialised.
    """
    instance("model", model, nn.Module)
    mode = choice("mode", mode, ("fan_in", "fan_out"))
    factor = activation_gain(activation) if gain is None else positive("gain", gain)
    found = named_layers(model, layers, fix="Initialise your own layers with activation_gain.")
    for name, layer in found.items():  # all are looked at before the first one is changed
        _plain(name, layer)
    seen: set[int] = set()
    for layer in found.values():
        weight = layer.weight
        if id(weight) not in seen:
            g = generator("init_gain", seed, len(seen))
            drawn = torch.randn(weight.shape, generator=g, dtype=torch.float32)
            weight.copy_(drawn * (factor / math.sqrt(_fan(layer, mode))))
            seen.add(id(weight))
        if layer.bias is not None:
            layer.bias.zero_()
    return len(seen)


def _fan(layer: Any, mode: str) -> int:
    """Connections of one unit forwards or backwards, at least 1."""
    weight = layer.weight
    receptive = weight[0, 0].numel() if weight.numel() else 1
    if mode == "fan_in":
        return max(1, weight.shape[1] * receptive)
    return max(1, weight.shape[0] // getattr(layer, "groups", 1) * receptive)


def _plain(name: str, layer: Any) -> None:
    if parametrize.is_parametrized(layer, "weight"):
        raise ValueError(
            f"{name or 'model'}.weight must be plain, got a parametrised one. Initialise before the parametrization."
        )
    if is_lazy(layer.weight):
        raise ValueError(f"{name or 'model'}.weight must exist, got a lazy one. Run the model once before.")
