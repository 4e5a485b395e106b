"""Trials of students whose updates are partly flipped: a race to a goal, flips in either layer, leaving a solution."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pullback.core.streams import generator
from pullback.lab.declare import Hyperparameters, Log
from pullback.lab.models import student_teacher as students
from pullback.lab.models.student_teacher import Learner, Rule, Shape, Weights

GOAL = 1e-3  # half the mean squared error at which a student has learned (official)


def signs(size: int, count: int, value: float = -1.0) -> Tensor:
    """``value`` for the first ``count`` of ``size`` entries, 1 for the others [1, 1, size]."""
    found = torch.ones(1, 1, size)
    found[..., :count] = value
    return found


# --- speed -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """One size of the race to the goal.

    Args:
        reset: whether each layer's Frobenius norm is reset after every update.
        epochs: the most epochs; a student that has not met the goal by then counts with this number.
        stack: students per run, each with a teacher and points of its own.
        points: training points of each student.
    """

    reset: bool
    epochs: int = 1500
    stack: int = 8
    points: int = 500


def speed_rule(cfg: Speed, arm: str, hp: Hyperparameters, hidden: int) -> Rule:
    """How an arm of the race learns."""
    flipped = {"k1": 1, "k3": 3, "k5": 5}.get(arm, 0)
    factor = signs(hidden, flipped) if flipped else signs(hidden, 1, 0.0) if arm == "frozen" else None
    return Rule(
        float(hp["eta"]),
        factor_readout=factor,
        exact=arm == "exact",
        reset=cfg.reset and arm != "no-reset",
        momentum=0.9 if arm == "momentum" else 0.0,
    )


def race(cfg: Speed, arm: str, hp: Hyperparameters, seed: int, log: Log) -> Mapping[str, float]:
    """Train a stack of students; arms of a seed share teachers, points, order and initial weights."""
    shape = Shape(100, 10, tanh=True, spread=2.0)
    teacher = students.draw_weights(shape, cfg.stack, "teacher", seed)
    student = students.draw_weights(shape, cfg.stack, "student", seed, shape.spread)
    sizes = {"train": cfg.points, "validation": 100, "test": 100}
    train, validation, test = (
        students.draw_points(shape, teacher, count, name, seed) for name, count in sizes.items()
    )
    learner = Learner(shape, student, speed_rule(cfg, arm, hp, shape.hidden))
    first, best = students.epochs_to(
        learner, train, (validation, test), batch=50, epochs=cfg.epochs, goal=GOAL, seed=seed
    )
    log.array("epochs", torch.where(best[1] < GOAL, first[1], -1.0).numpy())  # -1: not met
    scores = first.log10().mean(1)
    return {
        "log_epochs": float(scores[1]),
        "validation_log_epochs": float(scores[0]),
        "reached": float((best[1] < GOAL).float().mean()),
    }


# --- readout or hidden -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layers:
    """One size of the comparison of flips in the two layers.

    Args:
        reset: whether each layer's Frobenius norm is reset after every update.
        steps: full-batch updates.
        keep: last updates over which weights are watched.
        shapes: teachers and students.
    """

    reset: bool
    steps: int = 2000
    keep: int = 300
    shapes: tuple[Shape, ...] = tuple(
        Shape(m, n, tanh) for m, n in ((60, 60), (100, 20)) for tanh in (False, True)
    )


def layer_rule(cfg: Layers, arm: str, hp: Hyperparameters, shape: Shape, seed: int) -> Rule:
    """Which updates are flipped: 30 % of one layer's columns, or as many scattered synapses of the hidden layer."""
    in_readout = round(0.3 * shape.hidden)
    rule = Rule(float(hp["eta"]), reset=cfg.reset)
    if arm == "readout":
        return replace(rule, factor_readout=signs(shape.hidden, in_readout))
    if arm == "frozen":
        return replace(rule, factor_readout=signs(shape.hidden, in_readout, 0.0))
    if arm == "hidden":
        return replace(rule, factor_hidden=signs(shape.inputs, round(0.3 * shape.inputs)))
    if arm == "scattered":
        order = torch.randperm(shape.hidden * shape.inputs, generator=generator("scattered", seed))
        flat = torch.ones(shape.hidden * shape.inputs)
        flat[order[:in_readout]] = -1.0
        return replace(rule, factor_hidden=flat.view(1, shape.hidden, shape.inputs))
    return rule


