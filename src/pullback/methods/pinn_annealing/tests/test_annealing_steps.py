"""One step: equal to plain sums, gradients taken by hand, counted backward passes, hooks, accumulation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pullback.methods.pinn_annealing import GradientAnnealing, weight_matrices
from pullback.methods.pinn_annealing.tests.cases import X, balanced, losses_of, network


def grads(net):
    return [p.grad.clone() for p in net.parameters()]


# --- equal to the plain sum -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["forward", "backward"])
@pytest.mark.parametrize("weight", [None, 30.0])
def test_fixed_weights_train_bitwise_like_a_weighted_sum(call, weight):
    plain, ours = network(), network()
    balance = balanced(ours, alpha=0.0, initial=1.0 if weight is None else weight)
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.01) for net in (plain, ours)]
    for step in range(25):
        for optimizer in optimizers:
            optimizer.zero_grad()
        r, d, p = losses_of(plain, step=step).values()
        total = r + d + p if weight is None else r + weight * d + weight * p
        total.backward()
        if call == "forward":
            balance(losses_of(ours, step=step)).backward()
        else:
            balance.backward(losses_of(ours, step=step))
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))
    assert balance.steps.item() == balance.updates.item() == 0


# --- what is computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apply", ["next", "now"])
def test_both_ways_to_step_agree_with_gradients_taken_by_hand(apply):
    one, other = network(), network()
    first, second = balanced(one, update_every=2, apply=apply), balanced(other, update_every=2, apply=apply)
    for step in range(5):
        before = first.lam.clone()
        for net in (one, other):
            net.zero_grad()
        total = first(losses_of(one, step=step))
        total.backward()
        value = second.backward(losses_of(other, step=step))
        weights = first.lam if apply == "now" else before
        twin = copy.deepcopy(one)
        parts = [
            torch.autograd.grad(losses_of(twin, step=step)[name], list(twin.parameters()))
            for name in ("residual", "data", "prior")
        ]
        for at, p in enumerate(one.parameters()):
            wanted = parts[0][at] + weights[1] * parts[1][at] + weights[2] * parts[2][at]
            assert torch.allclose(p.grad, wanted, rtol=1e-11, atol=1e-14)
        assert all(
            torch.allclose(a, b, rtol=1e-11, atol=1e-14)
            for a, b in zip(grads(one), grads(other), strict=True)
        )
        assert torch.allclose(first.lam, second.lam, rtol=1e-12)
        assert value == total
        assert not value.requires_grad
    assert first.steps.item() == 5
    assert first.updates.item() == 3  # steps 0, 2, 4
    assert not torch.equal(first.lam, torch.ones_like(first.lam))


class Counted(torch.autograd.Function):
    """Identity that counts how often a gradient comes back through it."""

    @staticmethod
    def forward(ctx, x, counts, name):
        ctx.counts, ctx.name = counts, name
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads):
        ctx.counts[ctx.name] = ctx.counts.get(ctx.name, 0) + 1
        return *grads, None, None


def test_backward_passes_are_counted():
    net = network()
    balance = balanced(net, update_every=3)
    trunk = {}

    def counted():
        trunk.clear()
        return {name: Counted.apply(loss, trunk, name) for name, loss in losses_of(net).items()}

    for step in range(7):
        balance.backward(counted())
        assert trunk == {"residual": 1, "data": 1, "prior": 1}, step
    fresh = balanced(net, update_every=3)
    for step in range(7):
        fresh(counted()).backward()
        passes = 2 if step % 3 == 0 else 1
        assert trunk == {"residual": passes, "data": passes, "prior": passes}, step


def test_shared_graphs_are_passed_once_per_loss_and_freed():
    net = network()
    passes = {}
    hidden = Counted.apply(net(X), passes, "shared")
    losses = {"residual": hidden.square().mean(), "data": hidden.mean(), "prior": hidden.abs().mean()}
    balanced(net).backward(losses)
    assert passes == {"shared": 3}
    with pytest.raises(RuntimeError, match="second time"):
        losses["prior"].backward()  # the last pass freed the shared graph


def test_hooks_after_accumulation_run_once_and_gradients_add_up():
    net = network()
    calls = []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda p: calls.append(p.shape))
    balance = balanced(net, update_every=1)
    balance.backward(losses_of(net))
    assert len(calls) == 4
    once, held = grads(net), [p.grad for p in net.parameters()]
    balance.backward(losses_of(net))
    balance.lam.fill_(0.0)
    assert all(not torch.equal(a, p.grad) for a, p in zip(once, net.parameters(), strict=True))
    assert all(p.grad is h for p, h in zip(net.parameters(), held, strict=True))


def test_leaf_hooks_see_one_gradient():
    net, seen = network(), []
    net[0].weight.register_hook(lambda g: seen.append(g.clone()))
    net[0].weight.register_hook(lambda g: 2 * g)
    balance = balanced(net, update_every=2)
    balance.lam[1:] = 3.0
    before = balance.lam.clone()
    balance.backward(losses_of(net))
    twin = network()
    parts = list(losses_of(twin).values())
    (parts[0] + before[1] * parts[1] + before[2] * parts[2]).backward()
    assert torch.allclose(net[0].weight.grad, 2 * twin[0].weight.grad, rtol=1e-12)
    assert torch.allclose(seen[-1], twin[0].weight.grad, rtol=1e-12)


def test_inputs_limit_what_is_filled():
    net = network()
    balance = balanced(net)
    balance.backward(losses_of(net), inputs=[net[0].bias])
    assert [p.grad is not None for p in net.parameters()] == [False, True, False, False]
    assert balance.updates.item() == 1
    with pytest.raises(ValueError, match="inputs must be leaves"):
        balance.backward(losses_of(net), inputs=[net[0].weight * 2])
    with pytest.raises(ValueError, match="got none"):
        balance.backward(losses_of(net), inputs=[])


def test_sparse_gradients_outside_the_statistics_are_added():
    table: Any = nn.Embedding(5, 2, sparse=True).double()
    net = network()
    balance = GradientAnnealing("data", params=weight_matrices(net), update_every=1)
    rows = torch.tensor([1, 3])
    out = net(table(rows))
    balance.backward({"residual": out[:, 0].sum(), "data": out[:, 1].square().sum()})
    assert table.weight.grad.is_sparse
    with pytest.raises(TypeError, match="dense gradients"):
        GradientAnnealing("data", params={"table": table.weight})(
            {"residual": table(rows).sum(), "data": table(rows).square().sum()}
        )


# --- steps made of several batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_accumulated_batches_are_one_step(way):
    whole, parts = network(), network()
    one, several = balanced(whole, update_every=2), balanced(parts, update_every=2)
    for step in range(4):
        whole.zero_grad()
        parts.zero_grad()
        one.backward(losses_of(whole, step=step))
        x = X.roll(step, 0)
        for k in range(3):
            out = losses_of(parts, x[4 * k : 4 * k + 4] + 0.01 * step)
            shares = {name: loss / 3 for name, loss in out.items()}
            before = several.lam.clone()
            if way == "forward":
                several(shares, last=k == 2).backward()
            else:
                several.backward(shares, last=k == 2)
            assert torch.equal(several.lam, before) or k == 2
        assert all(
            torch.allclose(a, b, rtol=1e-10, atol=1e-13)
            for a, b in zip(grads(whole), grads(parts), strict=True)
        )
        assert torch.allclose(one.lam, several.lam, rtol=1e-10)
    assert several.steps.item() == 4
    assert several.updates.item() == 2


def test_a_term_may_be_absent_from_some_batches():
    net = network()
    balance = balanced(net, update_every=1)
    full = losses_of(net)
    balance({**full, "prior": torch.zeros((), dtype=torch.float64)}, last=False)
    balance(losses_of(net))
    alone = balanced(net, update_every=1)
    alone(losses_of(net))
    assert balance.skipped.item() == 0
    assert balance.lam[2] == pytest.approx(
        0.9 + 2 * (alone.lam[2].item() - 0.9), rel=1e-9
    )  # twice the residual


def test_accumulation_needs_weights_that_hold_for_the_whole_step():
    net = network()
    with pytest.raises(ValueError, match="last must be True with apply='now', got False"):
        balanced(net, apply="now")(losses_of(net), last=False)
