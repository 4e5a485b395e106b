"""Are gradients of answers without reasoning larger and less even, and is it the reasoning or only the length?

`size` (the main study) and `irrelevant` measure a small decoder that reads English and has learned to add; `language`
and `language-irrelevant` ask the same of SmolLM2-135M-Instruct (extra ``language``). Nothing is trained for an arm: an
arm is a kind of response, measured on the same weights and questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from pullback.core.responses import IGNORED, response_loss
from pullback.core.streams import stream_seed
from pullback.lab import (
    Arms,
    Claim,
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
)
from pullback.lab.models.adder import School
from pullback.lab.models.answers import Answers, of_adder, of_language
from pullback.lab.models.responses import padded
from pullback.methods.layer_gradients.curves import Record, layer_curve, mean_absolute_difference
from pullback.methods.layer_gradients.probe import GradientSpectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROJECTIONS = ("q", "k", "v", "o")
FORMATS = ("none", "simplified", "detailed")
RESAMPLES = 1000


@dataclass(frozen=True)
class Small:
    """The decoder that adds.

    Args:
        school: how it is trained, once per seed.
        problems: held-out problems that are measured.
    """

    school: School = field(default_factory=School)
    problems: int = 64

    match = r"blocks\.(?P<layer>\d+)\.(?P<proj>[qkvo])\.weight$"
    batch = 32

    def answers(self, seed: int) -> Answers:
        """The decoder and the problems of a seed."""
        return of_adder(self.school, seed, self.problems)


@dataclass(frozen=True)
class Real:
    """A language model, or a tiny random one of its kind, and a block of questions in the place of a seed."""

    tiny: bool = False

    match = "llama"
    batch = 4

    def answers(self, seed: int) -> Answers:
        """The model and the questions of a block."""
        return of_language(seed, tiny=self.tiny)


Config: TypeAlias = Small | Real

# --- measuring ---------------------------------------------------------------------------------------------------


@cache
def answers(cfg: Config, seed: int) -> Answers:
    """A pure function, kept so that a process trains the decoder of a seed once for all arms."""
    return cfg.answers(seed)


@cache
def seen(cfg: Config, seed: int, kind: str) -> tuple[Record, ...]:
    """What the probe finds in the gradients of every response of a kind; each response is an example of its own."""
    asked = answers(cfg, seed)
    probe = GradientSpectrum(
        asked.model, cfg.match, stats=("nuclear", "nuclear_per_loss", "sigma1_ratio", "effective_rank")
    )
    rows = list(asked.kinds[kind])
    for start in range(0, len(rows), cfg.batch):
        tokens, scored = padded(rows[start : start + cfg.batch])
        with probe.sample(kind) as sample:
            sample.backward(response_loss(asked.logits(tokens), torch.where(scored, tokens, IGNORED)))
    return tuple(probe.records)


def curves(records: tuple[Record, ...], statistic: str = "nuclear") -> dict[str, torch.Tensor]:
    """Mean over the examples, layer by layer, for each of q, k, v, o."""
    found = layer_curve(records, statistic)
    return {name[0]: found[name] for name in found}


def sizes(records: tuple[Record, ...]) -> dict[str, float]:
    """Size, unevenness and shape of the four curves; sizes are log10, so that differences are ratios."""
    lines = curves(records)
    size = {f"log_nuclear_{p}": math.log10(float(lines[p].mean())) for p in PROJECTIONS}
    mad = {f"log_mad_{p}": math.log10(float(mean_absolute_difference(lines[p]))) for p in PROJECTIONS}
    means = {"log_nuclear": _mean(size), "log_mad": _mean(mad)}
    relative = curves(records, "nuclear_per_loss")
    return {
        **size,
        **mad,
        **means,
        "log_unevenness": means["log_mad"] - means["log_nuclear"],
        "log_per_loss": _mean({p: math.log10(float(line.mean())) for p, line in relative.items()}),
        "sigma1_ratio": _mean({p: float(line.mean()) for p, line in curves(records, "sigma1_ratio").items()}),
        "effective_rank": _mean(
            {p: float(line.mean()) for p, line in curves(records, "effective_rank").items()}
        ),
        "loss": sum(each.loss for each in records) / len(records),
    }


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def measure(cfg: Config, arm: str, hp: Hyperparameters, seed: int, log: Log) -> Mapping[str, float]:
    """Size and unevenness of one kind of response, and its size over that of English scored at the same places."""
    del hp
    found, plain = sizes(seen(cfg, seed, arm)), sizes(seen(cfg, seed, f"{arm}/text"))
    for projection, line in curves(seen(cfg, seed, arm)).items():
        for layer, value in enumerate(line.tolist()):
            log.value(f"nuclear_{projection}", value, layer)
    lengths = [each.count for each in answers(cfg, seed).kinds[arm]]
    return {
        **found,
        "log_over_text": found["log_nuclear"] - plain["log_nuclear"],
        "scored_tokens": sum(lengths) / len(lengths),
        **{f"accuracy_{form}": share for form, share in answers(cfg, seed).accuracy.items()},
    }


# --- irrelevant answers ------------------------------------------------------------------------------------------


def scores(records: tuple[Record, ...], *, loss: bool) -> np.ndarray:
    """One number per response: the mean nuclear norm over all layers and projections, or the plain loss."""
    if loss:
        return np.array([each.loss for each in records])
    return np.array(
        [np.mean([np.mean(line) for line in each.values["nuclear"].values()]) for each in records]
    )


def larger(right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Whether the irrelevant response of row j has the larger score than the right one of row i; ties count a half."""
    return (wrong[None] > right[:, None]) + 0.5 * (wrong[None] == right[:, None])


