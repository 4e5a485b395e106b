"""Does it pay to distil where the student is right half the time, when part of the pool is beyond its reach?

A small causal transformer continues chains of modular arithmetic. Pools hold problems that can be learned and problems
whose answer was drawn at random; what is measured is how often the student answers learnable problems that it has
never seen. Every arm is the same loop: only the rates that the kernel is given, and its exponents, differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pullback import lab
from pullback.core.streams import generator, stream_seed
from pullback.lab.data.chains import ANSWER, END
from pullback.lab.models.arithmetic import Part, School, schooled
from pullback.lab.models.causal import CausalTransformer
from pullback.methods.paced.divergence import distillation_loss, two_stage
from pullback.methods.paced.pacing import BetaKernel, PassRateTracker
from pullback.methods.paced.student import GradientSNR, gradient_snr, rollout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEST_SEEDS = tuple(range(200, 208))
SMOOTHING = 0.002  # probability that the teacher spreads over all symbols


@dataclass(frozen=True)
class Config:
    """One size of one pool.

    Args:
        school: problems, and the student as it is before distillation.
        steps: optimizer steps of ``batch`` problems.
        refreshes: times that pass rates are measured, spread evenly over the steps.
        k: rollouts per problem and measurement.
        batch: problems of a step; of a bucket where gradients are measured.
    """

    school: School
    steps: int = 240
    refreshes: int = 2
    k: int = 8
    batch: int = 64


# --- pass rates and arms -----------------------------------------------------------------------------------------


def pass_rates(cfg: Config, student: CausalTransformer, part: Part, seed: int, step: int) -> Tensor:
    """Measured by rollouts, and the verifier."""
    tracker = PassRateTracker(len(part.chains), k=cfg.k)
    for ids in torch.arange(len(part.chains)).split(250):  # caches of this size stay near the processor
        out = rollout(
            student.extend, part.prompts[ids], cfg.k, max_tokens=ANSWER, stop=END, cached=True,
            seed=stream_seed("answers", seed, int(ids[0])), step=step,
        )  # fmt: skip
        tracker.update(ids, part.chains.take(ids).right(out.tokens), step=step)
    return tracker.rate


def pacing(arm: str, rate: Tensor, seed: int) -> tuple[BetaKernel, Tensor]:
    """The kernel of an arm and the rates that it is given."""
    if arm.startswith("uniform"):
        return BetaKernel(0.0, 0.0), rate
    if arm == "unsolved":
        return BetaKernel(0.0, 1.0), rate
    if arm == "hard filter":
        return BetaKernel(), torch.where((rate > 0) & (rate < 1), 0.5, 0.0)
    if arm == "shuffled":
        return BetaKernel(), rate[torch.randperm(len(rate), generator=generator("shuffle", seed))]
    return BetaKernel(), rate


# --- one run -----------------------------------------------------------------------------------------------------


def run(cfg: Config, arm: str, hp: lab.Hyperparameters, seed: int, log: lab.Log) -> dict[str, float]:
    """Distil into one student; arms of a seed share problems, student, batches and draws."""
    problems, student = schooled(cfg.school, seed)
    steps = cfg.steps + (rollout_steps(cfg) if arm == "uniform, more steps" else 0)
    every = -(-cfg.steps // cfg.refreshes)
    optimizer = torch.optim.AdamW(student.parameters(), lr=float(hp["lr"]), fused=True)
    glance = problems.test.first(GLANCE), problems.copy.first(GLANCE // 2)
    curve, copied = [glance[0].accuracy(student)], problems.copy.accuracy(student)
    for step in range(steps):
        if step % every == 0 and step < cfg.steps:
            kernel, rate = pacing(arm, pass_rates(cfg, student, problems.pool, seed, step), seed)
        if step % (cfg.steps // 12 or 1) == 0:
            curve.append(glance[0].accuracy(student))
            log.value("accuracy", curve[-1], step)
            log.value("copying", glance[1].accuracy(student), step)
        ids = torch.randint(cfg.school.pool, (cfg.batch,), generator=generator("batch", seed, step))
        keep = kernel.active(rate, ids)
        if not len(keep):
            continue
        loss = losses(
            problems.pool, student, keep, two_stage(step, steps, switch=SWITCH.get(arm, 1.0)), seed, step
        )
        optimizer.zero_grad()
        kernel(rate, loss, keep, count=len(ids)).backward()
        optimizer.step()
    accuracy, copying = problems.test.accuracy(student), problems.copy.accuracy(student)
    validation = problems.validation.accuracy(student)
    return {
        "accuracy": accuracy,
        "validation": validation,
        "both": (accuracy + copying) / 2,
        "both_validation": (validation + problems.copy_validation.accuracy(student)) / 2,
        "drop": curve[0] - min(*curve, glance[0].accuracy(student)),
        "copying_lost": max(0.0, copied - copying),
        "active": float((kernel(rate) > 0).float().mean()),
    }


GLANCE = 400  # test problems of the curves
SWITCH = {"reverse only": 0.0, "two-stage": 0.5, "uniform, two-stage": 0.5}
"""Share of the steps under forward KL; of all other arms: 1."""


def rollout_steps(cfg: Config) -> int:
    """What the rollouts cost, in training steps: a rollout with a cache is a third of a training pass."""
    return round(cfg.refreshes * cfg.school.pool * cfg.k / 3 / cfg.batch)


def losses(
    part: Part, student: CausalTransformer, rows: Tensor, divergence: Any, seed: int, step: int
) -> Tensor:
    """Loss of each problem, on the teacher's answers (forward KL) or on the student's own (reverse KL)."""
    problems = part.chains.take(rows)
    written, mask = part.answers[rows], problems.mask
    if divergence == "reverse_kl":
        own = rollout(
            student.extend, part.prompts[rows], 1, max_tokens=ANSWER, stop=END, cached=True,
            seed=stream_seed("own answers", seed), step=step,
        )  # fmt: skip
        written, mask = own.tokens[:, 0], own.mask[:, 0]
    logits = part.logits(student, rows, written)
    return distillation_loss(
        logits, problems.teacher(written, SMOOTHING), mask, divergence=divergence, reduction="none"
    )


# --- is there a bell? --------------------------------------------------------------------------------------------

BUCKETS = {
    "beyond": (0.0, 0.125),
    "frontier": (0.375, 0.625),
    "solved": (0.875, 1.0),
}  # pass rates, ends included
EDGES = (
    -0.01,
    0.01,
    0.13,
    0.26,
    0.38,
    0.51,
    0.63,
    0.76,
    0.99,
    1.0,
)  # of the drawn curve, pass rates in sixteenths


def run_bell(cfg: Config, arm: str, _: lab.Hyperparameters, seed: int, log: lab.Log) -> dict[str, float]:
    """Signal-to-noise ratio of the gradients of one bucket of pass rates; the arm is the bucket, nothing is tuned."""
    problems, student = schooled(cfg.school, seed)
    part = problems.pool
    rate = pass_rates(cfg, student, part, seed, 0)
    low, high = BUCKETS[arm]
    chosen = ((rate >= low) & (rate <= high)).nonzero().squeeze(1)[: cfg.batch]
    found = snr(part, student, {arm: chosen}, seed)
    if arm == "frontier" and seed == TEST_SEEDS[0]:
        bins = [(rate > a) & (rate <= b) for a, b in pairwise(EDGES)]
        rows = [each.nonzero().squeeze(1)[: cfg.batch] for each in bins]
        rows = [each for each in rows if len(each) > 2]
        curve = snr(part, student, {float(rate[each].mean()): each for each in rows}, seed)
        columns = (torch.tensor(curve.groups), curve.snr, curve.low, curve.high, curve.examples)
        log.array("bell", torch.stack([each.double() for each in columns], 1).numpy())
    return {"snr": float(found.snr[0]), "noise": float(found.noise[0]), "signal": float(found.signal[0])}


def snr(part: Part, student: CausalTransformer, groups: Mapping[Any, Tensor], seed: int) -> GradientSNR:
    """Of the forward KL on the teacher's answers."""
    teacher, mask = part.chains.teacher(part.answers, SMOOTHING), part.chains.mask
    inputs = torch.cat([part.prompts, part.answers[:, :-1]], 1)

    def loss(model: Any, batch: Any) -> Tensor:
        return distillation_loss(model(batch[0], ANSWER), batch[1], batch[2])

    batches = {label: (inputs[rows], teacher[rows], mask[rows]) for label, rows in groups.items()}
    return gradient_snr(loss, student, batches, seed=seed)


