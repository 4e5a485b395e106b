"""The gated perceptron, the choice of its weights, and the probe of gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from pullback.methods import pinn_annealing
from pullback.methods.pinn_annealing import GradientHistograms, glorot_normal_, weight_matrices
from pullback.methods.pinn_annealing.tests import reference
from pullback.methods.pinn_annealing.tests.cases import X, balanced, losses_of, network

ModifiedMLP: Any = pinn_annealing.ModifiedMLP

# --- architecture ---------------------------------------------------------------------------------------------------


def pair(layer):
    return layer.weight, layer.bias


@pytest.mark.parametrize("variant", ["official", "paper"])
@pytest.mark.parametrize("depth", [2, 3])
def test_output_is_the_papers(variant, depth):
    net = ModifiedMLP(3, 4, 2, depth=depth, variant=variant, seed=5, dtype=torch.float64)
    for layer in net.hidden:
        nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(depth))
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden = [pair(layer) for layer in net.hidden]
    wanted = [
        reference.modified_mlp(
            row, pair(net.encoder_u), pair(net.encoder_v), hidden, pair(net.output), variant
        )
        for row in x
    ]
    assert torch.allclose(net(x), torch.tensor(wanted, dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_equal_encoders_leave_an_affine_map_of_them(variant):
    net = ModifiedMLP(2, 5, 1, variant=variant, dtype=torch.float64)
    net.encoder_v.load_state_dict(net.encoder_u.state_dict())
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = net.output(torch.tanh(net.encoder_u(x)))
    assert torch.allclose(net(x), wanted, rtol=1e-12)
    nn.init.normal_(net.hidden[1].weight)
    assert torch.allclose(net(x), wanted, rtol=1e-12)


@pytest.mark.parametrize(("inputs", "hidden", "depth"), [(2, 50, 3), (3, 7, 5)])
def test_parameter_count(inputs, hidden, depth):
    net = ModifiedMLP(inputs, hidden, 1, depth=depth)
    plain = inputs * hidden + hidden + (depth - 1) * (hidden * hidden + hidden) + hidden + 1
    assert sum(p.numel() for p in net.parameters()) == plain + 2 * (inputs * hidden + hidden)


def test_weights_are_glorot_normal_and_biases_as_published():
    net = ModifiedMLP(60, 100, 40, depth=2, seed=3)
    for layer in (*net.hidden, net.output, net.encoder_u, net.encoder_v):
        std = math.sqrt(2 / (layer.in_features + layer.out_features))
        assert layer.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * layer.weight.numel()))
        assert abs(layer.weight.mean().item()) < 5 * std / math.sqrt(layer.weight.numel())
    assert all(bool((layer.bias == 0).all()) for layer in (*net.hidden, net.output))
    biases = torch.cat([net.encoder_u.bias, net.encoder_v.bias])
    assert biases.std().item() == pytest.approx(math.sqrt(2 / 101), rel=5 / math.sqrt(400))
    assert not torch.equal(net.encoder_u.bias, net.encoder_v.bias)


def test_seeds_and_global_generator():
    before = torch.get_rng_state()
    first, again, other = (ModifiedMLP(2, 4, 1, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.output.weight, again.output.weight)
    assert not torch.equal(first.output.weight, other.output.weight)
    plain = nn.Sequential(
        nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 1)
    )
    glorot_normal_(plain)
    linear = [layer for layer in plain if isinstance(layer, nn.Linear)]
    ours = [*first.hidden, first.output]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(linear, ours, strict=True))


def test_glorot_needs_a_linear_layer():
    with pytest.raises(ValueError, match="got none in Tanh"):
        glorot_normal_(nn.Tanh())


# --- choice of parameters -------------------------------------------------------------------------------------------


def test_weight_matrices_leave_out_biases_scales_and_encoders():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.LayerNorm(4), ModifiedMLP(4, 5, 1, depth=2))
    names = list(weight_matrices(model))
    assert names == ["0.weight", "2.hidden.0.weight", "2.hidden.1.weight", "2.output.weight"]
    assert list(weight_matrices(model, exclude=["2.*"])) == ["0.weight"]
    assert list(weight_matrices(model, exclude="0.weight")) == names[1:]
    model[0].weight.requires_grad_(False)
    assert list(weight_matrices(model)) == names[1:]
    assert next(iter(weight_matrices(dict(model[2].named_parameters())))) == "hidden.0.weight"
    with pytest.raises(ValueError, match="trainable weight matrix"):
        weight_matrices(nn.LayerNorm(3))


# --- histograms -----------------------------------------------------------------------------------------------------


def test_histograms_hold_every_entry():
    net = network()
    losses = losses_of(net)
    table = GradientHistograms(bins=15)(losses, net)
    assert table.losses == ("residual", "data", "prior")
    assert table.layers == tuple(name for name, _ in net.named_parameters())
    sizes = torch.tensor([p.numel() for p in net.parameters()])
    assert torch.equal(table.counts.sum(-1), sizes.expand(3, -1))
    for k, loss in enumerate(losses.values()):
        for at, grad in enumerate(torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)):
            assert table.maximum[k, at] == grad.abs().max()
            assert torch.allclose(table.mean[k, at], grad.abs().mean(), rtol=1e-12)
            assert torch.allclose(table.norm[k, at], grad.norm(), rtol=1e-12)
            edges = table.edges[at]
            inner = torch.bucketize(grad.flatten(), edges[1:-1])
            assert (torch.bincount(inner, minlength=15) - table.counts[k, at]).abs().sum() <= 2  # at borders
    area = (table.density() * (table.edges[:, 1:] - table.edges[:, :-1])).sum(-1)
    assert torch.allclose(area, torch.ones_like(area))
    assert torch.allclose(table.edges, -table.edges.flip(1))


def test_the_balance_shows_weighted_gradients_and_leaves_no_trace():
    net = network()
    balance = balanced(net, initial={"data": 4.0})
    losses = losses_of(net)
    weighted, bare = (balance.gradient_histograms(losses, weighted=each) for each in (True, False))
    assert torch.allclose(weighted.mean[1], 4 * bare.mean[1])
    assert torch.equal(weighted.mean[0], bare.mean[0])
    assert balance.steps.item() == balance.updates.item() == 0
    assert balance.stats.reference["residual"].isnan().all()
    assert all(p.grad is None for p in net.parameters())
    balance(losses).backward()  # the graphs are still there


def test_histograms_of_odd_gradients():
    w, v = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4), requires_grad=False)
    zero = {"a": (0 * w).sum()}
    table = GradientHistograms(4)(zero, {"w": w, "v": v})
    assert table.layers == ("w",)
    assert table.counts.sum() == 4
    broken = {"a": (torch.tensor([1.0, math.nan, math.inf, -2.0]) * w).sum()}
    table = GradientHistograms(4)(broken, {"w": w})
    assert table.counts.tolist() == [[[1, 0, 0, 1]]]
    narrow = GradientHistograms(2, span=1.5)(broken, {"w": w})
    assert narrow.counts.tolist() == [[[0, 1]]]
    assert narrow.edges.tolist() == [[-1.5, 0.0, 1.5]]


def test_refusals_of_the_probe():
    net = network()
    out = net(X)
    with pytest.raises(ValueError, match="constant"):
        GradientHistograms()({"a": torch.zeros(())}, net)
    with pytest.raises(ValueError, match="frozen ones only"):
        GradientHistograms()({"a": out.sum()}, {"w": torch.ones(2)})
    with pytest.raises(ValueError, match="does not use"):
        GradientHistograms()({"a": net[0](X).sum()}, net)
    with pytest.raises(TypeError, match="mapping"):
        GradientHistograms()(out.sum(), net)
