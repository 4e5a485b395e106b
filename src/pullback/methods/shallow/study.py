"""Do residual blocks side by side reach the loss of the same blocks in sequence, and what does it take?

`digits-4` and `digits-16` train small convolutional networks of several shapes in both forms, pair by pair; `spirals`
is a task that wants composition; `conversion` runs trained weights in the other form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pullback.core.streams import generator, stream_seed
from pullback.lab import (
    Arms,
    Choice,
    Curves,
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
from pullback.lab.data.spirals import spirals
from pullback.lab.models.fitting import Part, fit, score
from pullback.methods.shallow.report import determination_ratio, truncation_report
from pullback.methods.shallow.stack import ResidualStack

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMS: dict[str, dict[str, Any]] = {
    "sequential": {"mode": "sequential"},
    "parallel": {},
    "order-2": {"order": 2},
    "scaled": {"branch_scale": "1/sqrt(N)"},
}
"""How an arm wires its blocks; the arm ``none`` has no blocks."""

BINS = ((0.0, 1.0), (1.0, 3.0), (3.0, 10.0), (10.0, math.inf))  # the paper's, of Q
COLUMNS = ("q", "loss", "train", "accuracy", "eps", "gap", "start", "end")


@dataclass(frozen=True)
class Shape:
    """One network: filters (or units), kernel, training examples."""

    width: int
    kernel: int = 3
    examples: int = 3000


@dataclass(frozen=True)
class Config:
    """One size of one experiment: all shapes are trained in one cell.

    Args:
        shapes: the networks.
        depth: residual blocks of each.
        epochs: passes over the training set.
        spirals: a perceptron on two spirals instead of digits.
    """

    shapes: tuple[Shape, ...]
    depth: int
    epochs: int = 10
    spirals: bool = False


# --- data and networks -----------------------------------------------------------------------------------------


@cache
def digits() -> tuple[Part, Part, Part]:
    """6,000 digits of 14 x 14 pixels for training, 2,000 for selection, 2,000 for the test."""
    data = mnist()
    x = F.avg_pool2d(data.images[:, None].float() / 255, 2)
    train, selection, test = (
        Part(x[a:b], data.labels[a:b]) for a, b in ((0, 6000), (6000, 8000), (8000, 10000))
    )
    return train, selection, test


@cache
def points(seed: int) -> tuple[Part, Part, Part]:
    """Two spirals of two turns: 2,000 points for training, selection and test each."""
    train, selection, test = (
        Part(*spirals(2000, generator("spirals", seed, part), turns=2.0)) for part in range(3)
    )
    return train, selection, test


def network(cfg: Config, shape: Shape, arm: str, seed: int) -> nn.Sequential:
    """Layers before, the stack (third from the end), and the readout; arms of a seed share all initial weights."""
    torch.manual_seed(stream_seed("shallow", seed, shape.width, shape.kernel))
    w, k = shape.width, shape.kernel
    if cfg.spirals:
        before, readout = [nn.Linear(2, w)], nn.Linear(w, 2)
        blocks = [nn.Sequential(nn.Linear(w, w), nn.ReLU()) for _ in range(cfg.depth)]
    else:
        before = [nn.Conv2d(1, w, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
        readout = nn.Linear(49 * w, 10)
        blocks = [nn.Sequential(nn.Conv2d(w, w, k, padding=k // 2), nn.ReLU()) for _ in range(cfg.depth)]
    middle = ResidualStack(blocks, **FORMS[arm]) if arm in FORMS else nn.Identity()
    return nn.Sequential(*before, middle, nn.Flatten(), readout)


# --- one run ---------------------------------------------------------------------------------------------------


def premise(net: nn.Sequential, part: Part) -> tuple[float, float, float]:
    """Largest eps, gap of order 1 and |log10| of the first over the last block's gradient, on 100 examples."""
    stack = net[-3]
    if not isinstance(stack, ResidualStack):
        return 0.0, 0.0, 0.0
    x, y = part.x[:100], part.y[:100]
    rest = net[-2:].double()
    found = truncation_report(stack, net[:-3](x), max_order=1, loss=lambda h: F.cross_entropy(rest(h), y))
    rest.float()
    norms = found.gradient_norms[stack.mode]
    floor = 1e-6 * max(norms) + 1e-30  # a block without any active unit has no gradient
    return max(found.eps), found.gaps[0], abs(math.log10((norms[0] + floor) / (norms[-1] + floor)))


