"""The rule book: paired intervals, exact sign-flip tests, equivalence, Holm, and the word that follows from them.

scipy and statsmodels are imported inside the functions, so that a driver that only runs cells does not pay for them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from pullback.lab.declare import Claim, Greater, Metric, Trial
from pullback.lab.result import Comparison, Verdict, Word

ALPHA = 0.05
MIN_SEEDS = 5
EXACT_UP_TO = 14  # pairs; above, 2**14 random sign flips with a fixed seed


def warm_up() -> None:
    """Import what the tests below need, for a driver that has nothing else to do.

    An import that fails here fails again, with its message, where it is needed. A trial that is refused early ends
    the process under this import, which Python then cuts short with an error that is nobody's business.
    """
    with contextlib.suppress(Exception):
        import statsmodels.stats.weightstats  # noqa: F401


def paired_comparison(
    claim: Claim,
    arm: Mapping[int, float],
    than: Mapping[int, float],
    metric: Metric,
    *,
    role: Literal["claim", "rival", "also"] = "claim",
    alpha: float = ALPHA,
    tested: bool = True,
) -> Comparison:
    """Test one claim on paired scores.

    Args:
        claim: `Greater` (exact sign-flip test) or `Equivalent` (two one-sided t tests).
        arm: score of ``claim.arm`` by seed, in the metric's unit.
        than: score of ``claim.than`` by seed; only the seeds of both count.
        metric: its direction gives the sign: a positive difference means that ``arm`` is better.
        role: what the comparison is for.
        alpha: level of the test; the interval covers ``1 - alpha``.
        tested: False for smoke runs, whose numbers are shown without a word.

    Returns:
        The difference with its paired t interval. The word is 'not tested' for fewer than five seeds, for scores that
        are not finite, and when all differences are equal: then the seeds are no repetitions of anything.
    """
    seeds = sorted(set(arm) & set(than))
    a, b = (np.array([scores[s] for s in seeds], dtype=float) for scores in (arm, than))
    difference = a - b if metric.better == "higher" else b - a
    greater = isinstance(claim, Greater)
    margin = float(claim.by if isinstance(claim, Greater) else claim.within)
    usable = len(seeds) > 0 and bool(np.isfinite(difference).all())
    flat = usable and _spread(difference, a, b) == 0
    low, high = _interval(difference, flat, alpha) if usable else (math.nan, math.nan)
    p = math.nan
    if len(seeds) > 1 and usable and (greater or not flat):
        p = sign_flip_p(difference - margin) if greater else equivalence_p(difference, margin)
    testable = tested and usable and not flat and len(seeds) >= MIN_SEEDS
    word: Word = _word(greater, low, high, p, margin, alpha) if testable else "not tested"
    return Comparison(
        kind="greater" if greater else "equivalent",
        role=role,
        arm=claim.arm,
        than=claim.than,
        metric=metric.name,
        margin=margin,
        n=len(seeds),
        difference=float(difference.mean()) if usable else math.nan,
        low=low,
        high=high,
        p=p,
        effect=_effect(difference, flat) if usable else math.nan,
        wins=float((difference > 0).mean()) if usable else math.nan,
        word=word,
    )


def _spread(difference: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """Standard deviation of the differences; 0 when they differ by rounding only."""
    spread = float(difference.std(ddof=1)) if difference.size > 1 else 0.0
    scale = float(max(np.abs(a).max(), np.abs(b).max()))
    return 0.0 if spread <= 1e-12 * scale else spread


def _interval(difference: np.ndarray, flat: bool, alpha: float) -> tuple[float, float]:
    if difference.size < 2:
        return math.nan, math.nan
    mean = float(difference.mean())
    if flat:
        return mean, mean
    from scipy import stats

    low, high = stats.t.interval(1 - alpha, difference.size - 1, mean, stats.sem(difference))
    return float(low), float(high)


def _effect(difference: np.ndarray, flat: bool) -> float:
    """Mean over standard deviation of the differences."""
    mean = float(difference.mean())
    if flat or difference.size < 2:
        return 0.0 if mean == 0 else math.copysign(math.inf, mean)
    return mean / float(difference.std(ddof=1))


def _word(greater: bool, low: float, high: float, p: float, margin: float, alpha: float) -> Word:
    if greater:
        supported, refuted = low > margin and p < alpha, high < margin
    else:
        supported, refuted = p < alpha, low > margin or high < -margin
    return "supported" if supported else "refuted" if refuted else "inconclusive"


def sign_flip_p(difference: np.ndarray) -> float:
    """One-sided p value that the mean exceeds 0 by more than chance: the share of sign flips with as high a mean.

    Args:
        difference: paired differences less the margin, ``[n]``; exact for up to 14 of them.
    """
    from scipy import stats

    exact = difference.size <= EXACT_UP_TO
    result = stats.permutation_test(
        (difference,),
        np.mean,
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        n_resamples=2 ** min(difference.size, EXACT_UP_TO) if exact else 2**EXACT_UP_TO,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def equivalence_p(difference: np.ndarray, within: float) -> float:
    """Larger p value of the two one-sided paired t tests against ``-within`` and ``within``."""
    from statsmodels.stats.weightstats import ttost_paired

    return float(ttost_paired(difference, np.zeros_like(difference), -within, within)[0])


def family_p(c: Comparison, alpha: float = ALPHA) -> float:
    """The p value with which a claim enters a correction over many claims.

    The exact sign-flip test of ``n`` seeds cannot go below ``2 ** -n``. Corrected over ``m`` claims that is
    ``m * 2 ** -n``: with 8 seeds no effect, however large, would survive among 13 claims. A claim of superiority
    therefore enters with the one-sided paired t test that belongs to its interval; the exact test has to be passed
    beside it, uncorrected, for the word 'supported'. A claim of equivalence enters with its own p.

    Args:
        c: a comparison of `paired_comparison`.
        alpha: the level that its interval was made for.

    Returns:
        The p value; NaN where there is none.
    """
    if c.kind != "greater" or not math.isfinite(c.p):
        return c.p
    from scipy import stats

    half = (c.high - c.low) / 2
    if half == 0:  # the same difference in every seed: such a comparison is 'not tested'
        return math.nan
    t = (c.difference - c.margin) / half * stats.t.ppf(1 - alpha / 2, c.n - 1)
    return float(stats.t.sf(t, c.n - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values over a family of claims, in the given order; NaN stays NaN and does not count."""
    values = np.asarray(p_values, dtype=float)
    adjusted = np.full(values.shape, math.nan)
    counted = ~np.isnan(values)
    if counted.any():
        from statsmodels.stats.multitest import multipletests

        adjusted[counted] = multipletests(values[counted], method="holm")[1]
    return adjusted.tolist()


