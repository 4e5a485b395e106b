"""The user's own loop: resume, autocast, compilation, accumulation, two ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pullback.core.saved_bytes import saved_bytes
from pullback.methods.revcol import RevCol
from pullback.methods.revcol.tests.nets import draw, relative
from pullback.testing import run_ranks


def small(columns=4, **how) -> Any:
    torch.manual_seed(0)
    return RevCol(
        columns, (4, 6), (1, 1), 3, layer_scale=0.5, intermediate_supervision=True, drop_path=0.2, **how
    )


def batch(step, n=8):
    x = draw(n, 3, 16, 16, seed=step, dtype=torch.float32).sigmoid()
    return x, torch.arange(n) % 3


def train(model, optimizer, scheduler, steps, *, wrapped=None, part=slice(None)):
    losses = []
    for step in steps:
        torch.manual_seed(100 + step)
        x, y = batch(step)
        optimizer.zero_grad()
        loss = model.loss((wrapped or model)(x[part]), x[part], y[part])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def parts(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)


def test_it_learns_and_resumes_bitwise():
    whole = small()
    losses = train(whole, *parts(whole), range(8))
    assert losses[-1] < losses[0]
    first = small()
    optimizer, scheduler = parts(first)
    train(first, optimizer, scheduler, range(4))
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    second = small()
    optimizer, scheduler = parts(second)
    for thing, state in zip((second, optimizer, scheduler), saved, strict=True):
        thing.load_state_dict(state)
    train(second, optimizer, scheduler, range(4, 8))
    assert all(map(torch.equal, whole.parameters(), second.parameters()))


def test_reversible_and_plain_training_stay_together():
    ours, plain = small(anchor_every=2), small(recompute="none")
    theirs = train(plain, *parts(plain), range(8))
    assert train(ours, *parts(ours), range(8)) == pytest.approx(theirs, abs=1e-4)


def test_autocast_keeps_features_in_float32_and_gives_the_plain_gradients():
    model, (x, y) = small(), batch(0)

    def found(model):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            kinds = {each.dtype for each in model.forward_features(x)}
            torch.manual_seed(1)
            loss = model.loss(model(x), x, y)
        return kinds, torch.autograd.grad(loss, list(model.parameters()))

    kinds, ours = found(model)
    assert kinds == {torch.float32}
    _, theirs = found(copy.deepcopy(model).set_reversible(False))
    assert relative(ours, theirs) < 0.1
    one, other = (torch.cat([each.flatten() for each in grads]) for grads in (ours, theirs))
    assert float(torch.nn.functional.cosine_similarity(one, other, dim=0)) > 0.999


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # both are the compiler's own
def test_compiled_levels_give_the_same():
    torch._dynamo.reset()
    model, (x, y) = small(), batch(0)
    torch.manual_seed(1)
    wanted = torch.autograd.grad(model.loss(model(x), x, y), list(model.parameters()))
    for step in model.columns.steps[:2]:
        step.fn.compile(backend="aot_eager")
    torch.manual_seed(1)
    found = torch.autograd.grad(model.loss(model(x), x, y), list(model.parameters()))
    assert relative(found, wanted) < 1e-5
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # both are the compiler's own
def test_a_compiled_network_rebuilds_and_without_rebuilding_it_is_one_graph():
    torch._dynamo.reset()
    model, (x, _), bytes_ = small().eval(), batch(0), []
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()), allow_unused=True)
    for fullgraph in (False, True):
        model.set_reversible(not fullgraph)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
        out = compiled(x)
        bytes_.append(saved_bytes(lambda c=compiled: c(x), model, x))
        found = torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True)
        assert relative(found, wanted) < 1e-5
        torch._dynamo.reset()
    assert bytes_[0] < 0.5 * bytes_[1]


def test_second_derivatives_exist_without_rebuilding():
    model = small().double().eval().set_reversible(False)
    x = draw(2, 3, 8, 8).requires_grad_()
    weights = [model.columns.steps[4].scale, model.columns.steps[5].fn.down[0].weight]
    assert torch.autograd.gradgradcheck(lambda x, *_: model(x), (x, *weights))


def test_gradients_accumulate_over_two_forward_passes():
    model, (x, y) = small(), batch(0)
    torch.manual_seed(1)
    one, two = model(x), model(2 * x)
    (model.loss(one, x, y) + model.loss(two, x, y)).backward()
    torch.manual_seed(1)
    wanted = torch.autograd.grad(model.loss(model(x), x, y), list(model.parameters()))
    other = torch.autograd.grad(model.loss(model(2 * x), x, y), list(model.parameters()))
    summed = [a + b for a, b in zip(wanted, other, strict=True)]
    assert relative([p.grad for p in model.parameters()], summed) < 1e-5


def found_on(rank):
    model = small().double()
    for module in model.modules():
        module.rate = 0.0
    wrapped = nn.parallel.DistributedDataParallel(model)
    return weights(model, wrapped, slice(rank, None, 2))


def weights(model, wrapped, part):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):
        x, y = batch(step)
        x = x.double()
        optimizer.zero_grad()
        model.loss(wrapped(x[part]), x[part], y[part]).backward()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.timeout(240)
def test_two_ranks_equal_one_process():
    first, second = run_ranks(found_on)
    assert torch.equal(first, second)
    alone = small().double()
    for module in alone.modules():
        module.rate = 0.0
    torch.testing.assert_close(first, weights(alone, alone, slice(None)), rtol=0, atol=1e-10)
