"""Exchanged activations: counted, shared ones once, by exact type; what was not reached is told."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from pullback.methods.elu import SReLU, functional_calls, swap_activations

untyped: Any = swap_activations


class Gate(nn.Module):
    """Squeeze and excitation: a gate that must not be swapped by accident."""

    def __init__(self):
        super().__init__()
        self.down, self.act, self.up, self.gate = nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4), nn.Sigmoid()

    def forward(self, x):
        return x * self.gate(self.up(self.act(self.down(x))))


class Own(nn.ReLU):
    """A subclass: not meant unless it is named."""


class Functional(nn.Module):
    """Calls functions; its attribute ``relu`` is a module all the same."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.relu = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()

    def forward(self, x):
        return self.relu(self.two(functional.relu(self.one(x)).tanh()))


class Comprehending(nn.Module):
    """Calls a method of a tensor inside a comprehension."""

    def forward(self, xs):
        return [x.relu_() for x in xs]


def test_all_are_replaced_and_counted():
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(Gate(), nn.ReLU(), nn.GELU()), Own())
    keys = list(model.state_dict())
    assert swap_activations(model, nn.ReLU, lambda: nn.ELU(alpha=0.5)) == 3
    assert [type(model[1]), type(model[2][1]), type(model[2][2]), type(model[3])] == [
        nn.ELU,
        nn.ELU,
        nn.GELU,
        Own,
    ]
    assert (type(model[2][0].act), type(model[2][0].gate)) == (nn.ELU, nn.Sigmoid)
    assert list(model.state_dict()) == keys
    assert swap_activations(model, (nn.ELU, nn.GELU), SReLU) == 4
    assert swap_activations(model, Own, nn.ELU) == 1
    with pytest.raises(
        ValueError, match=r"match must fit a module of the model, got ReLU and no such module\..*SReLU"
    ):
        swap_activations(model, nn.ReLU, nn.ELU)


def test_shared_instances_are_replaced_once_and_stay_shared():
    act = nn.ReLU()
    model: Any = nn.ModuleDict(
        {"a": nn.Sequential(nn.Linear(2, 2), act), "b": nn.Sequential(act, nn.ReLU()), "c": act}
    )
    assert swap_activations(model, nn.ReLU, nn.ELU) == 2
    assert model["a"][1] is model["b"][0] is model["c"]
    assert model["b"][1] is not model["c"]


def test_the_same_activation_again_changes_no_output():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU())
    x = torch.randn(5, 4)
    before = model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    params = list(model.parameters())
    assert swap_activations(model, nn.ReLU, nn.ReLU) == 2
    assert torch.equal(model(x), before)
    assert all(p is q for p, q in zip(model.parameters(), params, strict=True))
    model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(model(x), before)


def test_modes_are_kept_and_copies_work():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.ReLU())
    model[1].eval()
    swap_activations(model, nn.ReLU, nn.ELU)
    assert [m.training for m in model] == [True, False, True]
    assert type(copy.deepcopy(model)[1]) is nn.ELU


def test_new_keys_are_told():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.warns(UserWarning, match=r"keys of the state_dict changed: 1\.weight"):
        swap_activations(model, nn.ReLU, nn.PReLU)


def test_functional_calls_are_told_and_left():
    model = Functional()
    with pytest.warns(
        UserWarning, match=r"functional calls were seen and not replaced: Functional\.forward: relu\. Edit"
    ):
        assert swap_activations(model, nn.ReLU, nn.ELU) == 1
    assert type(model.relu) is nn.ELU
    assert functional_calls(model, nn.Tanh) == ("Functional.forward: tanh",)
    assert functional_calls(model, nn.Sigmoid) == ()
    assert functional_calls(Comprehending(), nn.ReLU) == ("Comprehending.forward: relu_",)
    with pytest.raises(
        ValueError, match=r"got ReLU and no such module\. It calls functions instead: Comprehending"
    ):
        swap_activations(nn.Sequential(Comprehending()), nn.ReLU, nn.ELU)
    gate = Gate()  # its attribute ``act`` is a module, its gate is no ReLU
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap_activations(gate, nn.ReLU, nn.ELU)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_the_fused_path_of_a_transformer_goes_with_it():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=nn.ReLU(), batch_first=True).eval()
    assert swap_activations(layer, nn.ReLU, nn.ELU) == 1
    x = torch.randn(2, 3, 8)
    slow = layer(x)  # gradients wanted: no fused path
    with torch.no_grad():
        torch.testing.assert_close(layer(x), slow)
    plain = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(
        ValueError, match=r"It calls functions instead: TransformerEncoderLayer\.activation = relu"
    ):
        swap_activations(plain, nn.ReLU, nn.ELU)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: untyped(3, nn.ReLU, nn.ELU), TypeError, "model must be of type Module, got int"),
        (
            lambda: untyped(nn.Sequential(nn.ReLU()), nn.ReLU(), nn.ELU),
            TypeError,
            r"match must be a module type.*ReLU\(\)",
        ),
        (
            lambda: untyped(nn.Sequential(nn.ReLU()), (), nn.ELU),
            ValueError,
            r"match must name at least one type, got \(\)",
        ),
        (lambda: untyped(nn.Sequential(nn.ReLU()), int, nn.ELU), TypeError, "match must be a module type"),
        (
            lambda: untyped(nn.Sequential(nn.ReLU()), nn.ReLU, nn.ELU()),
            TypeError,
            r"make must be a function.*ELU",
        ),
        (
            lambda: untyped(nn.Sequential(nn.ReLU()), nn.ReLU, lambda: 3),
            TypeError,
            "make must return a module, got 3",
        ),
        (
            lambda: untyped(nn.ReLU(), nn.ReLU, nn.ELU),
            ValueError,
            "model must hold the activations, got ReLU",
        ),
    ],
)
def test_what_makes_no_sense_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_refused_swap_changes_nothing():
    one = nn.ELU()
    model = nn.Sequential(nn.ReLU(), nn.ReLU())
    with pytest.raises(ValueError, match="make must return a new module each time, got the same ELU twice"):
        swap_activations(model, nn.ReLU, lambda: one)
    handle = model[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="model must have no hooks on what is replaced, got some on a ReLU"):
        swap_activations(model, nn.ReLU, nn.ELU)
    assert [type(m) for m in model] == [nn.ReLU, nn.ReLU]
    handle.remove()
    assert swap_activations(model, nn.ReLU, nn.ELU) == 2
