"""The components of the room, as their contract needs them."""

from __future__ import annotations

import torch
from torch import nn

from pullback.methods.nap import Project
from pullback.testing import Case


def _filled(model: nn.Module) -> nn.Module:
    """Weights that draw on no generator."""
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(torch.linspace(-0.7, 0.9, p.numel()).roll(3 * number + 1).sin().view_as(p))
    return model


def network(*, affine: bool = False) -> nn.Module:
    """Two normalised layers and an output layer on 8 features."""
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(
            nn.Linear(8, 6, bias=False),
            nn.LayerNorm(6, elementwise_affine=affine),
            nn.ReLU(),
            nn.Linear(6, 6),
            nn.LayerNorm(6, elementwise_affine=affine),
            nn.ReLU(),
            nn.Linear(6, 3),
        )
    return _filled(model)


def affine_network() -> nn.Module:
    """The same with gains and offsets."""
    return network(affine=True)


_REFUSED = {"odd_parameters": "projects the layers of the model that it was made from"}

CASES: tuple[Case, ...] = (
    Case(
        name="Project",
        kind="transform",
        model=network,
        build=lambda: Project(network(), weight_decay="allow"),
        neutral=lambda: Project(network(), every=None, weight_decay="allow"),
        bad=(
            lambda: Project(network(), every=0),
            lambda: Project(network(), per="column"),  # ty: ignore[invalid-argument-type]
            lambda: Project(network(), norm="spectral"),  # ty: ignore[invalid-argument-type]
            lambda: Project(network(), affine="project"),  # ty: ignore[invalid-argument-type]
            lambda: Project(network(), affine="decay", affine_decay=1.5),
            lambda: Project(network(), layers=["6"]),
        ),
        refuses=_REFUSED,
    ),
    Case(
        name="Project[homogeneous, every=2]",
        kind="transform",
        model=affine_network,
        build=lambda: Project(affine_network(), affine="homogeneous", every=2, weight_decay="allow"),
        neutral=lambda: Project(affine_network(), affine="homogeneous", every=None, weight_decay="allow"),
        refuses=_REFUSED,
    ),
    Case(
        name="Project[row, decay]",
        kind="transform",
        model=affine_network,
        build=lambda: Project(affine_network(), per="row", affine="decay", weight_decay="allow"),
        neutral=lambda: Project(
            affine_network(), per="row", affine="decay", every=None, weight_decay="allow"
        ),
        refuses=_REFUSED,
    ),
)
