"""What the edit keeps and what it holds at a time, counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pullback.core.peak_bytes import PeakBytes
from pullback.core.saved_bytes import saved_bytes
from pullback.methods.tract import tract


def peak_of_backward(layer, x):
    z = layer(x)
    outer = torch.ones_like(z)
    with PeakBytes(x, z, outer, *layer.parameters()) as meter:
        torch.autograd.grad(z, list(layer.parameters()), outer)
    return meter.most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_are_never_held_at_once(dtype):
    layer, x = nn.Conv2d(3, 4, 7, stride=2).to(dtype), torch.randn(4, 3, 224, 224, dtype=dtype)
    plain = peak_of_backward(layer, x)
    with tract(layer):
        extra = peak_of_backward(layer, x) - plain
    patches = 4 * 109 * 109 * 147 * 4  # bytes in float32
    assert extra < 0.25 * patches
    assert extra > 147 * 147 * 4  # the meter sees the covariance


def test_a_large_image_is_read_in_pieces_as_well():
    layer, x = nn.Conv2d(1, 2, 9), torch.randn(1, 1, 400, 400)
    plain = peak_of_backward(layer, x)
    with tract(layer):
        extra = peak_of_backward(layer, x) - plain
    assert extra < 0.25 * 392 * 392 * 81 * 4


def test_the_graph_keeps_no_more_than_the_input_and_one_number():
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 9, 9)
    plain = saved_bytes(lambda: layer(x))
    with tract(layer):
        assert saved_bytes(lambda: layer(x)) - plain == 4


def test_operations_are_those_of_one_covariance_and_one_solve():
    layer, x = nn.Linear(32, 8), torch.randn(100, 32)

    def operations():
        with FlopCounterMode(display=False) as meter:
            layer(x).sum().backward()
        return meter.get_total_flops()

    plain = operations()
    with tract(layer):
        assert operations() - plain == 2 * 100 * 32 * 32  # 2 b n^2; the counter knows no triangular solves


def test_nothing_grows_over_steps():
    layer = nn.Conv1d(2, 3, 3)
    handle = tract(layer)
    before = set(vars(layer)), set(vars(handle)), len(handle.signal.state_dict())
    for _ in range(5):
        layer(torch.randn(4, 2, 9)).sum().backward()
    assert (set(vars(layer)), set(vars(handle)), len(handle.signal.state_dict())) == before
