"""Stability, its threshold, what is conserved, chaos and curl: against dense numerical Jacobians and closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from pullback.methods.curl_descent import (
    RuleFlip,
    chaos_order,
    conserved_quantities,
    curl_fraction,
    flip_threshold,
    solution_stability,
    stability_operator,
)
from pullback.methods.curl_descent.tests import reference as ref

M, N = 6, 9


def network(seed=0, m=M, n=N, outputs=1):
    rng = np.random.default_rng(seed)
    w1, w2 = rng.standard_normal((n, m)) / math.sqrt(m), rng.standard_normal((outputs, n)) / math.sqrt(n)
    return w1, w2, rng.choice([-1.0, 1.0], m), rng.choice([-1.0, 1.0], n), rng


def covariance(rng, m=M):
    a = rng.standard_normal((m, m))
    return a @ a.T / m + 0.1 * np.eye(m)


def tensors(*arrays):
    return [torch.as_tensor(array) for array in arrays]


# --- the operator ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_operator_is_the_literal_one(seed):
    w1, w2, d1, d2, _ = network(seed)
    np.testing.assert_allclose(
        stability_operator(*tensors(w1, w2, d1, d2)), ref.operator(w1, w2, d1, d2), atol=1e-12
    )


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_jacobian_at_a_solution_has_minus_the_eigenvalues_of_sigma_s(seed, identity):
    w1, w2, d1, d2, rng = network(seed)
    sigma = np.eye(M) if identity else covariance(rng)
    eigenvalues = np.linalg.eigvals(ref.jacobian(w1, w2, w2 @ w1, sigma, d1, d2))
    assert np.abs(eigenvalues.imag).max() < 1e-7
    moving = np.sort(eigenvalues.real[np.abs(eigenvalues.real) > 1e-6])
    s = stability_operator(*tensors(w1, w2, d1, d2)).numpy()
    np.testing.assert_allclose(moving, np.sort(-np.linalg.eigvals(sigma @ s).real), atol=1e-7)


def test_jacobian_of_several_outputs_has_the_eigenvalues_of_all_stacked_operators():
    w1, w2, d1, d2, _ = network(1, outputs=3)
    w1, w2 = torch.as_tensor(w1), torch.as_tensor(w2)
    target, signs = w2 @ w1, (torch.as_tensor(d1), torch.as_tensor(d2))

    def minus_field(flat):
        one, two = flat[: w1.numel()].view_as(w1), flat[w1.numel() :].view_as(w2)
        error = two @ one - target
        return -torch.cat([(two.T @ error * signs[0]).flatten(), (error @ one.T * signs[1]).flatten()])

    jacobian = torch.func.jacrev(minus_field)(torch.cat([w1.flatten(), w2.flatten()]))
    eigenvalues = torch.linalg.eigvals(jacobian)
    moving = eigenvalues.real[eigenvalues.abs() > 1e-6].sort().values
    stacked = stability_operator(w1, w2, *signs)
    assert stacked.shape == (3, M, M)
    torch.testing.assert_close(moving, -torch.linalg.eigvalsh(stacked).flatten().sort(descending=True).values)
    torch.testing.assert_close(solution_stability(w1, w2, *signs), -moving.max())


@pytest.mark.parametrize("seed", range(5))
def test_signs_do_not_depend_on_the_covariance(seed):
    w1, w2, d1, d2, rng = network(seed)
    s = stability_operator(*tensors(w1, w2, d1, d2)).numpy()
    plain = np.sort(np.sign(np.linalg.eigvalsh(s)))
    with_sigma = np.sort(np.sign(np.linalg.eigvals(covariance(rng) @ s).real))
    np.testing.assert_array_equal(plain, with_sigma)
    assert {-1.0, 1.0} == set(plain)  # otherwise nothing was compared


def test_stability_is_the_lowest_eigenvalue_and_stacks():
    stack = [network(seed)[:4] for seed in range(3)]
    w1, w2, d1, d2 = (torch.as_tensor(np.stack(each)) for each in zip(*stack, strict=True))
    single = [solution_stability(*tensors(*each)) for each in stack]
    torch.testing.assert_close(solution_stability(w1, w2, d1, d2), torch.stack(single))
    assert float(single[0]) == pytest.approx(np.linalg.eigvalsh(ref.operator(*stack[0]))[0])
    torch.testing.assert_close(solution_stability(w1[0], w2[0, 0], d1[0], d2[0]), single[0])
    assert solution_stability(w1[0], w2[0]) > 0  # gradient descent is always stable
    assert solution_stability(w1[0], w2[0], -torch.ones(M), -torch.ones(N)) < 0  # ascent never


# --- thresholds ------------------------------------------------------------------------------------------


def test_all_inputs_flipped_is_stable_below_a_quarter():
    assert (
        ref.lowest_of_random(0.2, 1.0, "hidden", size=900)
        > 0
        > ref.lowest_of_random(0.3, 1.0, "hidden", size=900)
    )
    assert flip_threshold(0.2499, "hidden") == 1.0 > flip_threshold(0.2501, "hidden")
    assert flip_threshold(0.25, "hidden") == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(
    ("layer", "ratio", "share"),
    [
        ("hidden", 0.2, 1.0), ("hidden", 0.5, 0.05), ("hidden", 0.7, 0.0), ("hidden", 2.0, 0.0),
        ("readout", 0.05, 0.31), ("readout", 0.1, 0.24), ("readout", 0.5, 0.10), ("readout", 1.0, 0.06),
        ("readout", 5.0, 0.01), ("readout", 1e-6, 0.5),
    ],
)  # fmt: skip
def test_thresholds_are_those_stored_with_the_official_code(layer, ratio, share):
    assert flip_threshold(ratio, layer) == pytest.approx(share, abs=0.006)


@pytest.mark.parametrize(
    ("layer", "ratio"), [("hidden", 0.4), ("hidden", 0.5), ("readout", 0.2), ("readout", 1.0)]
)
def test_one_large_random_network_changes_sign_at_the_threshold(layer, ratio):
    share = flip_threshold(ratio, layer)
    assert ref.lowest_of_random(ratio, max(0.0, share - 0.05), layer, size=700) > 0
    assert ref.lowest_of_random(ratio, share + 0.05, layer, size=700) < 0


@pytest.mark.parametrize("layer", ["hidden", "readout"])
@pytest.mark.parametrize(("ratio", "balance"), [(0.1, 1.0), (0.5, 1.0), (1.0, 0.7), (3.0, 2.0), (0.4, 1.6)])
def test_threshold_is_the_maximum_of_the_documented_function(layer, ratio, balance):
    if layer == "hidden":
        t = np.linspace(1, 40, 200_001)
        values = (t - 1 / t) / ratio - balance * (t * t - 1) - (t - 1)
    else:
        s = np.linspace(1e-6, 1, 200_001)
        values = (1 - s) - ratio * (1 - s * s) * (1 / s - balance)
    wanted = min(1.0, max(0.0, values.max() / 2))
    assert flip_threshold(ratio, layer, balance=balance) == pytest.approx(wanted, abs=1e-6)


def test_balance_is_the_size_of_the_readout():
    rng = np.random.default_rng(0)
    m, n, balance = 300, 600, 1.6
    w1, d1 = rng.standard_normal((n, m)) / math.sqrt(m), np.ones(m)
    w2 = np.full((1, n), math.sqrt(balance / n))
    share = flip_threshold(0.5, "readout", balance=balance)
    assert share > flip_threshold(0.5, "readout") + 0.03
    below, above = (ref.first_signs(n, share + shift) for shift in (-0.03, 0.03))
    assert solution_stability(*tensors(w1, w2, d1, np.array(below))) > 0
    assert solution_stability(*tensors(w1, w2, d1, np.array(above))) < 0


# --- what is conserved -----------------------------------------------------------------------------------


def drift(eta, relu, flipped):
    w1, w2, _, _, rng = network(3)
    d1 = np.array(ref.first_signs(M, 0.3 if flipped != "readout" else 0.0))
    d2 = np.array(ref.first_signs(N, 0.3 if flipped != "hidden" else 0.0))
    x, y = rng.standard_normal((7, M)), rng.standard_normal((7, 1))
    phi = (lambda a: np.maximum(a, 0)) if relu else (lambda a: a)
    slope = (lambda a: (a > 0).astype(float)) if relu else np.ones_like
    before = conserved_quantities(*tensors(w1, w2, d1, d2)).numpy()
    np.testing.assert_allclose(before, ref.invariants(w1, w2, d1, d2), atol=1e-12)
    for _ in range(round(0.4 / eta)):
        u1, u2 = ref.field(w1, w2, x, y, d1, d2, phi, slope)
        w1, w2 = w1 - eta * u1, w2 - eta * u2
    return np.abs(conserved_quantities(*tensors(w1, w2, d1, d2)).numpy() - before).max()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("flipped", ["hidden", "readout", "both"])
def test_invariants_drift_in_proportion_to_the_step(relu, flipped):
    coarse, fine = drift(0.004, relu, flipped), drift(0.002, relu, flipped)
    assert 0 < fine < 0.05
    assert coarse / fine == pytest.approx(2.0, rel=0.1)


def test_toy_net_converges_on_its_circle_or_orbits_forever():
    reached = ref.toy_orbit(1.5, 0.5, 1.0, 2e-3, 10_000)
    w1, w2 = reached[-1]
    assert w1 * w2 == pytest.approx(1.0, abs=1e-6)
    assert w1**2 + w2**2 == pytest.approx(2.5, abs=0.01)
    orbit = ref.toy_orbit(0.5, 0.4, 1.0, 1e-3, 10_000)
    assert min(abs(a * b - 1.0) for a, b in orbit[2_000:]) > 0.5
    assert orbit[-1][0] ** 2 + orbit[-1][1] ** 2 > 0.5**2 + 0.4**2  # each step adds energy


def test_toy_net_runs_the_same_with_the_product():
    w1, w2 = (torch.nn.Linear(1, 1, bias=False).double() for _ in range(2))
    with torch.no_grad():
        w1.weight.fill_(1.5)
        w2.weight.fill_(0.5)
    optimizer = torch.optim.SGD([w1.weight, w2.weight], lr=1e-3)
    RuleFlip(w1, fraction=1.0).attach(optimizer)
    one = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(300):
        optimizer.zero_grad()
        (0.5 * (w2(w1(one)) - 1.0).square()).sum().backward()
        optimizer.step()
    assert (w1.weight.item(), w2.weight.item()) == pytest.approx(
        ref.toy_orbit(1.5, 0.5, 1.0, 1e-3, 300)[-1], abs=1e-12
    )
    assert conserved_quantities(w1.weight, w2.weight, -torch.ones(1)).item() == pytest.approx(-2.5, abs=0.01)


def test_toy_solutions_are_stable_where_the_first_weight_is_larger():
    for a, b, stable in ((1.5, 0.5, True), (0.5, 1.5, False)):
        lowest = solution_stability(torch.tensor([[a]]), torch.tensor([[b]]), -torch.ones(1))
        assert (lowest > 0) == stable
        assert float(lowest) == pytest.approx(a * a - b * b)


# --- chaos -----------------------------------------------------------------------------------------------


def test_order_parameter_is_the_literal_one():
    path = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    assert float(chaos_order(path)) == pytest.approx(ref.order_parameter(path.tolist()), rel=1e-6)
    stack = torch.stack([path, 2 * path, path + 1.0], dim=1)
    torch.testing.assert_close(chaos_order(stack), chaos_order(path).expand(3), rtol=1e-5, atol=0)
    assert chaos_order(path[:1].expand(5, -1)) == 0


# --- curl ------------------------------------------------------------------------------------------------


def small_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    x, y = torch.randn(8, 3).double(), torch.randn(8, 1).double()
    return model, lambda: torch.nn.functional.mse_loss(model(x), y)


def dense_ratio(model, loss_fn, signs, seed):
    """The card's formula with a dense Hessian and a dense D."""
    from pullback.core.streams import generator

    params = list(model.parameters())
    grads = torch.autograd.grad(loss_fn(), params, create_graph=True)
    flat = torch.cat([g.flatten() for g in grads])
    rows = [torch.cat([h.flatten() for h in torch.autograd.grad(e, params, retain_graph=True)]) for e in flat]
    hessian = torch.stack(rows)
    d = torch.diag(torch.cat([s.expand_as(p).flatten() for s, p in zip(signs, params, strict=True)]))
    draws = [generator("curl probe", seed, 0, i) for i in range(len(params))]
    v = torch.cat(
        [
            torch.randn(p.shape, generator=g, dtype=p.dtype).flatten()
            for p, g in zip(params, draws, strict=True)
        ]
    )
    curl = (hessian @ d - d @ hessian) @ v
    return float(curl.norm() / ((hessian @ d @ v).norm() + (d @ hessian @ v).norm()))