def gap_closed(baseline: float, method: float, ceiling: float) -> float:
    """Share of the way from the baseline's mean to the ceiling's mean that the method goes; NaN without a gap."""
    gap = ceiling - baseline
    return (method - baseline) / gap if gap != 0 and math.isfinite(gap) else math.nan


# --- a whole trial -------------------------------------------------------------------------------------------------


def compare(
    trial: Trial, scores: Mapping[str, Mapping[str, Mapping[int, float]]], *, tested: bool
) -> list[Comparison]:
    """The main claim first, then the method against each rival, then the secondary claims.

    Args:
        trial: the declaration.
        scores: by metric and arm, the score of each seed.
        tested: whether words are given at all.
    """
    main = trial.main_claim()
    claims: list[tuple[Claim, Literal["claim", "rival", "also"]]] = [(main, "claim")]
    claims += [
        (Greater(trial.arms.method, than=rival, metric=main.metric), "rival") for rival in trial.arms.rivals
    ]
    claims += [(claim, "also") for claim in trial.also]
    found = []
    for claim, role in claims:
        metric = claim.metric or trial.primary
        by_arm = scores[metric.name]
        pair = by_arm[claim.arm], by_arm[claim.than]
        found.append(paired_comparison(claim, *pair, metric, role=role, tested=tested))
    return found


