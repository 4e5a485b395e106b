"""What follows exactly from an output norm: RMS, variance law, orthogonality, scale invariance, gradient bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from pullback.methods import peri_ln
from pullback.methods.peri_ln.tests import reference

PeriNorm: Any = peri_ln.PeriNorm  # parts that some placements lack are used below
PeriNormBlock: Any = peri_ln.PeriNormBlock


def seeded(seed=0):
    torch.manual_seed(seed)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_what_a_branch_adds_has_the_rms_of_its_gain(norm):
    seeded()
    layer = PeriNorm(nn.Linear(32, 32), 32, norm=norm, gain_init=0.25, eps=0.0).double()
    x = torch.randn(7, 32, dtype=torch.float64)
    for scale in (1e-3, 1.0, 1e3):
        added = (layer(scale * x) - scale * x).square().mean(-1).sqrt()
        torch.testing.assert_close(added, torch.full((7,), 0.25, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def stream_variances(placement, gain=1.0, blocks=12, dim=128):
    seeded(3)
    layers = [PeriNormBlock(dim, 4, placement=placement, gain_init=gain) for _ in range(blocks)]
    for p in (p for layer in layers for p in layer.parameters() if p.dim() == 2):
        nn.init.normal_(p, 0.0, 0.04)
    x = functional.rms_norm(torch.randn(8, 32, dim), (dim,))
    found = [float(x.var(-1, correction=0).mean())]
    with torch.no_grad():
        for layer in layers:
            x = layer(x)
            found.append(float(x.var(-1, correction=0).mean()))
    return found


@pytest.mark.parametrize("gain", [1.0, 0.5])
def test_variance_grows_by_the_squared_gain_of_each_sublayer(gain):
    found = stream_variances("peri", gain)
    wanted = [reference.variance_law(2 * depth, gain) for depth in range(13)]
    assert found == pytest.approx(wanted, rel=0.1)
    mean = sum(found) / 13
    slope = sum((d - 6) * v for d, v in enumerate(found)) / sum((d - 6) ** 2 for d in range(13))
    rest = sum((v - mean - slope * (d - 6)) ** 2 for d, v in enumerate(found))
    assert 1 - rest / sum((v - mean) ** 2 for v in found) > 0.95


def test_post_keeps_the_variance_at_one():
    assert stream_variances("post")[1:] == pytest.approx([1.0] * 12, rel=1e-2)


def loss_of(block, x, head):
    return functional.cross_entropy(
        block(x).flatten(0, 1) @ head, torch.arange(len(x.flatten(0, 1))) % head.shape[1]
    )


def last_weights(block):
    return [block.attention.module.out.weight, block.feedforward.module[2].weight]


def cosines(placement):
    seeded(1)
    block, head, x = (
        PeriNormBlock(32, 4, placement=placement, eps=1e-8),
        torch.randn(32, 5),
        torch.randn(2, 6, 32),
    )
    weights = last_weights(block)
    grads = torch.autograd.grad(loss_of(block, x, head), weights)
    return [
        abs(functional.cosine_similarity(w.detach().flatten(), g.flatten(), dim=0).item())
        for w, g in zip(weights, grads, strict=True)
    ]


def test_the_gradient_of_the_last_weight_is_orthogonal_to_it():
    assert max(cosines("peri")) < 1e-6
    assert max(cosines("output")) < 1e-6
    assert min(cosines("pre")) > 1e-4, "the same measure sees Pre-LN"


@pytest.mark.parametrize("which", [0, 1])
def test_the_loss_does_not_see_the_scale_of_the_last_weight(which):
    seeded(1)
    block, head, x = (
        PeriNormBlock(32, 4, eps=1e-12).double(),
        torch.randn(32, 5).double(),
        torch.randn(2, 6, 32).double(),
    )
    weight = last_weights(block)[which]
    loss = loss_of(block, x, head)
    (grad,) = torch.autograd.grad(loss, weight)
    with torch.no_grad():
        weight.mul_(10.0)
    other = loss_of(block, x, head)
    torch.testing.assert_close(other, loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(torch.autograd.grad(other, weight)[0], grad / 10, rtol=1e-6, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(exponent=st.floats(-2, 2), gain=st.floats(0.05, 3.0), seed=st.integers(0, 10_000))
def test_the_gradient_never_exceeds_the_bound(exponent, gain, seed):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, 12, generator=g, dtype=torch.float64)
    last = nn.Linear(12, 8, bias=False).double()
    with torch.no_grad():
        last.weight.copy_(10**exponent * torch.randn(8, 12, generator=g, dtype=torch.float64))
    layer = PeriNorm(last, 8, placement="output", gain_init=gain, eps=1e-12).double()
    layer.module = _Fixed(last, hidden)
    head = torch.randn(8, 6, generator=g, dtype=torch.float64)
    head = head / torch.linalg.matrix_norm(head, 2)  # a head of norm 1, as the bound assumes
    x = torch.randn(1, 8, generator=g, dtype=torch.float64)
    loss = functional.cross_entropy(layer(x) @ head, torch.tensor([2]))
    (grad,) = torch.autograd.grad(loss, last.weight)
    bound = reference.gradient_bound(hidden[0].tolist(), last(hidden)[0].tolist(), gain)
    assert float(grad.abs().max()) <= bound


class _Fixed(nn.Module):
    """A branch whose hidden vector is given."""

    def __init__(self, last, hidden):
        super().__init__()
        self.last, self.hidden = last, hidden

    def forward(self, x):
        return self.last(self.hidden)
