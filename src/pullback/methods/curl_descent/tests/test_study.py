"""The studies train what they say: written-out updates, resets, simulations, arms, pairing and figures."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pullback import attach
from pullback.core.frobenius import FrobeniusProjector
from pullback.lab.models import flipped_students as trials
from pullback.lab.models import student_teacher as students
from pullback.lab.models.student_teacher import Learner, Rule, Shape, Weights
from pullback.methods.curl_descent import RuleFlip
from pullback.methods.curl_descent import study as studies
from pullback.methods.curl_descent.tests import reference as ref


class Kept:
    def __init__(self):
        self.curves, self.arrays = {}, {}

    def value(self, name, value, step):
        self.curves.setdefault(name, ([], []))
        self.curves[name][0].append(step)
        self.curves[name][1].append(value)

    def array(self, name, array):
        self.arrays[name] = array


def stack(shape, seed=0, count=3):
    teacher = students.draw_weights(shape, count, "teacher", seed)
    weights = students.draw_weights(shape, count, "student", seed, shape.spread)
    points = students.draw_points(shape, teacher, 12, "train", seed)
    return weights, points, teacher


# --- updates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tanh", [False, True])
def test_official_update_is_the_papers_field(tanh):
    weights, points, _ = stack(Shape(5, 4, tanh))
    learner = Learner(Shape(5, 4, tanh), weights, Rule(0.1))
    g1, g2 = learner.gradients(points.x, points.y)
    ones = [1.0] * 5, [1.0] * 4
    for s in range(3):
        w1, w2, x, y = (
            each[s].double().numpy() for each in (weights.hidden, weights.readout, points.x, points.y)
        )
        if tanh:  # the output's nonlinearity acts, its derivative is left out
            targets = np.array(
                [
                    w2 @ np.tanh(w1 @ a) - (np.tanh(w2 @ np.tanh(w1 @ a)) - b)
                    for a, b in zip(x, y, strict=True)
                ]
            )
            u1, u2 = ref.field(w1, w2, x, targets, *ones)
        else:
            u1, u2 = ref.field(w1, w2, x, y, *ones, lambda a: a, np.ones_like)
        np.testing.assert_allclose(g1[s], u1, atol=1e-6)
        np.testing.assert_allclose(g2[s], u2, atol=1e-6)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_stacked_students_are_modules_with_the_products_own_rule(reset, momentum):
    shape = Shape(5, 4, tanh=True, spread=2.0)
    weights, points, _ = stack(shape)
    models = []
    for s in range(3):
        model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 1, bias=False), nn.Tanh())
        vector_to_parameters(
            torch.cat([weights.hidden[s].flatten(), weights.readout[s].flatten()]), model.parameters()
        )
        models.append(model)
    rule = Rule(0.5, factor_readout=trials.signs(4, 2), exact=True, reset=reset, momentum=momentum)
    learner = Learner(shape, weights, rule)
    for _ in range(4):
        learner.step(points.x, points.y, share=0.5)
    for s, model in enumerate(models):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=momentum)
        parts = [RuleFlip(model[2], fraction=0.5), *([FrobeniusProjector(model)] if reset else [])]
        attach(optimizer, *parts)
        for _ in range(4):
            optimizer.zero_grad()
            (0.5 * (model(points.x[s]) - points.y[s]).square()).mean().backward()
            optimizer.step()
        trained = parameters_to_vector(model.parameters()).detach()
        torch.testing.assert_close(learner.weights.flat()[s], trained, rtol=1e-4, atol=1e-6)


def test_draws_have_the_official_distributions():
    shape = Shape(100, 25, tanh=True, spread=2.0)
    weights, points, teacher = stack(shape, count=40)
    for w, bound in (
        (teacher.hidden, 0.1),
        (teacher.readout, 0.2),
        (weights.hidden, 0.2),
        (weights.readout, 0.4),
    ):
        assert w.abs().max() < bound
        assert float(w.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert float(points.x.std()) == pytest.approx(0.5**0.5, rel=0.01)
    assert students.error(shape, teacher, points).abs().max() < 1e-12


def test_epochs_count_from_the_first_that_meets_the_goal_and_are_censored():
    shape = Shape(6, 3)
    weights, points, teacher = stack(shape)
    weights.hidden[0], weights.readout[0] = teacher.hidden[0], teacher.readout[0]  # there already
    weights.hidden[1].fill_(torch.nan)
    learner = Learner(shape, weights, Rule(1e-4, reset=False))
    first, best = students.epochs_to(learner, points, (points,), batch=5, epochs=4, goal=1e-6, seed=0)
    assert first.tolist() == [[1.0, 4.0, 4.0]]
    assert best[0, 1] == torch.inf
    assert best[0, 0] < 1e-6 < best[0, 2]


# --- beside a solution -------------------------------------------------------------------------------------


def literal_departure(w1, w2, d1, d2, reset, eta, steps, noise):
    """The same simulation of one student, step by step in NumPy."""
    target = w2 @ w1
    one, two = w1 + noise, w2.copy()
    norms, start = (np.linalg.norm(one), np.linalg.norm(two)), np.linalg.norm(two @ one - target)
    for _ in range(steps):
        u1, u2 = ref.linear_field(one, two, target, 0.5 * np.eye(w1.shape[1]), d1, d2)
        one, two = one - eta * u1, two - eta * u2
        if reset:
            one, two = one * norms[0] / np.linalg.norm(one), two * norms[1] / np.linalg.norm(two)
        if np.linalg.norm(two @ one - target) > 30 * start:
            return True
    return False


def test_simulation_of_departures_is_the_literal_one():
    from pullback.core.streams import generator

    cfg = trials.Boundary(ratios=(0.5,), shares=(0.1, 0.3, 1.0), units=18, steps=400)
    seen = trials.beside_solution(cfg, 0.5, 100)
    w1, w2 = seen.teacher.hidden[0].double().numpy(), seen.teacher.readout[0].double().numpy()
    stream = generator("beside the solution", 100)
    noise = torch.randn(w1.shape, generator=stream, dtype=torch.float64).numpy() * 1e-4 / w1.shape[1] ** 0.5
    d1, d2 = seen.signs_in.numpy(), seen.signs_hidden.numpy()
    for reset in (0, 1):
        wanted = [literal_departure(w1, w2, d1[b], d2[b], reset, 0.3, 400, noise) for b in range(6)]
        assert seen.left[reset].flatten().tolist() == wanted
        assert 0 < sum(wanted) < 6
    assert seen.share.tolist() == [pytest.approx([1 / 6, 2 / 6, 1.0]), pytest.approx([1 / 12, 4 / 12, 1.0])]


def test_norm_reset_is_part_of_the_simulation():
    shape = Shape(3, 4)
    teacher = students.draw_weights(shape, 1, "teacher", 100)
    flips = trials.signs(3, 3).expand(2, 1, 3), trials.signs(4, 4).expand(2, 1, 4)
    seen = students.leaves_solution(
        teacher, flips, torch.tensor([0.0, 1.0]).view(2, 1, 1), eta=0.3, steps=400, seed=0
    )
    assert seen.tolist() == [True, True]  # ascent leaves, with and without


def test_predictions_of_every_arm():
    cfg = trials.Boundary(ratios=(0.2, 2.0), shares=(0.25, 0.5), units=24, steps=200)
    seen = studies.diagram(cfg, 100)
    hp = {"hidden": 0.3, "readout": 0.05}
    assert studies.predicted("any-flip", hp, seen).all()
    fraction = studies.predicted("fraction", hp, seen)
    assert fraction[0].tolist() == [[False, True], [True, True]]
    large = studies.predicted("large-net", hp, seen)
    assert large[0].tolist() == [[False, False], [True, True]]
    assert torch.equal(studies.predicted("lambda-min", hp, seen), seen.lowest < 0)
    assert bool(
        (seen.lowest <= seen.diagonal + 1e-9).all()
    )  # an eigenvalue is no larger than any diagonal entry


# --- arms and pairing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("study", studies.STUDIES, ids=lambda study: study.name)
def test_every_arm_runs_in_smoke_size_and_repeats_bitwise(study):
    cfg = study.sizes["smoke"]
    wanted = {study.primary.name, study.tune.select.name} | {c.metric.name for c in study.also if c.metric}
    for arm in study.arms.names():
        logs = Kept(), Kept()
        first, second = (study.run(cfg, arm, study.hyperparameters(arm), 100, log) for log in logs)
        assert first == second
        assert wanted <= first.keys()
        assert logs[0].curves == logs[1].curves


def test_arms_of_the_race_differ_in_their_rule_alone():
    cfg = trials.Speed(True)
    hp = {"eta": 1.0}
    rules = {arm: trials.speed_rule(cfg, arm, hp, 10) for arm in studies.STUDIES[0].arms.names()}
    assert rules["gd"] == Rule(1.0)
    assert rules["no-reset"] == Rule(1.0, reset=False)
    assert rules["exact"] == Rule(1.0, exact=True)
    assert rules["momentum"] == Rule(1.0, momentum=0.9)
    for arm, value, count in (("k1", -1, 1), ("k3", -1, 3), ("k5", -1, 5), ("frozen", 0, 1)):
        factor = rules[arm].factor_readout
        assert factor is not None
        assert factor.flatten().tolist() == [value] * count + [1] * (10 - count)
    assert not trials.speed_rule(trials.Speed(False), "gd", hp, 10).reset


def test_arms_of_the_layers_flip_what_they_say():
    cfg, shape, hp = trials.Layers(True), Shape(60, 40), {"eta": 1.0}
    rules = {
        arm: trials.layer_rule(cfg, arm, hp, shape, 0)
        for arm in ("gd", "hidden", "readout", "frozen", "scattered")
    }
    assert rules["gd"] == Rule(1.0)
    counts = {}
    for arm, rule in rules.items():
        factors = [rule.factor_hidden, rule.factor_readout]
        counts[arm] = [0 if f is None else int((f <= 0).sum()) for f in factors]
    assert counts == {
        "gd": [0, 0],
        "hidden": [18, 0],
        "readout": [0, 12],
        "frozen": [0, 12],
        "scattered": [12, 0],
    }
    assert rules["frozen"].factor_readout is not None
    assert rules["frozen"].factor_readout.min() == 0


def test_frozen_unit_does_not_move():
    shape = Shape(5, 4, tanh=True)
    weights, points, _ = stack(shape)
    before = weights.readout.clone()
    learner = Learner(
        shape, Weights(weights.hidden, weights.readout), Rule(0.5, None, trials.signs(4, 1, 0.0), reset=False)
    )
    learner.step(points.x, points.y)
    assert torch.equal(learner.weights.readout[..., 0], before[..., 0])
    assert not torch.equal(learner.weights.readout[..., 1], before[..., 1])


# --- figures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("study", studies.STUDIES[::2], ids=lambda study: study.name)
def test_figures_draw_what_smoke_runs_keep(study):
    cells, arms = [], []
    for arm in study.arms.names():
        arms.append(SimpleNamespace(name=arm, role=study.arms.role(arm)))
        log = Kept()
        study.run(study.sizes["smoke"], arm, study.hyperparameters(arm), 100, log)
        cells.append(SimpleNamespace(arm=arm, seed=100, arrays=log.arrays, curves=log.curves))
    if study.name == "speed":
        for cell in cells[:4]:
            cell.arrays["epochs"] = np.array([2.0, -1.0, 40.0])
    curve = lambda arm, name: {c.seed: c.curves[name] for c in cells if c.arm == arm and name in c.curves}  # noqa: E731
    result = SimpleNamespace(cells=cells, arms=arms, curve=curve)
    for figure in study.figures:
        if hasattr(figure, "draw"):
            drawn = figure.draw(result)
            assert drawn.axes
            assert all(ax.has_data() for ax in drawn.axes)
