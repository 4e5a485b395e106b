"""The flip in optimizers and on weights: columns and rows, every layer, neutral and full settings, machinery."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from pullback import attach
from pullback.methods.curl_descent import RuleFlip
from pullback.methods.curl_descent.tests import reference as ref
from pullback.methods.curl_descent.theory import curl_fraction

OPTIMIZERS = {
    "sgd": lambda p, **kw: torch.optim.SGD(p, lr=0.1, **kw),
    "momentum": lambda p, **kw: torch.optim.SGD(p, lr=0.1, momentum=0.9, **kw),
    "nesterov": lambda p, **kw: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, **kw),
    "adam": lambda p, **kw: torch.optim.Adam(p, lr=0.01, **kw),
    "adamw": lambda p, **kw: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3, **kw),
    "coupled": lambda p, **kw: torch.optim.SGD(p, lr=0.1, weight_decay=0.3, **kw),
    "rmsprop": lambda p, **kw: torch.optim.RMSprop(p, lr=0.01, **kw),
}


def close(first, second):
    """Equal but for rounding: an update is the difference of two weights of size 1."""
    return torch.allclose(first, second, rtol=0, atol=1e-15)


def students():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 2, bias=False)).double()
    x, y = torch.randn(7, 5).double(), torch.randn(7, 2).double()
    return model, x, y


def train(model, optimizer, x, y, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * (model(x) - y).square().sum(1)).mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def updates(make, flip, steps=1, **kw):
    """What one run adds to the weights."""
    model, x, y = students()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = make(list(model.parameters()), **kw)
    if flip is not None:
        flip(model).attach(optimizer)
    return [after - b for after, b in zip(train(model, optimizer, x, y, steps), before, strict=True)]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- the rule --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden", "readout"), [(0.4, 0.0), (0.0, 0.5), (0.4, 0.5)])
def test_two_steps_are_the_papers_equations(hidden, readout):
    model, x, y = students()
    w1, w2 = (p.detach().numpy().copy() for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(optimizer, RuleFlip(model[0], fraction=hidden), RuleFlip(model[2], fraction=readout))
    got = train(model, optimizer, x, y, 2)
    d1, d2 = ref.first_signs(5, hidden), ref.first_signs(6, readout)
    for _ in range(2):
        u1, u2 = ref.field(w1, w2, x.numpy(), y.numpy(), d1, d2)
        w1, w2 = w1 - 0.1 * u1, w2 - 0.1 * u2
    np.testing.assert_allclose(got[0], w1, atol=1e-12)
    np.testing.assert_allclose(got[1], w2, atol=1e-12)


def test_rows_are_the_postsynaptic_neurons():
    plain, flipped = (
        updates(OPTIMIZERS["sgd"], None),
        updates(OPTIMIZERS["sgd"], lambda m: RuleFlip(m[0], fraction=0.5, side="post")),
    )
    assert close(flipped[0], torch.cat([-plain[0][:3], plain[0][3:]]))
    assert torch.equal(flipped[1], plain[1])


def test_the_error_sent_back_is_not_flipped():
    plain = updates(OPTIMIZERS["sgd"], None)
    flipped = updates(OPTIMIZERS["sgd"], lambda m: RuleFlip(m[2], fraction=1.0))
    assert torch.equal(flipped[0], plain[0])  # the layer below learns as ever
    assert close(flipped[1], -plain[1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_flip_is_the_optimizer_and_all_flips_are_maximize_bitwise(name):
    make = OPTIMIZERS[name]
    none = updates(make, lambda m: RuleFlip(list(m[::2]), fraction=0.0), steps=5)
    assert equal(none, updates(make, None, steps=5))
    every = updates(make, lambda m: RuleFlip(list(m[::2]), fraction=1.0), steps=5)
    if name not in {"coupled"}:
        assert equal(every, updates(make, None, steps=5, maximize=True))
    assert not equal(every, none)


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "adam", "rmsprop"])
def test_updates_of_odd_optimizers_are_flipped_exactly(name):
    plain = updates(OPTIMIZERS[name], None)
    flipped = updates(OPTIMIZERS[name], lambda m: RuleFlip(m[0], fraction=0.4))
    assert close(flipped[0], torch.cat([-plain[0][:, :2], plain[0][:, 2:]], 1))


def decayed(make, penalty=0.0):
    """One step without any gradient of the data: what decay does to flipped (first) and plain weights."""
    layer = nn.Linear(2, 1, bias=False)
    nn.init.ones_(layer.weight)
    optimizer = make(layer.parameters())
    RuleFlip(layer, fraction=0.5).attach(optimizer)
    (0.0 * layer.weight.sum() + 0.5 * penalty * layer.weight.square().sum()).backward()
    optimizer.step()
    return layer.weight.detach().flatten().tolist()


def test_decay_of_the_optimizer_shrinks_flipped_weights_and_a_penalty_in_the_loss_lets_them_grow():
    assert decayed(OPTIMIZERS["coupled"]) == pytest.approx([0.97, 0.97])
    assert decayed(OPTIMIZERS["adamw"]) == pytest.approx([0.997, 0.997])
    assert decayed(OPTIMIZERS["sgd"], penalty=0.3) == pytest.approx([1.03, 0.97])


@pytest.mark.parametrize("which", ["first", "random"])
def test_zero_gradient_gives_exactly_zero_update(which):
    model, x, _ = students()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    RuleFlip(list(model[::2]), fraction=0.4, which=which).attach(optimizer)
    assert equal(train(model, optimizer, x, model(x).detach()), before)


# --- which neurons ---------------------------------------------------------------------------------------


def flipped_entries(layer, **settings):
    rule = RuleFlip(layer, **settings)
    (signs,) = rule.signs([layer.weight])
    return (signs * torch.ones_like(layer.weight)) < 0


@pytest.mark.parametrize(
    ("n", "fraction", "count"),
    [(10, 0.1, 1), (10, 0.04, 0), (10, 0.25, 2), (10, 0.35, 4), (7, 1.0, 7), (3, 0.5, 2)],
)
def test_share_is_rounded_to_whole_neurons(n, fraction, count):
    entries = flipped_entries(nn.Linear(n, 2), fraction=fraction)
    assert entries.all(0).sum() == entries.any(0).sum() == count


def test_random_choice_is_seeded_and_differs_between_layers():
    layers = [nn.Linear(40, 2) for _ in range(2)]

    def chosen(seed):
        signs = RuleFlip(layers, fraction=0.5, which="random", seed=seed).signs([m.weight for m in layers])
        return torch.stack([s.flatten() for s in signs])

    assert (chosen(0) < 0).sum(1).tolist() == [20, 20]
    assert torch.equal(chosen(0), chosen(0))
    assert not torch.equal(chosen(0), chosen(1))
    assert not torch.equal(chosen(0)[0], chosen(0)[1])


LAYERS = {
    "linear": (nn.Linear(4, 6), 1, 0),
    "conv1d": (nn.Conv1d(4, 6, 3), 1, 0),
    "conv2d": (nn.Conv2d(4, 6, 3), 1, 0),
    "conv3d": (nn.Conv3d(4, 6, 2), 1, 0),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), 0, 1),
    "embedding": (nn.Embedding(4, 6), 0, 1),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("mask", [[-1, 1, 1, -1], [1, -1, -1, 1]])
def test_inputs_and_outputs_of_every_layer(name, mask):
    layer, inputs, outputs = LAYERS[name]
    wanted = torch.tensor(mask) < 0
    entries = flipped_entries(layer, mask=torch.tensor(mask)).movedim(inputs, 0).flatten(1)
    assert torch.equal(entries.all(1), wanted)
    assert torch.equal(entries.any(1), wanted)
    layer.weight.grad = torch.randn_like(layer.weight)
    wanted_grad = torch.where(
        flipped_entries(layer, mask=torch.tensor(mask)), -layer.weight.grad, layer.weight.grad
    )
    RuleFlip(layer, mask=torch.tensor(mask)).update_(layer)
    assert torch.equal(layer.weight.grad, wanted_grad)
    rows = torch.tensor([*mask, 1, -1])
    entries = flipped_entries(layer, mask=rows, side="post").movedim(outputs, 0).flatten(1)
    assert torch.equal(entries.all(1), rows < 0)


@pytest.mark.parametrize("make", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("side", ["pre", "post"])
@pytest.mark.parametrize("groups", [2, 4])
def test_channels_of_grouped_convolutions(make, side, groups):
    """A channel is flipped iff exactly the synapses that touch it are: seen by autograd on a linear layer."""
    torch.manual_seed(0)
    layer = make(4, 8, 3, groups=groups, bias=False)
    size = 4 if side == "pre" else 8
    mask = torch.ones(size)
    mask[1] = -1
    x = torch.zeros(1, 4, 5, 5)
    x[:, 1 if side == "pre" else slice(None)] = torch.rand(1, 5, 5)
    out = layer(x)
    touched = out if side == "pre" else out[:, 1]
    (grad,) = torch.autograd.grad(touched.sum(), layer.weight)
    assert torch.equal(flipped_entries(layer, mask=mask, side=side), grad != 0)
    with RuleFlip(layer, mask=mask, side=side).hook():
        (turned,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    (plain,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    assert torch.equal(turned, torch.where(grad != 0, -plain, plain))
    layer.weight.grad = plain.to(memory_format=torch.channels_last)
    RuleFlip(layer, mask=mask, side=side).update_(layer)
    assert torch.equal(layer.weight.grad, turned)


def test_names_choose_weights_and_never_biases():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    signs = RuleFlip("1.*", fraction=1.0).signs(model)
    assert [bool((s < 0).any()) for s in signs] == [False, False, True, False]
    assert [s.shape for s in signs] == [(), (), (1, 3), ()]  # a broadcast vector, no dense D


def test_tied_weight_is_flipped_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    signs = RuleFlip("*", fraction=1.0).signs(model)
    assert len(signs) == 1
    with pytest.raises(ValueError, match=r"that of layers\[1\] twice"):
        RuleFlip(list(model), fraction=0.5)


# --- hooks on weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"fraction": 0.5}, {"fraction": 0.5, "which": "random"}, {"fraction": 0.0}]
)
def test_hook_equals_attachment_and_is_taken_off_without_a_trace(settings):
    attached = updates(OPTIMIZERS["momentum"], lambda m: RuleFlip(list(m[::2]), **settings), steps=4)
    model, x, y = students()
    before = [p.detach().clone() for p in model.parameters()]
    rule = RuleFlip(list(model[::2]), **settings)
    try:
        with rule.hook():
            after = train(model, OPTIMIZERS["momentum"](list(model.parameters())), x, y, 4)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert equal([a - b for a, b in zip(after, before, strict=True)], attached)
    assert all(not p._backward_hooks for p in model.parameters())
    rule.hook(model).remove()  # may be hooked again


def test_hook_flips_accumulated_and_functional_gradients_and_their_derivatives():
    w = nn.Linear(3, 1, bias=False).double()
    x = torch.randn(4, 3).double()
    loss = lambda: w(x).pow(4).sum()  # noqa: E731
    (plain,) = torch.autograd.grad(loss(), w.weight)
    rule = RuleFlip(w, fraction=1 / 3)
    sign = torch.tensor([[-1.0, 1.0, 1.0]])
    with rule.hook():
        loss().backward()
        loss().backward()
        torch.testing.assert_close(w.weight.grad, 2 * sign * plain)
        (field,) = torch.autograd.grad(loss(), w.weight, create_graph=True)
    (jacobian_row,) = torch.autograd.grad(field[0, 0], w.weight)
    (plain_again,) = torch.autograd.grad(loss(), w.weight, create_graph=True)
    (hessian_row,) = torch.autograd.grad(plain_again[0, 0], w.weight)
    torch.testing.assert_close(jacobian_row, -hessian_row)


def test_hook_and_attachment_exclude_each_other():
    model, x, y = students()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    rule = RuleFlip(model[0], fraction=0.4)
    attachment = rule.attach(optimizer)
    with pytest.raises(RuntimeError, match="one that is attached to an optimizer"):
        rule.hook()
    attachment.remove()
    handle = rule.hook()
    with pytest.raises(RuntimeError, match="one that is hooked"):
        rule.hook()
    rule.attach(optimizer)
    with pytest.raises(RuntimeError, match="its hooks flip the gradient already"):
        train(model, optimizer, x, y)
    assert copy.deepcopy(rule)._hooked is None
    handle.remove()
    train(model, optimizer, x, y)


def test_signs_serve_the_curl_meter():
    model, x, y = students()
    rule = RuleFlip(model[2], fraction=0.5)
    assert curl_fraction(lambda: (model(x) - y).square().mean(), model, rule.signs(model)) > 0.05
