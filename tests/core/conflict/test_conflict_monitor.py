"""The conflict monitor: its numbers against a literal reference, its cost, and that it leaves no trace."""

from __future__ import annotations

import math

import pytest
import torch
from conflict_models import TASKS, CountBackward, build, gram_of, losses_of, reference
from torch import nn

import pullback
from pullback import ConflictMonitor
from pullback.core.conflict_report import ConflictReport
from pullback.testing import Case, parametrize_with_checks
from pullback.testing.tools import flags, global_rng, gradients, hooks, same, values

GROUPS = ("trunk", "heads")


def total_of(losses, weights):
    return sum(weights[task] * loss for task, loss in losses.items())


def measured(form, model, weights, *, seed=0, tasks=TASKS, **settings):
    """One report by either form, with the random state that the reference has."""
    monitor = ConflictMonitor(model, tasks, **settings)
    torch.manual_seed(seed)
    losses = losses_of(model, seed)
    total = total_of(losses, weights)
    if form == "call":
        return monitor(losses, total)
    with monitor.around(losses, total):
        total.backward()
    return monitor.last


# --- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["call", "around"])
@pytest.mark.parametrize("tasks", [("depth", "seg"), ("a", "b", "c", "d")])
def test_gram_is_that_of_ordinary_backward_passes(form, tasks):
    weights = dict(zip(tasks, (0.3, -2.0, 1.0, 5.0), strict=False))
    model = build(torch.float64, tasks)
    dots = reference(model, 0, weights, GROUPS)
    report = measured(form, model, weights, tasks=tasks)
    assert report.groups == (*GROUPS, "(all)")
    wanted = torch.stack([gram_of(dots[group], tasks) for group in GROUPS])
    assert torch.allclose(report.gram[:2], wanted, rtol=1e-9, atol=1e-12)
    assert torch.allclose(report.gram[2], wanted.sum(0), rtol=1e-9, atol=1e-12)
    assert report.weights.tolist() == pytest.approx(list(weights.values()))
    assert report.passes == len(tasks) - (form == "around")


def test_derived_numbers_in_closed_form():
    # g_a = (3, 4), g_b = (3, -4): norms 5, 5; cosine (9 - 16) / 25; update (6, 0), shares 1/2, 1/2.
    # second group: g_a = (1,), g_b = (-2,): update -1, shares -1 and 2.
    gram = torch.tensor([[[25.0, -7.0], [-7.0, 25.0]], [[1.0, -2.0], [-2.0, 4.0]]])
    report = ConflictReport(0, ("a", "b"), ("x", "y"), gram, torch.ones(2), 2)
    assert report.norms.tolist() == [[5, 5], [1, 2]]
    assert report.cosine[0, 0, 1].item() == pytest.approx(-7 / 25)
    assert report.cosine[1].tolist() == [[1, -1], [-1, 1]]
    assert report.norm_ratio[1].tolist() == [[1, 0.5], [2, 1]]
    assert report.share.tolist() == [[0.5, 0.5], [-1, 2]]
    assert report.winner("y") == report.winner() == "b"
    with pytest.raises(ValueError, match="group must be one of x, y, got 'z'"):
        report.winner("z")


def test_without_a_total_all_weights_are_one_and_cosines_do_not_depend_on_positive_weights():
    model = build(torch.float64).eval()
    losses = losses_of(model)
    plain = ConflictMonitor(model, TASKS)(losses)
    weighted = ConflictMonitor(model, TASKS)(losses, total_of(losses, {"depth": 1e-12, "seg": 1e12}))
    assert plain.weights.tolist() == [1, 1]
    assert torch.allclose(plain.cosine, weighted.cosine, rtol=0, atol=1e-12, equal_nan=True)
    assert (plain.norm_ratio[0] * torch.tensor([[1, 1e-24], [1e24, 1]])).allclose(weighted.norm_ratio[0])


def test_float32_agrees_with_float64():
    weights = {"depth": 1.0, "seg": 0.1}
    exact = measured("call", build(torch.float64).eval(), weights)
    for form in ("call", "around"):
        single = measured(form, build(torch.float32).eval(), weights)
        assert torch.allclose(single.cosine[0], exact.cosine[0], rtol=0, atol=1e-5)
        assert torch.allclose(single.norms, exact.norms, rtol=1e-4)


def test_zero_and_absent_gradients_are_no_conflict():
    model = build(torch.float64)
    report = measured("call", model, {"depth": 1.0, "seg": 0.0})
    assert report.cosine[0, 0, 1].isnan()  # weight 0: a zero gradient
    assert report.norm_ratio[0].isnan().tolist() == [[False, True], [True, True]]
    assert report.winner("trunk") == "depth"
    only = ConflictMonitor(model, TASKS, groups={"head": "heads.depth.*", "trunk": "trunk.*"})
    row = only(losses_of(model)).cosine[0]
    assert row[0, 0].item() == pytest.approx(1.0)
    assert row[0, 1].isnan()  # seg has no gradient in the head of depth
    assert row[1, 1].isnan()
    found = only.summary().row("head", "depth", "seg")
    assert (found.measured, found.conflicts) == (0, 0)
    assert math.isnan(found.rate)
    assert "0/0" in str(only.summary())


# --- cost ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "extra"), [("call", 2), ("around", 1)])
def test_backward_passes_are_counted(form, extra):
    model = build()
    monitor = ConflictMonitor(model, TASKS, every=5)
    counts = []
    for step in range(11):
        CountBackward.calls = 0
        losses = losses_of(model, step)
        total = sum(losses.values())
        if form == "call":
            monitor(losses)
            total.backward()
        else:
            with monitor.around(losses, total):
                total.backward()
        counts.append(CountBackward.calls - 1)  # less the user's own
        model.zero_grad()
    assert counts == [extra, 0, 0, 0, 0, extra, 0, 0, 0, 0, extra]
    assert [report.passes for report in monitor.reports()] == [extra] * 3
    assert [report.step for report in monitor.reports()] == [0, 5, 10]


