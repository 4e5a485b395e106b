"""What the contracts need to know of this room's component."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pullback.methods.layer_gradients import GradientSpectrum
from pullback.testing import Case

_spectrum: Any = GradientSpectrum  # with arguments of wrong types, which must be refused
PATTERN = r"(?P<layer>\d+)\.(?P<proj>weight)"


def _model(seed=0):
    with torch.random.fork_rng():  # torch's own initialisation moves the global generator
        layers = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 3)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=g))
    return nn.Sequential(*layers)


def _attention(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), nn.Linear(8, 3))


def _batch(generator, dtype):
    return (torch.randn(5, 8, generator=generator, dtype=torch.float64).to(dtype),)


def _sequence(generator, dtype):
    return (torch.randn(1, 5, 8, generator=generator, dtype=torch.float64).to(dtype),)


def _run(component, model, batch):
    component.model = model
    return component.measure(lambda: model(*batch).square().flatten(1).sum(1), tag="t")


def _of(**settings):
    return lambda: GradientSpectrum(_model(), PATTERN, **settings)


_BAD = (
    lambda: _spectrum(torch.zeros(2)),
    lambda: GradientSpectrum(_model()),
    lambda: GradientSpectrum(_model(), "llama"),
    lambda: _spectrum(_model(), 5),
    lambda: _spectrum(_model(), PATTERN, stats="nuclear"),
    lambda: GradientSpectrum(_model(), PATTERN, stats=()),
    lambda: GradientSpectrum(_model(), PATTERN, stats=("trace",)),
    lambda: _spectrum(_model(), PATTERN, reduction="mean"),
    lambda: _spectrum(_model(), PATTERN, splitter="qkv"),
    lambda: _spectrum(_model(), PATTERN, route="fast"),
    lambda: GradientSpectrum(_model(), PATTERN, batch_dim=-1),
    lambda: GradientSpectrum(_model(), PATTERN, loss_scale=0.0),
    lambda: GradientSpectrum(_model(), PATTERN, loss_scale=3.0),
    lambda: _spectrum(_model(), PATTERN, training="eval"),
    lambda: _spectrum(_model(), PATTERN, nonfinite="skip"),
    lambda: _spectrum(_model(), PATTERN, seed=0.5),
)

CASES = (
    *(
        Case(
            name=f"GradientSpectrum[{name}]" if name else "GradientSpectrum",
            kind="probe", build=build, model=_model, inputs=_batch, run=_run, bad=bad,
        )
        for name, build, bad in (
            ("", _of(), _BAD),
            ("train", _of(training=True, reduction="batch"), ()),
            ("dense", _of(route="dense", reduction="batch", training=None), ()),
        )
    ),
    Case(
        name="GradientSpectrum[torch]", kind="probe", build=lambda: GradientSpectrum(_attention()), model=_attention,
        inputs=_sequence, run=_run,
    ),
)  # fmt: skip
