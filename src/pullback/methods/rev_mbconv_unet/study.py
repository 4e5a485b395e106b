"""What does a reversible U-Net save, does it cost accuracy, and what is the saved memory good for?

Memory is counted, not sampled. Networks segment grey and white matter of a template brain, in blocks they never saw.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pullback.core.saved_bytes import saved_bytes
from pullback.core.streams import generator, stream_seed
from pullback.lab import (
    Arms,
    Curves,
    Drawing,
    Equivalent,
    Greater,
    Hyperparameters,
    Log,
    LogUniform,
    Metric,
    PairedSeeds,
    PaperResult,
    Seeds,
    Study,
    TrialResult,
    Tune,
)
from pullback.lab.models.segmentation import Segmentation
from pullback.methods.rev_mbconv_unet.accounting import Mode, analytic_bytes, peak_bytes
from pullback.methods.rev_mbconv_unet.blocks import Pair, ReversibleStage
from pullback.methods.rev_mbconv_unet.unet import ReversibleUNet, dice_score, soft_dice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEST_SEEDS = tuple(range(200, 208))
CHECKPOINT = "checkpoint"
STATE = 16  # bytes of a trained parameter: its weight, gradient and two moments of Adam


class Checkpointed(nn.Module):
    """A stage in plain automatic differentiation with one checkpoint per block."""

    reversible = False

    def __init__(self, stage: ReversibleStage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, pair: Pair) -> Pair:
        """The stage's output."""

        def block(f: nn.Module, g: nn.Module, x1: Tensor, x2: Tensor) -> Pair:
            x1 = x1 + f(x2)
            return x1, x2 + g(x1)

        if pair[0]._base is not None:  # a view would keep the whole of what it views
            pair = pair[0].clone(), pair[1]
        functions = list(self.stage.functions())
        for f, g in zip(functions[::2], functions[1::2], strict=True):
            pair = checkpoint(block, f, g, *pair, use_reentrant=False)
        return pair


def network(width: int, levels: int, blocks: int, expansion: int = 2) -> ReversibleUNet:
    """A network that doubles its width at every level."""
    widths = [width << level for level in range(levels)]
    return ReversibleUNet(1, 3, widths=widths, blocks=(blocks,) * levels, expansion=expansion)


def in_mode(net: ReversibleUNet, mode: Mode) -> ReversibleUNet:
    """The network itself, made to keep what ``mode`` says."""
    net.set_reversible(mode == "reversible")
    if mode == "checkpoint":
        for stages in (net.encoder, net.decoder):
            for index, stage in enumerate(stages):
                if isinstance(stage, ReversibleStage):
                    stages[index] = Checkpointed(stage)
    return net


# --- what fits into a fixed memory --------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Sides from which a seed draws its reference setting, and the side at which bytes are counted."""

    sides: tuple[int, ...] = (64, 96, 128)
    counted_side: int = 16


@dataclass(frozen=True)
class Setting:
    """One network and its input."""

    side: int
    batch: int
    width: int
    blocks: int
    expansion: int
    levels: int

    def network(self, device: str = "meta") -> ReversibleUNet:
        """The network, by default without memory."""
        with torch.device(device):
            return network(self.width, self.levels, self.blocks, self.expansion)

    def bytes(self, mode: Mode) -> int:
        """Peak of activations and the state of training all parameters."""
        net = self.network()
        parameters = sum(p.numel() for p in net.parameters())
        return peak_bytes(net, (self.batch, 1, *(self.side,) * 3), mode) + STATE * parameters


def setting(cfg: Memory, seed: int) -> Setting:
    """The reference setting of a seed."""
    g = generator("setting", seed)

    def pick(values: tuple[int, ...]) -> int:
        return values[int(torch.randint(len(values), (1,), generator=g))]

    return Setting(
        pick(cfg.sides), pick((1, 2)), pick((8, 16, 24)), pick((1, 2, 3)), pick((1, 2, 4)), pick((3, 4))
    )


