"""Cost of the reversal layer: nothing forwards, one scaled copy backwards; beside the peer's layer and parts of it."""

from __future__ import annotations

import importlib.util

import torch
from benchmarks.harness import Row, ratio
from torch import nn

from pullback.methods.dann import DomainAdversarialLoss, GradientReversal

ROWS, WIDTH, CALLS = 4096, 1024, 5


def _backward(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor):
    def call():
        for _ in range(CALLS):
            torch.autograd.grad(layer(x), x, grad)

    return call


def _forward(layer: nn.Module, x: torch.Tensor):
    def call():
        for _ in range(CALLS):
            layer(x)

    return call


class _ScaledCopy(torch.autograd.Function):
    """The least that any such layer can do: one multiplication of the gradient by a Python number."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * -0.7


class _Least(nn.Module):
    def forward(self, x):
        return _ScaledCopy.apply(x)


def _step(head: nn.Module, trunk: nn.Module, x: torch.Tensor, layer: nn.Module):
    """One forward and backward pass of trunk and head with ``layer`` in between."""

    def call():
        trunk.zero_grad()
        layer_out = layer(trunk(x))
        head(layer_out).square().mean().backward()

    return call


def ratios() -> list[Row]:
    """All rows of this benchmark."""
    x, grad = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(ROWS, WIDTH)
    ours, least = GradientReversal(0.7), _Least()
    rows = [
        Row(
            "forward + backward, 4096 x 1024",
            "one scaled copy",
            ratio(_backward(ours, x, grad), _backward(least, x, grad)),
            bound=1.25,
        )
    ]
    trunk, head = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024)), nn.Linear(1024, 1)
    batch = torch.randn(512, 256)
    rows.append(
        Row(
            "step of a perceptron with the layer",
            "nn.Identity in its place",
            ratio(_step(head, trunk, batch, ours), _step(head, trunk, batch, nn.Identity())),
            bound=1.1,
        )
    )
    forward = (
        _forward(nn.Sequential(trunk, ours), batch),
        _forward(nn.Sequential(trunk, nn.Identity()), batch),
    )
    rows.append(Row("forward of trunk and layer", "forward of the trunk", ratio(*forward), bound=1.05))
    joint, separate = (DomainAdversarialLoss(head, ours, forward=mode) for mode in ("joint", "separate"))
    a, b = (torch.randn(256, 1024, requires_grad=True) for _ in range(2))

    def loss(module):
        return lambda: [torch.autograd.grad(module(a, b), (a, b)) for _ in range(CALLS)]

    rows.append(Row("loss, joint forward", "separate forward", ratio(loss(joint), loss(separate))))
    return [*rows, _peer(x, grad, ours)]


def _peer(x: torch.Tensor, grad: torch.Tensor, ours: nn.Module) -> Row:
    what, against = "forward + backward, 4096 x 1024", "pytorch-adapt's GradientReversal"
    if importlib.util.find_spec("pytorch_adapt") is None:
        return Row(what, against, skipped="pytorch-adapt is not installed")
    from pytorch_adapt.layers import GradientReversal as Peer

    return Row(what, against, ratio(_backward(ours, x, grad), _backward(Peer(0.7), x, grad)), bound=1.25)