def bootstrap(table: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % interval of the mean of a table over questions, which are drawn with both of their responses."""
    draws = np.random.default_rng(stream_seed("bootstrap", seed)).integers(
        len(table), size=(RESAMPLES, len(table))
    )
    means = [table[np.ix_(chosen, chosen)].mean() for chosen in draws]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def discriminate(cfg: Config, arm: str, hp: Hyperparameters, seed: int, log: Log) -> Mapping[str, float]:
    """AUC of a score: how often an irrelevant response has a larger one than a right response."""
    del log
    if arm == "bar":
        return {"auc": float(hp["auc"]), "accuracy": float(hp["accuracy"]), "log_gap": 0.0}
    kind = arm.removesuffix("-loss")
    right, wrong = (scores(seen(cfg, seed, name), loss=kind != arm) for name in (kind, f"{kind}/shuffled"))
    table = larger(right, wrong)
    low, high = bootstrap(table, seed)
    known = answers(cfg, seed).accuracy
    form = "detailed" if kind == "few" else kind
    return {
        "auc": float(table.mean()),
        "auc_low": low,
        "auc_high": high,
        "paired": float(table.diagonal().mean()),
        "log_gap": math.log10(float(wrong.mean() / right.mean())),
        **({"accuracy": known[form]} if known else {}),
    }


# --- figures -----------------------------------------------------------------------------------------------------


def draw_layers(result: TrialResult) -> Figure:
    """Nuclear norm by layer, a panel for each format, a line for each projection."""
    from pullback.lab.figures.layers import layer_panels  # workers need no matplotlib

    return layer_panels(result, FORMATS, [f"nuclear_{p}" for p in PROJECTIONS], names=[*"QKVO"])


def draw_ratios(result: TrialResult) -> Figure:
    """Size of every kind of response over that of the detailed answers."""
    from pullback.lab.figures.layers import ratio_bars

    metrics: dict[str, str] = {p.upper(): f"log_nuclear_{p}" for p in PROJECTIONS}
    return ratio_bars(result, metrics, "mean nuclear norm over that of detailed answers")


def draw_auc(result: TrialResult) -> Figure:
    """AUC of every score with the bootstrap intervals of all seeds."""
    from pullback.lab.figures.layers import auc_rows

    return auc_rows(result)


# --- declarations ------------------------------------------------------------------------------------------------

SEEDS = Seeds(test=tuple(range(200, 208)), tune=(100,))
LOWEST = -6.0
SIZE = Metric("log_nuclear", unit="log10", worst=LOWEST)
MAD = Metric("log_mad", unit="log10", worst=LOWEST)
UNEVENNESS = Metric("log_unevenness", unit="log10", worst=LOWEST)
PER_LOSS = Metric("log_per_loss", unit="log10", worst=LOWEST)
OVER_TEXT = Metric("log_over_text", unit="log10", worst=LOWEST)
AUC = Metric("auc")
GAP = Metric("log_gap", unit="log10", worst=LOWEST)
ACCURACY = Metric("accuracy", unit="fraction")
SIZE_CLAIMS: tuple[Claim, ...] = (
    *(Greater("none", than="detailed", metric=Metric(f"log_nuclear_{p}", unit="log10", worst=LOWEST))
      for p in PROJECTIONS),
    Greater("none", than="simplified"),
    Greater("simplified", than="detailed"),
    Greater("none", than="detailed", metric=MAD),
    Greater("none", than="detailed", metric=UNEVENNESS),
    Greater("none", than="detailed", metric=PER_LOSS),
    Greater("text-short", than="text-long"),
    Greater("none", than="detailed", metric=OVER_TEXT),
)  # fmt: skip
AUC_CLAIMS: tuple[Claim, ...] = (
    Greater("detailed", than="bar"),
    Greater("detailed", than="none", metric=GAP),
    Greater("few", than="none", by=0.1),
    Greater("detailed-loss", than="none-loss", by=0.1),
)


def size_study(name: str, title: str, cfgs: Mapping[str, Config], *more: Claim, **facts: Any) -> Study:
    """Claims on size and unevenness, with their controls."""
    return Study(
        room="layer_gradients",
        name=name,
        title=title,
        run=measure,
        arms=Arms(
            "detailed", "none", rivals=("few",), others=("simplified", "padded", "text-short", "text-long")
        ),
        primary=SIZE,
        sizes=cfgs,
        seeds=SEEDS,
        claim=Greater("none", than="detailed"),
        also=(*SIZE_CLAIMS, *more),
        figures=(
            Drawing("layers", draw_layers, "Mean over the questions; faint lines are single seeds."),
            Drawing("ratios", draw_ratios, "Dots are seeds, numbers geometric means."),
            PairedSeeds(),
        ),
        refuted_if="the mean nuclear norm is not larger without reasoning than with detailed reasoning; where detailed "
        "answers scored at as many random tokens (few) reach it, the verdict says 'reduces to few': then it is length",
        paper=PAPER,
        **facts,
    )


def auc_study(name: str, title: str, cfgs: Mapping[str, Config], *more: Claim, **facts: Any) -> Study:
    """The claim on irrelevant answers, against the plain loss as a score."""
    return Study(
        room="layer_gradients",
        name=name,
        title=title,
        run=discriminate,
        arms=Arms(
            "none",
            "detailed",
            rivals=("detailed-loss",),
            others=("none-loss", "simplified", "simplified-loss", "few", "bar"),
        ),
        primary=AUC,
        sizes=cfgs,
        hp={"bar": {"auc": 0.8, "accuracy": 0.8}},
        seeds=SEEDS,
        claim=Greater("detailed", than="none", by=0.1),
        also=(*AUC_CLAIMS, *more),
        figures=(
            Drawing("auc", draw_auc, "Lines are bootstrap intervals over the questions of one seed."),
            PairedSeeds("log_gap"),
        ),
        refuted_if="the AUC of the nuclear norm is not larger by 0.1 with detailed reasoning than without; where the "
        "plain loss tells irrelevant answers as well, the verdict says 'reduces to detailed-loss'",
        paper=PAPER_IRRELEVANT,
        **facts,
    )


PAPER = PaperResult(
    "figures of the mean nuclear norm by layer, 10 models of 1.5 to 9 billion parameters",
    "without reasoning much larger and less even gradients than with detailed reasoning, most in early layers; "
    "simplified reasoning is in between",
    note="figures without numbers known to us: axes end at 100 without and at 20 to 25 with reasoning",
)
PAPER_IRRELEVANT = PaperResult(
    "correct and irrelevant answers, the same models",
    "curves nearly coincide without reasoning; with detailed reasoning irrelevant answers have clearly larger ones",
    note="curves; the paper gives no share of answers that are told apart",
)
SMALL = {
    "smoke": Small(School(steps=3, rows=2, texts=1, window=32, held=12), problems=4),
    "full": Small(),
}
REAL = {"smoke": Real(tiny=True), "full": Real()}
CANNOT = (
    "Base against instruct models, reasoning written by GPT-4o, popularity of topics, billions of parameters."
)
DEVIATIONS = (
    "A decoder of 6 layers and width 64 on characters, trained once per seed on Python's documentation and on "
    "two-digit additions with bare, simplified and detailed answers; a letter in the question names the kind. 64 "
    "problems that it has not seen. Sizes are compared as logarithms, geometric mean over Q, K, V, O. Not in the "
    "paper: padded (the bare answer repeated, which this decoder has never read, so that its size is shown and not "
    "claimed), few (detailed answers, loss over as many random tokens as the bare one has), English cut to the same "
    "lengths, norms over the loss. The decoder learns to give most bare answers as well, unlike the paper's models. "
)
REAL_DEVIATIONS = (
    "SmolLM2-135M-Instruct: 135 million parameters, 30 layers, weights from a 4-bit quantisation, computed in float32. "
    "32 questions written for this study, half arithmetic, half common sense, chat template, answers without an end "
    "mark. The paired unit is a block of four questions, not a model: intervals are over questions, for this one "
    "model. Controls as in the study of the small decoder. "
)

STUDIES: tuple[Study, ...] = (
    size_study(
        "size", "Gradients of answers without and with reasoning: size and unevenness over the layers", SMALL,
        cannot_test=CANNOT, deviations=DEVIATIONS,
    ),
    auc_study(
        "irrelevant", "Do gradients tell irrelevant answers from right ones, and better than the loss does?", SMALL,
        Greater("detailed", than="bar", metric=ACCURACY),
        cannot_test=CANNOT,
        deviations=DEVIATIONS + "bar stands for an AUC and an accuracy of 0.8: below that accuracy of its detailed "
        "answers the decoder has not learned to copy digits, and the comparison would mean little.",
    ),
    size_study(
        "language", "A real language model: gradients of answers without and with reasoning", REAL,
        Greater("none", than="padded"),
        cannot_test=CANNOT, deviations=REAL_DEVIATIONS, extras=("language",),
    ),
    auc_study(
        "language-irrelevant", "A real language model: do gradients tell irrelevant answers from right ones?", REAL,
        cannot_test=CANNOT, extras=("language",),
        deviations=REAL_DEVIATIONS + "An irrelevant answer belongs to another question of the same kind; four right "
        "and four irrelevant ones make the AUC of a block.",
    ),
)  # fmt: skip
"""All studies of this room; the first is the main one."""
