"""The study: fair to its arms, and drawn from what the store holds."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pullback.lab.engine.worker import CellLog
from pullback.lab.figures.fidelity import fidelity
from pullback.lab.result import CellResult
from pullback.methods.eqprop.study import BATCH, STUDIES, Trainer, run_training

STUDY = {study.name: study for study in STUDIES}
TRAINED = ("training", "clipped", "deep")


@pytest.mark.parametrize("name", TRAINED)
def test_arms_of_a_seed_share_digits_and_first_weights(name):
    study = STUDY[name]
    cfg = study.sizes["smoke"]
    runs = [Trainer(cfg, arm, {"lr": 0.1}, 100) for arm in study.arms.names()]
    for run in runs[1:]:
        for part in ("train", "valid", "test"):
            assert torch.equal(getattr(run, part)[0], getattr(runs[0], part)[0])
        for p, q in zip(run.net.parameters(), runs[0].net.parameters(), strict=True):
            assert torch.equal(p, q)
    first, other = runs[0], Trainer(cfg, study.arms.names()[0], {"lr": 0.1}, 101)
    assert not torch.equal(first.train[0], other.train[0])
    rows = [set(map(tuple, part[0].tolist())) for part in (first.train, first.valid, first.test)]
    assert not rows[0] & rows[1] | rows[0] & rows[2] | rows[1] & rows[2]


@pytest.mark.parametrize("name", TRAINED)
def test_only_what_the_arm_says_is_trained(name):
    cfg = STUDY[name].sizes["smoke"]
    for arm in ("readout", "centered"):
        state = Trainer(cfg, arm, {"lr": 0.05}, 100)
        before = [layer.weight.clone() for layer in state.net.connections]
        state.update(*(each[:BATCH] for each in state.train))
        moved = [
            not torch.equal(layer.weight, old)
            for layer, old in zip(state.net.connections, before, strict=True)
        ]
        assert moved[-1]
        assert all(moved) == (arm == "centered")
        assert arm == "centered" or not any(moved[:-1])


def test_the_allowance_is_one_point_of_the_exact_arm():
    cfg = replace(STUDY["training"].sizes["smoke"], train=100, test=100)
    exact, more = (run_training(cfg, arm, {"lr": 0.2}, 100, CellLog()) for arm in ("exact", "exact+1"))
    assert more == pytest.approx({name: value + 0.01 for name, value in exact.items()})


def test_tuning_sees_no_test_digit_and_no_test_seed():
    for study in STUDIES:
        assert study.tune is not None
        assert study.tune.select.name in {"validation_error", "log_error"}
        assert not set(study.seeds.test) & set(study.seeds.tune)
        assert len(study.seeds.test) == 8


def test_the_figure_draws_what_the_cells_hold():
    log, study = CellLog(), STUDY["fidelity"]
    study.run(study.sizes["smoke"], "centered", {"beta": 0.01}, 100, log)
    cell = CellResult("centered", 200, {}, "done", {}, 1.0, "k", arrays=log.arrays)
    arms = [
        SimpleNamespace(name="positive", role="baseline"),
        SimpleNamespace(name="centered", role="method"),
    ]
    result: Any = SimpleNamespace(arms=arms, cells=[cell])
    figure: Any = fidelity(result, slopes=(1, 2))
    assert len(figure.axes) == 3
    assert [line.get_linestyle() for line in figure.axes[0].lines].count(":") == 2
    for ax, name in zip(figure.axes, ("double", "single"), strict=False):
        np.testing.assert_allclose(ax.lines[0].get_xydata(), log.arrays[name])
    np.testing.assert_allclose(figure.axes[2].lines[0].get_xydata(), log.arrays["bytes"].T)
