"""Users' own loops: replicas, compilation, accumulation, schedules, and what the study trains."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional

from pullback.core.attachment import attach
from pullback.methods.nap import Project, insert_norms
from pullback.methods.nap.study import NORMED, RATES, STUDIES, Config, Run, cosine, run
from pullback.testing import run_ranks

STEPS = 6


def network():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))
    return insert_norms(plain).double()


def data():
    g = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, 8, 5, generator=g).double(), torch.randint(3, (STEPS, 8), generator=g)


def train(model, inner, part, compiled=False, make=torch.optim.Adam):
    x, y = data()
    optimizer = make(inner.parameters(), lr=0.05)
    nap = Project(inner)
    attach(optimizer, nap)
    step_ = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    for step in range(STEPS):
        optimizer.zero_grad()
        functional.cross_entropy(model(x[step, part]), y[step, part]).backward()
        step_()
    for growth in nap.growth().values():
        assert abs(growth.item() - 1) < 1e-12
    return torch.cat([p.detach().reshape(-1) for p in inner.parameters()])


def trained_on(rank):
    inner = network()
    return train(nn.parallel.DistributedDataParallel(inner), inner, slice(rank, None, 2))


@pytest.mark.timeout(240)
def test_two_ranks_equal_one_process():
    first, second = run_ranks(trained_on)
    assert torch.equal(first, second)
    alone = network()
    torch.testing.assert_close(first, train(alone, alone, slice(None)), rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the compiler's own
def test_compiled_model_and_step_are_the_eager_ones():
    eager, compiled, sgd = network(), network(), torch.optim.SGD  # Adam counts steps in float32 when compiled
    wanted = train(eager, eager, slice(None), make=sgd)
    found = train(torch.compile(compiled, backend="eager"), compiled, slice(None), compiled=True, make=sgd)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_a_project_made_from_a_wrapped_model_and_a_copy_go_on():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attachment = attach(optimizer, Project(net))
    x, y = data()
    twin, twin_optimizer, twin_attachment = copy.deepcopy((net, optimizer, attachment))
    for model, each in ((net, optimizer), (twin, twin_optimizer)):
        functional.cross_entropy(model(x[0]), y[0]).backward()
        each.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    (nap,) = twin_attachment.transforms
    assert isinstance(nap, Project)
    assert nap.model is twin
    assert max(nap.check_invariance(x[1], lambda model, b: model(b).square().mean()).values()) < 1e-3


# --- the study --------------------------------------------------------------------------------------------


class Kept:
    def __init__(self):
        self.curves, self.arrays = {}, {}

    def value(self, name, value, step):
        self.curves.setdefault(name, []).append(value)

    def array(self, name, array):
        self.arrays[name] = array


HP = {"lr": 0.3, "decay": 3e-3}
SMALL = Config("sgd", tasks=2, steps=12, images=100, width=16)


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_every_arm_repeats_bitwise_and_one_rate_scores_as_in_the_stack(study):
    small = replace(study.sizes["smoke"], tasks=2, steps=8, images=100, width=16)
    for arm in study.arms.names():
        hp, logs = study.hyperparameters(arm), (Kept(), Kept())
        first, second = (run(small, arm, hp, 0, log) for log in logs)
        assert first == second
        assert logs[0].curves == logs[1].curves
        alone = run(replace(small, all_rates=False), arm, hp, 0, Kept())
        assert alone == pytest.approx(first, rel=0.02, abs=0.02)
        assert logs[0].arrays["late_by_rate"].shape == (2, len(RATES[study.name]))
        assert {"late_accuracy", "retention", "norm_growth"} <= first.keys()


def test_projected_arms_keep_their_norm_and_others_do_not():
    for arm in STUDIES[0].arms.names():
        growth = run(SMALL, arm, HP, 0, Kept())["norm_growth"]
        assert (abs(growth - 1) < 1e-5) is (arm in {"nap", "projection", "nap-cosine"})
    assert (
        run(SMALL, "decay", HP, 0, Kept())["norm_growth"] < run(SMALL, "norm", HP, 0, Kept())["norm_growth"]
    )


def test_the_rate_arm_is_the_projected_one_in_other_clothes():
    log, other = Kept(), Kept()
    run(SMALL, "rate", HP, 0, log)
    run(SMALL, "nap", HP, 0, other)
    assert log.curves["accuracy"] == pytest.approx(other.curves["accuracy"], abs=0.011)  # one image may flip
    assert log.curves["growth"][-1] > 1.02


def test_arms_share_first_weights_labels_and_batches():
    runs = {arm: Run(SMALL, arm, HP, 3) for arm in ("norm", "nap", "plain")}
    firsts = [r.net.weights[0].detach().clone() for r in runs.values()]
    assert torch.equal(firsts[0], firsts[1])
    assert torch.equal(firsts[0], firsts[2])
    assert all(torch.equal(firsts[0][0], each) for each in firsts[0])
    first_task = {arm: r.task(0) for arm, r in runs.items()}
    assert not torch.equal(first_task["norm"], first_task["nap"])
    assert (runs["plain"].net.norm == "none") is ("plain" not in NORMED)


def test_the_schedule_rises_and_falls_within_a_task():
    found = [cosine(step, 100) for step in range(100)]
    assert found[0] == 0.1
    assert max(found) == found[10] == 1.0
    assert found[99] == pytest.approx(0.01, abs=1e-3)
    assert all(a > b for a, b in pairwise(found[10:]))
    assert cosine(0, 1) == 1.0
