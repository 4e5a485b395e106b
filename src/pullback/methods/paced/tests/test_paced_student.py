"""Rollouts and the signal-to-noise probe: distributions, caches, unbiasedness, coverage, no trace."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pullback.core.checks import NonFiniteError
from pullback.core.streams import numpy_generator
from pullback.methods.paced import distillation_loss, gradient_snr, rollout
from pullback.methods.paced.tests import reference

SYMBOLS, STOP = 4, 3


class Fading(nn.Module):
    """A causal model: the logits are a map of a fading sum over the prefix, which is also its cache."""

    def __init__(self, dropout=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inside = nn.Parameter(torch.randn(SYMBOLS, 6, generator=generator))
        self.outside = nn.Parameter(torch.randn(6, SYMBOLS, generator=generator))
        self.drop = nn.Dropout(dropout)
        self.rows = []

    def forward(self, tokens, state=None):
        self.rows.append(tokens.shape)
        states = []
        state = torch.zeros(len(tokens), 6) if state is None else state
        for each in self.inside[tokens].unbind(1):
            state = 0.6 * state + each
            states.append(state)
        return self.drop(torch.stack(states, 1)) @ self.outside

    def with_cache(self, tokens, cache):
        logits = self.forward(tokens, None if cache is None else cache["state"][0])
        state = torch.zeros(len(tokens), 6) if cache is None else cache["state"][0]
        for each in self.inside[tokens].unbind(1):
            state = 0.6 * state + each
        return logits, {"state": (state, None)}


def step_logits(model, prompt):
    def logits(prefix):
        with torch.no_grad():
            return model(torch.tensor([[*prompt, *prefix]]))[0, -1].double().tolist()

    return logits


# --- rollouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
def test_answers_come_with_their_probability(cached):
    model, tries = Fading(), 20_000
    asked = model.with_cache if cached else model
    out = rollout(
        asked, torch.tensor([[0, 2]]), tries, max_tokens=2, temperature=1.5, stop=STOP, cached=cached
    )
    seen: dict[tuple, int] = {}
    for tokens, mask in zip(out.tokens[0].tolist(), out.mask[0].tolist(), strict=True):
        answer = tuple(t for t, m in zip(tokens, mask, strict=True) if m)
        seen[answer] = seen.get(answer, 0) + 1
    logits = step_logits(model, [0, 2])
    answers = [(STOP,), *[(a, b) for a in range(3) for b in range(SYMBOLS)]]
    chances = [math.exp(reference.sample_log_probability(logits, list(a), 1.5, STOP)) for a in answers]
    assert sum(chances) == pytest.approx(1.0)
    for answer, chance in zip(answers, chances, strict=True):
        bound = 5 * math.sqrt(chance * (1 - chance) / tries) + 1e-4
        assert abs(seen.pop(answer, 0) / tries - chance) < bound
    assert not seen


def test_cached_and_recomputed_rollouts_agree_and_the_prompt_is_run_once():
    model, prompts = Fading(), torch.randint(3, (5, 4), generator=torch.Generator().manual_seed(1))
    plain = rollout(model, prompts, 3, max_tokens=6, stop=STOP, seed=7, step=2)
    assert model.rows[:2] == [(5, 4), (15, 5)]
    model.rows.clear()
    cached = rollout(model.with_cache, prompts, 3, max_tokens=6, stop=STOP, seed=7, step=2, cached=True)
    assert model.rows[:2] == [(5, 4), (15, 1)]
    assert torch.equal(plain.tokens, cached.tokens)
    assert torch.equal(plain.mask, cached.mask)


def test_answers_end_with_the_stop_token():
    out = rollout(Fading(), torch.tensor([[1], [0]]), 50, max_tokens=5, stop=STOP)
    assert out.tokens.shape == out.mask.shape == (2, 50, 5)
    for tokens, mask in zip(out.tokens.view(-1, 5).tolist(), out.mask.view(-1, 5).tolist(), strict=True):
        length = sum(mask)
        assert mask == [True] * length + [False] * (5 - length)
        assert STOP not in tokens[: length - 1]
        assert tokens[length:] == [0] * (5 - length)
        assert length == 5 or tokens[length - 1] == STOP
    assert bool(rollout(Fading(), torch.tensor([[1]]), 2, max_tokens=5).mask.all())


def test_a_greedy_student_always_answers_alike_and_is_asked_once():
    model = Fading()
    out = rollout(model, torch.tensor([[1, 2], [0, 0]]), 4, max_tokens=3, temperature=0.0)
    assert all(rows[0] == 2 for rows in model.rows)
    assert bool((out.tokens == out.tokens[:, :1]).all())
    prefix: list[int] = []
    for _ in range(3):
        logits = step_logits(model, [1, 2])(prefix)
        prefix.append(max(range(SYMBOLS), key=logits.__getitem__))
    assert out.tokens[0, 0].tolist() == prefix


def test_prompts_of_different_lengths_keep_their_places():
    model = Fading()
    prompts = [torch.tensor([0, 1, 2]), torch.tensor([1]), torch.tensor([2, 1, 0])]
    out = rollout(model, prompts, 2, max_tokens=4, temperature=0.0)
    for row, prompt in zip(out.tokens, prompts, strict=True):
        assert torch.equal(row, rollout(model, [prompt], 2, max_tokens=4, temperature=0.0).tokens[0])
    assert rollout(model, [], 2, max_tokens=4).tokens.shape == (0, 2, 4)


def test_draws_depend_on_seed_and_step_alone():
    def tokens(**how):
        return rollout(Fading(), torch.tensor([[0, 1]] * 4), 8, max_tokens=6, **how).tokens

    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = tokens(seed=1, step=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(tokens(seed=1, step=5), first)
    assert not torch.equal(tokens(seed=2, step=5), first)
    assert not torch.equal(tokens(seed=1, step=6), first)


def test_modes_come_back_also_after_an_error():
    model = Fading(dropout=0.9)
    model.drop.eval()
    plain = rollout(Fading(), torch.tensor([[0, 1]]), 8, max_tokens=6)
    assert torch.equal(rollout(model, torch.tensor([[0, 1]]), 8, max_tokens=6).tokens, plain.tokens)
    assert (model.training, model.drop.training) == (True, False)
    with pytest.raises(IndexError):
        rollout(model, torch.tensor([[99]]), 1, max_tokens=1)
    assert (model.training, model.drop.training) == (True, False)
    assert all(p.grad is None for p in model.parameters())


def test_bad_rollouts_are_refused():
    loose: Any = rollout
    prompts = torch.tensor([[0, 1]])
    for arguments, how, error, message in (
        ((Fading(), prompts, 0), {}, ValueError, "k must be >= 1, got 0"),
        ((Fading(), prompts, 2), {"max_tokens": 0}, ValueError, "max_tokens must be >= 1, got 0"),
        ((Fading(), prompts, 2), {"temperature": -1.0}, ValueError, "temperature must be >= 0, got -1"),
        ((Fading(), prompts.float(), 2), {}, TypeError, "prompts must be rows of integer tokens"),
        ((Fading(), prompts[0], 2), {}, TypeError, "prompts must be rows of integer tokens"),
        ((Fading(), [[0, 1]], 2), {}, TypeError, "prompts must be of type Tensor, got list"),
        ((Fading(), prompts[:, :0], 2), {}, ValueError, "at least one token each, got an empty one"),
        (
            (lambda t: t.float(), prompts, 2),
            {},
            ValueError,
            r"logits of shape \(1, positions, vocabulary\), got \(1, 2\)",
        ),
        ((lambda t: {"logits": t}, prompts, 2), {}, ValueError, "got dict"),
        ((lambda t: torch.full((*t.shape, 3), math.nan), prompts, 2), {}, NonFiniteError, "logits are NaN"),
        (
            (lambda t, c: (torch.zeros(*t.shape, 3), "cache"), prompts, 2),
            {"cached": True},
            TypeError,
            "cache must hold",
        ),
    ):
        with pytest.raises(error, match=message):
            loose(*arguments, **{"max_tokens": 3, **how})


# --- signal to noise -----------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Loss <w, x>, whose gradient is x: the gradients of the examples are what one likes."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.unused = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x):
        return x @ self.weight


def measured(gradients, **how):
    rows = torch.as_tensor(gradients, dtype=torch.float64)
    settings: Any = {"bootstrap": 50, **how}
    return gradient_snr(lambda call, x: call(x), Linear(rows.shape[1]), {"only": rows}, **settings)


@pytest.mark.parametrize("vectorize", [True, False])
def test_ratios_are_the_references(vectorize):
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(12, 5)) + 0.3
    found = measured(gradients, vectorize=vectorize)
    wanted = reference.snr(gradients)
    assert (float(found.snr), float(found.naive)) == pytest.approx(wanted)
    assert float(found.signal / found.noise) == pytest.approx(wanted[0])
    assert found.examples.tolist() == [12]
    assert found.groups == ("only",)


def test_intervals_are_the_references():
    gradients = np.random.default_rng(3).exponential(size=(15, 4))
    found = measured(gradients, bootstrap=40, level=0.8, seed=5)
    counts = numpy_generator("gradient-snr", 5, 0).multinomial(15, [1 / 15] * 15, 40)
    wanted = reference.bootstrap_interval(gradients, counts, 0.8)
    assert (float(found.low), float(found.high)) == pytest.approx(wanted)
    assert float(found.low) < float(found.snr) < float(found.high)


def test_the_estimate_is_unbiased_and_the_naive_one_is_off_by_one_over_n():
    size, n, noise = 200, 4, 1.5
    truth = 0.05 / (size * noise**2)
    drift = math.sqrt(0.05 / size)
    rng = np.random.default_rng(1)
    found = [measured(drift + noise * rng.normal(size=(n, size)), bootstrap=2) for _ in range(300)]
    snr = np.array([float(each.snr) for each in found])
    naive = np.array([float(each.naive) for each in found])
    error = snr.std() / math.sqrt(len(found))
    assert abs(snr.mean() - truth) < 4 * error
    assert abs(naive.mean() - truth - 1 / n) < 4 * error
    assert error < 0.02 / n


def test_bootstrap_bars_cover_the_truth():
    """Nominal 90 %, wider where the signal is weak; a percentile interval would lie too high."""
    size, n, truth = 30, 40, 0.02
    drift = math.sqrt(truth)
    rng = np.random.default_rng(2)
    inside = 0
    for trial in range(200):
        found = measured(drift + rng.normal(size=(n, size)), bootstrap=200, level=0.9, seed=trial)
        inside += float(found.low) <= truth <= float(found.high)
    assert 0.85 <= inside / 200 <= 0.99


def test_groups_of_equal_or_zero_gradients():
    same = measured(np.ones((4, 3)))
    assert float(same.snr) == math.inf
    assert float(same.noise) == 0.0
    assert float(same.signal) == 3.0
    assert math.isnan(float(measured(np.zeros((4, 3))).snr))
    pair = measured(np.array([[1.0, 0.0], [0.0, 1.0]]))
    assert float(pair.snr) == pytest.approx(0.0)
    assert float(pair.noise) == 1.0


def test_batches_may_be_nested_and_parameters_selected():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(9, 3), torch.randn(9, 2)

    def loss(call, batch):
        return (call(batch["x"]) - batch["more"][0]).square().sum()

    groups = {0.25: {"x": x[:4], "more": (y[:4],)}, 0.75: {"x": x[4:], "more": [y[4:]]}}
    everything = gradient_snr(loss, model, groups, bootstrap=20)
    looped = gradient_snr(loss, model, groups, bootstrap=20, vectorize=False)
    for name in ("snr", "low", "high", "noise"):
        torch.testing.assert_close(getattr(everything, name), getattr(looped, name), rtol=1e-4, atol=1e-6)
    assert everything.groups == (0.25, 0.75)
    last = gradient_snr(loss, model, groups, select=lambda name: name.startswith("2."), bootstrap=20)
    model[0].requires_grad_(False)
    frozen = gradient_snr(loss, model, groups, bootstrap=20, chunk=None)
    torch.testing.assert_close(last.snr, frozen.snr, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(last.snr, everything.snr)


def test_distillation_of_a_causal_model_can_be_measured():
    model = Fading(dropout=0.5)
    tokens = torch.randint(SYMBOLS, (6, 5), generator=torch.Generator().manual_seed(0))
    teacher, mask = torch.randn(6, 5, SYMBOLS), tokens > 0

    def loss(call, batch):
        return distillation_loss(call(batch[0]), batch[1], batch[2], reduction="none")

    batch = (tokens, teacher, mask)
    fast, slow = (gradient_snr(loss, model, {"all": batch}, bootstrap=9, vectorize=v) for v in (True, False))
    torch.testing.assert_close(fast.snr, slow.snr, rtol=1e-4, atol=1e-6)


def test_intervals_depend_on_the_seed_alone():
    rows = np.random.default_rng(0).normal(size=(9, 4))
    first = measured(rows, seed=1)
    assert torch.equal(measured(rows, seed=1).low, first.low)
    assert not torch.equal(measured(rows, seed=2).low, first.low)
    assert float(measured(rows, level=0.5).high) < float(measured(rows, level=0.99).high)


def test_bad_measurements_are_refused():
    loose: Any = gradient_snr
    rows, model = torch.randn(4, 3).double(), Linear(3)

    def loss(call, x):
        return call(x)

    for arguments, how, error, message in (
        ((loss, model, {}), {}, ValueError, "groups must hold at least one group, got none"),
        (
            (loss, model, {"a": rows[:1]}),
            {},
            ValueError,
            r"group 'a' must hold at least 2 examples.*got \[1\]",
        ),
        ((loss, model, {"a": (rows, rows[1:])}), {}, ValueError, r"got \[3, 4\]"),
        ((loss, model, {"a": torch.tensor(1.0)}), {}, ValueError, r"got \[0\]"),
        ((loss, model, {"a": "text"}), {}, TypeError, "group 'a' must hold tensors .*got str"),
        ((loss, loss, {"a": rows}), {}, TypeError, "model must be of type Module, got function"),
        (
            (loss, model, {"a": rows}),
            {"select": lambda _: False},
            ValueError,
            "select must leave at least one",
        ),
        ((loss, model, {"a": rows}), {"level": 1.0}, ValueError, r"level must lie in \(0, 1\), got 1"),
        ((loss, model, {"a": rows}), {"bootstrap": 1}, ValueError, "bootstrap must be >= 2, got 1"),
        ((loss, model, {"a": rows * math.nan}), {}, NonFiniteError, "group 'a': a gradient is NaN or Inf"),
    ):
        with pytest.raises(error, match=message):
            loose(*arguments, **how)
