"""The conflict monitor in loops as users have them: accumulation, mixed precision, compilation, odd models."""

from __future__ import annotations

import copy

import pytest
import torch
from conflict_models import TASKS, build, losses_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from pullback import ConflictMonitor
from pullback.testing.tools import same, values


def around(monitor, losses, total, backward=torch.Tensor.backward):
    with monitor.around(losses, total):
        backward(total)
    return monitor.last


def both(model, losses, total):
    """Reports by both forms on one graph: the call first, then the block with the user's backward pass."""
    called = ConflictMonitor(model, TASKS)(losses, total)
    return called, around(ConflictMonitor(model, TASKS), losses, total)


# --- where one pass can be spared, and where not --------------------------------------------------------------


def fallback(prepare, model=None, extra=None):
    """Passes that the block takes after ``prepare(model)``, and whether it found what the call finds."""
    model = build(torch.float64).eval() if model is None else model
    prepare(model)
    losses = losses_of(model)
    total = sum(losses.values()) + (0.0 if extra is None else extra(model))
    called, block = both(model, losses, total)
    assert torch.allclose(called.cosine, block.cosine, rtol=0, atol=1e-9, equal_nan=True)
    assert torch.allclose(called.norms, block.norms, rtol=1e-9)
    return block.passes


def accumulate(model):
    sum(losses_of(model, 1).values()).backward()


def test_one_pass_is_spared_in_the_plain_case():
    assert fallback(lambda model: None) == 1
    assert fallback(lambda model: None, extra=lambda model: torch.ones((), dtype=torch.float64)) == 1


def test_every_task_is_measured_when_gradients_accumulate():
    assert fallback(accumulate) == 2


def test_every_task_is_measured_when_hooks_edit_gradients():
    assert fallback(lambda model: model.trunk[0].weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))) == 2
    gone = lambda p: setattr(p, "grad", None)  # noqa: E731 - as optimizers that step inside the backward pass do
    assert fallback(lambda model: model.trunk[0].weight.register_post_accumulate_grad_hook(gone)) == 2


def test_every_task_is_measured_when_the_total_has_other_terms():
    assert fallback(lambda model: None, extra=lambda model: 10 * model.trunk[0].weight.square().sum()) == 2


def test_every_task_is_measured_below_float32():
    model = build(torch.bfloat16).eval()
    assert fallback(lambda model: None, model=model) == 2


def test_learned_weights_outside_the_watched_parameters_cost_no_pass():
    model = build(torch.float64).eval()
    log_scale = nn.Parameter(torch.tensor([0.3, -0.5], dtype=torch.float64))
    losses = losses_of(model)
    total = sum(loss / s.exp() + s for loss, s in zip(losses.values(), log_scale, strict=True))
    called, block = both(model, losses, total)
    assert block.passes == 1
    assert block.weights.tolist() == pytest.approx((-log_scale).exp().tolist())
    assert torch.allclose(called.gram, block.gram, rtol=1e-9, atol=1e-12)


# --- loops ----------------------------------------------------------------------------------------------------


def test_accumulation_of_four_micro_batches():
    model = build().eval()
    monitor = ConflictMonitor(model, TASKS, every=1)
    found = []
    for step in range(8):
        losses = losses_of(model, step)
        before = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        report = around(monitor, losses, sum(losses.values()) / 4)
        twin = copy.deepcopy(model)
        for name, parameter in twin.named_parameters():
            parameter.grad = before[name]
        (sum(losses_of(twin, step).values()) / 4).backward()
        assert all(
            torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
        )
        found.append(report.passes)
        if step % 4 == 3:
            model.zero_grad()
    assert found == [1, 2, 2, 2] * 2


@pytest.mark.parametrize("scaled_total", [True, False])
def test_a_scaler_changes_no_cosine(scaled_total):
    model = build(torch.float64).eval()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    losses = losses_of(model)
    total = losses["depth"] + 3 * losses["seg"]
    wanted = ConflictMonitor(model, TASKS)(losses, total)
    monitor = ConflictMonitor(model, TASKS)
    if scaled_total:
        report = around(monitor, losses, scaler.scale(total))
    else:
        report = around(monitor, losses, total, lambda t: scaler.scale(t).backward())
    assert report.passes == 1
    factor = 2.0**16 if scaled_total else 1.0
    assert torch.allclose(report.norms, factor * wanted.norms, rtol=1e-9)
    assert torch.allclose(report.cosine, wanted.cosine, rtol=0, atol=1e-9, equal_nan=True)
    assert torch.allclose(report.share, wanted.share, rtol=1e-9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = values(model)
    scaler.step(optimizer)  # finds nothing wrong with the gradients
    assert not same(values(model), before)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside):
    model = build().eval()
    exact = ConflictMonitor(model, TASKS)(losses_of(model))
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(model)
        if inside:
            report = ConflictMonitor(model, TASKS)(losses)
    if not inside:
        report = around(ConflictMonitor(model, TASKS), losses, sum(losses.values()))
    assert report.gram.dtype == torch.float64
    assert torch.allclose(report.cosine[0], exact.cosine[0], rtol=0, atol=0.03)
    assert torch.allclose(report.norms, exact.norms, rtol=0.03)


