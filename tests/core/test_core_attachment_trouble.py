"""Attachment in trouble: NaN and Inf, what is refused, and transforms called by hand."""

import copy

import pytest
import torch
from attached import (
    Double,
    Halve,
    Mean,
    Neutral,
    Noise,
    backward,
    equal,
    model,
    train,
    weights,
)
from torch import nn

from pullback.core.attachment import attach
from pullback.core.checks import NonFiniteError
from pullback.core.clip import ClipGradNorm

# --- NaN and Inf ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_is_named_before_anything_moves(bad):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    handle = attach(optimizer, Double(), names=net)
    train(net, optimizer, 2)
    start = weights(net)
    optimizer.zero_grad()
    backward(net)
    net[2].bias.grad[1] = bad
    others = net[0].weight.grad.clone()
    with pytest.raises(NonFiniteError, match=r"AdamW, step 2: .*'2\.bias' holds (NaN|Inf) in 1 of 2 entries"):
        optimizer.step()
    assert equal(start, weights(net))
    assert torch.equal(net[0].weight.grad, others)
    assert handle.steps == 2


def test_skip_is_as_if_the_step_had_not_happened(make):
    with_bad, without = model(), model()
    first, second = make(with_bad.parameters()), make(without.parameters())
    one, other = attach(first, Noise(), Mean(), nonfinite="skip"), attach(second, Noise(), Mean())
    train(with_bad, first, 3)
    train(without, second, 3)
    first.zero_grad()
    backward(with_bad)
    with_bad[0].weight.grad[0, 0] = float("nan")
    kept = [p.grad for p in with_bad.parameters()]
    before, saved = torch.get_rng_state(), copy.deepcopy(first.state_dict())
    first.step()
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is grad for p, grad in zip(with_bad.parameters(), kept, strict=True))
    torch.testing.assert_close(saved, first.state_dict(), rtol=0, atol=0)
    train(with_bad, first, 3, first=3)
    train(without, second, 3, first=3)
    assert equal(weights(with_bad), weights(without))
    assert (one.steps, one.skipped, other.steps) == (6, 1, 6)
    assert torch.equal(one.transforms[1].mean, other.transforms[1].mean)


def test_skip_with_a_closure():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    handle = attach(optimizer, Double(), nonfinite="skip")
    start = weights(net)
    optimizer.step(lambda: backward(net, scale=float("nan")))
    assert equal(start, weights(net))
    assert (handle.steps, handle.skipped) == (0, 1)


def test_skip_puts_counters_in_groups_back():
    class Counts(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
                group["t"] += 1

    net = model()
    optimizer = Counts(net.parameters(), lr=0.1)
    optimizer.param_groups[0].update(k=0, t=torch.zeros(()))
    attach(optimizer, nonfinite="skip")
    backward(net, scale=float("nan"))
    optimizer.step()
    assert optimizer.param_groups[0]["k"] == 0
    assert optimizer.param_groups[0]["t"].item() == 0


def test_a_second_attachment_does_not_count_a_skipped_step():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attach(optimizer, nonfinite="skip")
    second = attach(optimizer, Noise(), Halve())
    start = weights(net)
    backward(net, scale=float("nan"))
    optimizer.step()
    assert equal(start, weights(net))
    assert second.steps == 0


def test_warn_goes_on():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    handle = attach(optimizer, Neutral(), nonfinite="warn")
    backward(net, scale=float("nan"))
    with pytest.warns(
        RuntimeWarning, match=r"attachment to SGD, step 0: .* goes on because nonfinite='warn'"
    ):
        optimizer.step()
    assert handle.steps == 1


def test_large_finite_gradients_are_no_alarm():
    param = nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.SGD([param], lr=1e-38)
    attach(optimizer)
    param.grad = torch.full_like(param, 3e38)  # their sum and their Euclidean norm overflow
    optimizer.step()
    assert torch.isfinite(param).all()
    assert param.abs().max() > 1


# --- refusals ------------------------------------------------------------------------------------------------


def test_refusals():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    noise = Noise()
    with pytest.raises(TypeError, match="got Linear"):
        attach(net[0], noise)
    with pytest.raises(TypeError, match="got LBFGS"):
        attach(torch.optim.LBFGS(net.parameters()), noise)
    with pytest.raises(TypeError, match="Call its class first"):
        attach(optimizer, Noise)
    with pytest.raises(ValueError, match="twice"):
        attach(optimizer, noise, noise)
    with pytest.raises(ValueError, match=r"nonfinite must be one of .* Did you mean 'skip'"):
        attach(optimizer, noise, nonfinite="skp")
    with pytest.raises(ValueError, match="names must name parameters of the optimizer"):
        attach(optimizer, noise, names=model())
    assert not optimizer._optimizer_step_pre_hooks
    handle = attach(optimizer, noise)
    with pytest.raises(ValueError, match="attached to another optimizer already"):
        attach(torch.optim.SGD(net.parameters(), lr=0.1), noise)
    with pytest.raises(RuntimeError, match=r"handle|attachment\.remove"):
        noise.update_(net)
    handle.remove()
    attach(optimizer, noise)


def test_wrappers_without_hooks_are_refused():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner = inner

    with pytest.raises(TypeError, match="wrapper Wrapper"):
        attach(Wrapper(None), Noise())


# --- by hand -------------------------------------------------------------------------------------------------


def test_update_by_hand_equals_attachment():
    by_hand, attached = model(), model()
    first, second = (torch.optim.AdamW(each.parameters()) for each in (by_hand, attached))
    noise = Noise()
    Noise().attach(second)
    for step in range(4):
        first.zero_grad()
        backward(by_hand, step)
        noise.update_(by_hand.parameters())
        first.step()
    train(attached, second, 4)
    assert equal(weights(by_hand), weights(attached))
    assert noise.steps == 4


def test_update_by_hand_refuses_and_skips():
    net = model()
    noise = Noise()
    with pytest.raises(ValueError, match=r"Noise\.update_: none of 4 parameters has a gradient"):
        noise.update_(net)
    with pytest.raises(TypeError, match=r"Pass \[tensor\]"):
        noise.update_(net[0].weight)
    backward(net)
    net[0].bias.grad[0] = float("nan")
    before = net[0].weight.grad.clone()
    noise.update_(net, nonfinite="skip")
    assert noise.steps == 0
    assert torch.equal(before, net[0].weight.grad)
    with pytest.raises(NonFiniteError, match=r"Noise, step 0: .*'0\.bias'"):
        noise.update_(net)


def test_clip_equals_torch():
    net, plain = model(), model()
    backward(net, scale=100.0)
    backward(plain, scale=100.0)
    ClipGradNorm(0.5).update_(net)
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    assert equal([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), -float("inf")])
def test_clip_refuses(bad):
    with pytest.raises(ValueError, match="max_norm must be > 0"):
        ClipGradNorm(bad)


@pytest.mark.parametrize("bad", ["nonsense", 1.0, 3, None])
def test_clip_names_a_wrong_norm_type(bad):
    with pytest.raises(ValueError, match=r"norm_type must be one of 2\.0, inf, got"):
        ClipGradNorm(1.0, norm_type=bad)
    assert ClipGradNorm(1.0, norm_type=2).norm_type == 2.0
