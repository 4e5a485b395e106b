"""Samplers against the literal equations, another library, closed forms and each other."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch

from pullback.methods.diffusion import (
    Denoiser,
    GaussianMixture,
    GaussianPath,
    log_prob,
    posterior_sampling,
    sample,
)
from pullback.methods.diffusion.sampling import SOLVERS
from pullback.methods.diffusion.tests import reference
from pullback.methods.diffusion.tests.cases import PATHS, Toy

MEANS = torch.tensor([[-1.2, 0.4], [1.0, -0.6]], dtype=torch.float64)
MIXTURE = GaussianMixture(
    MEANS, torch.tensor([0.3, 0.5], dtype=torch.float64), torch.tensor([0.4, 0.6], dtype=torch.float64)
)


def noise(count=16, seed=0):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def span(path):
    return (0.97 * path.end, 0.03 * path.end)


def steps_of(path, steps, kind="logsnr"):
    start, stop = span(path)
    return path.grid(steps, kind, start=start, stop=stop)


# --- the literal equations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("kind", ["logsnr", "uniform"], ids=["equal steps", "unequal steps"])
def test_solvers_are_the_literal_ones(name, solver, terminal, kind):
    path = PATHS[name]()
    model = MIXTURE.denoiser(path)
    times = steps_of(path, 7, kind) + ([0.0] if terminal else [])
    x = noise() * path(times[0]).sigma
    predict = lambda state, t: model(state, t).x0  # noqa: E731
    found = sample(model, x=x, solver=solver, grid=times)
    if solver == "ddim":
        wanted = x
        for s, t in pairwise(times):
            wanted = reference.ddim(wanted, s, t, predict(wanted, s), name) if t else predict(wanted, s)
    else:
        rule = reference.dpmpp_2m if solver == "dpmpp_2m" else reference.unipc
        wanted = rule(x, times, predict, name)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


def test_edm_is_algorithm_1_on_its_grid():
    path = GaussianPath.ve()
    levels = reference.karras(9)
    assert path.grid(9, "karras") == pytest.approx(levels, rel=1e-12)
    model = MIXTURE.denoiser(path)
    x = 80.0 * noise()
    wanted = reference.edm_heun(x, levels, lambda state, sigma: model(state, sigma).x0)
    found = sample(model, x=x, solver="edm", steps=9, grid="karras")
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_edm_on_any_path_is_edm_on_the_rescaled_state():
    cosine, ve = GaussianPath.cosine(), GaussianPath.ve()
    times = steps_of(cosine, 6)
    levels = [cosine(t).sigma / cosine(t).alpha for t in times]
    x = noise()
    first = sample(MIXTURE.denoiser(cosine), x=x, solver="edm", grid=times)
    second = sample(MIXTURE.denoiser(ve), x=x / cosine(times[0]).alpha, solver="edm", grid=levels)
    torch.testing.assert_close(first, second * cosine(times[-1]).alpha, rtol=1e-10, atol=1e-10)


# --- another library --------------------------------------------------------------------------------------------------


def peer(solver, path, times, x, model):
    """The scheduler of `diffusers` on our path and grid, driven as its own pipelines do."""
    import diffusers

    library: Any = diffusers
    flow = repr(path) == "GaussianPath.linear()"
    options = {
        "prediction_type": "sample",
        "solver_order": 2,
        "use_flow_sigmas": flow,
        "final_sigmas_type": "zero",
    }
    if solver == "dpmpp_2m":
        options["final_sigmas_type"] = "zero" if times[-1] == 0.0 else "sigma_min"
        scheduler = library.DPMSolverMultistepScheduler(**options, lower_order_final=False)
    else:
        scheduler = library.UniPCMultistepScheduler(**options, solver_type="bh2", predict_x0=True)
    at = [path(t) for t in times]
    levels = [c.sigma if flow else c.sigma / c.alpha for c in at]
    scheduler.set_timesteps(len(times) - 1)
    scheduler.sigmas = torch.tensor(levels, dtype=torch.float64)
    scheduler.timesteps = torch.arange(len(times) - 1)
    scheduler.num_inference_steps = len(times) - 1
    for i, t in enumerate(times[:-1]):
        x = scheduler.step(model(x.double(), t).x0, scheduler.timesteps[i], x).prev_sample
    return x


@pytest.mark.parametrize("name", ["cosine", "linear", "vp"])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc"])
@pytest.mark.parametrize(
    ("terminal", "kind"), [(False, "logsnr"), (True, "logsnr"), (False, "uniform"), (True, "karras")]
)
def test_samples_equal_those_of_diffusers(name, solver, terminal, kind):
    path = PATHS[name]()
    model = MIXTURE.denoiser(path)
    times = steps_of(path, 11, kind) + ([0.0] if terminal else [])
    x = noise(64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = peer(solver, path, times, x, model)
    found = sample(model, x=x, solver=solver, grid=times)
    # Theirs keeps DPM-Solver++'s state in float32; UniPC stays in float64.
    bound = 1e-6 if solver == "dpmpp_2m" else 1e-12
    assert float((found - wanted).abs().max() / wanted.abs().max()) < bound


# --- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "ve"])
def test_ddim_is_euler_where_the_path_is_straight(name):
    path = PATHS[name]()
    model, times = MIXTURE.denoiser(path), steps_of(path, 9)
    x = noise()
    one, other = (sample(model, x=x, solver=solver, grid=times) for solver in ("ddim", "euler"))
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_on_other_paths_it_is_not():
    path = GaussianPath.cosine()
    model, times = MIXTURE.denoiser(path), steps_of(path, 9)
    one, other = (sample(model, x=noise(), solver=solver, grid=times) for solver in ("ddim", "euler"))
    assert float((one - other).abs().max()) > 1e-2


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc"])
def test_samples_depend_on_the_coefficients_and_not_on_time(name, solver):
    """The same path with time squared: the same coefficients at the same steps."""
    path = PATHS[name]()
    squeezed = GaussianPath(
        lambda u: path._rule(u.square() * path.end, torch)[0],
        lambda u: path._rule(u.square() * path.end, torch)[1],
    )
    times = steps_of(path, 6)
    again = [(t / path.end) ** 0.5 for t in times]
    x = noise() * path(times[0]).sigma
    one = sample(MIXTURE.denoiser(path), x=x, solver=solver, grid=times)
    other = sample(MIXTURE.denoiser(squeezed), x=x, solver=solver, grid=again)
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_full_noise_in_ddim_is_ancestral_sampling():
    """The same mean and standard deviation as the posterior of the forward chain by Bayes' rule."""
    s, t, name = 0.7, 0.4, "cosine"
    x0, x = noise(4, 1), noise(4, 2)
    zero = torch.zeros_like(x)
    mean = reference.ancestral(x, s, t, x0, name, zero)
    torch.testing.assert_close(reference.ddim(x, s, t, x0, name, 1.0, zero), mean)
    one = torch.ones_like(x)
    spread = reference.ancestral(x, s, t, x0, name, one) - mean
    torch.testing.assert_close(reference.ddim(x, s, t, x0, name, 1.0, one) - mean, spread)

    # And the product's step has that mean and spread: one data point, many draws.
    path = GaussianPath.cosine()
    model = GaussianMixture(MEANS[:1], 0.5).denoiser(path)
    many = torch.full((40_000, 2), 0.3, dtype=torch.float64)
    drawn = sample(model, x=many, solver="ddim", eta=1.0, grid=[s, t])
    wanted = reference.ancestral(many[:1], s, t, model(many[:1], s).x0, name, zero[:1])
    error = 5 * float(spread[0, 0]) / 200
    assert float((drawn.mean(0) - wanted[0]).abs().max()) < error
    assert drawn.std(0).numpy() == pytest.approx([float(spread[0, 0])] * 2, rel=0.02)


