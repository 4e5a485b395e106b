"""Norms told by class or name, and fresh twins of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pullback.core.norm_layers import LayerNorm, RMSNorm, is_norm, twin_norm


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("ours", "theirs"), [(RMSNorm, nn.RMSNorm), (LayerNorm, nn.LayerNorm)])
def test_norms_are_those_of_torch_in_float32(ours, theirs, dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 6, dtype=dtype)
    mine, peer = ours(6, eps=1e-6), theirs(6, eps=1e-6)
    nn.init.normal_(mine.weight)
    peer.load_state_dict(mine.state_dict())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    torch.testing.assert_close(mine.to(dtype)(x), peer.to(dtype).to(wide)(x.to(wide)).to(dtype))


def test_a_norm_is_told_by_class_or_name():
    class WeightNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3))

    assert is_norm(nn.GroupNorm(1, 2))
    assert not is_norm(WeightNorm())
    assert not is_norm(nn.Linear(2, 2))


def test_a_twin_is_fresh():
    norm = nn.LayerNorm(5, eps=1e-3).double()
    nn.init.normal_(norm.weight)
    norm.weight.requires_grad_(False)
    norm.register_forward_hook(lambda *_: None)
    twin = twin_norm(norm, 0.5)
    assert isinstance(twin, nn.LayerNorm)
    assert (twin.eps, twin.weight.dtype, twin.weight.requires_grad) == (1e-3, torch.float64, True)
    assert twin.weight.tolist() == [0.5] * 5
    assert twin.bias.tolist() == [0.0] * 5
    assert not twin._forward_hooks
    with pytest.raises(ValueError, match=r"gain_init must be 1 where norms have no gain, got 0\.5"):
        twin_norm(nn.LayerNorm(5, elementwise_affine=False), 0.5)
    with pytest.raises(ValueError, match="meta device"):
        twin_norm(nn.LayerNorm(5, device="meta"), 1.0)
