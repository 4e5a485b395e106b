"""GradNorm against a literal transcription of Chen et al. (2018), closed forms, trouble and resume."""

from __future__ import annotations

import math
import re

import pytest
import torch

from pullback.core.checks import NonFiniteError
from pullback.core.gradnorm import GradNorm
from pullback.core.state import StateError


class Reference:
    """Section 3.2 of the paper with plain floats; the gradient of eq. 2 by central differences, Adam in full."""

    def __init__(self, tasks, asymmetry, lr):
        self.tasks, self.asymmetry, self.lr = tasks, asymmetry, lr
        self.w, self.m, self.v = [1.0] * tasks, [0.0] * tasks, [0.0] * tasks
        self.first, self.t = None, 0

    def update(self, losses, norms):
        n = self.tasks
        self.first = self.first or list(losses)
        tilde = [losses[i] / self.first[i] for i in range(n)]
        r = [tilde[i] / (sum(tilde) / n) for i in range(n)]
        mean = sum(self.w[i] * norms[i] for i in range(n)) / n
        targets = [mean * r[i] ** self.asymmetry for i in range(n)]  # constants from here on

        def objective(w):
            return sum(abs(w[i] * norms[i] - targets[i]) for i in range(n))

        self.t += 1
        new = []
        for i in range(n):
            h = 1e-7
            up = objective([w + h * (j == i) for j, w in enumerate(self.w)])
            down = objective([w - h * (j == i) for j, w in enumerate(self.w)])
            g = (up - down) / (2 * h)
            self.m[i] = 0.9 * self.m[i] + 0.1 * g
            self.v[i] = 0.999 * self.v[i] + 0.001 * g * g
            mhat, vhat = self.m[i] / (1 - 0.9**self.t), self.v[i] / (1 - 0.999**self.t)
            new.append(self.w[i] - self.lr * mhat / (math.sqrt(vhat) + 1e-8))
        self.w = [w * n / sum(new) for w in new]
        return self.w


def rows(seed, steps=60, tasks=3):
    stream = torch.Generator().manual_seed(seed)
    losses = torch.rand(steps, tasks, generator=stream, dtype=torch.float64) + 0.2
    norms = torch.rand(steps, tasks, generator=stream, dtype=torch.float64) * torch.tensor([3.0, 0.2, 1.0])
    return losses, norms


@pytest.mark.parametrize("asymmetry", [0.0, 0.5, 1.5])
def test_it_is_the_paper(asymmetry):
    ours, paper = GradNorm(3, asymmetry=asymmetry, lr=0.01), Reference(3, asymmetry, 0.01)
    for losses, norms in zip(*rows(0), strict=True):
        got = ours.update(losses, norms)
        assert got.tolist() == pytest.approx(paper.update(losses.tolist(), norms.tolist()), rel=1e-6)
        assert got.dtype == torch.float64
    assert ours.weights.std() > 0.05  # it moved


def test_it_is_torchs_adam_on_the_autograd_gradient_of_the_objective():
    ours, w = GradNorm(3, lr=0.02), torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer, losses, norms = torch.optim.Adam([w], lr=0.02), *rows(1)
    for now, n in zip(losses, norms, strict=True):
        pace = now / losses[0]
        target = ((w * n).mean() * (pace / pace.mean()) ** 1.5).detach()
        optimizer.zero_grad()
        (w * n - target).abs().sum().backward()
        optimizer.step()
        with torch.no_grad():
            w.mul_(3 / w.sum())
        assert torch.allclose(ours.update(now, n), w, rtol=0, atol=1e-13)


def test_the_first_step_is_lr_towards_the_mean():
    # Adam's first step is lr * sign: the large gradient loses weight, the small one gains.
    weights = GradNorm(2, lr=0.1).update(torch.tensor([5.0, 5.0]), torch.tensor([4.0, 1.0]))
    assert weights.tolist() == pytest.approx([0.9, 1.1], abs=1e-6)


def test_without_asymmetry_weighted_norms_become_equal():
    balance, norms = GradNorm(2, asymmetry=0.0, lr=1e-2), torch.tensor([4.0, 1.0])
    for _ in range(400):
        weights = balance.update(torch.ones(2), norms)
    assert (weights * norms).tolist() == pytest.approx([1.6, 1.6], rel=0.05)  # w = 2 (1/4, 1) / (5/4)


