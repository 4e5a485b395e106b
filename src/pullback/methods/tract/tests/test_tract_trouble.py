"""Bad input: refused by name, value and fix, or defined behaviour."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from pullback.core.attachment import attach
from pullback.methods.tract import TrAct, precondition_input, tract

untyped: Any = tract
W, X = torch.randn(3, 4), torch.randn(6, 4)


def grad_of(parameter):
    """The gradient that has arrived."""
    assert parameter.grad is not None
    return parameter.grad


class Own(nn.Linear):
    """A layer whose forward we cannot know."""


def parametrised():
    return parametrizations.weight_norm(nn.Linear(4, 3))


def treated():
    layer = nn.Linear(4, 3)
    tract(layer)
    return layer


def sparse():
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(torch.eye(3, 4).to_sparse())
    return layer


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: tract(nn.Linear(4, 3), lam=0.0),
            ValueError,
            r"lam must be > 0, got 0\.0\. The damping keeps",
        ),
        (lambda: tract(nn.Linear(4, 3), lam=-0.1), ValueError, r"lam must be > 0, got -0\.1"),
        (lambda: tract(nn.Linear(4, 3), lam=math.inf), ValueError, "lam must be > 0, got inf"),
        (lambda: tract(nn.Linear(4, 3), lam=math.nan), ValueError, "lam must be > 0, got nan"),
        (lambda: untyped(nn.Linear(4, 3), lam="0.1"), TypeError, "lam must be a number"),
        (lambda: tract(nn.Linear(4, 3), lam=lambda p: -1.0), ValueError, r"lam\(0\) must be > 0, got -1"),
        (lambda: untyped(W), TypeError, "layer must be of type Module, got Tensor"),
        (
            lambda: tract(nn.Embedding(4, 3)),
            TypeError,
            "layer must be one of Linear.*got Embedding.*precondition_input",
        ),
        (lambda: tract(nn.ConvTranspose2d(1, 1, 3)), TypeError, "layer must be one of .*got ConvTranspose2d"),
        (lambda: tract(nn.Bilinear(2, 2, 1)), TypeError, "layer must be one of .*got Bilinear"),
        (
            lambda: tract(nn.MultiheadAttention(4, 1)),
            TypeError,
            "layer must be one of .*got MultiheadAttention",
        ),
        (lambda: tract(Own(4, 3)), TypeError, "layer must be one of .*got Own.*precondition_input"),
        (
            lambda: tract(nn.Sequential(nn.Flatten(), nn.Linear(4, 3))),
            TypeError,
            r"got Sequential\. Pass the layer that sees the data; the first one inside is 1 \(Linear\)",
        ),
        (
            lambda: tract(nn.LazyLinear(3)),
            TypeError,
            "layer must have its weight, got the uninitialised LazyLinear",
        ),
        (lambda: tract(parametrised()), ValueError, "layer must have a plain weight, got ParametrizedLinear"),
        (
            lambda: tract(treated()),
            ValueError,
            r"got TrActLinear, which is treated already.*tract\.remove\(\)",
        ),
        (
            lambda: tract(nn.Linear(4, 3, dtype=torch.complex64)),
            TypeError,
            "layer.weight must be real.*got torch.complex64",
        ),
        (
            lambda: tract(sparse()),
            TypeError,
            "layer.weight must be real, floating and dense, got torch.sparse_coo",
        ),
        (
            lambda: tract(nn.Linear(4, 3), sync_covariance=True),
            RuntimeError,
            "sync_covariance needs connected processes",
        ),
        (lambda: TrAct().set(0.0), ValueError, "lam must be > 0, got 0"),
        (lambda: TrAct().progress(1.5), ValueError, r"p must be in \[0, 1\], got 1.5"),
        (lambda: TrAct(lambda p: 1.0 - p).progress(1.0), ValueError, r"lam\(1\) must be > 0, got 0"),
        (
            lambda: setattr(treated().tract, "enabled", "no"),
            TypeError,
            "enabled must be of type bool, got str",
        ),
        (lambda: precondition_input(W, X, 0.0), ValueError, "lam must be > 0, got 0"),
        (
            lambda: precondition_input(W, X, torch.ones(2)),
            ValueError,
            r"lam must be a number or a 0-dim tensor, got",
        ),
        (
            lambda: precondition_input(W, X[:, :3]),
            ValueError,
            r"x must have 4 entries in its last dimension.*\(6, 3\)",
        ),
        (lambda: precondition_input(W[0], X), ValueError, r"weight must have rows, got shape \(4,\)"),
        (lambda: precondition_input(W, X.long()), TypeError, "x must be a floating tensor"),
        (lambda: precondition_input(W + 0j, X), TypeError, "weight must be a floating tensor"),
        (
            lambda: precondition_input(W, X.to_sparse()),
            TypeError,
            "x must be dense, got layout torch.sparse_coo",
        ),
    ],
)
def test_what_makes_no_sense_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_refused_layer_is_left_as_it_was():
    layer = nn.Linear(4, 3)
    keys = set(vars(layer))
    with pytest.raises(ValueError, match="lam must be > 0"):
        tract(layer, lam=-1.0)
    assert type(layer) is nn.Linear
    assert set(vars(layer)) == keys


def test_a_parametrization_after_tract_gets_the_edited_gradient_and_stands_in_the_way_of_removal():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer, x = nn.Linear(4, 3), torch.randn(9, 4)
    handle = tract(layer, lam=0.5)
    parametrize.register_parametrization(layer, "weight", Double())
    hidden: Any = layer.parametrizations
    (grad,) = torch.autograd.grad(layer(x).sum(), [hidden.weight.original])
    inverse = torch.linalg.inv(x.T @ x / 9 + 0.5 * torch.eye(4))
    torch.testing.assert_close(grad, 2 * torch.ones(3, 9) @ x @ inverse)
    with pytest.raises(
        RuntimeError, match="must have the class that tract gave it, got ParametrizedTrActLinear"
    ):
        handle.remove()
    parametrize.remove_parametrizations(layer, "weight")
    handle.remove()
    assert type(layer) is nn.Linear


def test_a_frozen_weight_costs_nothing_and_can_thaw():
    layer, x = nn.Linear(4, 3), torch.randn(9, 4, requires_grad=True)
    tract(layer)
    layer.weight.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x).sum().backward()
    assert len(kept) == 1  # the weight, for the gradient of the input
    assert layer.weight.grad is None
    layer.weight.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_a_weight_that_gets_no_gradient_passes_as_it_is():
    weight, x = torch.randn(3, 4), torch.randn(9, 4, requires_grad=True)
    assert precondition_input(weight, x) is weight
    with torch.no_grad():
        assert precondition_input(weight.requires_grad_(), x) is weight
    assert precondition_input(weight, x) is not weight


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv2d(4, 3, 2), nn.Conv1d(4, 2, 3, groups=2)])
def test_an_empty_batch_gives_zeros(layer):
    shape = {nn.Linear: (0, 4), nn.Conv2d: (0, 4, 5, 5), nn.Conv1d: (0, 4, 5)}[type(layer)]
    with tract(layer):
        layer(torch.zeros(shape)).sum().backward()
    assert not grad_of(layer.weight).any()
    assert grad_of(layer.weight).shape == layer.weight.shape


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_layers_without_entries():
    for layer, x in ((nn.Linear(4, 0), torch.ones(2, 4)), (nn.Linear(0, 3), torch.ones(2, 0))):
        tract(layer)
        layer(x).sum().backward()
        assert layer.weight.grad is not None
        assert grad_of(layer.weight).shape == layer.weight.shape


def test_zero_inputs_and_constant_columns_are_fine():
    layer = nn.Linear(3, 2)
    tract(layer)
    layer(torch.zeros(5, 3)).sum().backward()
    assert not grad_of(layer.weight).any()
    layer.zero_grad()
    layer(torch.tensor([[1.0, 1.0, 0.0]]).repeat(5, 1)).sum().backward()
    assert grad_of(layer.weight).isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [2, 9])
def test_one_input_that_is_not_finite_spoils_the_whole_weight_gradient_and_says_so(bad, rows):
    layer, x = nn.Linear(4, 3), torch.randn(rows, 4)
    x[1, 2] = bad
    tract(layer)
    (layer(x) * torch.arange(rows)[:, None].eq(0)).nan_to_num(0.0, 0.0, 0.0).sum().backward()
    assert grad_of(layer.weight).isnan().all()
    assert grad_of(layer.bias).isfinite().all()


def test_the_policy_of_the_attachment_leaves_such_a_step_out():
    layer, x = nn.Linear(4, 3), torch.randn(9, 4)
    tract(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    handle = attach(optimizer, nonfinite="skip")
    before = [p.detach().clone() for p in layer.parameters()]
    x[0, 0] = math.nan
    layer(x).sum().backward()
    optimizer.step()
    assert handle.skipped == 1
    assert all(torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True))


@pytest.mark.parametrize("size", [1e-15, 1.0, 255.0, 1e8, 1e15])
@pytest.mark.parametrize("rows", [30, 400])
def test_inputs_of_any_size_are_solved_for_in_float32(size, rows):
    """Bytes as inputs: the damping is far below a rounding error of the covariance, which must still be inverted."""
    layer, g = nn.Linear(40, 3), torch.Generator().manual_seed(0)
    x = size * (1.0 + 1e-3 * torch.randn(rows, 40, generator=g))
    outer = torch.randn(rows, 3, generator=g)
    tract(layer)
    layer(x).backward(outer)
    covariance = x.double().T @ x.double() / rows
    damping = max(0.1, 16 * torch.finfo(torch.float32).eps * float(covariance.trace()))
    wanted = outer.double().T @ x.double() @ torch.linalg.inv(covariance + damping * torch.eye(40))
    assert (grad_of(layer.weight) - wanted).norm() < 0.05 * wanted.norm()
