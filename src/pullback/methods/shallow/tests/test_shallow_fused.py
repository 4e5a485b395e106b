"""Fused branches equal the loop of branches, their parameters stay the leaves, and what they cost."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pullback.methods import shallow

ResidualStack: Any = shallow.ResidualStack  # also with arguments of wrong types, which must be refused


def _conv(c=4, **settings: Any):
    settings = {"padding": 1, **settings}
    return lambda: nn.Sequential(nn.Conv2d(c, c, 3, **settings), nn.ReLU())


BLOCKS = {
    "linear": (lambda: nn.Linear(4, 4), (5, 3, 4), "wide"),
    "linear without bias": (lambda: nn.Linear(4, 4, bias=False), (5, 4), "wide"),
    "linear, tanh": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()), (5, 3, 4), "wide"),
    "in place": (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), (5, 4), "wide"),
    "perceptron": (
        lambda: nn.Sequential(nn.ELU(), nn.Linear(4, 7), nn.GELU(), nn.SiLU(), nn.Linear(7, 4)), (5, 3, 4), "wide"),
    "perceptron without bias": (
        lambda: nn.Sequential(nn.Linear(4, 7, bias=False), nn.ReLU(True), nn.Linear(7, 4, bias=False)), (5, 4), "wide"),
    "conv": (_conv(), (2, 4, 5, 6), "wide"),
    "conv, padding same, dilated": (_conv(padding="same", dilation=2), (2, 4, 6, 6), "wide"),
    "conv without activation": (lambda: nn.Conv2d(4, 4, 1), (2, 4, 3, 3), "wide"),
    "two convs": (
        lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 4, 1)),
        (2, 4, 5, 5), "wide"),
    "conv 1d": (lambda: nn.Sequential(nn.Conv1d(4, 4, 5, padding=2), nn.Tanh()), (2, 4, 9), "wide"),
    "conv 3d": (lambda: nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.Tanh()), (2, 4, 3, 4, 3), "wide"),
    "normed": (lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 7), nn.GELU(), nn.Linear(7, 4)), (5, 3, 4), "loop"),
    "groups": (_conv(groups=2), (2, 4, 5, 5), "loop"),
    "circular": (_conv(padding_mode="circular"), (2, 4, 5, 5), "loop"),
    "prelu": (lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU()), (5, 4), "loop"),
    "activation last": (
        lambda: nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh()), (5, 4), "loop"),
    "three products": (
        lambda: nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 4)), (5, 4), "loop"),
    "softmax": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)), (5, 4), "loop"),
}  # fmt: skip


def test_an_activation_that_a_branch_calls_twice_is_called_twice():
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(act, nn.Linear(4, 7), act, nn.Linear(7, 4)) for act in (nn.SiLU(), nn.SiLU(), nn.SiLU())
    ]
    x = torch.randn(5, 4)
    for order in (1, 2):
        fused, looped = ResidualStack(blocks, order=order), ResidualStack(blocks, order=order, fuse="loop")
        assert fused.plan == "wide"
        torch.testing.assert_close(fused(x), looped(x))


def blocks_of(name, count=5, dtype=torch.float64) -> Any:
    torch.manual_seed(0)
    return [BLOCKS[name][0]().to(dtype) for _ in range(count)]


def results(stack, x):
    out = stack(x)
    return [out, *torch.autograd.grad(out.sin().sum(), [x, *stack.parameters()])]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("order", [1, 2])
def test_fused_equals_the_loop(name, order):
    blocks = blocks_of(name)
    x = torch.randn(BLOCKS[name][1], dtype=torch.float64, requires_grad=True)
    wanted = results(ResidualStack(blocks, order=order, fuse="loop", branch_scale=0.7), x)
    assert ResidualStack(blocks).plan == BLOCKS[name][2]
    for fuse in ("auto", "vmap"):
        for chunk in (None, 2):
            got = results(ResidualStack(blocks, order=order, fuse=fuse, chunk=chunk, branch_scale=0.7), x)
            for one, other in zip(got, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-12, msg=f"{fuse}, chunk {chunk}")


def test_single_precision_agrees_to_a_millionth():
    blocks = blocks_of("conv", 8, torch.float32)
    x = torch.randn(4, 4, 5, 6, requires_grad=True)
    pairs = zip(
        results(ResidualStack(blocks), x), results(ResidualStack(blocks, fuse="loop"), x), strict=True
    )
    for one, other in pairs:
        assert float((one - other).detach().norm()) <= 1e-6 * float(other.detach().norm())


# --- how it is computed ----------------------------------------------------------------------------------------


class Calls(torch.overrides.TorchFunctionMode):
    """Names of the torch functions that are called."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "product", "times"), [("conv", "conv2d", 1), ("perceptron", "linear", 2)])
def test_no_product_and_no_sum_for_each_branch(name, product, times):
    counts = []
    for n in (3, 24):
        stack = ResidualStack(blocks_of(name, n), chunk=n)
        with Calls() as seen, torch.no_grad():
            stack(torch.randn(BLOCKS[name][1], dtype=torch.float64))
        assert seen.names.count(product) == times
        counts.append(sum(each in {"add", "__add__", "sum", "cat", "stack", product} for each in seen.names))
    assert counts[0] == counts[1]


