"""The reversal layer: its law, its state, its cost, and everything that drives it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo import lookup_backend

from pullback.core import schedules
from pullback.methods.dann import GradientReversal, reverse_gradient
from pullback.methods.dann.tests import reference

untyped: Any = GradientReversal


def scalar(x):
    return (x.sin() * torch.arange(1, x.numel() + 1, dtype=x.dtype).reshape(x.shape)).sum()


def gradient(f, x):
    return torch.autograd.grad(f(x), x)[0]


@settings(max_examples=40, deadline=None)
@given(power=st.integers(-6, 6), sign=st.sampled_from([-1.0, 1.0]), seed=st.integers(0, 99))
def test_gradient_is_minus_lam_times_the_plain_one_to_the_bit(power, sign, seed):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    lam = sign * 2.0**power
    assert torch.equal(gradient(lambda v: scalar(GradientReversal(lam)(v)), x), -lam * gradient(scalar, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (2, 3, 4)])
def test_values_shape_and_dtype_pass_unchanged(dtype, shape):
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = GradientReversal(0.3)(x)
    assert torch.equal(y, x)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad, torch.full(shape, -0.3).to(dtype))


def test_two_layers_compose_to_the_product():
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    twice = gradient(lambda v: scalar(GradientReversal(0.5)(GradientReversal(4.0)(v))), x)
    assert torch.equal(twice, 2.0 * gradient(scalar, x))


def test_zero_gives_zeros_not_none():
    x = torch.randn(4, requires_grad=True)
    GradientReversal(0.0)(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad.abs(), torch.zeros(4))


def test_the_output_does_not_alias_as_the_same_tensor_and_survives_an_in_place_edit():
    x = torch.ones(3, requires_grad=True) * 1.0
    y = GradientReversal(2.0)(x)
    assert y is not x
    assert y.data_ptr() == x.data_ptr()
    y = y.mul(3.0)
    assert torch.equal(x, torch.ones(3))


def test_double_backward_reverses_again():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    lam = 0.5
    (first,) = torch.autograd.grad(scalar(reverse_gradient(x, lam)), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    # scalar's derivative is taken at R(x); differentiating it goes through R once more
    (plain,) = torch.autograd.grad(scalar(x), x, create_graph=True)
    (expected,) = torch.autograd.grad(plain.sum(), x)
    torch.testing.assert_close(second, lam * lam * expected, rtol=1e-14, atol=0)


def test_functional_transforms():
    layer = GradientReversal(0.5)
    x = torch.randn(5, 3, dtype=torch.float64)
    one = torch.func.grad(lambda v: scalar(layer(v)))
    torch.testing.assert_close(one(x[0]), -0.5 * torch.func.grad(scalar)(x[0]))
    each = torch.func.vmap(one)(x)
    torch.testing.assert_close(each, torch.stack([one(row) for row in x]))
    nested = torch.func.grad(lambda v: one(v).sum())(x[0])
    torch.testing.assert_close(
        nested, 0.25 * torch.func.grad(lambda v: torch.func.grad(scalar)(v).sum())(x[0])
    )


def test_finite_differences_disagree_because_the_layer_is_no_derivative():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert not torch.autograd.gradcheck(GradientReversal(1.0), (x,), raise_exception=False)
    assert torch.autograd.gradcheck(GradientReversal(-1.0), (x,))
    assert torch.autograd.gradgradcheck(GradientReversal(-1.0), (x,))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_changing_lam_recompiles_nothing():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    layer = GradientReversal(schedules.dann())
    torch._dynamo.reset()
    compiled = torch.compile(lambda v: scalar(layer(v) * 2.0), backend=backend, fullgraph=True)
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    for step in range(6):
        layer.progress(step / 5)
        expected = -layer.lam.double() * gradient(lambda v: scalar(v * 2.0), x)
        torch.testing.assert_close(gradient(compiled, x), expected)
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_aot_eager_by_name_with_clip():
    layer = GradientReversal(1.0, clip=0.1)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(8, requires_grad=True)
    torch.testing.assert_close(
        gradient(lambda v: scalar(compiled(v)), x), gradient(lambda v: scalar(layer(v)), x)
    )


def test_autocast_and_loss_scale():
    trunk, head, layer = nn.Linear(4, 3), nn.Linear(3, 1), GradientReversal(0.5)
    x = torch.randn(6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (through,) = torch.autograd.grad(head(layer(trunk(x))).sum() * 1024, trunk.weight)
        (plain,) = torch.autograd.grad(head(trunk(x)).sum() * 1024, trunk.weight)
    assert torch.equal(through, -0.5 * plain)


# --- clip ----------------------------------------------------------------------------------------------------------


def test_clip_bounds_the_norm_and_leaves_small_gradients_alone():
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    free = gradient(lambda v: scalar(reverse_gradient(v, 1.0)), x)
    tight = gradient(lambda v: scalar(reverse_gradient(v, 1.0, clip=0.5)), x)
    assert tight.norm().item() == pytest.approx(0.5, rel=1e-12)
    torch.testing.assert_close(tight, 0.5 * free / free.norm())
    loose = gradient(lambda v: scalar(reverse_gradient(v, 1.0, clip=1e6)), x)
    assert torch.equal(loose, free)


# --- state ---------------------------------------------------------------------------------------------------------


def test_progress_follows_the_schedule_and_a_number_stays():
    layer, fixed = GradientReversal(schedules.dann(gamma=10)), GradientReversal(0.3)
    for p in (0.0, 0.1, 0.5, 1.0):
        layer.progress(p)
        fixed.progress(p)
        assert layer.lam.item() == pytest.approx(reference.lam_at(p), abs=1e-7)
        assert fixed.lam.item() == pytest.approx(0.3)


@given(total=st.integers(1, 400))
@settings(max_examples=25, deadline=None)
def test_step_counts_to_one_and_stays(total):
    layer = GradientReversal(schedules.dann())
    for done in range(1, total + 1):
        layer.step(total)
        assert layer.position.item() == pytest.approx(done / total, rel=1e-6)
    layer.step(total)
    assert layer.position.item() == 1.0


def test_state_resumes_bitwise():
    whole, first = GradientReversal(schedules.dann()), GradientReversal(schedules.dann())
    for _ in range(7):
        whole.step(20)
        first.step(20)
    assert set(first.state_dict()) == {"lam", "position"}
    second = GradientReversal(schedules.dann())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(5):
        whole.step(20)
        second.step(20)
        assert torch.equal(whole.lam, second.lam)
        assert torch.equal(whole.position, second.position)


def test_the_coefficient_keeps_its_dtype_when_the_model_is_cast():
    layer = GradientReversal(0.3)
    layer.progress(0.1)
    nn.Sequential(nn.Linear(2, 2), layer).to(torch.bfloat16)
    assert layer.lam.dtype == torch.float32
    assert layer.lam.item() == pytest.approx(0.3, abs=1e-7)
    assert layer.position.item() == pytest.approx(0.1, abs=1e-7)


def test_moving_lam_between_forward_and_backward_uses_the_one_of_the_forward():
    layer = GradientReversal(2.0)
    x = torch.ones(2, requires_grad=True)
    y = layer(x).sum()
    layer.lam.fill_(5.0)
    y.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((2,), -2.0))


# --- cost ----------------------------------------------------------------------------------------------------------


def test_nothing_is_saved_but_one_number():
    saved = []
    x = torch.randn(1000, 10, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        GradientReversal(1.0)(x)
    assert [t.numel() for t in saved] == [1]


def test_forward_copies_nothing_and_backward_scales_once():
    x = torch.randn(1000, 10, requires_grad=True)
    grad = torch.randn(1000, 10)
    layer = GradientReversal(0.7)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as forward:
        y = layer(x)
    assert all(abs(e.cpu_memory_usage) < 1000 for e in forward.key_averages())
    with torch.profiler.profile(acc_events=True) as backward:
        y.backward(grad)
    assert sum(e.count for e in backward.key_averages() if e.key == "aten::mul") == 1


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GradientReversal(math.inf), ValueError, "lam must be finite, got inf"),
        (lambda: untyped("1"), TypeError, "lam must be a number"),
        (lambda: GradientReversal(clip=-1.0), ValueError, "clip must be > 0, got -1"),
        (lambda: GradientReversal(lambda p: math.nan), ValueError, r"lam\(0\) must be finite, got nan"),
        (lambda: GradientReversal().progress(1.5), ValueError, r"p must be in \[0, 1\], got 1.5"),
        (lambda: GradientReversal().step(0), ValueError, "total must be >= 1, got 0"),
        (lambda: GradientReversal()(torch.arange(3)), TypeError, "x must be a floating tensor"),
        (lambda: GradientReversal()([1.0]), TypeError, "x must be of type Tensor, got list"),
        (
            lambda: reverse_gradient(torch.ones(2), torch.ones(2)),
            ValueError,
            "lam must be a number or a 0-dim",
        ),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_repr_shows_the_strength():
    assert "lam=0.5" in repr(GradientReversal(0.5))
    assert "clip=2.0" in repr(GradientReversal(clip=2.0))
    assert "gamma=10.0" in repr(GradientReversal(schedules.dann()))
