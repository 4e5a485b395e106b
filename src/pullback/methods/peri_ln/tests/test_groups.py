"""Which parameters decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pullback.methods.peri_ln import PeriNormBlock, norm_param_groups


def test_gains_do_not_decay():
    class LlamaRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    block: Any = PeriNormBlock(8, 2, norm="layer", bias=True)
    model: Any = nn.ModuleList([block, nn.BatchNorm1d(3), LlamaRMSNorm(), nn.Linear(8, 8)])
    model[3].weight = block.attention.module.out.weight  # tied
    block.feedforward.module[0].weight.requires_grad_(False)
    decaying, gains = norm_param_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decaying["weight_decay"] == 0.1
    assert gains["weight_decay"] == 0.0
    assert all("norm" in names[id(p)] or names[id(p)].startswith(("1.", "2.")) for p in gains["params"])
    assert len(gains["params"]) == 2 * 4 + 2 + 1
    listed = [id(p) for p in decaying["params"] + gains["params"]]
    assert len(set(listed)) == len(listed)
    assert set(listed) == {id(p) for p in model.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(norm_param_groups(model, 0.1), lr=0.0)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_groups_refuse_what_they_cannot_divide():
    with pytest.raises(ValueError, match=r"weight_decay must be >= 0, got -0.1"):
        norm_param_groups(nn.Linear(2, 2), -0.1)
    with pytest.raises(ValueError, match="model must have trainable parameters"):
        norm_param_groups(nn.ReLU(), 0.1)
    assert len(norm_param_groups(nn.Linear(2, 2), 0.1)) == 1
