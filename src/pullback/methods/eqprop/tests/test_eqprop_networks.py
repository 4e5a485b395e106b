"""Relaxation, drives and contrasts of the networks against the reference and against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pullback.core.two_way import Conv
from pullback.methods.eqprop import (
    EnergyFunction,
    EnergyModel,
    EquilibriumProp,
    HopfieldConvNet,
    HopfieldMLP,
    relax,
)
from pullback.methods.eqprop.tests import reference

DOUBLE = torch.float64


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def network(sizes=(3, 4, 3, 2), activation="hard_sigmoid"):
    torch.manual_seed(5)
    net = HopfieldMLP(list(sizes), activation).double()
    for layer in net.connections:
        layer.bias.data += 0.2
    return net


def plain(net):
    return [c.weight.tolist() for c in net.connections], [c.bias.tolist() for c in net.connections]


def close(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.detach(), torch.tensor(other, dtype=DOUBLE), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("nudged", [False, True])
def test_euler_is_the_reference(nudged):
    net, x, y = network(), drawn(3).sigmoid(), [1.0, 0.0]
    more: dict[str, Any] = {"beta": 0.4, "y": y} if nudged else {}
    wanted = reference.euler(
        x.tolist(), [[0.1] * 4, [0.2] * 3, [0.3] * 2], *plain(net), steps=7, eps=0.5, **more
    )
    begin = [torch.full((1, n), v, dtype=DOUBLE) for n, v in ((4, 0.1), (3, 0.2), (2, 0.3))]
    settings: dict[str, Any] = {"beta": 0.4, "y": torch.tensor([y], dtype=DOUBLE)} if nudged else {}
    found = relax(net, x[None], states=begin, steps=7, minimizer="euler", step_size=0.5, **settings)
    close([s[0] for s in found.states], wanted)


@pytest.mark.parametrize("nudged", [False, True])
@pytest.mark.parametrize("sizes", [(3, 4, 3, 2), (3, 4, 2)])
def test_asynchronous_sweeps_are_the_reference(nudged, sizes):
    net, x, y = network(sizes), drawn(3).sigmoid(), [1.0, 0.0]
    first = (len(sizes) - 2) % 2 if nudged else 0  # the output's parity, or that of the layer above the input
    more: dict[str, Any] = {"beta": 0.4, "y": y} if nudged else {}
    start = [[0.1] * n for n in sizes[1:]]
    wanted = reference.asynchronous(x.tolist(), start, *plain(net), steps=3, first=first, **more)
    begin = [torch.full((1, n), 0.1, dtype=DOUBLE) for n in sizes[1:]]
    settings: dict[str, Any] = {"beta": 0.4, "y": torch.tensor([y], dtype=DOUBLE)} if nudged else {}
    close([s[0] for s in relax(net, x[None], states=begin, steps=3, **settings).states], wanted)


@pytest.mark.parametrize("minimizer", ["euler", "async"])
@pytest.mark.parametrize("estimator", ["positive", "negative", "centered"])
def test_gradients_are_the_reference(estimator, minimizer):
    net, x, y, beta = (
        network(),
        drawn(2, 3).sigmoid(),
        torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=DOUBLE),
        0.3,
    )
    EquilibriumProp(
        net,
        estimator=estimator,
        beta=beta,
        free_steps=6,
        nudge_steps=3,
        minimizer=minimizer,
        unsettled="ignore",
    ).backward(x, y)
    sums: Any = None
    for one, goal in zip(x.tolist(), y.tolist(), strict=True):

        def phase(s, steps, goal=None, nudge=0.0, one=one):
            more = {"y": goal, "beta": nudge} if nudge else {}
            if minimizer == "euler":
                return reference.euler(one, s, *plain(net), steps=steps, eps=0.5, **more)
            return reference.asynchronous(one, s, *plain(net), steps=steps, first=0, **more)  # three states

        free = phase([[0.0] * 4, [0.0] * 3, [0.0] * 2], 6)
        rows = reference.points(estimator, beta)
        states = [phase(free, 3, goal, nudge) if nudge else free for nudge, _ in rows]
        dw, db = reference.contrast([c for _, c in rows], one, states, *plain(net))
        parts = [torch.tensor(each, dtype=DOUBLE) for pair in zip(dw, db, strict=True) for each in pair]
        sums = parts if sums is None else [a + b for a, b in zip(sums, parts, strict=True)]
    for p, total in zip(net.parameters(), sums, strict=True):
        torch.testing.assert_close(p.grad, total / 2, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pool", ["max", "avg", "none"])
@pytest.mark.parametrize("size", [4, 5])
def test_convolutions_act_backwards_as_autograd_says(pool, size):
    torch.manual_seed(0)
    conv = Conv(2, 3, pool=pool).double()
    lower = drawn(2, 2, size, size).requires_grad_()
    value = conv(lower)
    upper = drawn(*value.shape, seed=1)
    (wanted,) = torch.autograd.grad(value, lower, upper)
    total = drawn(2, 2, size, size, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(conv.back(total, upper, lower), total + wanted)
        move = drawn(2, 2, size, size, seed=3)
        tiny = 1e-6 * move  # piecewise linear: the difference is exact but for rounding
        tangent = (conv(lower + tiny) - conv(lower - tiny)) / 2e-6
        torch.testing.assert_close(conv.tangent(move, lower), tangent, rtol=1e-7, atol=1e-8)
    assert value.shape[1:] == conv.shape((2, size, size))


@pytest.mark.parametrize(
    "net",
    [network(activation="sigmoid"), HopfieldConvNet((1, 4, 4), [2, 3], 3, pool="max").double()],
    ids=["mlp", "conv"],
)
def test_drives_are_the_derivative_of_the_energy(net):
    shape = (3,) if isinstance(net, HopfieldMLP) else (1, 4, 4)
    x = drawn(2, *shape).sigmoid()
    states = [(0.4 + 0.1 * drawn(2, *s, seed=k)).requires_grad_() for k, s in enumerate(net.shapes(x))]
    forces = torch.autograd.grad(net.energy(x, states).sum(), states)
    for k, (act, s, force) in enumerate(zip(net.activations, states, forces, strict=True)):
        (inverse,) = torch.autograd.grad(act.potential(s).sum(), s)
        torch.testing.assert_close(force, inverse - net.drive(net.hold(x), states, k))
        torch.testing.assert_close(act.call(inverse), s)  # G' is the inverse of sigma
        u = inverse.detach().requires_grad_()
        (slope,) = torch.autograd.grad(act.call(u).sum(), u)
        torch.testing.assert_close(act.slope(s), slope)


def test_the_closed_form_contrast_is_the_one_by_autograd():
    net, x = network(activation="tanh"), drawn(3, 3)
    free = [0.3 * drawn(3, n, seed=n) for n in (4, 3, 2)]
    nudged = [torch.complex(0.3 * drawn(6, n, seed=n + 9), 0.1 * drawn(6, n, seed=n + 20)) for n in (4, 3, 2)]
    weights = torch.tensor([1.0 - 2.0j, 0.5 + 0.3j], dtype=torch.complex128)
    with torch.no_grad():
        mine = net.contrast(x, free, nudged, weights)
    for one, other in zip(mine, EnergyModel.contrast(net, x, free, nudged, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_float32_contrasts_lose_nothing_by_the_products():
    """Rounding of float32 states is all that is left: products of differences add nothing to it."""
    net, x, y = network((30, 20, 4)), drawn(8, 30).sigmoid(), torch.arange(8) % 4
    same: dict[str, Any] = {"beta": 1e-3, "free_steps": 60, "nudge_steps": 30, "unsettled": "ignore"}
    EquilibriumProp(net, **same).backward(x, y)
    wanted = torch.cat([p.grad.flatten() for p in net.parameters()])
    single = net.float()
    single.zero_grad()
    EquilibriumProp(single, **same).backward(x.float(), y)
    found = torch.cat([p.grad.flatten() for p in single.parameters()]).double()
    assert float((found - wanted).norm() / wanted.norm()) < 2e-4


def test_a_function_and_the_network_of_the_same_energy_agree():
    net, x, y = network((3, 4, 2)), drawn(5, 3).sigmoid(), torch.tensor([0, 1, 1, 0, 1])

    def energy(p, x, states):
        hidden, out = states
        total = 0.5 * hidden.pow(2).sum(1) + 0.5 * out.pow(2).sum(1)
        total = total - (hidden * (x @ p["w"].T + p["b"])).sum(1)
        return total - (out * (hidden @ p["v"].T + p["c"])).sum(1)

    names = dict(zip(("w", "b", "v", "c"), (p.detach().clone() for p in net.parameters()), strict=True))
    model = EnergyFunction(energy, names, [(4,), (2,)], bounds=(0.0, 1.0))
    for each in (net, model):
        ep = EquilibriumProp(
            each, beta=0.2, minimizer="euler", free_steps=15, nudge_steps=5, unsettled="ignore"
        )
        ep.backward(x, y)
    for p, q in zip(net.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-12)


def test_groups_give_every_layer_its_rate():
    net = HopfieldMLP([4, 5, 3], readout=2)
    groups = net.layer_groups([0.3, 0.2, 0.1])
    assert [group["lr"] for group in groups] == [0.3, 0.2, 0.1]
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    with pytest.raises(ValueError, match="lrs must hold 3 rates, one for each layer, got 2"):
        net.layer_groups([0.1, 0.1])


def test_inputs_of_any_shape_are_flattened():
    net = network((12, 4, 2))
    x = drawn(3, 1, 3, 4)
    assert torch.equal(net.predict(x), net.predict(x.flatten(1)))


def test_pixels_that_pooling_leaves_over_do_not_matter():
    net = HopfieldConvNet((1, 5, 5), [2], 3, kernel=1).double()
    x = drawn(2, 1, 5, 5)
    other = x.clone()
    other[:, :, 4] = 9.0
    assert torch.equal(net.predict(x), net.predict(other))
