"""The bottleneck against its equations, in closed form, and in what it refuses and keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pullback.core.saved_bytes import saved_bytes
from pullback.methods.rev_mbconv_unet import MBConv, saved_by_mbconv
from pullback.methods.rev_mbconv_unet.tests import reference

SIDES = {2: (5, 4), 3: (3, 4, 3)}


def spread(module, seed=0):
    """Random parameters everywhere, so that no gain hides an error."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))
    return module


def random(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", ["group", "instance", "batch"])
@pytest.mark.parametrize("act", ["silu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("gate", [None, 0.5])
def test_equals_the_equations(dims, norm, act, gate):
    fn = spread(
        MBConv(4, spatial_dims=dims, expansion=2, norm=norm, act=act, squeeze_excite=gate, groups=2).double()
    )
    x = random(2, 4, *SIDES[dims])
    state = {name: p.detach().numpy() for name, p in fn.named_parameters()}
    wanted = reference.mbconv(x.numpy(), state, norm=norm, groups=2, wide_groups=2, act=act)
    torch.testing.assert_close(fn(x).detach(), torch.from_numpy(wanted), rtol=0, atol=1e-11)


def test_kernel_1_without_batch_statistics_is_a_pointwise_perceptron():
    fn = spread(MBConv(3, spatial_dims=3, expansion=1, kernel_size=1, norm="batch").double()).eval()
    x = random(2, 3, 2, 3, 4)
    scale = (1.0 + 1e-5) ** -0.5  # running variance 1 and eps
    rows = x.movedim(1, -1).reshape(-1, 3)

    def norm(h, module):
        return h * scale * module.weight + module.bias

    h = torch.nn.functional.silu(norm(rows @ fn.expand.weight.view(3, 3).T, fn.norm1))
    h = torch.nn.functional.silu(norm(h * fn.depthwise.weight.view(3), fn.norm2))
    wanted = norm(h @ fn.project.weight.view(3, 3).T, fn.norm3).view(2, 2, 3, 4, 3).movedim(-1, 1)
    torch.testing.assert_close(fn(x), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["group", "instance", "batch"])
def test_zero_init_gives_zero_and_trains_only_the_last_norm(norm):
    fn = MBConv(4, spatial_dims=2, norm=norm, zero_init=True)
    x = random(2, 4, 5, 5, dtype=torch.float32)
    out = fn(x)
    assert torch.equal(out, torch.zeros_like(out))
    out.sum().add((out * random(*out.shape, dtype=torch.float32)).sum()).backward()
    moving = {name for name, p in fn.named_parameters() if p.grad is not None and p.grad.any()}
    assert moving == {"norm3.weight", "norm3.bias"}


@pytest.mark.parametrize(("act", "per_e"), [("silu", 6), ("relu6", 6), ("leaky_relu", 4)])
@pytest.mark.parametrize("e", [1, 2, 4, 6])
def test_bytes_of_the_table(act, per_e, e):
    fn = MBConv(4, spatial_dims=3, expansion=e, act=act)
    x = random(2, 4, 8, 8, 8, dtype=torch.float32)
    # Fed by a leaf of its own: the input counts, as it does inside a stage.
    counted = saved_bytes(lambda: fn(x), fn)
    unit = x.nbytes
    assert counted / unit == pytest.approx(per_e * e + 2, rel=0.01)
    assert counted == 4 * saved_by_mbconv(fn, 2, 512)


@pytest.mark.parametrize("norm", ["group", "instance", "batch"])
@pytest.mark.parametrize("act", ["silu", "leaky_relu"])
@pytest.mark.parametrize("train", [True, False])
def test_bytes_are_exact_with_statistics_and_gates(norm, act, train):
    fn = MBConv(4, spatial_dims=2, expansion=3, norm=norm, act=act, squeeze_excite=0.5).train(train)
    x = random(3, 4, 6, 5, dtype=torch.float32)
    assert saved_bytes(lambda: fn(x), fn) == 4 * saved_by_mbconv(fn, 3, 30)


def test_automatic_groups_leave_two_channels_in_each():
    fn = MBConv(12, expansion=2)
    assert (fn.norm1.num_groups, fn.norm3.num_groups) == (8, 6)
    assert MBConv(1, expansion=1).norm3.num_groups == 1
    assert MBConv(5, expansion=1).norm3.num_groups == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels must be >= 1, got 0"),
        ({"channels": 4, "spatial_dims": 1}, "spatial_dims must be one of 2, 3, got 1"),
        ({"channels": 4, "expansion": 0}, "expansion must be >= 1, got 0"),
        ({"channels": 4, "kernel_size": 2}, "kernel_size must be odd, got 2"),
        ({"channels": 4, "norm": "layer"}, "norm must be one of .*got 'layer'"),
        ({"channels": 4, "act": "silo"}, "act must be one of .*got 'silo'. Did you mean 'silu'"),
        ({"channels": 4, "groups": 3}, "groups must divide the 8 channels of the norm, got 3"),
        ({"channels": 4, "squeeze_excite": 2.0}, r"squeeze_excite must be in \[0, 1\], got 2.0. Use 0.25"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MBConv(**arguments)


def test_a_float_for_a_count_is_refused():
    with pytest.raises(TypeError, match=r"expansion must be an integer, got 1\.5"):
        MBConv(4, expansion=1.5)  # ty: ignore[invalid-argument-type]


@pytest.mark.parametrize("shape", [(2, 4, 3, 3, 3), (2, 3, 3, 3), (4, 3, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"x must be \[batch, 4, height, width\], got a tensor of shape"):
        MBConv(4, spatial_dims=2)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("settings", "batch"), [({"norm": "batch"}, 1), ({"norm": "instance"}, 4), ({"groups": 4}, 4)]
)
def test_a_norm_of_one_value_is_refused(settings, batch):
    fn = MBConv(4, spatial_dims=3, **settings)
    with pytest.raises(
        ValueError, match=r"x must give norm='.*' more than one value for each statistic, got"
    ):
        fn(torch.ones(batch, 4, 1, 1, 1))


def test_one_voxel_is_fine_where_statistics_have_two_values():
    assert MBConv(4, spatial_dims=3, norm="batch")(torch.ones(2, 4, 1, 1, 1)).shape == (2, 4, 1, 1, 1)
    assert MBConv(4, spatial_dims=3)(torch.ones(1, 4, 1, 1, 1)).shape == (1, 4, 1, 1, 1)
    assert MBConv(4, norm="batch").eval()(torch.ones(1, 4, 1, 1, 1)).shape == (1, 4, 1, 1, 1)


def test_an_ordinary_module():
    fn = nn.Sequential(MBConv(4, spatial_dims=2), nn.Conv2d(4, 1, 1))
    compiled = torch.compile(fn, backend="eager", fullgraph=True)
    x = random(2, 4, 5, 5, dtype=torch.float32)
    torch.testing.assert_close(compiled(x), fn(x))
    wide = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(fn(wide), fn(x), rtol=1e-4, atol=1e-5)
