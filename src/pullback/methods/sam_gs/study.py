"""Does magnitude surgery help several losses, and does its momentum branch add anything to plain equalisation?

The network tells (two digits on one canvas, three tasks, against single-task references of the same seed); the
paper's own two landscapes show where the method comes from. Everywhere run the two halves of the method by
themselves: equalise always, and momentum always or clipping alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torchjd.aggregation import Aggregator, PCGrad, Sum

from pullback import lab
from pullback.core.streams import generator, numpy_generator, stream_seed
from pullback.lab.data.overlaid import overlaid_pairs
from pullback.lab.models import landscapes
from pullback.lab.models.digit_pairs import DigitPairs, compared
from pullback.methods.sam_gs.aggregator import SAMGS
from pullback.methods.sam_gs.loop import multitask_backward

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEST_SEEDS = tuple(range(200, 208))
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
"""Learning rates at which every landscape run reports; the paper's is the first."""
ALONE = 4e-3
"""Learning rate of the single-task references: the best of four on validation pairs of a tuning seed."""


# --- the network -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlaid:
    """One size of the network study.

    Args:
        scales: factor of each loss: first digit, second digit, drawing of the first.
        steps: optimizer steps of every arm and of the single-task references.
        batch: pairs of digits a step.
        held: pairs of the validation part, and twice as many of the test part.
    """

    scales: tuple[float, float, float]
    steps: int = 700
    batch: int = 128
    held: int = 2000


def network(seed: int) -> DigitPairs:
    """The same initial weights for all arms and references of a seed."""
    torch.manual_seed(stream_seed("overlaid-weights", seed))
    return DigitPairs()


def aggregator_of(arm: str, hp: lab.Hyperparameters) -> Aggregator:
    """How an arm makes one gradient of three."""
    if arm == "sum":
        return Sum()
    if arm == "pcgrad":
        return PCGrad()
    return SAMGS(num_tasks=3, gamma=2.0 if arm == "equalise" else float(hp["gamma"]))


