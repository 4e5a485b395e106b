"""Dropout, running statistics, shared blocks, wrong shapes, and the user's own loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pullback.methods import shallow
from pullback.testing.ranks import run_ranks

ResidualStack: Any = shallow.ResidualStack  # also with arguments of wrong types, which must be refused


def tanh_blocks(count=4, width=4) -> Any:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(count)]


# --- randomness and statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("order", [1, 2])
def test_dropout_draws_for_each_branch_by_itself(fuse, order):
    torch.manual_seed(0)
    blocks: Any = [nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Dropout(0.5)) for _ in range(2)]
    for block, value in zip(blocks, (1.0, 10.0), strict=True):  # tanh(value) is what a branch gives, or 0
        nn.init.zeros_(block[0].weight)
        nn.init.constant_(block[0].bias, value)
    stack = ResidualStack(blocks, fuse=fuse, order=order)
    out = stack(torch.zeros(4000, 1))[:, 0]
    a, b = 2 * torch.tanh(torch.tensor([1.0, 10.0]))
    for wanted in (0.0, a, b, a + b):
        assert float((out - wanted).abs().lt(1e-4).float().mean()) == pytest.approx(0.25, abs=0.03)
    stack.eval()
    assert torch.allclose(stack(torch.zeros(3, 1)), (a + b) / 2)


def test_dropout_before_the_first_layer_is_not_shared():
    blocks: Any = [nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4)) for _ in range(3)]
    assert ResidualStack(blocks).plan == "loop"


@pytest.mark.parametrize("fuse", ["auto", "vmap"])
def test_batch_statistics_are_those_of_the_stacks_input(fuse):
    torch.manual_seed(0)
    blocks: Any = [
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=1.0), nn.Tanh()) for _ in range(3)
    ]
    x = torch.randn(16, 4)
    stack = ResidualStack(blocks, fuse=fuse)
    out = stack(x)
    torch.testing.assert_close(out, x + sum(block(x) for block in copy.deepcopy(blocks)))
    for each in blocks:
        block: Any = each
        torch.testing.assert_close(block[1].running_mean, block[0](x).mean(0))
        assert int(block[1].num_batches_tracked) == 1
    stack.eval()
    looped = ResidualStack(blocks, fuse="loop").eval()
    torch.testing.assert_close(stack(x), looped(x))


def test_batch_statistics_in_order_two():
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=1.0), nn.Tanh()).double() for _ in range(3)
    ]
    x = torch.randn(16, 4, dtype=torch.float64)
    wanted, before = x, torch.zeros_like(x)
    for block in copy.deepcopy(blocks):
        value, turned = torch.autograd.functional.jvp(block, x, before, strict=False)
        wanted, before = wanted + value + turned, before + value
    out = ResidualStack(blocks, order=2)(x)
    torch.testing.assert_close(out, wanted)
    for each in blocks:
        block: Any = each
        torch.testing.assert_close(block[1].running_mean, block[0](x).mean(0))
        assert int(block[1].num_batches_tracked) == 1
    out.sum().backward()


# --- shared and equal blocks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2])
def test_a_shared_block_collapses_to_a_multiple_of_itself(order):
    (block,) = tanh_blocks(1)
    calls = []
    block.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 4)
    shared = ResidualStack([block] * 5, order=order)
    out = shared(x)
    assert len(calls) <= order
    apart = ResidualStack([copy.deepcopy(block) for _ in range(5)], mode="sequential", order=order)
    apart.mode = "parallel"
    torch.testing.assert_close(out, apart(x))
    grad = torch.autograd.grad(out.sum(), block[0].weight)[0]
    others = torch.autograd.grad(apart(x).sum(), [b[0].weight for b in apart.blocks])
    torch.testing.assert_close(grad, torch.stack(others).sum(0))


def test_a_shared_block_with_dropout_still_draws_for_each_use():
    block: Any = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))
    nn.init.zeros_(block[0].weight)
    nn.init.ones_(block[0].bias)
    out = ResidualStack([block] * 2)(torch.zeros(2000, 1))
    assert {round(v) for v in out.detach().flatten().tolist()} == {0, 2, 4}


def test_tied_weights_get_the_sum_of_both_gradients():
    blocks = tanh_blocks(3)
    blocks[2][0].weight = blocks[0][0].weight
    x = torch.randn(3, 4)
    fused, looped = ResidualStack(blocks), ResidualStack(blocks, fuse="loop")
    assert fused.plan == "wide"
    grads = [torch.autograd.grad(s(x).sum(), list(s.parameters())) for s in (fused, looped)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_equal_blocks_are_warned_about_and_stay_equal():
    (block,) = tanh_blocks(1)
    with pytest.warns(UserWarning, match="blocks 0 and 1 hold equal parameters"):
        stack = ResidualStack([copy.deepcopy(block) for _ in range(2)])
    optimizer = torch.optim.Adam(stack.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        stack(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    assert torch.equal(stack.blocks[0][0].weight, stack.blocks[1][0].weight)


# --- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
@pytest.mark.parametrize("fuse", ["auto", "loop"])
def test_a_change_of_shape_is_refused_also_where_it_would_broadcast(mode, fuse):
    stack = ResidualStack([nn.Sequential(nn.Linear(4, 1), nn.Tanh()) for _ in range(2)], mode=mode, fuse=fuse)
    with pytest.raises(ValueError, match=r"must keep the input's shape \(3, 4\), got \(3, 1\)"):
        stack(torch.randn(3, 4))


def test_a_branch_that_edits_its_input_is_refused():
    blocks: Any = [nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)) for _ in range(2)]
    for mode in ("parallel", "sequential"):
        with pytest.raises(RuntimeError, match="branch 0 must not edit its input in place"):
            ResidualStack(blocks, mode=mode)(torch.randn(3, 4))


def test_a_branch_without_a_tensor_is_refused():
    with pytest.raises(TypeError, match="branch 0 must return a tensor, got tuple"):
        ResidualStack([nn.LSTM(4, 4), nn.LSTM(4, 4)])(torch.randn(3, 2, 4))


def test_settings_are_checked_when_they_are_set():
    stack = ResidualStack(tanh_blocks())
    for name, value, message in (
        ("mode", "wide", "mode must be one of 'sequential', 'parallel', got 'wide'"),
        ("order", 3, "order must be one of 1, 2, got 3. Higher orders need higher derivatives"),
        ("branch_scale", -1.0, "branch_scale must be > 0, got -1.0"),
        ("branch_scale", "N", r"branch_scale must be one of '1/sqrt\(N\)', got 'N'"),
    ):
        with pytest.raises(ValueError, match=message):
            setattr(stack, name, value)
    with pytest.raises(TypeError, match="blocks must be a list of modules, got a Linear"):
        ResidualStack(nn.Linear(2, 2))


# --- the user's loop -------------------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), ResidualStack(tanh_blocks()), nn.Linear(4, 3))


def train(model, optimizer, steps, scheduler=None):
    for step in steps:
        g = torch.Generator().manual_seed(step)
        for _ in range(2):  # accumulation
            x, y = torch.randn(8, 6, generator=g), torch.randint(3, (8,), generator=g)
            F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_resumes_bitwise_and_the_form_may_change_on_the_way(optimizer):
    def setup():
        model = network()
        opt = optimizer(model.parameters(), lr=0.05)
        return model, opt, torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)

    model, opt, scheduler = setup()
    train(model, opt, range(3), scheduler)
    saved = [copy.deepcopy(each.state_dict()) for each in (model, opt, scheduler)]
    model[1].mode = "sequential"
    train(model, opt, range(3, 6), scheduler)
    again = setup()
    for each, state in zip(again, saved, strict=True):
        each.load_state_dict(state)
    again[0][1].mode = "sequential"
    train(*again[:2], range(3, 6), again[2])
    for one, other in zip(model.parameters(), again[0].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("fuse", ["auto", "vmap", "loop"])
def test_compiled_equals_eager(order, fuse):
    torch._dynamo.reset()
    stack, x = ResidualStack(tanh_blocks(), order=order, fuse=fuse), torch.randn(3, 4, requires_grad=True)
    compiled = torch.compile(stack, backend="aot_eager", fullgraph=True)
    for one, other in zip(*(torch.autograd.grad(s(x).sum(), [x, *stack.parameters()]) for s in (compiled, stack)),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("order", [1, 2])
def test_autocast_and_gradient_scaling(order):
    stack = ResidualStack(tanh_blocks(), order=order)
    x = torch.randn(16, 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = stack(x).float().square().mean()
    scaler.scale(loss).backward()
    wanted = torch.autograd.grad(stack(x).square().mean(), list(stack.parameters()))
    for p, grad in zip(stack.parameters(), wanted, strict=True):
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad / 1024, grad, rtol=0.1, atol=0.02)


def test_order_two_trains_with_the_exact_gradient():
    torch.manual_seed(0)
    stack = ResidualStack([b.double() for b in tanh_blocks(3)], order=2)
    x = torch.randn(2, 4, dtype=torch.float64)
    names = [name for name, _ in stack.named_parameters()]

    def loss(*values):
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(stack, state, (x,)).square().sum()

    assert torch.autograd.gradcheck(
        loss, [p.detach().requires_grad_() for p in stack.parameters()], fast_mode=True
    )


def _rank(rank, world):
    model = network().double()
    wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    g = torch.Generator().manual_seed(1)
    for step in range(6):
        model[1].order = 1 + step % 2
        x = torch.randn(8, 6, generator=g, dtype=torch.float64)[rank::world]
        optimizer.zero_grad()
        wrapped(x).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.timeout(250)
def test_two_ranks_equal_one_process():
    first, second = run_ranks(_rank, 2)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, _rank(0, 1), rtol=0, atol=1e-12)