def draw_bell(result: lab.TrialResult) -> Figure:
    """The ratio over the pass rate with bootstrap bars, beside p (1 - p) at its best scale."""
    from pullback.lab.figures import METHOD, MUTED, panels  # workers need no matplotlib

    figure, (ax,) = panels(1, height=3.0)
    points = result.array("frontier", "bell")
    if points is not None:
        p, ratio, low, high, _ = points.T
        bars = np.maximum([ratio - low, high - ratio], 0)  # a skewed interval may lie beside its estimate
        ax.errorbar(p, ratio, bars, fmt="o", color=METHOD, capsize=3)
        kernel = p * (1 - p)
        fine = np.linspace(0, 1, 101)
        scale = (kernel @ ratio) / (kernel @ kernel)
        ax.plot(fine, scale * fine * (1 - fine), color=MUTED, linewidth=1, label="best multiple of p (1 - p)")
        ax.legend()
    ax.axhline(0, color=MUTED, linewidth=0.6)
    ax.set(xlabel="pass rate of the student", ylabel="squared signal over variance", xlim=(-0.03, 1.03))
    return figure


# --- declarations ------------------------------------------------------------------------------------------------

ACCURACY = lab.Metric("accuracy", unit="fraction")
BOTH = lab.Metric("both", unit="fraction")
DROP = lab.Metric("drop", better="lower", unit="fraction", worst=1.0)
COPYING = lab.Metric("copying_lost", better="lower", unit="fraction", worst=1.0)
RATIO = lab.Metric("snr", better="higher", worst=-1.0)
PAPER = lab.PaperResult(
    where="results table, MATH-500",
    setting="Qwen3-8B into Qwen3-1.7B, forward KL; mean of 8 samples",
    baseline=0.768,
    method=0.794,
    note="hard filter 78.5; AIME 2024: 21.2, 23.7 (filter), 25.1; AIME 2025: 17.0, 18.8 (filter), 20.6",
)
SETTING = (
    "A causal transformer of one layer and 31,000 weights on chains of modular arithmetic. 'Beyond reach' are chains "
    "of an operator whose results were drawn once at random: nothing in them can be generalised, a stand-in for "
    "problems that are too hard. The teacher is exact (99.8 % on the symbol that follows from what was written, the "
    "rest spread evenly): training one would cost more than all else. The student is stopped at about 40 % in its own "
    "training on copying and arithmetic. "
)
DEVIATIONS = SETTING + (
    "Accuracy is the exact probability of a right answer at temperature 1, not a mean over samples. The learning "
    "rate is tuned for every arm, where the paper has one for all; chosen by accuracy alone it ends where the student "
    "loses its older skill, see the study half-both. Pass rates are measured twice, at the start and half-way (K = 8); "
    "'uniform, more steps' gets the price of these rollouts as 167 more steps, while the work that problems of weight "
    "zero save is credited to nobody. "
)
CANNOT = (
    "Language models, MATH, AIME and MMLU; tuned teachers; adaptive KL; the minimax theorem beyond its delta^2 bound, "
    "which a test checks numerically."
)
RIVALS = ("hard filter", "shuffled")
RATES = (3e-4, 1e-3, 3e-3, 6e-3, 1e-2, 2e-2)
SMALL = School(pool=64, held=32, start=0.08)