def train_together(
    cfg: Overlaid, arm: str, hp: lab.Hyperparameters, seed: int, log: lab.Log
) -> tuple[DigitPairs, float]:
    """One network for all tasks, and the share of steps in which gradients were equalised."""
    net, aggregator = network(seed), aggregator_of(arm, hp)
    optimizer = torch.optim.Adam(net.parameters(), lr=float(hp["lr"]), fused=True)
    equalised = 0
    for step in range(cfg.steps):
        pairs = overlaid_pairs("train", cfg.batch, generator("overlaid-batch", seed, step))
        losses = [scale * loss for scale, loss in zip(cfg.scales, net.losses(pairs), strict=True)]
        optimizer.zero_grad()
        report = multitask_backward(losses, shared=net.trunk, aggregator=aggregator, heads=net.heads)
        nn.utils.clip_grad_norm_(net.trunk.parameters(), 1.0)  # part of SAM-GS, so all arms have it
        optimizer.step()
        equalised += report.branch == "equalise"
        if step % max(1, cfg.steps // 35) == 0:
            log.value("similarity", float(report.similarity), step)
    return net, equalised / cfg.steps


def train_apart(cfg: Overlaid, seed: int, lr: float) -> list[DigitPairs]:
    """One network per task on the same batches, from the same weights: the reference of Delta-m."""
    nets = [network(seed) for _ in range(3)]
    optimizer = torch.optim.Adam([p for net in nets for p in net.parameters()], lr=lr, fused=True)
    for step in range(cfg.steps):
        pairs = overlaid_pairs("train", cfg.batch, generator("overlaid-batch", seed, step))
        optimizer.zero_grad()
        torch.stack([net.losses(pairs, (k,))[0] for k, net in enumerate(nets)]).sum().backward()
        for net in nets:
            nn.utils.clip_grad_norm_(net.trunk.parameters(), 1.0)
        optimizer.step()
    return nets


def run_overlaid(
    cfg: Overlaid, arm: str, hp: lab.Hyperparameters, seed: int, log: lab.Log
) -> dict[str, float]:
    """Train one arm and the references of its seed, and compare them on validation and test pairs."""
    net, equalised = train_together(cfg, arm, hp, seed, log)
    nets = train_apart(cfg, seed, ALONE)
    validation, test = (
        compared(net, nets, overlaid_pairs(part, n, generator(f"overlaid-{part}", 0)))
        for part, n in (("validation", cfg.held), ("test", 2 * cfg.held))
    )
    return {**test, "validation_delta_m": validation["delta_m"], "equalised": equalised}


# --- the landscapes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Landscape:
    """One size of a landscape study.

    Args:
        toy: which of the two.
        solved: a start counts as solved once the sum of both losses is below this.
        beta2: of SAM-GS, as the paper sets it for this toy.
        steps: budget of Adam steps.
        jitter: standard deviation of what a seed adds to each coordinate of the starts.
        rates: learning rates at which to run beside the arm's own.
    """

    toy: landscapes.Toy
    solved: float
    beta2: float
    steps: int = 20_000
    jitter: float = 0.1
    rates: tuple[float, ...] = RATES


def clipped(vectors: np.ndarray) -> np.ndarray:
    """Vectors [2, m] of norm at most 1, as ``clip_grad_norm_`` clips."""
    return vectors * np.minimum(1.0, 1.0 / (np.sqrt((vectors * vectors).sum(0)) + 1e-6))


def projected(gradients: np.ndarray) -> np.ndarray:
    """TorchJD's PCGrad for two tasks at m points: each gradient loses its part against the other one."""
    inner, squares = (gradients[0] * gradients[1]).sum(0), (gradients * gradients).sum(1)
    against = np.minimum(inner, 0.0) / np.where(squares > 0.0, squares, 1.0)
    return gradients[0] * (1.0 - against[0]) + gradients[1] * (1.0 - against[1])


class Surgery:
    """`SAMGS` for two tasks of two parameters at m points at once, in float64."""

    def __init__(self, gamma: float, beta2: float, variant: str = "official", beta1: float = 0.9) -> None:
        self.gamma, self.betas, self.official = gamma, (beta1, beta2), variant == "official"
        self.m: np.ndarray | float = 0.0
        self.h: np.ndarray | float = 0.0
        self.t = 0

    def __call__(self, gradients: np.ndarray) -> np.ndarray:
        """Aggregate gradients [2 tasks, 2, m] into [2, m]."""
        beta1, beta2 = self.betas
        self.t += 1
        norms = np.sqrt((gradients * gradients).sum(1))
        high = norms.max(0)
        ratio = np.where(high > 0.0, norms.min(0) / np.where(high > 0.0, high, 1.0), 1.0)
        apart = (1.0 - ratio) ** 2 / (1.0 + ratio * ratio) * (1.0 if self.official else 0.5)
        self.m = beta1 * self.m + (1.0 - beta1) * gradients
        self.h = beta2 * self.h + (1.0 - beta2) * apart * apart + (1e-8 if self.official else 0.0)
        root = np.sqrt(self.h / (1.0 - beta2**self.t)) + (0.0 if self.official else 1e-8)
        sizes = np.abs(self.m) / (1.0 - beta1**self.t)
        modulated = (gradients * sizes).sum(0) / root
        equal = norms.mean(0) / np.where(norms > 0.0, norms, 1.0)
        equalised = (gradients * equal[:, None]).sum(0)
        chosen = np.where(1.0 - apart < self.gamma, equalised, modulated)
        return clipped(2.0 * chosen) if self.official else chosen


def rule_of(arm: str, beta2: float) -> Callable[[np.ndarray], np.ndarray]:
    """How an arm makes one gradient of two."""
    rules: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "sum": lambda gradients: gradients.sum(0),
        "clipped-sum": lambda gradients: clipped(gradients.sum(0)),
        "pcgrad": projected,
        "equalise": Surgery(2.0, beta2),
        "momentum": Surgery(0.0, beta2),
        "sam-gs-paper": Surgery(0.1, beta2, "paper"),
        "sam-gs": Surgery(0.1, beta2),
    }
    return rules[arm]