def test_a_task_that_trains_slower_gets_more_weight_with_more_asymmetry():
    weights = []
    for asymmetry in (0.0, 0.5, 1.5):
        balance = GradNorm(2, asymmetry=asymmetry, lr=1e-2)
        balance.update(torch.ones(2), torch.ones(2))
        for _ in range(300):
            found = balance.update(torch.tensor([0.5, 0.9]), torch.ones(2))
        weights.append(found[1].item())
    assert weights[0] == pytest.approx(1.0, abs=0.02)
    assert weights[0] < weights[1] - 0.05
    assert weights[1] < weights[2] - 0.05


def test_the_scale_of_losses_and_of_gradients_does_not_matter():
    plain, scaled = GradNorm(3, lr=0.01), GradNorm(3, lr=0.01)
    for losses, norms in zip(*rows(2), strict=True):
        one = plain.update(losses, norms)
        other = scaled.update(losses * torch.tensor([7.0, 0.1, 1.0]).double(), norms * 1000)
        assert torch.allclose(one, other, rtol=0, atol=1e-6)


def test_equal_tasks_keep_their_weights_and_one_task_has_weight_one():
    balance, alone = GradNorm(4, lr=0.1), GradNorm(1, lr=0.1)
    for losses, _ in zip(*rows(3, 10), strict=True):
        equal = balance.update(losses[0].expand(4), losses[1].expand(4))
        assert torch.allclose(equal, torch.ones_like(equal), rtol=0, atol=1e-12)
        assert alone.update(losses[:1], losses[1:2]).item() == pytest.approx(1.0)


def test_weights_stay_positive_and_sum_to_the_number_of_tasks():
    balance = GradNorm(3, lr=0.9)  # a step as large as the weights themselves
    smallest = 1.0
    for losses, norms in zip(*rows(4), strict=True):
        weights = balance.update(losses.float(), norms.float())
        smallest = min(smallest, weights.min().item())
        assert (weights > 0).all()
        assert weights.sum().item() == pytest.approx(3.0, rel=1e-5)
    assert smallest < 1e-4  # the floor was needed


# --- zeros --------------------------------------------------------------------------------------------------


def test_a_loss_that_reaches_zero_is_a_finished_task():
    balance = GradNorm(2, lr=0.1)
    balance.update(torch.ones(2), torch.ones(2))
    for _ in range(5):
        weights = balance.update(torch.tensor([0.0, 1.0]), torch.ones(2))
    assert weights[0] < 0.9


def test_a_loss_that_starts_at_zero_stands_still_until_it_is_positive():
    ours, started = GradNorm(2, lr=0.1), GradNorm(2, lr=0.1)
    norms = torch.tensor([1.0, 2.0])
    for _ in range(3):  # the task without a rate counts as ratio 1, as a loss that did not change
        a = ours.update(torch.tensor([0.0, 1.0]), norms)
        b = started.update(torch.tensor([3.0, 1.0]), norms)
        assert torch.equal(a, b)
    assert torch.equal(
        ours.update(torch.tensor([3.0, 1.0]), norms), started.update(torch.tensor([3.0, 1.0]), norms)
    )
    assert torch.equal(ours.state_dict()["initial_losses"], torch.tensor([3.0, 1.0]))


def test_when_all_losses_are_zero_all_rates_are_equal():
    fresh, finished = GradNorm(2, lr=0.1), GradNorm(2, lr=0.1)
    finished.update(torch.ones(2), torch.zeros(2))  # zero norms: only the first losses are kept
    for balance in (fresh, finished):
        assert (balance.update(torch.zeros(2), torch.tensor([2.0, 1.0])) - 1).tolist()[0] < -0.05


def test_zero_norms_change_nothing():
    balance = GradNorm(2, lr=0.1)
    for losses in (torch.zeros(2), torch.ones(2), torch.tensor([0.0, 1.0])):
        assert torch.equal(balance.update(losses, torch.zeros(2)), torch.ones(2))


# --- dtypes, graphs, devices --------------------------------------------------------------------------------


