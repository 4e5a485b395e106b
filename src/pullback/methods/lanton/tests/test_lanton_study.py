"""The study trains what it says: pairing, controls, and the peers' optimizers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pullback.methods.lanton import LANTON
from pullback.methods.lanton.study import STUDIES, Reader, hidden_optimizer, run, text, windows


class Kept:
    def __init__(self):
        self.curves, self.arrays = {}, {}

    def value(self, name, value, step):
        self.curves.setdefault(name, []).append((step, value))

    def array(self, name, array):
        self.arrays[name] = array


CFG = replace(STUDIES[0].sizes["smoke"], steps=24, windows=8)


@pytest.fixture(scope="module")
def runs():
    found = {}
    for arm in STUDIES[0].arms.names():
        log = Kept()
        found[arm] = run(CFG, arm, {"lr": 0.05}, 100, log), log
    return found


def test_arms_differ_only_after_alpha_is_fixed(runs):
    first = {arm: log.curves["validation_loss"] for arm, (_, log) in runs.items()}
    for arm in ("lanton", "shuffled", "mean-matched"):
        assert first[arm][:21] == first["muon"][:21]  # 20 measurements: evaluations at steps 0 to 20
        assert first[arm][-1] != first["muon"][-1]
    assert len({curve[-1][1] for curve in first.values()}) == len(first)
    assert len({curve[0][1] for curve in first.values()}) == 1


def test_controls_keep_what_they_control(runs):
    means = {arm: metrics["mean_multiplier"] for arm, (metrics, _) in runs.items()}
    assert means["mean-matched"] == pytest.approx(1.0, abs=1e-6)
    assert means["muon"] == 1.0
    assert means["lanton"] < 0.9
    assert runs["lanton"][1].arrays["noise"].shape[1] == 18


def test_shuffled_multipliers_are_the_same_numbers_elsewhere():
    rates = {}
    for arm in ("lanton", "shuffled"):
        model = Reader(3)
        optimizer = hidden_optimizer(arm, model, 0.0, seed=3)
        assert isinstance(optimizer, LANTON)
        for step in range(22):
            for i, (_, p) in enumerate(model.named_parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)) * (
                    1 + i
                )
            optimizer.step()
        rates[arm] = list(optimizer.layer_rates(relative=True).values())
    assert rates["lanton"] != rates["shuffled"]
    assert sorted(rates["lanton"]) == sorted(rates["shuffled"])


def test_a_run_repeats_bitwise_and_text_is_parted():
    one, other = (run(replace(CFG, steps=4), "lanton", {"lr": 0.05}, 100, Kept()) for _ in range(2))
    assert one == other
    train, validation, test = text()
    assert len(train) > 7 * len(validation) > 5 * len(test) > 500_000
    assert windows(train, torch.tensor([0, 5])).shape == (2, 65)


def test_the_hidden_matrices_are_the_optimizers():
    for arm in STUDIES[0].arms.names():
        params = hidden_optimizer(arm, Reader(0), 0.1, seed=0).param_groups[0]["params"]
        assert sorted({p.shape for p in params}) == [(64, 64), (64, 256), (256, 64)]
        assert len(params) == 18
