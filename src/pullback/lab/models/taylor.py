"""Value, first and second derivatives of tanh networks in one forward pass (Taylor mode).

A jet is one tensor [streams, n, features]: the value, then d first derivatives, then (order 2) d second ones. Every
layer maps jets to jets in one autograd node with its backward pass written out, so that training on a differential
equation costs a fraction of nested calls of autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pullback.core.checks import choice, floating


class Derivatives(NamedTuple):
    """A network's value and derivatives at n points: [n, out], [d, n, out], and [d, n, out] or None."""

    value: Tensor
    first: Tensor
    second: Tensor | None


@runtime_checkable
class Gated(Protocol):
    """A perceptron whose hidden layers mix two encodings of the input by ``closed + z * (open - closed)``.

    ``variant="official"``: closed is the second encoder, and every layer is gated. ``"paper"``: closed is the first
    encoder, and the first layer has no gate.
    """

    encoder_u: Any
    encoder_v: Any
    hidden: Any
    output: Any
    variant: str
    activation: Any


class _Affine(torch.autograd.Function):
    """The first layer's jet: value ``x W' + b``, slopes ``rates[j] W[:, j]`` at every point, no curvature."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, rates: Tensor, streams: int) -> Tensor:
        d = x.shape[1]
        ctx.save_for_backward(x, weight, rates)
        out = x.new_empty(streams, len(x), len(weight))
        torch.addmm(bias, x, weight.T, out=out[0])
        out[1 : 1 + d] = (weight * rates).T[:, None]
        out[1 + d :] = 0.0
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, rates = ctx.saved_tensors
        d = x.shape[1]
        back = grad[0] @ weight if ctx.needs_input_grad[0] else None
        # this way round: the product with few columns on the right is several times slower
        weights = torch.mm(x.T, grad[0]).addcmul_(grad[1 : 1 + d].sum(1), rates[:, None]).T
        return back, weights, grad[0].sum(0), None, None


class _Tanh(torch.autograd.Function):
    """Jet of ``tanh(a)`` from the jet of ``a``; a bias, if any, is added to the value first.

    With s = tanh(a) and g = 1 - s^2: first derivatives g a_j, second ones g (a_jj - 2 s a_j^2).
    """

    @staticmethod
    def forward(ctx: Any, jet: Tensor, bias: Tensor | None, d: int) -> Tensor:
        slopes, curves = jet[1 : 1 + d], jet[1 + d :]
        out = torch.empty_like(jet)
        s = torch.tanh(jet[0] if bias is None else jet[0] + bias)
        out[0] = s
        g = torch.addcmul(s.new_ones(()), s, s, value=-1)
        torch.mul(slopes, g, out=out[1 : 1 + d])
        bent = slopes
        if len(curves):
            bent = torch.addcmul(curves, slopes * slopes, s, value=-2)
            torch.mul(bent, g, out=out[1 + d :])
        ctx.save_for_backward(slopes, s, g, bent)
        ctx.d, ctx.biased = d, bias is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        slopes, s, g, bent = ctx.saved_tensors
        d = ctx.d
        by_slope, by_curve = grad[1 : 1 + d], grad[1 + d :]
        out = torch.empty_like(grad)
        through_s = slopes * by_slope
        if len(by_curve):
            torch.mul(by_curve, g, out=out[1 + d :])
            raised = slopes * by_curve
            torch.mul(torch.addcmul(by_slope, raised, s, value=-4), g, out=out[1 : 1 + d])
            through_s.addcmul_(bent, by_curve)
            total = through_s.sum(0).mul_(s).addcmul_(raised.mul_(slopes).sum(0), g)
        else:
            torch.mul(by_slope, g, out=out[1 : 1 + d])
            total = through_s.sum(0).mul_(s)
        torch.mul(torch.add(grad[0], total, alpha=-2), g, out=out[0])
        return out, out[0].sum(0) if ctx.biased else None, None


class _Gate(torch.autograd.Function):
    """Jet of ``closed + z * step`` from the jets of all three (product rule)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, step: Tensor, closed: Tensor, d: int) -> Tensor:
        ctx.save_for_backward(z, step)
        ctx.d = d
        out = torch.addcmul(closed, z, step[0])
        out[1:].addcmul_(step[1:], z[0])
        if len(z) > 1 + d:
            out[1 + d :].addcmul_(z[1 : 1 + d], step[1 : 1 + d], value=2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        z, step = ctx.saved_tensors
        return _factor(grad, step, ctx.d), _factor(grad, z, ctx.d), grad, None


def _factor(grad: Tensor, other: Tensor, d: int) -> Tensor:
    """Gradient for one factor of a product of jets, given the other factor."""
    out = grad * other[0]
    out[0].add_((grad[1:] * other[1:]).sum(0))
    if len(grad) > 1 + d:
        out[1 : 1 + d].addcmul_(grad[1 + d :], other[1 : 1 + d], value=2)
    return out


def derivatives(
    model: nn.Module,
    x: Tensor,
    *,
    order: Literal[1, 2] = 2,
    slopes: Tensor | None = None,
) -> Derivatives:
    """Value, first and pure second derivatives of a tanh network in one forward pass.

    The result can be differentiated once more, for the parameters and for ``x``: a loss on it trains as usual.

    Args:
        model: an ``nn.Sequential`` of ``nn.Linear`` and ``nn.Tanh`` in turn that ends with a linear layer, or a
            `Gated` network with ``torch.tanh``.
        x: points [n, d].
        order: highest derivative.
        slopes: derivatives of ``x`` by other coordinates, axis by axis [d], for example 1 over the deviation by which
            ``x`` was standardised; the result then holds derivatives by those coordinates. None: by ``x`` itself.

    Returns:
        The value [n, out], first derivatives [d, n, out] and second derivatives [d, n, out] (None for order 1).

    Raises:
        TypeError: if the model is of another kind, or ``x`` no floating tensor.
        ValueError: if ``x`` is not of shape [n, d], or ``order`` is neither 1 nor 2.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> value, first, second = derivatives(net, torch.zeros(5, 1))
        >>> tuple(second.shape)
        (1, 5, 1)
    """
    d = floating("x", x, ndim=2).shape[1]
    streams = 1 + choice("order", order, (1, 2)) * d
    rates = x.new_ones(d) if slopes is None else slopes

    def first(layer: nn.Linear) -> Tensor:
        bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
        return _Affine.apply(x, layer.weight, bias, rates, streams)

    # second derivatives span too many orders of magnitude for half precision, whatever surrounds the call
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(model, nn.Sequential):
            hidden, last = _plain_layers(model)
            if not hidden:
                return _split(first(last), None, d)
            jet = _Tanh.apply(first(hidden[0]), None, d)
            for layer in hidden[1:]:
                jet = _Tanh.apply(F.linear(jet, layer.weight), layer.bias, d)
        else:
            jet, last = _gated(model, first, d)
        return _split(F.linear(jet, last.weight), last.bias, d)


def _split(jet: Tensor, bias: Tensor | None, d: int) -> Derivatives:
    value, first, *second = jet.split([1, d, d] if len(jet) > 1 + d else [1, d])
    value = value[0] if bias is None else value[0] + bias
    return Derivatives(value, first, second[0] if second else None)


def _gated(model: Any, first: Callable[[nn.Linear], Tensor], d: int) -> tuple[Tensor, nn.Linear]:
    """Jet of the last hidden layer of a gated network, and its output layer."""
    if not isinstance(model, Gated):
        kind = type(model).__name__
        raise TypeError(
            f"model must be an nn.Sequential or a gated network, got {kind}. Use torch.func.hessian."
        )
    if model.activation is not torch.tanh:
        raise TypeError(
            f"model must use torch.tanh, got activation={model.activation!r}. Use torch.func.hessian."
        )
    u, v = (_Tanh.apply(first(each), None, d) for each in (model.encoder_u, model.encoder_v))
    closed, step = (v, u - v) if model.variant == "official" else (u, v - u)
    jet = u
    for number, layer in enumerate(model.hidden):
        lifted = first(layer) if number == 0 else F.linear(jet, layer.weight)
        z = _Tanh.apply(lifted, None if number == 0 else layer.bias, d)
        jet = z if number == 0 and model.variant == "paper" else _Gate.apply(z, step, closed, d)
    return jet, model.output


def _plain_layers(model: nn.Sequential) -> tuple[list[nn.Linear], nn.Linear]:
    """Hidden layers and last layer of a perceptron, after a look at its form."""
    layers = list(model.children())
    good = len(layers) % 2 == 1 and all(
        isinstance(layer, nn.Linear if at % 2 == 0 else nn.Tanh) for at, layer in enumerate(layers)
    )
    if not good:
        names = ", ".join(type(layer).__name__ for layer in layers) or "nothing"
        raise TypeError(
            f"model must be Linear, Tanh, ..., Linear in turn, got {names}. Use torch.func.hessian for others."
        )
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    return linear[:-1], linear[-1]