def test_a_pass_stops_at_the_watched_parameters():
    calls = []
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].register_full_backward_hook(lambda *_: calls.append("first layer"))
    monitor = ConflictMonitor(model[4], TASKS)
    out = model(torch.randn(3, 4))
    monitor({"depth": out[:, 0].sum(), "seg": out.square().sum()})
    assert calls == []


@pytest.mark.parametrize("form", ["call", "around"])
def test_nothing_is_read_by_the_host(form):
    # Tensors on the meta device hold no data: any .item(), bool() or copy to the host raises.
    model = build().to("meta")
    monitor = ConflictMonitor(model, TASKS, every=1)
    for _ in range(2):
        rows = model.heads["depth"](model.trunk(torch.empty(8, 4, device="meta")))
        losses = {"depth": rows.mean(), "seg": rows.square().mean()}
        total = losses["depth"] + losses["seg"]
        if form == "call":
            monitor(losses, total)
        else:
            with monitor.around(losses, total):
                total.backward()
        model.zero_grad()
    assert monitor.last.gram.device.type == "meta"
    assert monitor.last.passes == 2 - (form == "around")
    with pytest.raises((RuntimeError, NotImplementedError)):
        monitor.reports()


# --- no trace -----------------------------------------------------------------------------------------------


def snapshot(model):
    return values(model), flags(model), hooks(model), gradients(model), global_rng()


def test_a_measurement_changes_nothing_and_the_graph_stays_usable():
    model = build()
    next(model.parameters()).grad = torch.ones(6, 4)
    model.trunk[0].bias.requires_grad_(False)
    model.trunk[1].eval()
    losses = losses_of(model)
    before = snapshot(model)
    for _ in range(2):
        ConflictMonitor(model, TASKS)(losses)
        assert same(snapshot(model), before)
    sum(losses.values()).backward()
    assert model.trunk[4].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("form", ["call", "around"])
def test_an_error_on_the_way_changes_nothing_and_counts_nothing(form):
    model = build()
    monitor = ConflictMonitor(model, TASKS, every=1)
    measured_once = losses_of(model)
    monitor(measured_once)
    losses = losses_of(model)
    total = sum(losses.values())
    before = snapshot(model), monitor.step, len(monitor.reports())
    CountBackward.error = ArithmeticError("planned")
    enter = monitor.around(losses, total).__enter__ if form == "around" else lambda: monitor(losses)
    try:
        with pytest.raises(ArithmeticError, match="planned"):
            enter()
    finally:
        CountBackward.error = None
    assert same((snapshot(model), monitor.step, len(monitor.reports())), before)
    assert not total._backward_hooks


def test_an_error_in_the_users_backward_pass_goes_through_and_counts_nothing():
    model = build()
    monitor = ConflictMonitor(model, TASKS)
    losses = losses_of(model)
    total = sum(losses.values())
    with pytest.raises(KeyError), monitor.around(losses, total):
        raise KeyError("the user's")
    assert not total._backward_hooks
    assert (monitor.step, monitor.last) == (0, None)
    with monitor.around(losses, total):
        total.backward()
    assert monitor.step == 1


@pytest.mark.parametrize("form", ["call", "around"])
def test_training_is_bitwise_the_same_with_and_without(form):
    def trained(watched):
        model = build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
        monitor = ConflictMonitor(model, TASKS, every=3)
        for step in range(12):
            losses = losses_of(model, step)
            total = losses["depth"] + 0.5 * losses["seg"]
            if not watched:
                total.backward()
            elif form == "call":
                monitor(losses)
                total.backward()
            else:
                with monitor.around(losses, total):
                    total.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return values(model), global_rng(), len(monitor.reports())

    plain, watched = trained(False), trained(True)
    assert same(plain[:2], watched[:2])
    assert watched[2] == 4


def make():
    return ConflictMonitor(build(), TASKS, every=2, history=3)


def drive(component, model, batch):
    """The component's settings and state on the contract's model."""
    monitor = ConflictMonitor(model, component.tasks, every=component.every, history=3)
    if component.groups == monitor.groups:
        monitor.load_state_dict(component.state_dict())
    with torch.enable_grad():
        out = model(*batch)
        report = monitor({"depth": out.square().mean(), "seg": out.sin().mean()})
    if component.groups == monitor.groups:
        component.load_state_dict(monitor.state_dict())
    return report


@parametrize_with_checks([
    Case(
        name="ConflictMonitor",
        kind="probe",
        build=lambda: ConflictMonitor({n: nn.Parameter(torch.zeros(2)) for n in ("0.w", "2.w")}, TASKS, every=2),
        run=drive,
        bad=(
            lambda: ConflictMonitor(nn.Linear(1, 1), ("a",)),
            lambda: ConflictMonitor(nn.Linear(1, 1), TASKS, every=0),
            lambda: ConflictMonitor(nn.Linear(1, 1), TASKS, nonfinite="ignore"),
            lambda: ConflictMonitor(nn.Tanh(), TASKS),
        ),
    )
])  # fmt: skip
def test_it_passes_the_contract_of_probes(case, check):
    check(case)


def test_it_is_a_public_name():
    assert pullback.ConflictMonitor is ConflictMonitor
    assert repr(make()) == (
        "ConflictMonitor(tasks=('depth', 'seg'), groups=('trunk', 'heads', '(all)'), every=2, step=0, measurements=0)"
    )
