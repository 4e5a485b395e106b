"""Treated layers in everything that drives a model: nothing but one gradient changes, and one call undoes it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pullback.core import schedules
from pullback.methods.tract import TrAct, precondition_input, tract
from pullback.methods.tract.tests import reference


def grad_of(parameter):
    """The gradient that has arrived."""
    assert parameter.grad is not None
    return parameter.grad


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 5, stride=2, padding=2, groups=1)
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(36, 5)).to(dtype)


X, Y = draw(6, 3, 10, 10, seed=1), torch.tensor([0, 1, 2, 3, 4, 0])


def gradients(model, x=X, scale=1.0):
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(model(x).float(), Y[: len(x)]) * scale
    names, params = zip(*model.named_parameters(), strict=True)
    *grads, to_input = torch.autograd.grad(loss, (*params, x))
    return {"loss": loss.detach(), "input": to_input, **dict(zip(names, grads, strict=True))}


def same_but_for(one, other, *names):
    return all(torch.equal(one[key], other[key]) != (key in names) for key in one)


# --- nothing but one gradient -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_all_other_gradients_are_bitwise_those_of_the_plain_model(dtype):
    model, x = network(dtype), X.to(dtype)
    plain = gradients(model, x)
    with tract(model[0]):
        found = gradients(model, x)
        assert same_but_for(plain, found, "0.weight")
        assert found["0.weight"].dtype == dtype
    assert same_but_for(plain, gradients(model, x))


def test_off_means_bitwise_plain():
    model = network()
    plain = gradients(model)
    handle = tract(model[0])
    handle.enabled = False
    assert same_but_for(plain, gradients(model))
    handle.enabled = True
    assert same_but_for(plain, gradients(model), "0.weight")
    model.eval()
    assert same_but_for(plain, gradients(model))
    model.train()
    model[0].training = False  # without train(), as some trainers do
    assert same_but_for(plain, gradients(model))


def test_channels_last_and_strided_inputs():
    model = network(torch.float64)
    x = X.double()
    handle = tract(model[0])
    wanted = gradients(model, x)["0.weight"]
    for view in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT, torch.stack([x, x])[0]):
        torch.testing.assert_close(gradients(model, view)["0.weight"], wanted)
    model.to(memory_format=torch.channels_last)
    strides = model[0].weight.stride()
    found = gradients(model, x.to(memory_format=torch.channels_last))["0.weight"]
    torch.testing.assert_close(found, wanted)
    assert model[0].weight.stride() == strides
    handle.remove()


# --- the layer stays the layer ----------------------------------------------------------------------------------------


def test_names_hooks_optimizers_and_attributes_survive_and_come_back():
    model = network()
    layer, keys = model[0], list(model.state_dict())
    seen = []
    layer.register_forward_hook(lambda *args: seen.append(1))
    layer.note = "kept"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = set(vars(layer))
    handle = tract(layer, lam=0.25)
    assert isinstance(layer, nn.Conv2d)
    assert model[0] is layer
    assert list(model.state_dict()) == keys
    assert "lam=0.25" in repr(model)
    model.load_state_dict(network().state_dict())
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    assert seen
    assert layer.note == "kept"
    handle.remove()
    handle.remove()
    assert type(layer) is nn.Conv2d
    assert set(vars(layer)) == before
    assert "lam" not in repr(model)


def test_leaving_by_an_error_restores_the_layer():
    model = network()
    with pytest.raises(KeyError), tract(model[0]):
        raise KeyError
    assert type(model[0]) is nn.Conv2d


def test_copies_are_treated_and_have_their_own_handle():
    model = network()
    handle = tract(model[0], lam=0.25)
    twin = copy.deepcopy(model)
    twin[0].tract.lam = 0.5
    assert handle.lam == 0.25
    assert not torch.equal(gradients(model)["0.weight"], gradients(twin)["0.weight"])
    twin[0].tract.remove()
    assert type(twin[0]) is nn.Conv2d
    assert type(model[0]) is not nn.Conv2d
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert same_but_for(gradients(model), gradients(loaded))
    assert loaded[0].tract.layer is loaded[0]


def test_the_damping_moves_resumes_and_is_not_rounded():
    layer = nn.Linear(3, 2)
    handle = tract(layer, lam=schedules.inverse_decay(0.2, alpha=1.0, beta=1.0))
    assert handle.lam == pytest.approx(0.2, abs=1e-7)
    handle.signal.progress(0.5)
    assert handle.lam == pytest.approx(0.2 / 1.5, abs=1e-7)
    layer.to(torch.bfloat16)
    assert handle.signal.lam.dtype == torch.float32
    fresh = tract(nn.Linear(3, 2), lam=schedules.inverse_decay(0.2, alpha=1.0, beta=1.0))
    fresh.signal.load_state_dict(handle.signal.state_dict())
    assert fresh.lam == handle.lam
    handle.signal.progress(1.0)
    handle.lam = 0.7
    assert handle.lam == pytest.approx(0.7)
    assert "InverseDecay" in repr(layer)


def test_the_damping_of_the_forward_pass_counts():
    layer, x = nn.Linear(3, 2).double(), draw(5, 3, dtype=torch.float64)
    handle = tract(layer, lam=0.25)
    loss = layer(x).square().sum()
    (wanted,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
    handle.lam = 4.0
    assert torch.equal(torch.autograd.grad(loss, layer.weight)[0], wanted)


# --- loops ------------------------------------------------------------------------------------------------------------


def test_every_micro_batch_and_every_call_has_its_own_covariance():
    layer = nn.Linear(4, 3).double()
    parts = [draw(7, 4, seed=s, dtype=torch.float64) for s in (1, 2)]
    outer = [draw(7, 3, seed=s, dtype=torch.float64) for s in (3, 4)]
    wanted = sum(reference.gradient(g, x, 0.25) for g, x in zip(outer, parts, strict=True))
    tract(layer, 0.25)
    for x, g in zip(parts, outer, strict=True):
        layer(x).backward(g)
    torch.testing.assert_close(grad_of(layer.weight), wanted)
    both = sum((layer(x) * g).sum() for x, g in zip(parts, outer, strict=True))  # a layer that is used twice
    torch.testing.assert_close(torch.autograd.grad(both, layer.weight)[0], wanted)


def test_a_training_loop_falls_faster_where_inputs_are_ill_scaled():
    x = draw(256, 6, seed=1) * torch.tensor([10.0, 3.0, 1.0, 0.3, 0.1, 0.03])
    y = x @ torch.tensor([0.1, 0.3, 1.0, 3.0, 10.0, 30.0])

    def train(treated):
        torch.manual_seed(0)
        layer = nn.Linear(6, 1)
        if treated:
            tract(layer, lam=1e-3)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.3 if treated else 0.009, momentum=0.5)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (layer(x).squeeze(1) - y).square().mean()
            loss.backward()
            optimizer.step()
            schedule.step()
        return loss.item()

    assert train(True) < 0.05 * train(False)


def test_autocast_and_loss_scale():
    model = network()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = gradients(model)
    handle = tract(model[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):  # also around the backward pass
        found = gradients(model)
        scaled = gradients(model, scale=1024.0)
    assert same_but_for(plain, found, "0.weight")
    assert found["0.weight"].dtype == torch.float32
    torch.testing.assert_close(scaled["0.weight"], 1024 * found["0.weight"])
    rows = reference.patches(X.double(), (5, 5), (2, 2), (1, 1), ((2, 2), (2, 2)), "zeros")
    inverse = torch.linalg.inv(rows.T @ rows / len(rows) + handle.signal.lam.double() * torch.eye(75))
    wanted = plain["0.weight"].double().flatten(1) @ inverse  # covariance and solve are not in bfloat16
    torch.testing.assert_close(found["0.weight"].double().flatten(1), wanted, rtol=2e-3, atol=1e-5)


def test_a_scaler_leaves_overflowing_steps_out():
    model = network()
    tract(model[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    weights = [model[0].weight.detach().clone()]
    for factor in (1.0, float("inf")):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(model(X), Y)
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        weights.append(model[0].weight.detach().clone())
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    assert scaler.get_scale() == 128.0


def test_weights_in_half_precision_are_solved_for_in_float32():
    layer, x, outer = nn.Linear(4, 3).half(), draw(9, 4, dtype=torch.float16), draw(9, 3, dtype=torch.float16)
    tract(layer, 0.25)
    layer(x).backward(outer)
    assert grad_of(layer.weight).dtype == torch.float16
    wanted = reference.gradient(outer.double(), x.double(), 0.25)
    torch.testing.assert_close(grad_of(layer.weight).double(), wanted, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("b", [3, 12])
def test_double_backward_is_the_derivative_of_the_edited_gradient(b):
    x, target = draw(b, 4, dtype=torch.float64).requires_grad_(), draw(b, 3, seed=2, dtype=torch.float64)
    weight = draw(3, 4, seed=3, dtype=torch.float64).requires_grad_()

    def first(w, v):  # the edited gradient of a squared error, written out
        covariance = v.mT @ v / b + 0.25 * torch.eye(4, dtype=torch.float64)
        return 2 * (v @ w.mT - target).mT @ v @ torch.linalg.inv(covariance)

    z = F.linear(x, precondition_input(weight, x, 0.25))
    (got,) = torch.autograd.grad((z - target).square().sum(), weight, create_graph=True)
    torch.testing.assert_close(got, first(weight, x))
    # With respect to the samples alone: with respect to the weight the second pass would be edited as well.
    (slope,) = torch.autograd.grad(got.sin().sum(), x)
    fixed = weight.detach()
    torch.testing.assert_close(slope, torch.autograd.grad(first(fixed, x).sin().sum(), x)[0])


def test_second_derivatives_with_respect_to_the_weight_are_edited_once_more():
    x, weight = draw(9, 4, dtype=torch.float64), draw(3, 4, seed=3, dtype=torch.float64).requires_grad_()
    inverse = torch.linalg.inv(x.mT @ x / 9 + 0.25 * torch.eye(4, dtype=torch.float64))
    z = F.linear(x, precondition_input(weight, x, 0.25))
    (got,) = torch.autograd.grad(z.square().sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(got.sum(), weight)
    wanted = 2 * torch.ones(3, 4, dtype=torch.float64) @ inverse @ x.mT @ x @ inverse
    torch.testing.assert_close(second, wanted)


def test_per_task_and_per_sample_gradients():
    model = network(torch.float64)
    tract(model[0], 0.25)
    x = X.double()
    losses = F.cross_entropy(model(x), Y, reduction="none")[:3]
    weight = model[0].weight
    (rows,) = torch.autograd.grad(
        losses, weight, torch.eye(3, dtype=torch.float64), is_grads_batched=True, retain_graph=True
    )
    for row, loss in zip(rows, losses, strict=True):
        torch.testing.assert_close(row, torch.autograd.grad(loss, weight, retain_graph=True)[0])
    params = {name: p.detach() for name, p in model.named_parameters()}

    def one(params, x, y):
        return F.cross_entropy(torch.func.functional_call(model, params, (x[None],)), y[None])

    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(params, x, Y)["0.weight"]
    alone = [gradients(model, x[:1])["0.weight"], each[0]]
    torch.testing.assert_close(alone[1], alone[0])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_as_one_graph_and_follows_the_damping():
    model = network(torch.float64)
    handle = tract(model[0], 0.25)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = X.double()
    for lam in (0.25, 0.5):
        handle.lam = lam
        eager, fast = gradients(model, x), gradients(compiled, x)
        torch.testing.assert_close(fast["_orig_mod.0.weight"], eager["0.weight"])
    handle.remove()
    torch.testing.assert_close(gradients(compiled, x)["_orig_mod.0.weight"], gradients(model, x)["0.weight"])


def test_as_a_module_it_follows_its_mode():
    signal, weight, x = TrAct(0.25), draw(2, 3).requires_grad_(), draw(5, 3)
    wanted = reference.gradient(torch.ones(5, 2).double(), x.double(), 0.25).float()
    torch.testing.assert_close(torch.autograd.grad(F.linear(x, signal(weight, x)).sum(), weight)[0], wanted)
    signal.eval()
    assert signal(weight, x) is weight
