"""The estimators against closed forms, implicit differentiation and truncated back-propagation."""

from __future__ import annotations

import pytest
import torch

from pullback.core.implicit import implicit_gradient
from pullback.methods.eqprop import EnergyFunction, EquilibriumProp, HopfieldConvNet, HopfieldMLP, relax
from pullback.methods.eqprop.tests import reference

DOUBLE = torch.float64
ONE_SIDED = ("positive", "negative", "random_sign")


def drawn(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def network(sizes, activation="hard_sigmoid", **more):
    torch.manual_seed(3)
    net = HopfieldMLP(sizes, activation, **more).double()
    for layer in net.connections:
        layer.bias.data += 0.3 if activation == "hard_sigmoid" else 0.1
    return net


def grads_of(net, x, y, **settings):
    """What one backward call fills in."""
    net.zero_grad()
    EquilibriumProp(net, unsettled="ignore", **settings).backward(x, y)
    return [p.grad.clone() for p in net.parameters()]


# --- 1: a quadratic energy -------------------------------------------------------------------------------------


def quadratic(n=4, inputs=3, seed=0):
    root = drawn(n, n, seed=seed)
    a = root @ root.T / n + 2.0 * torch.eye(n, dtype=DOUBLE)
    p = torch.diag(torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=DOUBLE))
    return a, drawn(n, inputs, seed=seed + 1), drawn(n, seed=seed + 2), p


def quadratic_model(a, w, b):
    def energy(parameters, x, states):
        (s,) = states
        drive = x @ parameters["w"].T + parameters["b"]
        return 0.5 * (s @ parameters["a"] * s).sum(1) - (s * drive).sum(1)

    return EnergyFunction(energy, {"a": a, "w": w, "b": b}, [(len(b),)])


def settings(p, **more):
    """The squared error of the outputs alone, P a projector, relaxed until rounding."""
    half = {"cost": lambda out, y: 0.5 * ((out - y) @ p.to(out.dtype) * (out - y)).sum(1)}
    return {**half, "free_steps": 120, "nudge_steps": 120, "step_size": 0.3, **more}


@pytest.mark.parametrize(("seed", "beta"), [(0, 0.05), (20, 0.2), (40, 0.2)])
def test_one_sided_contrast_is_the_closed_form(seed, beta):
    a, w, b, p = quadratic(seed=seed)
    x, y = drawn(3, seed=seed + 9), drawn(4, seed=seed + 10)
    free, nudged = (reference.quadratic_states(a, w, b, p, x, y, size) for size in (0.0, beta))
    torch.testing.assert_close(
        relax(quadratic_model(a, w, b), x[None], steps=120, step_size=0.3).states[0][0].detach(), free
    )
    model = quadratic_model(a, w, b)
    _, grad_w, grad_b = grads_of(model, x[None], y[None], **settings(p, estimator="positive", beta=beta))
    torch.testing.assert_close(grad_w, -torch.outer(nudged - free, x) / beta, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(grad_b, -(nudged - free) / beta, rtol=1e-9, atol=1e-11)


def test_exact_gradient_of_a_quadratic_energy():
    a, w, b, p = quadratic()
    x, y = drawn(3, seed=9), drawn(4, seed=10)
    wanted = reference.quadratic_gradient(a, w, b, p, x, y)
    model = quadratic_model(a, w, b)
    found = grads_of(model, x[None], y[None], **settings(p, estimator="implicit"))[1]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    solved = w.clone().requires_grad_()
    s = torch.linalg.solve(a, solved @ x + b)
    (0.5 * (p @ (s - y)).square().sum()).backward()  # autograd through the solve
    torch.testing.assert_close(solved.grad, wanted, rtol=1e-12, atol=1e-12)


def test_orders_on_a_quadratic_energy():
    a, w, b, p = quadratic()
    x, y = drawn(2, 3, seed=9), drawn(2, 4, seed=10)
    ep = EquilibriumProp(quadratic_model(a, w, b), estimator="holomorphic", unsettled="ignore", **settings(p))
    found = ep.check_gradient(x, y, betas=(0.1, 0.05, 0.025))
    assert [row.name for row in found.rows] == ["positive", "negative", "centered", "holomorphic"]
    assert [row.order for row in found.rows] == pytest.approx([1, 1, 2, 4], abs=0.1)


# --- 2: order of convergence on networks ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "cost"),
    [
        (network([4, 5, 3], "sigmoid"), "mse"),
        (network([4, 5, 6, 3], "tanh"), "mse"),
        (network([4, 5, 6], "tanh", readout=3), "cross_entropy"),
        (HopfieldConvNet((1, 2, 2), [3], 3, activation="sigmoid", pool="avg").double(), "mse"),
    ],
    ids=["sigmoid", "tanh", "readout", "conv"],
)
def test_errors_vanish_with_the_stated_order(net, cost):
    x = drawn(5, 4, seed=1).sigmoid().view(-1, *((1, 2, 2) if isinstance(net, HopfieldConvNet) else (4,)))
    y = torch.tensor([0, 1, 2, 1, 0])
    ep = EquilibriumProp(net, cost=cost, n_points=4)
    found = ep.check_gradient(x, y, betas=(0.05, 0.025, 0.0125))
    assert found["positive"].order == pytest.approx(1, abs=0.15)
    assert found["negative"].order == pytest.approx(1, abs=0.15)
    assert found["centered"].order == pytest.approx(2, abs=0.2)
    assert found["holomorphic"].order == pytest.approx(4, abs=0.4)
    six = EquilibriumProp(net, cost=cost, n_points=6).check_gradient(
        x, y, betas=(0.1, 0.07, 0.05), estimators=["holomorphic"]
    )
    assert six["holomorphic"].order == pytest.approx(6, abs=0.6)
    assert found["holomorphic"].errors[0] < 0.1 * found["centered"].errors[0] < found["positive"].errors[0]


