"""Does dropout hide an image from whoever sees its gradient?

One client shares the gradient of one image (or four) of an untrained network in training mode. Arms differ in what the
attacker knows or guesses of the dropout masks; first images, optimizer and number of iterations are the same, and nobody
stops early. Beside them stand attackers who need no gradient, and a perceptron whose first layer gives the image away.
The last study asks what hides an image better than dropout does, and at what cost.
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

from pullback.core.streams import stream_seed
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
from pullback.lab.models import inverted
from pullback.lab.models.federated import federated_accuracy
from pullback.lab.models.victims import always_drop_, victim
from pullback.methods.dia import DropoutInversion, mask_accuracy, record_masks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 60  # of a curve
PATIENCE = 0.04  # share of the iterations without improvement after which the step size falls, as in the paper


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


def attacked(
    cfg: Config, arm: str, lr: float, x: Tensor, y: Tensor, seed: int, log: Log
) -> tuple[Tensor, dict[str, float]]:
    """Images that the arm's attack finds, and what it says of itself; all attacks of a seed start from one image."""
    net = victim(cfg.architecture, 0.0 if arm == "p0" else cfg.p, seed, width=cfg.width)
    gradients, truth = shared_gradient(net, x, y, seed)
    if arm == "fresh":
        always_drop_(net)
    attack = DropoutInversion(
        net,
        cross_entropy,
        masks={"dia": "search", "wiig": truth}.get(arm),
        lr=lr,
        patience=max(1, round(cfg.iterations * PATIENCE)),
        max_iters=cfg.iterations,
        stop_patience=None,
        tolerance=0.0,
        bounds=(inverted.LOW, inverted.HIGH),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed("fresh-dropout", seed))
        found = attack.reconstruct(gradients, labels=y, input_shape=x.shape, seed=seed)
    for step in range(0, found.steps, max(1, found.steps // POINTS)):
        log.value("log10_mismatch", math.log10(max(float(found.trace["match"][step]), 1e-8)), step)
    facts = {"log10_loss": math.log10(max(found.loss, 1e-8))}
    if arm == "dia":
        facts["mask_accuracy"] = mask_accuracy(found.masks, truth)
    elif arm in {"ig", "fresh"}:  # whoever takes all units for kept is right about those that are
        facts["mask_accuracy"] = float(torch.cat([mask.flatten() for mask in truth.values()]).mean())
    return found.images, facts


def first_layer(cfg: Config, x: Tensor, y: Tensor, seed: int) -> Tensor:
    """The image as the gradient of a perceptron's first layer shows it."""
    gradients, _ = shared_gradient(victim(cfg.architecture, cfg.p, seed, width=cfg.width), x, y, seed)
    return inverted.first_layer_image(gradients[0], x.shape)


def run(cfg: Config, arm: str, hp: Hyperparameters, seed: int, log: Log) -> Mapping[str, float]:
    """Attack one gradient; arms of a seed share images, weights, and the client's dropout masks."""
    x, y = inverted.private_batch(seed, cfg.batch)
    facts = {"log10_loss": 0.0}
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
        "psnr": inverted.mean_psnr(guess, x),
        "identified": inverted.identified(guess, x, y),
        **facts,
    }


# --- defences -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Defended:
    """One size of the study of defences.

    Args:
        strengths: of every defence, by arm; 0 is none.
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