@pytest.mark.parametrize(("solver", "eta"), [("sde", 0.0), ("ddim", 1.0), ("ddim", 0.5)])
def test_stochastic_samplers_have_the_exact_law(solver, eta):
    """Mean and covariance of a Gaussian, from exact noise, within five standard errors and the step's bias."""
    path, count = GaussianPath.cosine(), 10_000
    covariance = torch.tensor([[[0.5, 0.2], [0.2, 0.3]]], dtype=torch.float64)
    mixture = GaussianMixture(MEANS[:1], covariances=covariance)
    found = sample(
        mixture.denoiser(path), (count, 2), solver=solver, eta=eta, steps=300, start=0.99, dtype=torch.float64
    )
    assert float((found.mean(0) - MEANS[0]).abs().max()) < 0.04
    assert float((torch.cov(found.T) - covariance[0]).abs().max()) < 0.05


def test_seeds_choose_the_noise():
    model = MIXTURE.denoiser(GaussianPath.cosine())
    for solver, eta in (("sde", 0.0), ("ddim", 1.0), ("dpmpp_2m", 0.0)):
        first, again, other = (sample(model, (8, 2), solver=solver, eta=eta, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


@pytest.mark.parametrize("solver", SOLVERS)
def test_all_solvers_reach_data_at_sigma_zero(solver):
    """The terminal state of every path is finite and near the component means for narrow data."""
    narrow = GaussianMixture(MEANS, 0.01)
    for make in PATHS.values():
        found = sample(narrow.denoiser(make()), (64, 2), solver=solver, steps=60, dtype=torch.float64)
        gaps = torch.cdist(found, MEANS).amin(1)
        assert bool(found.isfinite().all())
        assert float(gaps.median()) < 0.05


@pytest.mark.parametrize("predicts", ["eps", "x0", "score", "v"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_no_form_divides_by_zero_at_the_terminal_state(predicts, solver):
    model = Denoiser(Toy(2), GaussianPath.cosine(), predicts)
    for grid in ("logsnr", "uniform", "karras"):
        found = sample(model, (3, 2), solver=solver, steps=4, grid=grid)
        assert bool(found.isfinite().all())
        assert found.dtype == torch.float32


def test_one_step_is_the_prediction():
    model = MIXTURE.denoiser(GaussianPath.cosine())
    x = noise()
    for solver in ("ddim", "dpmpp_2m", "unipc", "sde"):
        found = sample(model, x=x, solver=solver, steps=1)
        torch.testing.assert_close(found, model(x, 0.999).x0, rtol=1e-10, atol=1e-11)


def test_the_trajectory_begins_and_ends_where_it_should():
    model, x = MIXTURE.denoiser(GaussianPath.cosine()), noise()
    for solver in SOLVERS:
        every = sample(model, x=x, solver=solver, steps=5, trajectory=True)
        assert every.shape == (6, *x.shape)
        assert torch.equal(every[0], x)
        assert torch.equal(every[-1], sample(model, x=x, solver=solver, steps=5))


def test_the_start_is_left_alone_and_half_precision_is_widened():
    model = MIXTURE.denoiser(GaussianPath.cosine())
    x = noise()
    before = x.clone()
    for solver in SOLVERS:
        sample(model, x=x, solver=solver, steps=3)
    assert torch.equal(x, before)
    assert sample(model, x=x.bfloat16(), steps=3).dtype == torch.float32


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (
            [0.9, 0.5, 0.5, 0.1],
            r"grid must fall strictly .* got 0.5 and then 0.5 at positions 1 and 2\. Remove",
        ),
        ([0.1, 0.5, 0.9], r"grid must fall strictly .* got 0.1 and then 0.5"),
        ([0.9, float("nan"), 0.1], r"grid must fall strictly .* got 0.9 and then nan"),
        ([0.5], r"grid must hold at least two times, got \[0.5\]"),
        ([1.5, 0.5], r"t must lie in \[0, 1\] .* got 1.5"),
        ([0.5, -0.5], r"t must lie in \[0, 1\] .* got -0.5"),
        ("polynomial", r"grid must be one of 'logsnr', 'uniform', 'karras', got 'polynomial'"),
    ],
)
def test_grids_that_make_no_sense_are_refused(grid, words):
    with pytest.raises(ValueError, match=words):
        sample(MIXTURE.denoiser(GaussianPath.cosine()), (2, 2), grid=grid)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"steps": 0}, r"steps must be >= 1, got 0"),
        ({"solver": "dpm"}, r"solver must be one of .* got 'dpm'"),
        ({"start": 1.0}, r"finite noise levels for grid='logsnr'.*Start at 0.999"),
        ({"start": 0.1, "stop": 0.2}, r"stop must be below start"),
        ({"eta": 0.5}, r"eta must be 0 with solver='dpmpp_2m', got 0.5"),
        ({"eta": -0.5}, r"eta must be >= 0"),
        ({"dtype": torch.float16}, r"dtype must be one of .*float32 or float64"),
        ({"shape": None}, r"shape must be given where x is not"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(changed, words):
    given: dict[str, Any] = {"shape": (2, 2), **changed}
    with pytest.raises(ValueError, match=words):
        sample(MIXTURE.denoiser(GaussianPath.linear()), **given)


def test_predictions_of_noise_cannot_start_where_there_is_no_signal():
    model = Denoiser(Toy(2), GaussianPath.linear(), "eps")
    with pytest.raises(ValueError, match=r"alpha must be positive .* Begin a little later"):
        sample(model, (2, 2), solver="euler", grid=[1.0, 0.5, 0.1])
    assert bool(
        sample(Denoiser(Toy(2), GaussianPath.linear(), "v"), (2, 2), solver="euler", grid=[1.0, 0.0])
        .isfinite()
        .all()
    )


# --- likelihood -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATHS)
def test_the_likelihood_is_the_exact_log_density(name):
    path = PATHS[name]()
    first, last = path.first, path.last
    there = MIXTURE.at(path, first)
    x = there.sample(12, generator=torch.Generator().manual_seed(0))
    kind = "uniform" if name in ("cosine", "linear") else "logsnr"
    found = log_prob(MIXTURE.denoiser(path), x, steps=200, grid=kind, prior=MIXTURE.at(path, last).log_prob)
    gap = (found - there.log_prob(x)).abs().max()
    assert float(gap) < (1e-8 if kind == "uniform" else 1e-6)


def test_one_probe_per_trajectory_is_unbiased_and_the_same_in_every_step():
    """The mean over all four sign vectors in the plane is the exact trace; one seed is one number."""
    path = GaussianPath.cosine()
    model = MIXTURE.denoiser(path)
    x = MIXTURE.sample(1, generator=torch.Generator().manual_seed(0)).expand(400, 2)
    exact = log_prob(model, x[:1], steps=20)
    found = log_prob(model, x, steps=20, divergence="hutchinson")
    assert len(found.mul(1e9).round().unique()) == 2  # z z^T has two values for two entries
    assert abs(float(found.mean() - exact[0])) < 5 * float(found.std()) / 20
    assert torch.equal(found, log_prob(model, x, steps=20, divergence="hutchinson"))
    assert not torch.equal(found, log_prob(model, x, steps=20, divergence="hutchinson", seed=1))


def test_likelihood_without_a_prior_takes_normal_noise():
    path = GaussianPath.cosine()
    x = MIXTURE.sample(8, generator=torch.Generator().manual_seed(0))
    near = MIXTURE.at(path, path.first).log_prob(x)
    torch.testing.assert_close(
        log_prob(MIXTURE.denoiser(path), x, steps=200, grid="uniform"), near, rtol=0, atol=5e-3
    )


@pytest.mark.parametrize(("solver", "stages"), [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_likelihood_calls_the_model_as_often_as_stated(solver, stages):
    calls = []

    class Counting(Toy):
        def forward(self, x, t):  # ty: ignore[incompatible-method-override]
            calls.append(None)
            return super().forward(x, t)

    model = Denoiser(Counting(2), GaussianPath.cosine(), "v")
    found = log_prob(model, torch.zeros(3, 2), steps=6, solver=solver)
    assert len(calls) == 6 * stages
    assert not found.requires_grad
    assert found.shape == (3,)


def test_gradients_under_inference_mode_are_refused():
    model = MIXTURE.denoiser(GaussianPath.cosine())
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match=r"log_prob must run outside torch.inference_mode"):
            log_prob(model, torch.zeros(1, 2))
        with pytest.raises(RuntimeError, match=r"posterior_sampling must run outside torch.inference_mode"):
            sample(posterior_sampling(model, lambda x: x, torch.zeros(2)), (2, 2))
        assert sample(model, (2, 2)).shape == (2, 2)
