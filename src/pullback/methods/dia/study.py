"""Does dropout hide an image from whoever sees its gradient?

One client shares the gradient of one image (or four) of an untrained network in training mode. Arms differ in what
the attacker knows or guesses of the dropout masks; first images, optimizer and number of iterations are the same, and
nobody stops early. Beside them stand attackers who need no gradient, and a perceptron whose first layer gives the image
away. The last study asks what hides an image better than dropout does, and at what cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pullback import lab
from pullback.core.gradient_defences import Clip, Compose, Defence, GaussianNoise, Prune
from pullback.core.image_quality import match
from pullback.core.inversion_closed_form import first_layer_leak
from pullback.core.inversion_terms import GradientMatching
from pullback.core.streams import stream_seed
from pullback.lab.models import inverted
from pullback.lab.models.federated import federated_accuracy
from pullback.lab.models.victims import always_drop_, victim
from pullback.methods.dia import DropoutInversion, mask_accuracy, record_masks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SERVER_RATE = 1e-2  # of the Adam of federated training
POINTS = 60  # of a curve
PATIENCE = (
    0.04  # share of the iterations without improvement after which the step size falls, as in the paper
)


@dataclass(frozen=True)
class Config:
    """One size of an attack study.

    Args:
        architecture: of the victim.
        p: rate of its dropout layers.
        iterations: of every attack.
        batch: images behind one gradient.
        width: of the victim; 0 takes the architecture's own.
    """

    architecture: str
    p: float
    iterations: int
    batch: int = 1
    width: int = 0


# --- client and attackers -----------------------------------------------------------------------------------


def shared_gradient(
    net: nn.Module, x: Tensor, y: Tensor, seed: int
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The gradient of a client in training mode, and the masks that nobody but WIIG may see.

    Batch normalisation keeps its running statistics: with those of the batch no attacker could know the network.
    """
    net.train()
    for module in net.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)
    with torch.random.fork_rng(devices=[]), record_masks(net) as masks:
        torch.manual_seed(stream_seed("client-dropout", seed))
        gradient = torch.autograd.grad(cross_entropy(net(x), y), list(net.parameters()))
    return list(gradient), dict(masks)


def inversion(net: nn.Module, iterations: int, lr: float, **settings: Any) -> DropoutInversion:
    """The attack of all arms: they differ in their masks only, and spend all their iterations."""
    return DropoutInversion(
        net,
        cross_entropy,
        lr=lr,
        patience=max(1, round(iterations * PATIENCE)),
        max_iters=iterations,
        stop_patience=None,
        tolerance=0.0,
        bounds=(inverted.LOW, inverted.HIGH),
        **settings,
    )


