"""The study trains what it says: cutting batches changes nothing, arms share what they must, every arm runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pullback.lab.engine.cells import check_trial
from pullback.lab.engine.reference import StudyRef
from pullback.lab.engine.worker import CellLog
from pullback.lab.models.masked import Batch, autoencoder, digit_parts, masks
from pullback.lab.result import ArmResult, CellResult, TrialResult, Verdict
from pullback.lab.tuning import domains_of
from pullback.methods.gcond import GradientConductor
from pullback.methods.gcond.study import STUDIES, WEIGHTS, Config, _draw, plan, run, way_of

HP = {"lr": 2e-3, "c": 0.4, "weight_lr": 1e-2}
SMALL = Config(updates=6, micro_batches=2, points=2)


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_the_declaration_is_complete(study):
    check_trial(study, StudyRef("gcond", None, study.name))
    for arm in study.arms.names():
        wanted = {"cagrad": {"lr", "c"}, "gradnorm": {"lr", "weight_lr"}}.get(arm, {"lr"})
        assert set(study.hyperparameters(arm)) == wanted
        assert study.tune is None or set(domains_of(study.tune, arm)) == wanted


def one_batch(k):
    train, _, _ = digit_parts()
    return Batch(train.take(slice(0, 64 * k)), masks(64 * k, torch.Generator().manual_seed(0)))


def network():
    torch.manual_seed(0)
    return autoencoder()


def gradient(net):
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


@pytest.mark.parametrize(("arm", "mode"), [("gcond", "sequential"), ("stochastic", "stochastic")])
def test_one_large_batch_gives_the_gradient_of_eight_micro_batches(arm, mode):
    batch, together, apart = one_batch(8), network(), network()
    way, _ = way_of(arm, together, HP)
    cosine = way(batch)
    conductor = GradientConductor(apart, WEIGHTS, accumulate=8, mode=mode)
    cuts = [Batch(batch.images.take(slice(i, i + 64)), batch.mask[i : i + 64]) for i in range(0, 512, 64)]
    for task, cut in conductor.schedule(cuts):
        with conductor.accumulate(task):
            cut.losses(apart)[task].backward()
    assert cosine == pytest.approx(conductor.step().min_cosine, abs=1e-4)
    torch.testing.assert_close(gradient(together), gradient(apart), rtol=1e-3, atol=2e-6)


def test_sum_and_control_write_the_same_first_gradient_and_gradnorm_begins_as_the_sum():
    batch, found = one_batch(2), {}
    for arm in ("sum", "control", "gradnorm"):
        net = network()
        way_of(arm, net, {**HP, "weight_lr": 1e-12})[0](batch)
        found[arm] = gradient(net)
    net = network()
    losses = batch.losses(net)
    (0.85 * losses["l1"] + 0.15 * losses["ssim"]).backward()
    for each in found.values():
        torch.testing.assert_close(each, gradient(net), rtol=1e-4, atol=1e-7)


def test_plans_of_updates():
    cfg = Config(updates=100)
    assert plan(cfg, "gcond") == plan(cfg, "gcond-eval") == plan(cfg, "gcond-8") == (100, 512)
    assert plan(cfg, "gcond-1") == (800, 64)
    assert plan(cfg, "control-16") == (50, 1024)
    assert plan(cfg, "longer") == (166, 512)


def test_without_projections_gcond_is_the_control(monkeypatch):
    control = run(SMALL, "control", HP, 100, CellLog())
    original = GradientConductor.__init__

    def off(self, *args, **kwargs):
        original(self, *args, **kwargs, thresholds=(-1.0, -1.0, -1.0))

    monkeypatch.setattr(GradientConductor, "__init__", off)
    same = run(SMALL, "gcond", HP, 100, CellLog())
    assert {name: same[name] for name in control} == pytest.approx(control, abs=1e-4)


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_every_arm_runs_and_repeats_bitwise(study):
    cfg = replace(study.sizes["smoke"], updates=2)
    for arm in study.arms.names():
        logs = CellLog(), CellLog()
        first = run(cfg, arm, {**HP, "lr": 1e-3}, 100, logs[0])
        if arm in {study.arms.method, "pcgrad", "stochastic"}:
            assert run(cfg, arm, {**HP, "lr": 1e-3}, 100, logs[1]) == first
            assert logs[0].curves == logs[1].curves
        claimed = {(claim.metric or study.primary).name for claim in (study.main_claim(), *study.also)}
        assert {*claimed, "validation_objective"} <= first.keys()
        assert {"test_l1", "test_ssim"} <= logs[0].curves.keys()


def test_the_drawing_takes_every_arm_of_its_study():
    study = next(each for each in STUDIES if each.name == "accumulation")
    names = study.arms.names()
    metrics = {name: {"name": name, "worst": 2.0} for name in ("test_l1", "test_ssim", "cosine_error")}
    cells = [
        CellResult(arm, seed, {}, "done", dict.fromkeys(metrics, 0.1 * seed), 1.0, f"{arm}{seed}")
        for arm in names
        for seed in (1, 2)
    ]
    declaration = {"primary": metrics["test_l1"], "metrics": metrics}
    arms = [ArmResult(arm, "other", {}) for arm in names]
    result = TrialResult(
        "gcond", study.name, "", "full", "", "", declaration, arms, cells, [], Verdict("refuted", ""), {}
    )
    figure = _draw(result)
    assert [len(ax.collections) for ax in figure.axes] == [10, 10, 10]
    assert np.asarray(figure.axes[0].lines[0].get_ydata()) == pytest.approx(np.full(5, 0.15))
