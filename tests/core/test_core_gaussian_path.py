"""Gaussian paths: coefficients, derivatives, inverses, grids, times of training, refusals."""

import copy
import math
import pickle
from itertools import pairwise

import pytest
import torch

from pullback.core.gaussian_path import GaussianPath

PATHS = {
    "cosine": GaussianPath.cosine(),
    "linear": GaussianPath.linear(),
    "vp": GaussianPath.vp(),
    "ve": GaussianPath.ve(),
    "own": GaussianPath(lambda t: 1 - t**2, lambda t: t.sin()),
}


def times(path, count=9):
    return torch.linspace(path.first, path.last, count, dtype=torch.float64)


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_are_those_of_the_coefficients(name):
    path = PATHS[name]
    t = times(path, 11)[1:-1]
    step = 1e-6 * path.end
    for value, slope in (("alpha", "dalpha"), ("sigma", "dsigma")):
        ends = [getattr(path(t + sign * step), value) for sign in (1, -1)]
        torch.testing.assert_close(
            getattr(path(t), slope), (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize("name", PATHS)
def test_drift_and_diffusion_are_their_definitions(name):
    """f = alpha' / alpha and g^2 = 2 sigma sigma' - 2 f sigma^2 = -2 sigma^2 d log_snr / dt."""
    path = PATHS[name]
    t = times(path)[1:-1]
    at = path(t)
    torch.testing.assert_close(at.drift, at.dalpha / at.alpha)
    torch.testing.assert_close(at.diffusion, 2 * at.sigma * at.dsigma - 2 * at.drift * at.sigma**2)
    step = 1e-6 * path.end
    fall = (path.log_snr(t + step) - path.log_snr(t - step)) / (2 * step)
    torch.testing.assert_close(at.diffusion, -2 * at.sigma**2 * fall, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", PATHS)
def test_numbers_and_tensors_agree_and_levels_invert(name):
    path = PATHS[name]
    t = times(path)
    at = path(t)
    for i, time in enumerate(t.tolist()):
        one = path(time)
        for key in ("alpha", "sigma", "dalpha", "dsigma", "log_snr", "determinant"):
            assert getattr(one, key) == pytest.approx(float(getattr(at, key)[i]), rel=1e-12, abs=1e-14)
        assert path.time_of(one.log_snr) == pytest.approx(time, rel=1e-9)
    torch.testing.assert_close(path.time_of(at.log_snr), t, rtol=1e-9, atol=0)
    assert bool((at.determinant > 0).all())


def test_single_precision_keeps_small_noise_levels():
    """sqrt(1 - alpha^2) would lose half of the digits near data."""
    path = PATHS["vp"]
    t = torch.tensor([1e-5, 1e-4, 1e-3])
    torch.testing.assert_close(path(t).sigma.double(), path(t.double()).sigma, rtol=1e-6, atol=0)
    assert path(torch.tensor([0.5], dtype=torch.bfloat16)).alpha.dtype == torch.float32


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", ["logsnr", "uniform", "karras"])
def test_grids_fall_from_start_to_stop_in_equal_steps_of_their_kind(name, kind):
    path = PATHS[name]
    start, stop = 0.9 * path.last, 0.1 * path.last
    grid = path.grid(8, kind, start=start, stop=stop)
    assert (grid[0], grid[-1], len(grid)) == (start, stop, 9)
    assert all(t < s for s, t in pairwise(grid))
    scale = {
        "logsnr": path.log_snr,
        "uniform": lambda t: t,
        "karras": lambda t: math.exp(-path.log_snr(t) / 7),
    }[kind]
    marks = torch.tensor([scale(t) for t in grid], dtype=torch.float64)
    torch.testing.assert_close(marks.diff(), marks.diff().mean().expand(8), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["logsnr", "uniform", "karras"])
def test_a_grid_to_zero_has_the_steps_that_were_asked_for(kind):
    path = PATHS["cosine"]
    for steps in (1, 2, 7):
        grid = path.grid(steps, kind)
        assert len(grid) == steps + 1
        assert (grid[0], grid[-1]) == (path.last, 0.0)
        if kind != "uniform" and steps > 1:
            assert grid[-2] == path.first


def test_training_times_follow_their_laws():
    path, count = PATHS["cosine"].within(0.02, 0.98), 20_000

    def draw(**how):
        return path.sample_t(count, generator=torch.Generator().manual_seed(0), **how)

    for how in ("uniform", "logit_normal", "edm"):
        t = draw(how=how)
        assert bool(((t >= 0.02) & (t <= 0.98)).all())
    assert float(draw().mean()) == pytest.approx(0.5, abs=5 * 0.28 / count**0.5)
    middle = draw(how="logit_normal", mean=0.4, std=0.7)
    assert float(middle.logit().mean()) == pytest.approx(0.4, abs=5 * 0.7 / count**0.5)
    level = -path.log_snr(draw(how="edm", std=0.3))
    assert float(level.mean()) == pytest.approx(-1.2, abs=5 * 0.3 / count**0.5)
    assert float(level.std()) == pytest.approx(0.3, rel=0.03)
    assert torch.equal(draw(), draw())


def test_corruption_is_row_by_row_for_any_shape():
    path = PATHS["linear"]
    x0, eps = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.1, 0.5, 0.9])
    found = path.corrupt(x0, eps, t)
    for row in range(3):
        torch.testing.assert_close(found[row], (1 - t[row]) * x0[row] + t[row] * eps[row])
        torch.testing.assert_close(
            path.corrupt(x0[row : row + 1], eps[row : row + 1], float(t[row]))[0], found[row]
        )


def test_paths_copy_and_travel_to_other_processes():
    for name in ("cosine", "linear", "vp", "ve"):
        path = PATHS[name]
        for twin in (copy.deepcopy(path), pickle.loads(pickle.dumps(path))):
            assert twin(0.3) == path(0.3)
            assert repr(twin) == repr(path)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: PATHS["cosine"](1.5),
            ValueError,
            r"t must lie in \[0, 1\] on GaussianPath.cosine\(\), got 1.5",
        ),
        (lambda: PATHS["cosine"](math.nan), ValueError, "t must be finite, got nan"),
        (lambda: PATHS["cosine"](torch.tensor([0.5, math.nan])), ValueError, "t must be finite|t must lie"),
        (lambda: PATHS["cosine"](torch.tensor([3])), TypeError, "t must be a floating tensor of times"),
        (lambda: PATHS["cosine"]("late"), TypeError, "t must be a number"),
        (lambda: PATHS["cosine"].grid(0), ValueError, "steps must be >= 1, got 0"),
        (lambda: PATHS["cosine"].grid(4, "cubic"), ValueError, "grid must be one of .* got 'cubic'"),
        (lambda: PATHS["linear"].grid(4, start=1.0), ValueError, "finite noise levels .* Start at 0.999"),
        (lambda: PATHS["linear"].grid(4, start=0.5, stop=0.5), ValueError, "stop must be below start"),
        (lambda: PATHS["linear"].grid(4, start=5e-4), ValueError, "start must be above first = 0.001"),
        (lambda: PATHS["linear"].within(0.5, 0.4), ValueError, "0 < first < last <= end"),
        (lambda: GaussianPath(lambda t: t, lambda t: 1 - t), ValueError, "alpha / sigma must fall strictly"),
        (
            lambda: GaussianPath(lambda t: 1 - t, lambda t: t.sum()),
            ValueError,
            "alpha and sigma must be elementwise",
        ),
        (lambda: GaussianPath.vp(b0=0.0), ValueError, "b0 must be > 0, got 0"),
        (
            lambda: PATHS["linear"].sample_t(4, generator=torch.Generator(), how="sobol"),
            ValueError,
            "how must be one of .* got 'sobol'",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
