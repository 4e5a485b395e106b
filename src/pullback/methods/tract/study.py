"""Does TrAct in the first layer save a fifth of the training, and is it more than whitening the data would do?

Small convolutional networks and a small vision transformer learn real digits in a few epochs. As in the paper
the learning rate is tuned for the baseline and reused; beside that TrAct and every rival have their own best rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback.core.streams import generator, stream_seed
from pullback.lab import (
    Arms,
    Choice,
    Drawing,
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
from pullback.methods.tract.covariance import Patches, moments
from pullback.methods.tract.layers import tract

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUDGETS = {"plain_1.25x": 1.25, "plain_2x": 2.0, "plain_4x": 4.0, "tract_4x": 4.0}  # of the others: 1
REUSED = ("tract", "tract_4x")  # arms that take the learning rate of the plain arm of their budget
TEST_SEEDS = tuple(range(200, 208))


@dataclass(frozen=True)
class Config:
    """One size of one experiment.

    Args:
        net: ``cnn``: first layer 5x5, stride 2 (n = 25); ``vit``: patches of 7x7 (n = 49), one transformer block.
        optimizer: ``sgd`` (momentum 0.9) or ``adam``.
        inputs: ``standardised`` over the data set, ``unit`` for [0, 1], ``bytes`` for [0, 255].
        steps: optimizer steps of budget 1.
        batch: images per step.
        tuning: score a run for the choice of hyperparameters; see `trained_as`.
    """

    net: Literal["cnn", "vit"]
    optimizer: Literal["sgd", "adam"]
    inputs: Literal["standardised", "unit", "bytes"] = "standardised"
    steps: int = 218
    batch: int = 64
    tuning: bool = False


# --- data and networks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Images [n, 1, 28, 28] and their digits [n]."""

    x: Tensor
    y: Tensor


@cache
def parts(inputs: str) -> tuple[Part, Part, Part]:
    """7,000 digits for training, 1,000 for selection, 2,000 for the test; read once per process."""
    digits = mnist()
    x, y = digits.images.float().unsqueeze(1), digits.labels
    if inputs == "unit":
        x = x / 255
    elif inputs == "standardised":
        x = (x - x[:7000].mean()) / x[:7000].std()
    train, validation, test = (Part(x[a:b], y[a:b]) for a, b in ((0, 7000), (7000, 8000), (8000, 10000)))
    return train, validation, test


