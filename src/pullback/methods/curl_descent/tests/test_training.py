"""Norm resets, GradScaler, closures, compiled models, complex and replaced weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pullback import attach
from pullback.core.frobenius import FrobeniusProjector
from pullback.core.kinds import StepBatch
from pullback.methods.curl_descent import RuleFlip
from pullback.methods.curl_descent.tests.test_flip import OPTIMIZERS, equal, students, train, updates

# --- cost ----------------------------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    """Names of the operations and the entries of what they make."""

    def __init__(self, known):
        super().__init__()
        self.names, self.largest, self.known = [], 0, known

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self.known:
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize(
    ("settings", "ops"),
    [
        ({"fraction": 0.1}, ["slice", "_foreach_neg_"]),
        ({"fraction": 0.5, "which": "random"}, ["mul_"]),
        ({"fraction": 0.0}, []),
    ],
)
def test_a_flip_is_one_operation_in_place_without_a_dense_matrix(settings, ops):
    layer = nn.Linear(200, 300, bias=False)
    layer.weight.grad = torch.ones_like(layer.weight)
    rule = RuleFlip(layer, **settings)
    batch = StepBatch([layer.weight], [layer.weight.grad], ["w"], [0], [{"params": [layer.weight]}], 0)
    seen = Seen({layer.weight.grad.untyped_storage().data_ptr()})
    with seen:
        rule.pre_step_(batch)
    assert seen.largest <= 200  # a vector of signs at most, made once
    seen.names.clear()
    with torch.no_grad(), seen:
        rule.pre_step_(batch)
    assert seen.names == ops


# --- norms -----------------------------------------------------------------------------------------------


def test_renorm_holds_flipped_directions_that_would_blow_up():
    def last_norm(**settings):
        model, x, y = students()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        before = model[2].weight.detach().norm()
        RuleFlip(model[2], fraction=1.0, **settings).attach(optimizer)
        train(model, optimizer, x, y, 100)
        return float(model[2].weight.detach().norm() / before)

    assert last_norm(renorm=True) == pytest.approx(1.0, abs=1e-9)
    assert last_norm() > 1.4


def test_renorm_equals_the_projector_attached_after_it_and_resumes_exactly():
    model, x, y = students()
    twin = copy.deepcopy(model)
    one, two = (OPTIMIZERS["momentum"](list(m.parameters())) for m in (model, twin))
    attachment = RuleFlip(list(model[::2]), fraction=0.5, renorm=True).attach(one)
    attach(two, RuleFlip(list(twin[::2]), fraction=0.5), FrobeniusProjector(twin))
    assert equal(train(model, one, x, y, 4), train(twin, two, x, y, 4))
    again, third = copy.deepcopy(model), OPTIMIZERS["momentum"]
    third = third(list(again.parameters()))
    third.load_state_dict(copy.deepcopy(one.state_dict()))
    with torch.no_grad():
        again[0].weight.mul_(1.5)  # a rule built on other weights takes the saved norms over
    other = RuleFlip(list(again[::2]), fraction=0.5, renorm=True).attach(third)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(attachment.state_dict())
    assert equal(train(model, one, x, y, 3), train(again, third, x, y, 3))
    assert "renorm=True" in repr(attachment)


def test_renorm_is_refused_where_it_cannot_work():
    model, _, _ = students()
    with pytest.raises(ValueError, match="renorm=True needs the layers, got the names"):
        RuleFlip("*", fraction=0.1, renorm=True)
    rule = RuleFlip(model[0], fraction=0.4, renorm=True)
    with pytest.raises(RuntimeError, match=r"got renorm=True\. Attach it"):
        rule.update_(model)
    with pytest.raises(RuntimeError, match="one that is renorm=True"):
        rule.hook()


# --- training machinery ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_gradscaler_and_a_skipped_step(fused):
    def run(flip):
        layer = nn.Linear(4, 1, bias=False)
        nn.init.ones_(layer.weight)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, fused=fused)
        if flip:
            RuleFlip(layer, fraction=0.5).attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for factor in (1.0, float("inf"), 1.0):
            optimizer.zero_grad()
            scaler.scale(layer(torch.ones(1, 4)).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        return layer.weight.detach().flatten()

    torch.testing.assert_close(run(True), torch.tensor([1.2, 1.2, 0.8, 0.8]))
    torch.testing.assert_close(run(False), torch.full((4,), 0.8))


def test_closure_and_compiled_model():
    model, x, y = students()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="eager")
    one, two = OPTIMIZERS["adam"](list(model.parameters())), OPTIMIZERS["adam"](list(twin.parameters()))
    RuleFlip(model[2], fraction=0.5).attach(one)
    RuleFlip(twin[2], fraction=0.5).attach(two)

    def closure():
        one.zero_grad()
        loss = (0.5 * (model(x) - y).square().sum(1)).mean()
        loss.backward()
        return loss

    for _ in range(3):
        one.step(closure)
    assert equal([p.detach() for p in model.parameters()], train(compiled, two, x, y, 3))


def test_complex_weights_are_flipped():
    layer = nn.Linear(4, 2, bias=False, dtype=torch.complex64)
    layer.weight.grad = torch.full_like(layer.weight, 1 + 2j)
    RuleFlip(layer, mask=torch.tensor([1, -1, 1, -1])).update_(layer)
    assert torch.equal(layer.weight.grad[0], torch.tensor([1 + 2j, -1 - 2j, 1 + 2j, -1 - 2j]))


def test_a_replaced_weight_is_found_again():
    model, x, y = students()
    rule = RuleFlip(model[0], fraction=1.0)
    model[0].weight = nn.Parameter(model[0].weight.detach().float().double())
    before = model[0].weight.detach().clone()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    rule.attach(optimizer)
    plain = updates(OPTIMIZERS["sgd"], None)
    torch.testing.assert_close(train(model, optimizer, x, y, 1)[0] - before, -plain[0], rtol=1e-5, atol=1e-6)