def declare(name: str, title: str, beyond: float, **facts: Any) -> lab.Study:
    """What the studies of distillation share."""
    rates, select = facts.pop("rates", RATES), facts.pop("select", "validation")
    full = Config(School(beyond=beyond))
    given: dict[str, Any] = {
        "primary": ACCURACY,
        "arms": lab.Arms("uniform", "paced", rivals=RIVALS, others=("unsolved",)),
        "seeds": lab.Seeds(TEST_SEEDS, tune=(100,)),
        "paper": PAPER,
        "deviations": DEVIATIONS,
        **facts,
    }
    return lab.Study(
        room="paced",
        name=name,
        title=title,
        run=run,
        sizes={
            "smoke": Config(replace(SMALL, beyond=beyond), steps=12, refreshes=1, k=4, batch=16),
            "full": full,
        },
        hp={"*": {"lr": 1e-3}},
        tune=lab.Tune(
            trials=len(rates),
            select=lab.Metric(select, unit="fraction"),
            shared={"lr": lab.Choice(rates)},
        ),
        timeout=120.0,
        cannot_test=CANNOT,
        figures=(lab.PairedSeeds(), lab.Curves("accuracy"), lab.Curves("copying")),
        **given,
    )


def declare_bell(name: str, title: str, beyond: float) -> lab.Study:
    """A study whose arms are buckets of pass rates."""
    return lab.Study(
        room="paced",
        name=name,
        title=title,
        run=run_bell,
        arms=lab.Arms("beyond", "frontier", rivals=("solved",)),
        primary=RATIO,
        sizes={
            "smoke": Config(replace(SMALL, beyond=beyond, pool=250, start=0.2), k=4, batch=8),
            "full": Config(School(beyond=beyond, pool=1500), k=16, batch=120),
        },
        seeds=lab.Seeds(TEST_SEEDS),
        paper=lab.PaperResult(
            where="figure of the signal-to-noise ratio over the pass rate",
            setting="language models; a bell that vanishes at both ends, no numbers at hand",
        ),
        refuted_if="the ratio at pass rates in the middle is not above those at both ends",
        cannot_test=CANNOT,
        deviations=SETTING
        + "Buckets: pass rates up to 1/8, 3/8 to 5/8, from 7/8, by 16 rollouts; 120 problems or what there is.",
        figures=(
            lab.Drawing("bell", draw_bell, "One student; bars are 95 % bootstrap intervals."),
            lab.PairedSeeds(),
        ),
    )


