"""PSNR, SSIM and assignment against closed forms and the field's own implementations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from pullback.core.image_quality import assignment, match, psnr, ssim


def images(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_psnr_is_that_of_skimage():
    a, b = images(0, 3, 2, 8, 8), images(1, 3, 2, 8, 8)
    for data_range in (1.0, 255.0):
        expected = [
            peak_signal_noise_ratio(y.numpy(), x.numpy(), data_range=data_range)
            for x, y in zip(a, b, strict=True)
        ]
        assert psnr(a, b, data_range=data_range).tolist() == pytest.approx(expected, abs=1e-10)
    assert psnr(a, a).tolist() == [math.inf] * 3


@pytest.mark.parametrize(
    ("shape", "sigma"), [((2, 1, 11, 11), 1.5), ((2, 3, 17, 23), 1.5)], ids=["one-window", "colour"]
)
def test_ssim_is_that_of_skimage(shape, sigma):
    a, b = images(0, *shape), images(1, *shape)
    b = (0.7 * a + 0.3 * b).clamp(0, 1)
    expected = [
        structural_similarity(
            x.numpy(), y.numpy(), channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=sigma,
            use_sample_covariance=False,
        )
        for x, y in zip(a, b, strict=True)
    ]  # fmt: skip
    assert ssim(a, b, sigma=sigma).tolist() == pytest.approx(expected, abs=1e-12)


def test_ssim_of_small_images_and_of_equal_ones():
    a = images(0, 1, 1, 8, 8)
    assert ssim(a, a).item() == pytest.approx(1.0, abs=1e-14)
    assert -1 <= ssim(a, 1 - a).item() < 0.5


def test_ssim_of_constant_images_has_a_closed_form():
    a, b = torch.full((1, 1, 12, 12), 0.2), torch.full((1, 1, 12, 12), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert ssim(a, b).item() == pytest.approx(expected, rel=1e-5)


@given(st.integers(1, 8), st.integers(0, 10_000), st.booleans())
def test_assignment_is_optimal(n, seed, ties):
    rng = np.random.default_rng(seed)
    costs = rng.integers(0, 4, (n, n)).astype(float) if ties else rng.normal(size=(n, n))
    found = assignment(costs.tolist())
    assert sorted(found) == list(range(n))
    rows, columns = linear_sum_assignment(costs)
    assert costs[range(n), found].sum() == pytest.approx(costs[rows, columns].sum(), abs=1e-12)


def test_match_finds_the_order_of_a_batch():
    truth = images(0, 6, 1, 4, 4)
    shuffled = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    found = truth[shuffled] + 0.01 * images(1, 6, 1, 4, 4)
    order = match(found, truth)
    assert (found[order] - truth).abs().max() <= 0.01
    assert shuffled[order].tolist() == list(range(6))


def test_match_survives_images_that_are_not_finite():
    truth = images(0, 3, 4)
    found = truth.flip(0).clone()
    found[2] = math.nan
    assert match(found, truth).tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: psnr(images(0, 2, 3), images(0, 2, 4)), "one shape"),
        (lambda: psnr(images(0, 3), images(0, 3)), "batch of 1"),
        (lambda: psnr(images(0, 2, 3), images(0, 2, 3), data_range=0.0), "data_range must be > 0, got 0"),
        (lambda: ssim(images(0, 2, 3), images(0, 2, 3)), "images must be a tensor with 4 dimensions"),
        (lambda: ssim(images(0, 1, 1, 9, 9), images(0, 1, 1, 9, 9), window=4), "window must be odd, got 4"),
        (
            lambda: psnr(torch.ones(2, 2, dtype=torch.long), torch.ones(2, 2)),
            "images must be a floating tensor",
        ),
        (lambda: assignment([[1.0, 2.0]]), "costs must be square"),
        (lambda: assignment([[math.nan]]), "costs must be square and finite"),
    ],
    ids=["shapes", "batch", "range", "no-image", "even", "integers", "oblong", "nan"],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