def largest(fits: Callable[[int], bool], start: int) -> int:
    """The largest number that fits, at least ``start``, which does."""
    high = start
    while fits(2 * high):
        high *= 2
    low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def run_memory(cfg: Memory, arm: str, hp: Hyperparameters, seed: int, log: Log) -> Mapping[str, float]:
    """How much larger input, depth and width may be, in the memory that the plain network of the setting needs."""
    del hp
    mode: Any = arm
    ref = setting(cfg, seed)
    budget, step = ref.bytes("plain"), 1 << (ref.levels - 1)
    side = step * largest(lambda k: replace(ref, side=k * step).bytes(mode) <= budget, ref.side // step)
    width = 2 * largest(lambda k: replace(ref, width=2 * k).bytes(mode) <= budget, ref.width // 2)
    one, two = (replace(ref, blocks=blocks).bytes(mode) for blocks in (1, 2))
    blocks = 1 + (budget - one) // (two - one)  # bytes are linear in the blocks
    small = replace(ref, side=cfg.counted_side, batch=1)
    formula, counted = kept(small, mode)
    if seed == TEST_SEEDS[0]:
        drawn = replace(small, expansion=2, width=8, levels=3)
        rows = [(depth, *kept(replace(drawn, blocks=depth), mode)) for depth in (1, 2, 4, 8)]
        log.array("depths", np.array(rows, dtype=np.float64))
    return {
        "volume_ratio": (side / ref.side) ** 3,
        "depth_ratio": blocks / ref.blocks,
        "width_ratio": width / ref.width,
        "count_error": abs(counted / formula - 1.0),
    }


def kept(each: Setting, mode: Mode) -> tuple[int, int]:
    """Bytes kept after a forward pass, by formula and as counted."""
    x = torch.zeros(each.batch, 1, *(each.side,) * 3)
    net = in_mode(each.network("cpu"), mode)
    return analytic_bytes(each.network(), tuple(x.shape), mode), saved_bytes(lambda: net(x), net, x)


# --- training -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """One size of one training experiment.

    Args:
        width: channels of the first level of the reference network.
        levels: number of levels.
        blocks: blocks of every stage.
        side: side of the training cubes.
        batch: cubes of a step.
        steps: optimizer steps.
        gap_steps: steps over which the losses of two paired runs are compared.
        timed: steps that are timed.
    """

    width: int = 8
    levels: int = 3
    blocks: int = 1
    side: int = 16
    batch: int = 2
    steps: int = 150
    gap_steps: int = 20
    timed: int = 8


def exclusive_dice(scores: Tensor, masks: Tensor) -> Tensor:
    """Soft Dice of classes of which every voxel has one."""
    return soft_dice(scores, masks, activation="softmax")


def begun(cfg: Config, mode: Mode, lr: float, seed: int, parts: int = 1) -> Segmentation:
    """A network of the seed, of the same weights in every mode, and its training, not yet begun."""
    torch.manual_seed(stream_seed("rev-mbconv-unet", seed))
    net = in_mode(network(cfg.width, cfg.levels, cfg.blocks), mode)
    return Segmentation(
        net, exclusive_dice, lr=lr, steps=cfg.steps, side=cfg.side, batch=cfg.batch, seed=seed, parts=parts
    )


def keep_slices(run: Segmentation, seed: int, log: Log) -> None:
    """What the page shows of the first seed."""
    for name, array in run.slices().items() if seed == TEST_SEEDS[0] else ():
        log.array(name, array)


def run_paired(cfg: Config, arm: str, hp: Hyperparameters, seed: int, log: Log) -> Mapping[str, float]:
    """Train one network; arms of a seed share initial weights and batches."""
    mode: Any = arm
    lr = float(hp["lr"])
    run = begun(cfg, mode, lr, seed)
    for step in range(cfg.steps):
        log.value("loss", run.step(step), step)
    keep_slices(run, seed, log)
    if arm == "plain":
        return {**run.overlaps(dice_score), "loss_gap": 0.0, "step_cost": 1.0}
    twin, plain = (begun(cfg, each, lr, seed) for each in (mode, "plain"))
    gap = max(abs(twin.step(step) - plain.step(step)) for step in range(cfg.gap_steps))
    return {**run.overlaps(dice_score), "loss_gap": gap, "step_cost": _cost(twin, plain, cfg.timed)}


def _cost(method: Segmentation, plain: Segmentation, steps: int) -> float:
    """Median over steps, taken in turn, of the processor time of one over that of the other."""

    def seconds(run: Segmentation, step: int) -> float:
        start = time.process_time()
        run.step(step)
        return time.process_time() - start

    return float(np.median([seconds(method, step) / seconds(plain, step) for step in range(steps)]))


# --- networks of one budget ---------------------------------------------------------------------------------

PARTS = {"micro": 2}  # arms that take the batch in parts


def mode_of(arm: str) -> Mode:
    """What an arm's network keeps."""
    return "reversible" if arm == "reversible" else "checkpoint" if arm == CHECKPOINT else "plain"


def grown(cfg: Config, arm: str) -> Config:
    """The widest network of an arm whose peak fits into that of the plain reference network."""

    def needed(width: int, mode: Mode, parts: int) -> int:
        with torch.device("meta"):
            net = network(width, cfg.levels, cfg.blocks)
        return peak_bytes(net, (cfg.batch // parts, 1, *(cfg.side,) * 3), mode)

    budget, mode, parts = needed(cfg.width, "plain", 1), mode_of(arm), PARTS.get(arm, 1)
    return replace(
        cfg, width=2 * largest(lambda half: needed(2 * half, mode, parts) <= budget, cfg.width // 2)
    )


def run_budget(cfg: Config, arm: str, hp: Hyperparameters, seed: int, log: Log) -> Mapping[str, float]:
    """Train the network that an arm can afford."""
    mine = grown(cfg, arm)
    run = begun(mine, mode_of(arm), float(hp["lr"]), seed, PARTS.get(arm, 1))
    start = time.process_time()
    for step in range(cfg.steps):
        run.step(step)
    seconds = time.process_time() - start
    keep_slices(run, seed, log)
    parameters = float(sum(p.numel() for p in run.net.parameters()))
    return {
        **run.overlaps(dice_score),
        "width": float(mine.width),
        "parameters": parameters,
        "seconds": seconds,
    }


# --- declarations -------------------------------------------------------------------------------------------


def _draw(what: str, *arguments: Any) -> Callable[[TrialResult], Figure]:
    """A drawing of `pullback.lab.figures.segmentation`, imported when it is drawn: workers need no matplotlib."""

    def draw(result: TrialResult) -> Figure:
        from pullback.lab.figures import segmentation

        return getattr(segmentation, what)(result, *arguments)

    return draw


VOLUME, DEPTH, WIDTH = (Metric(f"{what}_ratio", unit="times") for what in ("volume", "depth", "width"))
DICE = Metric("dice", unit="fraction")
SELECT = Metric("validation_dice", unit="fraction")
LOSS = Metric("test_loss", better="lower", worst=1.0)
GAP = Metric("loss_gap", better="lower", worst=1.0)
COST = Metric("step_cost", better="lower", unit="times", worst=10.0)
DATA = (
    "Grey matter, white matter and neither in the MNI152 template (2 mm) instead of tumours in BraTS. The template is "
    "its own mirror image, so that a left-right split would test on training voxels: one hemisphere is cut into "
    "coronal blocks with gaps of 10 mm. Batches are 2 cubes of 16 voxels a side, each with its own intensity scale, "
    "bias field and noise. "
)
SLICES = Drawing(
    "slices", _draw("predictions", ("plain", "reversible")), "Test block, first seed: grey and white matter."
)
SHARED: dict[str, Any] = {
    "room": "rev_mbconv_unet",
    "seeds": Seeds(TEST_SEEDS, tune=(100,)),
    "timeout": 200.0,
    "cannot_test": "BraTS Dice, volumes of 240 x 240 x 155, several MRI channels, memory of an accelerator.",
}

MEMORY = Study(
    **SHARED,
    name="memory",
    title="Volume, depth and width in the memory of the plain network",
    run=run_memory,
    arms=Arms("plain", "reversible", rivals=(CHECKPOINT,)),
    sizes={"smoke": Memory(sides=(32,), counted_side=8), "full": Memory()},
    primary=VOLUME,
    claim=Greater("reversible", than="plain", by=2.0),
    also=(
        Greater("reversible", than="plain", by=0.25, metric=DEPTH),
        Greater("reversible", than="plain", by=1.0, metric=WIDTH),
        Greater("reversible", than=CHECKPOINT, metric=DEPTH),
        Greater("reversible", than=CHECKPOINT, metric=WIDTH),
    ),
    figures=(
        Drawing("depths", _draw("bytes_by_depth"), "Bytes kept: three levels, first width 8, e = 2."),
        PairedSeeds(),
    ),
    paper=PaperResult(
        "abstract", "volume at a fixed memory", 1.0, 3.0, note="25 % more depth; up to 2x channels"
    ),
    refuted_if="the 95 % interval of (reversible - plain) of the volume ratio lies below 2, that is 3 times the volume",
    deviations="A seed draws the setting (side, batch, width, blocks, e, levels). Counted is what lives at the peak: "
    "kept activations, the states and gradients of the block that goes back, and 16 bytes per parameter (weight, "
    "gradient, two moments); workspaces of a device's libraries are not. Depth grows on all levels.",
)
PAIRED = Study(
    **SHARED,
    name="paired",
    title="The same network trained with and without reversal",
    run=run_paired,
    arms=Arms("plain", "reversible", rivals=(CHECKPOINT,)),
    sizes={"smoke": Config(steps=2, gap_steps=1, timed=1, width=4, levels=2), "full": Config()},
    primary=LOSS,
    hp={"*": {"lr": 4e-3}},
    claim=Equivalent("reversible", than="plain", within=0.005),
    also=(
        Equivalent("reversible", than="plain", within=0.005, metric=DICE),
        Equivalent("reversible", than="plain", within=1e-3, metric=GAP),
        Equivalent("reversible", than="plain", within=0.8, metric=COST),
    ),
    figures=(SLICES, PairedSeeds(), Curves("loss")),
    paper=PaperResult("abstract", "no loss of accuracy is implied; no Dice was available"),
    refuted_if="test losses differ by 0.005, losses of the first 20 steps by 1e-3, or a step costs over 1.8 times",
    deviations=DATA
    + "One learning rate for all arms, which are one network; nothing is tuned. The primary metric is "
    "the loss, which moves where no voxel changes its class. Costs are processor time and differ from run to run.",
)
BUDGET = Study(
    **SHARED,
    name="budget",
    title="What the freed memory is good for: the widest network of a fixed memory",
    run=run_budget,
    arms=Arms("plain", "reversible", rivals=(CHECKPOINT, "micro")),
    sizes={"smoke": Config(steps=1, width=2, levels=2), "full": Config()},
    primary=DICE,
    hp={"*": {"lr": 4e-3}},
    tune=Tune(trials=7, select=SELECT, shared={"lr": LogUniform(1e-4, 3e-2)}),
    figures=(SLICES, PairedSeeds()),
    paper=PaperResult("abstract", "up to twice the channels in the same memory; no Dice was available"),
    refuted_if="the 95 % interval of (reversible - plain) includes 0 or lies below it",
    deviations=DATA
    + "Equal steps, not equal time: wider networks cost more. Peaks are those of the formula.",
)

STUDIES: tuple[Study, ...] = (MEMORY, PAIRED, BUDGET)
"""All studies of this room; the first is the main one."""
