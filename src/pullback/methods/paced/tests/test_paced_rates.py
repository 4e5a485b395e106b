"""Pass rates: estimators, what is unknown or stale, state, refusals."""

from __future__ import annotations

import io
import math
from itertools import product
from typing import Any

import pytest
import torch

from pullback.core.state import StateError
from pullback.methods.paced import BetaKernel, PassRateTracker

NAN = math.nan


def tracked(rewards, **how):
    rewards = torch.tensor(rewards)
    tracker = PassRateTracker(len(rewards), rewards.shape[1], **how)
    tracker.update(torch.arange(len(rewards)), rewards)
    return tracker


def close(found, wanted):
    torch.testing.assert_close(found, torch.tensor(wanted), equal_nan=True)
    return True


def test_raw_rate_and_posterior_mean():
    rewards = [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert close(tracked(rewards).rate, [0.0, 0.25, 1.0])
    assert close(tracked(rewards, smoothing=1.0).rate, [1 / 6, 2 / 6, 5 / 6])
    assert close(tracked(rewards, smoothing=0.5).rate, [0.1, 0.3, 0.9])


def test_rewards_of_any_kind():
    assert close(tracked([[True, False]]).rate, [0.5])
    assert close(tracked([[0.25, 0.5]]).rate, [0.375])  # partly right


def test_one_rollout_needs_smoothing():
    with pytest.raises(ValueError, match="k must be >= 2 without smoothing, got 1"):
        PassRateTracker(4, k=1)
    rate = tracked([[0], [1]], smoothing=1.0).rate
    assert close(rate, [1 / 3, 2 / 3])
    assert bool((BetaKernel()(rate) > 0).all())


def test_what_was_never_measured_or_has_no_verdict_is_unknown():
    tracker = PassRateTracker(4, k=2, smoothing=1.0)
    tracker.update(torch.tensor([0, 1, 2]), torch.tensor([[1.0, 0.0], [1.0, NAN], [NAN, NAN]]))
    assert close(tracker.rate, [0.5, 2 / 3, NAN, NAN])
    assert repr(tracker) == "PassRateTracker(num_problems=4, k=2, smoothing=1, known=2)"


def test_a_repeated_id_gets_all_its_tries_and_a_newer_measurement_replaces():
    tracker = PassRateTracker(2, k=2)
    tracker.update(torch.tensor([1, 1]), torch.tensor([[1, 1], [1, 0]]))
    assert close(tracker.rate, [NAN, 0.75])
    tracker.update(torch.tensor([1], dtype=torch.int32), torch.tensor([[0, 0]]))
    assert close(tracker.rate, [NAN, 0.0])


def test_an_older_measurement_is_dropped():
    tracker = PassRateTracker(2, k=2)
    tracker.update(torch.tensor([0]), torch.tensor([[1, 1]]), step=10)
    tracker.update(torch.tensor([0, 1]), torch.tensor([[0, 0], [0, 1]]), step=5)
    assert close(tracker.rate, [1.0, 0.5])
    assert tracker.measured_at.tolist() == [10, 5]
    assert tracker.clock == 10


def test_stale_problems():
    tracker = PassRateTracker(3, k=2)
    tracker.update(torch.tensor([0]), torch.tensor([[1, 1]]), step=0)
    tracker.update(torch.tensor([1]), torch.tensor([[1, 1]]), step=30)
    assert tracker.stale(30, max_age=20).tolist() == [0, 2]
    assert tracker.stale(30, max_age=30).tolist() == [2]
    assert tracker.stale(0, max_age=0).tolist() == [2]
    with pytest.raises(ValueError, match="max_age must be >= 0, got -1"):
        tracker.stale(0, max_age=-1)


def test_estimates_lie_within_binomial_bounds():
    generator = torch.Generator().manual_seed(0)
    for q in (0.05, 0.5, 0.9):
        rewards = (torch.rand(2000, 8, generator=generator) < q).int()
        rate = tracked(rewards.tolist()).rate
        assert abs(float(rate.mean()) - q) < 4 * math.sqrt(q * (1 - q) / 16000)
        assert float(rate.var()) == pytest.approx(q * (1 - q) / 8, rel=0.15)


@pytest.mark.parametrize("q", [0.05, 0.5, 0.8])
def test_the_weights_bias_is_a_constant_factor(q):
    """E[p (1 - p)] of the estimate is (1 - 1/K) q (1 - q): exact, over all outcomes of four rollouts."""
    outcomes = list(product([0, 1], repeat=4))
    weight = BetaKernel(normalize="none")(tracked(outcomes).rate)
    chance = torch.tensor([q ** sum(o) * (1 - q) ** (4 - sum(o)) for o in outcomes])
    assert float(weight @ chance) == pytest.approx(0.75 * q * (1 - q), rel=1e-5)


def test_resume_is_exact_and_states_are_copies():
    tracker, ids = PassRateTracker(5, k=2), torch.arange(5)
    rewards = torch.tensor([[1, 0]] * 5)
    tracker.update(ids, rewards, step=3)
    state = tracker.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    fresh = PassRateTracker(5, k=2)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for each in (tracker, fresh):
        each.update(ids[:2], 1 - rewards[:2])
    for name, value in tracker.state_dict().items():
        same = torch.equal(value, fresh.state_dict()[name]) if isinstance(value, torch.Tensor) else True
        assert same
        assert name != "clock" or fresh.clock == value == 4
    assert state["measured_at"].tolist() == [3] * 5


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 2},
        {"format_version": None},
        {"passes": torch.zeros(4)},
        {"measured_at": torch.zeros(5)},
        {"clock": "soon"},
        {"more": 1},
    ],
)
def test_foreign_states_are_refused_and_change_nothing(change):
    tracker = tracked([[1, 0]] * 5)
    before = tracker.state_dict()
    with pytest.raises(StateError):
        tracker.load_state_dict({**before, **change})
    assert torch.equal(tracker.passes, before["passes"])
    assert tracker.clock == before["clock"]


