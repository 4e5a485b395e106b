"""Guidance: affine in every form, exact posteriors where known, gradients per sample, one call for both halves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pullback.core.prediction import KINDS, GaussianField
from pullback.methods.diffusion import (
    Denoiser,
    GaussianMixture,
    GaussianPath,
    cfg,
    classifier_guidance,
    posterior_sampling,
    sample,
)
from pullback.methods.diffusion.tests.cases import PATHS, Toy

MEANS = torch.tensor([[-1.2, 0.4], [1.0, -0.6]], dtype=torch.float64)
STDS = torch.tensor([0.3, 0.5], dtype=torch.float64)
NULL = 2


class Labelled(nn.Module):
    """The exact prediction of one component for labels 0 and 1 and of the mixture for the null label, in one form."""

    def __init__(self, path, kind):
        super().__init__()
        self.kind, self.calls = kind, []
        self.models = [GaussianMixture(MEANS[k : k + 1], STDS[k : k + 1]).denoiser(path) for k in (0, 1)]
        self.models.append(GaussianMixture(MEANS, STDS).denoiser(path))

    def forward(self, x, t, y):
        self.calls.append(len(x))
        every = torch.stack([model(x, t).reading(self.kind) for model in self.models])
        return every[y, torch.arange(len(x))]


def labelled(kind="v", name="cosine"):
    path = PATHS[name]()
    return Denoiser(Labelled(path, kind), path, kind, null={"y": NULL})


def states(count=6, seed=0):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.tensor([0, 1, 0, 1, 1, 0])


@pytest.mark.parametrize("w", [-0.5, 0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", PATHS)
def test_guided_noise_is_the_stated_combination_in_every_form(w, name):
    x, t = states(), 0.4
    for kind in KINDS:
        model = labelled(kind, name)
        found = cfg(model, w, {"y": LABELS})(x, t)
        nothing, wanted = model(x, t, y=torch.full((6,), NULL)).eps, model(x, t, y=LABELS).eps
        torch.testing.assert_close(found.eps, nothing + w * (wanted - nothing), rtol=1e-10, atol=1e-11)


def test_zero_and_one_are_the_plain_models():
    model, x = labelled(), states()
    assert torch.equal(cfg(model, 1.0, {"y": LABELS})(x, 0.4).value, model(x, 0.4, y=LABELS).value)
    assert torch.equal(
        cfg(model, 0.0, {"y": LABELS})(x, 0.4).value, model(x, 0.4, y=torch.full((6,), NULL)).value
    )


@pytest.mark.parametrize(("w", "calls"), [(0.0, [6]), (1.0, [6]), (2.0, [12])])
def test_both_halves_take_one_call(w, calls):
    model = labelled()
    cfg(model, w, {"y": LABELS})(states(), torch.full((6,), 0.4, dtype=torch.float64))
    assert model.net.calls == calls


def test_other_conditions_reach_both_halves():
    class Shifted(nn.Module):
        def forward(self, x, t, y, shift, scale):
            return x * scale + shift + y[:, None]

    model = Denoiser(Shifted(), GaussianPath.cosine(), "v", null={"y": 0})
    x, shift = states(), states(seed=1)
    found = cfg(model, 2.0, {"y": LABELS})(x, 0.4, shift=shift, scale=torch.tensor(3.0))
    torch.testing.assert_close(found.value, 3 * x + shift + 2.0 * LABELS[:, None])


def test_conditional_samples_come_from_their_component():
    labels = torch.arange(200) % 2
    found = sample(cfg(labelled(), 1.0, {"y": labels}), (200, 2), steps=30, dtype=torch.float64)
    for k in (0, 1):
        assert float((found[labels == k].mean(0) - MEANS[k]).abs().max()) < 5 * float(STDS[k]) / 10


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: cfg(Denoiser(Toy(2), GaussianPath.cosine()), 2.0, {"y": LABELS}),
            r"null must give .* none for \['y'\]",
        ),
        (
            lambda: cfg(labelled(), 2.0, {}),
            r"cond must hold the conditions to guide to, got \{\}\. Pass the labels",
        ),
        (
            lambda: cfg(labelled(), 2.0, {"y": LABELS[:3]})(states(), 0.4),
            r"y must hold one condition for each of 6 states, got 3",
        ),
    ],
)
def test_missing_labels_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_guidance_of_what_knows_no_null_labels_is_refused():
    wrong: Any = GaussianMixture(MEANS, STDS).denoiser(GaussianPath.cosine())
    with pytest.raises(TypeError, match=r"model must be of type Denoiser, got MixtureDenoiser\. Guide"):
        cfg(wrong, 1.0, {"y": LABELS})
    with pytest.raises(TypeError, match=r"cond must be empty for a mixture, got \['y'\]"):
        sample(GaussianMixture(MEANS, STDS).denoiser(GaussianPath.cosine()), (6, 2), cond={"y": LABELS})


# --- gradients --------------------------------------------------------------------------------------------------------

PRIOR_MEAN = torch.tensor([[0.5, -0.5]], dtype=torch.float64)
PRIOR_COV = torch.tensor([[0.6, 0.35], [0.35, 0.5]], dtype=torch.float64)
OPERATOR, NOISE, SEEN = (
    torch.tensor([[1.0, 0.4]], dtype=torch.float64),
    0.2,
    torch.tensor([1.1], dtype=torch.float64),
)


def exact_posterior():
    """Mean and covariance of x0 given y = A x0 + noise, by conditioning."""
    gain = PRIOR_COV @ OPERATOR.T @ torch.linalg.inv(OPERATOR @ PRIOR_COV @ OPERATOR.T + NOISE**2)
    return PRIOR_MEAN[0] + (
        SEEN - PRIOR_MEAN[0] @ OPERATOR.T
    ) @ gain.T, PRIOR_COV - gain @ OPERATOR @ PRIOR_COV


def prior(path):
    return GaussianMixture(PRIOR_MEAN, covariances=PRIOR_COV[None]).denoiser(path)


def likelihood(model):
    """log p(y | x_t) = log N(y; A m, A C A^T + noise^2) with the posterior moments m, C of x0."""

    def log_prob(x, t):
        mean, covariance = model.posterior(x, t)
        variance = (OPERATOR @ covariance @ OPERATOR.T).flatten() + NOISE**2
        gap = SEEN - (mean @ OPERATOR.T).flatten()
        return -0.5 * (gap**2 / variance + variance.log())

    return log_prob


@pytest.mark.parametrize("name", ["cosine", "linear", "ve"])
def test_guided_by_the_exact_likelihood_samples_follow_the_posterior(name):
    path = PATHS[name]() if name != "ve" else GaussianPath.ve()
    model = prior(path)
    guided = classifier_guidance(model, likelihood(model))
    found = sample(guided, (4000, 2), solver="unipc", steps=40, dtype=torch.float64)
    mean, covariance = exact_posterior()
    assert float((found.mean(0) - mean).abs().max()) < 5 * 0.7 / 4000**0.5
    assert float((torch.cov(found.T) - covariance).abs().max()) < 5 * 0.6 * (2 / 4000) ** 0.5 * 0.5


def test_posterior_sampling_approaches_it_for_a_wide_measurement():
    """A Gaussian likelihood at the expected data leaves out the posterior's spread: exact as that vanishes with t."""
    path, model = GaussianPath.cosine(), prior(GaussianPath.cosine())
    x, t = states(), 0.02
    dps = posterior_sampling(model, lambda x0: x0 @ OPERATOR.T, SEEN, variance=NOISE**2)(x, t)
    exact = classifier_guidance(model, likelihood(model))(x, t)
    plain = model(x, t)
    torch.testing.assert_close(dps.score - plain.score, exact.score - plain.score, rtol=0.05, atol=1e-3)
    assert repr(path) == "GaussianPath.cosine()"


