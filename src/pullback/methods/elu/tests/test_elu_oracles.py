"""The unit Fisher, its solves, both theorems and the probe's numbers, against the reference and against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from pullback.core.weighted_gram import WeightedGrams, conjugate_gradients
from pullback.methods.elu import BiasShiftProbe
from pullback.methods.elu.shift import median, shift_fraction
from pullback.methods.elu.tests import reference


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(rows=40, n=5, units=3, seed=0):
    """Correlated activations with a mean, and derivatives that depend on them."""
    g = rng(seed)
    a = torch.randn(rows, n, generator=g, dtype=torch.float64) @ torch.randn(n, n, generator=g).double() + 0.7
    delta = torch.randn(rows, units, generator=g, dtype=torch.float64) * (1.0 + 0.3 * a[:, :units].abs())
    right = torch.randn(2, units, n + 1, generator=g, dtype=torch.float64)
    return a, delta, right


def fisher_of(a, delta, damping=1e-3, *, bias=True):
    c = delta.square().mean(0)
    return WeightedGrams(a, delta.square() / c, damping=damping, bias=bias), c


class Direct:
    """Exact solves of the same systems, one unit at a time."""

    def __init__(self, a, delta, damping):
        self.matrices = [reference.damped(reference.unit_fisher(a, d), damping) for d in delta.T]

    def solve(self, right):
        pairs = zip(self.matrices, right.transpose(0, 1), strict=True)
        return torch.stack([torch.linalg.solve(matrix, r.T).T for matrix, r in pairs], 1)


# --- the matrix and its solves --------------------------------------------------------------------------------------


def test_unit_fisher_is_the_sum_of_outer_products_of_per_sample_gradients():
    torch.manual_seed(0)
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randn(12, 1, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(4, 1), nn.Tanh()).double()
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, x, y):
        return 0.5 * (torch.func.functional_call(model, params, (x,)) - y).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, x, y)
    each = torch.cat([grads["0.weight"].flatten(1), grads["0.bias"]], 1)
    z = model[0](x).detach()
    delta = (torch.tanh(z) - y) * (1 - torch.tanh(z).square())
    fisher, c = fisher_of(x, delta)
    wanted = each.T @ each / 12
    torch.testing.assert_close(reference.unit_fisher(x, delta[:, 0]), wanted, rtol=1e-10, atol=1e-10)
    formed = torch.tril(fisher._column_space().matrices(fisher.weights)[0]) * c[0]
    torch.testing.assert_close(formed, torch.tril(wanted), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("rows", "n"), [(40, 5), (40, 39), (9, 20), (1, 3), (30, 1)])
def test_direct_solves_in_columns_and_rows(rows, n):
    a, delta, right = problem(rows, n, units=1)
    fisher, c = fisher_of(a, delta, 1e-2)
    found = fisher.solve(right)
    torch.testing.assert_close(
        found.x / c[:, None], Direct(a, delta, 1e-2).solve(right), rtol=1e-9, atol=1e-9
    )
    assert (found.iterations, found.residual) == (0, 0.0)


def test_both_direct_forms_agree_and_chunks_change_nothing(monkeypatch):
    a, delta, right = problem(12, 9, units=5)
    fisher, _ = fisher_of(a, delta, 1e-2)
    args = fisher.weights, fisher.absolute, right.movedim(0, -1)
    torch.testing.assert_close(
        fisher._row_space().solve(*args), fisher._column_space().solve(*args), rtol=1e-9, atol=1e-9
    )
    whole = fisher.solve(right).x
    monkeypatch.setattr("pullback.core.weighted_gram._CACHE", 1)
    torch.testing.assert_close(fisher.solve(right).x, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rows", "n", "bias"), [(60, 9, True), (60, 9, False), (8, 20, True)])
def test_conjugate_gradients_reach_the_direct_solve(rows, n, bias):
    a, delta, right = problem(rows, n, units=4)
    fisher, _ = fisher_of(a, delta, 1e-2, bias=bias)
    right = right if bias else right[..., :n]
    exact = fisher.solve(right).x
    found = conjugate_gradients(fisher, right, tolerance=1e-10, limit=200)
    torch.testing.assert_close(found.x, exact, rtol=1e-7, atol=1e-7 * float(exact.abs().max()))
    assert 0 < found.iterations < 60
    assert found.residual < 1e-9
    few = conjugate_gradients(fisher, right, tolerance=1e-10, limit=2)
    assert few.iterations == 2
    assert few.residual > 1e-3  # and it says so
    zero = conjugate_gradients(fisher, torch.zeros_like(right), tolerance=1e-10, limit=9)
    assert (zero.iterations, float(zero.x.abs().max())) == (0, 0.0)


def test_forming_about_the_mean_keeps_what_float32_would_lose():
    g = rng(3)
    a = 30.0 + torch.randn(500, 6, generator=g)
    delta, right = torch.randn(500, 2, generator=g), torch.randn(1, 2, 7, generator=g)
    fisher, c = fisher_of(a, delta, 1e-6)
    exact = Direct(a, delta, 1e-6).solve(right.double())
    error = (fisher.solve(right).x / c[:, None] - exact).norm() / exact.norm()
    assert error < 1e-3
    plain = torch.stack(
        [reference.unit_fisher(a, d).float() for d in delta.T]
    )  # entries of 900, rounded to float32
    damping = 1e-6 * plain.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(7)
    lost = torch.linalg.solve(plain + damping, right[0, :, :, None])[..., 0]
    assert (lost - exact[0]).norm() / exact.norm() > 10 * error


# --- the theorems ---------------------------------------------------------------------------------------------------


def test_theorem_one_is_the_solve_with_the_fisher():
    a, delta, right = problem()
    for d, r in zip(delta.T, right[0], strict=True):
        matrix = reference.unit_fisher(a, d)
        dw, dw0, _ = reference.natural_step(matrix, r[:-1], r[-1])
        torch.testing.assert_close(torch.cat([dw, dw0[None]]), torch.linalg.solve(matrix, r))


def network(*, n=6, m=4, seed=0, activation=None):
    g = rng(seed)
    model = nn.Sequential(nn.Linear(n, m), activation or nn.Tanh(), nn.Linear(m, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))
    x = torch.randn(50, n, generator=g, dtype=torch.float64) + 0.8
    return model, x, torch.randint(3, (50,), generator=g)


def parts(model, x, y):
    """Empirical derivatives [rows, m] and the mean gradient of the first layer, by autograd."""
    z = model[0](x)
    rest = nn.Sequential(*list(model)[1:])
    loss = functional.cross_entropy(rest(z), y, reduction="sum")
    delta, g, g0 = torch.autograd.grad(loss, [z, model[0].weight, model[0].bias])
    return delta, g / len(x), g0 / len(x)


def test_every_number_of_the_report_is_the_references():
    model, x, y = network()
    delta, g, g0 = parts(model, x, y)
    probe = BiasShiftProbe(model, ("0",), fisher="empirical", damping=0.0, max_units=None)
    found = probe.measure(x, y, per_unit=True)["0"]
    values = found.per_unit
    assert values is not None
    assert values["unit"].tolist() == [0, 1, 2, 3]
    for i in range(4):
        matrix = reference.unit_fisher(x, delta[:, i])
        dw, dw0, s = reference.natural_step(matrix, g[i], g0[i])
        shift, k, s_again = reference.theorem_two(x, delta[:, i], g[i], g0[i])
        assert float(s) == pytest.approx(s_again, rel=1e-10)
        assert shift == pytest.approx(float(x.mean(0) @ dw + dw0), rel=1e-9, abs=1e-12)  # theorem 2
        assert float(values["k"][i]) == pytest.approx(k, rel=1e-9)
        assert float(values["s"][i]) == pytest.approx(s_again, rel=1e-9)
        assert float(values["c"][i]) == pytest.approx(float(matrix[-1, -1]), rel=1e-12)
        natural = reference.shift_fraction(x, dw, dw0)
        assert float(values["shift_fraction_natural"][i]) == pytest.approx(natural, rel=1e-7, abs=1e-14)
        assert float(values["shift_fraction"][i]) == pytest.approx(
            reference.shift_fraction(x, g[i], g0[i]), rel=1e-9
        )
        both, step = torch.cat([g[i], g0[i, None]]), torch.cat([dw, dw0[None]])
        assert float(values["cos_natural"][i]) == pytest.approx(
            float(both @ step / both.norm() / step.norm()), rel=1e-9
        )
    for name in ("shift_fraction", "shift_fraction_natural", "cos_natural", "k", "s"):
        assert getattr(found, name) == pytest.approx(median(values[name]), rel=1e-12)
    mean = x.mean(0)
    assert found.mean_activation == pytest.approx(float(mean.mean()))
    assert found.median_activation == pytest.approx(float(mean.quantile(0.5)))
    assert found.median_abs_mean == pytest.approx(float(mean.abs().quantile(0.5)))
    assert found.mean_ratio == pytest.approx(float((mean.square().sum() / x.square().sum(1).mean()).sqrt()))


@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.1])
@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_unit_natural_gradient_is_the_solve_with_the_gradient(damping, solver):
    model, x, y = network()
    delta, g, g0 = parts(model, x, y)
    probe = BiasShiftProbe(
        model, ("0",), fisher="empirical", damping=damping, solver=solver, tolerance=1e-11, max_iterations=200
    )
    found = probe.unit_natural_gradient(x, y)
    assert list(found) == ["0.weight", "0.bias"]
    for i in range(4):
        matrix = reference.damped(reference.unit_fisher(x, delta[:, i]), damping)
        wanted = torch.linalg.solve(matrix, torch.cat([g[i], g0[i, None]]))
        torch.testing.assert_close(
            torch.cat([found["0.weight"][i], found["0.bias"][i, None]]), wanted, rtol=1e-7, atol=1e-9
        )


def test_one_unit_with_squared_loss_is_solved_in_one_natural_step():
    """A linear unit whose residuals are 1 or -1: then F is the Hessian."""
    g = rng(5)
    x = torch.randn(400, 3, generator=g, dtype=torch.float64) + 1.0
    model = nn.Linear(3, 1).double()
    wanted = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    y = x @ wanted.T + 0.3
    with torch.no_grad():
        model.weight.copy_(wanted + 1e-9)
        model.bias.fill_(0.3)
    y_sign = y + torch.where(torch.rand(400, 1, generator=g) < 0.5, -1.0, 1.0)  # delta^2 = 1 for every row
    step = BiasShiftProbe(model, fisher="empirical", damping=0.0).unit_natural_gradient(x, y_sign)
    with torch.no_grad():
        model.weight.sub_(step["weight"])
        model.bias.sub_(step["bias"])
    extended = torch.cat([x, torch.ones(400, 1, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(extended, y_sign).solution
    torch.testing.assert_close(torch.cat([model.weight, model.bias[None]], 1).T, best, rtol=1e-6, atol=1e-6)


class OneUnit(nn.Module):
    """A unit whose log-likelihood has a derivative that is given for every row."""

    def __init__(self, n, mean=None):
        super().__init__()
        self.unit = nn.Linear(n, 1).double()
        self.mean = mean

    def forward(self, x):
        return self.unit(x if self.mean is None else x + self.mean)


def symmetric_rows():
    """Activations in pairs a, -a with equal delta^2: exactly centred, and delta^2 independent of the sign of a."""
    g = rng(9)
    half = torch.randn(30, 3, generator=g, dtype=torch.float64)
    size = torch.rand(30, 1, generator=g, dtype=torch.float64) + 0.5
    sign = torch.where(torch.rand(60, 1, generator=g) < 0.5, -1.0, 1.0)
    return torch.cat([half, -half]), torch.cat([size, size]) * sign


def test_centred_activations_do_not_shift_and_constants_shift_plain_steps_only():
    x, delta = symmetric_rows()
    model = OneUnit(3)
    y = model.unit(x).detach() + delta  # derivative of the summed loss: -delta
    probe = BiasShiftProbe(model, fisher="empirical", damping=0.0)
    centred = probe.measure(x, y, per_unit=True)["unit"]
    assert reference.unit_fisher(x, delta[:, 0])[-1, :-1].abs().max() < 1e-12  # b
    assert centred.mean_ratio < 1e-12
    assert centred.k == pytest.approx(1.0, abs=1e-12)
    g = BiasShiftProbe(model, fisher="empirical").unit_natural_gradient(x, y)  # weight part: no mean
    assert abs(float(x.mean(0) @ g["unit.weight"][0])) < 1e-12
    # The same function of inputs that have a constant vector added: w0' = w0 - w.m.
    mean = torch.tensor([2.0, -1.0, 3.0], dtype=torch.float64)
    moved = OneUnit(3, mean)
    with torch.no_grad():
        moved.unit.weight.copy_(model.unit.weight)
        moved.unit.bias.copy_(model.unit.bias - model.unit.weight @ mean)
    shifted = BiasShiftProbe(moved, fisher="empirical", damping=0.0)
    report = shifted.measure(x, y)["unit"]
    assert report.shift_fraction > centred.shift_fraction + 0.1
    assert report.shift_fraction_natural == pytest.approx(centred.shift_fraction_natural, rel=1e-7)
    one, two = probe.unit_natural_gradient(x, y), shifted.unit_natural_gradient(x, y)
    torch.testing.assert_close(one["unit.weight"], two["unit.weight"], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(
        one["unit.bias"], two["unit.bias"] + two["unit.weight"] @ mean, rtol=1e-8, atol=1e-10
    )


def test_a_zero_mean_does_not_rule_out_a_shift():
    """Trap: zero means, but delta^2 grows with a, so that k is not 1."""
    g = rng(2)
    half = torch.randn(40, 3, generator=g, dtype=torch.float64)
    x = torch.cat([half, -half])
    model = OneUnit(3)
    delta = torch.randn(80, 1, generator=g, dtype=torch.float64) * (0.2 + 3.0 * (x[:, :1] > 0))
    report = BiasShiftProbe(model, fisher="empirical", damping=0.0).measure(
        x, model.unit(x).detach() + delta
    )["unit"]
    assert report.mean_ratio < 1e-12
    assert report.k > 1.3


def test_derivatives_are_per_example_not_of_the_batch_mean():
    """Trap: the mean derivative would give a Fisher matrix of rank one, singular without damping."""
    model, x, y = network()
    found = BiasShiftProbe(model, ("0",), fisher="empirical", max_units=None).measure(x, y, per_unit=True)[
        "0"
    ]
    delta, _, _ = parts(model, x, y)
    assert found.per_unit is not None
    torch.testing.assert_close(found.per_unit["c"], delta.square().mean(0))
    assert float(found.per_unit["c"][0]) > 5 * float(delta.mean(0).square()[0])


def test_the_model_fisher_is_that_of_sampled_labels():
    """E[delta^2] of the softmax layer is p (1 - p), over many draws of labels."""
    model, x, y = network()
    x, y = x.repeat(80, 1), y.repeat(80)
    probability = model(x).softmax(1).detach()
    report = BiasShiftProbe(model, ("2",), max_rows=None).measure(x, y, per_unit=True)["2"]
    assert report.per_unit is not None
    wanted = (probability * (1 - probability)).mean(0)
    torch.testing.assert_close(report.per_unit["c"], wanted, rtol=0.1, atol=0.0)
    empirical = BiasShiftProbe(model, ("2",), fisher="empirical").measure(x, y, per_unit=True)["2"]
    assert empirical.per_unit is not None
    wanted = (probability - functional.one_hot(y, 3)).square().mean(0)
    torch.testing.assert_close(empirical.per_unit["c"], wanted)


def test_shift_fraction_is_a_fraction():
    assert shift_fraction(torch.full((4, 1), 3.0)).item() == 1.0
    assert shift_fraction(torch.tensor([[1.0], [-1.0]])).item() == 0.0
    assert math.isnan(shift_fraction(torch.zeros(4, 1)).item())
