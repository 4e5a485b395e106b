"""What the conflict monitor refuses, what it does about NaN, its bounded history, table and state."""

from __future__ import annotations

import math
import re

import pytest
import torch
from conflict_models import TASKS, build, losses_of
from torch import nn

from pullback import ConflictMonitor, NonFiniteError
from pullback.core.conflict_report import ConflictReport, summarise
from pullback.core.state import StateError
from pullback.testing.tools import same


@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        (("depth",), ValueError, "tasks must be at least two different names, got ('depth',)"),
        (("depth", "depth"), ValueError, "at least two different names, got ('depth', 'depth')"),
        ("ab", TypeError, "tasks must be a sequence of names, got 'ab'"),
        ((1, 2), TypeError, "tasks must be a sequence of names, got (1, 2)"),
        (2, TypeError, "tasks must be a sequence of names, got 2"),
    ],
)
def test_bad_tasks(tasks, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ConflictMonitor(build(), tasks)


class Sharded(nn.Parameter):
    """As a DTensor shows itself."""

    placements = ("Shard(0)",)


def test_bad_settings():
    model = build()
    with pytest.raises(ValueError, match="every must be >= 1, got 0"):
        ConflictMonitor(model, TASKS, every=0)
    with pytest.raises(ValueError, match="history must be >= 1, got 0"):
        ConflictMonitor(model, TASKS, history=0)
    with pytest.raises(ValueError, match="nonfinite must be one of 'raise', 'skip', 'warn', got 'ignore'"):
        ConflictMonitor(model, TASKS, nonfinite="ignore")
    with pytest.raises(ValueError, match=r"groups must not use the name '\(all\)'"):
        ConflictMonitor(model, TASKS, groups=lambda _: "(all)")
    with pytest.raises(TypeError, match="params must hold plain tensors, got the sharded w"):
        ConflictMonitor({"w": Sharded(torch.ones(2))}, TASKS)


def test_bad_losses():
    model = build()
    losses = losses_of(model)
    monitor = ConflictMonitor(model, TASKS)
    for bad, error, message in (
        (list(losses.values()), TypeError, "losses must be a mapping from task to scalar tensor, got ["),
        ({"depth": losses["depth"]}, ValueError, "got missing ['seg'] and unknown []"),
        ({**losses, "sge": losses["seg"]}, ValueError, "got missing [] and unknown ['sge']"),
        ({**losses, "seg": 1.0}, TypeError, "losses['seg'] must be a floating tensor, got 1.0"),
        ({**losses, "seg": losses["seg"].expand(3)}, ValueError, "Reduce it with .mean()."),
        (
            {**losses, "seg": losses["seg"].detach()},
            ValueError,
            "losses['seg'] must have a graph, got a tensor",
        ),
    ):
        with pytest.raises(error, match=re.escape(message)):
            monitor(bad)
        with pytest.raises(error, match=re.escape(message)):
            monitor.around(bad, sum(losses.values())).__enter__()
    assert (monitor.step, monitor.last) == (0, None)


def test_bad_totals():
    model = build()
    losses = losses_of(model)
    monitor = ConflictMonitor(model, TASKS)
    with pytest.raises(ValueError, match=r"losses\['seg'\] must be a part of total"):
        monitor(losses, 2 * losses["depth"])
    with pytest.raises(ValueError, match="losses must be different tensors, got the same one twice"):
        monitor(dict.fromkeys(TASKS, losses["seg"]), 2 * losses["seg"])
    with pytest.raises(ValueError, match="total must have a graph"):
        monitor(losses, torch.ones(()))
    with pytest.raises(TypeError, match="total must be a floating tensor, got 3"):
        monitor(losses, 3)


@pytest.mark.parametrize("form", ["call", "around"])
def test_losses_without_a_shared_parameter(form):
    model = build()
    losses = losses_of(model)
    apart = nn.Linear(2, 1)
    losses["seg"] = apart(torch.ones(2)).sum()
    total = sum(losses.values())
    monitor = ConflictMonitor(nn.ModuleList([model, apart]), TASKS)
    enter = monitor.around(losses, total).__enter__ if form == "around" else lambda: monitor(losses)
    with pytest.raises(ValueError, match=r"losses must share a watched parameter, got .* make a new monitor"):
        enter()
    with pytest.raises(ValueError, match="losses must share a watched parameter"):
        ConflictMonitor(nn.Linear(1, 1), TASKS)(losses)  # another model altogether
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"params must hold a parameter that requires a gradient, got .* frozen"
    ):
        ConflictMonitor(model, TASKS)({t: apart(torch.ones(2)).sum() for t in TASKS})


