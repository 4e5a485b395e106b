"""What is kept by example; costs of complex outputs; remarks; the state of a learner."""

import copy
import warnings

import pytest
import torch
from torch import nn

from pullback.core.costs import CrossEntropy, CustomCost, SquaredError, cost_of
from pullback.core.holomorphic import derivative, is_holomorphic
from pullback.core.learner_state import check_learner_state, learner_state, load_learner_state
from pullback.core.once import Reporter
from pullback.core.samples import SampleStore
from pullback.core.state import StateError

DOUBLE = torch.float64

# --- samples ----------------------------------------------------------------------------------------------------


def kept(store, x, index):
    place, prints = store.check(index, x)
    rows = [x[:, :2] * 10, x.sum(1, keepdim=True)]
    store.write(place, prints, rows)
    return rows


def test_rows_follow_their_example_and_the_store_grows():
    x, store = torch.rand(6, 4), SampleStore()
    rows = kept(store, x[:3], torch.tensor([4, 0, 9]))
    more = kept(store, x[3:], torch.tensor([30, 1, 2]))
    default = [torch.full((3, 2), -1.0), torch.full((3, 1), -1.0)]
    found = store.read(torch.tensor([9, 30, 7]), default)
    assert torch.equal(found[0], torch.stack([rows[0][2], more[0][0], default[0][0]]))
    assert torch.equal(store.read(torch.tensor([0, 99, 4]), default)[1][:, 0], torch.stack(
        [rows[1][1, 0], default[1][0, 0], rows[1][0, 0]]))  # fmt: skip


def test_the_same_example_may_come_back_and_another_may_not():
    x, store = torch.rand(4, 3, 2), SampleStore()
    index = torch.arange(4)
    kept(store, x.flatten(1), index)
    store.check(index.flip(0), x.flatten(1).flip(0))
    with pytest.raises(ValueError, match="index must stand for the same example every time, got 0"):
        store.check(index, x.flatten(1).roll(1, 0))


def test_a_saved_store_is_a_copy_and_is_checked():
    x, store, fresh = torch.rand(3, 4), SampleStore(), SampleStore()
    kept(store, x, torch.arange(3))
    state = store.state_dict()
    before = copy.deepcopy(state)
    kept(store, x * 1.0, torch.arange(3))
    store.rows[0].zero_()
    assert torch.equal(state["rows"][0], before["rows"][0])
    SampleStore.check_state("store", state)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.read(torch.arange(3), [torch.zeros(3, 2), torch.zeros(3, 1)])[0], x[:, :2] * 10)
    for bad in ({}, {**state, "rows": [torch.zeros(2, 2)]}, {**state, "prints": None}, {**state, "more": 1}):
        with pytest.raises(StateError, match="store must hold rows and prints"):
            SampleStore.check_state("store", bad)


# --- costs ------------------------------------------------------------------------------------------------------


def readout():
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


@pytest.mark.parametrize(
    "cost",
    [
        SquaredError(),
        CrossEntropy(readout()),
        CustomCost(lambda out, y: (out - 1.0).pow(3).sum(1) * y.sum(1)),
    ],
    ids=["mse", "cross_entropy", "custom"],
)
def test_pulls_are_derivatives_of_real_and_complex_outputs(cost):
    g = torch.Generator().manual_seed(1)
    out = torch.randn(5, 4, generator=g, dtype=DOUBLE)
    y = torch.arange(5) % 3 if isinstance(cost, CrossEntropy) else torch.rand(5, 4, generator=g, dtype=DOUBLE)
    target = cost.target(y, out)
    for point in (out, torch.complex(out, 0.3 * out.flip(0))):
        held = point.clone().requires_grad_()
        torch.testing.assert_close(
            cost.pull(point, target).detach(), derivative(cost.value(held, target), [held])[0]
        )


def test_cross_entropy_is_that_of_torch_and_so_are_its_gradients():
    layer, out, y = readout(), torch.randn(5, 4, dtype=DOUBLE), torch.tensor([0, 1, 2, 1, 0])
    cost = CrossEntropy(layer)
    target = cost.target(y, out)
    wanted = nn.functional.cross_entropy(layer(out), y, reduction="none")
    torch.testing.assert_close(cost.value(out, target), wanted)
    grads = torch.autograd.grad(wanted.mean(), [layer.weight, layer.bias])
    found = cost.gradients(out, target, torch.full((5, 1), 0.2, dtype=DOUBLE))
    torch.testing.assert_close(found[layer.weight].detach(), grads[0])
    torch.testing.assert_close(found[layer.bias].detach(), grads[1])


def test_costs_by_name():
    assert isinstance(cost_of("mse", None), SquaredError)
    assert isinstance(cost_of("cross_entropy", readout()), CrossEntropy)
    with pytest.raises(ValueError, match="cost must be one of 'mse', 'cross_entropy', got 'nll'"):
        cost_of("nll", None)
    with pytest.raises(ValueError, match="must have a read-out"):
        cost_of("cross_entropy", None)


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (lambda p: p[0].pow(3) + p[1].exp(), True),
        (lambda p: p[0] * p[1].conj(), False),
        (lambda p: p[0].abs(), False),
        (lambda p: p[0].real * 1.0, False),
        (lambda p: p[0].clamp(0, 1), False),
    ],
)
def test_holomorphic_functions_are_told_from_others(function, wanted):
    assert is_holomorphic(function, [torch.tensor([0.3, -0.7]), torch.tensor([0.1, 0.9])]) is wanted


# --- remarks and states -----------------------------------------------------------------------------------------


def test_each_remark_is_made_once():
    say = Reporter("warn")
    with pytest.warns(RuntimeWarning, match="first"):
        say("a", "first")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        say("a", "again")
        Reporter("ignore")("b", "never")
    with pytest.warns(RuntimeWarning, match="second"):
        say("b", "second")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="loud"):
            Reporter("raise")("a", "loud")


def learner(features=3):
    torch.manual_seed(0)
    model = nn.Linear(features, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def test_a_learners_state_is_checked_whole_before_it_is_loaded():
    model, optimizer = learner()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = learner_state(1, {"steps": 4}, model, optimizer)
    other, fresh = learner()
    check_learner_state("L", state, 1, {"steps": 0}, other, fresh)
    load_learner_state("L", state, other, fresh)
    assert torch.equal(other.weight, model.weight)
    momentum = fresh.state[other.weight]["momentum_buffer"]
    assert torch.equal(momentum, optimizer.state[model.weight]["momentum_buffer"])
    assert momentum is not optimizer.state[model.weight]["momentum_buffer"]
    wide, its = learner(4)
    two = torch.optim.SGD([{"params": [other.weight]}, {"params": [other.bias]}], lr=0.1)
    for case, parts in (
        (state, (wide, its)),
        (state, (other, two)),
        ({**state, "steps": -1}, (other, fresh)),
        ({**state, "format_version": 2}, (other, fresh)),
        ({**state, "optimizer": {}}, (other, fresh)),
        (state, (other, None)),
    ):
        with pytest.raises(StateError, match="L"):
            check_learner_state("L", case, 1, {"steps": 0}, *parts)


def test_without_an_optimizer_nothing_of_the_users_is_saved():
    model, _ = learner()
    state = learner_state(1, {"steps": 0}, model, None)
    assert state["model"] == {} == state["optimizer"]
    check_learner_state("L", state, 1, {"steps": 0}, model, None)
    before = model.weight.clone()
    load_learner_state("L", state, model, None)
    assert torch.equal(model.weight, before)