def verdict(
    trial: Trial,
    comparisons: Sequence[Comparison],
    means: Mapping[str, float],
    *,
    size: str,
    failures: Mapping[str, int] | None = None,
) -> Verdict:
    """The word on the main claim and one sentence in plain words.

    Args:
        trial: the declaration.
        comparisons: from `compare`, the main claim first.
        means: mean of the main claim's metric by arm.
        size: the size that ran; ``smoke`` gives no word.
        failures: by arm, how many runs counted with the worst score.
    """
    head = comparisons[0]
    metric = trial.main_claim().metric or trial.primary
    parts = [_headline(head, metric, size)]
    reduced = None
    if head.word == "supported" and head.kind == "greater":
        # The declared baseline may itself be called a rival; it is what the main claim has just beaten.
        unbeaten = [
            c for c in comparisons if c.role == "rival" and c.word != "supported" and c.than != head.than
        ]
        if unbeaten:
            closest = min(unbeaten, key=lambda c: c.difference if math.isfinite(c.difference) else math.inf)
            reduced = closest.than
            parts.append(
                f"It reduces to {reduced}: against that, the difference is {_with_interval(closest, metric)}."
            )
    parts += _gap(trial, metric, means)
    bad = {arm: n for arm, n in (failures or {}).items() if n}
    if bad:
        listed = ", ".join(f"{n} of {arm}" for arm, n in bad.items())
        parts.append(f"Runs that failed and count with the worst score: {listed}.")
    return Verdict(head.word, " ".join(parts), reduced)


def _headline(c: Comparison, metric: Metric, size: str) -> str:
    if c.word == "not tested":
        return f"Not tested: {_why_not(c, size)}"
    evidence = (
        f"(95 % interval {_amount(c.low, metric, unit=False)} to {_amount(c.high, metric)}, {_facts(c)})"
    )
    amount = _amount(abs(c.difference), metric)
    direction = "higher" if (c.difference > 0) == (metric.better == "higher") else "lower"
    told = (
        f"{metric.name.replace('_', ' ')} of {c.arm} is {amount} {direction} than that of {c.than} {evidence}"
    )
    margin = f" by more than {_amount(c.margin, metric)}" if c.margin else ""
    if c.kind == "equivalent":
        ends = {
            "supported": f"they are equal within {_amount(c.margin, metric)}",
            "refuted": f"they differ by more than {_amount(c.margin, metric)}",
            "inconclusive": f"equality within {_amount(c.margin, metric)} is not shown",
        }
    else:
        ends = {
            "supported": f"{c.arm} is better{margin}",
            "refuted": f"{c.arm} is not better{margin}" if c.margin else f"{c.arm} is worse",
            "inconclusive": f"these {c.n} seeds cannot tell whether {c.arm} is better{margin}",
        }
    return f"{told[0].upper()}{told[1:]}: {ends[c.word]}."


def _why_not(c: Comparison, size: str) -> str:
    if size == "smoke":
        return "a smoke run shows that the code works and says nothing about the claim."
    if c.n < MIN_SEEDS:
        return f"{c.n} paired seeds are too few, at least {MIN_SEEDS} are needed."
    if not math.isfinite(c.difference):
        return f"{c.metric} is not finite in every run. Give Metric.worst a finite value."
    if c.difference == 0:
        return f"{c.arm} and {c.than} gave the same {c.metric} in every seed. Does the arm change anything?"
    return f"the difference in {c.metric} is the same in all {c.n} seeds. Does the seed change anything?"


def _facts(c: Comparison) -> str:
    p = "p < 0.001" if c.p < 0.001 else f"p = {c.p:.2g}"
    return f"{c.n} paired seeds, {p}, better in {round(c.wins * c.n)} of {c.n}"


def _with_interval(c: Comparison, metric: Metric) -> str:
    interval = f"{_amount(c.low, metric, unit=False)} to {_amount(c.high, metric)}"
    return f"{_amount(c.difference, metric)} (95 % interval {interval})"


def _amount(value: float, metric: Metric, *, unit: bool = True) -> str:
    """A difference with its unit; fractions in percentage points."""
    if metric.unit == "fraction":
        return f"{100 * value:.2f}" + (" percentage points" if unit else "")
    return f"{value:.4g}" + (f" {metric.unit}" if unit and metric.unit else "")


def _gap(trial: Trial, metric: Metric, means: Mapping[str, float]) -> list[str]:
    ceiling = trial.arms.ceiling
    if ceiling is None or metric.name != trial.primary.name:
        return []
    closed = gap_closed(means[trial.arms.baseline], means[trial.arms.method], means[ceiling])
    if not math.isfinite(closed):
        return []
    ends = f"from {trial.arms.baseline} to {ceiling}"
    return [f"{trial.arms.method} closes {100 * closed:.0f} % of the gap {ends}."]
