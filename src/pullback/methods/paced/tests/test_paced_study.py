"""The study trains what it says: arms, pairing, accounting, both divergences, the bell."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pullback.lab.models.arithmetic import schooled
from pullback.methods.paced import study
from pullback.methods.paced.study import STUDIES, losses, pacing, pass_rates, rollout_steps, run, run_bell

HP = {"lr": 1e-3}


class Kept:
    def __init__(self):
        self.curves: dict[str, list] = {}
        self.arrays: dict[str, np.ndarray] = {}

    def value(self, name, value, step):
        self.curves.setdefault(name, []).append((step, value))

    def array(self, name, array):
        self.arrays[name] = array


def small(name="half"):
    (found,) = (each for each in STUDIES if each.name == name)
    return found.sizes["smoke"]


@pytest.mark.parametrize("each", STUDIES, ids=lambda each: each.name)
def test_every_arm_runs_in_smoke_size_and_repeats_bitwise(each):
    cfg: Any = each.sizes["smoke"]
    for arm in each.arms.names():
        logs = Kept(), Kept()
        first, second = (each.run(cfg, arm, HP, 100, log) for log in logs)
        assert first == second
        assert logs[0].curves == logs[1].curves
        wanted = {each.primary.name, *(claim.metric.name for claim in each.also if claim.metric)}
        assert wanted | ({each.tune.select.name} if each.tune else set()) <= first.keys()


def test_arms_share_start_and_batches_and_differ_in_weights():
    logs = {arm: Kept() for arm in ("uniform", "hard filter", "shuffled", "unsolved", "paced")}
    ends = {arm: run(small(), arm, HP, 100, log)["accuracy"] for arm, log in logs.items()}
    assert len({log.curves["accuracy"][0] for log in logs.values()}) == 1
    assert len(set(ends.values())) == 5


def test_weights_of_the_arms():
    rate = torch.tensor([0.0, 0.25, 0.5, 1.0])

    def weights(arm):
        kernel, shown = pacing(arm, rate, 100)
        return kernel(shown)

    assert weights("uniform").tolist() == weights("uniform, more steps").tolist() == [1.0] * 4
    assert weights("hard filter").tolist() == [0.0, 2.0, 2.0, 0.0]
    torch.testing.assert_close(weights("unsolved"), (1 - rate) / (1 - rate).mean())
    paced = weights("paced")
    torch.testing.assert_close(paced, rate * (1 - rate) / (rate * (1 - rate)).mean())
    assert sorted(weights("shuffled").tolist()) == sorted(paced.tolist())
    assert weights("forward only").tolist() == weights("two-stage").tolist() == paced.tolist()


def test_rollouts_are_charged():
    cfg = STUDIES[0].sizes["full"]
    assert rollout_steps(cfg) == round(2 * 2000 * 8 / 3 / 64) == 167
    short, log, plain = replace(small(), steps=4), Kept(), Kept()
    run(short, "uniform, more steps", HP, 100, log)
    run(short, "uniform", HP, 100, plain)
    assert (len(plain.curves["accuracy"]), len(log.curves["accuracy"])) == (4, 4 + rollout_steps(short))


def test_pass_rates_estimate_the_chance_of_a_right_answer():
    problems, student = schooled(small("none").school, 100)
    rate = pass_rates(replace(small("none"), k=64), student, problems.pool, 100, 0)
    logs = problems.pool.logits(student, slice(None), problems.pool.answers).log_softmax(-1)
    chosen = logs.gather(2, problems.pool.answers[..., None])[..., 0]
    chance = torch.where(problems.pool.chains.mask, chosen, 0).sum(1).exp().detach()
    spread = (chance * (1 - chance) / 64).sqrt()
    assert bool(((rate - chance).abs() <= 5 * spread + 0.02).all())


def test_forward_losses_are_on_the_teachers_answers_and_reverse_ones_on_the_students(monkeypatch):
    problems, student = schooled(small().school, 100)
    part, rows, seen = problems.pool, torch.arange(20), []

    def watch(logits, teacher, mask, **how):
        seen.append((teacher.exp(), mask, how["divergence"]))
        return original(logits, teacher, mask, **how)

    original = study.distillation_loss
    monkeypatch.setattr(study, "distillation_loss", watch)
    for kind in ("forward_kl", "reverse_kl"):
        assert losses(part, student, rows, kind, 100, 3).shape == (20,)
    (forward, mask, _), (reverse, own, kind) = seen
    right = forward.gather(2, part.answers[rows][..., None])[..., 0]
    assert bool((right[mask] > 0.997).all())
    assert torch.equal(mask, part.chains.mask[rows])
    assert kind == "reverse_kl"
    assert bool((own.sum(1) >= 1).all())
    assert not torch.allclose(reverse, forward)  # another answer was read


def test_two_stages_differ_from_both_of_their_parts():
    arms = ("forward only", "reverse only", "two-stage")
    ends = [run(small("two-stage"), arm, {"lr": 3e-3}, 100, Kept())["accuracy"] for arm in arms]
    assert len(set(ends)) == 3


def test_the_bell_is_kept_for_its_figure(monkeypatch):
    monkeypatch.setattr(study, "TEST_SEEDS", (100,))
    log = Kept()
    found = run_bell(small("bell-none"), "frontier", {}, 100, log)
    assert np.isfinite(found["snr"])
    bell = log.arrays["bell"]
    assert bell.shape[1] == 5
    assert len(bell) >= 3
    assert bool((np.diff(bell[:, 0]) > 0).all())
    assert bool(((bell[:, 2] <= bell[:, 1]) & (bell[:, 1] <= bell[:, 3])).all())
    quiet = Kept()
    run_bell(small("bell-none"), "solved", {}, 100, quiet)
    assert not quiet.arrays


def test_the_figure_draws_what_the_store_holds():
    bell = np.array([[0.1, 0.2, 0.1, 0.3, 9], [0.5, 0.3, 0.2, 0.4, 9], [0.9, 0.1, 0.0, 0.2, 9]])

    class Result:
        def array(self, arm, name):
            return bell if (arm, name) == ("frontier", "bell") else None

    result: Any = Result()
    (axes,) = study.draw_bell(result).axes
    assert axes.get_xlabel() == "pass rate of the student"
    assert len(axes.containers) == 1
