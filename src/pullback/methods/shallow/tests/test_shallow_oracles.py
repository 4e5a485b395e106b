"""The forms against their literal transcription, the expansion's error, and what comes back through each form."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from pullback.methods import shallow
from pullback.methods.shallow import determination_ratio
from pullback.methods.shallow.tests import reference

ResidualStack: Any = shallow.ResidualStack  # also with arguments of wrong types, which must be refused
truncation_report: Any = shallow.truncation_report

WIDTH = 6


def double(build, count, seed=0):
    torch.manual_seed(seed)
    return [build().double() for _ in range(count)]


def tanh_block():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())


def perceptron():
    return nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 9), nn.Tanh(), nn.Linear(9, WIDTH))


def normed():
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 9), nn.GELU(), nn.Linear(9, WIDTH))


def linear():
    return nn.Linear(WIDTH, WIDTH)


def draw(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tanh_block, perceptron, normed, linear])
@pytest.mark.parametrize("fuse", ["auto", "vmap", "loop"])
def test_forms_equal_the_reference(build, fuse):
    blocks = double(build, 4)
    stack = ResidualStack(blocks, fuse=fuse)
    x = draw(5, WIDTH)
    for name, mode, order in (
        ("sequential", "sequential", 1),
        ("first_order", "parallel", 1),
        ("second_order", "parallel", 2),
    ):
        stack.mode, stack.order = mode, order
        wanted = torch.stack([getattr(reference, name)(blocks, row) for row in x])
        torch.testing.assert_close(stack(x), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2])
def test_linear_branches_give_the_sum_over_ordered_subsets(order):
    blocks = double(lambda: nn.Linear(WIDTH, WIDTH, bias=False), 4)
    matrices = [block.weight.detach() for block in blocks]
    x = draw(WIDTH)
    out = ResidualStack(blocks, order=order)(x[None])[0]
    torch.testing.assert_close(out, reference.expansion(matrices, x, order), rtol=0, atol=1e-12)


def test_an_expansion_of_full_order_is_the_sequence():
    blocks = double(lambda: nn.Linear(WIDTH, WIDTH, bias=False), 5)
    x = draw(WIDTH)
    full = reference.expansion([block.weight.detach() for block in blocks], x, 5)
    torch.testing.assert_close(ResidualStack(blocks, mode="sequential")(x[None])[0], full, rtol=0, atol=1e-12)
    pair = ResidualStack(double(linear, 2), order=2)
    second = pair(x[None])
    pair.mode = "sequential"  # two linear blocks: order 2 is all there is, offsets included
    torch.testing.assert_close(second, pair(x[None]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_one_block_is_the_same_in_both_forms(order, scale):
    stack = ResidualStack(double(tanh_block, 1), order=order, branch_scale=scale)
    x = draw(3, WIDTH)
    parallel = stack(x)
    stack.mode = "sequential"
    assert torch.equal(parallel, stack(x))


@pytest.mark.parametrize("build", [tanh_block, perceptron, normed, linear])
@pytest.mark.parametrize("order", [1, 2])
def test_branches_of_zero_give_the_identity(build, order):
    blocks = double(build, 3)
    for block in blocks:
        for p in list(block.parameters())[-2:]:  # the last layer; what lies before it stays as it is
            nn.init.zeros_(p)
    x = draw(3, WIDTH)
    stack = ResidualStack(blocks, mode="sequential", order=order)  # equal blocks: no warning in this form
    assert torch.equal(stack(x), x)
    stack.mode = "parallel"
    assert torch.equal(stack(x), x)


def test_the_scale_multiplies_every_branch_and_its_square_the_second_order():
    blocks, x = double(tanh_block, 4), draw(WIDTH)
    scaled = [lambda z, block=block: 0.5 * block(z) for block in blocks]
    for order, name in ((1, "first_order"), (2, "second_order")):
        stack = ResidualStack(blocks, order=order, branch_scale="1/sqrt(N)")  # N = 4
        torch.testing.assert_close(stack(x[None])[0], getattr(reference, name)(scaled, x), rtol=0, atol=1e-12)
    stack.mode = "sequential"
    torch.testing.assert_close(stack(x[None])[0], reference.sequential(scaled, x), rtol=0, atol=1e-12)


# --- size of the error -----------------------------------------------------------------------------------------


def small_blocks():
    torch.manual_seed(1)
    blocks = []
    for _ in range(6):
        layer = nn.Linear(20, 20, bias=False).double()
        nn.init.normal_(layer.weight, std=20**-0.5)
        blocks.append(nn.Sequential(layer, nn.Tanh()))
    return blocks


def test_errors_fall_with_the_square_and_the_cube_of_the_branches():
    blocks, x = small_blocks(), draw(64, 20)
    exact = ResidualStack(blocks, mode="sequential")
    scales = (0.1, 0.05, 0.025)
    for order, power, tolerance in ((1, 2.0, 0.1), (2, 3.0, 0.2)):
        expanded = ResidualStack(blocks, order=order)
        errors = []
        for scale in scales:
            exact.branch_scale = expanded.branch_scale = scale
            errors.append(float((exact(x) - expanded(x)).detach().norm()))
        slope = math.log(errors[0] / errors[-1]) / math.log(scales[0] / scales[-1])
        assert slope == pytest.approx(power, abs=tolerance)
    report = truncation_report(ResidualStack(blocks, branch_scale=0.05), x)
    assert report.slopes == pytest.approx((2.0, 3.0), abs=0.1)
    assert report.gaps[1] < 0.2 * report.gaps[0] < 0.02


# --- what comes back -------------------------------------------------------------------------------------------


def test_a_blocks_gradient_does_not_see_the_other_blocks():
    blocks, x, back = double(tanh_block, 4), draw(5, WIDTH), draw(5, WIDTH, seed=4)

    def gradient(mode):
        stack = ResidualStack(blocks, mode=mode)
        return torch.autograd.grad((stack(x) * back).sum(), list(blocks[1].parameters()))

    before = {mode: gradient(mode) for mode in ("parallel", "sequential")}
    for block in (blocks[0], blocks[3]):
        nn.init.normal_(block[0].weight)
    after = {mode: gradient(mode) for mode in ("parallel", "sequential")}
    for one, other in zip(before["parallel"], after["parallel"], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
    assert not torch.allclose(before["sequential"][0], after["sequential"][0], atol=1e-3)


@pytest.mark.parametrize("build", [tanh_block, perceptron])
def test_jacobians_are_a_product_and_a_sum(build):
    blocks, x = double(build, 5), draw(WIDTH)
    for mode, wanted in (("sequential", reference.jacobian_product), ("parallel", reference.jacobian_sum)):
        stack = ResidualStack(blocks, mode=mode)
        jacobian = torch.autograd.functional.jacobian(lambda v, s=stack: s(v[None])[0], x)
        ours, theirs = torch.linalg.svdvals(jacobian), torch.linalg.svdvals(wanted(blocks, x))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_many_blocks_let_singular_values_of_the_sequence_explode_but_not_of_the_sum():
    torch.manual_seed(0)
    blocks = double(lambda: nn.Linear(WIDTH, WIDTH, bias=False), 64)
    for block in blocks:
        nn.init.orthogonal_(block.weight)
    largest = {
        mode: float(
            torch.linalg.svdvals(ResidualStack(blocks, mode=mode)(torch.eye(WIDTH).double()).detach())[0]
        )
        for mode in ("sequential", "parallel")
    }
    assert largest["parallel"] <= 65.0 < largest["sequential"] / 1e3


# --- the report ------------------------------------------------------------------------------------------------


def test_the_report_holds_the_quantities_of_their_definitions():
    blocks, x = double(tanh_block, 3), draw(4, WIDTH)
    stack = ResidualStack(blocks, branch_scale=0.5)
    found = truncation_report(stack, x, samples=500, outputs=10, loss=lambda y: y.square().sum())
    f = [lambda z, block=block: 0.5 * block(z) for block in blocks]
    z0, z1, z2, z3 = x, x + f[0](x), None, None
    z2 = z1 + f[1](z1)
    z3 = z2 + f[2](z2)
    wanted = [
        float((f[k](z).norm(dim=1) / z.norm(dim=1)).mean().detach()) for k, z in enumerate((z0, z1, z2))
    ]
    assert found.eps == pytest.approx(wanted, rel=1e-12)
    first = x + f[0](x) + f[1](x) + f[2](x)
    second = torch.stack([reference.second_order(f, row) for row in x])
    moved = float((z3 - x).detach().norm())
    gaps = (float((z3 - first).detach().norm()) / moved, float((z3 - second).detach().norm()) / moved)
    assert found.gaps == pytest.approx(gaps, rel=1e-10)
    assert found.path_share == pytest.approx(float((first - x).detach().norm()) / moved, rel=1e-12)
    assert (found.blocks, found.parameters) == (3, 126)
    assert found.determination == pytest.approx(5000 / 126) == determination_ratio(500, 10, stack)
    grads = {}
    for mode in ("sequential", "parallel"):
        stack.mode = mode
        loss = stack(x).square().sum()
        grads[mode] = [
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(loss, list(b.parameters()), retain_graph=True)]
            )
            for b in blocks
        ]
    cosines = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(*grads.values(), strict=True)]
    assert found.cosines == pytest.approx(cosines, rel=1e-10)
    for mode, rows in grads.items():
        assert found.gradient_norms[mode] == pytest.approx([float(g.norm()) for g in rows], rel=1e-10)


def test_the_report_leaves_no_trace_and_ignores_dropout():
    torch.manual_seed(0)
    blocks: Any = [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.5)) for _ in range(3)]
    stack = ResidualStack(blocks).train()
    before, rng = copy.deepcopy(stack.state_dict()), torch.get_rng_state()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = truncation_report(stack, x)
    assert first == truncation_report(stack, x)
    assert stack.training
    assert all(block.training for block in blocks)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in stack.state_dict().items())
    assert all(p.grad is None for p in stack.parameters())


def test_the_report_of_one_block_or_of_zeros_has_no_gap():
    assert truncation_report(ResidualStack(double(tanh_block, 1)), draw(3, WIDTH)).gaps == (0.0, 0.0)
    blocks = double(linear, 2)
    for block in blocks:
        nn.init.zeros_(block.weight)
        nn.init.zeros_(block.bias)
    with pytest.warns(UserWarning, match="blocks 0 and 1 hold equal parameters"):
        stack = ResidualStack(blocks)
    found = truncation_report(stack, draw(3, WIDTH))
    assert found.gaps == (0.0, 0.0)
    assert found.eps == (0.0, 0.0)
    assert all(map(math.isnan, found.slopes))


def test_the_report_refuses_what_it_cannot_measure():
    stack = ResidualStack(double(tanh_block, 2))
    with pytest.raises(TypeError, match="stack must be of type ResidualStack, got Linear"):
        truncation_report(nn.Linear(2, 2), draw(3, WIDTH))
    with pytest.raises(ValueError, match=r"x must be a batch of at least one example, got shape \(6,\)"):
        truncation_report(stack, draw(WIDTH))
    with pytest.raises(ValueError, match="max_order must be one of 1, 2, got 3"):
        truncation_report(stack, draw(2, WIDTH), max_order=3)
    with pytest.raises(ValueError, match="outputs must be >= 1, got 0"):
        truncation_report(stack, draw(2, WIDTH), samples=10)
    with pytest.raises(TypeError, match="x must be a floating tensor"):
        truncation_report(stack, torch.zeros(2, WIDTH, dtype=torch.long))
