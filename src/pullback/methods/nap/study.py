"""Does holding the weight norm keep a normalised network plastic, and is it more than the learning rate that it keeps?

A perceptron memorises random labels of real digits; when they are drawn anew, it has to start again, with the weights
it has. Beside the network with norms, with and without projection, run the explanations: projection alone, a bound on
the norm by weight decay, the layer-wise learning rate to which the projection is equivalent, and, for both, an explicit
schedule. One run holds the networks of all learning rates in one stack; its score is that of the tuned rate, the others
are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from pullback.core.frobenius import FrobeniusProjector
from pullback.core.streams import generator
from pullback.lab import (
    Arms,
    Choice,
    Claim,
    Drawing,
    Equivalent,
    Greater,
    Hyperparameters,
    Log,
    Metric,
    PairedSeeds,
    PaperResult,
    Seeds,
    Study,
    TrialResult,
    Tune,
)
from pullback.lab.data import mnist
from pullback.lab.models.stacked import Stack, StackedAdam, StackedSGD, cross_entropy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 50
LAST = 20  # steps of a task over which its accuracy is taken
RATES = {
    "sgd": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    "adam": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0),
}
POWER = {"sgd": 2, "adam": 1}  # of the norm in the effective learning rate
NORMED = {"norm", "decay", "rate", "nap", "norm-cosine", "nap-cosine"}
PROJECTED = {"projection", "nap", "nap-cosine"}


@dataclass(frozen=True)
class Config:
    """One size of one experiment.

    Args:
        optimizer: plain gradient descent or Adam.
        tasks: how often labels are drawn.
        steps: optimizer steps of a task.
        images: how many digits are memorised.
        width: units of each of two hidden layers.
        all_rates: train all learning rates, or only the one given; the score is the same.
    """

    optimizer: Literal["sgd", "adam"]
    tasks: int = 30
    steps: int = 100
    images: int = 500
    width: int = 64
    all_rates: bool = True


@cache
def digits() -> Tensor:
    """10,000 digits of 14 x 14 pixels, each pixel with mean 0 and the whole with variance 1; read once per process."""
    images = torch.as_tensor(mnist().images).reshape(-1, 1, 28, 28).float() / 255
    small = torch.nn.functional.avg_pool2d(images, 2).flatten(1)
    small = small - small.mean(0)
    return small / small.std()


class Run:
    """The networks of one run, one for each learning rate, and what is measured of them."""

    def __init__(self, cfg: Config, arm: str, hp: Hyperparameters, seed: int) -> None:
        self.cfg, self.arm, self.seed = cfg, arm, seed
        self.rates = RATES[cfg.optimizer] if cfg.all_rates else (float(hp["lr"]),)
        self.mine = self.rates.index(float(hp["lr"]))
        self.shrink = 1.0 - float(hp["decay"]) if arm == "decay" else 1.0
        sizes = (digits().shape[1], cfg.width, cfg.width, 10)
        self.net = Stack(sizes, len(self.rates), norm="layer" if arm in NORMED else "none")
        for layer, weight in enumerate(self.net.weights):
            drawn = torch.randn(weight.shape[1:], generator=generator("weights", seed, layer))
            weight.data.copy_(drawn * (2.0 / weight.shape[1]) ** 0.5)
        make = StackedSGD if cfg.optimizer == "sgd" else StackedAdam
        self.optimizer = make(self.net.parameters(), self.rates)
        self.hidden = self.net.weights[:-1]
        names = {f"weight{i}": weight for i, weight in enumerate(self.hidden)}
        self.projector = FrobeniusProjector(names, per="row")  # a row is one network
        rows = torch.randperm(len(digits()), generator=generator("images", seed))[: cfg.images]
        self.x = digits()[rows].contiguous()

    def growth(self) -> Tensor:
        """Norm over first norm of both hidden layers in their geometric mean, [rates]."""
        return torch.stack(list(self.projector.growth().values())).log().mean(0).exp()

    def task(self, number: int) -> Tensor:
        """Train on newly drawn labels; mean accuracy of the last steps, each before its update, [rates]."""
        cfg, g = self.cfg, generator("task", self.seed, number)
        labels = torch.randint(10, (cfg.images,), generator=g)
        per_epoch = cfg.images // BATCH
        right = torch.zeros(len(self.rates))
        for step in range(cfg.steps):
            if step % per_epoch == 0:
                order = torch.randperm(cfg.images, generator=g)
            rows = order[step % per_epoch * BATCH :][:BATCH]
            delta, share = cross_entropy(self.net.forward(self.x[rows]), labels[rows])
            self.net.backward(delta)
            self.step(step)
            if step >= cfg.steps - LAST:
                right += share
        return right / min(LAST, cfg.steps)

    def step(self, step: int) -> None:
        """One update of the arm."""
        if self.arm.endswith("cosine"):
            self.optimizer.factor = cosine(step, self.cfg.steps)
        if self.arm == "rate":
            growth = self.projector.growth()
            for weight, each in zip(self.hidden, growth.values(), strict=True):
                self.optimizer.layer_rates[weight] = each ** POWER[self.cfg.optimizer]
        self.optimizer.step()
        if self.arm == "decay":
            torch._foreach_mul_([weight.data for weight in self.hidden], self.shrink)
        if self.arm in PROJECTED:
            self.projector.project_()


def cosine(step: int, steps: int) -> float:
    """Share of the rate within a task: a linear rise over a tenth of it, then half a cosine down to a hundredth."""
    rise = max(steps // 10, 1)
    if step < rise:
        return (step + 1) / rise
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def run(cfg: Config, arm: str, hp: Hyperparameters, seed: int, log: Log) -> Mapping[str, float]:
    """Train the networks of all rates; arms of a seed share digits, labels, batches and first weights."""
    state = Run(cfg, arm, hp, seed)
    accuracy = []
    for number in range(cfg.tasks):
        accuracy.append(state.task(number))
        growth = _bounded(state.growth())
        log.value("accuracy", float(accuracy[-1][state.mine]), number)
        log.value("growth", growth[state.mine], number)
        relative = 1.0 if arm == "rate" else growth[state.mine] ** -POWER[cfg.optimizer]
        log.value("effective_rate", state.rates[state.mine] * relative, number)
    table = torch.stack(accuracy)  # [tasks, rates]
    first, last = min(5, cfg.tasks), min(10, cfg.tasks)
    early, late = table[:first].mean(0), table[-last:].mean(0)
    log.array("late_by_rate", np.stack([np.asarray(state.rates), late.numpy()]))
    return {
        "late_accuracy": float(late[state.mine]),
        "early_accuracy": float(early[state.mine]),
        "retention": float(late[state.mine] / early[state.mine].clamp_min(1e-6)),
        "norm_growth": growth[state.mine],
    }


def _bounded(growth: Tensor) -> list[float]:
    """Norm growth, a network that diverged counting as a thousandfold one."""
    return growth.nan_to_num(1e3).clamp(max=1e3).tolist()


# --- figures -------------------------------------------------------------------------------------------


def draw_tasks(result: TrialResult) -> Figure:
    """Accuracy, norm growth and effective rate by task, the mean over seeds of every arm."""
    from pullback.lab.figures import arm_colours, panels  # workers need no matplotlib

    figure, axes = panels(3, columns=1, height=6.6)
    colours = arm_colours(result.arms)
    shown = ("accuracy", "growth", "effective_rate")
    for arm in result.arms:
        width = 1.8 if arm.role in {"method", "baseline"} else 0.9
        for ax, name in zip(axes, shown, strict=True):
            lines = [values for _, values in result.curve(arm.name, name).values()]
            if lines:
                label = arm.name if name == "accuracy" else None
                ax.plot(np.mean(lines, 0), color=colours[arm.name], linewidth=width, alpha=0.85, label=label)
    axes[0].set(ylabel="accuracy", ylim=(0, 1))
    axes[1].set(ylabel="norm / first norm", yscale="log")
    axes[2].set(xlabel="task", ylabel="lr (first norm / norm)^p", yscale="log")
    axes[0].legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def draw_rates(result: TrialResult) -> Figure:
    """Late accuracy against the learning rate; the tuned rate of every arm is marked."""
    from pullback.lab.figures import arm_colours, panels

    figure, (ax,) = panels(1, height=3.4)
    colours = arm_colours(result.arms)
    for arm in result.arms:
        tables = [
            c.arrays["late_by_rate"] for c in result.cells if c.arm == arm.name and "late_by_rate" in c.arrays
        ]
        if not tables:
            continue
        rates, late = np.mean(tables, 0)
        chosen = [float(arm.hp["lr"]) == rate for rate in rates]
        ax.plot(
            rates,
            late,
            color=colours[arm.name],
            linewidth=1.8 if arm.role == "method" else 0.9,
            label=arm.name,
        )
        ax.scatter(rates[chosen], late[chosen], color=colours[arm.name], s=28, zorder=3)
    ax.set(xlabel="learning rate", ylabel="late accuracy", xscale="log", ylim=(0, 1))
    ax.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


# --- declarations --------------------------------------------------------------------------------------

LATE = Metric("late_accuracy", better="higher", unit="fraction", worst=0.0)
RETENTION = Metric("retention", better="higher", worst=0.0)
GROWTH = Metric("norm_growth", better="higher", worst=0.0)
TASKS = Drawing(
    "tasks",
    draw_tasks,
    "By task, means over seeds at every arm's tuned rate: accuracy in the last 20 steps, norm of the hidden weights, "
    "and the learning rate that weights of the first norm would need for the same effect.",
)
BY_RATE = Drawing(
    "rates",
    draw_rates,
    "Late accuracy at every learning rate, means over seeds; a dot marks the rate that tuning chose on other seeds. "
    "Where a rate is too high, growing norms help: they anneal it.",
)
DEVIATIONS = (
    "500 digits of 14 x 14 pixels, 30 tasks of 100 steps of batch 50, two hidden layers of 64 units, where the paper "
    "takes CIFAR-10 through 200 draws of labels and 20 million steps; the norms have no gain; learning rates are tuned "
    "by the accuracy of the last ten tasks on the label streams of another seed (nothing generalises: there is no "
    "test set); the schedule within a task rises for a tenth of it; the arm decay (weights shrink by a tuned share in "
    "every step, which bounds the norm as well) is ours."
)
CANNOT = (
    "Sequential Atari, ImageNet and language models, and whether a longer stationary run needs a schedule."
)


def declare(optimizer: Literal["sgd", "adam"], title: str, also: tuple[Claim, ...]) -> Study:
    """The study of one optimizer."""
    full = Config(optimizer)
    middle = {"sgd": 0.3, "adam": 3e-3}[optimizer]
    return Study(
        room="nap",
        name=optimizer,
        title=title,
        run=run,
        arms=Arms(
            "norm",
            "nap",
            rivals=("projection", "decay"),
            others=("plain", "rate", "norm-cosine", "nap-cosine"),
        ),
        sizes={
            "smoke": replace(full, tasks=3, steps=30, images=200),
            "full": full,
            "one-rate": replace(full, all_rates=False),
        },
        primary=LATE,
        hp={"*": {"lr": middle}, "decay": {"decay": 3e-4}},
        tune=Tune(
            trials=32,
            select=LATE,
            shared={"lr": Choice(RATES[optimizer])},
            only={"decay": {"decay": Choice((1e-4, 3e-4, 1e-3, 3e-3))}},
            size="one-rate",
        ),
        seeds=Seeds(test=tuple(range(200, 208)), tune=(100,)),
        timeout=300.0,
        claim=Greater("nap", than="norm"),
        also=(
            Greater("nap", than="norm", metric=RETENTION),
            Greater("nap", than="plain", metric=RETENTION),
            Greater("norm", than="nap", by=0.5, metric=GROWTH),
            Greater("nap-cosine", than="norm-cosine"),
            *also,
        ),
        paper=PaperResult(
            "figure on re-labelled CIFAR-10",
            "loss after each of 200 draws of labels",
            note="with projection the loss stays as at the start, with norms alone it rises slowly, without norms "
            "fast; no table of numbers",
        ),
        refuted_if="late accuracy with projection, at its tuned rate, is not above that with norms alone at theirs",
        cannot_test=CANNOT,
        deviations=DEVIATIONS,
        figures=(TASKS, BY_RATE, PairedSeeds()),
    )


STUDIES: tuple[Study, ...] = (
    declare(
        "sgd",
        "Labels drawn anew 30 times, plain gradient descent: norms with and without projection",
        (Equivalent("rate", than="nap", within=0.03),),
    ),
    declare("adam", "Labels drawn anew 30 times, Adam: norms with and without projection", ()),
)