def attacked(
    cfg: Config, arm: str, lr: float, x: Tensor, y: Tensor, seed: int, log: lab.Log
) -> tuple[Tensor, dict[str, float]]:
    """Images that the arm's attack finds, and what it says of itself; all attacks of a seed start from one image."""
    net = victim(cfg.architecture, 0.0 if arm == "p0" else cfg.p, seed, width=cfg.width)
    gradients, truth = shared_gradient(net, x, y, seed)
    if arm == "fresh":
        always_drop_(net)
    attack = inversion(net, cfg.iterations, lr, masks={"dia": "search", "wiig": truth}.get(arm))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed("fresh-dropout", seed))
        found = attack.reconstruct(gradients, labels=y, input_shape=x.shape, seed=seed)
    for step in range(0, found.steps, max(1, found.steps // POINTS)):
        log.value("log10_mismatch", math.log10(max(float(found.trace["match"][step]), 1e-8)), step)
    facts = {"log10_loss": math.log10(max(found.loss, 1e-8))}
    order = match(found.images, x)
    if found.masks:
        facts["mask_accuracy"] = mask_accuracy(found.masks, truth, order=order)
    return found.images[order], facts


def first_layer(cfg: Config, x: Tensor, y: Tensor, seed: int) -> Tensor:
    """The image as the gradient of a perceptron's first layer shows it, its length from the black background."""
    gradients, _ = shared_gradient(victim(cfg.architecture, cfg.p, seed, width=cfg.width), x, y, seed)
    direction = first_layer_leak(gradients).direction
    return inverted.constant_images(x) if direction is None else inverted.on_black(direction).view_as(x)


def run(cfg: Config, arm: str, hp: lab.Hyperparameters, seed: int, log: lab.Log) -> Mapping[str, float]:
    """Attack one gradient; arms of a seed share images, weights, and the client's dropout masks."""
    x, y = inverted.private_batch(seed, cfg.batch)
    facts = dict[str, float]()
    if arm == "constant":
        guess = inverted.constant_images(x)
    elif arm == "nearest":
        guess = inverted.nearest_images(x)
    elif arm == "first-layer":
        guess = first_layer(cfg, x, y, seed)
    else:
        guess, facts = attacked(cfg, arm, float(hp["lr"]), x, y, seed, log)
    log.array("original", inverted.to_bytes(x).numpy())
    log.array("image", inverted.to_bytes(guess).numpy())
    return {
        "psnr": inverted.decibels(guess, x),
        "ssim": inverted.structure(guess, x),
        "identified": inverted.identified(guess, x, y),
        "log10_loss": 0.0,  # of attackers who do not look at the gradient
        "mask_accuracy": 1.0 if arm == "p0" else 1.0 - cfg.p,  # of those who take every unit for kept
        **facts,
    }


# --- defences -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Defended:
    """One size of the study of defences.

    Args:
        strengths: of every defence, by arm, rising; no defence comes in front of them.
        iterations: of every attack.
        rounds: of federated training.
        clients: in a round, one image each.
        cost: share of the undefended accuracy that a defence may take.
        architecture: of the victim.
    """

    strengths: Mapping[str, tuple[float, ...]]
    iterations: int
    rounds: int
    clients: int = 16
    cost: float = 0.05
    architecture: str = "cnn"


def defence_of(arm: str, strength: float, seed: int) -> Defence:
    """What the arm's clients do to their gradients; dropout acts in the network instead."""
    if arm == "dropout" or strength == 0.0:
        return Compose()
    return {
        "noise": lambda: GaussianNoise(strength, seed=seed),
        "prune": lambda: Prune(strength),
        "clip": lambda: Clip(strength),
    }[arm]()


def run_defended(
    cfg: Defended, arm: str, hp: lab.Hyperparameters, seed: int, log: lab.Log
) -> Mapping[str, float]:
    """Attack and train under one defence at all its strengths; scored at the strongest one that keeps the accuracy.

    The choice sees accuracies only. The attack on dropout is DIA, that on pruning prunes its own gradient alike.
    """
    x, y = inverted.private_batch(seed)
    rows = list[tuple[float, float, float]]()
    for strength in (0.0, *cfg.strengths[arm]):
        p = strength if arm == "dropout" else 0.0
        defence = defence_of(arm, strength, seed)
        trained = victim(cfg.architecture, p, seed)
        accuracy = federated_accuracy(
            trained, defence, rounds=cfg.rounds, clients=cfg.clients, lr=SERVER_RATE, seed=seed
        )
        net = victim(cfg.architecture, p, seed)
        gradients, _ = shared_gradient(net, x, y, seed)
        matching = GradientMatching(transform=defence if arm == "prune" and strength else None)
        attack = inversion(net, cfg.iterations, float(hp["lr"]), masks="search", matching=matching)
        guess = attack.reconstruct(defence(gradients), labels=y, input_shape=x.shape, seed=seed).images
        rows.append((strength, accuracy, inverted.decibels(guess, x)))
    log.array("trade", np.array(rows, dtype=np.float32))
    kept = [row for row in rows if row[1] >= (1 - cfg.cost) * rows[0][1]]
    strength, accuracy, psnr = kept[-1]
    return {"psnr": psnr, "accuracy": accuracy, "strength": strength, "undefended_psnr": rows[0][2]}


# --- figures ------------------------------------------------------------------------------------------------

SHOWN = ("constant", "nearest", "first-layer", "p0", "ig", "fresh", "dia", "wiig")
ROWS = {"original": ("dia", "original"), **{arm: (arm, "image") for arm in SHOWN}}


def draw_images(result: lab.TrialResult) -> Figure:
    """The first image of every seed, and what each arm made of it, with its score."""
    from pullback.lab.figures.reconstructions import reconstructions  # workers need no matplotlib

    return reconstructions(result, ROWS)


def draw_trade(result: lab.TrialResult) -> Figure:
    """What the attack finds under a defence against what training under it reaches."""
    from pullback.lab.figures.reconstructions import trade_off

    labels = {"xlabel": "accuracy of federated training", "ylabel": "PSNR of the reconstruction (dB)"}
    return trade_off(result, "trade", **labels)


# --- declarations -------------------------------------------------------------------------------------------

PSNR = lab.Metric("psnr", unit="dB")
MASKS = lab.Metric("mask_accuracy", unit="fraction")
IDENTIFIED = lab.Metric("identified", unit="fraction")
LOSS = lab.Metric("log10_loss", better="lower", unit="log10", worst=0.0)
EXPOSED = lab.Metric("psnr", better="lower", unit="dB", worst=inverted.EXACT)
TEST_SEEDS = tuple(range(200, 208))
RATES = (0.03, 0.06, 0.1, 0.2, 0.4)
IMAGES = lab.Drawing(
    "images",
    draw_images,
    "Every column is one victim; above each image its PSNR. The constant grey and the nearest image of the reference "
    "are chosen with the original in sight: no attacker who hands out such images could do better.",
)
MISMATCH = lab.Curves(
    "log10_mismatch",
    x="iteration",
    caption="Logarithm of 1 - cosine of the two gradients, which the attack minimises.",
)
PLAIN = lab.PaperResult(
    "official notebook, CIFAR-10, ViT, p = 0.5, three images",
    "squared error of standardised pixels, 20,000 iterations at most",
    note="3.5 with IG, 0.010 to 0.014 with DIA, 0.003 to 0.007 with WIIG: a ratio of IG to DIA of 250 to 370",
)
DEVIATIONS = (
    "Digits of 28 x 28, networks of 13,000 to 330,000 parameters, {} iterations instead of up to 20,000; "
    "the patience of the step size shrinks with them. No arm stops early: the paper's threshold on the "
    "loss ends easy arms first, and makes them look worse. {} PSNR ends at 60 dB, where a picture of 256 "
    "grey values is exact. Batch normalisation uses running statistics on both sides. The paper lacks four "
    "rivals: constant and nearest hand out images without a look at the gradient, fresh draws new masks in "
    "every iteration, first-layer reads a perceptron's image off its gradient."
)
TUNED = "Step sizes are tuned for every arm by the attack's own loss: an attacker has nothing else."
FIXED = "Every arm has the paper's step size, 0.1."
CANNOT = "CIFAR-10, ImageNet, ViT-B/16, networks of ResNet's depth, and 20,000 iterations."
FOUND, BY_TEN = lab.Greater("dia", than="ig"), lab.Greater("dia", than="ig", by=10.0)
HIDDEN = lab.Greater("p0", than="ig", by=10.0)
FEW, MANY = lab.Seeds(TEST_SEEDS[:5], tune=(100,)), lab.Seeds(TEST_SEEDS, tune=(100,))
BLIND = ("constant", "nearest")
FEWEST = lab.Arms("ig", "dia", rivals=BLIND, ceiling="wiig")


def declare(
    name: str,
    title: str,
    cfg: Config,
    also: tuple[lab.Greater | lab.Equivalent, ...],
    *,
    arms: lab.Arms = FEWEST,
    seeds: lab.Seeds = FEW,
    tuned: bool = False,
) -> lab.Study:
    """A study of attacks on one kind of victim; tuned arms are judged by the loss that the attack itself sees."""
    return lab.Study(
        room="dia",
        name=name,
        title=title,
        run=run,
        arms=arms,
        primary=PSNR,
        sizes={"smoke": replace(cfg, iterations=20, width=16), "full": cfg},
        hp={"*": {"lr": 0.1}},
        tune=lab.Tune(len(RATES), LOSS, shared={"lr": lab.Choice(RATES)}) if tuned else None,
        seeds=seeds,
        claim=FOUND,
        also=also,
        timeout=300.0,
        figures=(IMAGES, lab.PairedSeeds(), MISMATCH),
        paper=PLAIN,
        refuted_if="the paired 95 % interval of (dia - ig) in PSNR includes 0 or lies below it",
        cannot_test=CANNOT,
        deviations=DEVIATIONS.format(f"{cfg.iterations:,}", TUNED if tuned else FIXED),
    )


RECOGNISED = lab.Greater("dia", than="ig", metric=IDENTIFIED)
GRIDS = {"dropout": (0.1, 0.25, 0.5), "noise": (0.01, 0.03, 0.1), "prune": (0.9, 0.99), "clip": (0.1,)}

STUDIES: tuple[lab.Study, ...] = (
    declare(
        "vit",
        "Vision transformer, p = 0.25: masks searched with the image against an attack that knows no dropout",
        Config("vit", 0.25, 1000),
        (HIDDEN, BY_TEN, RECOGNISED, lab.Greater("dia", than="ig", metric=MASKS)),
        arms=lab.Arms("ig", "dia", rivals=(*BLIND, "fresh"), others=("p0",), ceiling="wiig"),
        seeds=MANY,
        tuned=True,
    ),
    declare(
        "vit-10",
        "Vision transformer, p = 0.1",
        Config("vit", 0.1, 1000),
        (BY_TEN, lab.Equivalent("dia", than="wiig", within=5.0)),
    ),
    declare(
        "vit-50",
        "Vision transformer, p = 0.5",
        Config("vit", 0.5, 1000),
        (BY_TEN, RECOGNISED),
    ),
    declare(
        "cnn",
        "Convolutional network, p = 0.25",
        Config("cnn", 0.25, 1000),
        (HIDDEN, BY_TEN),
        arms=lab.Arms("ig", "dia", rivals=BLIND, others=("p0",), ceiling="wiig"),
        seeds=MANY,
        tuned=True,
    ),
    declare(
        "resnet",
        "Residual network with batch normalisation, p = 0.25",
        Config("resnet", 0.25, 1000),
        (BY_TEN,),
    ),
    declare(
        "mlp",
        "Perceptron without biases, p = 0.5: its first layer gives the image away",
        Config("mlp", 0.5, 500),
        (lab.Greater("dia", than="ig", by=15.0), lab.Greater("dia", than="ig", by=0.45, metric=MASKS)),
        arms=lab.Arms("ig", "dia", rivals=(*BLIND, "first-layer"), others=("p0",), ceiling="wiig"),
        seeds=MANY,
        tuned=True,
    ),
    declare(
        "batch",
        "Four images behind one gradient of a perceptron, p = 0.25",
        Config("mlp", 0.25, 500, batch=4),
        (BY_TEN, lab.Greater("dia", than="ig", by=0.2, metric=MASKS)),
    ),
    lab.Study(
        room="dia",
        name="defences",
        title="What hides an image better than dropout at the same accuracy",
        run=run_defended,
        arms=lab.Arms("dropout", "noise", rivals=("prune", "clip")),
        primary=EXPOSED,
        sizes={
            "smoke": Defended({"dropout": (0.5,), "noise": (0.1,), "prune": (0.5,), "clip": (0.1,)}, 5, 1, 2),
            "full": Defended(GRIDS, 400, 40),
        },
        hp={"*": {"lr": 0.1}},
        seeds=FEW,
        claim=lab.Greater("noise", than="dropout", by=3.0),
        timeout=300.0,
        figures=(
            lab.Drawing(
                "trade",
                draw_trade,
                "Lines join the strengths of a defence; low and right is good. Clipping does not change the direction "
                "of a gradient, so that the attack does not notice it.",
            ),
            lab.PairedSeeds(),
        ),
        paper=lab.PaperResult("not in the paper", "which says what does not protect, not what does"),
        refuted_if="the 95 % interval of (dropout - noise) in PSNR lies below 3 dB",
        cannot_test="Attackers with a prior on images, such as generative networks, and privacy budgets.",
        deviations=(
            "Not a study of the paper. Convolutional network, one image per client; accuracy is that of 40 "
            "rounds of 16 clients. A defence is scored at its strongest setting that keeps 95 % of the "
            "undefended accuracy. The attack on dropout is DIA; the other clients have no dropout; whoever "
            "attacks pruned gradients prunes its own."
        ),
    ),
)
"""All studies of this room; the first is the main one."""
