"""Does gradient noise train a deep, badly initialised network, and is it more than a late better start?

A 20-layer ReLU network learns real digits by plain SGD, as in the paper's first experiment. Beside noise and no
noise run the cheap explanations: a start that already has the weight variance which the noise would add, noise
of constant size, and clipping alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from pullback.core.attachment import attach
from pullback.core.clip import ClipGradNorm
from pullback.core.kinds import Transform
from pullback.core.streams import generator
from pullback.lab import (
    Arms,
    Choice,
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
from pullback.methods.gradient_noise.noise import GradientNoise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 64
GAMMA = 0.55


@dataclass(frozen=True)
class Config:
    """One size of one experiment.

    Args:
        start: the initial weights: ``simple`` is N(0, 0.1^2) in every layer, ``he`` is N(0, 2 / fan in).
        steps: optimizer steps.
        clip: norm at which all arms clip, before any noise; ``None``: only the arm ``clip`` does, at 10.
        depth: hidden layers.
        width: units of each hidden layer.
    """

    start: Literal["simple", "zero", "he"]
    steps: int = 4000
    clip: float | None = None
    depth: int = 20
    width: int = 50


# --- data and network ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Images [n, 784] in [0, 1] and their digits [n]."""

    x: Tensor
    y: Tensor


@cache
def parts() -> tuple[Part, Part, Part]:
    """7,000 digits for training, 1,000 for selection, 2,000 for the test; read once per process."""
    digits = mnist()
    x = torch.as_tensor(digits.images).reshape(len(digits.labels), -1).float() / 255
    y = torch.as_tensor(digits.labels).long()
    cuts = ((0, 7000), (7000, 8000), (8000, 10000))
    train, validation, test = (Part(x[a:b].contiguous(), y[a:b].contiguous()) for a, b in cuts)
    return train, validation, test


class Perceptron:
    """A deep ReLU perceptron whose parameters, and gradients, are views of one flat vector.

    Forward and backward pass are written out: at this size autograd costs more than the arithmetic.
    """

    def __init__(self, sizes: list[int]) -> None:
        shapes = [shape for a, b in pairwise(sizes) for shape in ((a, b), (b,))]
        self.flat = nn.Parameter(torch.zeros(sum(math.prod(shape) for shape in shapes)))
        self.flat.grad = torch.zeros_like(self.flat)
        self.weights, self.biases = _views(self.flat.data, shapes)
        self.weight_grads, self.bias_grads = _views(self.flat.grad, shapes)

    def logits(self, x: Tensor, kept: list[Tensor] | None = None) -> Tensor:
        """Class scores [n, 10] of images [n, 784]; appends every layer's input to ``kept``."""
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if kept is not None:
                kept.append(x)
            x = torch.mm(x, weight).add_(bias)
            if layer < last:
                x.relu_()
        return x

    def backward(self, x: Tensor, y: Tensor) -> None:
        """Write the gradient of the mean cross-entropy into ``flat.grad``."""
        inputs: list[Tensor] = []
        delta = torch.softmax(self.logits(x, inputs), dim=1)
        delta[torch.arange(len(y)), y] -= 1.0
        delta /= len(y)
        for layer in range(len(self.weights) - 1, -1, -1):
            torch.mm(inputs[layer].T, delta, out=self.weight_grads[layer])
            torch.sum(delta, 0, out=self.bias_grads[layer])
            if layer:
                delta = torch.mm(delta, self.weights[layer].T)
                delta = torch.ops.aten.threshold_backward(delta, inputs[layer], 0)  # inputs are after ReLU

    def accuracy(self, part: Part) -> float:
        """Fraction of ``part`` whose digit has the highest score."""
        return float((self.logits(part.x).argmax(1) == part.y).float().mean())