def test_low_precision_is_computed_in_float32_and_graphs_are_left_alone():
    balance = GradNorm(2, lr=1e-3)
    losses = torch.tensor([2.0, 3.0], dtype=torch.bfloat16, requires_grad=True)
    before = balance.weights
    weights = balance.update(losses, torch.tensor([10.0, 1.0], dtype=torch.bfloat16))
    assert weights.dtype == torch.float32
    assert not weights.requires_grad
    assert torch.equal(before, torch.ones(2))  # handed out earlier, not edited
    (weights * losses).sum().backward()
    assert weights[0].item() == pytest.approx(0.999, abs=1e-6)


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "norms", "error", "message"),
    [
        ([1.0, math.nan], [1.0, 1.0], NonFiniteError, "losses[1] must be finite, got nan."),
        ([math.inf, 1.0], [1.0, 1.0], NonFiniteError, "losses[0] must be finite, got inf."),
        ([1.0, 1.0], [math.inf, 1.0], NonFiniteError, "norms[0] must be finite, got inf."),
        ([-1.0, 1.0], [1.0, 1.0], ValueError, "losses[0] must be >= 0, got -1.0. Shift the loss"),
        ([1.0, 1.0], [1.0, -2.0], ValueError, "norms[1] must be >= 0, got -2.0."),
        (
            [1.0, 1.0],
            [1e30, 1.0],
            NonFiniteError,
            "small enough to be squared in torch.float32, got [1.0, 1.0]",
        ),
        ([1.0] * 3, [1.0, 1.0], ValueError, "losses must be of shape (2), got"),
        ([1.0, 1.0], [1.0], ValueError, "norms must be of shape (2), got"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_changes(losses, norms, error, message):
    balance = GradNorm(2, lr=0.1)
    balance.update(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 3.0]))
    before = balance.state_dict()
    with pytest.raises(error, match=re.escape(message)):
        balance.update(torch.tensor(losses), torch.tensor(norms))
    after = balance.state_dict()
    assert all(torch.equal(torch.as_tensor(after[key]), torch.as_tensor(before[key])) for key in before)


def test_bad_types_and_settings_are_refused():
    with pytest.raises(TypeError, match=r"losses must be a floating tensor, got \[1.0, 2.0\]"):
        GradNorm(2).update([1.0, 2.0], torch.ones(2))
    with pytest.raises(TypeError, match="norms must be a floating tensor"):
        GradNorm(2).update(torch.ones(2), torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="tasks must be >= 1, got 0"):
        GradNorm(0)
    with pytest.raises(ValueError, match="asymmetry must be >= 0, got -1"):
        GradNorm(2, asymmetry=-1)
    with pytest.raises(ValueError, match="lr must be > 0, got 0"):
        GradNorm(2, lr=0)


# --- state --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resume_is_exact_and_the_state_is_a_copy(dtype):
    losses, norms = (table.to(dtype) for table in rows(5))
    whole, first = GradNorm(3, lr=0.01), GradNorm(3, lr=0.01)
    for i in range(40):
        whole.update(losses[i], norms[i])
        if i < 20:
            first.update(losses[i], norms[i])
    saved = first.state_dict()
    first.update(losses[0], norms[0])
    second = GradNorm(3, lr=0.01)
    second.load_state_dict(saved)
    for i in range(20, 40):
        second.update(losses[i], norms[i])
    assert torch.equal(second.weights, whole.weights)
    assert second.steps == whole.steps == 40
    assert saved["steps"] == 20
    saved = second.state_dict()
    second.weights.zero_()
    assert torch.equal(saved["weights"], whole.weights)


def test_a_foreign_state_is_refused_whole():
    balance = GradNorm(2)
    good = balance.state_dict()
    for bad, message in (
        ({**good, "format_version": 2}, "format_version must be <= 1, got 2"),
        (GradNorm(3).state_dict(), r"weights must have shape \(2,\)"),
        ({**good, "weights": good["weights"].bfloat16()}, "dtype torch.float32"),
        ({**good, "weights": good["weights"].double()}, "initial_losses must have .* torch.float64"),
        ({k: v for k, v in good.items() if k != "moments"}, r"missing \['moments'\]"),
        (3, "state must be a mapping, got 3"),
    ):
        with pytest.raises(StateError, match=message):
            balance.load_state_dict(bad)
    assert repr(balance) == "GradNorm(tasks=2, asymmetry=1.5, lr=0.001)"
