"""Normalize-and-Project written out: loops over layers, float64, autograd on plain functions."""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm(a: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension; no gain, no offset."""
    centred = a - a.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def logits(weights: list[Tensor], bias: Tensor, x: Tensor, eps: float = 0.0) -> Tensor:
    """A ReLU perceptron with a normalisation before every nonlinearity; weights are [out, in]."""
    h = x
    for weight in weights[:-1]:
        h = torch.relu(layer_norm(h @ weight.T, eps))
    return h @ weights[-1].T + bias


def loss(weights: list[Tensor], bias: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy."""
    return -logits(weights, bias, x).log_softmax(1)[torch.arange(len(y)), y].mean()


def norm(theta: Tensor) -> float:
    """Frobenius norm as the root of the sum of all squares."""
    return sum(float(entry) ** 2 for entry in theta.reshape(-1)) ** 0.5


def project(theta: Tensor, rho: float) -> Tensor:
    """Step 3 of the algorithm: rho * theta / ||theta||_F."""
    return rho * theta / norm(theta)


def train(
    weights: list[Tensor], bias: Tensor, batches: list[tuple[Tensor, Tensor]], rate: float, how: str
) -> list[Tensor]:
    """Plain gradient descent; logits of the batch before every step.

    Args:
        weights: of all layers.
        bias: of the last layer.
        batches: inputs and labels of every step.
        rate: eta.
        how: ``"plain"``; ``"project"`` after every step all weights but the last; ``"multiply"`` instead the rate of
            each of these layers by (||theta|| / rho)^2.

    Returns:
        Logits by step.
    """
    weights = [w.clone() for w in weights]
    bias = bias.clone()
    rho = [norm(w) for w in weights]
    seen = []
    for x, y in batches:
        leaves = [t.clone().requires_grad_() for t in (*weights, bias)]
        seen.append(logits(leaves[:-1], leaves[-1], x).detach())
        grads = torch.autograd.grad(loss(leaves[:-1], leaves[-1], x, y), leaves)
        for layer, grad in enumerate(grads[:-1]):
            hidden = layer < len(weights) - 1
            factor = (norm(weights[layer]) / rho[layer]) ** 2 if how == "multiply" and hidden else 1.0
            weights[layer] = weights[layer] - rate * factor * grad
            if how == "project" and hidden:
                weights[layer] = project(weights[layer], rho[layer])
        bias = bias - rate * grads[-1]
    return seen
