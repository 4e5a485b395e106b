"""Tensors for the tests of the Frobenius projector."""

import torch
from torch import nn


def draw(*shape, dtype=torch.float64, seed=0):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))
