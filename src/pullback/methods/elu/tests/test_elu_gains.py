"""Gains against closed forms, quadrature and draws; the initialisation that uses them; the units themselves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pullback.core.rng import rng_state
from pullback.methods.elu import LReLU, SReLU, activation_gain, activation_moments, init_gain_
from pullback.methods.elu.gains import _integrated
from pullback.methods.elu.tests import reference
from pullback.testing.tools import same

untyped_gain: Any = activation_gain
untyped_init: Any = init_gain_

CLOSED = (
    nn.Identity(),
    nn.ReLU(),
    nn.LeakyReLU(0.2),
    LReLU(),
    nn.PReLU(init=0.3),
    SReLU(),
    nn.Hardtanh(-2.0, 0.5),
    nn.ReLU6(),
    nn.ELU(),
    nn.ELU(0.5),
    nn.CELU(0.5),
    nn.SELU(),
)


@pytest.mark.parametrize(
    ("activation", "gain"),
    [(nn.ELU(), 1.24520), (nn.ReLU(), 1.41421), (nn.Identity(), 1.0), (nn.SELU(), 1.0), (LReLU(), 1.40720)],
)
def test_gains_of_the_paper(activation, gain):
    assert activation_gain(activation) == pytest.approx(gain, abs=5e-6)


def test_moments_and_centred_gain_of_elu():
    mean, square = activation_moments(nn.ELU())
    assert (mean, square) == (pytest.approx(0.160520, abs=1e-6), pytest.approx(0.644946, abs=1e-6))
    assert activation_gain(nn.ELU(), centred=True) == pytest.approx(1.27084, abs=5e-6)
    assert activation_gain(nn.SELU(), centred=True) == pytest.approx(1.0, abs=1e-9)  # zero mean by design


@given(alpha=st.floats(0.01, 3.0), s=st.floats(0.05, 4.0))
def test_elu_moments_are_the_reference(alpha, s):
    assert activation_moments(nn.ELU(alpha), std=s) == pytest.approx(
        reference.elu_moments(alpha, s), rel=1e-9
    )


@pytest.mark.parametrize("activation", CLOSED, ids=repr)
@pytest.mark.parametrize("s", [0.3, 1.0, 2.5])
def test_closed_forms_are_the_integral(activation, s):
    exact, integral = activation_moments(activation, std=s), _integrated(activation, s)
    kinks = isinstance(activation, SReLU | nn.Hardtanh)  # away from zero, where the rule is not exact
    assert exact == pytest.approx(integral, abs=1e-4 if kinks else 1e-8)


@pytest.mark.parametrize(
    "activation", [SReLU(), nn.Hardtanh(-2.0, 0.5), nn.ELU(0.7), nn.GELU(), nn.Softplus()]
)
def test_draws_agree(activation):
    z = 1.3 * torch.randn(2**19, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = activation(z)
    mean, square = activation_moments(activation, std=1.3)
    for found, sample in ((mean, values), (square, values.square())):
        assert abs(found - float(sample.mean())) < 5 * float(sample.std()) / 2**9.5


def test_the_gain_keeps_the_variance_of_a_deep_network():
    layers = [m for _ in range(10) for m in (nn.Linear(512, 512), nn.ELU())]
    net = nn.Sequential(*layers)
    assert init_gain_(net, nn.ELU()) == 10
    h = torch.randn(256, 512, generator=torch.Generator().manual_seed(1)) / activation_gain(nn.ELU())
    power = []
    with torch.no_grad():
        for layer in net:
            h = layer(h)
            power.append(float(h.square().mean()))
    assert power[0] == pytest.approx(1.0, rel=0.03)
    assert power[18] == pytest.approx(1.0, rel=0.15)  # the tenth pre-activation
    # He's gain on ELU, in contrast, lets them grow.
    init_gain_(net, nn.ELU(), gain=2**0.5)
    assert float(net(h / h.std()).detach().square().mean()) > 1.5 * power[19]


def test_a_function_and_large_and_small_scales():
    assert activation_gain(torch.relu) == pytest.approx(2**0.5, rel=1e-9)
    assert activation_gain(nn.ReLU(inplace=True)) == pytest.approx(2**0.5, rel=1e-9)
    assert activation_gain(nn.ELU(), std=200.0) == pytest.approx(
        2**0.5, rel=1e-3
    )  # the negative part saturates
    assert activation_gain(nn.ELU(), std=1e-3) == pytest.approx(1.0, rel=1e-2)  # nearly the identity
    weighted = nn.PReLU(init=0.1)
    assert activation_gain(weighted) == pytest.approx(activation_gain(LReLU()), rel=1e-6)
    assert weighted.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: untyped_gain(nn.ELU), TypeError, r"activation must be a module or .*Pass nn\.ELU\(\)"),
        (
            lambda: untyped_gain("elu"),
            TypeError,
            "activation must be a module or an elementwise function, got 'elu'",
        ),
        (lambda: activation_gain(nn.ELU(), std=0.0), ValueError, "std must be > 0, got 0"),
        (
            lambda: activation_gain(nn.Softmax(0)),
            ValueError,
            "activation must map every entry by itself, got Softmax",
        ),
        (lambda: activation_gain(nn.GLU()), ValueError, "activation must map every entry by itself"),
        (lambda: activation_gain(torch.zeros_like), ValueError, "activation must vary with its input"),
        (lambda: activation_gain(torch.ones_like, centred=True), ValueError, "activation must vary"),
        (lambda: activation_gain(lambda x: x / 0), ValueError, "activation must have finite moments"),
        (
            lambda: init_gain_(nn.ReLU(), nn.ELU()),
            ValueError,
            "model must hold a Linear, Conv1d, Conv2d or Conv3d layer, got ReLU",
        ),
        (lambda: untyped_init(3, nn.ELU()), TypeError, "model must be of type Module"),
        (
            lambda: untyped_init(nn.Linear(2, 2), nn.ELU(), mode="avg"),
            ValueError,
            "mode must be one of 'fan_in'",
        ),
        (lambda: init_gain_(nn.Linear(2, 2), nn.ELU(), gain=-1.0), ValueError, "gain must be > 0, got -1"),
        (lambda: activation_gain(nn.Linear(2, 2)), ValueError, "does not take a vector of any length"),
        (lambda: init_gain_(nn.Linear(2, 2), nn.ELU(), layers=["a"]), ValueError, "layers must name modules"),
        (lambda: init_gain_(nn.Linear(2, 2), nn.ELU(), layers="a"), TypeError, "layers must be names"),
        (
            lambda: init_gain_(nn.Linear(2, 2), nn.ELU(), layers=[]),
            ValueError,
            "at least one layer, got none",
        ),
        (lambda: init_gain_(nn.LazyLinear(2), nn.ELU()), ValueError, "weight must exist, got a lazy one"),
        (
            lambda: init_gain_(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.ELU()),
            ValueError,
            "weight must be plain, got a parametrised one",
        ),
    ],
)
def test_what_makes_no_sense_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_init_draws_are_paired_and_leave_the_generators_alone():
    before = rng_state()
    one, two = ([nn.Linear(30, 20), nn.Conv1d(6, 8, 3, groups=2)] for _ in range(2))
    assert same(rng_state()["numpy"], before["numpy"])
    state = rng_state()
    init_gain_(nn.Sequential(*one), nn.ELU(), seed=7)
    init_gain_(nn.Sequential(*two), nn.ReLU(), seed=7)
    assert same(rng_state(), state)
    ratio = activation_gain(nn.ELU()) / activation_gain(nn.ReLU())
    for p, q in zip(nn.Sequential(*one).parameters(), nn.Sequential(*two).parameters(), strict=True):
        torch.testing.assert_close(p, q * ratio if p.dim() > 1 else q)
    assert not nn.Sequential(*one).get_parameter("0.bias").any()
    weight = one[0].weight.detach().clone()
    init_gain_(nn.Sequential(*one), nn.ELU(), seed=8)
    assert not torch.equal(weight, one[0].weight)


@pytest.mark.parametrize(("mode", "fan"), [("fan_in", 8 * 9), ("fan_out", 16 * 9)])
def test_fans_of_grouped_convolutions(mode, fan):
    conv = nn.Conv2d(32, 64, 3, groups=4)
    init_gain_(conv, nn.Identity(), mode=mode)
    assert float(conv.weight.detach().std()) * math.sqrt(fan) == pytest.approx(1.0, rel=0.02)


def test_shared_weights_are_drawn_once_and_selected_layers_only():
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    two.weight = one.weight
    assert init_gain_(nn.Sequential(one, two), nn.ELU()) == 1
    net: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    last = net[1].weight.detach().clone()
    assert init_gain_(net, nn.ELU(), layers=["0"]) == 1
    assert torch.equal(net[1].weight, last)


# --- the units ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_elu_of_torch_is_the_papers_to_one_ulp_with_its_derivative(alpha):
    x = torch.cat([-torch.logspace(-12, 2, 300, dtype=torch.float64), torch.linspace(0.001, 5, 50).double()])
    wanted = torch.tensor([reference.elu(float(v), alpha) for v in x], dtype=torch.float64)
    torch.testing.assert_close(nn.ELU(alpha)(x), wanted, rtol=2.3e-16, atol=0)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(nn.ELU(alpha)(x).sum(), [x])
    wanted = torch.tensor(
        [reference.elu_derivative(float(v), alpha) for v in x.detach()], dtype=torch.float64
    )
    torch.testing.assert_close(slope, wanted, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_elu_is_exact_to_an_ulp_near_zero_in_low_precision(dtype):
    x = -torch.logspace(-4, -1, 100, dtype=torch.float64).to(dtype)
    wanted = torch.expm1(x.double())
    assert float(((nn.ELU()(x).double() - wanted) / wanted).abs().max()) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("unit", [nn.ELU(), nn.ELU(0.5), SReLU(), LReLU()])
def test_units_are_differentiable_twice_and_large_inputs_give_no_nan(unit):
    x = torch.tensor([-2.3, -0.4, 0.2, 1.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit, x)
    assert torch.autograd.gradgradcheck(unit, x)
    far = torch.tensor(
        [1e4, -1e4], requires_grad=True
    )  # exp(1e4) overflows where it is computed for all entries
    unit(far).sum().backward()
    assert far.grad is not None
    assert far.grad.isfinite().all()


def test_shifted_and_leaky_relu_are_the_papers():
    x = torch.tensor([-3.0, -1.0, -0.5, 0.0, 2.0])
    assert SReLU()(x).tolist() == [-1.0, -1.0, -0.5, 0.0, 2.0]
    assert LReLU()(x).tolist() == pytest.approx([-0.3, -0.1, -0.05, 0.0, 2.0])
    y = x.clone()
    assert SReLU(inplace=True)(y) is y
    assert repr(SReLU(inplace=True)) == "SReLU(inplace=True)"


def test_elu_with_another_alpha_has_a_kink_that_celu_has_not():
    x = torch.tensor([-1e-9, 1e-9], dtype=torch.float64, requires_grad=True)
    (elu,) = torch.autograd.grad(nn.ELU(0.5)(x).sum(), [x])
    (celu,) = torch.autograd.grad(nn.CELU(0.5)(x).sum(), [x])
    assert elu.tolist() == pytest.approx([0.5, 1.0])
    assert celu.tolist() == pytest.approx([1.0, 1.0])
