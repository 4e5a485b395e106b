"""Stages against the coupling's equations, plain automatic differentiation, revtorch, and in what they keep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import revtorch
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pullback.core.saved_bytes import saved_bytes
from pullback.methods.rev_mbconv_unet import MBConv, ReversibleStage
from pullback.methods.rev_mbconv_unet.tests import reference
from pullback.methods.rev_mbconv_unet.tests.test_mbconv import random, spread


def bottlenecks(blocks, c=2, dims=2, **settings):
    torch.manual_seed(0)
    parts = [MBConv(c, spatial_dims=dims, **settings) for _ in range(2 * blocks)]
    return list(zip(parts[::2], parts[1::2], strict=True))


def noisy(norm):
    """A function with dropout in its middle, as a user would write it."""
    middle = nn.GroupNorm(1, 6) if norm == "group" else nn.BatchNorm2d(6)
    parts = (
        nn.Conv2d(2, 6, 3, padding=1),
        middle,
        nn.Dropout(0.2),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 2, 1),
    )
    return nn.Sequential(*parts)


def run(stage, x, *, reversible, seed=3):
    """Output, gradients, buffers and the generator's state."""
    stage.reversible = reversible
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    out = stage(x)
    state = torch.get_rng_state()
    weights = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    grads = torch.autograd.grad((out * weights).sum(), [x, *stage.parameters()])
    return out.detach(), grads, [b.clone() for b in stage.buffers()], state


@pytest.mark.parametrize("dims", [2, 3])
def test_equals_the_equations_and_their_inverse(dims):
    stage = spread(ReversibleStage(bottlenecks(2, dims=dims)).double())
    x = random(2, 4, *(3, 4, 3)[:dims])

    def function(fn):
        state = {name: p.detach().numpy() for name, p in fn.named_parameters()}
        groups, wide = fn.norm3.num_groups, fn.norm1.num_groups
        return lambda h: reference.mbconv(h, state, groups=groups, wide_groups=wide)

    fns = [function(fn) for fn in stage.functions()]
    pairs = list(zip(fns[::2], fns[1::2], strict=True))
    y = reference.coupling(x[:, :2].numpy(), x[:, 2:].numpy(), pairs)
    got = stage(x)
    torch.testing.assert_close(got.detach(), torch.from_numpy(np.concatenate(y, 1)), rtol=0, atol=1e-10)
    back = np.concatenate(reference.coupling_inverse(*y, pairs), 1)
    torch.testing.assert_close(stage.inverse(got).detach(), torch.from_numpy(back), rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.from_numpy(back), x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_gradients_buffers_and_random_numbers_are_those_of_the_plain_stage(norm):
    found = []
    for reversible in (True, False):
        torch.manual_seed(0)
        stage = ReversibleStage([(noisy(norm), noisy(norm)) for _ in range(3)]).double()
        found.append(run(stage, random(4, 4, 5, 5), reversible=reversible))
    (out, grads, buffers, state), (wanted, others, kept, after) = found
    assert torch.equal(out, wanted)
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-10)
    assert all(map(torch.equal, buffers, kept))
    assert torch.equal(state, after)