@pytest.mark.parametrize("form", ["call", "around"])
def test_a_compiled_model(form):
    model = build().eval()
    model.counted = False
    wanted = ConflictMonitor(model, TASKS)(losses_of(model))
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    monitor = ConflictMonitor(compiled, TASKS)
    losses = losses_of(compiled)
    assert monitor.groups == ("trunk", "heads", "(all)")
    report = monitor(losses) if form == "call" else around(monitor, losses, sum(losses.values()))
    assert torch.allclose(report.gram, wanted.gram, rtol=1e-4, atol=1e-6)
    if form == "call":
        sum(losses.values()).backward()  # the graph is still there


def test_a_compiled_model_that_gave_its_buffers_away_is_refused_and_goes_on():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Softplus(), nn.Linear(8, 2))
    compiled = torch.compile(model, backend="aot_eager")

    def step():
        out = compiled(torch.ones(3, 4))
        return {"depth": out[:, 0].sum(), "seg": out.square().sum()}

    sum(step().values()).backward()  # compiles the backward pass for one use
    losses = step()
    with pytest.raises(RuntimeError, match=r"must let its graph be used twice.*donated_buffer = False"):
        ConflictMonitor(compiled, TASKS)(losses)
    model.zero_grad()
    sum(losses.values()).backward()
    assert model[0].weight.grad.abs().sum() > 0


def test_a_checkpointed_trunk():
    model = build().train()
    x = torch.randn(8, 4)
    monitor = ConflictMonitor(model, TASKS)
    z = checkpoint(model.trunk, x, use_reentrant=False)
    losses = {task: model.heads[task](z).square().mean() for task in TASKS}
    before = torch.get_rng_state()
    around(monitor, losses, sum(losses.values()))
    assert torch.equal(torch.get_rng_state(), before)
    assert monitor.last.finite


def test_grad_mode_off():
    model = build().eval()
    losses = losses_of(model)
    with torch.no_grad():
        report = ConflictMonitor(model, TASKS)(losses)
        assert not torch.is_grad_enabled()
    assert same(report.gram, ConflictMonitor(model, TASKS)(losses).gram)


# --- parameters -----------------------------------------------------------------------------------------------


def test_tied_weights_count_once_with_the_sum_of_both_uses():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False)).double()
    model[2].weight = model[0].weight
    out = model(torch.randn(3, 4, dtype=torch.float64))
    losses = {"depth": out[:, 0].sum(), "seg": out[:, 1:].square().sum()}
    report = ConflictMonitor(model, TASKS)(losses)
    one, other = (
        torch.autograd.grad(loss, model[0].weight, retain_graph=True)[0] for loss in losses.values()
    )
    assert report.groups == ("0",)
    assert report.gram[0, 0, 1].item() == pytest.approx((one * other).sum().item(), rel=1e-12)


def test_frozen_parameters_are_left_out_while_they_are_frozen():
    model = build(torch.float64).eval()
    monitor = ConflictMonitor(model, TASKS, every=1)
    full = monitor(losses_of(model)).norms[0]
    for parameter in model.trunk[0].parameters():
        parameter.requires_grad_(False)
    part = monitor(losses_of(model)).norms[0]
    assert (part < full).all()
    only = ConflictMonitor({"w": model.trunk[4].weight, "b": model.trunk[4].bias, **dict(
        model.trunk[1].named_parameters())}, TASKS, groups=lambda _: "all")  # fmt: skip
    assert torch.allclose(only(losses_of(model)).norms[0], part, rtol=1e-12)
    for parameter in model.trunk[0].parameters():
        parameter.requires_grad_(True)
    assert torch.allclose(monitor(losses_of(model)).norms[0], full, rtol=1e-12)


def test_pairs_of_parameters_and_groups_by_pattern():
    model = build(torch.float64).eval()
    losses = losses_of(model)
    everything = ConflictMonitor(model, TASKS, groups={"first": "trunk.0.*", "rest": "trunk.*"})(losses)
    rest = [(n, p) for n, p in model.trunk.named_parameters() if not n.startswith("0.")]
    alone = ConflictMonitor(rest, TASKS, groups=lambda _: "rest")(losses)
    assert everything.groups == ("first", "rest", "(all)")
    assert alone.groups == ("rest",)
    assert torch.allclose(everything.gram[1], alone.gram[0], rtol=1e-12)


def test_a_copy_watches_the_copied_model():
    model = build().eval()
    monitor = ConflictMonitor(model, TASKS)
    twin, twin_monitor = copy.deepcopy((model, monitor))
    assert twin_monitor(losses_of(twin)).passes == 2
    with pytest.raises(ValueError, match="after copying or wrapping it make a new monitor"):
        copy.deepcopy(monitor)(losses_of(model))
