"""The study trains what it says: gradients, starts, matched variances and pairing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from pullback.core.kinds import StepBatch
from pullback.methods.gradient_noise import GradientNoise
from pullback.methods.gradient_noise.study import STUDIES, Config, Perceptron, run, start_std, transforms
from pullback.methods.gradient_noise.tests import reference

HP = {"lr": 0.1, "eta": 0.04}


class Kept:
    def __init__(self):
        self.curves = {}

    def value(self, name, value, step):
        self.curves.setdefault(name, []).append((step, value))

    def array(self, name, array):
        raise AssertionError("the study logs no arrays")


def test_written_out_gradient_is_autograds():
    torch.manual_seed(0)
    network = Perceptron([12, 7, 7, 7, 10])
    network.flat.data.normal_(std=0.4)
    x, y = torch.rand(9, 12), torch.randint(10, (9,))
    network.backward(x, y)
    weights = [w.clone().requires_grad_() for w in network.weights]
    biases = [b.clone().requires_grad_() for b in network.biases]
    h = x
    for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
        h = h @ w + b
        h = torch.relu(h) if layer < 3 else h
    torch.nn.functional.cross_entropy(h, y).backward()
    pairs = zip(weights + biases, network.weight_grads + network.bias_grads, strict=True)
    assert all(a.grad is not None and torch.allclose(a.grad, g, atol=1e-6) for a, g in pairs)


def test_wider_start_and_constant_noise_have_the_total_variance_of_the_noise():
    cfg = Config("simple", steps=50)
    total = reference.walk_variance(0.1, 0.04, 0.55, 50)
    assert start_std(cfg, "wider", HP, 50) == pytest.approx(math.sqrt(0.01 + total))
    assert start_std(cfg, "noise", HP, 50) == pytest.approx(0.1)
    (constant,) = transforms(cfg, "constant", HP, 0)
    assert isinstance(constant, GradientNoise)
    assert sum((0.1 * constant.std(t)) ** 2 for t in range(50)) == pytest.approx(total)


def test_clipping_stands_before_the_noise():
    p = torch.nn.Parameter(torch.zeros(10_000))
    p.grad = torch.full_like(p, 1e3)
    batch = StepBatch([p], [p.grad], ["p"], [0], [{}], 0)
    for transform in transforms(Config("he", clip=10.0), "noise", {"lr": 0.1, "eta": 1.0}, 0):
        transform.pre_step_(batch)
    assert p.grad.norm().item() == pytest.approx(math.hypot(10, 100), rel=0.05)


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_every_arm_runs_in_smoke_size_and_repeats_bitwise(study):
    cfg = replace(study.sizes["smoke"], steps=6)
    for arm in study.arms.names():
        logs = Kept(), Kept()
        first, second = (run(cfg, arm, study.hyperparameters(arm), 0, log) for log in logs)
        assert first == second
        assert logs[0].curves == logs[1].curves
        assert {study.primary.name, study.tune.select.name, "above_half"} <= first.keys()
        assert logs[0].curves["weight_std"][-1][0] == 6


def test_arms_share_everything_but_the_noise():
    cfg = Config("simple", steps=5, depth=3)
    logs = {arm: Kept() for arm in ("none", "noise")}
    for arm, log in logs.items():
        run(cfg, arm, {"lr": 0.1, "eta": 0.0}, 3, log)
    assert logs["none"].curves == logs["noise"].curves


def test_zero_start_without_noise_stays_at_one_answer():
    log = Kept()
    reached = run(Config("zero", steps=60, clip=10.0), "none", HP, 0, log)
    assert 0.05 < reached["test_accuracy"] < 0.15
    assert {value for _, value in log.curves["weight_std"]} == {0.0}
    assert run(Config("zero", steps=2, clip=10.0), "noise", HP, 0, Kept())["weight_std"] > 0