def test_adjoint_sweeps_are_the_implicit_gradient():
    for net in (
        network([4, 5, 6, 3]),
        network([4, 5, 3], "sigmoid"),
        HopfieldConvNet((1, 2, 2), [3], 3, pool="max").double(),
    ):
        x = drawn(5, 4, seed=1).sigmoid().view(-1, *((1, 2, 2) if isinstance(net, HopfieldConvNet) else (4,)))
        y = drawn(5, 3, seed=2).sigmoid()
        states = relax(net, x, steps=300).states
        wanted = implicit_gradient(
            lambda s, net=net, x=x: net.energy(x, s),
            lambda s, y=y: 0.5 * (s[-1] - y).square().sum(1),
            states,
            list(net.parameters()),
            free=net.movable(states),
        ).grads
        found = grads_of(net, x, y, estimator="implicit", free_steps=300, nudge_steps=300)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_the_random_sign_is_right_in_the_mean():
    net, x, y = network([4, 5, 3], "sigmoid"), drawn(5, 4, seed=1).sigmoid(), drawn(5, 3, seed=2).sigmoid()
    same = {"beta": 0.1, "free_steps": 200, "nudge_steps": 200}
    both = [grads_of(net, x, y, estimator="random_sign", seed=seed, **same) for seed in range(12)]
    known = {
        name: grads_of(net, x, y, estimator=name, **same) for name in ("positive", "negative", "centered")
    }
    kinds = [next(n for n in ("positive", "negative") if torch.equal(g[0], known[n][0])) for g in both]
    assert 2 <= kinds.count("positive") <= 10
    for plus, minus, middle in zip(*known.values(), strict=True):
        torch.testing.assert_close((plus + minus) / 2, middle, rtol=1e-9, atol=1e-12)


# --- 3: two points on the circle --------------------------------------------------------------------------------


def test_two_points_are_the_centred_rule_bit_for_bit():
    for activation in ("hard_sigmoid", "sigmoid"):
        net, x, y = network([4, 5, 3], activation), drawn(5, 4).sigmoid(), drawn(5, 3, seed=2).sigmoid()
        one = grads_of(net, x, y, estimator="centered", beta=0.2)
        two = grads_of(net, x, y, estimator="holomorphic", n_points=2, beta=0.2)
        assert all(map(torch.equal, one, two))


