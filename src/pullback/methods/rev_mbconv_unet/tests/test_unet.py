"""The network: its shapes, its paddings, what it keeps, and its equality with and without reversal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pullback.core.saved_bytes import saved_bytes
from pullback.methods.rev_mbconv_unet import (
    MBConv,
    ReversibleUNet,
    analytic_bytes,
    peak_bytes,
    soft_dice,
)
from pullback.methods.rev_mbconv_unet.tests.test_mbconv import random, spread

SHAPES = {2: (2, 1, 12, 8), 3: (1, 1, 8, 4, 12)}


def network(dims=2, **settings):
    chosen: Any = {"widths": (4, 8, 12), "blocks": (1, 2, 1), "spatial_dims": dims, **settings}
    torch.manual_seed(0)
    return ReversibleUNet(1, 2, **chosen)


def gradients(net, x, target):
    net.zero_grad()
    loss = soft_dice(net(x), target)
    return loss.detach(), torch.autograd.grad(loss, list(net.parameters()))


@pytest.mark.parametrize("dims", [2, 3])
def test_equals_its_layers_written_out(dims):
    """One level with what stands around the stages, on concatenated states as in the description."""
    net = spread(network(dims, widths=(4, 6), blocks=(1, 1)).double())
    conv, pool = (F.conv2d, F.max_pool2d) if dims == 2 else (F.conv3d, F.max_pool3d)
    x = random(*SHAPES[dims])

    def stage(stage, h):
        a, b = h.chunk(2, 1)
        f, g = (fn for fn in stage.modules() if isinstance(fn, MBConv))
        a = a + f(b)
        return torch.cat([a, b + g(a)], 1)

    top = stage(net.encoder[0], conv(x, net.first.weight, padding=1))
    low = stage(net.encoder[1], conv(pool(top, 2), net.down[0].conv.weight, net.down[0].conv.bias))
    low = conv(stage(net.decoder[1], low), net.up[0].conv.weight, net.up[0].conv.bias)
    mode = "bilinear" if dims == 2 else "trilinear"
    top = stage(net.decoder[0], top + F.interpolate(low, scale_factor=2, mode=mode, align_corners=False))
    wanted = conv(top, net.last.conv.weight, net.last.conv.bias)
    torch.testing.assert_close(net(x), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", ["group", "instance", "batch"])
@pytest.mark.parametrize("act", ["silu", "leaky_relu"])
def test_gradients_are_those_of_the_plain_network(dims, norm, act):
    x, target = random(*SHAPES[dims]), random(2, seed=9).new_zeros(())
    net = network(dims, norm=norm, act=act, squeeze_excite=0.5).double()
    target = (random(*net(x).shape, seed=5) > 0).double()
    found = {}
    for reversible in (True, False):
        twin = network(dims, norm=norm, act=act, squeeze_excite=0.5).double().set_reversible(reversible)
        found[reversible] = gradients(twin, x, target), {k: b.clone() for k, b in twin.named_buffers()}
    (loss, grads), buffers = found[True]
    (wanted, others), kept = found[False]
    assert torch.equal(loss, wanted)
    scale = max(float(g.abs().max()) for g in others)
    assert all(float((a - b).abs().max()) < 1e-10 * scale for a, b in zip(grads, others, strict=True))
    assert all(torch.equal(buffers[name], kept[name]) for name in kept)


def test_gradients_in_single_precision():
    x = random(1, 1, 8, 8, 8, dtype=torch.float32)
    target = (random(1, 2, 8, 8, 8, seed=5) > 0).float()
    net = network(3, blocks=(2, 2, 2))
    _, grads = gradients(net, x, target)
    _, others = gradients(net.set_reversible(False), x, target)
    norms = [torch.stack([(a - b).norm() for a, b in zip(grads, others, strict=True)]).norm()]
    assert float(norms[0] / torch.stack([b.norm() for b in others]).norm()) < 1e-5


@pytest.mark.parametrize("sides", [(5, 7, 9), (1, 8, 3), (4, 4, 5)])
def test_sides_that_are_not_divisible_are_padded_and_cropped(sides):
    net = network(3, groups=1)
    x = random(1, 1, *sides, dtype=torch.float32)
    out = net(x)
    assert out.shape == (1, 2, *sides)
    whole = x.new_zeros(1, 1, *net.padded_sides(sides))
    whole[..., : sides[0], : sides[1], : sides[2]] = x
    torch.testing.assert_close(out, net(whole)[..., : sides[0], : sides[1], : sides[2]])


def test_the_next_multiple():
    assert network(3).padded_sides((155, 240, 1)) == (156, 240, 4)
    assert ReversibleUNet(1, 1, widths=(2,) * 5, blocks=(1,) * 5).padded_sides((155,) * 3) == (160,) * 3


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"norm": "batch", "act": "relu6"},
        {"norm": "instance", "act": "leaky_relu", "squeeze_excite": 0.25},
        {"expansion": 4, "blocks": (3, 1, 2)},
        {"widths": (6,), "blocks": (2,)},
        {"widths": (8, 4), "blocks": (1, 2)},
    ],
)
def test_report_agrees_with_the_count(dims, settings):
    net = network(dims, **settings)
    shape = (2, 1, 16, 12, 8)[: 2 + dims]
    report = net.activation_report(shape)
    assert report.disagreement < 0.01
    assert report.kept["reversible"] == report.counted["reversible"]
    assert report.kept["plain"] == report.counted["plain"]
    assert report.kept["reversible"] < report.kept["checkpoint"] < report.kept["plain"]


def test_report_of_a_padded_input_and_without_counting():
    net = network(3)
    report = net.activation_report((1, 1, 9, 6, 7))
    assert report.kept == {mode: analytic_bytes(net, (1, 1, 9, 6, 7), mode) for mode in report.kept}
    assert report.disagreement == 0.0
    quick = net.activation_report((1, 1, 240, 240, 155), count=False)
    assert not quick.counted
    assert quick.disagreement != quick.disagreement
    assert str(quick).splitlines()[0] == "input [1, 1, 240, 240, 155], MiBkept   counted      peak"


def test_report_leaves_no_trace():
    net = network(2, norm="batch")
    before, rng = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    net.activation_report((2, 1, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert all(stage.reversible for stage in net.stages())
    assert all(p.grad is None for p in net.parameters())


def test_a_network_on_meta_is_counted_without_memory():
    with torch.device("meta"):
        net = ReversibleUNet(4, 3, widths=(60, 120, 240, 360, 480), blocks=(1,) * 5)
    report = net.activation_report((1, 4, 240, 240, 155))
    assert report.disagreement < 0.01
    assert report.kept["plain"] > 2**34


def test_memory_is_flat_in_depth():
    shape, kept = (1, 1, 8, 8, 8), {True: [], False: []}
    for blocks in (1, 2, 4, 8):
        for reversible, found in kept.items():
            net = network(3, widths=(4, 8), blocks=(blocks, blocks), reversible=reversible)
            x = torch.zeros(shape)
            found.append(saved_bytes(lambda net=net, x=x: net(x), net, x))
    assert len(set(kept[True])) == 1
    assert kept[False][3] - kept[False][2] == 4 * (kept[False][1] - kept[False][0])


def test_peak_adds_one_bottleneck_and_two_pairs():
    net = network(3, widths=(4, 8), blocks=(2, 2), expansion=3)
    shape = (1, 1, 8, 8, 8)
    u = 2 * 512 * 4
    extra = peak_bytes(net, shape) - analytic_bytes(net, shape)
    assert extra == pytest.approx((6 * 3 + 1 + 4) * u, rel=0.01)
    assert peak_bytes(net, shape, "plain") == analytic_bytes(net, shape, "plain")
    again = peak_bytes(net, shape, "checkpoint") - analytic_bytes(net, shape, "checkpoint")
    assert again == pytest.approx((12 * 3 + 2 + 3) * u, rel=0.01)


def test_state_dict_is_the_same_in_both_modes():
    net = network(3)
    other = network(3, reversible=False)
    other.load_state_dict(net.state_dict())
    x = random(*SHAPES[3], dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(net(x), other(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": (4, 7)}, r"widths must hold an even number for every level, got \(4, 7\)"),
        ({"widths": ()}, r"widths must hold an even number for every level, got \(\)"),
        (
            {"widths": (4, 8), "blocks": (1,)},
            r"blocks must hold one number for each of the 2 widths, got \(1,\)",
        ),
        ({"blocks": (1, 0, 1)}, "blocks must be >= 1, got 0"),
        ({"spatial_dims": 4}, "spatial_dims must be one of 2, 3, got 4"),
        ({"norm": "none"}, "norm must be one of"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        network(**arguments)


def test_inputs_of_other_shapes_are_refused():
    net = network(3)
    with pytest.raises(
        ValueError, match=r"x must be of shape \(any, 1, any, any, any\), got a tensor of shape"
    ):
        net(torch.zeros(1, 2, 8, 8, 8))
    with pytest.raises(TypeError, match="x must be a floating tensor"):
        net(torch.zeros(1, 1, 8, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="input_shape must be"):
        net.activation_report((1, 1, 8, 8))
    with pytest.raises(ValueError, match="x must give norm='instance' more than one value"):
        network(3, norm="instance")(torch.zeros(1, 1, 4, 4, 4))