def run_landscape(
    cfg: Landscape, arm: str, hp: lab.Hyperparameters, seed: int, log: lab.Log
) -> dict[str, float]:
    """All starts at all learning rates side by side: those of ``cfg``, then the arm's own."""
    rates = (*cfg.rates, float(hp["lr"]))
    starts = np.array(landscapes.STARTS[cfg.toy]).T
    stream = numpy_generator("landscape-starts", seed, cfg.toy)
    starts = starts + cfg.jitter * stream.standard_normal(starts.shape)
    points, lr = np.tile(starts, len(rates)), np.repeat(rates, starts.shape[1])
    rule = rule_of(arm, cfg.beta2)
    first, second = np.zeros_like(points), np.zeros_like(points)
    reached = np.full(points.shape[1], cfg.steps)
    path: list[np.ndarray] = []
    with np.errstate(all="ignore"):  # too large a learning rate may end in NaN, which solves nothing
        for step in range(cfg.steps):
            sample = landscapes.evaluate(points, cfg.toy)
            below = (sample.losses.sum(0) < cfg.solved) & (reached == cfg.steps)
            reached[below] = step
            if step % max(1, cfg.steps // 125) == 0:
                path.append(points[:, : starts.shape[1]].astype(np.float32))
            if reached.max() < cfg.steps:
                break
            update = rule(sample.gradients)
            first = 0.9 * first + 0.1 * update
            second = 0.999 * second + 0.001 * update * update
            size = np.sqrt(second / (1.0 - 0.999 ** (step + 1))) + 1e-8
            points = points - lr / (1.0 - 0.9 ** (step + 1)) * first / size
    if seed == TEST_SEEDS[0] and cfg.rates:
        log.array("path", np.stack(path))
    return solved_metrics(cfg, reached.reshape(len(rates), -1))


def solved_metrics(cfg: Landscape, reached: np.ndarray) -> dict[str, float]:
    """What became of the starts [rates, starts]; an unsolved one counts with the whole budget.

    ``steps`` is the geometric mean over the common learning rates of the median over starts, ``own_steps`` the median
    at the arm's own rate, ``effort`` the geometric mean over starts there: it also counts what the median hides.
    """
    medians = np.maximum(np.median(reached, axis=1), 1.0)
    solved = (reached < cfg.steps).mean(axis=1)
    found = {
        "steps": float(np.exp(np.log(medians[:-1] if cfg.rates else medians).mean())),
        "own_steps": float(medians[-1]),
        "own_solved": float(solved[-1]),
        "effort": float(np.exp(np.log(np.maximum(reached[-1], 1)).mean())),
    }
    for rate, median, share in zip(cfg.rates, medians, solved, strict=False):
        found |= {f"steps_{rate:g}": float(median), f"solved_{rate:g}": float(share)}
    return found


# --- figures and declarations ------------------------------------------------------------------------------------


def draw_paths(toy: landscapes.Toy) -> Callable[[lab.TrialResult], Figure]:
    """Paths of four arms at the paper's learning rate; matplotlib is imported when it is drawn."""

    def draw(result: lab.TrialResult) -> Figure:
        from pullback.lab.figures.landscapes import trajectories

        return trajectories(result, toy, ("sum", "equalise", "momentum", "sam-gs"))

    return draw


DELTA = lab.Metric("delta_m", better="lower", unit="%", worst=500.0)
NAMED = lab.Metric("delta_m_accuracy", better="lower", unit="%", worst=100.0)
SOLVED = lab.Metric("solved_0.001", better="higher", unit="fraction", worst=0.0)
SELECT = lab.Metric("validation_delta_m", better="lower", unit="%", worst=500.0)


def overlaid_study(name: str, title: str, scales: tuple[float, float, float]) -> lab.Study:
    """The network study at one setting of the loss scales."""
    full = Overlaid(scales)
    return lab.Study(
        room="sam_gs",
        name=name,
        title=title,
        run=run_overlaid,
        arms=lab.Arms(baseline="sum", method="sam-gs", rivals=("equalise",), others=("pcgrad",)),
        primary=DELTA,
        sizes={"smoke": replace(full, steps=20, batch=64, held=300), "full": full},
        hp={"*": {"lr": 4e-3}, "sam-gs": {"gamma": 0.7}},
        tune=lab.Tune(
            trials=12,
            select=SELECT,
            shared={"lr": lab.LogUniform(4e-4, 3e-2)},
            only={"sam-gs": {"gamma": lab.Choice((0.3, 0.5, 0.7, 0.9))}},
        ),
        seeds=lab.Seeds(TEST_SEEDS, tune=(100,)),
        also=(
            lab.Greater("sam-gs", than="sum", metric=NAMED),
            lab.Greater("sam-gs", than="equalise", metric=NAMED),
            lab.Greater("sam-gs", than="pcgrad"),
            lab.Greater("equalise", than="sum"),
        ),
        paper=lab.PaperResult(
            where="table of NYUv2 (three tasks), Delta-m",
            setting="MTAN on NYUv2, Adam; gamma 0.9 and beta2 0.9 chosen by the authors",
            baseline=5.59,
            method=-5.3,
            note="ablation: gamma 0.7 to 0.9 best, 1 (which nearly always equalises) worse",
        ),
        refuted_if=(
            "the paired 95 % interval of Delta-m (sum - sam-gs) reaches 0 or lies below it; if that of "
            "(equalise - sam-gs) does, there is no evidence that the momentum branch helps"
        ),
        cannot_test="NYUv2, Cityscapes, CelebA, MetaWorld, and time against FAMO.",
        deviations=(
            "Two 14x14 MNIST digits on a canvas of 18x18 instead of scenes; a perceptron 324-128-64; 700 Adam steps "
            "of 128 pairs. Delta-m is against three single-task networks of the same seed, batches and first weights "
            "(Adam 4e-3). All arms clip the shared gradient at norm 1, which is part of SAM-GS. Learning rate of "
            "every arm, and gamma, are chosen on validation digits, twelve points each on one seed; gamma up to the "
            "authors' largest, 0.9, because from 1 on SAM-GS is the rival that always equalises. beta1 0.9 and beta2 "
            "0.99 are fixed. The error of the drawing dominates Delta-m, so it is also given for the two "
            "accuracies alone."
        ),
        figures=(
            lab.PairedSeeds(caption="Mean relative loss against single-task networks, every seed."),
            lab.PairedSeeds("delta_m_accuracy", caption="The same over the two accuracies alone."),
            lab.Curves("similarity", caption="Mean magnitude similarity of the three gradients."),
        ),
        timeout=300.0,
    )


def count(name: str) -> lab.Metric:
    """A number of steps."""
    return lab.Metric(name, better="lower", unit="steps", worst=20_000.0)


def landscape_study(name: str, title: str, full: Landscape) -> lab.Study:
    """The study on one of the two landscapes."""
    at = tuple(count(f"steps_{rate:g}") for rate in RATES)
    return lab.Study(
        room="sam_gs",
        name=name,
        title=title,
        run=run_landscape,
        arms=lab.Arms(
            baseline="sum",
            method="sam-gs",
            rivals=("clipped-sum", "equalise", "momentum"),
            others=("pcgrad", "sam-gs-paper"),
        ),
        primary=count("steps"),
        sizes={"smoke": replace(full, steps=300), "full": full, "tuning": replace(full, rates=())},
        hp={"*": {"lr": 1e-2}},
        tune=lab.Tune(
            trials=10,
            select=count("effort"),
            shared={"lr": lab.Choice((0.03, 0.1, 0.3, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0))},
            size="tuning",
        ),
        seeds=lab.Seeds(TEST_SEEDS, tune=(100, 101)),
        also=(
            lab.Greater("sam-gs", than="sum", metric=SOLVED),
            *(lab.Greater("sam-gs", than="sum", metric=metric) for metric in at),
            lab.Greater("sam-gs", than="sum", metric=count("own_steps")),
            lab.Greater("sam-gs", than="clipped-sum", metric=count("own_steps")),
            lab.Greater("sam-gs", than="sam-gs-paper"),
        ),
        paper=lab.PaperResult(
            where="toy problems, figures 2 and 4",
            setting="Adam with learning rate 1e-3, 20,000 steps, seven and six starts; figures without numbers",
            note="said to be the only method that reaches the optimum of the first from every start",
        ),
        refuted_if=(
            "the paired 95 % interval of the steps (sum - sam-gs) reaches 0 or lies below it; the paper's own claim "
            "is that on the share of starts solved at learning rate 1e-3"
        ),
        cannot_test="what a plane cannot show: noise of mini-batches, many parameters, more than two tasks.",
        deviations=(
            "The paper runs each start once. A landscape has no randomness, so a seed adds a normal deviate of "
            "standard deviation 0.1 to each coordinate of each start, the same for all arms. The main number is the "
            "geometric mean over the learning rates 1e-3, 3e-3, 1e-2 and 3e-2 of the median number of steps to "
            f"L1 + L2 < {full.solved:g}; an unsolved start counts as 20,000. Each arm also runs at a learning rate of "
            "its own, tuned far beyond those four (own_steps): the paper tunes none. The arm sam-gs-paper is the "
            "algorithm as printed; the rival clipped-sum clips the sum at norm 1 as the official code does."
        ),
        figures=(
            lab.Drawing(
                "paths",
                draw_paths(full.toy),
                "First seed, learning rate 1e-3: paths from the starts (dots) to the last point (squares), above over "
                "contours of the sum, below in the plane of the two losses.",
            ),
            lab.PairedSeeds(caption="Geometric mean over four rates of the median steps, every seed."),
            lab.PairedSeeds("own_steps", caption="Median steps at each arm's own, tuned learning rate."),
        ),
        timeout=300.0,
    )


STUDIES: tuple[lab.Study, ...] = (
    overlaid_study("overlaid", "Two digits on one canvas, three tasks, losses as they are", (1.0, 1.0, 1.0)),
    overlaid_study("overlaid-uneven", "The same with losses times 1, 0.03 and 30", (1.0, 0.03, 30.0)),
    landscape_study("toy-1", "First landscape of the paper: one common bowl", Landscape(1, -30.0, 0.99)),
    landscape_study("toy-2", "Second landscape of the paper: two optima", Landscape(2, -74.0, 0.9)),
)
"""All studies of this room; the first is the main one."""
