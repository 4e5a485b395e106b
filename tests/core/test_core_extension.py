"""An object gets a class of its own and keeps everything else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pullback.core.extension import extend


class Doubled(nn.Module):
    def forward(self, *args):
        return 2 * super().forward(*args)


def test_an_extended_module_keeps_names_hooks_and_class():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.randn(3, 2)
    wanted, untouched = 2 * one(x), other(x)
    calls = []
    one.register_forward_hook(lambda *_: calls.append(1))
    keys = list(one.state_dict())
    extend(one, Doubled)
    assert torch.equal(one(x), wanted)
    assert torch.equal(other(x), untouched), "the class itself is as it was"
    assert (calls, list(one.state_dict()), type(one).__name__) == ([1], keys, "Linear")
    assert isinstance(one, nn.Linear)
    assert torch.equal(copy.deepcopy(one)(x), wanted)


def test_a_replaced_forward_is_refused():
    module = nn.Linear(2, 2)
    module.__dict__["forward"] = lambda x: x
    with pytest.raises(ValueError, match="Linear must have the forward of its class"):
        extend(module, Doubled)