@pytest.mark.parametrize("seed", range(3))
def test_curl_fraction_is_the_dense_formula(seed):
    model, loss_fn = small_model()
    signs = RuleFlip(model[2], fraction=0.5).signs(model)
    found = float(curl_fraction(loss_fn, model, signs, seed=seed))
    assert found == pytest.approx(dense_ratio(model, loss_fn, signs, seed), rel=1e-9)
    assert 0.05 < found < 1


def test_curl_agrees_with_finite_differences_of_the_field():
    model, loss_fn = small_model()
    params, flip = list(model.parameters()), RuleFlip(model[2], fraction=0.5)
    signs = flip.signs(model)

    def field():
        return torch.cat(
            [(s * g).flatten() for s, g in zip(signs, torch.autograd.grad(loss_fn(), params), strict=True)]
        )

    columns, step = [], 1e-5
    for p in params:
        for i in range(p.numel()):
            with torch.no_grad():
                p.view(-1)[i] += step
            up = field()
            with torch.no_grad():
                p.view(-1)[i] -= 2 * step
            down = field()
            with torch.no_grad():
                p.view(-1)[i] += step
            columns.append((up - down) / (2 * step))
    jacobian = torch.stack(columns, 1)
    asymmetry = (jacobian - jacobian.T).norm() / (2 * jacobian.norm())
    many = float(curl_fraction(loss_fn, model, signs, probes=600))
    assert many == pytest.approx(float(asymmetry), rel=0.06)