@pytest.mark.parametrize("norm", ["group", "instance", "batch"])
def test_single_precision(norm):
    stage = ReversibleStage(bottlenecks(6, c=4, norm=norm))
    x = random(2, 8, 6, 6, dtype=torch.float32)
    _, grads, *_ = run(stage, x, reversible=True)
    _, others, *_ = run(stage, x, reversible=False)
    error = torch.stack([(a - b).norm() for a, b in zip(grads, others, strict=True)]).norm()
    assert float(error / torch.stack([b.norm() for b in others]).norm()) < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(stage.eval().inverse(stage(x)), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("e", [1, 2, 4, 6])
@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("act", ["silu", "leaky_relu"])
def test_bytes_of_the_table(e, blocks, act):
    """In half states: plain B (12e + 4) + 1 with the output that is read next, checkpoint 2B + 2, reversible 2."""
    stage = ReversibleStage(bottlenecks(blocks, dims=3, expansion=e, act=act))
    x = random(2, 4, 8, 8, 8, dtype=torch.float32).requires_grad_()
    unit = x.nbytes / 2
    ends = nn.Parameter(torch.ones(2))

    def read(pair):  # what follows keeps both halves
        return pair[0] * ends[0] + pair[1] * ends[1]

    def plain():
        stage.reversible = False
        return read(stage(tuple(half * 1 for half in x.chunk(2, 1))))

    def checkpointed():
        pair = tuple(half * 1 for half in x.chunk(2, 1))
        fns = list(stage.functions())
        for f, g in zip(fns[::2], fns[1::2], strict=True):
            one = ReversibleStage([(f, g)], reversible=False)
            pair = checkpoint(lambda a, b, one=one: one((a, b)), *pair, use_reentrant=False)
        return read(pair)

    def reversible():
        stage.reversible = True
        return read(stage(tuple(half * 1 for half in x.chunk(2, 1))))

    units = {call.__name__: saved_bytes(call, stage, x, ends) / unit for call in (plain, reversible)}
    per_block = reference.units_of_plain_stage(blocks, e, in_place=act == "leaky_relu")
    assert units["plain"] == pytest.approx(per_block + 1, rel=0.01)
    assert units["reversible"] == pytest.approx(reference.UNITS_OF_REVERSIBLE_STAGE, rel=1e-6)
    if act == "silu":
        assert saved_bytes(checkpointed, stage, x, ends) / unit == pytest.approx(2 * blocks + 2, rel=0.01)


def test_a_tensor_keeps_no_more_than_its_two_halves():
    stage, x = ReversibleStage(bottlenecks(2)), random(1, 4, 8, 8, dtype=torch.float32)
    assert saved_bytes(lambda: stage(x * 1), stage) == x.nbytes
    stage.reversible = False
    unit = x.nbytes / 2  # one half of the input, not a view of the whole
    assert saved_bytes(lambda: stage(x * 1), stage) / unit == pytest.approx(2 * (12 * 2 + 4), rel=0.05)


def test_zero_init_is_the_identity_and_trains_only_last_norms():
    stage = ReversibleStage(bottlenecks(3, zero_init=True))
    x = random(2, 4, 5, 5, dtype=torch.float32)
    out, grads, *_ = run(stage, x, reversible=True)
    assert torch.equal(out, x)
    for (name, _), grad in zip(stage.named_parameters(), grads[1:], strict=True):
        assert (float(grad.abs().max()) > 0) == ("norm3" in name), name


def test_equals_revtorch():
    pairs = bottlenecks(3, dims=3)
    stage, x = ReversibleStage(pairs), random(1, 4, 4, 4, 4, dtype=torch.float32)
    peer = revtorch.ReversibleSequence(nn.ModuleList(revtorch.ReversibleBlock(f, g) for f, g in pairs))
    out, grads, *_ = run(stage, x, reversible=True)
    leaf = x.clone().requires_grad_()
    wanted = peer(leaf)
    (wanted * torch.cos(torch.arange(out.numel()).float()).view_as(out)).sum().backward()
    assert torch.equal(out, wanted)
    others: Any = [leaf.grad, *(p.grad for p in stage.parameters())]
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()) + 1e-7)


def test_without_a_graph_nothing_is_kept():
    stage, x = ReversibleStage(bottlenecks(2)), random(1, 4, 6, 6, dtype=torch.float32)
    with torch.no_grad():
        assert saved_bytes(lambda: stage(x)) == 0
        assert not stage(x).requires_grad
    frozen = ReversibleStage(bottlenecks(1)).requires_grad_(False)
    assert saved_bytes(lambda: frozen(x), x) == 0


@pytest.mark.parametrize("reversible", [True, False])
def test_state_stays_in_single_precision_under_autocast(reversible):
    stage = ReversibleStage(bottlenecks(4, c=4))
    x = random(2, 8, 6, 6, dtype=torch.bfloat16).requires_grad_()
    stage.reversible = reversible
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = stage(x)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert x.grad.dtype == torch.bfloat16


