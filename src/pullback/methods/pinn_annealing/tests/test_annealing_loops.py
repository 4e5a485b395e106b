"""The component in a user's loop: closures, evaluation, mixed precision, compile, resume, copies, refusals."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch
from torch import nn

from pullback.methods.pinn_annealing import GradientAnnealing, weight_matrices
from pullback.methods.pinn_annealing.tests.cases import X, balanced, losses_of, network


def grads(net):
    return [p.grad.clone() for p in net.parameters()]


# --- closures, evaluation -------------------------------------------------------------------------------------------


def test_lbfgs_needs_frozen_weights():
    net = network()
    balance = balanced(net)
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=4, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        total = balance(losses_of(net))
        total.backward()
        return total

    with pytest.raises(RuntimeError, match=r"LBFGS.step.*frozen"):
        optimizer.step(closure)
    values = []
    for _ in range(3):
        balance.update(losses_of(net))
        before = balance.lam.clone()
        with balance.frozen():
            start = balance(losses_of(net)).item()
            optimizer.step(closure)
            values.append(start - balance(losses_of(net)).item())
        assert torch.equal(before, balance.lam)
    assert min(values) > 0
    assert balance.updates.item() == 3
    assert balance.steps.item() == 0


def test_one_evaluation_per_closure_may_update():
    net = network()
    balance = balanced(net, update_every=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def closure():
        optimizer.zero_grad()
        return balance.backward(losses_of(net))

    for _ in range(3):
        optimizer.step(closure)
    assert balance.updates.item() == 3


def test_frozen_ends_with_an_error_and_nests():
    net = network()
    balance = balanced(net, update_every=1)
    with balance.frozen(), pytest.raises(ArithmeticError), balance.frozen():
        raise ArithmeticError
    with balance.frozen():
        with balance.frozen():
            balance(losses_of(net))
        balance(losses_of(net))
    assert balance.steps.item() == 0
    balance(losses_of(net))
    assert balance.steps.item() == 1


def test_evaluation_uses_the_weights_and_counts_nothing():
    net = network()
    balance = balanced(net, update_every=1, initial={"data": 7.0})
    r, d, p = losses_of(net).values()
    for value in (balance.eval()(losses_of(net)), _without_gradients(balance.train(), net)):
        assert value == r + 7.0 * d + p
    assert balance.steps.item() == balance.updates.item() == 0


def _without_gradients(balance, net):
    with torch.no_grad():
        return balance(losses_of(net))


# --- mixed precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_loss_scaling_changes_no_weight(way):
    plain, scaled = network(dtype=torch.float32), network(dtype=torch.float32)
    one, other = balanced(plain, update_every=2), balanced(scaled, update_every=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.01) for net in (plain, scaled)]
    x = X.float()
    for step in range(8):
        for optimizer in optimizers:
            optimizer.zero_grad()
        one.backward(losses_of(plain, x, step))
        optimizers[0].step()
        losses = {name: scaler.scale(loss) for name, loss in losses_of(scaled, x, step).items()}
        other(losses).backward() if way == "forward" else other.backward(losses)
        scaler.step(optimizers[1])
        scaler.update()
    assert torch.allclose(one.lam, other.lam, rtol=1e-5)
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(plain.parameters(), scaled.parameters(), strict=True)
    )


def test_an_overflow_keeps_weights_and_parameters():
    net = network(dtype=torch.float32)
    balance = balanced(net, update_every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, fused=True)
    before = [p.detach().clone() for p in net.parameters()]
    losses = losses_of(net, X.float())
    balance.backward({name: scaler.scale(1e3 * loss) for name, loss in losses.items()})
    scaler.step(optimizer)
    scaler.update()
    assert balance.lam.tolist() == [1.0, 1.0, 1.0]
    assert balance.skipped.item() == 1
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_autocast():
    net = network(dtype=torch.float32)
    balance = balanced(net, update_every=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(net, X.float())
        balance.backward(losses)
    reference = network()
    exact = balanced(reference, update_every=1)
    exact.backward(losses_of(reference))
    assert torch.allclose(balance.lam.double(), exact.lam, rtol=0.05)
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())


def test_weights_follow_the_device_but_are_never_rounded():
    net = network(dtype=torch.float32)
    balance = balanced(net, initial={"data": 1.0 + 2**-20}, lam_max=1e6)
    assert balance.half().lam.dtype == torch.float32
    assert balance.lam[1] == 1.0 + 2**-20
    assert balance.double().lam.dtype == torch.float64
    assert balance.steps.dtype == torch.int64
    assert balance.to("meta").lam.is_meta


def test_compiled_model_and_losses():
    net = network()
    torch.compiler.reset()
    with functorch.patch(donated_buffer=False):  # on update steps a graph is used once per loss
        compiled = torch.compile(net, backend="aot_eager")
        one, other = balanced(net, update_every=1), balanced(net, update_every=1)
        for step in range(2):
            net.zero_grad()
            one(losses_of(compiled, step=step)).backward()
            with_compiled = grads(net)
            net.zero_grad()
            other(losses_of(net, step=step)).backward()
            assert all(
                torch.allclose(a, b, rtol=1e-10) for a, b in zip(with_compiled, grads(net), strict=True)
            )
    assert torch.allclose(one.lam, other.lam, rtol=1e-10)
    torch.compiler.reset()


# --- resume, copies -------------------------------------------------------------------------------------------------


def train(net, balance, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        balance.backward(losses_of(net, step=step))
        optimizer.step()


@pytest.mark.parametrize("stop", [1, 4, 6, 9])
def test_resume_is_bitwise(stop):
    whole = network()
    balance, optimizer = balanced(whole, update_every=3), torch.optim.AdamW(whole.parameters(), lr=0.01)
    train(whole, balance, optimizer, range(12))
    first = network()
    parts = first, balanced(first, update_every=3), torch.optim.AdamW(first.parameters(), lr=0.01)
    train(*parts, range(stop))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    second = network(seed=1)
    again = second, balanced(second, update_every=3), torch.optim.AdamW(second.parameters(), lr=0.01)
    for part, state in zip(again, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*again, range(stop, 12))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
    assert torch.equal(balance.lam, again[1].lam)
    assert balance.updates == again[1].updates


def test_copies_work_on_the_copied_model():
    net = network()
    pair: Any = nn.ModuleList([net, balanced(net, update_every=1)])
    twin = copy.deepcopy(pair)
    twin[1].backward(losses_of(twin[0]))
    assert all(p.grad is None for p in net.parameters())
    assert twin[1].updates.item() == 1
    assert pair[1].updates.item() == 0


def spoiled(state, key, value):
    extra = {**state["_extra_state"]}
    if key in extra:
        return {**state, "_extra_state": {**extra, key: value}}
    return {**state, key: value}


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("format_version", 2, "newer pullback"),
        ("format_version", "1", "must be an integer"),
        ("terms", ["prior", "data"], r"terms must be \['data', 'prior'\], got"),
        ("reference", ["residual", "more"], "list of 1 items"),
        ("fixed", 0, "fixed must be 1, got 0"),
        ("lam", torch.ones(2, dtype=torch.float64), r"shape \(3,\)"),
        ("lam", torch.ones(3), "dtype"),
        ("steps", torch.tensor(1.0), "dtype"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(key, value, match):
    net = network()
    balance, other = balanced(net), balanced(net, initial=5.0)
    train(net, other, torch.optim.SGD(net.parameters(), lr=0.01), range(3))
    before = {name: buffer.clone() for name, buffer in balance.named_buffers()}
    with pytest.raises(RuntimeError, match=match):
        balance.load_state_dict(spoiled(other.state_dict(), key, value))
    after = dict(balance.named_buffers())
    assert all(
        torch.equal(
            before[k],
            after[k],
        )
        or before[k].isnan().all()
        for k in before
    )


def test_an_incomplete_state_changes_nothing_even_when_not_strict():
    net = network()
    balance, other = balanced(net), balanced(net, initial=5.0)
    state = other.state_dict()
    del state["updates"]
    with pytest.raises(RuntimeError, match="updates"):
        balance.load_state_dict(state)
    balance.load_state_dict(state, strict=False)
    assert balance.lam.tolist() == [1.0, 1.0, 1.0]


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda d: list(d.values()), TypeError, "mapping of names"),
        (lambda d: d["residual"], TypeError, "mapping of names"),
        (lambda d: {}, ValueError, "empty mapping"),
        (lambda d: {k: v for k, v in d.items() if k != "prior"}, ValueError, r"missing \['prior'\]"),
        (lambda d: {**d, "extra": d["data"]}, ValueError, r"unknown \['extra'\]"),
        (lambda d: {**d, "data": 1.0}, TypeError, r"losses\['data'\] must be a floating tensor, got 1.0"),
        (lambda d: {**d, "data": torch.tensor(1)}, TypeError, "floating tensor"),
        (lambda d: {**d, "data": d["data"].expand(2)}, ValueError, r"must be a scalar.*\.mean"),
        (lambda d: {**d, "data": d["data"].to(torch.complex64)}, TypeError, "floating tensor"),
    ],
)
@pytest.mark.parametrize("way", ["__call__", "backward", "update", "gradient_histograms"])
def test_losses_must_be_named_scalars(change, error, match, way):
    net = network()
    balance = balanced(net)
    with pytest.raises(error, match=match):
        getattr(balance, way)(change(losses_of(net)))
    assert balance.steps.item() == balance.updates.item() == 0


def test_every_loss_must_reach_the_chosen_parameters():
    net, other = network(), nn.Linear(2, 1).double()
    balance = GradientAnnealing("data", params=weight_matrices(net))
    losses = {"residual": net(X).sum(), "data": other(X).sum()}
    for way in (balance, balance.backward):
        with pytest.raises(ValueError, match=r"'0.weight', which losses\['data'\] does not use"):
            way(losses)
    assert all(p.grad is None for p in [*net.parameters(), *other.parameters()])


def test_torch_func_is_refused_and_frozen_weights_work_in_it():
    net = network()
    balance = balanced(net)

    def total(x):
        return balance(losses_of(net, x))

    with pytest.raises(RuntimeError, match=r"torch.func transform. Wrap the call in balance.frozen"):
        torch.func.grad(total)(X)
    with balance.frozen():
        assert torch.func.grad(total)(X).shape == X.shape


def test_whole_training_step_in_compile_falls_back():
    net = network()
    balance = balanced(net, update_every=1)

    def step(x):
        return balance(losses_of(net, x))

    compiled = torch.compile(step, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        for _ in range(3):
            compiled(X).backward()
    assert balance.updates.item() == 3
    torch._dynamo.reset()


def test_repr_names_what_it_does():
    text = repr(balanced(network()))
    assert all(word in text for word in ("GradientAnnealing", "'data'", "'residual'", "siam", "params=2"))