def flip_layers(
    cfg: Layers, arm: str, hp: Hyperparameters, seed: int, log: Log, chaos: Callable[[Tensor], Tensor]
) -> Mapping[str, float]:
    """Train one student of each shape from a random start; errors and chaos are means of logarithms over shapes.

    Args:
        cfg: size of the trial.
        arm: which updates are flipped.
        hp: ``eta``, the step size.
        seed: of teacher, student and points, shared by all arms.
        log: keeps error and chaos of every shape, by its number.
        chaos: measures a path of weights [times, weights].

    Returns:
        Means of base-10 logarithms: ``log_error``, ``validation_log_error``, ``log_q``.
    """
    found: dict[str, list[float]] = {"test": [], "validation": [], "q": []}
    for number, shape in enumerate(cfg.shapes):
        key = 1000 * number + seed
        teacher = students.draw_weights(shape, 1, "teacher", key)
        learner = Learner(
            shape, students.draw_weights(shape, 1, "student", key), layer_rule(cfg, arm, hp, shape, key)
        )
        train, validation, test = (
            students.draw_points(shape, teacher, count, name, key)
            for name, count in (("train", 250), ("validation", 100), ("test", 100))
        )
        kept = students.train_full(learner, train, steps=cfg.steps, keep=cfg.keep)
        parts = {"test": test, "validation": validation}
        values = {name: float(students.error(shape, learner.weights, part)) for name, part in parts.items()}
        values["q"] = float(chaos(kept[:, 0])) if bool(torch.isfinite(kept).all()) else math.inf
        for name, value in values.items():
            found[name].append(_log10(value))
        log.value("log_error", found["test"][-1], number)
        log.value("log_q", found["q"][-1], number)
    return {
        "log_error": float(np.mean(found["test"])),
        "validation_log_error": float(np.mean(found["validation"])),
        "log_q": float(np.mean(found["q"])),
    }


def _log10(value: float) -> float:
    """Bounded: below is float32's rounding, above a diverged run."""
    return 4.0 if not math.isfinite(value) else min(4.0, math.log10(max(value, 1e-12)))


# --- beside a solution -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Boundary:
    """One size of the phase diagrams.

    Args:
        ratios: inputs / hidden units.
        shares: shares of flipped neurons.
        units: inputs + hidden units.
        steps: updates of size 0.3 from beside the solution.
    """

    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 2.0, 5.0)
    shares: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
    units: int = 66
    steps: int = 1700


@dataclass(frozen=True)
class Beside:
    """Students beside one teacher's weights, first those with flips in the hidden layer, then in the readout.

    Args:
        teacher: one network.
        signs_in: of the updates of W1 [2 shares, M].
        signs_hidden: of the updates of W2 [2 shares, N].
        share: flipped neurons of the layer in question [2, shares].
        left: whether a student left the solution, without and with norm reset [reset, layer, share].
    """

    teacher: Weights
    signs_in: Tensor
    signs_hidden: Tensor
    share: Tensor
    left: Tensor


def beside_solution(cfg: Boundary, ratio: float, seed: int) -> Beside:
    """Simulate every share of flips in either layer at one ratio of inputs to hidden units."""
    inputs = round(cfg.units * ratio / (1 + ratio))
    shape = Shape(inputs, cfg.units - inputs)
    teacher = students.draw_weights(shape, 1, "teacher", seed)
    counts = [[round(share * size) for share in cfg.shares] for size in (shape.inputs, shape.hidden)]
    none = [0] * len(cfg.shares)
    first = torch.cat([signs(shape.inputs, k) for k in [*counts[0], *none]])
    second = torch.cat([signs(shape.hidden, k) for k in [*none, *counts[1]]])
    reset = torch.tensor([0.0, 1.0]).repeat_interleave(len(first)).view(-1, 1, 1)
    both = first.repeat(2, 1, 1), second.repeat(2, 1, 1)
    left = students.leaves_solution(teacher, both, reset, eta=0.3, steps=cfg.steps, seed=seed)
    share = torch.tensor([[k / shape.inputs for k in counts[0]], [k / shape.hidden for k in counts[1]]])
    return Beside(teacher, first[:, 0], second[:, 0], share, left.view(2, 2, -1))
