"""The study trains what it says: equal starts, scores of diverged runs, scale invariance, the figure."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from pullback.methods.peri_ln import study

TINY = study.Config(
    rates=(1e-3, 1e-2), steps=2, depth=2, width=16, heads=2, batch=2, context=16, held_out=200
)


class Log:
    def __init__(self):
        self.values, self.arrays = [], {}

    def value(self, name, value, step):
        self.values.append((name, value, step))

    def array(self, name, array):
        self.arrays[name] = array


def test_arms_of_a_seed_start_equal_but_for_their_norms():
    models = [study.build(TINY, arm, 3) for arm in study.PLACEMENT]
    first = [p for p in models[0].parameters() if p.dim() == 2]
    for model in models[1:]:
        matrices = [p for p in model.parameters() if p.dim() == 2]
        assert all(torch.equal(a, b) for a, b in zip(first, matrices, strict=True))
    other = next(iter(study.build(TINY, "pre", 4).parameters()))
    assert not torch.equal(first[0], other)
    norms = {
        arm: sum(p.dim() == 1 for p in model.parameters())
        for arm, model in zip(study.PLACEMENT, models, strict=True)
    }
    assert norms == {"pre": 5, "peri": 10, "post": 4, "output": 6, "pre_embedded": 6}


def test_one_run_holds_every_rate():
    log = Log()
    found = study.run(TINY, "peri", {}, 200, log)
    losses = [found["loss_at_0.001"], found["loss_at_0.01"]]
    assert found["test_loss"] in losses
    assert found["spread"] == pytest.approx(max(losses) - found["test_loss"])
    assert all(math.isfinite(value) for value in found.values())
    assert found["start_linearity"] > 0.9
    assert [step for name, _, step in log.values if name == "variance_end"] == [0, 1, 2]
    assert log.arrays["scale_losses"].shape == (5,)
    tuned = study.run(replace(TINY, rates=()), "peri", {"lr": 0.01}, 200, Log())
    assert tuned["test_loss"] == pytest.approx(found["loss_at_0.01"])
    assert tuned["spread"] == 0


def test_a_run_that_diverges_scores_as_guessing(monkeypatch):
    monkeypatch.setattr(study, "train", lambda *_: None)
    found = study.run(TINY, "pre", {}, 1, Log())
    assert found["test_loss"] == found["loss_at_0.01"] == study.GUESS
    assert found["top_log_variance"] == study.WIDEST
    assert found["spikes"] == 2 * TINY.steps


def test_only_an_output_norm_makes_the_loss_blind_to_scale():
    for arm, blind in (("peri", True), ("output", True), ("pre", False)):
        model = study.build(TINY, arm, 0)
        with torch.no_grad():
            for p in model.blocks.parameters():
                p.mul_(10.0 if p.dim() == 2 else 1.0)  # far above the norms' eps, as trained weights are
        before = [p.clone() for p in model.parameters()]
        losses = study.scale_losses(TINY, model)
        assert (max(losses) - min(losses) < 1e-3) == blind, (arm, losses)
        for p, kept in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(p, kept)


def test_spikes_are_counted_against_the_running_median(monkeypatch):
    norms = iter([torch.tensor(x) for x in [1.0] * 25 + [6.0, 1.0, 4.0, 1.0]])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: next(norms))
    assert study.train(replace(TINY, steps=29), study.build(TINY, "pre", 0), 1e-3, 0) == 1
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    assert study.train(TINY, study.build(TINY, "pre", 0), 1e-3, 0) is None


def test_linearity_is_the_r_squared_of_a_line():
    assert study.linearity([1.0, 3.0, 5.0, 7.0]) == pytest.approx(1.0)
    assert study.linearity([2.0, 2.0, 2.0]) == 0.0
    assert study.linearity([1.0, 10.0, 100.0, 1000.0]) < 0.8