def test_blocks_that_hold_something_else():
    model = build()
    monitor = ConflictMonitor(model, TASKS, every=1)

    def run(body):
        losses = losses_of(model)
        total = sum(losses.values())
        with monitor.around(losses, total):
            body(total)

    def twice(total):
        total.backward(retain_graph=True)
        total.backward()

    def cleared(total):
        total.backward()
        model.zero_grad()

    for body, message in (
        (lambda total: None, "must hold one backward pass of total, got 0"),
        (twice, "must hold one backward pass of total, got 2"),
        (cleared, "must hold the backward pass alone, got no .grad of trunk.0.weight"),
    ):
        model.zero_grad()
        with pytest.raises(RuntimeError, match=re.escape(message)):
            run(body)
    assert (monitor.step, monitor.last) == (0, None)


# --- NaN ------------------------------------------------------------------------------------------------------


def with_nan(policy, form="call"):
    model = build().eval()
    monitor = ConflictMonitor(model, TASKS, every=1, nonfinite=policy)
    for step in range(3):
        losses = losses_of(model, step)
        if step == 1:
            losses["seg"] = losses["seg"] * math.nan
        total = sum(losses.values())
        if form == "call":
            monitor(losses)
        else:
            with monitor.around(losses, total):
                total.backward()
            model.zero_grad()
    return monitor


@pytest.mark.parametrize("form", ["call", "around"])
def test_a_gradient_that_is_not_finite(form):
    loud = with_nan("raise", form)
    assert loud.last.finite
    for read in (loud.reports, loud.summary):
        with pytest.raises(
            NonFiniteError, match="step 1: the gradient of task 'seg' in group 'trunk' holds NaN"
        ):
            read()
    quiet = with_nan("skip", form)
    assert [report.step for report in quiet.reports()] == [0, 2]
    summary = quiet.summary()
    assert (summary.measurements, summary.skipped) == (2, 1)
    assert "2 measurements, steps 0 to 2, 1 skipped" in str(summary)
    warned = with_nan("warn", form)
    with pytest.warns(RuntimeWarning, match="step 1: the gradient of task 'seg'"):
        summary = warned.summary()
    assert summary.measurements == 3
    assert summary.row("trunk", "depth", "seg").measured == 2
    with pytest.warns(RuntimeWarning):
        middle = warned.reports()[1]
    assert not middle.finite
    assert middle.winner() is None
    assert middle.norms[0, 0].isfinite()  # the other task is not drawn into it


# --- history, table -------------------------------------------------------------------------------------------


def report(step, cosine, norms=(1.0, 1.0)):
    a, b = norms
    gram = torch.tensor([[[a * a, cosine * a * b], [cosine * a * b, b * b]]], dtype=torch.float64)
    return ConflictReport(step, ("depth", "seg"), ("trunk",), gram, torch.ones(2), 2)


def test_the_table_in_closed_form():
    rows = [
        report(0, 0.5, (2, 1)),
        report(20, -0.25, (4, 1)),
        report(40, -0.75, (1, 8)),
        report(60, 0.0, (0, 1)),
    ]
    rows += [report(80, 0.0)]  # at right angles: no conflict, nobody wins
    summary = summarise(rows)
    row = summary.row("trunk", "depth", "seg")
    assert (row.measured, row.conflicts, row.rate) == (4, 2, 0.5)
    assert row.cosine == pytest.approx(-0.125)
    assert row.lowest == pytest.approx(-0.75)
    assert row.norm_ratio == pytest.approx(1.5)
    assert row.wins == (2, 1)
    lines = str(summary).splitlines()
    assert lines[0].split() == ["group", "tasks", "conflicts", "cosine", "lowest", "norm", "ratio", "wins"]
    assert re.split(r"  +", lines[1]) == ["trunk", "depth/seg", "2/4 (50 %)", "-0.12", "-0.75", "1.5", "2:1"]
    assert lines[2] == "5 measurements, steps 0 to 80"
    assert str(rows[1]).splitlines()[1].split()[2:4] == ["1/1", "(100"]
    with pytest.raises(KeyError, match="no row of group 'trunk' and tasks 'seg', 'depth'"):
        summary.row("trunk", "seg", "depth")