UNLEARNABLE = (
    "PACED is not better than uniform weights, or not better than its own weights shuffled over problems"
)
ALSO = (
    lab.Greater("paced", than="uniform", metric=DROP),
    lab.Greater("paced", than="uniform", metric=COPYING),
)
STUDIES: tuple[lab.Study, ...] = (
    declare(
        "half",
        "Half of the pool is beyond reach: accuracy on new problems that can be learned",
        0.5,
        arms=lab.Arms("uniform", "paced", rivals=RIVALS, others=("unsolved", "uniform, more steps")),
        seeds=lab.Seeds(TEST_SEEDS, tune=(100, 101)),
        also=(lab.Greater("paced", than="uniform, more steps"), *ALSO),
        refuted_if=UNLEARNABLE,
    ),
    declare(
        "half-both",
        "Half of the pool is beyond reach: new problems and an older skill together",
        0.5,
        primary=BOTH,
        seeds=lab.Seeds(TEST_SEEDS, tune=(100, 101)),
        select="both_validation",
        rates=(1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
        also=(lab.Greater("paced", than="uniform", metric=ACCURACY), *ALSO),
        refuted_if=UNLEARNABLE,
        paper=replace(PAPER, note="forgetting on MMLU 1.4 % (distillation), 0.6 % (self-distillation)"),
        deviations=DEVIATIONS
        + "The older skill is copying, learned before and absent from the pool; the metric is the mean accuracy on "
        "both, and the learning rate is chosen by it, down to rates at which hardly anything is learned.",
    ),
    declare(
        "most",
        "Four fifths of the pool are beyond reach",
        0.8,
        seeds=lab.Seeds(TEST_SEEDS[:5], tune=(100,)),
        also=ALSO,
        refuted_if=UNLEARNABLE,
    ),
    declare(
        "none",
        "Nothing in the pool is beyond reach: the boundary of the claim",
        0.0,
        seeds=lab.Seeds(TEST_SEEDS[:5], tune=(100,)),
        also=ALSO,
        refuted_if=UNLEARNABLE + "; a loss is expected here, where there is nothing to leave out",
    ),
    declare(
        "two-stage",
        "Forward KL first, reverse KL afterwards, with PACED weights",
        0.5,
        arms=lab.Arms("forward only", "two-stage", rivals=("reverse only",), others=("uniform, two-stage",)),
        rates=(3e-4, 1e-3, 3e-3, 6e-3, 1e-2),
        also=(
            lab.Greater("two-stage", than="uniform, two-stage"),
            lab.Greater("two-stage", than="uniform, two-stage", metric=COPYING),
        ),
        refuted_if="two stages are not better than forward KL alone",
        paper=lab.PaperResult(
            where="abstract of version 3",
            setting="up to 5.8 points over forward KL alone; no table was at hand",
        ),
    ),
    declare_bell("bell-half", "Signal to noise over the pass rate, half of the pool beyond reach", 0.5),
    declare_bell("bell-none", "Signal to noise over the pass rate, nothing beyond reach", 0.0),
)
"""All studies of this room; the first is the main one."""
