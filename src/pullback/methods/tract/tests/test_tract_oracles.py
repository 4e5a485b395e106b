"""The edited gradient against the paper's equations, its special cases and the official package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pullback.methods.tract import covariance, precondition_input, tract
from pullback.methods.tract.tests import reference

LAM = 0.125  # a float32 number, as the buffer of a layer holds it


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def edited(x, weight, outer, lam=LAM):
    """Gradient of the weight where dL/dz = ``outer``."""
    weight = weight.clone().requires_grad_()
    z = F.linear(x, precondition_input(weight, x, lam))
    return torch.autograd.grad(z, weight, outer)[0]


@settings(max_examples=30, deadline=None)
@given(
    b=st.integers(1, 12),
    n=st.integers(1, 8),
    m=st.integers(1, 4),
    power=st.integers(-8, 4),
    seed=st.integers(0, 99),
)
def test_equals_the_papers_formula_whether_samples_are_many_or_few(b, n, m, power, seed):
    x, outer, lam = draw(b, n, seed=seed), draw(b, m, seed=seed + 1), 2.0**power
    got = edited(x, draw(m, n), outer, lam)
    torch.testing.assert_close(got, reference.gradient(outer, x, lam), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(got, reference.woodbury(outer, x, lam), rtol=1e-9, atol=1e-10)


def test_both_routes_agree_where_they_meet(monkeypatch):
    x, weight, outer = draw(6, 6), draw(3, 6), draw(6, 3)
    through_covariance = edited(x, weight, outer)
    monkeypatch.setattr(covariance.Rows, "count", lambda self, x: 5.999999999999)  # takes the Gram route
    torch.testing.assert_close(edited(x, weight, outer), through_covariance, rtol=1e-10, atol=1e-11)


def test_leading_dimensions_are_samples_and_chunks_do_not_show(monkeypatch):
    x, outer = draw(2, 3, 4, 5), draw(2, 3, 4, 3)
    whole = edited(x, draw(3, 5), outer)
    torch.testing.assert_close(whole, reference.gradient(outer.reshape(-1, 3), x.reshape(-1, 5), LAM))
    monkeypatch.setattr(covariance, "CHUNK", 35)  # 7 samples of 24 at a time
    torch.testing.assert_close(edited(x, draw(3, 5), outer), whole, rtol=1e-12, atol=1e-13)


# --- special cases ----------------------------------------------------------------------------------------------------


def test_a_large_damping_leaves_the_plain_gradient_over_lam():
    x, outer = draw(9, 4), draw(9, 2)
    torch.testing.assert_close(edited(x, draw(2, 4), outer, 1e6) * 1e6, outer.T @ x, rtol=1e-5, atol=1e-5)


def test_white_inputs_give_the_plain_gradient_over_one_plus_lam():
    x, outer = torch.linalg.qr(draw(9, 4)).Q * 3.0, draw(9, 2)
    torch.testing.assert_close(edited(x, draw(2, 4), outer, 0.25), outer.T @ x / 1.25)


def test_one_sample_is_normalised_least_mean_squares():
    x, outer = draw(1, 5), draw(1, 3)
    torch.testing.assert_close(edited(x, draw(3, 5), outer), outer.T @ x / (x.square().sum() + LAM))
    torch.testing.assert_close(edited(x[0], draw(3, 5), outer[0]), outer.T @ x / (x.square().sum() + LAM))


def test_one_hot_inputs_give_means_over_occurrences():
    tokens = torch.tensor([0, 2, 2, 1, 2, 0])
    x, outer = F.one_hot(tokens, 3).double(), draw(6, 4)
    wanted = torch.stack([6 * outer[tokens == token].mean(0) for token in range(3)], dim=1)
    torch.testing.assert_close(edited(x, draw(4, 3), outer, 1e-10), wanted, rtol=1e-8, atol=1e-8)


def test_an_invertible_map_of_the_inputs_changes_no_step_of_z():
    x, outer, mix = draw(12, 4), draw(12, 3), draw(4, 4, seed=3) + 2 * torch.eye(4)
    one = x @ edited(x, draw(3, 4), outer, 1e-12).T
    torch.testing.assert_close(
        x @ mix @ edited(x @ mix, draw(3, 4), outer, 1e-12).T, one, rtol=1e-7, atol=1e-7
    )


# --- what the method is for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [3, 20])
def test_minimises_the_ridge_objective(b):
    eta, x, outer = 0.3, draw(b, 5), draw(b, 4)
    change = (-eta * edited(x, draw(4, 5), outer)).requires_grad_()
    least = reference.objective(change, outer, x, LAM, eta)
    (slope,) = torch.autograd.grad(least, change)
    assert slope.abs().max() < 1e-11
    for seed in range(20):
        other = change.detach() + 1e-3 * draw(4, 5, seed=seed)
        assert reference.objective(other, outer, x, LAM, eta) > least


def test_a_doubled_batch_changes_nothing():
    x, outer = draw(7, 4), draw(7, 3)
    twice = edited(torch.cat([x, x]), draw(3, 4), torch.cat([outer, outer]) / 2)
    torch.testing.assert_close(twice, edited(x, draw(3, 4), outer))


def test_the_gradient_vanishes_with_the_plain_one_and_only_then():
    x = draw(8, 3)
    residual = torch.linalg.qr(torch.cat([x, draw(8, 2, seed=4)], 1)).Q[:, 3:]  # orthogonal to the inputs
    assert edited(x, draw(2, 3), residual).abs().max() < 1e-12
    assert edited(x, draw(2, 3), draw(8, 2)).abs().max() > 1e-2
    assert not edited(x, draw(2, 3), torch.zeros(8, 2, dtype=torch.float64)).any()


# --- convolutions -----------------------------------------------------------------------------------------------------

LAYERS = {
    "plain": nn.Conv2d(3, 4, 3),
    "stride and padding": nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0)),
    "dilation": nn.Conv2d(2, 4, 3, dilation=(2, 1), padding=2),
    "groups": nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": nn.Conv2d(3, 6, 3, groups=3, dilation=2, padding=1),
    "reflect": nn.Conv2d(2, 4, 3, padding=(2, 1), padding_mode="reflect"),
    "replicate": nn.Conv2d(2, 4, 3, padding=1, padding_mode="replicate", stride=2),
    "circular": nn.Conv2d(2, 4, 3, padding=(1, 2), padding_mode="circular"),
    "same, even kernel": nn.Conv2d(2, 4, (4, 3), padding="same", dilation=(1, 2)),
    "same, circular": nn.Conv2d(2, 4, (2, 3), padding="same", padding_mode="circular"),
    "valid": nn.Conv2d(2, 4, 3, padding="valid"),
    "patches of an image": nn.Conv2d(3, 5, 4, stride=4),
    "1d": nn.Conv1d(4, 6, 5, stride=2, padding=2, groups=2),
    "1d, reflect": nn.Conv1d(2, 3, 4, padding="same", padding_mode="reflect"),
    "3d": nn.Conv3d(2, 4, (2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1), dilation=(1, 1, 2)),
    "3d, circular": nn.Conv3d(2, 2, 3, groups=2, padding=1, padding_mode="circular"),
}


def geometry(layer):
    """What the reference needs, read from the arguments of the layer."""
    if layer.padding == "same":
        pads = [
            ((d * (k - 1)) // 2, -(-d * (k - 1) // 2))
            for k, d in zip(layer.kernel_size, layer.dilation, strict=True)
        ]
    else:
        pads = [(p, p) for p in ([0] * len(layer.kernel_size) if layer.padding == "valid" else layer.padding)]
    return {
        "kernel": layer.kernel_size,
        "stride": layer.stride,
        "dilation": layer.dilation,
        "pads": pads,
        "mode": layer.padding_mode,
        "groups": layer.groups,
    }


@pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel:UserWarning"
)  # torch, of its own copy
@pytest.mark.parametrize("chunk", [2**20, 200, 1])
@pytest.mark.parametrize("name", LAYERS)
def test_convolutions_equal_the_reference_in_every_geometry(name, chunk, monkeypatch):
    monkeypatch.setattr(covariance, "CHUNK", chunk)
    layer = LAYERS[name].double()
    spatial = (9, 8, 7)[: len(layer.kernel_size)]
    x = draw(3, layer.in_channels, *spatial)
    plain = layer(x)
    outer = draw(*plain.shape, seed=1)
    with tract(layer, LAM):
        z = layer(x)
        assert torch.equal(z, plain)
        (got,) = torch.autograd.grad(z, layer.weight, outer)
    wanted = reference.convolution(outer, x, LAM, **geometry(layer))
    torch.testing.assert_close(got.flatten(1), wanted, rtol=1e-9, atol=1e-10)


def test_few_patches_take_the_gram_route():
    layer, x = nn.Conv2d(3, 4, 5).double(), draw(2, 3, 6, 6)  # 8 patches of 75 entries
    outer = draw(2, 4, 2, 2, seed=1)
    with tract(layer, LAM):
        (got,) = torch.autograd.grad(layer(x), layer.weight, outer)
    torch.testing.assert_close(got.flatten(1), reference.convolution(outer, x, LAM, **geometry(layer)))


@pytest.mark.parametrize("name", ["stride and padding", "reflect", "1d", "3d"])
def test_one_image_without_a_batch_dimension(name):
    layer = LAYERS[name].double()
    x = draw(1, layer.in_channels, *(9, 8, 7)[: len(layer.kernel_size)])
    with tract(layer, LAM):
        one, many = layer(x[0]), layer(x)
        outer = draw(*many.shape, seed=1)
        (got,) = torch.autograd.grad(one, layer.weight, outer[0])
        (wanted,) = torch.autograd.grad(many, layer.weight, outer)
    torch.testing.assert_close(got, wanted)


def test_patches_and_an_unfolded_linear_layer_are_the_same():
    layer, x = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False).double(), draw(3, 2, 7, 7)
    rows = F.unfold(x, 3, stride=2, padding=1).mT
    outer = draw(3, 16, 4, seed=1)
    weight = layer.weight.detach().clone().requires_grad_()
    z = rows @ precondition_input(weight, rows, LAM).flatten(1).T
    (functional,) = torch.autograd.grad(z, weight, outer)
    with tract(layer, LAM):
        (installed,) = torch.autograd.grad(layer(x), layer.weight, outer.mT.reshape(3, 4, 4, 4))
    torch.testing.assert_close(functional, installed)


# --- the official package ---------------------------------------------------------------------------------------------


def peer(layer, x, outer):
    """Gradients of the official wrapper; it takes linear layers and zero-padded, ungrouped convolutions only."""
    official = pytest.importorskip("torch_tract", reason="torch-tract is not installed")
    wrapped: Any = official.TrAct(layer, l=LAM)
    return torch.autograd.grad(wrapped(x), list(layer.parameters()), outer)  # which the wrapper shares


@pytest.mark.parametrize("b", [3, 30])
def test_equals_the_official_package_on_a_linear_layer(b):
    layer, x, outer = nn.Linear(7, 4).double(), draw(b, 7), draw(b, 4)
    wanted = peer(layer, x, outer)
    with tract(layer, LAM):
        got = torch.autograd.grad(layer(x), list(layer.parameters()), outer)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("stride", "padding", "size"), [(1, 0, 8), (2, 1, 9), (2, 3, 5)])
def test_equals_the_official_package_on_a_convolution(stride, padding, size):
    layer, x = nn.Conv2d(3, 4, 3, stride, padding).double(), draw(3, 3, size, size)
    outer = draw(*layer(x).shape, seed=1)
    wanted = peer(layer, x, outer)
    with tract(layer, LAM):
        got = torch.autograd.grad(layer(x), list(layer.parameters()), outer)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
