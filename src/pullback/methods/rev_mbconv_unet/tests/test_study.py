"""The study's own parts: what fits into a budget, parts of a batch, paired arms, and its pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pullback.core.streams import generator
from pullback.lab.engine.worker import CellLog
from pullback.lab.figures import segmentation
from pullback.lab.result import ArmResult
from pullback.methods.rev_mbconv_unet import peak_bytes, study
from pullback.methods.rev_mbconv_unet.study import STUDIES, Config, begun, grown, largest, mode_of

SMALL = Config(width=4, levels=2, steps=3, side=8)


def test_the_largest_that_fits():
    asked = []
    assert largest(lambda n: asked.append(n) or n <= 1000, 3) == 1000
    assert len(asked) < 25
    assert largest(lambda n: n <= 7, 7) == 7


@pytest.mark.parametrize("arm", STUDIES[2].arms.names())
def test_an_arm_takes_the_widest_network_of_its_budget(arm):
    cfg = Config()
    mine, parts = grown(cfg, arm), study.PARTS.get(arm, 1)

    def peak(width, mode, batch):
        return peak_bytes(study.network(width, cfg.levels, cfg.blocks), (batch, 1, 16, 16, 16), mode)

    budget = peak(cfg.width, "plain", cfg.batch)
    assert peak(mine.width, mode_of(arm), cfg.batch // parts) <= budget
    assert peak(mine.width + 2, mode_of(arm), cfg.batch // parts) > budget
    assert (mine.width > cfg.width) == (arm != "plain")


def test_a_batch_in_parts_is_the_whole_batch():
    whole, parted = begun(SMALL, "plain", 1e-2, 100), begun(SMALL, "plain", 1e-2, 100, parts=2)
    for step in range(3):
        assert whole.step(step) == pytest.approx(parted.step(step), abs=1e-4)


def test_arms_begin_alike_and_stay_together():
    runs = [begun(SMALL, mode, 1e-3, 100) for mode in ("plain", "checkpoint", "reversible")]
    weights = [torch.cat([p.detach().reshape(-1) for p in run.net.parameters()]) for run in runs]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    losses = [[run.step(step) for step in range(3)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0] == pytest.approx(losses[2], abs=1e-4)


def test_other_seeds_are_other_networks_and_settings():
    one, other = (begun(SMALL, "plain", 1e-3, seed) for seed in (100, 101))
    assert not torch.equal(next(one.net.parameters()), next(other.net.parameters()))
    settings = [study.setting(study.Memory(), seed) for seed in study.TEST_SEEDS]
    assert len(set(settings)) > 4


def test_ratios_are_one_for_the_plain_network_and_bytes_are_linear_in_blocks():
    cfg = study.Memory(sides=(32,), counted_side=8)
    found = study.run_memory(cfg, "plain", {}, 100, CellLog())
    assert found == {"volume_ratio": 1.0, "depth_ratio": 1.0, "width_ratio": 1.0, "count_error": 0.0}
    ref = study.setting(cfg, 100)
    for mode in ("plain", "checkpoint", "reversible"):
        one, two, five = (replace(ref, blocks=blocks).bytes(mode) for blocks in (1, 2, 5))
        assert five - one == 4 * (two - one)


def test_pictures():
    run = begun(SMALL, "reversible", 1e-3, 100)
    arrays = run.slices()
    assert {name: (a.shape, a.dtype) for name, a in arrays.items()} == {
        name: ((3, 77, 36), np.dtype("uint8")) for name in ("input", "truth", "predicted")
    }
    assert set(np.unique(arrays["truth"])) == {0, 1, 2}
    figure = segmentation.segmentations(arrays["input"], {"truth": arrays["truth"]})
    assert [ax.get_title(loc="left") for ax in figure.axes[:2]] == ["input", "truth"]
    painted = segmentation.overlay(arrays["input"][0], arrays["truth"][0])
    bare = arrays["truth"][0] == 0
    assert (painted[bare] == arrays["input"][0][bare][:, None]).all()
    assert len(np.unique(painted[~bare] - arrays["input"][0][~bare][:, None], axis=0)) > 2
    with pytest.raises(ValueError, match="labels must be"):
        segmentation.overlay(arrays["input"][0], arrays["truth"][0].T)


class Kept:
    """What a drawing reads of a result."""

    def __init__(self, arms, arrays):
        self.arms, self.arrays = [ArmResult(name, role, {}) for name, role in arms], arrays

    def array(self, arm, name):
        return self.arrays.get((arm, name))


def test_drawings_of_the_page():
    arms: Any = [("plain", "baseline"), ("checkpoint", "rival"), ("reversible", "method")]
    small = study.Setting(side=8, batch=1, width=4, blocks=1, expansion=2, levels=2)
    rows = {
        (arm, "depths"): np.array([(n, *study.kept(replace(small, blocks=n), arm)) for n in (1, 2)], float)
        for arm, _ in arms
    }
    result: Any = Kept(arms, rows)
    (ax,) = segmentation.bytes_by_depth(result).axes
    drawn = np.array([line.get_ydata() for line in ax.lines])  # formula and count of every arm
    np.testing.assert_array_equal(drawn[::2], drawn[1::2])
    assert drawn[4, 0] == drawn[4, 1] < drawn[0, 0] < drawn[0, 1]
    slices = begun(SMALL, "plain", 1e-3, 100).slices()
    pictures: Any = Kept(
        arms, {(arm, name): a for arm in ("plain", "reversible") for name, a in slices.items()}
    )
    figure = segmentation.predictions(pictures, ("plain", "reversible"))
    assert [ax.get_title(loc="left") for ax in figure.axes[:4]] == ["input", "truth", "plain", "reversible"]
    with pytest.raises(LookupError, match="no arm kept"):
        segmentation.predictions(pictures, ("checkpoint",))


def test_both_arms_see_the_same_test_images():
    first, second = (begun(SMALL, mode, 1e-3, 100) for mode in ("plain", "reversible"))
    block = study_block()
    assert torch.equal(first.predict(block)[0], second.predict(block)[0])
    assert not torch.equal(first.predict(block, 0)[0], first.predict(block, 1)[0])


def study_block():
    from pullback.lab.data import brain_tissue

    return brain_tissue().test


def test_cubes_lie_in_the_training_blocks():
    from pullback.lab.data.volumes import cubes

    x, y = cubes(6, 16, 0.3, generator("cubes", 0, 0))
    assert x.shape == (6, 1, 16, 16, 16)
    assert y.shape == (6, 3, 16, 16, 16)
    assert torch.equal(y.sum(1), torch.ones(6, 16, 16, 16).long())
    assert y.flatten(2).any(-1).any(0).all()
    again, _ = cubes(6, 16, 0.3, generator("cubes", 0, 0))
    assert torch.equal(x, again)
