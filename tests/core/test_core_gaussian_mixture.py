"""Mixtures: density, draws, exact scores, posteriors; integrators and divergence on closed forms."""

import math

import pytest
import torch

from pullback.core.divergence import divergence_of
from pullback.core.gaussian_mixture import GaussianMixture
from pullback.core.gaussian_path import GaussianPath
from pullback.core.integrators import METHODS, TABLEAUS, integrate

MEANS = torch.tensor([[-1.0, 0.5], [1.5, 0.0]], dtype=torch.float64)
COVARIANCES = torch.tensor([[[0.5, 0.2], [0.2, 0.3]], [[0.2, -0.1], [-0.1, 0.6]]], dtype=torch.float64)
SHARES = torch.tensor([1.0, 3.0], dtype=torch.float64)
FORMS = {
    "one number": GaussianMixture(MEANS, 0.4, SHARES),
    "one each": GaussianMixture(MEANS, torch.tensor([0.4, 0.7], dtype=torch.float64), SHARES),
    "per axis": GaussianMixture(MEANS, torch.tensor([[0.4, 0.2], [0.7, 0.3]], dtype=torch.float64), SHARES),
    "full": GaussianMixture(MEANS, weights=SHARES, covariances=COVARIANCES),
}
PATH = GaussianPath.cosine()


def covariance_of(mixture, k):
    inner = torch.diag(mixture.variances[k])
    return inner if mixture.vectors is None else mixture.vectors[k] @ inner @ mixture.vectors[k].T


def density(mixture):
    """The same density by torch.distributions."""
    full = torch.stack([covariance_of(mixture, k) for k in (0, 1)])
    mix = torch.distributions.Categorical(SHARES)
    return torch.distributions.MixtureSameFamily(
        mix, torch.distributions.MultivariateNormal(mixture.means, full)
    )


def points(count=7):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS)
def test_density_score_and_draws_are_those_of_torch_distributions(form):
    mixture, t = FORMS[form], 0.4
    torch.testing.assert_close(mixture.log_prob(points()), density(mixture).log_prob(points()))
    there = mixture.at(PATH, t)
    x = points().requires_grad_()
    (score,) = torch.autograd.grad(density(there).log_prob(x).sum(), x)
    for given in (t, torch.full((7,), t, dtype=torch.float64)):
        torch.testing.assert_close(
            mixture.denoiser(PATH)(points(), given).score, score, rtol=1e-10, atol=1e-11
        )
    drawn = mixture.sample(40_000, generator=torch.Generator().manual_seed(0))
    share = SHARES / SHARES.sum()
    mean = share @ MEANS
    wanted = sum(
        share[k] * (covariance_of(mixture, k) + torch.outer(MEANS[k] - mean, MEANS[k] - mean)) for k in (0, 1)
    )
    assert float((drawn.mean(0) - mean).abs().max()) < 5 * 1.3 / 200
    assert float((torch.cov(drawn.T) - wanted).abs().max()) < 0.06


@pytest.mark.parametrize("form", FORMS)
def test_the_posterior_obeys_tweedies_formulas(form):
    """Mean x0 = (x + sigma^2 score) / alpha; covariance sigma^2 / alpha times the Jacobian of that mean."""
    mixture, t = FORMS[form], 0.5
    model, at = mixture.denoiser(PATH), PATH(t)
    mean, covariance = model.posterior(points(), t)
    torch.testing.assert_close(mean, model(points(), t).x0)
    torch.testing.assert_close(mean, (points() + at.sigma**2 * model(points(), t).score) / at.alpha)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: model(row[None], t).x0[0]))(points())
    torch.testing.assert_close(covariance, at.sigma**2 / at.alpha * jacobian, rtol=1e-9, atol=1e-10)


def test_the_exact_model_holds_at_both_ends():
    model = FORMS["full"].denoiser(GaussianPath.linear())
    torch.testing.assert_close(model(points(), 0.0).x0, points())
    prior = (SHARES / SHARES.sum()) @ MEANS
    torch.testing.assert_close(model(points(), 1.0).x0, prior.expand(7, 2))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: GaussianMixture(MEANS, -0.4), ValueError, "positive"),
        (lambda: GaussianMixture(MEANS, torch.tensor([0.4, 0.0])), ValueError, "positive"),
        (lambda: GaussianMixture(MEANS, 0.4, torch.tensor([1.0, -1.0])), ValueError, "positive"),
        (lambda: GaussianMixture(MEANS, covariances=-COVARIANCES), ValueError, "positive"),
        (lambda: GaussianMixture(MEANS), ValueError, "one of stds and covariances must be given"),
        (lambda: GaussianMixture(MEANS[0], 0.4), ValueError, "means must be a tensor with 2 dimensions"),
        (lambda: GaussianMixture(MEANS.long(), 0.4), TypeError, "means must be a floating tensor"),
        (
            lambda: FORMS["full"].flow(PATH, points(), 0.9, 0.1),
            ValueError,
            "flow must start from one component, got 2",
        ),
        (lambda: FORMS["full"].denoiser(PATH)(points()[:, :1], 0.5), ValueError, "x must be of shape"),
    ],
)
def test_what_makes_no_sense_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("method", METHODS)
def test_integrators_have_their_order_on_several_tensors_at_once(method):
    """dx/dt = (-x, t y): exp(-t) and exp(t^2 / 2), forwards and backwards."""
    start = [torch.ones(2, dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
    slope = lambda state, t: [-state[0], t * state[1]]  # noqa: E731
    gaps = []
    for steps in (20, 40):
        there = integrate(slope, start, [i / steps for i in range(steps + 1)], method)
        gaps.append(
            max(float((there[0] - math.exp(-1)).abs().max()), float((there[1] - math.exp(0.5)).abs().max()))
        )
        back = integrate(slope, there, [1 - i / steps for i in range(steps + 1)], method)
        assert float((back[0] - 1).abs().max()) < 0.1
    assert math.log2(gaps[0] / gaps[1]) == pytest.approx(TABLEAUS[method].order, abs=0.2)
    assert torch.equal(start[0], torch.ones(2, dtype=torch.float64))


def test_the_divergence_is_the_trace_exact_and_in_the_mean_of_all_probes():
    matrix = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    value = torch.tanh(x @ matrix.T)
    wanted = ((1 - value**2) * matrix.diagonal()).sum(1).detach()
    torch.testing.assert_close(divergence_of(value, x), wanted, rtol=1e-10, atol=1e-12)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    found = [divergence_of(torch.tanh(x @ matrix.T), x, sign.expand(5, 3)) for sign in signs]
    torch.testing.assert_close(torch.stack(found).mean(0), wanted, rtol=1e-10, atol=1e-12)
    assert divergence_of(torch.zeros(0, 3, requires_grad=True) * 1.0, torch.zeros(0, 3)).shape == (0,)
