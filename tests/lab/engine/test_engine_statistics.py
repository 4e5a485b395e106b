"""The rule book against closed forms and scipy, and the harness's own self-tests."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from pullback.lab import Arms, Equivalent, Greater, Metric, Trial
from pullback.lab.statistics import (
    compare,
    equivalence_p,
    family_p,
    gap_closed,
    holm,
    paired_comparison,
    sign_flip_p,
    verdict,
)

UP, DOWN = Metric("m"), Metric("m", better="lower", worst=1.0)
CLAIM = Greater("a", than="b")


def scores(values):
    return dict(enumerate(map(float, values)))


def pair(rng, n, effect=0.0):
    base = rng.normal(size=n)
    return scores(base + rng.normal(effect, 1.0, n)), scores(base)


def test_interval_and_p_against_closed_forms():
    rng = np.random.default_rng(1)
    a, b = rng.normal(1.0, 1.0, 8), rng.normal(0.0, 1.0, 8)
    d = a - b
    c = paired_comparison(CLAIM, scores(a), scores(b), UP)
    half = stats.t.ppf(0.975, 7) * d.std(ddof=1) / math.sqrt(8)
    assert c.difference == pytest.approx(d.mean())
    assert (c.low, c.high) == (pytest.approx(d.mean() - half), pytest.approx(d.mean() + half))
    flips = [np.mean(d * signs) for signs in itertools.product((1, -1), repeat=8)]
    assert c.p == pytest.approx(np.mean(np.array(flips) >= d.mean() - 1e-12))
    assert c.effect == pytest.approx(d.mean() / d.std(ddof=1))
    assert c.wins == pytest.approx((d > 0).mean())
    assert c.n == 8


def test_direction_turns_the_sign_and_nothing_else():
    a, b = scores([1.0, 2, 3, 4, 5.5]), scores([0.0, 1, 1, 3, 4])
    up, down = paired_comparison(CLAIM, a, b, UP), paired_comparison(CLAIM, b, a, DOWN)
    assert (up.difference, up.low, up.high, up.p) == (down.difference, down.low, down.high, down.p)
    assert paired_comparison(CLAIM, a, b, DOWN).word == "refuted"


def test_margin_is_subtracted_before_the_test():
    d = np.array([0.9, 1.1, 1.0, 1.2, 0.8, 1.05])
    a, b = scores(d), scores(np.zeros(6))
    words = {by: paired_comparison(Greater("a", than="b", by=by), a, b, UP).word for by in (0.5, 1.0, 1.5)}
    assert words == {0.5: "supported", 1.0: "inconclusive", 1.5: "refuted"}


def test_p_is_of_the_difference_beyond_the_margin():
    d = np.array([0.9, 1.1, 1.0, 1.2, 0.8, 1.05])
    c = paired_comparison(Greater("a", than="b", by=0.95), scores(d), scores(np.zeros(6)), UP)
    flips = np.array([np.mean((d - 0.95) * signs) for signs in itertools.product((1, -1), repeat=6)])
    assert c.p == pytest.approx((flips >= np.mean(d - 0.95) - 1e-12).mean())
    assert c.p > 0.1


def test_only_shared_seeds_count():
    c = paired_comparison(CLAIM, {0: 1.0, 1: 2.0, 7: 9.0}, {0: 0.0, 1: 0.5, 3: 4.0}, UP)
    assert c.n == 2
    assert c.difference == pytest.approx(1.25)


@pytest.mark.parametrize("n", [5, 8, 14, 20])
def test_sign_flip_has_its_smallest_p(n):
    p = sign_flip_p(np.arange(1.0, n + 1))
    assert p == pytest.approx(2.0**-n) if n <= 14 else p < 1e-3


def test_equivalence_against_two_t_tests():
    d = np.random.default_rng(2).normal(0.02, 0.1, 9)
    ours = equivalence_p(d, 0.2)
    lower = stats.ttest_1samp(d, -0.2, alternative="greater").pvalue
    upper = stats.ttest_1samp(d, 0.2, alternative="less").pvalue
    assert ours == pytest.approx(max(lower, upper))


def test_equivalence_words():
    noise = np.random.default_rng(3).normal(0, 0.01, 8)
    within = Equivalent("a", "b", within=0.1)
    zero = scores(np.zeros(8))
    assert paired_comparison(within, scores(noise), zero, UP).word == "supported"
    assert paired_comparison(within, scores(noise + 0.5), zero, UP).word == "refuted"
    assert paired_comparison(within, scores(noise - 0.5), zero, UP).word == "refuted"
    assert paired_comparison(within, scores(noise + 0.1), zero, UP).word == "inconclusive"


def test_holm_against_statsmodels_and_by_hand():
    p = [0.01, 0.04, 0.03, 0.005]
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    assert holm([0.01, math.nan, 0.03])[::2] == pytest.approx([0.02, 0.03])
    assert math.isnan(holm([0.01, math.nan, 0.03])[1])
    assert holm([]) == []


def test_a_claim_enters_a_family_with_the_t_test_of_its_interval():
    rng = np.random.default_rng(2)
    a, b = rng.normal(0.6, 1.0, 9), rng.normal(0.0, 1.0, 9)
    for metric, sign in ((UP, 1), (DOWN, -1)):
        for margin in (0.0, 0.2, -0.3):
            c = paired_comparison(Greater("a", than="b", by=margin), scores(a), scores(b), metric)
            expected = stats.ttest_1samp(sign * (a - b), margin, alternative="greater").pvalue
            assert family_p(c) == pytest.approx(expected, rel=1e-9)
    c = paired_comparison(CLAIM, scores(a), scores(b), UP, alpha=0.1)
    assert family_p(c, alpha=0.1) == pytest.approx(stats.ttest_rel(a, b, alternative="greater").pvalue)


def test_equivalence_enters_a_family_with_its_own_p():
    noise = 0.01 * np.random.default_rng(3).normal(size=8)
    c = paired_comparison(Equivalent("a", "b", within=0.1), scores(noise), scores(np.zeros(8)), UP)
    assert family_p(c) == c.p


def test_no_p_no_place_in_the_family():
    flat = paired_comparison(CLAIM, scores([1.0] * 8), scores([0.0] * 8), UP)
    assert flat.word == "not tested"
    assert math.isnan(family_p(flat))
    assert math.isnan(family_p(paired_comparison(CLAIM, scores([1.0]), scores([0.0]), UP)))


def test_among_many_claims_a_clear_one_survives_and_a_weak_one_does_not():
    a, b = pair(np.random.default_rng(0), 8, 1.5)
    weak = paired_comparison(CLAIM, a, b, UP)
    clear = paired_comparison(CLAIM, scores(np.array(list(b.values())) + 9 + np.arange(8)), b, UP)
    assert weak.word == clear.word == "supported"
    assert clear.p * 40 > 0.05, "the exact test alone could not survive 40 claims"
    assert holm([family_p(clear)] * 40)[0] < 0.05
    assert holm([family_p(weak)] * 40)[0] > 0.05


# --- what cannot be tested ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "tested"),
    [
        ([1, 2, 3, 4.5], [0, 0, 0, 0], True),  # fewer than five
        ([1, 1, 1, 1, 1], [1, 1, 1, 1, 1], True),  # the same
        ([0.3, 0.4, 0.5, 0.6, 0.7], [0.2, 0.3, 0.4, 0.5, 0.6], True),  # equal up to rounding
        ([1, 2, 3, 4, math.nan], [0, 0, 0, 0, 0], True),
        ([1, 2, 3, 4, math.inf], [0, 0, 0, 0, 0], True),
        ([1, 2, 3, 4, 6], [0, 0, 0, 0, 0], False),
        ([], [], True),
        ([1], [0], True),
    ],
)
@pytest.mark.parametrize("claim", [CLAIM, Equivalent("a", "b", within=9.0)])
def test_no_word_without_grounds(a, b, tested, claim):
    assert paired_comparison(claim, scores(a), scores(b), UP, tested=tested).word == "not tested"


# --- the harness tests itself -------------------------------------------------------------------------------------


def words(count, make):
    rng = np.random.default_rng(2024)
    return [paired_comparison(CLAIM, *make(rng), UP).word for _ in range(count)]


def test_a_against_a_is_rarely_decided():
    found = words(400, lambda rng: pair(rng, 8))
    # Nominal 2.5 % at each end; 400 trials put five standard errors at 3.9 points.
    assert 0 < found.count("supported") / 400 < 0.064
    assert 0 < found.count("refuted") / 400 < 0.064


def test_a_planted_effect_is_found_and_its_reverse_refuted():
    assert words(120, lambda rng: pair(rng, 8, 1.4)).count("supported") / 120 > 0.85
    assert words(120, lambda rng: pair(rng, 8, -1.4)).count("refuted") / 120 > 0.85


def test_shuffled_labels_destroy_the_effect():
    def shuffled(rng):
        a, b = pair(rng, 8, 1.4)
        swap = rng.random(8) < 0.5
        return tuple(
            {s: (b if swap[s] else a)[s] if first else (a if swap[s] else b)[s] for s in range(8)}
            for first in (True, False)
        )

    assert words(150, shuffled).count("supported") / 150 < 0.1


# --- the verdict --------------------------------------------------------------------------------------------------


def judged(by_arm, *, size="full", failures=None, **changes):
    arms = Arms(
        "base",
        "method",
        rivals=tuple(a for a in by_arm if a.startswith("rival")),
        ceiling="top" if "top" in by_arm else None,
    )
    kept = {"title": "t", "run": print, "arms": arms, "primary": Metric("accuracy", unit="fraction")}
    trial = Trial(**{**kept, **changes})
    all_scores = {trial.primary.name: {arm: scores(v) for arm, v in by_arm.items()}}
    comparisons = compare(trial, all_scores, tested=size != "smoke")
    means = {arm: float(np.mean(v)) for arm, v in by_arm.items()}
    return verdict(trial, comparisons, means, size=size, failures=failures), comparisons


NOISE = np.array([0.0, 0.01, -0.01, 0.005, -0.005, 0.002, -0.002, 0.0])


def test_sentence_in_percentage_points_with_the_gap():
    found, _ = judged({"base": 0.5 - NOISE, "method": 0.8 + NOISE, "top": 0.9 + NOISE})
    assert found.word == "supported"
    assert found.sentence.startswith(
        "Accuracy of method is 30.00 percentage points higher than that of base (95 % interval "
    )
    assert "8 paired seeds, p = 0.0039, better in 8 of 8): method is better." in found.sentence
    assert found.sentence.endswith("method closes 75 % of the gap from base to top.")


def test_a_lower_loss_reads_as_lower():
    metric = Metric("loss", better="lower", unit="nats", worst=9.0)
    found, _ = judged({"base": 2 - NOISE, "method": 1 + NOISE}, primary=metric)
    assert found.sentence.startswith("Loss of method is 1 nats lower than that of base (95 % interval ")
    worse, _ = judged({"base": 1 - NOISE, "method": 2 + NOISE}, primary=metric)
    assert worse.word == "refuted"
    assert "1 nats higher" in worse.sentence
    assert "method is worse" in worse.sentence


def test_a_method_no_better_than_a_rival_reduces_to_it():
    found, comparisons = judged(
        {"base": 0.5 - NOISE, "rival1": 0.6 - NOISE, "rival2": 0.8 - NOISE[::-1], "method": 0.8 + NOISE}
    )
    assert (found.word, found.reduces_to) == ("supported", "rival2")
    assert "It reduces to rival2" in found.sentence
    assert [c.role for c in comparisons] == ["claim", "rival", "rival"]
    both, _ = judged(
        {
            "base": 0.5 - NOISE,
            "rival1": 0.81 - NOISE[::-1],
            "rival2": 0.79 - NOISE[::-1] * 9,
            "method": 0.8 + NOISE,
        }
    )
    assert both.reduces_to == "rival1"  # the stronger one of two that are not beaten
    clear, _ = judged({"base": 0.5 - NOISE, "rival1": 0.6 - NOISE, "method": 0.8 + NOISE})
    assert clear.reduces_to is None


def test_an_unsupported_method_reduces_to_nothing():
    found, _ = judged({"base": 0.8 - NOISE[::-1], "rival1": 0.9 + NOISE, "method": 0.8 + NOISE})
    assert found.reduces_to is None
    assert found.word == "inconclusive"
    assert "cannot tell whether method is better" in found.sentence


@pytest.mark.parametrize(
    ("by_arm", "size", "reason"),
    [
        ({"base": 0.5 - NOISE, "method": 0.8 + NOISE}, "smoke", "a smoke run shows that the code works"),
        ({"base": [0.5, 0.4], "method": [0.6, 0.7]}, "full", "2 paired seeds are too few"),
        ({"base": 0.5 + NOISE, "method": 0.5 + NOISE}, "full", "gave the same accuracy in every seed"),
        ({"base": 0.5 + NOISE, "method": 0.6 + NOISE}, "full", "Does the seed change anything"),
        ({"base": 0.5 + NOISE, "method": [math.inf] * 8}, "full", "Give Metric.worst a finite value"),
    ],
)
def test_the_reason_for_no_verdict_is_told(by_arm, size, reason):
    found, _ = judged(by_arm, size=size)
    assert found.word == "not tested"
    assert reason in found.sentence


def test_failures_are_told():
    found, _ = judged({"base": 0.5 - NOISE, "method": 0.8 + NOISE}, failures={"base": 0, "method": 2})
    assert "failed and count with the worst score: 2 of method." in found.sentence


def test_gap_closed():
    assert gap_closed(1.0, 1.5, 2.0) == 0.5
    assert gap_closed(2.0, 1.5, 1.0) == 0.5
    assert math.isnan(gap_closed(1.0, 2.0, 1.0))
