"""What the contracts need to know of this room's component."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pullback.methods.shallow import ResidualStack
from pullback.testing import Case

_stack: Any = ResidualStack  # with arguments of wrong types, which must be refused


def _perceptrons():
    return [nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 8)) for _ in range(3)]


def _layers():
    return [nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)]


def _normed():
    return [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]


def _convolutions():
    return [nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.SiLU()) for _ in range(3)]


def _images(generator, dtype):
    return (torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64).to(dtype),)


BAD = (
    lambda: ResidualStack([]),
    lambda: _stack([torch.tanh]),
    lambda: _stack(nn.Linear(8, 8)),
    lambda: _stack(_layers(), mode="deep"),
    lambda: ResidualStack(_layers(), order=3),
    lambda: ResidualStack(_layers(), branch_scale=0.0),
    lambda: ResidualStack(_layers(), branch_scale="1/N"),
    lambda: _stack(_layers(), branch=3),
    lambda: _stack(_layers(), fuse="grouped"),
    lambda: ResidualStack(_layers(), chunk=0),
    lambda: ResidualStack(_normed(), fuse="wide"),
)

CASES = tuple(
    Case(
        name=f"ResidualStack[{name}]",
        kind="layer",
        build=build,
        inputs=inputs,
        shape=lambda size: tuple(size),
        bad=bad,
    )
    for name, build, inputs, bad in (
        ("wide", lambda: ResidualStack(_layers()), None, BAD),
        ("two-products", lambda: ResidualStack(_perceptrons(), chunk=2), None, ()),
        ("images", lambda: ResidualStack(_convolutions(), branch_scale="1/sqrt(N)"), _images, ()),
        ("order-2", lambda: ResidualStack(_perceptrons(), order=2), None, ()),
        ("vmap", lambda: ResidualStack(_normed(), fuse="vmap"), None, ()),
        ("loop", lambda: ResidualStack(_normed()), None, ()),
        ("sequential", lambda: ResidualStack(_layers(), mode="sequential"), None, ()),
    )
)
