"""Does resolving conflicts between accumulated gradients train a masked autoencoder better, and is it the resolving?

Digits with three quarters of their patches hidden are completed under two losses, L1 and 1 - SSIM, whose gradients
disagree in most updates. Beside the weighted sum runs the same pipeline without projections: there AdamW's second
moment sees the smoothed gradient as it does in GCond, which alone lengthens its steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import nn
from torchjd.aggregation import Aggregator, CAGrad, PCGrad

from pullback import lab
from pullback.core.gradnorm import GradNorm
from pullback.core.streams import generator, stream_seed
from pullback.lab.models.masked import (
    Batch,
    Images,
    autoencoder,
    cosine_of_losses,
    digit_parts,
    epoch_rows,
    masks,
    quality,
    warm_cosine,
)
from pullback.methods.gcond.buffers import MomentumWriter, TaskAccumulator
from pullback.methods.gcond.conductor import GradientConductor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 64
WEIGHTS = {"l1": 0.85, "ssim": 0.15}
TEST_SEEDS = tuple(range(200, 208))  # no pilot run has used them


@dataclass(frozen=True)
class Config:
    """One size of one experiment.

    Args:
        updates: optimizer steps with ``micro_batches`` each; an arm called ``<kind>-<K>`` takes as many images in
            steps of K, the arm ``longer`` takes two thirds more.
        micro_batches: micro-batches of 64 images per update.
        norm: batch norm after both hidden layers.
        points: points of every curve.
        checks: how often the cosine of a batch is compared with that of 2,048 images.
    """

    updates: int
    micro_batches: int = 8
    norm: bool = False
    points: int = 20
    checks: int = 0


# --- the arms ------------------------------------------------------------------------------------------------------


@runtime_checkable  # the examples are run with types checked as well
class Way(Protocol):
    """How an arm turns a batch into ``.grad``; returns the cosine of the two gradients where it measures it."""

    def __call__(self, batch: Batch) -> float | None:
        """Write ``.grad`` for this batch."""


def way_of(arm: str, net: nn.Module, hp: lab.Hyperparameters) -> tuple[Way, float]:
    """The arm's way to its gradient, and the decay of AdamW's own first moment."""
    kind = arm.partition("-")[0]
    if kind in {"sum", "longer"}:
        return _Sum(net, 0.0), 0.9
    if kind == "control":
        return _Sum(net, 0.9), 0.0
    if kind == "gradnorm":
        return _GradNorm(net, float(hp["weight_lr"])), 0.9
    if kind in {"pcgrad", "cagrad"}:
        return _Aggregated(net, PCGrad() if kind == "pcgrad" else CAGrad(float(hp["c"]))), 0.9
    if kind == "stochastic":
        return _Stochastic(net), 0.0
    return (_Sequential(net, momentum=0.0), 0.9) if kind == "pure" else (_Sequential(net), 0.0)


class _Sum:
    """The weighted sum; with ``momentum`` as in GCond it is what is left of that without projections."""

    def __init__(self, net: nn.Module, momentum: float) -> None:
        self.net, self.conductor = net, GradientConductor(net, ("all",), accumulate=1, momentum=momentum)

    def __call__(self, batch: Batch) -> float | None:
        found = batch.losses(self.net)
        with self.conductor.accumulate("all"):
            torch.stack([weight * found[name] for name, weight in WEIGHTS.items()]).sum().backward()
        self.conductor.step()
        return None


class _GradNorm:
    """GradNorm on the weighted losses, so that it begins as the sum; norms are those at the last layer."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        self.net, self.balance = net, GradNorm(len(WEIGHTS), asymmetry=1.5, lr=lr)
        self.last = list(net.parameters())[-2]

    def __call__(self, batch: Batch) -> float | None:
        found = batch.losses(self.net)
        weighted = torch.stack([weight * found[name] for name, weight in WEIGHTS.items()])
        grads = [torch.autograd.grad(loss, self.last, retain_graph=True)[0] for loss in weighted]
        weights = self.balance.update(weighted.detach(), torch.stack([g.norm() for g in grads]))
        (weights * weighted).sum().backward()
        return None