def test_no_curl_where_d_commutes_with_the_hessian():
    model, loss_fn = small_model()
    for sign in (1.0, -1.0):
        uniform = [torch.full((), sign, dtype=torch.float64) for _ in model.parameters()]
        assert curl_fraction(loss_fn, model, uniform, probes=3) == 0
    a, b = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    blocks = lambda: a.prod() + b.pow(4).sum() * b[0]  # noqa: E731 - block-diagonal Hessian
    minus, plus = -torch.ones(3), torch.ones(3)
    assert curl_fraction(blocks, [a, b], [minus, plus], probes=3) == 0
    assert curl_fraction(blocks, [a, b], [torch.tensor([-1.0, 1, 1]), plus], probes=3) > 0.05
    assert curl_fraction(lambda: a.sum() + b.sum(), [a, b], [minus, plus]) == 0  # no Hessian at all


def test_curl_costs_two_products_a_probe_and_leaves_no_trace(monkeypatch):
    model, loss_fn = small_model()
    signs = RuleFlip(model[0], fraction=0.5).signs(model)
    calls, grad = [], torch.autograd.grad

    def counted(*args, **kwargs):
        calls.append(1)
        return grad(*args, **kwargs)

    state = torch.get_rng_state()
    monkeypatch.setattr(torch.autograd, "grad", counted)
    with torch.no_grad():
        curl_fraction(loss_fn, model, signs, probes=3)
    assert len(calls) == 1 + 2 * 3
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