@pytest.mark.parametrize(
    ("ids", "rewards", "message"),
    [
        ([0, 1], [[1, 0]], r"rewards must be of shape \(2, 2\), got \(1, 2\)"),
        ([0], [[1, 0, 1]], r"rewards must be of shape \(1, 2\), got \(1, 3\)"),
        ([3], [[1, 0]], r"ids must lie in \[0, 3\), got 3 to 3"),
        ([-1], [[1, 0]], r"ids must lie in \[0, 3\), got -1 to -1"),
        ([0], [[2, 0]], r"rewards must lie in \[0, 1\], got 0 to 2"),
        ([0], [[-1.0, 0.0]], r"rewards must lie in \[0, 1\], got -1 to 0"),
    ],
)
def test_bad_updates_change_nothing(ids, rewards, message):
    tracker = PassRateTracker(3, k=2)
    before = tracker.state_dict()
    with pytest.raises(ValueError, match=message):
        tracker.update(torch.tensor(ids), torch.tensor(rewards))
    for name, value in tracker.state_dict().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(before[name]))


def test_bad_settings_are_refused():
    loose: Any = PassRateTracker
    for arguments, message in (
        ({"num_problems": 0}, "num_problems must be >= 1, got 0"),
        ({"num_problems": 2, "k": 0}, "k must be >= 1, got 0"),
        ({"num_problems": 2, "smoothing": -1.0}, "smoothing must be >= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            loose(**arguments)
    for arguments in ({"num_problems": 2.5}, {"num_problems": 2, "k": True}):
        with pytest.raises(TypeError):
            loose(**arguments)
    with pytest.raises(TypeError, match="ids must be a 1-dim integer tensor"):
        PassRateTracker(3, k=2).update(torch.tensor([0.5]), torch.ones(1, 2))
    with pytest.raises(TypeError, match="rewards must be of type Tensor, got list"):
        loose(3, k=2).update(torch.tensor([0]), [[1, 0]])


def test_an_update_of_nothing_changes_no_rate():
    tracker = tracked([[1, 0]])
    tracker.update(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2))
    assert tracker.rate.tolist() == [0.5]
    tracker.synchronize()
    assert not tracker.fresh.any()
    assert tracker.rate.tolist() == [0.5]
