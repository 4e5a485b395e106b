"""Spirals, the plain training of classifiers, and the figure of paired losses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pullback.core.streams import generator
from pullback.lab.data.spirals import spirals
from pullback.lab.figures.pairs import paired_losses
from pullback.lab.models.fitting import Part, fit, score


def test_spirals_lie_on_their_curves_and_classes_are_half_a_turn_apart():
    x, y = spirals(4000, generator("test", 0), turns=2.0, noise=0.0)
    radius = x.norm(dim=1)
    assert float(radius.min()) >= 0.2 - 1e-5
    assert float(radius.max()) <= 2.0 + 1e-5
    angle = 4 * torch.pi * (radius - 0.2) / 1.8 + torch.pi * y
    torch.testing.assert_close(
        x, torch.stack([radius * angle.cos(), radius * angle.sin()], 1), rtol=0, atol=1e-4
    )
    assert float(y.double().mean()) == pytest.approx(0.5, abs=0.03)
    linear = torch.linalg.lstsq(torch.cat([x, torch.ones(4000, 1)], 1), 2.0 * y[:, None] - 1).solution
    guess = torch.cat([x, torch.ones(4000, 1)], 1) @ linear
    assert float(((guess[:, 0] > 0) == (y == 1)).double().mean()) < 0.65


def trained(seed):
    x = torch.randn(300, 4, generator=generator("test", 1))
    part = Part(x, (x[:, 0] > 0).long())
    torch.manual_seed(0)
    net, seen = nn.Linear(4, 2), []
    fit(net, part, 0.3, 8, seed, seen.append)
    return net, part, seen


def test_training_reaches_a_plateau_is_seeded_and_is_watched():
    net, part, seen = trained(3)
    loss, accuracy = score(net, part)
    assert accuracy > 0.95
    assert loss < 0.3
    assert seen == [2, 4, 6, 8]
    assert torch.equal(net.weight, trained(3)[0].weight)
    assert not torch.equal(net.weight, trained(4)[0].weight)


def test_pairs_join_the_shapes_of_equal_seeds():
    draw = np.random.default_rng(0)
    cells = [
        SimpleNamespace(arm=arm, seed=seed, arrays={"shapes": draw.uniform(0.1, 2.0, (3, 3))})
        for arm, seed in (("a", 1), ("a", 2), ("b", 2), ("b", 3))
    ]
    result: Any = SimpleNamespace(cells=cells)
    left, right, *_ = paired_losses(result, ("a", "b"), ("q", "loss", "gap")).axes
    points = left.collections[-1].get_offsets()
    np.testing.assert_allclose(points[:, 0], np.exp(cells[1].arrays["shapes"][:, 1]))
    np.testing.assert_allclose(points[:, 1], np.exp(cells[2].arrays["shapes"][:, 1]))
    assert "rank correlation" in right.get_title(loc="center") + right.get_title(loc="left")
    empty: Any = SimpleNamespace(cells=[])
    assert paired_losses(empty, ("a", "b"), ("q", "loss", "gap")).axes
