"""In the user's own loop: two ranks, a resume in the middle, accumulation, autocast, compilation."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from pullback.methods.peri_ln import (
    PeriNormBlock,
    ResidualStreamProbe,
    convert_norm_placement,
    norm_param_groups,
)
from pullback.testing import run_ranks

STEPS = 6


def build(dropout=0.0):
    """An embedding, a block of ours and a converted one of torch, and a head; as the user would write it."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stack = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True, norm_first=True), 1
        )
    model = nn.Sequential(
        nn.Embedding(7, 8), PeriNormBlock(8, 2, dropout=dropout), stack, nn.Linear(8, 7)
    ).double()
    convert_norm_placement(model, embedding="0", match=nn.TransformerEncoderLayer)
    return model


def batches():
    return torch.randint(7, (STEPS, 4, 5), generator=torch.Generator().manual_seed(1))


def loss_of(model, tokens):
    return functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())


def loop(model, optimizer, schedule, steps, rows=slice(None)):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, batches()[step][rows]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def tools(model):
    optimizer = torch.optim.AdamW(norm_param_groups(model, 0.1), lr=0.01)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def rank_of(rank):
    inner = build()
    wrapped = nn.parallel.DistributedDataParallel(inner)
    probe = ResidualStreamProbe(wrapped)
    weights = loop(wrapped, *tools(inner), range(STEPS), slice(rank, None, 2))
    with probe:
        loss_of(wrapped, batches()[0]).backward()
    return weights, [block.name for block in probe.report().blocks]


@pytest.mark.timeout(240)
def test_two_ranks_equal_one_process():
    (first, names), (second, _) = run_ranks(rank_of)
    assert torch.equal(first, second)
    assert names == ["module.1", "module.2.layers.0"]
    model = build()
    torch.testing.assert_close(first, loop(model, *tools(model), range(STEPS)), rtol=0, atol=1e-10)


def test_a_resumed_run_is_bitwise_the_uninterrupted_one():
    model = build(dropout=0.2)
    torch.manual_seed(3)
    whole = loop(model, *tools(model), range(STEPS))
    first = build(dropout=0.2)
    kit = tools(first)
    torch.manual_seed(3)
    loop(first, *kit, range(3))
    saved = copy.deepcopy([first.state_dict(), *(each.state_dict() for each in kit)]), torch.get_rng_state()
    second = build(dropout=0.2)
    others = tools(second)
    for each, state in zip((second, *others), saved[0], strict=True):
        each.load_state_dict(state)
    torch.set_rng_state(saved[1])
    assert torch.equal(loop(second, *others, range(3, STEPS)), whole)


def test_accumulated_micro_batches_are_the_batch():
    tokens = batches()[0]
    whole, parts = build(), build()
    loss_of(whole, tokens).backward()
    for part in tokens.split(2):
        (loss_of(parts, part) / 2).backward()
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_autocast_with_a_scaler_trains():
    model = build().float()
    optimizer, _ = tools(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    losses = []
    for _ in range(10):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, batches()[0])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_compiled_model_is_the_eager_one():
    model = build().float()
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(batches()[0]), model(batches()[0]))
    torch._dynamo.reset()