@pytest.mark.parametrize("kind", KINDS)
def test_posterior_sampling_is_the_literal_gradient_per_sample(kind):
    """score - zeta grad ||y - A(x0(x))|| row by row, by finite differences through the network."""
    model = Denoiser(Toy(2).double(), GaussianPath.cosine(), kind)
    x, t, y, zeta = states(4), 0.5, states(4, seed=3), 0.7
    found = posterior_sampling(model, lambda x0: x0**2, y, zeta)(x, t)
    plain = model(x, t)
    step = 1e-6
    for row in range(4):
        for entry in range(2):
            ends = []
            for sign in (1, -1):
                moved = x[row : row + 1].clone()
                moved[0, entry] += sign * step
                ends.append(float((y[row] - model(moved, t).x0[0].detach() ** 2).norm()))
            wanted = plain.score[row, entry] - zeta * (ends[0] - ends[1]) / (2 * step)
            torch.testing.assert_close(found.score[row, entry], wanted.detach(), rtol=1e-6, atol=1e-6)
    alone = posterior_sampling(model, lambda x0: x0**2, y[:1], zeta)(x[:1], t)
    torch.testing.assert_close(alone.value, found.value[:1], rtol=1e-10, atol=1e-12)


def test_guided_samplers_keep_no_graph_and_leave_parameters_alone():
    model = Denoiser(Toy(2), GaussianPath.cosine(), "v")
    guided = posterior_sampling(model, lambda x0: x0, torch.zeros(2), 0.1)
    found = sample(guided, (3, 2), steps=4)
    assert not found.requires_grad
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_guidance_stacks():
    """A classifier on top of labels: both act, and the need of a gradient is passed on."""
    model = labelled()
    both = classifier_guidance(cfg(model, 2.0, {"y": LABELS}), lambda x, t: -x.square().sum(1), 0.1)
    x = states()
    first = cfg(model, 2.0, {"y": LABELS})(x, 0.4).score
    torch.testing.assert_close(both(x, 0.4).score, first - 0.2 * x)
    assert both.needs_gradient
    assert isinstance(both, GaussianField)
