"""Many small perceptrons of one shape trained at once: their weights are stacked, their products batched.

At these sizes calling an operation costs more than its arithmetic, so that a stack of 8 networks takes little longer
than one. Members differ in what a stacked tensor can hold: weights, inputs, labels, learning rates, signs. The
backward pass is written out for the same reason.

    stack = Stack((64, 32, 10), members=4, norm="layer")
    logits = stack.forward(x)            # [4, batch, 10]
    delta, right = cross_entropy(logits, y)
    stack.backward(delta)                # writes p.grad of every parameter
    optimizer.step()                     # StackedSGD or StackedAdam, a learning rate for each member
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

Norm = Literal["none", "layer", "rms"]
Activation = Literal["relu", "tanh", "identity"]


class Stack:
    """Perceptrons with stacked parameters: layer l has weights [members, in, out] and a bias [members, 1, out] or none.

    A hidden layer computes ``activation(norm(x @ weight + bias))``, the last one ``x @ weight + bias``. All parameters
    start at zero and have a gradient of their own, which `backward` overwrites.

    Args:
        sizes: inputs, hidden units of every layer, outputs.
        members: how many networks.
        activation: of hidden layers, and of outputs with ``output_activation``.
        norm: without gain and offset, over the units of a hidden layer; such a layer has no bias.
        bias: whether the other layers have one.
        output_activation: apply the activation to the outputs too.
        eps: added to the variance (or mean square) by the norm.
        dtype: of parameters; inputs must have the same.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        members: int,
        *,
        activation: Activation = "relu",
        norm: Norm = "none",
        bias: bool = True,
        output_activation: bool = False,
        eps: float = 1e-6,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.members, self.norm, self.activation, self.eps = members, norm, activation, eps
        self.output_activation = output_activation
        self.weights = [_parameter((members, a, b), dtype) for a, b in pairwise(sizes)]
        hidden = len(self.weights) - 1
        with_bias = [bias and (norm == "none" or layer == hidden) for layer in range(len(self.weights))]
        self.biases = [
            _parameter((members, 1, size), dtype) if wanted else None
            for size, wanted in zip(sizes[1:], with_bias, strict=True)
        ]
        self._kept: list[_Kept] = []

    def parameters(self) -> list[nn.Parameter]:
        """Weights and biases, layer by layer."""
        pairs = zip(self.weights, self.biases, strict=True)
        return [p for pair in pairs for p in pair if p is not None]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """``weight0``, ``bias0``, ``weight1``, ..."""
        rows = [("weight", self.weights), ("bias", self.biases)]
        return {f"{name}{i}": p for name, found in rows for i, p in enumerate(found) if p is not None}

    @torch.no_grad()
    def forward(self, x: Tensor, *, keep: bool = True) -> Tensor:
        """Outputs [members, batch, outputs] of inputs [members, batch, inputs], or [batch, inputs] for all members.

        Args:
            x: inputs.
            keep: remember what `backward` needs.
        """
        self._kept = []
        h = x if x.dim() == 3 else x.expand(self.members, *x.shape)
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            a = torch.bmm(h, weight) if bias is None else torch.baddbmm(bias, h, weight)
            kept = _Kept(h)
            if layer < last and self.norm != "none":
                a = self._normalised(a, kept)
            active = layer < last or self.output_activation
            h = _ACTIVATIONS[self.activation][0](a) if active else a
            kept.output = h if active else None
            if keep:
                self._kept.append(kept)
        return h

    def _normalised(self, a: Tensor, kept: _Kept) -> Tensor:
        if self.norm == "layer":
            y, mean, rstd = torch.native_layer_norm(a, a.shape[-1:], None, None, self.eps)
            kept.norm = (a, mean, rstd)
            return y
        rstd = torch.rsqrt(a.square().mean(-1, keepdim=True) + self.eps)
        y = a * rstd
        kept.norm = (y, rstd)
        return y

    @torch.no_grad()
    def backward(self, delta: Tensor) -> None:
        """Write gradients for the derivative ``delta`` [members, batch, outputs] of every member's loss by its output.

        With ``output_activation`` the derivative is that by the activated output.
        """
        for layer in range(len(self.weights) - 1, -1, -1):
            kept, weight, bias = self._kept[layer], self.weights[layer], self.biases[layer]
            if kept.output is not None:
                delta = _ACTIVATIONS[self.activation][1](delta, kept.output)
            if kept.norm is not None:
                delta = self._norm_backward(delta, kept.norm)
            torch.bmm(kept.x.transpose(1, 2), delta, out=_grad(weight))
            if bias is not None:
                torch.sum(delta, 1, keepdim=True, out=_grad(bias))
            if layer:
                delta = torch.bmm(delta, weight.transpose(1, 2))

    def _norm_backward(self, delta: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        if self.norm == "layer":
            a, mean, rstd = kept
            mask = [True, False, False]
            return torch.ops.aten.native_layer_norm_backward(
                delta, a, a.shape[-1:], mean, rstd, None, None, mask
            )[0]
        y, rstd = kept
        return (delta - y * (delta * y).mean(-1, keepdim=True)) * rstd


class _Kept:
    """What one layer's backward pass needs."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.norm: tuple[Tensor, ...] | None = None
        self.output: Tensor | None = None


_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "relu": (torch.relu, lambda delta, h: torch.ops.aten.threshold_backward(delta, h, 0)),
    "tanh": (torch.tanh, lambda delta, h: torch.ops.aten.tanh_backward(delta, h)),
    "identity": (lambda a: a, lambda delta, _: delta),
}


def _parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    return parameter


def _grad(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:  # zero_grad(set_to_none=True)
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


@torch.no_grad()
def cross_entropy(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Derivative of every member's mean cross-entropy by its logits, and its share of right answers.

    Args:
        logits: [members, batch, classes].
        y: labels [batch], the same for all members.

    Returns:
        The derivative [members, batch, classes], and accuracies [members].
    """
    right = (logits.argmax(-1) == y).to(logits.dtype).mean(1)
    delta = torch.softmax(logits, -1)
    delta[:, torch.arange(len(y)), y] -= 1.0
    return delta.div_(len(y)), right


# --- optimizers ---------------------------------------------------------------------------------------------


class _Stacked(torch.optim.Optimizer):
    """Optimizer over stacked parameters with a learning rate for every member.

    ``factor`` scales all rates (a schedule's place); ``layer_rates[p]`` ([members]) scales those of one parameter.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: Sequence[float] | Tensor, **defaults: Any) -> None:
        self.layer_rates: dict[Tensor, Tensor] = {}
        self.factor = 1.0
        super().__init__(params, {"lr": torch.as_tensor(lr, dtype=torch.float64), **defaults})

    def _rate(self, p: Tensor, lr: Tensor) -> Tensor:
        rate = lr.to(p.dtype) * self.factor
        if p in self.layer_rates:
            rate = rate * self.layer_rates[p]
        return rate.view(-1, *[1] * (p.dim() - 1))


class StackedSGD(_Stacked):
    """Plain gradient descent, ``p <- p - lr * grad`` with a rate [members]."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # ty: ignore[incompatible-method-override]
        """Update every parameter that has a gradient."""
        del closure
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.addcmul_(p.grad, self._rate(p, group["lr"]), value=-1.0)


class StackedAdam(_Stacked):
    """Adam (Kingma and Ba 2015, algorithm 1) with a rate [members]."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: Sequence[float] | Tensor,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, lr, betas=betas, eps=eps)
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # ty: ignore[incompatible-method-override]
        """Update every parameter that has a gradient."""
        del closure
        self.count += 1
        for group in self.param_groups:
            first, second = group["betas"]
            correction = 1 - first**self.count, (1 - second**self.count) ** 0.5
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
                mean = state["mean"].lerp_(p.grad, 1 - first)
                square = state["square"].mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
                scale = square.sqrt().div_(correction[1]).add_(group["eps"])
                update = mean.div(scale).mul_(self._rate(p, group["lr"]))
                p.sub_(update, alpha=1 / correction[0])