class Embedded(nn.Module):
    """Patches to tokens with learned positions, one pre-norm transformer block, all tokens to the head."""

    def __init__(self, first: nn.Module, width: int = 64, tokens: int = 16) -> None:
        super().__init__()
        self.first = first
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.mix, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.back = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(tokens * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores [n, 10] of images [n, 1, 28, 28]."""
        tokens = self.first(x).flatten(2).mT + self.positions
        q, k, v = self.mix(self.norms[0](tokens)).unflatten(2, (2, -1)).transpose(1, 2).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + self.join(mixed)
        tokens = tokens + self.back(F.gelu(self.wide(self.norms[1](tokens))))
        return self.head(self.norms[2](tokens).flatten(1))


def network(net: str) -> tuple[nn.Module, nn.Conv2d]:
    """A network with torch's own initialisation, and its first layer."""
    if net == "vit":
        first = nn.Conv2d(1, 64, 7, stride=7)
        return Embedded(first), first
    first = nn.Conv2d(1, 16, 5, stride=2, padding=2)
    second = nn.Conv2d(16, 32, 3, stride=2, padding=1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(1568, 10)), first


def covariance(first: nn.Conv2d, x: Tensor) -> Tensor:
    """Mean outer product [n, n] of the patches that ``first`` sees in ``x``, in float64."""
    pads = tuple((int(pad), int(pad)) for pad in first.padding)
    patches = Patches(1, 1, first.kernel_size, first.stride, (1, 1), pads, "zeros")
    return moments(x, patches, torch.float64)[0] / patches.count(x)


def whiten(first: nn.Conv2d, x: Tensor, lam: float) -> None:
    """Let ``first`` see ZCA-whitened patches: the rival with the same covariance, once, in the forward pass.

    Whitening a patch is linear, so that it is done to the kernel. Under plain SGD the product of the two then moves as
    TrAct would with the covariance of the whole data set.
    """
    values, vectors = torch.linalg.eigh(covariance(first, x))
    root = (vectors * (values.clamp_min(0.0) + lam).rsqrt()) @ vectors.T

    def forward(root: Tensor, images: Tensor) -> Tensor:
        kernel = (first.weight.flatten(1) @ root).view_as(first.weight)
        return F.conv2d(images, kernel, first.bias, first.stride, first.padding)

    vars(first)["forward"] = partial(forward, root.float())


def normalise_patches(first: nn.Conv2d) -> None:
    """Let ``first`` see every patch with mean 0 and variance 1 (patch normalisation, an ablation of the paper)."""
    box = torch.full((1, 1, *first.kernel_size), 1.0 / first.weight[0].numel())

    def forward(images: Tensor) -> Tensor:
        mean, square = (
            F.conv2d(each, box, None, first.stride, first.padding) for each in (images, images * images)
        )
        spread = (square - mean * mean).clamp_min(0.0).add(1e-5).sqrt()
        sums = first.weight.sum((1, 2, 3)).view(1, -1, 1, 1)
        z = F.conv2d(images, first.weight, None, first.stride, first.padding)
        bias: Any = first.bias
        return (z - mean * sums) / spread + bias.view(1, -1, 1, 1)

    vars(first)["forward"] = forward


# --- one run ------------------------------------------------------------------------------------------------


def trained_as(cfg: Config, arm: str) -> str:
    """What an arm trains: while tuning, the arms of the paper's protocol score the baseline's learning rates."""
    plain = "plain" if BUDGETS.get(arm, 1.0) == 1.0 else "plain_4x"
    return plain if cfg.tuning and arm in REUSED else arm


def optimizer_for(cfg: Config, arm: str, model: nn.Module, first: nn.Conv2d, hp: Hyperparameters) -> Any:
    """The optimizer; the arm ``first_rate`` gives the first layer's weight a learning rate of its own."""
    factor = float(hp["factor"]) if arm == "first_rate" else 1.0
    rate = float(hp["lr"])
    rest = [p for p in model.parameters() if p is not first.weight]
    groups = [{"params": rest}, {"params": [first.weight], "lr": rate * factor}]
    if cfg.optimizer == "adam":
        return torch.optim.Adam(groups, lr=rate, fused=True)
    return torch.optim.SGD(groups, lr=rate, momentum=0.9, fused=True)


def run(cfg: Config, arm: str, hp: Hyperparameters, seed: int, log: Log) -> Mapping[str, float]:
    """Train one network; arms of a seed share initial weights and the order of the data."""
    train, validation, test = parts(cfg.inputs)
    arm = trained_as(cfg, arm)
    torch.manual_seed(stream_seed("tract", seed))
    model, first = network(cfg.net)
    if arm.startswith("tract"):
        tract(first, lam=float(hp["lam"]))
    elif arm == "whitened":
        whiten(first, train.x[:2000], float(hp["lam"]))
    elif arm == "patch_norm":
        normalise_patches(first)
    optimizer = optimizer_for(cfg, arm, model, first, hp)
    steps = round(cfg.steps * BUDGETS.get(arm, 1.0))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps)
    )
    per_epoch = len(train.y) // cfg.batch
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(train.y), generator=generator("order", seed, step // per_epoch))
        rows = order[step % per_epoch * cfg.batch :][: cfg.batch]
        loss = F.cross_entropy(model(train.x[rows]), train.y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if seed == TEST_SEEDS[0] and arm == "tract":
        log.array("spectrum", torch.linalg.eigvalsh(covariance(first, train.x[:2000])).flip(0).numpy())
    return {
        "test_accuracy": accuracy(model, test),
        "validation_accuracy": accuracy(model, validation),
        "epochs": steps / per_epoch,
    }


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    """Fraction of ``part`` whose digit has the highest score."""
    right = [
        (model(x).argmax(1) == y).float() for x, y in zip(part.x.split(500), part.y.split(500), strict=True)
    ]
    return float(torch.cat(right).mean())


# --- figure -------------------------------------------------------------------------------------------------


def draw_budgets(result: TrialResult) -> Figure:
    """Test accuracy against the epochs of every arm, and the spectrum of the input covariance beside the damping."""
    from pullback.lab.figures import arm_colours, panels  # workers need no matplotlib

    figure, (left, right) = panels(2, height=3.2)
    colours = arm_colours(result.arms)
    lines = {"plain": ("plain", "plain_1.25x", "plain_2x", "plain_4x"), "tract": ("tract", "tract_4x")}
    shown = {arm.name for arm in result.arms}
    for name, arms in lines.items():
        points = []
        for arm in (arm for arm in arms if arm in shown):
            values = list(result.scores(arm, "test_accuracy").values())
            epochs = next(iter(result.scores(arm, "epochs").values()))
            left.plot([epochs] * len(values), values, ".", color=colours[name], alpha=0.35)
            points.append((epochs, sum(values) / len(values)))
        style = "--" if name == "plain" else "-"
        left.plot(*zip(*points, strict=True), style, marker="o", color=colours[name], label=name)
    left.set(xlabel="epochs", ylabel="test accuracy")
    left.legend(loc="lower right")
    spectrum = result.array("tract", "spectrum")
    if spectrum is not None:
        right.semilogy(range(1, len(spectrum) + 1), spectrum.clip(1e-6), ".-", color=colours["tract"])
    right.axhline(0.1, color=colours["plain"], linewidth=0.8)
    right.set(xlabel="eigenvalue of the patches' covariance", ylabel="size (line: damping 0.1)")
    return figure


# --- declarations -------------------------------------------------------------------------------------------

ACCURACY = Metric("test_accuracy", unit="fraction")
SELECT = Metric("validation_accuracy", unit="fraction")
EPOCHS = Metric("epochs", better="lower", worst=100.0)
LAMS = Choice((0.05, 0.1, 0.2, 0.4, 0.8))
FACTORS = Choice((0.1, 0.3, 3.0, 10.0, 30.0))
RIVALS = ("whitened", "patch_norm", "first_rate")
OTHERS = ("plain_1.25x", "plain_2x", "tract_own")
BUDGET = Drawing(
    "budgets",
    draw_budgets,
    "Left: every point is one seed, lines are means; each budget has its own cosine schedule and learning rate. "
    "Right: what the damping is up against.",
)
DEVIATIONS = (
    "Small networks on 7,000 digits, about two epochs and up to four times that, where the paper trains ResNets and "
    "ViTs for 100 to 800. The learning rate is tuned for the baseline at every budget and reused for TrAct as in the "
    "paper (while tuning, the arm tract trains the baseline); tract_own tunes rate and damping. The paper lacks two "
    "rivals: whitened has the covariance of the data set in the forward pass, first_rate gives the first layer a "
    "learning rate of its own. Patch normalisation is the paper's ablation. The transformer gives all tokens to its "
    "head, so that it learns something in two epochs."
)
CANNOT = "ResNet and ViT on CIFAR and ImageNet, detection, and training of hundreds of epochs."


def declare(
    name: str, title: str, cfg: Config, rates: tuple[float, ...], paper: PaperResult, *, long: bool = False
) -> Study:
    """A study of this room; ``long`` adds both protocols at four times the training."""
    lams = {"lam": LAMS}
    return Study(
        room="tract",
        name=name,
        title=title,
        run=run,
        arms=Arms(
            "plain", "tract", rivals=RIVALS, others=(*OTHERS, "plain_4x", "tract_4x") if long else OTHERS
        ),
        primary=ACCURACY,
        sizes={"smoke": replace(cfg, steps=4), "full": cfg, "tuning": replace(cfg, tuning=True)},
        hp={"*": {"lr": rates[len(rates) // 2], "lam": 0.1, "factor": 1.0}},
        tune=Tune(
            trials=5 * len(rates),
            select=SELECT,
            shared={"lr": Choice(rates)},
            only={"whitened": lams, "tract_own": lams, "first_rate": {"factor": FACTORS}},
            size="tuning",
        ),
        seeds=Seeds(TEST_SEEDS, tune=(100,)),
        claim=Greater("tract", than="plain_1.25x"),
        also=(
            Greater("tract", than="plain"),
            Greater("tract", than="plain_2x"),
            Greater("tract_own", than="plain"),
            *((Greater("tract_4x", than="plain_4x"),) if long else ()),
        ),
        timeout=300.0,
        figures=(BUDGET, PairedSeeds()),
        paper=paper,
        refuted_if="the 95 % interval of (tract - plain_1.25x) includes 0 or lies below it",
        cannot_test=CANNOT,
        deviations=DEVIATIONS,
    )


RESNET = PaperResult(
    "Figure 1 and Table 1", "CIFAR-100, mean of 36 convolutional networks, 200 epochs, top-1", 0.7590, 0.7639,
    note="75.94 % with 133 epochs of TrAct; on CIFAR-10 TrAct at 100 epochs beats the baseline at 800 with SGD",
)  # fmt: skip
VIT = PaperResult(
    "Table 3", "ImageNet, DeiT-III ViT-S, 400 epochs, top-1", 0.8123, 0.8150,
    note="81.97 against 82.18 % at 800 epochs",
)  # fmt: skip
RANGES = PaperResult(
    "ablation of the input range", "a figure without numbers: without standardisation the gain shrinks"
)
SGD = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
BYTES = (1e-3, 2e-3, 4e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5)
ADAM = (3e-4, 1e-3, 3e-3, 6e-3, 1e-2, 2e-2, 4e-2)

STUDIES: tuple[Study, ...] = (
    declare(
        "cnn-sgd",
        "Convolutional network, SGD: TrAct against 1.25 times the training",
        Config("cnn", "sgd"),
        SGD,
        RESNET,
        long=True,
    ),
    declare("cnn-adam", "Convolutional network, Adam", Config("cnn", "adam"), ADAM, RESNET),
    declare("vit-adam", "Vision transformer with patches of 7x7, Adam", Config("vit", "adam"), ADAM, VIT),
    declare(
        "cnn-unit", "Convolutional network, SGD, inputs in [0, 1]", Config("cnn", "sgd", "unit"), SGD, RANGES
    ),
    declare(
        "cnn-bytes",
        "Convolutional network, SGD, inputs in [0, 255]",
        Config("cnn", "sgd", "bytes"),
        BYTES,
        RANGES,
    ),
)
"""All studies of this room; the first is the main one."""
