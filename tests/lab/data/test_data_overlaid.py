"""Overlaid digits: where the two images lie, which digits a part may show, and what a guess is worth."""

from __future__ import annotations

import pytest
import torch

from pullback.lab.data import mnist
from pullback.lab.data.overlaid import overlaid_pairs


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def small(rows):
    images = mnist().images[rows].float() / 255
    return images.reshape(-1, 14, 2, 14, 2).mean((2, 4))


def test_a_canvas_is_the_maximum_of_two_shifted_digits():
    n = 20
    pairs = overlaid_pairs("test", n, stream())
    one, other = torch.randint(8000, 10000, (2, n), generator=stream())
    wanted = torch.zeros(2, n, 18, 18)
    wanted[0, :, :14, :14], wanted[1, :, 4:, 4:] = small(one), small(other)
    torch.testing.assert_close(pairs.x, wanted.amax(0).reshape(n, 324))
    torch.testing.assert_close(pairs.image, small(one).reshape(n, 196))
    assert torch.equal(pairs.first, mnist().labels[one])
    assert torch.equal(pairs.second, mnist().labels[other])
    assert torch.equal(overlaid_pairs("test", n, stream()).x, pairs.x)
    assert not torch.equal(overlaid_pairs("test", n, stream(1)).x, pairs.x)


def test_parts_share_no_digit():
    shown = [
        {bytes(row.numpy()) for row in overlaid_pairs(part, 3000, stream()).image}
        for part in ("train", "validation", "test")
    ]
    twins = [shown[i] & shown[j] for i, j in ((0, 1), (0, 2), (1, 2))]
    assert all(len(each) <= 2 for each in twins)  # equal images of different writers, if any


def test_one_digit_does_not_tell_the_other_and_a_constant_guess_scores_chance():
    pairs = overlaid_pairs("test", 20_000, stream())
    for labels in (pairs.first, pairs.second):
        assert float(torch.bincount(labels).max()) / 20_000 < 0.125
    table = (
        torch.zeros(10, 10).index_put_((pairs.first, pairs.second), torch.ones(()), accumulate=True) / 20_000
    )
    apart = (table - table.sum(1, keepdim=True) * table.sum(0)).abs().max()
    assert float(apart) < 0.003


def test_unknown_parts_are_refused():
    with pytest.raises(
        ValueError, match="part must be one of train, validation, test and n >= 0, got 'all' and 3"
    ):
        overlaid_pairs("all", 3, stream())
    assert overlaid_pairs("train", 0, stream()).x.shape == (0, 324)
