"""Casts of a model: these buffers move and follow, but never below single precision."""

import pytest
import torch
from torch import nn

from pullback.core.buffers import ExactBuffers


class Weighted(ExactBuffers, nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.register_buffer("weight", torch.tensor([0.1, 1e-9], dtype=dtype))
        self.register_buffer("steps", torch.tensor(7))
        self.inner = nn.Linear(2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_casts_are_followed_down_to_single_precision(dtype, cast):
    part = Weighted(dtype)
    exact = part.weight.clone()
    model = nn.Sequential(part).to(cast)
    assert model[0] is part
    assert part.weight.dtype == (torch.float64 if cast == torch.float64 else torch.float32)
    assert torch.equal(part.weight, exact.to(part.weight.dtype))
    assert part.inner.weight.dtype == cast  # what is not its own is cast as usual
    assert part.steps.dtype == torch.int64


def test_buffers_move_and_leave_the_meta_device():
    part = Weighted().to("meta").half()
    assert part.weight.is_meta
    assert part.weight.dtype == torch.float32
    empty = part.to_empty(device="cpu")
    assert empty.weight.device.type == "cpu"
    assert empty.weight.dtype == torch.float32