def run(cfg: Config, arm: str, hp: Hyperparameters, seed: int, log: Log) -> Mapping[str, float]:
    """Train all shapes in the form of the arm; losses are logarithms, so that differences are relative."""
    train, selection, test = points(seed) if cfg.spirals else digits()
    rows, curves = list[dict[str, float]](), dict[int, list[float]]()
    for shape in cfg.shapes:
        net = network(cfg, shape, arm, seed)
        part = Part(train.x[: shape.examples], train.y[: shape.examples])
        start = premise(net, part)[2]

        def watch(epoch: int, net: nn.Module = net) -> None:
            curves.setdefault(epoch, []).append(math.log(score(net, test)[0]))

        fit(net, part, float(hp["lr"]), cfg.epochs, seed, None if seed in TUNING_SEEDS else watch)
        eps, gap, end = premise(net, part)
        loss, accuracy = score(net, test)
        built = network(cfg, shape, "sequential", seed)
        q = determination_ratio(len(part.y), 2 if cfg.spirals else 10, built)
        row = {
            "q": q,
            "loss": math.log(loss),
            "train": math.log(max(score(net, part)[0], 1e-6)),
            "eps": eps,
            "gap": gap,
        }
        rows.append(
            {
                **row,
                "start": start,
                "end": end,
                "accuracy": accuracy,
                "choice": math.log(score(net, selection)[0]),
            }
        )
    for epoch, losses in curves.items():
        log.value("log_test_loss", sum(losses) / len(losses), epoch)
    log.array("shapes", np.array([[row[name] for name in COLUMNS] for row in rows]))
    return summary(rows)


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over shapes, over those with Q >= 1 and over those of each bin."""

    def mean(name: str, low: float = 0.0, high: float = math.inf) -> float:
        found = [row[name] for row in rows if low <= row["q"] < high]
        return sum(found) / len(found) if found else math.nan

    bins = {f"log_loss_q{low:g}": mean("loss", low, high) for low, high in BINS}
    return {
        "log_test_loss": mean("loss", 1.0),
        "log_train_loss": mean("train", 1.0),
        "selection_loss": mean("choice"),
        "accuracy": mean("accuracy"),
        "gradient_spread": mean("start"),
        "gradient_spread_end": mean("end"),
        "eps": mean("eps"),
        "gap": mean("gap"),
        **{name: value for name, value in bins.items() if not math.isnan(value)},
    }


def convert(cfg: Config, arm: str, hp: Hyperparameters, seed: int, _: Log) -> Mapping[str, float]:
    """Train one form, test in the other; ``retrained`` goes on for a fifth of the epochs in the parallel form."""
    train, test = digits()[::2]
    (shape,) = cfg.shapes
    part = Part(train.x[: shape.examples], train.y[: shape.examples])
    trained = "parallel" if arm in {"parallel", "parallel-as-sequential"} else "sequential"
    net = network(cfg, shape, trained, seed)
    fit(net, part, float(hp["lr"]), cfg.epochs, seed)
    stack: Any = net[-3]
    if arm in {"converted", "retrained"}:
        stack.mode = "parallel"
    elif arm == "dropped":
        net[-3] = nn.Identity()
    elif arm == "parallel-as-sequential":
        stack.mode = "sequential"
    if arm == "retrained":
        fit(net, part, float(hp["lr"]), max(1, cfg.epochs // 5), seed + 1)
    loss, accuracy = score(net, test)
    eps, gap = premise(net, part)[:2]
    return {"accuracy": accuracy, "log_test_loss": math.log(loss), "eps": eps, "gap": gap}


# --- figures ---------------------------------------------------------------------------------------------------


def draw_pairs(result: TrialResult) -> Figure:
    """Test loss of both forms for every shape and seed, coloured by Q; and the pairs against the truncation gap."""
    from pullback.lab.figures.pairs import paired_losses  # workers need no matplotlib

    return paired_losses(result, ("sequential", "parallel"), COLUMNS)


# --- declarations ----------------------------------------------------------------------------------------------

TEST_SEEDS = tuple(range(200, 208))
TUNING_SEEDS = (100,)
WITHIN = math.log(1.2)  # a fifth of the loss
LOSS = Metric("log_test_loss", better="lower", unit="nats, logarithm", worst=2.0)
SELECT = Metric("selection_loss", better="lower", worst=2.0)
TRAIN = Metric("log_train_loss", better="lower", worst=2.0)
ACCURACY = Metric("accuracy", unit="fraction")
SPREAD = Metric("gradient_spread", better="lower", unit="log10", worst=10.0)
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
PAIRS = Drawing(
    "pairs", draw_pairs,
    "Left: every point is one network and seed, the band is a fifth of the loss. Right: does the gap of the trained "
    "sequential network tell which pairs differ?",
)  # fmt: skip
LEARNING = Curves("log_test_loss", x="epoch", caption="Logarithm of the test loss, mean over shapes.")
DEVIATIONS = (
    "Two to four shapes of the paper's 6,912 configurations, 3,000 digits of 14 x 14 pixels, 10 epochs of Adam with "
    "warm-up, cosine schedule and clipping: a plateau for all arms, each at its own learning rate, tuned on digits "
    "outside of the test. Differences are those of logarithms, paired by configuration and seed. The paper lacks some "
    "arms: none has no residual blocks (if it does as well, the form cannot matter), order-2 has second-order terms, "
    "scaled divides branches by the root of their number. Claims leave out Q < 1 and show it apart."
)
CANNOT = "CIFAR10, the full grid, and networks whose depth was chosen because it was needed."
TABLE = PaperResult(
    "table 2, MNIST, 3 <= Q < 10", "mean validation loss; 10 classes, natural logarithm below",
    math.log(0.11743), math.log(0.11467),
    note="-8, -2 and +10 % in the bins 1 to 3, 3 to 10 and above 10; +45 % below 1",
)  # fmt: skip
SMOKE = Config(
    tuple(Shape(4, 3, n) for n in (200, 500, 1000, 3000)), depth=2, epochs=1
)  # a shape in each bin


def within_bins(*lows: float) -> tuple[Any, ...]:
    """Equivalence in single bins of Q."""
    metrics = [Metric(f"log_loss_q{low:g}", better="lower", worst=2.0) for low in lows]
    return tuple(Equivalent("parallel", than="sequential", within=WITHIN, metric=each) for each in metrics)


def declare(
    name: str, title: str, cfg: Config, other: str, also: tuple[Any, ...], smoke: Config, **facts: Any
) -> Study:
    """A study of both forms trained from the start."""
    return Study(
        room="shallow",
        name=name,
        title=title,
        run=run,
        arms=Arms("sequential", "parallel", rivals=("none",), others=(other,)),
        primary=LOSS,
        sizes={"smoke": smoke, "full": cfg},
        hp={"*": {"lr": 1e-2}},
        tune=Tune(trials=len(RATES), select=SELECT, shared={"lr": Choice(RATES)}),
        seeds=Seeds(TEST_SEEDS, tune=TUNING_SEEDS),
        claim=Equivalent("parallel", than="sequential", within=WITHIN),
        also=(
            *also,
            Greater("sequential", than="parallel", metric=TRAIN),
            Greater("parallel", than="sequential", metric=SPREAD),
            Greater(other, than="parallel"),
        ),
        timeout=300.0,
        figures=(PAIRS, PairedSeeds(), LEARNING),
        cannot_test=CANNOT,
        refuted_if="the 95 % interval of the paired difference of log losses lies outside of -0.18 to 0.18 (a fifth)",
        **facts,
    )


STUDIES: tuple[Study, ...] = (
    declare(
        "digits-4",
        "Four residual blocks in parallel against the same in sequence, digits, each at its own rate",
        Config((Shape(4), Shape(8), Shape(16), Shape(16, 3, 1000)), depth=4),
        "order-2",
        within_bins(1.0, 3.0, 10.0, 0.0),
        SMOKE,
        paper=TABLE,
        deviations=DEVIATIONS,
    ),
    declare(
        "digits-16",
        "Sixteen residual blocks in parallel against the same in sequence, digits, each at its own rate",
        Config((Shape(4), Shape(8)), depth=16),
        "scaled",
        within_bins(1.0, 3.0),
        SMOKE,
        paper=TABLE,
        deviations=DEVIATIONS,
    ),
    declare(
        "spirals",
        "A task that wants composition: perceptrons of eight residual blocks on two spirals",
        Config((Shape(16, 1, 2000), Shape(12, 1, 2000)), depth=8, epochs=40, spirals=True),
        "order-2",
        (Greater("sequential", than="parallel", by=WITHIN),),
        Config((Shape(8, 1, 500),), depth=2, epochs=1, spirals=True),
        paper=PaperResult("not in the paper", "added to see where the claim ends"),
        deviations=(
            "Not a task of the paper: blocks are act(linear), as the paper's layers are. Spirals ask for composition, "
            "which the parallel form does not have; we expect it to lose here."
        ),
    ),
    Study(
        room="shallow",
        name="conversion",
        title="Sixteen residual blocks trained in one form and tested in the other",
        run=convert,
        arms=Arms(
            "kept",
            "converted",
            rivals=("dropped",),
            others=("retrained", "parallel", "parallel-as-sequential"),
        ),
        primary=ACCURACY,
        sizes={"smoke": Config((Shape(4, 3, 500),), 2, 1), "full": Config((Shape(8),), 16, 6)},
        hp={"*": {"lr": 1e-2}},
        seeds=Seeds(TEST_SEEDS, tune=TUNING_SEEDS),
        claim=Equivalent("converted", than="kept", within=0.02),
        also=(
            Greater("kept", than="converted", by=0.1),
            Greater("parallel", than="parallel-as-sequential", by=0.1),
            Equivalent("retrained", than="kept", within=0.02),
        ),
        timeout=300.0,
        paper=PaperResult("not in the paper", "whose claim is about training both forms from the start"),
        refuted_if="the accuracy of the converted network differs from that of the network as trained by 0.02 or more",
        cannot_test=CANNOT,
        deviations=(
            "One rate for all arms, on purpose: converted and kept are one trained network tested in both forms. "
            "retrained goes on in the parallel form for a fifth of the epochs, dropped leaves the trained blocks out."
        ),
    ),
)
"""All studies of this room; the first is the main one."""
