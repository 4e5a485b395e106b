"""The user's own loop: optimizers, accumulation, precision, persistent states, resuming, counted cost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from pullback.core.peak_bytes import PeakBytes
from pullback.methods.eqprop import EquilibriumProp, HopfieldConvNet, HopfieldMLP, relax


def data(n=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return torch.rand(n, 6, generator=g) * 0.5 + torch.eye(3).repeat(1, 2)[y] * 0.8, y


def network(*sizes):
    torch.manual_seed(1)
    return HopfieldMLP([6, *(sizes or (10,)), 3])


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


# --- optimizers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda net: torch.optim.SGD(net.layer_groups([0.2, 0.1]), momentum=0.5),
        lambda net: torch.optim.Adam(net.parameters(), lr=0.02),
        lambda net: torch.optim.RMSprop(net.parameters(), lr=0.004),
    ],
    ids=["sgd", "adam", "rmsprop"],
)
@pytest.mark.parametrize("estimator", ["positive", "random_sign", "centered", "implicit"])
def test_any_optimizer_learns(make, estimator):
    net, (x, y) = network(), data()
    optimizer, ep = make(net), EquilibriumProp(net, estimator=estimator, beta=0.3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.5)
    costs = []
    for _ in range(40):
        optimizer.zero_grad()
        costs.append(ep.backward(x, y).cost)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    assert costs[-1] < 0.5 * costs[0]
    assert float((ep.predict(x).argmax(1) == y).float().mean()) == 1.0


def test_a_closure_works():
    net, (x, y) = network(), data()
    ep, optimizer = EquilibriumProp(net), torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=5)

    def closure():
        optimizer.zero_grad()
        return ep.backward(x, y).cost

    first = closure()
    optimizer.step(closure)
    assert closure() < first


def test_accumulated_batches_are_one_batch():
    net, (x, y) = network(), data()
    ep = EquilibriumProp(net)
    ep.backward(x, y)
    whole = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    for part in range(4):
        ep.backward(x[part::4], y[part::4], weight=0.25)
    for p, grad in zip(net.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)


def test_frozen_parameters_keep_no_gradient():
    net, (x, y) = network(), data()
    net.connections[0].weight.requires_grad_(False)
    for estimator in ("centered", "implicit"):
        EquilibriumProp(net, estimator=estimator).backward(x, y)
        assert net.connections[0].weight.grad is None
        assert net.connections[1].weight.grad is not None


def test_autocast_and_scaler_change_nothing():
    net, (x, y) = network(), data()
    optimizer, ep = torch.optim.SGD(net.parameters(), lr=0.1), EquilibriumProp(net)
    ep.backward(x, y)
    plain = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ep.backward(x.clone(), y, weight=scaler.scale(torch.ones(())))
    scaler.unscale_(optimizer)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(net.parameters(), plain, strict=True))
    before = flat(net)
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(flat(net), before)


def test_relaxation_compiles():
    net, (x, y) = network(), data()
    compiled: Any = torch.compile(relax, backend="eager", fullgraph=True)
    goals = torch.eye(3)[y]  # class numbers are looked at by the host
    settings: list[dict[str, Any]] = [
        {},
        {"y": goals, "beta": 0.2},
        {"y": goals, "beta": 0.2, "minimizer": "euler"},
    ]
    for each in settings:
        for one, other in zip(
            compiled(net, x, steps=5, **each).states,
            relax(net, x, steps=5, **each).states,
            strict=True,
        ):
            torch.testing.assert_close(one, other)


# --- persistent states ------------------------------------------------------------------------------------------


def test_persistent_states_go_on_where_they_were():
    net, (x, y) = network(), data()
    ep = EquilibriumProp(net, persistent=True, free_steps=3, unsettled="ignore")
    order = torch.tensor([5, 2, 9, 0])
    for _ in range(2):
        ep.backward(x[order], y[order], index=order)
    wanted = relax(net, x[order], steps=6).states
    back = torch.tensor([9, 5])  # other places in the batch, other company
    for row, state in zip(ep.store.read(back, [torch.zeros(2, 10), torch.zeros(2, 3)]), wanted, strict=True):
        torch.testing.assert_close(row, state[[2, 0]])
    new = ep.store.read(torch.tensor([1, 23]), [torch.full((2, 10), 7.0), torch.full((2, 3), 7.0)])
    assert all(bool((row == 7.0).all()) for row in new)


def test_states_are_never_carried_to_other_samples():
    net, (x, y) = network(), data()
    ep = EquilibriumProp(net, persistent=True)
    ep.backward(x[:8], y[:8], index=torch.arange(8))
    before, grads = ep.state_dict(), [p.grad.clone() for p in net.parameters()]
    with pytest.raises(
        ValueError, match="index must stand for the same example every time, got 0 with another input"
    ):
        ep.backward(x[8:16], y[8:16], index=torch.arange(8))
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))
    assert torch.equal(before["states"]["rows"][0], ep.state_dict()["states"]["rows"][0])


@pytest.mark.parametrize(
    ("index", "error", "text"),
    [
        (None, ValueError, "index must be given if and only if persistent=True, got None"),
        (torch.arange(3), ValueError, r"index must have shape \(4,\), got \(3,\)"),
        (torch.tensor([0, 1, 1, 2]), ValueError, "index must be distinct and >= 0"),
        (torch.tensor([0, 1, -1, 2]), ValueError, "index must be distinct and >= 0"),
        (torch.arange(4.0), TypeError, "index must be an int64 tensor"),
    ],
)
def test_a_wrong_index_is_refused(index, error, text):
    net, (x, y) = network(), data()
    with pytest.raises(error, match=text):
        EquilibriumProp(net, persistent=True).backward(x[:4], y[:4], index=index)


def test_an_index_without_persistent_states_is_refused():
    net, (x, y) = network(), data()
    with pytest.raises(ValueError, match="if and only if persistent=True"):
        EquilibriumProp(net).backward(x, y, index=torch.arange(24))


# --- resuming ---------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_bitwise_the_uninterrupted_one():
    x, y = data()

    def learner():
        net = network()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        return EquilibriumProp(
            net, optimizer, estimator="random_sign", persistent=True, free_steps=4, unsettled="ignore"
        )

    def batch(step):
        rows = torch.randperm(24, generator=torch.Generator().manual_seed(step))[:8]
        return rows, x[rows], y[rows]

    straight, first, second = learner(), learner(), learner()
    for step in range(10):
        straight.step(batch(step))
        if step < 5:
            first.step(batch(step))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(5, 10):
        second.step(batch(step))
    assert torch.equal(flat(second.model), flat(straight.model))


def test_model_and_optimizer_of_the_users_own_are_not_in_the_state():
    ep = EquilibriumProp(network())
    assert ep.state_dict()["model"] == {} == ep.state_dict()["optimizer"]
    with pytest.raises(RuntimeError, match=r"optimizer must be given for step\(\), got None"):
        ep.step(data())


# --- cost -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "phases"),
    [("positive", 1), ("random_sign", 1), ("centered", 2), ("holomorphic", 3), ("implicit", 0)],
)
def test_relaxation_steps_are_counted(monkeypatch, estimator, phases):
    """free_steps of the batch, nudge_steps of all nudged phases at once; the input's product is taken once."""
    torch.manual_seed(1)
    net, (x, y) = HopfieldMLP([6, 10, 3], "sigmoid"), data()
    rows, held = [], []
    sweep, hold = type(net).sweep, type(net).hold
    monkeypatch.setattr(type(net), "sweep", lambda self, *a: rows.append(len(a[1][0])) or sweep(self, *a))
    monkeypatch.setattr(type(net), "hold", lambda self, x: held.append(len(x)) or hold(self, x))
    EquilibriumProp(net, estimator=estimator, free_steps=20, nudge_steps=4).backward(x, y)
    assert rows == [24] * 20 + ([24 * phases] * 4 if phases else [])
    assert held == [24]


def test_memory_does_not_depend_on_the_number_of_steps():
    net, (x, y) = network(20, 20), data()
    peaks = []
    for steps in (10, 80):
        ep = EquilibriumProp(net, free_steps=steps, unsettled="ignore")
        with PeakBytes(x, y, *net.parameters()) as meter:
            ep.backward(x, y)
        peaks.append(meter.most)
        net.zero_grad()
    assert peaks[1] <= 1.02 * peaks[0]


def test_nothing_of_a_dense_network_is_saved_for_backward():
    net, (x, y) = network(), data()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        for estimator in ("positive", "random_sign", "centered"):
            EquilibriumProp(net, estimator=estimator).backward(x, y)
    assert saved == []


def test_one_example_and_a_convolution_learn():
    torch.manual_seed(0)
    net = HopfieldConvNet((1, 4, 4), [3], 2)
    ep = EquilibriumProp(net, torch.optim.SGD(net.parameters(), lr=0.2))
    x, y = torch.rand(1, 1, 4, 4), torch.tensor([1])
    losses = [ep.step((x, y))["loss"] for _ in range(20)]
    assert losses[-1] < 0.1 * losses[0]
