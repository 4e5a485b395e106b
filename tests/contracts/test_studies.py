"""Every arm of every room's studies runs in smoke size and returns what the declaration asks for."""

from __future__ import annotations

import math

import pytest
import torch

from pullback.core.facts import rooms
from pullback.lab.engine import StudyRef, studies_of
from pullback.lab.engine.cells import check_trial, metrics_of
from pullback.lab.engine.worker import CellLog
from pullback.lab.extras import lack

ARMS = [
    pytest.param(
        study,
        arm,
        id=f"{study.room}-{study.name}-{arm}",
        marks=pytest.mark.skipif(bool(said := lack(study.extras)), reason=said),
    )
    for room in rooms()
    for study in studies_of(room)
    for arm in study.arms.names()
]


@pytest.mark.parametrize(("study", "arm"), ARMS)
def test_an_arm_returns_every_declared_metric(study, arm):
    check_trial(study, StudyRef.of_study(study))
    torch.manual_seed(0)
    found = study.run(study.sizes["smoke"], arm, study.hyperparameters(arm), study.seeds.tune[0], CellLog())
    wanted = set(metrics_of(study))
    if study.tune is not None and study.tune.size != "full":
        wanted -= {study.tune.select.name} - {study.primary.name}  # that size alone computes it
    assert wanted <= found.keys()
    assert all(math.isfinite(found[name]) for name in wanted)
