"""Stacked perceptrons against single ones in autograd, member by member, and their optimizers against torch's."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from pullback.lab.models.stacked import Stack, StackedAdam, StackedSGD, cross_entropy

SIZES, MEMBERS = (6, 5, 7, 4), 3


def stacked(seed=0, **settings):
    stack = Stack(SIZES, MEMBERS, dtype=torch.float64, **settings)
    for i, p in enumerate(stack.parameters()):
        p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i)).double())
    return stack


def single(stack, member, x):
    """One member written out in autograd: its output and its parameters in the stack's order."""
    params, h, last = [], x, len(stack.weights) - 1
    for layer, (weight, bias) in enumerate(zip(stack.weights, stack.biases, strict=True)):
        own = [p.detach()[member].clone().requires_grad_() for p in (weight, bias) if p is not None]
        params += own
        h = h @ own[0] + (own[1] if len(own) > 1 else 0)
        if layer < last and stack.norm == "layer":
            h = functional.layer_norm(h, h.shape[-1:], eps=stack.eps)
        if layer < last and stack.norm == "rms":
            h = functional.rms_norm(h, h.shape[-1:], eps=stack.eps)
        if layer < last or stack.output_activation:
            h = {"relu": torch.relu, "tanh": torch.tanh, "identity": lambda a: a}[stack.activation](h)
    return h, params


@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
@pytest.mark.parametrize("activation", ["relu", "tanh", "identity"])
@pytest.mark.parametrize("own_inputs", [True, False])
def test_every_member_has_the_outputs_and_gradients_of_a_single_network(norm, activation, own_inputs):
    stack = stacked(norm=norm, activation=activation, output_activation=own_inputs)
    shape = (MEMBERS, 8, 6) if own_inputs else (8, 6)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(9)).double()
    y = torch.arange(8) % 4
    logits = stack.forward(x)
    delta, right = cross_entropy(logits, y)
    stack.backward(delta)
    for member in range(MEMBERS):
        wanted, params = single(stack, member, x[member] if own_inputs else x)
        torch.testing.assert_close(logits[member], wanted.detach(), rtol=1e-12, atol=1e-12)
        functional.cross_entropy(wanted, y).backward()
        for p, own in zip(stack.parameters(), params, strict=True):
            torch.testing.assert_close(p.grad[member], own.grad, rtol=1e-10, atol=1e-12)
        assert right[member].item() == pytest.approx((wanted.argmax(1) == y).double().mean().item())


def test_a_hidden_layer_with_norm_has_no_bias_and_names_say_so():
    assert list(stacked(norm="layer").named_parameters()) == ["weight0", "weight1", "weight2", "bias2"]
    assert len(stacked().parameters()) == 6
    assert len(stacked(bias=False).parameters()) == 3


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_every_member_steps_at_its_own_rate_as_torchs_optimizer_does(name):
    rates = [0.1, 0.01, 0.5]
    stack = stacked()
    own = [p.detach().clone() for p in stack.parameters()]
    optimizer = {"SGD": StackedSGD, "Adam": StackedAdam}[name](stack.parameters(), rates)
    optimizer.factor = 0.5
    optimizer.layer_rates[stack.weights[1]] = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    singles = []
    for member, rate in enumerate(rates):
        params = [nn.Parameter(p[member].clone()) for p in own]
        groups = [
            {"params": [p], "lr": 0.5 * rate * (2.0**member if i == 2 else 1)} for i, p in enumerate(params)
        ]
        singles.append((params, getattr(torch.optim, name)(groups)))
    for step in range(4):
        for i, p in enumerate(stack.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(17 * step + i)).double()
        for member, (params, each) in enumerate(singles):
            for p, q in zip(stack.parameters(), params, strict=True):
                q.grad = p.grad[member].clone()
            each.step()
        optimizer.step()
    for member, (params, _) in enumerate(singles):
        for p, q in zip(stack.parameters(), params, strict=True):
            torch.testing.assert_close(p.detach()[member], q.detach(), rtol=1e-9, atol=1e-11)


def test_gradients_set_to_none_come_back():
    stack = stacked()
    optimizer = StackedSGD(stack.parameters(), [0.1] * MEMBERS)
    optimizer.zero_grad()
    optimizer.step()
    stack.backward(torch.ones_like(stack.forward(torch.ones(2, 6).double())))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stack.parameters())
