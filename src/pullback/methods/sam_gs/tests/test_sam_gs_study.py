"""The studies compare what they say: batched rules are the real ones, arms share all but one thing."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torchjd.aggregation import PCGrad

from pullback.lab.models import landscapes
from pullback.lab.models.digit_pairs import compared, delta_m
from pullback.methods import sam_gs
from pullback.methods.sam_gs import study
from pullback.methods.sam_gs.tests import reference

SAMGS: Any = sam_gs.SAMGS
OVERLAID = [each for each in study.STUDIES if each.run is study.run_overlaid]
TOYS = [each for each in study.STUDIES if each.run is study.run_landscape]


class Kept:
    def __init__(self):
        self.curves, self.arrays = {}, {}

    def value(self, name, value, step):
        self.curves.setdefault(name, []).append((step, value))

    def array(self, name, array):
        self.arrays[name] = array


# --- landscapes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", [1, 2])
def test_landscapes_are_the_papers(toy):
    points = np.random.default_rng(1).uniform(-10, 10, (2, 200))
    wanted = np.array([reference.toy_losses(a, b, toy) for a, b in points.T]).T
    np.testing.assert_allclose(landscapes.evaluate(points, toy).losses, wanted, rtol=1e-12, atol=1e-12)


def gradients(points=6, steps=40):
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(size=(steps, 2, 1, points)))
    return rng.normal(size=(steps, 2, 2, points)) * sizes


@pytest.mark.parametrize(
    ("arm", "settings"),
    [
        ("sam-gs", {"gamma": 0.1}),
        ("equalise", {"gamma": 2.0}),
        ("momentum", {"gamma": 0.0}),
        ("sam-gs-paper", {"gamma": 0.1, "variant": "paper"}),
    ],
)
def test_surgery_of_many_points_is_the_aggregator_at_each(arm, settings):
    rows = gradients()
    rule = study.rule_of(arm, 0.95)
    rule_gamma = getattr(rule, "gamma", None)
    got = np.stack([rule(each) for each in rows])
    for point in range(rows.shape[-1]):
        aggregator = SAMGS(beta2=0.95, **settings)
        wanted = [aggregator(torch.from_numpy(each[:, :, point].copy())).numpy() for each in rows]
        np.testing.assert_allclose(got[:, :, point], wanted, rtol=1e-9, atol=1e-12)
    assert rule_gamma == settings["gamma"]


def test_both_branches_of_many_points_are_the_aggregators():
    rule = study.Surgery(0.6, 0.95)
    rows = gradients()
    got = np.stack([rule(each) for each in rows])
    branches = set()
    for point in range(rows.shape[-1]):
        aggregator = SAMGS(gamma=0.6, beta2=0.95)
        for step, each in enumerate(rows):
            wanted = aggregator(torch.from_numpy(each[:, :, point].copy())).numpy()
            np.testing.assert_allclose(got[step, :, point], wanted, rtol=1e-9, atol=1e-12)
            branches.add(aggregator.report.branch)
    assert branches == {"equalise", "momentum"}


def test_projection_of_many_points_is_torchjds():
    rows, peer = gradients(steps=20), PCGrad()
    conflicts = 0
    for each in rows:
        got = study.projected(each)
        for point in range(each.shape[-1]):
            matrix = torch.from_numpy(each[:, :, point].copy())
            conflicts += bool(matrix[0] @ matrix[1] < 0)
            np.testing.assert_allclose(got[:, point], peer(matrix).numpy(), rtol=1e-9, atol=1e-12)
    assert 20 < conflicts < 100


@pytest.mark.parametrize("arm", ["sum", "clipped-sum"])
def test_a_path_is_that_of_torchs_adam(monkeypatch, arm):
    monkeypatch.setattr(study, "TEST_SEEDS", (100,))
    log = Kept()
    cfg = study.Landscape(1, solved=-1e9, beta2=0.99, steps=200, jitter=0.0, rates=(0.01,))
    study.run_landscape(cfg, arm, {"lr": 0.1}, 100, log)
    starts = torch.tensor(landscapes.STARTS[1], dtype=torch.float64).T.clone()
    points = torch.nn.Parameter(starts)
    optimizer = torch.optim.Adam([points], lr=0.01)
    for step in range(200):
        np.testing.assert_allclose(log.arrays["path"][step], points.detach().numpy(), rtol=1e-5)
        total = torch.from_numpy(landscapes.evaluate(points.detach().numpy(), 1).gradients.sum(0))
        limits = (1.0 / (total.norm(dim=0) + 1e-6)).clamp(max=1.0)
        points.grad = total * limits if arm == "clipped-sum" else total
        optimizer.step()


def test_solved_starts_are_counted():
    cfg = study.Landscape(1, -30.0, 0.99, steps=1000, rates=(0.001, 0.01))
    reached = np.array([[10, 1000, 1000], [10, 30, 1000], [0, 4, 9]])
    found = study.solved_metrics(cfg, reached)
    assert found["steps_0.001"] == 1000
    assert found["steps_0.01"] == 30
    assert found["solved_0.001"] == pytest.approx(1 / 3)
    assert found["steps"] == pytest.approx((1000 * 30) ** 0.5)
    assert found["own_steps"] == 4
    assert found["own_solved"] == 1
    assert found["effort"] == pytest.approx((1 * 4 * 9) ** (1 / 3))


def test_official_surgery_solves_what_the_sum_does_not():
    cfg = study.Landscape(1, -30.0, 0.99, steps=2000, jitter=0.0, rates=())
    shares = {
        arm: study.run_landscape(cfg, arm, {"lr": 0.01}, 100, Kept())["own_solved"]
        for arm in ("sum", "sam-gs")
    }
    assert shares["sam-gs"] == 1.0
    assert shares["sum"] < 1.0


@pytest.mark.parametrize("declared", TOYS, ids=lambda each: each.name)
def test_every_arm_of_a_landscape_runs_and_repeats(declared):
    cfg = replace(declared.sizes["smoke"], steps=60)
    for arm in declared.arms.names():
        first, second = (study.run_landscape(cfg, arm, {"lr": 0.05}, 100, Kept()) for _ in range(2))
        assert first == second
        needed = {
            declared.primary.name,
            declared.tune.select.name,
            *(c.metric.name for c in declared.also if c.metric),
        }
        assert needed <= first.keys()
    tuning = study.run_landscape(replace(declared.sizes["tuning"], steps=30), "sum", {"lr": 1.0}, 100, Kept())
    assert declared.tune.select.name in tuning


# --- overlaid digits ------------------------------------------------------------------------------------------------


def test_delta_m():
    every, named = delta_m((0.9, 0.6, 0.03), (0.9, 0.8, 0.02))
    assert named == pytest.approx(100 * 0.25 / 2)
    assert every == pytest.approx(100 * (0 + 0.25 + 0.5) / 3)
    assert delta_m((0.5, 0.5, 0.1), (0.5, 0.5, 0.1)) == (0.0, 0.0)


def test_references_learn_one_task_each_from_the_same_start():
    cfg = study.Overlaid((1.0, 1.0, 1.0), steps=3, batch=16, held=50)
    nets = study.train_apart(cfg, 100, 1e-3)
    start = study.network(100)
    for k, net in enumerate(nets):
        moved = [
            not torch.equal(a, b)
            for (name, a), b in zip(net.heads.named_parameters(), start.heads.parameters(), strict=True)
            if name.endswith("weight")
        ]
        assert moved == [j == k for j in range(3)]
    pairs = study.overlaid_pairs("test", 50, torch.Generator().manual_seed(0))
    found = compared(start, nets, pairs)
    assert found["second_accuracy_alone"] == nets[1].scores(pairs)[1]
    assert found["drawing_error_alone"] == nets[2].scores(pairs)[2]
    assert compared(nets[2], [nets[2]] * 3, pairs)["delta_m"] == 0.0


@pytest.mark.parametrize("declared", OVERLAID, ids=lambda each: each.name)
def test_every_arm_of_the_network_runs_and_repeats(declared):
    cfg = replace(declared.sizes["smoke"], steps=4, batch=8, held=40)
    alone = set()
    for arm in declared.arms.names():
        logs = Kept(), Kept()
        first, second = (study.run_overlaid(cfg, arm, {"lr": 0.01, "gamma": 0.5}, 100, log) for log in logs)
        assert first == second
        assert logs[0].curves == logs[1].curves
        assert {declared.primary.name, declared.tune.select.name, "delta_m_accuracy"} <= first.keys()
        alone.add(tuple(first[name] for name in sorted(first) if name.endswith("_alone")))
    assert len(alone) == 1


def test_equalise_is_surgery_with_a_threshold_out_of_reach():
    cfg = study.Overlaid((1.0, 0.03, 30.0), steps=5, batch=16, held=40)
    always = study.run_overlaid(cfg, "equalise", {"lr": 0.01}, 100, Kept())
    assert study.run_overlaid(cfg, "sam-gs", {"lr": 0.01, "gamma": 2.0}, 100, Kept()) == always
    assert always["equalised"] == 1.0
    assert study.run_overlaid(cfg, "sam-gs", {"lr": 0.01, "gamma": 0.0}, 100, Kept())["equalised"] == 0.0


@pytest.mark.parametrize("declared", TOYS, ids=lambda each: each.name)
def test_paths_are_drawn_from_what_a_run_keeps(monkeypatch, declared):
    monkeypatch.setattr(study, "TEST_SEEDS", (100,))
    log = Kept()
    study.run_landscape(replace(declared.sizes["smoke"], steps=50), "sam-gs", {"lr": 0.05}, 100, log)
    arms = [SimpleNamespace(name=name, role=declared.arms.role(name)) for name in declared.arms.names()]
    result = SimpleNamespace(arms=arms, array=lambda arm, name: log.arrays[name] if arm == "sam-gs" else None)
    figure = declared.figures[0].draw(result)
    above, below = figure.axes[3], figure.axes[7]
    starts = len(landscapes.STARTS[declared.sizes["full"].toy])
    assert above.get_title(loc="left") == "sam-gs"
    assert len(above.lines) == 3 * starts
    assert len(below.lines) == 2 * starts
    np.testing.assert_allclose(above.lines[0].get_xdata(), log.arrays["path"][:, 0, 0])
    assert not figure.axes[0].lines  # an arm that kept nothing
    assert figure.axes[4].get_xlim() == below.get_xlim()
