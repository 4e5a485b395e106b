"""The probe against loops over tokens, and what it must leave behind: nothing."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pullback.core.state import StateError
from pullback.methods.peri_ln import PeriNormBlock, ResidualStreamProbe
from pullback.methods.peri_ln.probe import stream_stats


class Model(nn.Module):
    def __init__(self, placement="peri", blocks=3, dropout=0.0, recompute=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 16)
        self.blocks: Any = nn.ModuleList(
            PeriNormBlock(16, 2, placement=placement, dropout=dropout) for _ in range(blocks)
        )
        self.head, self.recompute = nn.Linear(16, 11), recompute

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x)


def ids():
    return torch.arange(10).reshape(2, 5)


def loss_of(model, tokens):
    return functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def test_the_statistics_are_those_of_loops():
    torch.manual_seed(0)
    x, before = torch.randn(3, 7, 60), torch.randn(3, 7, 60)
    x[1, 2, 3] = -500.0
    var, top, q999, massive, added, start = stream_stats(x, before).tolist()
    rows = x.reshape(-1, 60).tolist()
    sizes = sorted(abs(v) for row in rows for v in row)
    variances = [sum((v - sum(r) / 60) ** 2 for v in r) / 60 for r in rows]
    assert var == pytest.approx(sum(variances) / 21, rel=1e-5)
    assert top == 500.0
    assert q999 == pytest.approx(sizes[math.ceil(0.999 * len(sizes)) - 1])
    median = sizes[(len(sizes) - 1) // 2]
    assert massive == pytest.approx(sum(v > 100 * median for v in sizes) / len(sizes))
    assert massive > 0
    assert added == pytest.approx(float((x - before).square().mean().sqrt()), rel=1e-6)
    assert start == pytest.approx(float(before.var(-1, correction=0).mean()), rel=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_is_read_around_the_users_own_code(recompute):
    model = Model(recompute=recompute)
    probe = ResidualStreamProbe(model)
    with probe:
        loss_of(model, ids()).backward()
    report = probe.report()
    with torch.no_grad():
        x = model.embed(ids())
        streams = [x]
        for block in model.blocks:
            streams.append(block(streams[-1]))
    assert report.input_var == pytest.approx(float(x.var(-1, correction=0).mean()), rel=1e-5)
    for block, row, x, y in zip(model.blocks, report.blocks, streams, streams[1:], strict=False):
        assert row.var == pytest.approx(float(y.var(-1, correction=0).mean()), rel=1e-5)
        assert row.max_abs == pytest.approx(float(y.abs().max()), rel=1e-6)
        assert row.branch_rms == pytest.approx(float((y - x).square().mean().sqrt()), rel=1e-5)
        wanted = [
            block.attention.module.qkv,
            block.attention.module.out,
            block.feedforward.module[0],
            block.feedforward.module[2],
        ]
        found = [norm for grad in row.gradients for norm in (grad.first_norm, grad.last_norm)]
        assert found == pytest.approx([float(layer.weight.grad.norm()) for layer in wanted], rel=1e-5)
    assert [grad.first for grad in report.blocks[0].gradients] == [
        "attention.module.qkv.weight",
        "feedforward.module.0.weight",
    ]
    total = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    assert report.gradient_norm == pytest.approx(total, rel=1e-5)
    first, last = (model.blocks[i].feedforward.module[2].weight.grad.norm() for i in (0, 2))
    assert report.gradient_ratio == pytest.approx(float(last / first), rel=1e-5)
    assert report.growth == pytest.approx(report.blocks[-1].var / report.input_var)
    assert report.headroom == pytest.approx(65504 / max(row.max_abs for row in report.blocks))


def test_without_backward_gradients_are_nan():
    model = Model()
    probe = ResidualStreamProbe(model)
    with torch.no_grad(), probe:
        model(ids())
    report = probe.report()
    assert math.isnan(report.gradient_norm)
    assert math.isnan(report.blocks[0].gradients[0].first_norm)
    assert not report.spike
    assert report.growth > 1


def test_a_pass_of_its_own_leaves_no_trace_and_restores_random_states():
    model = Model(dropout=0.5)
    probe = ResidualStreamProbe(model)
    torch.manual_seed(5)
    first = probe(loss_of, ids())
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert all(p.grad is None for p in model.parameters())
    torch.manual_seed(5)
    with probe:
        loss_of(model, ids()).backward()
    assert probe.report().gradient_norm == pytest.approx(first.gradient_norm, rel=1e-6)


def hook_count(model):
    backward = sum(len(p._backward_hooks or ()) for p in model.parameters())
    return backward + sum(len(m._forward_hooks) for m in model.modules())


def fail(module, args, out):
    assert hook_count(module) > 1, "the probe's hooks are there"
    raise ArithmeticError("planned")


def test_hooks_go_also_after_exceptions():
    model = Model()
    probe = ResidualStreamProbe(model)
    model.head.register_forward_hook(fail)
    with pytest.raises(ArithmeticError, match="planned"), probe:
        model(ids())
    model.head._forward_hooks.clear()
    assert hook_count(model) == 0
    assert not probe._stream
    with pytest.raises(RuntimeError, match=r"has measured nothing, got report\(\)"):
        probe.report()
    with pytest.raises(RuntimeError, match="measuring already"), probe, probe:
        pass
    assert hook_count(model) == 0
    with probe:
        model(ids())
    assert probe.report().growth > 0


def test_no_tensor_is_kept_alive():
    model = Model()
    probe = ResidualStreamProbe(model)
    seen = []
    model.blocks[0].register_forward_hook(lambda _, __, out: seen.append(weakref.ref(out)))
    with probe:
        loss_of(model, ids()).backward()
    gc.collect()
    assert seen[0]() is None
    kept = [
        each
        for each in gc.get_referents(probe.__dict__, probe._stream, probe._squares)
        if torch.is_tensor(each)
    ]
    assert not kept


def test_blocks_that_did_not_run_are_named():
    model = Model()
    probe = ResidualStreamProbe(model)
    with (
        pytest.raises(
            RuntimeError, match=r"2 of 3 blocks did not run inside .* got nothing from 'blocks\.1'"
        ),
        probe,
    ):
        model.blocks[0](torch.randn(1, 2, 16))
    assert hook_count(model) == 0


def test_named_blocks_and_refusals():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    report = ResidualStreamProbe(model, blocks=("0", "2"))(
        lambda m, x: m(x).square().mean(), torch.randn(3, 4)
    )
    assert [row.name for row in report.blocks] == ["0", "2"]
    assert report.blocks[0].gradients[0].first == "weight"
    with pytest.raises(ValueError, match=r"model must hold known transformer blocks, got none in Sequential"):
        ResidualStreamProbe(model)
    with pytest.raises(ValueError, match=r"blocks must be a list of paths, got '0'"):
        ResidualStreamProbe(model, blocks="0")
    with pytest.raises(ValueError, match=r"block '0' must give a tensor .* not empty"):
        ResidualStreamProbe(model, blocks=("0",))(lambda m, x: m(x).sum(), torch.randn(0, 4))
    with pytest.raises(ValueError, match=r"loss_fn must give a scalar, got shape \(3, 4\)"):
        ResidualStreamProbe(model, blocks=("0",))(lambda m, x: m(x), torch.randn(3, 4))
    assert hook_count(model) == 0


def test_a_spike_is_five_times_the_running_median():
    model = Model(blocks=1)
    probe = ResidualStreamProbe(model, window=6)

    def step(scale):
        with probe:
            (scale * loss_of(model, ids())).backward()
        return probe.report()

    flags = [step(scale).spike for scale in (1, 50, 1, 1, 1)]
    assert flags == [False] * 5, "there is no median before five steps"
    assert step(4.9).spike is False
    assert step(5.1).spike is True
    state = probe.state_dict()
    other = ResidualStreamProbe(model, window=6)
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert len(state["norms"]) == 6
    for bad in (
        {**state, "norms": [-1.0]},
        {**state, "norms": "x"},
        {"norms": []},
        {**state, "format_version": 2},
    ):
        with pytest.raises(StateError):
            other.load_state_dict(bad)
    assert other.state_dict() == state


def test_non_finite_values_are_reported_and_not_remembered():
    model = Model(blocks=1)
    with torch.no_grad():
        model.embed.weight[0, 0] = math.inf
    probe = ResidualStreamProbe(model)
    with probe:
        loss_of(model, ids()).backward()
    report = probe.report()
    assert math.isnan(report.blocks[0].var)
    assert math.isnan(report.gradient_norm)
    assert probe.state_dict()["norms"] == []


def test_half_precision_is_read_in_float32():
    x = torch.full((1, 2, 4), 3e4, dtype=torch.float16)
    x[..., ::2] *= -1
    var, top, *_ = stream_stats(x, None).tolist()
    assert var == pytest.approx(9e8, rel=1e-3)
    assert top == 3e4 // 16 * 16


def test_sparse_and_frozen_parameters():
    model = Model(blocks=1)
    model.embed = nn.Embedding(11, 16, sparse=True)
    model.head.requires_grad_(False)
    probe = ResidualStreamProbe(model)
    with probe:
        loss_of(model, torch.zeros(1, 4, dtype=torch.long)).backward()
    total = sum(
        float((p.grad.to_dense() if p.grad.is_sparse else p.grad).square().sum())
        for p in model.parameters()
        if p.grad is not None
    )
    assert probe.report().gradient_norm == pytest.approx(math.sqrt(total), rel=1e-5)
