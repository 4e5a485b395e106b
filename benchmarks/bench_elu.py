"""Cost of the bias-shift probe in forward and backward passes of the model, and of ELU beside ReLU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.harness import Row, seconds
from torch import nn
from torch.nn import functional

from pullback.methods.elu import BiasShiftProbe, init_gain_

IMAGES, UNITS, LAYERS = 1024, 128, 8
TRAINED = 60  # steps before the measurement: derivatives are then as uneven as in practice


def network(activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Eight layers of 128 units and a softmax layer."""
    layers = [each for _ in range(LAYERS) for each in (nn.Linear(UNITS, UNITS), activation())]
    model = nn.Sequential(*layers, nn.Linear(UNITS, 10))
    init_gain_(model, activation())
    return model


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of 128 entries and labels that a small network can learn."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(IMAGES, UNITS, generator=g).abs()
    return x, (x @ torch.randn(UNITS, 10, generator=g)).argmax(1)


def ratio_to(
    passes: Callable[[], object], what: dict[str, Callable[[], object]], repeats: int
) -> dict[str, float]:
    """Median ratios of processor time, repetitions interleaved."""
    taken = seconds({"pass": passes, **what}, repeats=repeats, clock=time.process_time)
    return {
        name: statistics.median(a / b for a, b in zip(taken[name], taken["pass"], strict=True))
        for name in what
    }


def probe_rows() -> list[Row]:
    """The probe on eight layers, and what the alternatives take."""
    model, (x, y) = network(nn.ELU), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def passes() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()

    for _ in range(TRAINED):
        passes()
        optimizer.step()
    layers = [str(2 * index) for index in range(LAYERS)]

    def probe(**settings: Any) -> BiasShiftProbe:
        return BiasShiftProbe(model, layers, **settings)

    default, quick, more = probe(), probe(fisher="empirical"), probe(max_units=12)
    every, cg = probe(max_units=None), probe(max_units=None, solver="cg")
    found = ratio_to(
        passes,
        {
            "default": lambda: default.measure(x, y),
            "quick": lambda: quick.measure(x, y),
            "more": lambda: more.measure(x, y),
        },
        11,
    )
    slow = ratio_to(
        passes,
        {
            "every": lambda: every.measure(x, y),
            "cg": lambda: cg.measure(x, y),
        },
        1,
    )
    report = cg.measure(x, y)
    rounds = [each.iterations for each in report.layers.values()]
    note = f"{min(rounds)} to {max(rounds)} iterations, residual {max(r.residual for r in report.layers.values()):.0e}"
    against = "forward and backward pass of the model"
    what = f"probe of {LAYERS} layers of {UNITS} units, {IMAGES} images"
    return [
        Row(f"{what}, as it comes", against, found["default"], bound=5.0, note="4 units a layer"),
        Row(f"{what}, empirical", against, found["quick"], note="one backward pass less"),
        Row(f"{what}, max_units=12", against, found["more"]),
        Row(f"{what}, all units, exact", against, slow["every"]),
        Row(f"{what}, all units, cg", against, slow["cg"], note=note),
    ]


def wide_rows() -> list[Row]:
    """All units of one wide layer: where iterations are worth it."""
    g = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(512, 512), nn.ELU(), nn.Linear(512, 512), nn.ELU(), nn.Linear(512, 10))
    init_gain_(model, nn.ELU())
    x, y = torch.randn(IMAGES, 512, generator=g), torch.randint(10, (IMAGES,), generator=g)

    def passes() -> None:
        functional.cross_entropy(model(x), y).backward()

    exact = BiasShiftProbe(model, ("2",))
    cg = BiasShiftProbe(model, ("2",), solver="cg")
    found = ratio_to(
        passes,
        {"exact": lambda: exact.unit_natural_gradient(x, y), "cg": lambda: cg.unit_natural_gradient(x, y)},
        1,
    )
    what = "unit natural gradient of one layer of 512 units"
    return [
        Row(f"{what}, exact", "forward and backward pass of the model", found["exact"]),
        Row(f"{what}, cg", "forward and backward pass of the model", found["cg"]),
    ]


def activation_row() -> Row:
    """One exponential per element: about 5 % of a training iteration in the paper."""
    x, y = data()
    models = {name: network(kind) for name, kind in (("elu", nn.ELU), ("relu", nn.ReLU))}

    def step(name: str) -> Callable[[], None]:
        return lambda: functional.cross_entropy(models[name](x), y).backward()

    found = ratio_to(step("relu"), {"elu": step("elu")}, 25)
    return Row("ELU network, forward and backward pass", "the same with ReLU", found["elu"])


def ratios() -> list[Row]:
    """All rows of this benchmark."""
    return [*probe_rows(), *wide_rows(), activation_row()]
