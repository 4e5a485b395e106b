"""Pairs of domains: blending, disjoint parts, unseen photographs, repeatable draws, and the picture's projection."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pullback.lab.data import domains
from pullback.lab.data.photographs import photographs
from pullback.lab.data.projection import principal_plane


def test_a_blend_is_the_difference_of_a_patch_and_the_digit():
    digits = torch.zeros(2, 28, 28, dtype=torch.uint8)
    digits[:, 10:18, 10:18] = 255
    blended = domains.mnist_m(digits, ("coffee",), np.random.default_rng(0))
    undone = blended.clone()
    undone[:, 10:18, 10:18] = 255 - undone[:, 10:18, 10:18]
    windows = np.lib.stride_tricks.sliding_window_view(photographs()["coffee"].numpy(), (28, 28), axis=(0, 1))
    for patch in undone.numpy():
        rows, columns = np.nonzero((windows[..., 0, :4] == patch[0, :4].T).all((-1, -2)))
        assert any(
            (windows[r, c].transpose(1, 2, 0) == patch).all() for r, c in zip(rows, columns, strict=True)
        )


def test_photographs_of_the_test_are_unseen_and_names_are_checked():
    assert not set(domains.SEEN) & set(domains.UNSEEN)
    with pytest.raises(ValueError, match=r"photos must be names among .*, got \['moon'\]"):
        domains.mnist_m(torch.zeros(1, 28, 28, dtype=torch.uint8), ("moon",), np.random.default_rng(0))


def test_digits_on_photographs_repeat_and_differ_by_seed():
    first, again, other = (domains.digits_on_photographs(100, 50, seed) for seed in (0, 0, 1))
    assert torch.equal(first.target.x, again.target.x)
    assert not torch.equal(first.target.x, other.target.x)
    assert torch.equal(first.source.x, other.source.x)
    sizes = [len(p.y) for p in (first.source, first.held, first.target, first.test, *first.others.values())]
    assert sizes == [90, 10, 100, 50, 25]
    assert first.test.x.min() >= -1
    assert first.test.x.max() <= 1
    with pytest.raises(ValueError, match="must fit into 10000 digits, got 5000 and 1"):
        domains.digits_on_photographs(5000, 1, 0)


@pytest.mark.parametrize(
    ("make", "name"), [(domains.small_digits, "digits-mnist"), (domains.reviews, "movie-amazon")]
)
def test_training_and_test_of_the_target_are_disjoint(make, name):
    found = make(name, 300, 200, 0)
    train = {x.numpy().tobytes() for x in found.target.x}
    shared = sum(x.numpy().tobytes() in train for x in found.test.x)
    assert shared <= 3  # equal sentences of one or two known words
    assert len(found.source.y) + len(found.held.y) == 300
    assert found.source.x.dtype == torch.float32


def test_matched_moments():
    rng = np.random.default_rng(0)
    source, target = rng.normal(size=(200, 2)), rng.normal(size=(300, 2)) @ [[2, 1], [0, 1]] + 3
    mapped = domains.with_moments_of(source, target)
    np.testing.assert_allclose(mapped.mean(0), target.mean(0), atol=1e-12)
    np.testing.assert_allclose(np.cov(mapped.T), np.cov(target.T), atol=1e-10)


def test_turned_moons():
    (a, labels), (b, same) = (domains.moons(50, np.random.default_rng(0), turn) for turn in (0.0, 90.0))
    np.testing.assert_array_equal(labels, same)
    np.testing.assert_allclose(b, np.column_stack([-a[:, 1], a[:, 0]]), atol=1e-12)


def test_the_principal_plane_keeps_the_widest_directions_and_a_fixed_sign():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 4)) * [0.1, 5.0, 0.2, 2.0]
    plane = principal_plane(x)
    assert plane.var(0)[0] == pytest.approx(x[:, 1].var(), rel=0.05)
    np.testing.assert_allclose(principal_plane(x + 7), plane, atol=1e-9)
    assert np.corrcoef(plane[:, 0], x[:, 1])[0, 1] > 0.99
    with pytest.raises(ValueError, match="features must be of shape"):
        principal_plane(x[:1])