def flops(stack, x):
    with FlopCounterMode(display=False) as meter, torch.no_grad():
        stack(x)
    return meter.get_total_flops()


@pytest.mark.parametrize("name", ["linear, tanh", "perceptron", "conv", "two convs"])
def test_order_one_costs_what_the_sequence_costs_and_order_two_once_more(name):
    stack, x = ResidualStack(blocks_of(name)), torch.randn(BLOCKS[name][1], dtype=torch.float64)
    parallel = flops(stack, x)
    stack.order = 2
    second = flops(stack, x)
    stack.mode = "sequential"
    assert parallel == flops(stack, x) > 0
    assert second == 2 * parallel


def test_branches_that_are_linear_in_their_weights_cost_one_branch():
    one, many = (flops(ResidualStack(blocks_of("linear", n)), torch.randn(5, 4).double()) for n in (1, 9))
    assert one == many > 0


def test_one_forward_mode_product_for_each_block_but_the_first():
    stack = ResidualStack(blocks_of("normed", 6), order=2)
    x = torch.randn(5, 4, dtype=torch.float64)
    stack(x)
    with mock.patch.object(torch.func, "jvp", wraps=torch.func.jvp) as product:
        stack(x)
    assert product.call_count == 5
    vmapped = ResidualStack(blocks_of("normed", 6), order=2, fuse="vmap")
    with mock.patch.object(torch.func, "jvp", wraps=torch.func.jvp) as product:
        vmapped(x)
    assert product.call_count == 1  # of all blocks together


def test_on_a_cpu_wide_tensors_stay_within_the_cache():
    stack = ResidualStack([nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(32)])
    for rows, times in ((16, 1), (1024, 4)):  # 32 * 1024 * 64 * 4 bytes are 8 MB, four times the bound
        with Calls() as seen, torch.no_grad():
            stack(torch.randn(rows, 64))
        assert seen.names.count("linear") == times


# --- copies ----------------------------------------------------------------------------------------------------


def test_copies_follow_every_change_of_a_parameter():
    stack, plain = (ResidualStack(blocks_of("perceptron"), fuse=fuse) for fuse in ("copy", "auto"))
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(stack(x), plain(x))
        with Calls() as seen:
            stack(x)
        assert "cat" not in seen.names
        for change in (
            lambda s: s.blocks[1][1].weight.mul_(2.0),
            lambda s: s.load_state_dict({k: v + 0.1 for k, v in s.state_dict().items()}),
            lambda s: setattr(s.blocks[0][1], "bias", nn.Parameter(torch.ones(7, dtype=torch.float64))),
            lambda s: setattr(s, "order", 2),
        ):
            for each in (stack, plain):
                change(each)
            assert torch.equal(stack(x), plain(x))
        twin = copy.deepcopy(stack)
        twin.blocks[0][1].weight.zero_()
        assert not torch.equal(twin(x), stack(x))
        assert torch.equal(stack(x), plain(x))
        assert stack.float()(x.float()).dtype == torch.float32
    assert list(stack.state_dict()) == list(plain.state_dict())


def test_copies_refuse_to_train():
    stack = ResidualStack(blocks_of("perceptron"), fuse="copy")
    x = torch.randn(5, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="fuse='copy' must not be used while parameters want a gradient"):
        stack(x)
    assert stack.requires_grad_(False)(x).shape == x.shape
    with torch.inference_mode():
        assert stack(x).shape == x.shape


def test_a_way_of_fusing_that_does_not_serve_the_blocks_is_refused():
    with pytest.raises(
        ValueError, match="fuse must suit the blocks, got 'wide': LayerNorm does not act on every"
    ):
        ResidualStack(blocks_of("normed"), fuse="wide")
    mixed = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Sequential(nn.Linear(4, 4), nn.ReLU())]
    with pytest.raises(ValueError, match="fuse must suit the blocks, got 'vmap': the branches differ"):
        ResidualStack(mixed, fuse="vmap")
    with pytest.raises(ValueError, match="the branch is a function, not a module"):
        ResidualStack(mixed, branch=lambda block, x: block(x), fuse="copy")
    assert ResidualStack(mixed).plan == "loop"


def test_settings_that_no_repr_shows_keep_branches_apart():
    torch.manual_seed(0)
    heads = [nn.TransformerEncoderLayer(8, h, 8, batch_first=True, dropout=0.0) for h in (1, 2)]
    with pytest.raises(ValueError, match="the branches differ in structure"):
        ResidualStack(heads, fuse="vmap")
    leaky = [nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(slope)) for slope in (0.1, 0.2)]
    assert ResidualStack(leaky).plan == "loop"


def test_hooks_and_exchanged_modules_are_seen():
    stack = ResidualStack(blocks_of("linear, tanh"))
    x = torch.randn(5, 4, dtype=torch.float64)
    calls = []
    handle = stack.blocks[2][0].register_forward_hook(lambda *_: calls.append(1))
    before = stack(x)
    assert stack.plan == "loop"
    assert calls == [1]
    handle.remove()
    assert stack.plan == "wide"
    stack.blocks[2][1] = nn.ReLU()
    assert stack.plan == "loop"
    assert not torch.allclose(stack(x), before)