def test_an_empty_table_and_reports_of_different_monitors():
    monitor = ConflictMonitor(build(), TASKS)
    assert str(monitor.summary()).endswith("0 measurements")
    other = ConflictReport(0, ("a", "b"), ("trunk",), torch.ones(1, 2, 2), torch.ones(2), 2)
    with pytest.raises(ValueError, match="reports must be of the same tasks and groups"):
        summarise([report(0, 0.5), other])


def test_the_history_is_bounded_and_keeps_the_newest():
    model = build().eval()
    monitor = ConflictMonitor(model, TASKS, every=2, history=3)
    for step in range(11):
        returned = monitor(losses_of(model, step))
        assert returned.step == step - step % 2
    assert [each.step for each in monitor.reports()] == [6, 8, 10]


# --- state ----------------------------------------------------------------------------------------------------


def run(monitor, model, steps):
    for step in steps:
        losses = losses_of(model, step)
        total = sum(losses.values())
        with monitor.around(losses, total):
            total.backward()
        model.zero_grad()


def test_resume_is_exact():
    model = build().eval()
    whole, first, second = (ConflictMonitor(model, TASKS, every=3, history=4) for _ in range(3))
    run(whole, model, range(14))
    run(first, model, range(7))
    second.load_state_dict(first.state_dict())
    assert second.step == 7
    run(second, model, range(7, 14))
    assert same(second.state_dict(), whole.state_dict())
    assert str(second.summary()) == str(whole.summary())
    saved = whole.state_dict()
    used = ConflictMonitor(model, TASKS, every=1)
    run(used, model, range(2))
    used.load_state_dict(saved)  # replaces what it had
    saved["gram"].zero_()
    assert same(used.state_dict(), whole.state_dict())
    fresh = ConflictMonitor(model, TASKS)
    fresh.load_state_dict(ConflictMonitor(model, TASKS).state_dict())
    assert (fresh.step, fresh.last) == (0, None)
    short = ConflictMonitor(model, TASKS, history=2)
    short.load_state_dict(whole.state_dict())
    assert [each.step for each in short.reports()] == [9, 12]


def test_a_state_with_nan_can_be_saved_and_loaded():
    monitor = with_nan("raise")
    fresh = ConflictMonitor(build(), TASKS, nonfinite="skip")
    fresh.load_state_dict(monitor.state_dict())
    assert len(fresh.reports()) == 2


def test_a_foreign_state_is_refused_whole():
    model = build().eval()
    monitor = ConflictMonitor(model, TASKS, every=1)
    run(monitor, model, range(2))
    good = monitor.state_dict()
    for bad, message in (
        ({**good, "format_version": 2}, "format_version must be <= 1, got 2"),
        ({**good, "tasks": ["depth", "sem"]}, "tasks must be ['depth', 'seg'], got ['depth', 'sem']"),
        ({**good, "groups": ["trunk", "head", "(all)"]}, "groups must be ['trunk', 'heads', '(all)']"),
        ({**good, "steps": [0]}, "passes must be a list of 1 items"),
        ({**good, "gram": good["gram"][:1]}, "gram must have shape (2, 3, 2, 2)"),
        (
            {**good, "weights": good["weights"].float()},
            "weights must have shape (2, 2) and dtype torch.float64",
        ),
        ({k: v for k, v in good.items() if k != "passes"}, "got missing ['passes']"),
        (None, "state must be a mapping, got None"),
    ):
        with pytest.raises(StateError, match=re.escape(message)):
            monitor.load_state_dict(bad)
        assert same(monitor.state_dict(), good)
