"""The study: does the method reach a lower loss than plain gradients in the same number of steps?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pullback.core.streams import generator
from pullback.lab import (
    Arms,
    Curves,
    Hyperparameters,
    Log,
    LogUniform,
    Metric,
    PairedSeeds,
    PaperResult,
    Study,
    Tune,
)
from pullback.methods.diffusion.diffusion import Diffusion


@dataclass(frozen=True)
class Config:
    """What one size of the study is made of."""

    steps: int
    examples: int = 64


def run(cfg: Config, arm: str, hp: Hyperparameters, seed: int, log: Log) -> Mapping[str, float]:
    """Fit a linear model; return its loss on examples that tuning may see, and on others."""
    draw = generator("diffusion.data", seed)
    x = torch.randn(3 * cfg.examples, 8, generator=draw)
    y = x @ torch.randn(8, 1, generator=draw)
    train, validation, test = (slice(i * cfg.examples, (i + 1) * cfg.examples) for i in range(3))
    weight = torch.zeros(8, 1, requires_grad=True)
    rate = float(hp["lr"]) / (2.0 if arm == "half rate" else 1.0)
    optimizer = torch.optim.SGD([weight], lr=rate)
    if arm == "diffusion":
        Diffusion().attach(optimizer)

    def loss(rows: slice) -> torch.Tensor:
        return (x[rows] @ weight - y[rows]).square().mean()

    for step in range(cfg.steps):
        optimizer.zero_grad()
        found = loss(train)
        found.backward()
        optimizer.step()
        log.value("loss", found.item(), step)
    return {"test_loss": loss(test).item(), "validation_loss": loss(validation).item()}


MAIN = Study(
    room="diffusion",
    title="Diffusion against plain gradients on a linear model",
    run=run,
    arms=Arms(baseline="plain", method="diffusion", rivals=("half rate",)),
    primary=Metric("test_loss", better="lower", worst=1e6),
    sizes={"smoke": Config(steps=5), "full": Config(steps=50)},
    hp={"*": {"lr": 0.05}},
    tune=Tune(
        trials=6,
        select=Metric("validation_loss", better="lower", worst=1e6),
        shared={"lr": LogUniform(1e-3, 2.0)},
    ),
    paper=PaperResult(where="table 1", setting="the paper's model and data"),
    refuted_if="the loss is higher than that of plain gradients in the 95 % interval of the paired difference",
    cannot_test="the paper's model sizes",
    deviations="a linear model in place of the paper's network",
    timeout=60.0,
    figures=(PairedSeeds(), Curves("loss")),
)

STUDIES: tuple[Study, ...] = (MAIN,)