# --- refusals --------------------------------------------------------------------------------------------

W1, W2 = torch.ones(3, 2), torch.ones(1, 3)
UNKNOWN: Any = "input"


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: solution_stability(W1.long(), W2), TypeError, "W1 must be a floating tensor"),
        (lambda: solution_stability(W1[0], W2), ValueError, r"W1 must be \[..., hidden, inputs\]"),
        (lambda: solution_stability(W1, W2.T), ValueError, r"W2 must be \[..., outputs, 3\]"),
        (lambda: solution_stability(W1, W2, torch.ones(3)), ValueError, "signs_in must hold .* each of 2"),
        (lambda: solution_stability(W1, W2, None, torch.zeros(3)), ValueError, "signs_hidden must hold"),
        (lambda: conserved_quantities(W1, W2, torch.tensor(1.0)), ValueError, "signs_in must hold"),
        (lambda: chaos_order(torch.ones(5)), ValueError, r"path must be \[time, ..., weights\]"),
        (lambda: flip_threshold(0.0, "hidden"), ValueError, "ratio must be > 0, got 0"),
        (lambda: flip_threshold(1.0, UNKNOWN), ValueError, "layer must be one of 'hidden', 'readout'"),
        (lambda: flip_threshold(1.0, "hidden", balance=-1.0), ValueError, "balance must be > 0"),
    ],
)  # fmt: skip
def test_bad_arguments_of_the_theory_are_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_bad_arguments_of_the_curl_meter_are_refused():
    w = torch.ones(2, requires_grad=True)
    loss, signs = (lambda: w.prod()), [torch.ones(2)]
    with pytest.raises(ValueError, match="parameters must not be empty"):
        curl_fraction(loss, [], [])
    with pytest.raises(ValueError, match="signs must hold one tensor for each of 1"):
        curl_fraction(loss, [w], [])
    with pytest.raises(ValueError, match=r"broadcast to a parameter of shape \(2,\)"):
        curl_fraction(loss, [w], [torch.ones(3)])
    with pytest.raises(ValueError, match=r"signs must hold \+1 or -1"):
        curl_fraction(loss, [w], [torch.zeros(2)])
    with pytest.raises(TypeError, match="must give a scalar tensor"):
        curl_fraction(lambda: w * 2, [w], signs)
    with pytest.raises(RuntimeError, match="loss without graph"):
        curl_fraction(lambda: w.detach().sum(), [w], signs)
    with pytest.raises(ValueError, match="probes must be >= 1, got 0"):
        curl_fraction(loss, [w], signs, probes=0)
    with pytest.raises(ValueError, match="must require a gradient"):
        curl_fraction(loss, [w.detach()], signs)
    with pytest.raises(TypeError, match="must be a floating tensor"):
        curl_fraction(loss, [torch.ones(2, dtype=torch.int64)], signs)
