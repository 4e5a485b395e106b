"""The study trains what it says: arms, pairing, shared weights, diagnosis, stiffness."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pullback.core.streams import generator
from pullback.lab.models.pde import Helmholtz
from pullback.methods.pinn_annealing import ModifiedMLP, study
from pullback.methods.pinn_annealing.study import (
    STUDIES,
    Config,
    at,
    balance_of,
    problem_of,
    run,
    stiffness,
)
from pullback.methods.pinn_annealing.tests import reference

network: Any = study.network
HP = {"lr": 1e-3, "weight": 30.0}
SMALL = Config("helmholtz", steps=12, width=8, depth=2, batch=8)


class Kept:
    def __init__(self):
        self.curves, self.arrays = {}, {}

    def value(self, name, value, step):
        self.curves.setdefault(name, []).append((step, value))

    def array(self, name, array):
        self.arrays[name] = array


@pytest.mark.parametrize("declared", STUDIES, ids=lambda each: each.name)
def test_every_arm_runs_and_repeats_bitwise(declared):
    cfg = replace(declared.sizes["smoke"], steps=12)
    for arm in declared.arms.names():
        logs = Kept(), Kept()
        first, second = (run(cfg, arm, declared.hyperparameters(arm), 100, log) for log in logs)
        assert first == second
        assert logs[0].curves == logs[1].curves
        assert {
            declared.primary.name,
            declared.tune.select.name,
            "imbalance",
            "log_stiffness",
        } <= first.keys()
        assert all(math.isfinite(value) for value in first.values())
        assert logs[0].curves["log_error"][-1] == (12, first["log_error"])
        assert sum(array.nbytes for array in logs[0].arrays.values()) < 100_000


@pytest.mark.parametrize("problem", ["helmholtz", "klein-gordon"])
def test_arms_differ_in_their_weights_alone(problem):
    cfg = replace(SMALL, problem=problem)
    logs = {arm: Kept() for arm in STUDIES[0].arms.names()}
    found = {arm: run(cfg, arm, {**HP, "weight": 1.0}, 100, log) for arm, log in logs.items()}
    assert logs["constant"].curves == logs["plain"].curves  # a weight of 1 is no weight
    starts = {arm: log.curves["log_error"][0] for arm, log in logs.items()}
    assert starts["plain"] == starts["annealing"] == starts["arxiv-v1"]
    assert starts["architecture"] == starts["both"] != starts["plain"]
    assert found["annealing"]["log_lam"] > 0 == found["plain"]["log_lam"]
    assert found["arxiv-v1"]["log_lam"] > found["annealing"]["log_lam"]


def test_tuned_weight_is_used_for_every_term():
    cfg = replace(SMALL, problem="klein-gordon")
    problem = problem_of(cfg)
    balance = balance_of("constant", HP, problem, network(cfg, "constant", 2, 0))
    assert balance.lam.tolist() == [1.0, 30.0, 30.0]
    assert balance.alpha == 0.0


def test_both_architectures_share_hidden_and_output_weights():
    plain, gated = network(SMALL, "plain", 2, 7), network(SMALL, "both", 2, 7)
    assert isinstance(gated, ModifiedMLP)
    assert torch.equal(plain[0].weight, gated.hidden[0].weight)
    assert torch.equal(plain[-1].weight, gated.output.weight)
    assert not torch.equal(plain[0].weight, network(SMALL, "plain", 2, 8)[0].weight)
    assert network(replace(SMALL, dtype="float64"), "plain", 2, 7)[0].weight.dtype == torch.float64


def test_precisions_share_start_and_points():
    logs = {dtype: Kept() for dtype in ("float32", "float64")}
    for dtype, log in logs.items():
        run(replace(SMALL, dtype=dtype), "plain", HP, 100, log)
    (_, one), (_, other) = (log.curves["log_error"][0] for log in logs.values())
    assert one == pytest.approx(other, abs=1e-5)
    assert one != other


def test_training_lowers_the_error_of_the_smallest_problem():
    log = Kept()
    reached = run(replace(STUDIES[0].sizes["smoke"], steps=200), "both", {"lr": 1e-2}, 100, log)
    assert reached["log_error"] < log.curves["log_error"][0][1] - 0.5


def test_stiffness_is_the_largest_eigenvalue_of_the_hessian():
    problem, model = Helmholtz(), network(SMALL, "plain", 2, 3).double()
    drawn = problem.draw(8, 1, generator("test", 0), torch.float64)
    points = at(problem.standardised(drawn), 0)
    params, rates = list(model.parameters()), 1 / problem.moments(torch.float64)[1]

    def evaluate(x, order):
        u, first, second = reference.nested_derivatives(model, x)
        scaled = first * rates[:, None, None], second * rates[:, None, None] ** 2
        return type("Found", (), {"value": u, "first": scaled[0], "second": scaled[1]})()

    total = torch.stack(list(problem.losses(points, evaluate).values())).sum()
    slopes = torch.cat([g.flatten() for g in torch.autograd.grad(total, params, create_graph=True)])
    rows = [torch.autograd.grad(s, params, retain_graph=True, materialize_grads=True) for s in slopes]
    hessian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    wanted = torch.linalg.eigvalsh(hessian)[-1].item()
    before = [p.detach().clone() for p in params]
    assert stiffness(model, problem, points, 1) == pytest.approx(wanted, rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


def test_figure_draws_from_what_is_kept():
    logs = {arm: Kept() for arm in ("plain", "annealing")}
    for arm, log in logs.items():
        run(SMALL, arm, HP, 100, log)
    result: Any = type("Result", (), {"array": lambda self, arm, name: logs[arm].arrays.get(name)})()
    figure = study.draw_gradients(result)
    assert len(figure.axes) == 2 * 3  # arms times weight matrices
    empty: Any = type("Result", (), {"array": lambda self, arm, name: None})()
    assert study.draw_gradients(empty) is not None


def test_factors_are_ratios_of_paired_errors():
    scores = {"plain": {1: -1.0, 2: 0.0}, "both": {1: -3.0, 2: -1.0}}
    arms = [SimpleNamespace(name="plain", role="baseline"), SimpleNamespace(name="both", role="other")]
    result: Any = SimpleNamespace(name="helmholtz", arms=arms, scores=lambda arm, metric: scores[arm])
    (ax,) = study.draw_factors(result).axes
    drawn = [np.asarray(each.get_offsets())[:, 0].tolist() for each in ax.collections]
    assert drawn[0] == pytest.approx([1.0, 1.0])
    assert drawn[1] == pytest.approx([100.0, 10.0])
    assert drawn[2] == pytest.approx([0.194 / 0.0033])  # the paper's
    assert [text.get_text() for text in ax.texts] == ["1", "31.6"]
