"""What the contracts need to know of this room's components."""

from __future__ import annotations

from typing import Any

import torch

from pullback.core.streams import generator
from pullback.methods.eqprop import EnergyFunction, EquilibriumProp, HopfieldConvNet, HopfieldMLP
from pullback.testing import Case

_ep: Any = EquilibriumProp  # with arguments of wrong types, which must be refused


def _fixed(model):
    """The model with weights of its own, equal in every build."""
    for number, p in enumerate(model.parameters()):
        if p.dim() > 1:
            fan = p[0].numel() + p.shape[0]
            p.data.copy_(torch.randn(p.shape, generator=generator("case", 0, number)) * (2.0 / fan) ** 0.5)
        else:
            p.data.zero_()
    return model


def _learner(model, lr=0.1, **settings):
    return EquilibriumProp(
        _fixed(model), torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5), **settings
    )


def _images(generator):
    labels = torch.arange(32) % 2
    x = 0.3 * torch.rand(32, 1, 6, 6, generator=generator)
    x[labels == 0, :, :3] += 0.7
    x[labels == 1, :, 3:] += 0.7
    return x, labels


def _energy(p, x, states):
    hidden, out = states
    quadratic = 0.5 * hidden.pow(2).sum(1) + 0.5 * out.pow(2).sum(1)
    return quadratic - (hidden * (x @ p["w1"])).sum(1) - (out * (hidden @ p["w2"] + p["b"])).sum(1)


def _function():
    parameters = {"w1": torch.zeros(8, 6), "w2": torch.zeros(6, 2), "b": torch.zeros(2)}
    return EnergyFunction(_energy, parameters, [(6,), (2,)], bounds=(0.0, 1.0))


CASES = (
    Case(
        name="EquilibriumProp",
        kind="learner",
        build=lambda: _learner(HopfieldMLP([8, 12, 2])),
        graph_bytes=0,
        bad=(
            lambda: _ep(HopfieldMLP([2, 1]), beta=0.0),
            lambda: _ep(HopfieldMLP([2, 1]), beta=1.0),
            lambda: _ep(HopfieldMLP([2, 1]), cost="nll"),
            lambda: _ep(HopfieldMLP([2, 1]), cost="cross_entropy"),
            lambda: _ep(HopfieldMLP([2, 1]), estimator="holomorphic"),
            lambda: _ep(HopfieldMLP([2, 1]), n_points=1),
            lambda: _ep(HopfieldMLP([2, 1]), free_steps=0),
            lambda: _ep(HopfieldMLP([2, 1]).bfloat16()),
            lambda: _ep(torch.nn.Linear(2, 1)),
        ),
    ),
    Case(
        name="EquilibriumProp[random_sign]",
        kind="learner",
        build=lambda: _learner(
            HopfieldMLP([8, 12, 2]), estimator="random_sign", minimizer="euler", nudge_steps=8
        ),
        graph_bytes=0,
    ),
    Case(
        name="EquilibriumProp[holomorphic]",
        kind="learner",
        build=lambda: _learner(
            HopfieldMLP([8, 12], "tanh", readout=2), cost="cross_entropy", estimator="holomorphic", beta=0.2
        ),
        graph_bytes=0,
    ),
    Case(
        name="EquilibriumProp[convolutional]",
        kind="learner",
        build=lambda: _learner(HopfieldConvNet((1, 6, 6), [4], outputs=2)),
        data=_images,
    ),
    Case(
        name="EquilibriumProp[function]",
        kind="learner",
        build=lambda: _learner(_function(), lr=0.05, free_steps=20, nudge_steps=6, step_size=0.8),
        steps=20,
    ),
)
