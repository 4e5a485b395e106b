"""One conditional expectation in four forms: conversions, losses, weights, preconditioning, conventions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pullback.core.prediction import KINDS, loss_weight, size_per
from pullback.methods.diffusion import (
    ConsistencyMap,
    Denoiser,
    GaussianMixture,
    GaussianPath,
    MeanFlow,
    Prediction,
    ReversedTime,
)
from pullback.methods.diffusion.tests import reference
from pullback.methods.diffusion.tests.cases import PATHS, Toy

TIMES = {"cosine": 0.37, "linear": 0.62, "vp": 0.41, "ve": 1.3}
MEANS = torch.tensor([[-1.0, 0.5], [1.5, 0.0], [0.2, -1.0]], dtype=torch.float64)
STDS, SHARES = (
    torch.tensor([0.4, 0.7, 0.2], dtype=torch.float64),
    torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64),
)


def points(count=6, size=2, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Fixed(nn.Module):
    """A network that says what one fixed score estimate says, in the form ``kind``; its weight bends the score."""

    def __init__(self, path, kind):
        super().__init__()
        self.path, self.kind = path, kind
        self.weight = nn.Parameter(torch.tensor([0.3, -0.8], dtype=torch.float64))

    def forward(self, x, t):
        return Prediction(x, torch.tanh(x * self.weight), "score", self.path(t).over(x)).reading(self.kind)


@pytest.mark.parametrize("name", PATHS)
def test_every_reading_of_the_exact_model_is_the_literal_one(name):
    path, x, t = PATHS[name](), points(), TIMES[name]
    found = GaussianMixture(MEANS, STDS, SHARES).denoiser(path)(x, t)
    for row in range(len(x)):
        score = reference.mixture_score(x[row], t, name, MEANS, STDS, SHARES)
        for kind, wanted in reference.readings(x[row], score, t, name).items():
            torch.testing.assert_close(found.reading(kind)[row], wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("scalar", [True, False], ids=["number", "rows"])
def test_a_round_through_all_forms_comes_back(name, scalar):
    path, x, value = PATHS[name](), points(), points(seed=1)
    t = TIMES[name] if scalar else torch.linspace(0.2, 0.8, len(x), dtype=torch.float64) * path.end
    at = path(t).over(x)
    for first in KINDS:
        for second in KINDS:
            there = Prediction(x, value, first, at).reading(second)
            back = Prediction(x, there, second, at).reading(first)
            torch.testing.assert_close(back, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_added_score_is_added_in_every_form(name, kind):
    path, x = PATHS[name](), points()
    found = Prediction(x, points(seed=1), kind, path(TIMES[name]))
    gradient = points(seed=2)
    torch.testing.assert_close(
        found.with_score_added(gradient).score, found.score + gradient, rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("weight", ["eps", "x0", "score", "v", "elbo", "edm", lambda at: 1 + at.sigma])
def test_with_matched_weights_the_four_losses_and_their_gradients_coincide(name, weight):
    path, x0, eps = PATHS[name](), points(), points(seed=1)
    t = torch.linspace(0.1, 0.9, len(x0), dtype=torch.float64) * path.end
    found = []
    for kind in KINDS:
        net = Fixed(path, kind)
        loss = Denoiser(net, path, kind).loss(x0, t, eps=eps, weight=weight)
        (gradient,) = torch.autograd.grad(loss, net.weight)
        found.append(torch.cat([loss.detach().reshape(1), gradient]))
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=1e-10, atol=1e-12)


def test_with_uniform_weights_they_differ():
    path, x0, eps = GaussianPath.cosine(), points(), points(seed=1)
    t = torch.linspace(0.1, 0.9, len(x0), dtype=torch.float64)
    losses = [float(Denoiser(Fixed(path, k), path, k).loss(x0, t, eps=eps).detach()) for k in KINDS]
    assert min(abs(a - b) / a for i, a in enumerate(losses) for b in losses[:i]) > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_squared_distance_to_the_conditional_target(kind):
    path, x0, eps = GaussianPath.cosine(), points(), points(seed=1)
    t = torch.linspace(0.1, 0.9, len(x0), dtype=torch.float64)
    net = Fixed(path, kind)
    found = Denoiser(net, path, kind).loss(x0, t, eps=eps, reduction="none")
    for row in range(len(x0)):
        alpha, sigma, dalpha, dsigma = reference.coefficients("cosine", float(t[row]))
        target = {
            "eps": eps[row],
            "x0": x0[row],
            "score": -eps[row] / sigma,
            "v": dalpha * x0[row] + dsigma * eps[row],
        }[kind]
        said = net((alpha * x0[row] + sigma * eps[row])[None], t[row : row + 1])[0]
        torch.testing.assert_close(found[row], ((said - target) ** 2).mean())


def test_the_elbo_weight_is_the_fall_of_the_log_ratio():
    for name, path in ((name, make()) for name, make in PATHS.items()):
        t, step = TIMES[name], 1e-6
        slope = -(reference.level(name, t + step) - reference.level(name, t - step)) / (2 * step)
        weight = loss_weight(path(torch.tensor([t], dtype=torch.float64)), "eps", "elbo")
        torch.testing.assert_close(weight, torch.tensor([slope], dtype=torch.float64), rtol=1e-7, atol=0)


def test_edm_is_its_published_preconditioning_and_weight():
    path, x0, eps, sd = GaussianPath.ve(), points(), points(seed=1), 0.5
    sigma = torch.linspace(0.1, 3.0, len(x0), dtype=torch.float64)
    net = Toy(2).double()
    model = Denoiser(net, path, "edm", sigma_data=sd)
    x = x0 + sigma[:, None] * eps
    s = sigma[:, None]
    raw = net(x / (s**2 + sd**2).sqrt(), sigma.log() / 4)
    wanted = sd**2 / (s**2 + sd**2) * x + s * sd / (s**2 + sd**2).sqrt() * raw
    torch.testing.assert_close(model(x, sigma).x0, wanted)
    weight = (sigma**2 + sd**2) / (sigma * sd) ** 2
    loss = (weight * ((wanted - x0) ** 2).mean(1)).mean()
    torch.testing.assert_close(model.loss(x0, sigma, eps=eps, weight="edm"), loss)


def test_edm_on_another_path_is_edm_on_the_rescaled_state():
    path, x, sd = GaussianPath.cosine(), points(), 0.5
    net = Toy(2).double()
    t = 0.4
    at = path(t)
    there = Denoiser(net, GaussianPath.ve(), "edm")(x / at.alpha, at.sigma / at.alpha)
    torch.testing.assert_close(Denoiser(net, path, "edm", sigma_data=sd)(x, t).x0, there.x0)


def test_edm_holds_where_there_is_no_signal_left():
    net, path = Toy(2), GaussianPath.linear()
    found = Denoiser(net, path, "edm")(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), 0.999)
    assert bool(found.x0.isfinite().all())


def test_the_angle_form_is_another_velocity():
    """alpha eps - sigma x0; on the cosine path it is 2 / pi of the velocity, on others no multiple."""
    x, value, t = points(), points(seed=1), 0.3

    class Says(nn.Module):
        def forward(self, x, t):
            return value

    cosine = Denoiser(Says(), GaussianPath.cosine(), "v_angle")(x, t)
    torch.testing.assert_close(cosine.at.alpha * cosine.eps - cosine.at.sigma * cosine.x0, value)
    torch.testing.assert_close(cosine.velocity * 2 / torch.pi, value)
    linear = Denoiser(Says(), GaussianPath.linear(), "v_angle")(x, t)
    torch.testing.assert_close(linear.at.alpha * linear.eps - linear.at.sigma * linear.x0, value)


def test_a_network_of_the_other_time_convention_is_turned_round():
    """Data at 1, velocity data - noise: the exact velocity of a Gaussian there and here."""
    mixture = GaussianMixture(MEANS, STDS, SHARES)
    path = GaussianPath.linear()
    exact = mixture.denoiser(path)

    class Theirs(nn.Module):
        def forward(self, x, t):  # of x = t data + (1 - t) noise
            found = exact(x, 1 - t)
            return found.x0 - found.eps

    model = Denoiser(ReversedTime(Theirs()), path, "v")
    x, t = points(), 0.35
    torch.testing.assert_close(model(x, t).x0, exact(x, t).x0)


# --- safe routes and refusals -----------------------------------------------------------------------------------------


def test_near_the_ends_the_velocity_is_a_safe_route_in_single_precision():
    """At t = 1e-3 noise from data loses 3 digits, from the velocity none; at t = 0.999 likewise the data from noise."""
    mixture, path = GaussianMixture(MEANS, STDS, SHARES), GaussianPath.linear()
    for t in (1e-3, 0.999):
        at = path(t)
        x0 = mixture.sample(50, generator=torch.Generator().manual_seed(0))
        x = at.alpha * x0 + at.sigma * points(50)
        exact = mixture.denoiser(path)(x, t)
        single = Prediction(x.float(), exact.velocity.float(), "v", at)
        for kind in ("eps", "x0"):
            gap = (single.reading(kind).double() - exact.reading(kind)).abs().max()
            assert gap < 2e-6, (t, kind)


@pytest.mark.parametrize(
    ("kind", "reading", "t", "word"),
    [
        ("eps", "x0", 1.0, "alpha"),
        ("score", "velocity", 1.0, "alpha"),
        ("x0", "eps", 0.0, "sigma"),
        ("v", "score", 0.0, "sigma"),
    ],
)
def test_a_division_by_zero_is_refused_with_the_way_out(kind, reading, t, word):
    found = Prediction(points(), points(), kind, GaussianPath.linear()(t))
    with pytest.raises(ValueError, match=rf"{word} must be positive .* got 0\. (Begin|End)"):
        getattr(found, reading)


def test_the_velocity_reads_everything_else_at_both_ends():
    path, x = GaussianPath.linear(), points()
    for t in (0.0, 1.0):
        found = Prediction(x, points(seed=1), "v", path(t))
        assert bool(found.x0.isfinite().all() and found.eps.isfinite().all())


@pytest.mark.parametrize("t", [-0.1, 1.1, float("nan")])
def test_times_outside_the_path_are_refused(t):
    model = Denoiser(Toy(2), GaussianPath.cosine())
    x = torch.zeros(2, 2)
    for given in (t, torch.tensor(t), torch.tensor([0.5, t])):
        with pytest.raises(ValueError, match=r"t must (lie in \[0, 1\]|be finite)"):
            model(x, given)
    with pytest.raises(ValueError, match=r"t must lie in"):
        model.loss(x, torch.tensor([0.5, t]), eps=x)


def test_times_of_the_wrong_form_are_refused():
    model = Denoiser(Toy(2), GaussianPath.cosine())
    with pytest.raises(ValueError, match=r"t must be one time or of shape \(2,\), got \(3,\)"):
        model(torch.zeros(2, 2), torch.full((3,), 0.5))
    with pytest.raises(TypeError, match=r"t must be a floating tensor"):
        model(torch.zeros(2, 2), torch.tensor([1, 0]))


def test_data_and_networks_of_the_wrong_form_are_refused():
    model = Denoiser(Toy(2), GaussianPath.cosine())
    with pytest.raises(TypeError, match=r"x must be a floating tensor.*\.float\(\)"):
        model(torch.zeros(2, 2, dtype=torch.uint8), 0.5)

    class Wide(nn.Module):
        def forward(self, x, t):
            return torch.cat([x, x], 1)

    with pytest.raises(
        ValueError, match=r"net must return a tensor of the states' shape \(2, 2\), got \(2, 4\)"
    ):
        Denoiser(Wide(), GaussianPath.cosine())(torch.zeros(2, 2), 0.5)


def test_nothing_is_learned_from_no_data():
    for model in (
        Denoiser(Toy(2), GaussianPath.cosine()),
        MeanFlow(Toy(2, times=2), GaussianPath.linear()),
        ConsistencyMap(Toy(2), GaussianPath.linear()),
    ):
        with pytest.raises(ValueError, match=r"x0 must hold one example or more, got shape \(0, 2\)"):
            model.loss(torch.zeros(0, 2), generator=torch.Generator().manual_seed(0))


def test_random_numbers_need_a_generator_and_dropout_needs_labels_and_null():
    model = Denoiser(Toy(2), GaussianPath.cosine())
    x, g = torch.zeros(4, 2), torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=r"generator must be given where t is drawn, got None\. Write"):
        model.loss(x)
    with pytest.raises(ValueError, match=r"generator must be given where eps is drawn"):
        model.loss(x, torch.full((4,), 0.5))
    with pytest.raises(ValueError, match=r"dropout must be 0 without conditions, got 0.1"):
        model.loss(x, generator=g, dropout=0.1)
    with pytest.raises(ValueError, match=r"null must give .* got none for \['y'\]"):
        model.loss(x, generator=g, dropout=0.1, y=torch.zeros(4, dtype=torch.long))
    loss: Any = model.loss
    with pytest.raises(ValueError, match=r"weight must be one of"):
        loss(x, generator=g, weight="snr")


def test_dropped_labels_become_the_null_label_at_the_stated_rate():
    seen = []

    class Watching(nn.Module):
        def forward(self, x, t, y):
            seen.append(y)
            return x

    model = Denoiser(Watching(), GaussianPath.cosine(), null={"y": 9})
    labels = torch.arange(4000) % 3
    model.loss(torch.zeros(4000, 2), generator=torch.Generator().manual_seed(0), dropout=0.2, y=labels)
    lost = seen[0] == 9
    assert torch.equal(seen[0][~lost], labels[~lost])
    assert abs(float(lost.float().mean()) - 0.2) < 5 * (0.16 / 4000) ** 0.5


def test_a_difference_in_one_form_is_the_stated_difference_in_another():
    for name, path in ((name, make()) for name, make in PATHS.items()):
        x, t = points(1), torch.tensor([TIMES[name]], dtype=torch.float64)
        at = path(t)
        for kind in KINDS:
            one, other = (Prediction(x, points(1, seed=s), kind, at.over(x)) for s in (1, 2))
            ratio = (one.eps - other.eps).norm() / (one.value - other.value).norm()
            torch.testing.assert_close(ratio, size_per(at, kind)[0])
