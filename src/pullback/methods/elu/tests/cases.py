"""What the contracts need to know of this room's component."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pullback.methods.elu import BiasShiftProbe
from pullback.testing import Case

_probe: Any = BiasShiftProbe  # with arguments of wrong types, which must be refused


def _model(seed=0):
    with torch.random.fork_rng():  # torch's own initialisation moves the global generator
        layers = nn.Linear(8, 6), nn.Dropout(0.3), nn.ELU(), nn.Linear(6, 3)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=g))
    return nn.Sequential(*layers)


def _batch(generator, dtype):
    x = torch.randn(24, 8, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (24,), generator=generator)


def _run(component, model, batch):
    component.model = model
    return component.measure(*batch, per_unit=True)


CASES = tuple(
    Case(
        name=f"BiasShiftProbe[{name}]" if name else "BiasShiftProbe",
        kind="probe",
        build=build,
        model=_model,
        inputs=_batch,
        run=_run,
        bad=bad,
    )
    for name, build, bad in (
        (
            "",
            lambda: BiasShiftProbe(_model()),
            (
                lambda: _probe(torch.zeros(2)),
                lambda: BiasShiftProbe(nn.ReLU()),
                lambda: BiasShiftProbe(_model(), layers=("5",)),
                lambda: BiasShiftProbe(_model(), layers=("2",)),
                lambda: BiasShiftProbe(_model(), layers=()),
                lambda: BiasShiftProbe(_model(), layers="0"),
                lambda: _probe(_model(), fisher="true"),
                lambda: BiasShiftProbe(_model(), damping=-1e-3),
                lambda: BiasShiftProbe(_model(), max_rows=0),
                lambda: BiasShiftProbe(_model(), max_units=0),
                lambda: _probe(_model(), max_units=2.5),
                lambda: _probe(_model(), solver="lu"),
                lambda: BiasShiftProbe(_model(), tolerance=0.0),
                lambda: BiasShiftProbe(_model(), max_iterations=0),
                lambda: _probe(_model(), likelihood="poisson"),
                lambda: _probe(_model(), training="eval"),
                lambda: _probe(_model(), nonfinite="ignore"),
                lambda: _probe(_model(), seed=0.5),
            ),
        ),
        ("empirical", lambda: BiasShiftProbe(_model(), fisher="empirical", training=False, max_rows=10), ()),
        ("cg", lambda: BiasShiftProbe(_model(), solver="cg", max_units=None, training=True), ()),
    )
)
