"""Whole training loops: accumulation, mixed precision, schedulers, resume, and TorchJD's aggregators."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch
from torch import nn
from torchjd.aggregation import PCGrad
from torchjd.autojac import jac_to_grad

from pullback.methods import sam_gs
from pullback.methods.sam_gs.tests.test_sam_gs_loop import Model, batch, by_hand, grads, same

SAMGS: Any = sam_gs.SAMGS
multitask_backward: Any = sam_gs.multitask_backward


# --- accumulation ----------------------------------------------------------------------------------------------------


def test_accumulated_micro_batches_equal_the_whole_batch():
    whole, parts = Model(), Model()
    ours, theirs = SAMGS(gamma=0.0), SAMGS(gamma=0.0)
    for step in range(3):
        for model in (whole, parts):
            model.zero_grad()
        report = multitask_backward(whole.losses(batch(step, 12)), shared=whole.trunk, aggregator=theirs)
        for i, x in enumerate(batch(step, 12).split(4)):
            losses = [loss / 3 for loss in parts.losses(x)]
            got = multitask_backward(losses, shared=parts.trunk, aggregator=ours, aggregate=i == 2)
            assert got.branch == ("momentum" if i == 2 else "accumulate")
        same(grads(parts), grads(whole))
        torch.testing.assert_close(got.norms, report.norms)
        assert ours.steps == step + 1
        assert not any("jac" in vars(p) for p in parts.parameters())


def test_waiting_gradients_are_torchjds_and_must_fit():
    one, other = Model(), Model()
    for model in (one, other):
        multitask_backward(model.losses(batch()), shared=model.trunk, aggregator=SAMGS(), aggregate=False)
    jac_to_grad([p for p in one.trunk.parameters() if p.requires_grad], SAMGS())
    same(grads(one), by_hand(Model(), batch(), SAMGS()))
    with pytest.raises(
        ValueError, match=r"with 2 losses, in all micro-batches of a step, got \.jac of shapes.*delete"
    ):
        multitask_backward(other.losses(batch())[:2], shared=other.trunk, aggregator=SAMGS())
    more = [*other.trunk.parameters(), *other.heads[0].parameters()]
    with pytest.raises(ValueError, match="the same parameters"):
        multitask_backward(other.losses(batch()), shared=more, aggregator=SAMGS())


# --- mixed precision -------------------------------------------------------------------------------------------------


def train(steps, scale=None, aggregator=None, autocast=False, break_at=-1):
    model = Model(torch.float32)
    aggregator = aggregator or SAMGS(gamma=0.0, max_norm=math.inf)  # no clip that would hide a scale
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    for step in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            losses = model.losses(batch(step, dtype=torch.float32))
        if step == break_at:
            losses[1] = losses[1] * 1e36
        report = multitask_backward(losses, shared=model.trunk, aggregator=aggregator, scaler=scaler)
        if scaler is not None:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    return model, scaler, report


@pytest.mark.parametrize("autocast", [False, True])
def test_loss_scaling_changes_nothing(autocast):
    plain, _, _ = train(4, autocast=autocast)
    scaled, _, report = train(4, scale=2.0**14, autocast=autocast)
    assert report.branch == "momentum"
    same(plain.state_dict(), scaled.state_dict(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("make", [PCGrad, lambda: SAMGS(gamma=2.0)])
def test_the_call_may_stand_inside_autocast(make):
    inside, outside = Model(torch.float32), Model(torch.float32)
    torch.manual_seed(0)
    wanted = multitask_backward(
        outside.losses(batch(dtype=torch.float32)), shared=outside.trunk, aggregator=make()
    )
    losses = inside.losses(batch(dtype=torch.float32))
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = multitask_backward(losses, shared=inside.trunk, aggregator=make())
    same(grads(inside), grads(outside), rtol=0, atol=0)
    assert torch.equal(report.cosines, wanted.cosines)


def test_an_overflow_leaves_the_step_out_and_lowers_the_scale():
    aggregator = SAMGS(gamma=0.0, max_norm=math.inf)
    model, scaler, report = train(3, scale=2.0**16, aggregator=aggregator, break_at=2)
    assert report.branch == "skip"
    assert scaler.get_scale() == 2.0**15
    assert aggregator.steps == 2
    same(model.state_dict(), train(2, scale=2.0**16)[0].state_dict(), rtol=0, atol=0)


# --- a user's loop ---------------------------------------------------------------------------------------------------


def ordinary(model, aggregator, optimizer, scheduler, steps):
    for step in steps:
        optimizer.zero_grad()
        multitask_backward(model.losses(batch(step)), shared=model.trunk.parameters(), aggregator=aggregator)
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_a_run_that_was_interrupted_goes_on_bitwise(optimizer_class):
    def fresh():
        model = Model()
        optimizer = optimizer_class(model.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
        return model, SAMGS(gamma=0.8), optimizer, scheduler

    whole = fresh()
    ordinary(*whole, range(50))
    first, second = fresh(), fresh()
    ordinary(*first, range(27))
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    ordinary(*second, range(27, 50))
    same(second[0].state_dict(), whole[0].state_dict(), rtol=0, atol=0)


def test_torchjds_aggregators_run_in_the_same_loop():
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    torch.manual_seed(0)
    first = float(sum(model.losses(batch())).detach())
    for _ in range(20):
        optimizer.zero_grad()
        multitask_backward(model.losses(batch()), shared=model.trunk, aggregator=PCGrad())
        optimizer.step()
    assert float(sum(model.losses(batch())).detach()) < 0.8 * first


def test_a_compiled_trunk():
    model, plain = Model(), Model()
    torch.compiler.reset()
    with functorch.patch(donated_buffer=False):  # a graph that is used once per task
        compiled = torch.compile(model.trunk, backend="aot_eager")
        z = compiled(batch())
        losses = [s * head(z).square().mean() for s, head in zip((1.0, 0.03, 30.0), model.heads, strict=True)]
        multitask_backward(losses, shared=model.trunk, aggregator=SAMGS())
    multitask_backward(plain.losses(batch()), shared=plain.trunk, aggregator=SAMGS())
    same(grads(model), grads(plain))
