"""Small victims for the tests of gradient inversion."""

import torch
from torch import nn
from torch.nn import functional

from pullback.core.streams import generator


def seeded(model, seed=0):
    """Weights that do not depend on the global generator, at the size of torch's own initialisation."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            fan = parameter.shape[1:].numel() if parameter.dim() > 1 else parameter.numel()
            drawn = torch.randn(
                parameter.shape, generator=generator("test", seed, index), dtype=torch.float64
            )
            parameter.copy_(drawn / fan**0.5)
    return model


def perceptron(dtype=torch.float64):
    return seeded(nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 4))).to(dtype)


def batch(dtype=torch.float64, size=1, features=6, classes=4):
    x = torch.rand(size, features, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return x, torch.arange(size) % classes


def shared(model, x, y, loss_fn=functional.cross_entropy):
    return torch.autograd.grad(loss_fn(model(x), y), list(model.parameters()))
