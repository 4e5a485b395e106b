"""The depthwise convolution with a fast backward pass: torch's values and gradients, and its place among transforms."""

import pytest
import torch
import torch.nn.functional as F

from pullback.core.depthwise import Depthwise3d, depthwise3d
from pullback.core.saved_bytes import saved_bytes


def drawn(n=2, c=3, sides=(4, 5, 6), kernel=(3, 3, 3), dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, *sides, generator=g, dtype=torch.float64)
    weight = torch.randn(c, 1, *kernel, generator=g, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def exact(x, weight):
    """torch's convolution and gradients in float64, at the same point."""
    x, weight = (each.detach().double().requires_grad_() for each in (x, weight))
    out = F.conv3d(x, weight, padding="same", groups=len(weight))
    weights = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    return out, torch.autograd.grad((out * weights).sum(), (x, weight)), weights.float()


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 5), (1, 1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_values_and_gradients_are_torchs(kernel, layout):
    x, weight = drawn(kernel=kernel)
    x = x.detach().to(memory_format=layout).requires_grad_()
    wanted, grads, weights = exact(x, weight)
    out = depthwise3d(x, weight)
    assert type(out.grad_fn).__name__ == "_DepthwiseBackward"
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad((out * weights).sum(), (x, weight))
    for one, other in zip(found, grads, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_a_sum_over_many_voxels_stays_accurate():
    x, weight = drawn(n=1, c=2, sides=(40, 40, 40))
    _, (_, wanted), weights = exact(x.abs(), weight)
    (found,) = torch.autograd.grad((depthwise3d(x.abs(), weight) * weights).sum(), weight)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4
    (torchs,) = torch.autograd.grad(
        (F.conv3d(x.abs(), weight, padding="same", groups=2) * weights).sum(), weight
    )
    assert float((found - wanted).norm()) < 20 * float((torchs - wanted).norm()) + 1e-5


def test_second_derivatives():
    def twice(conv, dtype):
        x, weight = drawn(dtype=dtype)
        grads = torch.autograd.grad(conv(x, weight).square().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in grads), (x, weight))

    wanted = twice(lambda x, w: F.conv3d(x, w, padding="same", groups=3), torch.float64)
    for one, other in zip(twice(depthwise3d, torch.float32), wanted, strict=True):
        assert float((one.double() - other).norm() / other.norm()) < 1e-6


def test_transforms_and_frozen_arguments():
    x, weight = drawn()
    wanted = torch.autograd.grad(depthwise3d(x, weight).square().sum(), (x, weight))
    got = torch.func.grad(lambda *both: depthwise3d(*both).square().sum(), argnums=(0, 1))(x, weight)
    per_example = torch.func.vmap(
        torch.func.grad(lambda w, one: depthwise3d(one[None], w).square().sum()), in_dims=(None, 0)
    )(weight, x)
    for one, other in zip((*got, per_example.sum(0)), (*wanted, wanted[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    depthwise3d(x.detach(), weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
    assert depthwise3d(x, weight.detach()).requires_grad


def test_torchs_own_elsewhere():
    for x, weight in (drawn(dtype=torch.float64), drawn(n=0)):
        assert "Convolution" in type(depthwise3d(x, weight).grad_fn).__name__
    x, weight = drawn()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert depthwise3d(x, weight).dtype == torch.bfloat16
    with torch.device("meta"):
        assert depthwise3d(torch.empty(1, 2, 3, 3, 3), torch.empty(2, 1, 3, 3, 3)).shape == (1, 2, 3, 3, 3)


def test_it_keeps_its_input_alone():
    x, weight = drawn()
    assert saved_bytes(lambda: depthwise3d(x, weight), weight) == x.nbytes


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_in_one_graph():
    x, weight = drawn()
    compiled = torch.compile(depthwise3d, backend="aot_eager", fullgraph=True)
    wanted = torch.autograd.grad(depthwise3d(x, weight).square().sum(), (x, weight))
    got = torch.autograd.grad(compiled(x, weight).square().sum(), (x, weight))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_the_module_is_an_ordinary_convolution():
    torch.manual_seed(0)
    layer = Depthwise3d(3, kernel_size=3)
    plain = torch.nn.Conv3d(3, 3, 3, padding=1, groups=3, bias=False)
    plain.load_state_dict(layer.state_dict())
    x, _ = drawn()
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)
    assert isinstance(layer, torch.nn.Conv3d)
    assert type(layer(x).grad_fn).__name__ == "_DepthwiseBackward"