def _views(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[list[Tensor], list[Tensor]]:
    pieces = flat.split([math.prod(shape) for shape in shapes])
    views = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
    return views[0::2], views[1::2]


# --- one run -------------------------------------------------------------------------------------------


def added_variance(lr: float, eta: float, steps: int) -> float:
    """Variance that the noise alone gives to each weight in ``steps`` steps of plain SGD."""
    return lr**2 * eta * sum((1 + t) ** -GAMMA for t in range(steps))


def start_std(cfg: Config, arm: str, hp: Hyperparameters, fan_in: int) -> float:
    """Standard deviation of the initial weights; ``wider`` has the noise's share from the start."""
    own = {"simple": 0.1**2, "zero": 0.0, "he": 2.0 / fan_in}[cfg.start]
    extra = added_variance(float(hp["lr"]), float(hp["eta"]), cfg.steps) if arm == "wider" else 0.0
    return math.sqrt(own + extra)


def transforms(cfg: Config, arm: str, hp: Hyperparameters, seed: int) -> list[Transform]:
    """What happens to the gradient before the step, in order."""
    limit = 10.0 if arm == "clip" else cfg.clip
    found: list[Transform] = [] if limit is None else [ClipGradNorm(limit)]
    if arm == "noise":
        found.append(GradientNoise(float(hp["eta"]), GAMMA, seed=seed))
    elif arm == "constant":  # the same total variance, spread evenly over the steps
        mean = sum((1 + t) ** -GAMMA for t in range(cfg.steps)) / cfg.steps
        found.append(GradientNoise(float(hp["eta"]) * mean, schedule="constant", seed=seed))
    return found


def run(cfg: Config, arm: str, hp: Hyperparameters, seed: int, log: Log) -> Mapping[str, float]:
    """Train one network; arms of a seed share data order and the directions of the initial weights."""
    train, validation, test = parts()
    network = Perceptron([train.x.shape[1], *[cfg.width] * cfg.depth, 10])
    for layer, weight in enumerate(network.weights):
        weight.normal_(generator=generator("weights", seed, layer)).mul_(start_std(cfg, arm, hp, len(weight)))
    optimizer = torch.optim.SGD([network.flat], lr=float(hp["lr"]))
    attach(optimizer, *transforms(cfg, arm, hp, seed), nonfinite="raise")  # a diverged run ends here
    middle = network.weights[cfg.depth // 2]
    per_epoch = len(train.y) // BATCH
    every = max(cfg.steps // 25, 10)
    for step in range(cfg.steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(train.y), generator=generator("order", seed, step // per_epoch))
        if step % every == 0:
            record(log, network, middle, test, step)
        rows = order[step % per_epoch * BATCH :][:BATCH]
        network.backward(train.x.index_select(0, rows), train.y.index_select(0, rows))
        optimizer.step()
    record(log, network, middle, test, cfg.steps)
    reached = network.accuracy(test)
    return {
        "test_accuracy": reached,
        "validation_accuracy": network.accuracy(validation),
        "above_half": float(reached > 0.5),
        "weight_std": float(middle.std()),
    }


def record(log: Log, network: Perceptron, middle: Tensor, test: Part, step: int) -> None:
    """Log the two curves of the figure."""
    log.value("test_accuracy", network.accuracy(test), step)
    log.value("weight_std", float(middle.std()), step)


# --- figure --------------------------------------------------------------------------------------------


def draw_escape(result: TrialResult) -> Figure:
    """Accuracy of every seed over the steps, and below it the weight std of a middle layer."""
    from pullback.lab.figures import arm_colours, panels  # workers need no matplotlib

    figure, (top, bottom) = panels(2, columns=1, height=4.8)
    colours = arm_colours(result.arms)
    for arm in result.arms:
        bold = 1.6 if arm.role == "method" else 0.8
        for axes, name in ((top, "test_accuracy"), (bottom, "weight_std")):
            curves = result.curve(arm.name, name).values()
            for number, (steps, values) in enumerate(curves):
                label = arm.name if number == 0 and axes is top else None
                axes.plot(steps, values, color=colours[arm.name], linewidth=bold, alpha=0.8, label=label)
    top.set(ylabel="test accuracy", ylim=(0, 1))
    bottom.set(xlabel="step", ylabel="weight std, middle layer", ylim=(0, None))
    top.legend(ncols=len(result.arms), loc="lower left", bbox_to_anchor=(0, 1))
    return figure


# --- declarations --------------------------------------------------------------------------------------

ACCURACY = Metric("test_accuracy", better="higher", unit="fraction", worst=0.0)
SELECT = Metric("validation_accuracy", better="higher", unit="fraction", worst=0.0)
ABOVE_HALF = Metric("above_half", better="higher", unit="fraction", worst=0.0)
RATES = Choice((0.01, 0.03, 0.1, 0.3))
ETAS = Choice((0.01, 0.1, 0.3, 1.0, 3.0))  # the three of the paper, one between, one beyond
ESCAPE = Drawing(
    "escape",
    draw_escape,
    "Every line is one seed. Runs leave chance when the weights of the middle layer have grown far enough, "
    "whether noise brought them there or they started there.",
)
DEVIATIONS = (
    "7,000 training digits instead of 60,000, 2,000 for the test; 4,000 steps of batch 64 (the paper names "
    "neither); biases start at 0; the learning rate is tuned for every arm and eta for every arm that has one, "
    "where the paper averages over two rates at eta 0.01; 8 seeds instead of 20 per rate."
)
CANNOT = (
    "The paper's memory networks, Neural Programmer, Neural RAM and Neural GPU, whose gains are rates of success "
    "over many runs of larger models."
)


def declare(name: str, title: str, cfg: Config, etas: tuple[str, ...], **fields: Any) -> Study:
    """A study of this room; the arms in ``etas`` tune eta as well."""
    return Study(
        room="gradient_noise",
        name=name,
        title=title,
        run=run,
        sizes={"smoke": replace(cfg, steps=30, depth=6), "full": cfg},
        primary=ACCURACY,
        hp={"*": {"lr": 0.1, "eta": 0.01}},
        tune=Tune(trials=20, select=SELECT, shared={"lr": RATES}, only={arm: {"eta": ETAS} for arm in etas}),
        seeds=Seeds(tune=(100,)),  # the full grid on one seed, rather than half of it on two
        timeout=300.0,
        figures=(ESCAPE, PairedSeeds()),
        cannot_test=CANNOT,
        deviations=DEVIATIONS,
        **fields,
    )


STUDIES: tuple[Study, ...] = (
    declare(
        "simple-init",
        "20-layer ReLU network, weights from N(0, 0.1^2): gradient noise against none",
        Config("simple"),
        etas=("wider", "constant", "noise"),
        arms=Arms("none", "noise", rivals=("wider", "constant", "clip")),
        claim=Greater("noise", than="none"),
        also=(Greater("noise", than="none", metric=ABOVE_HALF), Greater("wider", than="none")),
        paper=PaperResult(
            "Table 1, Simple Init, no clipping", "average test accuracy over 40 runs", 0.431, 0.527,
            note="best run 89.9 % without and 96.7 % with noise; clip 10 alone: average 51.6 %",
        ),
        refuted_if="noise is not better than no noise, both with a tuned learning rate",
    ),
    declare(
        "zero-init",
        "20-layer ReLU network, all weights 0: gradient noise against none, both clipped at 10",
        Config("zero", clip=10.0),
        etas=("wider", "constant", "noise"),
        arms=Arms("none", "noise", rivals=("wider", "constant")),
        claim=Greater("noise", than="none"),
        also=(Greater("noise", than="none", metric=ABOVE_HALF),),
        paper=PaperResult(
            "Table 1, all-zero initialisation, clip 10", "average test accuracy over 40 runs", 0.101, 0.497,
            note="best run 11.4 % without and 94.5 % with noise",
        ),
        refuted_if="noise is not better than no noise, which must stay at the rate of the commonest digit",
    ),
    declare(
        "he-init",
        "20-layer ReLU network, He initialisation: is noise of eta 0.01 harmless? Both clipped at 10",
        Config("he", clip=10.0),
        etas=(),
        arms=Arms("none", "noise", rivals=("constant",)),
        claim=Equivalent("noise", than="none", within=0.015),
        paper=PaperResult(
            "Table 1, He initialisation, clip 10", "average test accuracy over 40 runs", 0.917, 0.917,
            note="best run 97.4 % without and 97.2 % with noise",
        ),
        refuted_if="the two differ by more than 1.5 points",
    ),
)  # fmt: skip