class _Aggregated:
    """An aggregator of TorchJD on the accumulated gradients."""

    def __init__(self, net: nn.Module, aggregator: Aggregator) -> None:
        self.net, self.aggregator = net, aggregator
        self.tasks, self.writer = TaskAccumulator(net, WEIGHTS), MomentumWriter(net, beta=0.0)

    def __call__(self, batch: Batch) -> float | None:
        found = batch.losses(self.net)
        for name in WEIGHTS:
            with self.tasks.accumulate(name):
                found[name].backward(retain_graph=name != "ssim")
        self.writer.write_(self.aggregator(self.tasks.jacobian()))
        self.tasks.reset()
        return None


class _Sequential:
    """GCond with all images for both tasks."""

    def __init__(self, net: nn.Module, momentum: float = 0.9) -> None:
        self.net = net
        self.conductor = GradientConductor(net, WEIGHTS, accumulate=1, mode="sequential", momentum=momentum)

    def __call__(self, batch: Batch) -> float | None:
        self.conductor.backward(batch.losses(self.net))
        return self.conductor.step().min_cosine


class _Stochastic:
    """GCond with half of the images for each task: as many passes as the sum."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.conductor = GradientConductor(net, WEIGHTS, accumulate=2, mode="stochastic")

    def __call__(self, batch: Batch) -> float | None:
        for task, half in self.conductor.schedule(batch.halves()):
            with self.conductor.accumulate(task):
                half.losses(self.net)[task].backward()
        return self.conductor.step().min_cosine


# --- one run -------------------------------------------------------------------------------------------------------


def plan(cfg: Config, arm: str) -> tuple[int, int]:
    """Updates of an arm and images per update."""
    suffix = arm.partition("-")[2]
    k = int(suffix) if suffix.isdigit() else cfg.micro_batches
    updates = cfg.updates * cfg.micro_batches // k
    return updates * (5 if arm == "longer" else 3) // 3, k * BATCH


def run(cfg: Config, arm: str, hp: lab.Hyperparameters, seed: int, log: lab.Log) -> dict[str, float]:
    """Train one autoencoder; arms of a seed share initial weights, images and masks."""
    train, validation, test = digit_parts()
    updates, size = plan(cfg, arm)
    torch.manual_seed(stream_seed("gcond-start", seed))
    net = autoencoder(norm=cfg.norm)
    net.train(not arm.endswith("-eval"))
    way, beta = way_of(arm, net, hp)
    optimizer = torch.optim.AdamW(net.parameters(), betas=(beta, 0.95), weight_decay=0.05, fused=True)
    torch.manual_seed(
        stream_seed("gcond-aggregator", seed)
    )  # PCGrad draws its order from the global generator
    many = Batch(train.take(slice(0, 2048)), masks(2048, generator("gcond-check-masks", seed)))
    rows, cosines, errors = epoch_rows(len(train.x), updates, size, seed), [], []
    for step in range(updates):
        mask = masks(size, generator("gcond-masks", seed, step))
        batch = Batch(train.take(rows[step]), mask)
        optimizer.param_groups[0]["lr"] = float(hp["lr"]) * warm_cosine((step + 1) / updates)
        if cfg.checks and step % max(1, updates // cfg.checks) == 0:
            errors.append(abs(cosine_of_losses(net, batch) - cosine_of_losses(net, many)))
        cosine = way(batch)
        cosines += [] if cosine is None else [cosine]
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, updates // cfg.points) == 0:
            _record(log, net, test, seed, step + 1, cosines)
    found = {f"test_{name}": value for name, value in quality(net, test, seed).items()}
    chosen = quality(net, validation, seed)
    found["validation_objective"] = sum(WEIGHTS[name] * value for name, value in chosen.items())
    if cosines:
        found["conflicts"] = sum(c < 0 for c in cosines) / len(cosines)
    return {**found, **({"cosine_error": sum(errors) / len(errors)} if errors else {})}


def _record(log: lab.Log, net: nn.Module, test: Images, seed: int, step: int, cosines: list[float]) -> None:
    for name, value in quality(net, test.take(slice(0, 500)), seed).items():
        log.value(f"test_{name}", value, step)
    if cosines:
        log.value("cosine", sum(cosines[-10:]) / len(cosines[-10:]), step)


def _draw(result: lab.TrialResult) -> Figure:
    """Losses and the error of the cosine against K; imported when it is drawn: runs need no matplotlib."""
    from pullback.lab.figures.accumulation import against_accumulation

    panels = {"test_l1": "L1", "test_ssim": "1 - SSIM", "cosine_error": "error of the cosine"}
    return against_accumulation(result, panels, kinds=("control", "gcond"), steps=STEPS)


# --- declarations --------------------------------------------------------------------------------------------------

STEPS = (1, 2, 4, 8, 16)
L1 = lab.Metric("test_l1", better="lower", worst=2.0)
SSIM = lab.Metric("test_ssim", better="lower", worst=2.0)
COSINE_ERROR = lab.Metric("cosine_error", better="lower", worst=2.0)
SELECT = lab.Metric("validation_objective", better="lower", worst=2.0)
CANNOT = (
    "ImageNet, tomography, ConvNeXt, batches of 6,144 images, GPU memory and throughput. Times are compared in "
    "benchmarks/bench_gcond.py."
)
SMALLER = (
    "MNIST 2x2 pooled to 14x14, 2x2 patches, 37 of 49 hidden, perceptron 392-256-256-196 instead of a convolutional "
    "encoder; 64 images x 8 micro-batches (computed as one batch, which gives the same gradients); AdamW with weight "
    "decay 0.05, second moment 0.95, 10 % warm-up and a cosine, 8 seeds. The arms of GCond and control run with "
    "AdamW's first moment off behind an integrated momentum of 0.9, the others with betas (0.9, 0.95). "
)
PAPER = lab.PaperResult(
    where="results on ImageNet, MobileNetV3-Small",
    setting="best validation L1 (on z-scored pixels) of 3 seeds, equal untuned learning rates",
    baseline=0.41542,
    method=0.31493,
    note="1 - SSIM 0.348 and 0.245; stochastic 0.317 and 0.247; PCGrad 0.423 and 0.342",
)


def _declare(
    name: str, title: str, full: Config, smoke: Config, lrs: tuple[float, ...], **fields: Any
) -> lab.Study:
    """A study of this room; ``lrs`` are the learning rates that every arm tunes, if any."""
    own = {
        "cagrad": {"c": lab.Choice((0.2, 0.4, 0.8))},
        "gradnorm": {"weight_lr": lab.Choice((1e-3, 1e-2, 5e-2))},
    }
    names = fields["arms"].names()
    only = {arm: domains for arm, domains in own.items() if arm in names}
    shared = {"lr": lab.Choice(lrs)}
    return lab.Study(
        room="gcond",
        name=name,
        title=title,
        run=run,
        primary=L1,
        sizes={"smoke": smoke, "full": full},
        tune=lab.Tune(trials=len(lrs), select=SELECT, shared=shared, only=only) if lrs else None,
        seeds=lab.Seeds(TEST_SEEDS, tune=(100, 101)),
        hp={"*": {"lr": 1e-3}, **({"cagrad": {"c": 0.4}, "gradnorm": {"weight_lr": 1e-2}} if only else {})},
        cannot_test=CANNOT,
        timeout=300.0,
        **fields,
    )


WIDE = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
NARROW = (5e-4, 1e-3, 2e-3, 4e-3)

MAIN = _declare(
    "tuned",
    "Masked digits, L1 and 1 - SSIM: GCond against a tuned weighted sum and against itself without projections",
    Config(updates=200),
    Config(updates=8, micro_batches=4, points=4),
    WIDE,
    arms=lab.Arms(
        baseline="sum",
        method="gcond",
        rivals=("control",),
        others=("longer", "pcgrad", "cagrad", "gradnorm", "stochastic", "pure"),
    ),
    claim=lab.Greater("gcond", than="sum"),
    also=(
        lab.Greater("gcond", than="sum", metric=SSIM),
        lab.Greater("gcond", than="control", metric=SSIM),
        lab.Equivalent("stochastic", than="gcond", within=0.01),
        lab.Equivalent("stochastic", than="gcond", within=0.01, metric=SSIM),
        lab.Greater("gcond", than="longer"),
        lab.Greater("gcond", than="pcgrad"),
        lab.Greater("gcond", than="cagrad"),
        lab.Greater("gcond", than="gradnorm"),
        lab.Greater("pure", than="sum"),
        lab.Greater("pure", than="sum", metric=SSIM),
    ),
    refuted_if=(
        "the paired 95 % interval of (sum - gcond) lies below 0 on L1; where gcond does not beat control, the gain is "
        "that of the momentum's place and not of the projections"
    ),
    paper=PAPER,
    deviations=SMALLER
    + (
        "Learning rates are tuned for every arm, where the paper gives all arms the same. The arm longer is the sum "
        "with 5/3 of the updates: as many passes as sequential GCond, which shares a forward pass between two backward "
        "ones; stochastic takes as many as the sum. pure is GCond without its own momentum, under AdamW's."
    ),
    figures=(
        lab.PairedSeeds(caption="L1 on hidden pixels of 2,000 test digits, every seed."),
        lab.PairedSeeds("test_ssim", caption="1 - SSIM of the completed digits, every seed."),
        lab.Curves("test_l1", x="update", caption="L1 on 500 test digits during training."),
        lab.Curves("test_ssim", x="update", caption="1 - SSIM on 500 test digits during training."),
        lab.Curves(
            "cosine", x="update", caption="Cosine of the two accumulated gradients, mean of 10 updates."
        ),
    ),
)

EQUAL_RATES = _declare(
    "equal-rates",
    "The paper's protocol: all arms at the same untuned learning rate",
    Config(updates=200),
    Config(updates=8, micro_batches=4, points=4),
    (),
    arms=lab.Arms(baseline="sum", method="gcond", rivals=("control",)),
    also=(lab.Greater("gcond", than="sum", metric=SSIM), lab.Greater("gcond", than="control", metric=SSIM)),
    refuted_if="the paired 95 % interval of (sum - gcond) lies below 0 on L1",
    paper=PAPER,
    deviations=SMALLER + "Learning rate 1e-3 for all arms, which is far below the sum's best.",
)

ACCUMULATION = _declare(
    "accumulation",
    "Equal data in updates of K = 1 to 16 micro-batches: does accumulation make conflict detection pay?",
    Config(updates=100, checks=8, points=4),
    Config(updates=4, checks=1, points=2),
    NARROW,
    arms=lab.Arms(
        baseline="gcond-1",
        method="gcond-8",
        rivals=("control-8",),
        others=(*(f"control-{k}" for k in STEPS if k != 8), "gcond-2", "gcond-4", "gcond-16"),
    ),
    claim=lab.Greater("gcond-8", than="gcond-1"),
    also=(
        lab.Greater("gcond-8", than="gcond-1", metric=COSINE_ERROR),
        lab.Greater("gcond-1", than="control-1"),
        lab.Greater("gcond-16", than="control-16"),
    ),
    refuted_if="the paired 95 % interval of (gcond-1 - gcond-8) lies below 0 on L1",
    paper=lab.PaperResult(
        where="section 3.1",
        setting="24 micro-batches of 256 images per update in all arms; the number is not varied",
    ),
    deviations=SMALLER
    + (
        "800 micro-batches in all, so that more of them per update means fewer updates. The cosine's error is its "
        "distance from that on 2,048 training images, at the same weights, at 8 points of training."
    ),
    figures=(
        lab.Drawing("k", _draw, "Losses at equal data and the error of the cosine against K."),
        lab.PairedSeeds(),
    ),
)

BATCH_NORM = _declare(
    "batch-norm",
    "Batch norm in eval() while training, as the published code does: a confound alone",
    Config(updates=120, norm=True, points=10),
    Config(updates=8, micro_batches=4, norm=True, points=4),
    WIDE,
    arms=lab.Arms(
        baseline="sum-train",
        method="gcond-eval",
        rivals=("sum-eval", "gcond-train"),
        others=("control-train",),
    ),
    claim=lab.Greater("gcond-eval", than="sum-train"),
    also=(
        lab.Greater("gcond-train", than="gcond-eval"),
        lab.Greater("gcond-train", than="sum-train"),
        lab.Greater("gcond-train", than="control-train"),
    ),
    refuted_if="the paired 95 % interval of (sum-train - gcond-eval) lies below 0 on L1",
    paper=PAPER,
    deviations=SMALLER
    + (
        "Batch norm after both hidden layers; *-eval arms train with running statistics that are never updated (mean "
        "0, variance 1), as the published class does with its default, *-train arms as usual."
    ),
)

STUDIES: tuple[lab.Study, ...] = (MAIN, EQUAL_RATES, ACCUMULATION, BATCH_NORM)
"""All studies of this room; the first is the main one."""