def test_half_the_circle_is_the_whole_circle():
    net, x, y = network([2, 3, 2], "identity"), drawn(1, 2), drawn(1, 2, seed=2)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.3)
    for n in (3, 4, 5):
        rows = reference.points("holomorphic", 0.2, n)
        states = [
            [s[0].tolist() for s in relax(net, x, y=y, beta=complex(nudge), steps=200).states]
            for nudge, _ in rows
        ]
        weights = [layer.weight.tolist() for layer in net.connections]
        biases = [layer.bias.tolist() for layer in net.connections]
        dw, db = reference.contrast([c for _, c in rows], x[0].tolist(), states, weights, biases)
        found = grads_of(
            net, x, y, estimator="holomorphic", n_points=n, beta=0.2, free_steps=200, nudge_steps=200
        )
        for k in range(2):
            torch.testing.assert_close(found[2 * k], torch.tensor(dw[k], dtype=DOUBLE), rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(
                found[2 * k + 1], torch.tensor(db[k], dtype=DOUBLE), rtol=1e-9, atol=1e-11
            )


# --- 4: step by step the gradient of truncated back-propagation -------------------------------------------------


def test_every_nudged_step_adds_one_step_of_back_propagation():
    net, x, y = network([3, 4, 2]), drawn(3, seed=1).sigmoid(), torch.tensor([1.0, 0.0], dtype=DOUBLE)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.2).add_(0.4 if p.dim() == 1 else 0.0)
    steady = [s[0] for s in relax(net, x[None], steps=2000, minimizer="euler").states]
    assert all(bool(((s > 0.05) & (s < 0.95)).all()) for s in steady)  # no kink beside the path
    weights, biases = ([getattr(c, n).detach() for c in net.connections] for n in ("weight", "bias"))
    for steps in (1, 2, 3, 6):
        found = grads_of(
            net,
            x[None],
            y[None],
            beta=1e-5,
            minimizer="euler",
            free_steps=2000,
            nudge_steps=steps,
            step_size=0.5,
        )
        wanted = reference.truncated_backpropagation(x, y, steady, weights, biases, steps=steps, eps=0.5)
        for one, other in zip([found[0], found[2], found[1], found[3]], wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_implicit_after_t_sweeps_is_the_limit_of_t_nudged_sweeps():
    net, x, y = network([4, 5, 6, 3]), drawn(5, 4, seed=1).sigmoid(), drawn(5, 3, seed=2).sigmoid()
    for steps in (1, 2, 4):
        same = {"free_steps": 300, "nudge_steps": steps}
        limit = grads_of(net, x, y, estimator="implicit", **same)
        near = grads_of(net, x, y, estimator="centered", beta=1e-5, **same)
        for one, other in zip(near, limit, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)


# --- 5: energy falls --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minimizer", ["euler", "async"])
@pytest.mark.parametrize("activation", ["hard_sigmoid", "half_hard_sigmoid", "sigmoid", "tanh"])
@torch.no_grad()
def test_no_step_raises_the_energy(minimizer, activation):
    net, x = network([4, 6, 5, 3], activation), drawn(7, 4, seed=1).sigmoid()
    states = [torch.full_like(s, 0.4) for s in net.initial(x)]
    energies = [net.energy(x, states)]
    for _ in range(12):
        states = relax(net, x, states=states, steps=1, minimizer=minimizer, step_size=0.2).states
        energies.append(net.energy(x, states))
    falls = torch.stack(energies).diff(dim=0)
    assert float(falls.max()) <= 1e-12
    assert float(falls[0].max()) < -1e-4


def test_every_layer_minimiser_is_the_minimum_of_its_layer():
    """Against a fine grid over one unit, for each activation and with a nudge."""
    grid = torch.linspace(0.001, 0.999, 999, dtype=DOUBLE)
    for activation in ("hard_sigmoid", "half_hard_sigmoid", "sigmoid"):
        net, x, y = (
            network([2, 3, 1], activation),
            drawn(1, 2).sigmoid(),
            torch.full((1, 1), 0.9, dtype=DOUBLE),
        )
        hidden, _ = relax(net, x, steps=3).states
        # The hidden layer is updated after the output: the output stands at the minimum for the hidden layer before.
        found = relax(
            net, x, y=y, beta=0.3, steps=1, states=[hidden, torch.zeros(1, 1, dtype=DOUBLE)]
        ).states[1]
        value = net.energy(x, [hidden.expand(999, -1), grid[:, None]]) + 0.15 * (grid - 0.9) ** 2
        assert float(found) == pytest.approx(float(grid[value.argmin()]), abs=1.1e-3)


# --- 6 to 8 -----------------------------------------------------------------------------------------------------


def test_weak_feedback_is_back_propagation():
    x, y = drawn(6, 4, seed=1).sigmoid(), drawn(6, 3, seed=2).sigmoid()
    cosines = []
    for scale in (0.5, 0.05, 0.005):
        net = network([4, 8, 3], "sigmoid")
        net.connections[1].weight.data *= scale
        hidden = grads_of(net, x, y, estimator="centered", beta=0.01, free_steps=100, nudge_steps=100)[0]
        ws = [(c.weight.detach().requires_grad_(), c.bias.detach()) for c in net.connections]
        out = x
        for w, b in ws:
            out = torch.sigmoid(4 * (out @ w.T + b) - 2)
        (plain,) = torch.autograd.grad(0.5 * (out - y).square().sum(1).mean(), [ws[0][0]])
        cosines.append(float(torch.cosine_similarity(hidden.flatten(), plain.flatten(), dim=0)))
    assert cosines[0] < cosines[1] < cosines[2]
    assert cosines[2] > 0.9999


def test_a_reached_target_gives_no_gradient():
    net, x = network([4, 5, 3]), drawn(5, 4).sigmoid()
    y = relax(net, x, steps=500).states[-1]
    for estimator in (*ONE_SIDED, "centered", "implicit"):
        found = grads_of(net, x, y, estimator=estimator, free_steps=500)
        assert max(float(g.abs().max()) for g in found) < 1e-14


@pytest.mark.parametrize("estimator", [*ONE_SIDED, "centered", "implicit"])
def test_a_batch_is_the_mean_of_its_examples_in_any_order(estimator):
    net, x, y = network([4, 5, 3]), drawn(5, 4).sigmoid(), drawn(5, 3, seed=2).sigmoid()
    whole = grads_of(net, x, y, estimator=estimator)
    order = torch.tensor([3, 1, 4, 0, 2])
    turned = grads_of(net, x[order], y[order], estimator=estimator)
    single = [grads_of(net, x[i : i + 1], y[i : i + 1], estimator=estimator) for i in range(5)]
    for number, grad in enumerate(whole):
        torch.testing.assert_close(turned[number], grad, rtol=1e-10, atol=1e-13)
        mean = torch.stack([each[number] for each in single]).mean(0)
        torch.testing.assert_close(mean, grad, rtol=1e-10, atol=1e-13)