def test_gradients_under_autocast_are_those_of_the_plain_stage():
    stage = ReversibleStage(bottlenecks(4, c=4))
    x = random(2, 8, 6, 6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, grads, *_ = run(stage, x, reversible=True)
        wanted, others, *_ = run(stage, x, reversible=False)
    assert torch.equal(out, wanted)
    error = torch.stack([(a - b).float().norm() for a, b in zip(grads, others, strict=True)]).norm()
    assert float(error / torch.stack([b.float().norm() for b in others]).norm()) < 1e-2


def test_an_edit_of_the_output_is_noticed():
    stage = ReversibleStage(bottlenecks(1))
    first, second = stage((random(1, 2, 4, 4, dtype=torch.float32), torch.ones(1, 2, 4, 4)))
    loss = (first * second).sum()
    with torch.no_grad():
        first.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_other_axes_can_be_split():
    torch.manual_seed(0)
    stage = ReversibleStage([(nn.Linear(3, 3), nn.Linear(3, 3))], split_dim=-1)
    x = torch.randn(5, 2, 6)
    torch.testing.assert_close(stage.inverse(stage(x)), x, rtol=0, atol=1e-5)


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fn",
    [
        nn.Conv2d(2, 2, 3, stride=2, padding=1),
        nn.Conv2d(2, 3, 1),
        nn.Conv2d(2, 2, 3),
        nn.Sequential(nn.Conv2d(2, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout())),
        nn.Sequential(nn.Conv3d(2, 2, 1), nn.MaxPool3d(2)),
    ],
)
def test_a_change_of_shape_is_refused_at_construction(fn):
    good = nn.Identity()
    with pytest.raises(
        ValueError, match=r"blocks\[0\]\[1\] must keep the shape of its input, got .* stride 1"
    ):
        ReversibleStage([(good, fn)])
    assert all(p.device.type == "cpu" for p in fn.parameters())


def test_what_shrinks_and_grows_again_is_fine():
    fn = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, 2))
    other = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Dropout(0.5))
    before = torch.get_rng_state()
    stage = ReversibleStage([(fn, other)])
    assert torch.equal(before, torch.get_rng_state())
    assert stage(torch.zeros(1, 4, 6, 6)).shape == (1, 4, 6, 6)


class Narrow(nn.Module):
    def forward(self, x):
        return x[:, :1]


class Overwriting(nn.Module):
    def forward(self, x):
        return x.relu_() * 1.5


@pytest.mark.parametrize("reversible", [True, False])
def test_what_only_a_call_can_show_is_refused_there(reversible):
    x = torch.ones(1, 4, 5, 5)
    with pytest.raises(ValueError, match=r"must keep the shape .* got .*Use stride 1"):
        ReversibleStage([(Narrow(), Narrow())], reversible=reversible)(x)
    with pytest.raises(RuntimeError, match=r"must not overwrite its input, got .*inplace=False"):
        ReversibleStage([(Overwriting(), nn.Identity())], reversible=reversible)(x)
    first = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(2, 2, 1))
    with pytest.raises(RuntimeError, match="must not overwrite its input"):
        ReversibleStage([(first, nn.Identity())], reversible=reversible)(x)


def test_buffers_that_change_the_function_are_refused():
    fn = nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 2, 1))
    stage = ReversibleStage([(nn.Conv2d(2, 2, 1), fn)])
    with pytest.raises(RuntimeError, match="buffers"):
        stage(torch.ones(1, 4, 3, 3)).sum().backward()


def test_second_derivatives_are_refused_and_work_without_reversal():
    stage, x = ReversibleStage(bottlenecks(1)).double(), random(1, 4, 3, 3).requires_grad_()
    (grad,) = torch.autograd.grad(stage(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.sum().backward()
    stage.reversible = False
    (grad,) = torch.autograd.grad(stage(x).square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert float(x.grad.abs().max()) > 0


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            torch.ones(1, 3, 4, 4),
            ValueError,
            r"x must have an even size along split_dim=1, got .*\(1, 3, 4, 4\)",
        ),
        (torch.ones(4), ValueError, "x must have an even size along split_dim=1"),
        (torch.ones(1, 4, 4, 4).int(), TypeError, "x must be a floating tensor, got"),
        (
            (torch.ones(1, 2, 4, 4), torch.ones(1, 2, 4, 5)),
            ValueError,
            "x must be two halves of equal shapes, got",
        ),
        ((torch.ones(1, 2, 4, 4),), TypeError, "x must be a tensor or a pair of tensors, got"),
        ("x", TypeError, "x must be a tensor or a pair of tensors, got 'x'"),
    ],
)
def test_other_states_are_refused(x, error, message):
    with pytest.raises(error, match=message):
        ReversibleStage(bottlenecks(1))(x)


def test_other_blocks_are_refused():
    with pytest.raises(ValueError, match=r"blocks must hold at least one pair \(F, G\), got none"):
        ReversibleStage([])
    functions: Any = [(torch.sin, torch.cos)]
    with pytest.raises(TypeError, match=r"blocks\[0\] must be a pair \(F, G\) of modules, got"):
        ReversibleStage(functions)
    mixed: Any = [*bottlenecks(1), MBConv(2)]
    with pytest.raises(TypeError, match=r"blocks\[1\] must be a pair"):
        ReversibleStage(mixed)
