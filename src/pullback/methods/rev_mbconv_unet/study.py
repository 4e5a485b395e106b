"""What does a reversible U-Net save, does it cost accuracy, and what is the saved memory good for?

Memory is counted, not sampled: the bytes kept for the backward pass follow from a formula that every run checks against
autograd's own tensors. Networks segment grey and white matter of a template brain, on blocks of it that they never saw.
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
from pullback.lab.data import brain_tissue
from pullback.lab.models.segmentation import Segmentation
from pullback.methods.rev_mbconv_unet.accounting import Mode, analytic_bytes, peak_bytes
from pullback.methods.rev_mbconv_unet.blocks import Pair, ReversibleStage
from pullback.methods.rev_mbconv_unet.unet import ReversibleUNet, dice_score, soft_dice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEST_SEEDS = tuple(range(200, 208))
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

        pair = (
            (pair[0].clone(), pair[1]) if pair[0]._base is not None else pair
        )  # a view would keep the whole
        functions = list(self.stage.functions())
        for f, g in zip(functions[::2], functions[1::2], strict=True):
            pair = checkpoint(block, f, g, *pair, use_reentrant=False)
        return pair


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
    """Sides of the volumes from which a seed draws its reference setting, and that of the counted one."""

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
        widths = [self.width << level for level in range(self.levels)]
        with torch.device(device):
            return ReversibleUNet(
                1, 2, widths=widths, blocks=(self.blocks,) * self.levels, expansion=self.expansion
            )

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
    budget, step = ref.bytes("plain"), 2 ** (ref.levels - 1)
    side = step * largest(lambda k: replace(ref, side=k * step).bytes(mode) <= budget, ref.side // step)
    width = 2 * largest(lambda k: replace(ref, width=2 * k).bytes(mode) <= budget, ref.width // 2)
    one, two = (
        replace(ref, blocks=blocks).bytes(mode) for blocks in (1, 2)
    )  # bytes are linear in the blocks
    blocks = 1 + (budget - one) // (two - one)
    small = replace(ref, side=cfg.counted_side, batch=1)
    net, x = in_mode(small.network("cpu"), mode), torch.zeros(1, 1, *(small.side,) * 3)
    wanted = analytic_bytes(small.network(), tuple(x.shape), mode)
    if seed == TEST_SEEDS[0]:
        _depths(small, mode, log)
    return {
        "volume_ratio": (side / ref.side) ** 3,
        "depth_ratio": blocks / ref.blocks,
        "width_ratio": width / ref.width,
        "count_error": abs(saved_bytes(lambda: net(x), net, x) / wanted - 1.0),
    }


def _depths(small: Setting, mode: Mode, log: Log) -> None:
    """Bytes against blocks, by formula and as counted."""
    rows = []
    for blocks in (1, 2, 4, 8):
        each = replace(small, blocks=blocks, expansion=2, width=8, levels=3)
        x = torch.zeros(1, 1, *(small.side,) * 3)
        net = in_mode(each.network("cpu"), mode)
        formula = analytic_bytes(each.network(), tuple(x.shape), mode)
        rows.append((blocks, formula, saved_bytes(lambda net=net, x=x: net(x), net, x)))
    log.array("depths", np.array(rows, dtype=np.float64))


# --- training -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """One size of one training experiment.

    Args:
        widths: channels of the levels of the reference network.
        blocks: blocks of every stage.
        side: side of the training cubes.
        batch: cubes of a step.
        steps: optimizer steps.
        gap_steps: steps over which the losses of two paired runs are compared.
        timed: steps that are timed.
    """

    widths: tuple[int, ...] = (8, 16, 32)
    blocks: int = 1
    side: int = 16
    batch: int = 2
    steps: int = 100
    gap_steps: int = 20
    timed: int = 8

    def network(self, seed: int, mode: Mode) -> ReversibleUNet:
        """The network of a seed, the same weights in every mode."""
        torch.manual_seed(stream_seed("rev-mbconv-unet", seed))
        net = ReversibleUNet(1, 2, widths=self.widths, blocks=(self.blocks,) * len(self.widths), expansion=2)
        return in_mode(net, mode)


def begun(cfg: Config, mode: Mode, lr: float, seed: int, parts: int = 1) -> Segmentation:
    """A network of the seed in some mode and its training, not yet begun."""
    return Segmentation(
        cfg.network(seed, mode),
        soft_dice,
        lr=lr,
        steps=cfg.steps,
        side=cfg.side,
        batch=cfg.batch,
        seed=seed,
        parts=parts,
    )


def scores(run: Segmentation) -> dict[str, float]:
    """Overlap in the test block, and in the one by which learning rates are chosen."""
    grey, white = run.mean_score(brain_tissue().test, dice_score).tolist()
    chosen_by = run.mean_score(brain_tissue().validation, dice_score).mean()
    return {
        "dice": (grey + white) / 2,
        "grey_dice": grey,
        "white_dice": white,
        "validation_dice": float(chosen_by),
    }


def keep_slices(run: Segmentation, seed: int, log: Log) -> None:
    """What the page shows of the first seed."""
    if seed == TEST_SEEDS[0]:
        for name, array in run.slices().items():
            log.array(name, array)


def run_paired(cfg: Config, arm: str, hp: Hyperparameters, seed: int, log: Log) -> Mapping[str, float]:
    """Train one network; arms of a seed share initial weights and batches."""
    mode: Any = arm
    lr = float(hp["lr"])
    run = begun(cfg, mode, lr, seed)
    for step in range(cfg.steps):
        log.value("loss", run.step(step), step)
    keep_slices(run, seed, log)
    twins = [begun(cfg, each, lr, seed) for each in (mode, "plain")]
    gap = max(abs(twins[0].step(step) - twins[1].step(step)) for step in range(cfg.gap_steps))
    return {**scores(run), "loss_gap": gap, "step_cost": 1.0 if arm == "plain" else _cost(*twins, cfg.timed)}


def _cost(method: Segmentation, plain: Segmentation, steps: int) -> float:
    """Median over steps, taken in turn, of the processor time of one over that of the other."""
    ratios = []
    for step in range(steps):
        taken = []
        for run in (method, plain):
            start = time.process_time()
            run.step(step)
            taken.append(time.process_time() - start)
        ratios.append(taken[0] / taken[1])
    return float(np.median(ratios))


# --- networks of one budget ---------------------------------------------------------------------------------

PARTS = {"micro": 2}  # arms that take the batch in parts
MODES: dict[str, Mode] = {
    "plain": "plain",
    "micro": "plain",
    "checkpoint": "checkpoint",
    "reversible": "reversible",
}


def grown(cfg: Config, arm: str) -> Config:
    """The widest network of an arm whose peak fits into that of the plain reference network."""

    def needed(width: int, mode: Mode, parts: int) -> int:
        widths = [width << level for level in range(len(cfg.widths))]
        with torch.device("meta"):
            net = ReversibleUNet(1, 2, widths=widths, blocks=(cfg.blocks,) * len(widths), expansion=2)
        return peak_bytes(net, (cfg.batch // parts, 1, *(cfg.side,) * 3), mode)

    budget = needed(cfg.widths[0], "plain", 1)
    parts = PARTS.get(arm, 1)
    width = 2 * largest(lambda half: needed(2 * half, MODES[arm], parts) <= budget, cfg.widths[0] // 2)
    return replace(cfg, widths=tuple(width << level for level in range(len(cfg.widths))))


def run_budget(cfg: Config, arm: str, hp: Hyperparameters, seed: int, log: Log) -> Mapping[str, float]:
    """Train the network that an arm can afford."""
    mine = grown(cfg, arm)
    run = begun(mine, MODES[arm], float(hp["lr"]), seed, PARTS.get(arm, 1))
    start = time.process_time()
    for step in range(cfg.steps):
        log.value("loss", run.step(step), step)
    seconds = time.process_time() - start
    keep_slices(run, seed, log)
    parameters = float(sum(p.numel() for p in run.net.parameters()))
    return {**scores(run), "width": float(mine.widths[0]), "parameters": parameters, "seconds": seconds}


# --- declarations -------------------------------------------------------------------------------------------


def _draw(what: str, *arguments: Any) -> Callable[[TrialResult], Figure]:
    """A drawing of `pullback.lab.figures.segmentation`, imported when it is drawn: workers need no matplotlib."""

    def draw(result: TrialResult) -> Figure:
        from pullback.lab.figures import segmentation

        return getattr(segmentation, what)(result, *arguments)

    return draw


VOLUME = Metric("volume_ratio", unit="times")
DEPTH = Metric("depth_ratio", unit="times")
WIDTH = Metric("width_ratio", unit="times")
ERROR = Metric("count_error", better="lower", worst=1.0)
DICE = Metric("dice", unit="fraction")
SELECT = Metric("validation_dice", unit="fraction")
GAP = Metric("loss_gap", better="lower", worst=1.0)
COST = Metric("step_cost", better="lower", unit="times", worst=10.0)
DATA = (
    "Grey and white matter of the MNI152 template (2 mm) instead of tumours in BraTS. The template is exactly mirror "
    "symmetric, so that a left-right split would test on mirrored training voxels: one hemisphere is cut into coronal "
    "blocks with gaps of 10 mm. Training cubes have 16 voxels a side, batches 2 of them; every image gets its own "
    "intensity scale, bias field and noise. "
)
CANNOT = "BraTS Dice, volumes of 240 x 240 x 155 in training, several MRI channels, memory of an accelerator."
PREDICTED = (
    "Coronal slices of the test block, first seed: grey and white matter, true and predicted, painted."
)
CHECKPOINT = "checkpoint"

MEMORY = Study(
    room="rev_mbconv_unet",
    name="memory",
    title="Volume, depth and width in the memory of the plain network",
    run=run_memory,
    arms=Arms("plain", "reversible", rivals=(CHECKPOINT,)),
    sizes={"smoke": Memory(sides=(32,), counted_side=8), "full": Memory()},
    primary=VOLUME,
    seeds=Seeds(TEST_SEEDS, tune=(100,)),
    claim=Greater("reversible", than="plain", by=2.0),
    also=(
        Greater("reversible", than="plain", by=0.25, metric=DEPTH),
        Greater("reversible", than="plain", by=1.0, metric=WIDTH),
        Greater("reversible", than=CHECKPOINT, metric=DEPTH),
        Greater("reversible", than=CHECKPOINT, metric=WIDTH),
    ),
    timeout=120.0,
    figures=(
        Drawing(
            "depths",
            _draw("bytes_by_depth"),
            "Bytes kept after a forward pass; three levels, first width 8, e = 2.",
        ),
        PairedSeeds(caption="Largest volume in the memory of the plain network, for every drawn setting."),
    ),
    paper=PaperResult(
        "abstract", "volume at a fixed memory", 1.0, 3.0, note="25 % more depth; up to 2x channels"
    ),
    refuted_if="the 95 % interval of (reversible - plain) of the volume ratio lies below 2, that is 3 times the volume",
    cannot_test=CANNOT,
    deviations="A seed draws the setting (side, batch, width, blocks, e, levels). Counted is what lives at the peak: "
    "kept activations, the states and gradients of the block that goes back, and 16 bytes per parameter (weight, "
    "gradient, two moments); workspaces of a device's libraries are not. Depth grows on all levels.",
)
PAIRED = Study(
    room="rev_mbconv_unet",
    name="paired",
    title="The same network trained with and without reversal",
    run=run_paired,
    arms=Arms("plain", "reversible", rivals=(CHECKPOINT,)),
    sizes={"smoke": Config(steps=2, gap_steps=1, timed=1, widths=(4, 8)), "full": Config()},
    primary=DICE,
    hp={"*": {"lr": 1e-2}},
    seeds=Seeds(TEST_SEEDS, tune=(100,)),
    claim=Equivalent("reversible", than="plain", within=0.005),
    also=(
        Equivalent("reversible", than="plain", within=1e-3, metric=GAP),
        Equivalent("reversible", than="plain", within=0.8, metric=COST),
    ),
    timeout=200.0,
    figures=(
        Drawing("slices", _draw("predictions", ("plain", "reversible")), PREDICTED),
        PairedSeeds(),
    ),
    paper=PaperResult("abstract", "no loss of accuracy is implied; no Dice was available"),
    refuted_if="the difference in Dice leaves 0.005, losses part by 1e-3 in 20 steps, or a step costs over 1.8 times",
    cannot_test=CANNOT,
    deviations=DATA
    + "One learning rate for all arms, which are one network; nothing is tuned. The cost of a step is "
    "processor time of this machine and differs from run to run.",
)
BUDGET = Study(
    room="rev_mbconv_unet",
    name="budget",
    title="What the freed memory is good for: the widest network of a fixed memory",
    run=run_budget,
    arms=Arms("plain", "reversible", rivals=(CHECKPOINT, "micro")),
    sizes={"smoke": Config(steps=1, widths=(2, 4)), "full": Config()},
    primary=DICE,
    hp={"*": {"lr": 1e-2}},
    tune=Tune(trials=5, select=SELECT, shared={"lr": LogUniform(1e-3, 1e-1)}),
    seeds=Seeds(TEST_SEEDS, tune=(100,)),
    timeout=200.0,
    figures=(Drawing("slices", _draw("predictions", ("plain", "reversible")), PREDICTED), PairedSeeds()),
    paper=PaperResult("abstract", "up to twice the channels in the same memory; no Dice was available"),
    refuted_if="the 95 % interval of (reversible - plain) includes 0 or lies below it",
    cannot_test=CANNOT,
    deviations=DATA
    + "Equal steps, not equal time: wider networks cost more. Peaks are those of the formula.",
)

STUDIES: tuple[Study, ...] = (MEMORY, PAIRED, BUDGET)
"""All studies of this room; the first is the main one."""
