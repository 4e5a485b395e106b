"""What the aggregator remembers, refuses and leaves out."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import nn

from pullback.core import checkpoint, packing
from pullback.methods import sam_gs

SAMGS: Any = sam_gs.SAMGS  # also with arguments that must be refused


def rows(seed, tasks=3, size=6, dtype=torch.float32):
    return torch.randn(tasks, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def after(steps, **settings):
    aggregator = SAMGS(gamma=0.9, **settings)
    for step in range(steps):
        aggregator(rows(step))
    return aggregator


def state_of(aggregator):
    return {key: value.clone() for key, value in aggregator.state_dict().items()}


def unchanged(aggregator, before):
    now = aggregator.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in now)


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_resumed_run_is_bitwise_the_same(steps, dtype):
    old, new = (SAMGS(gamma=0.9, max_norm=math.inf) for _ in range(2))  # no clip that would hide a difference
    for step in range(steps):
        old(rows(step, dtype=dtype))
    file = io.BytesIO()
    torch.save(old.state_dict(), file)
    file.seek(0)
    new.load_state_dict(torch.load(file, weights_only=True))
    branches = set()
    for step in range(steps, steps + 20):
        assert torch.equal(old(rows(step, dtype=dtype)), new(rows(step, dtype=dtype)))
        assert old.report == new.report
        branches.add(old.report.branch)
    assert branches == {"equalise", "momentum"}


def test_a_spike_before_the_interruption_is_remembered():
    old, new = SAMGS(gamma=0.0), SAMGS(gamma=0.0)
    old(1e30 * rows(0))
    new.load_state_dict(old.state_dict())
    got = new(1e10 * rows(1))
    assert torch.equal(got, old(1e10 * rows(1)))
    assert float(got.norm()) == pytest.approx(1.0, rel=1e-3)


def test_state_survives_the_checkpoints_of_the_core(tmp_path):
    old = after(5)
    checkpoint.save(tmp_path, *packing.pack(dict(old.state_dict())))
    found = checkpoint.load(tmp_path)
    new = SAMGS(gamma=0.9)
    new.load_state_dict(packing.unpack(found.tensors, found.scalars))
    assert torch.equal(old(rows(9)), new(rows(9)))


def test_state_inside_a_module():
    model = nn.ModuleDict({"trunk": nn.Linear(2, 2), "aggregator": after(3)})
    fresh = nn.ModuleDict({"trunk": nn.Linear(2, 2), "aggregator": SAMGS(gamma=0.9)})
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh["aggregator"](rows(7)), model["aggregator"](rows(7)))


def test_casting_the_model_leaves_momentum_alone():
    aggregator, twin = after(3), after(3)
    aggregator.half()
    assert aggregator.momentum.dtype == torch.float32
    assert torch.equal(aggregator(rows(4)), twin(rows(4)))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", torch.tensor(2), "written by a newer pullback"),
        ("format_version", torch.tensor(0), "too old"),
        ("momentum", torch.zeros(3), "momentum must be a tensor as state_dict"),
        ("momentum", torch.zeros(3, 6).half(), "must be float32 or float64, got torch.float16"),
        ("momentum", torch.zeros(0, 0), "must be consistent"),
        ("steps", torch.tensor(-1), "must be consistent"),
        ("dissimilarity", torch.tensor(float("nan")), "must be consistent"),
        ("reach", 1.0, "reach must be a tensor"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(key, value, message):
    aggregator = after(3)
    before = state_of(aggregator)
    with pytest.raises(RuntimeError, match=message):
        aggregator.load_state_dict({**after(5).state_dict(), key: value})
    assert unchanged(aggregator, before)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        aggregator.load_state_dict({**after(5).state_dict(), "other": value})
    assert unchanged(aggregator, before)


def test_a_state_of_another_number_of_tasks_is_refused():
    with pytest.raises(RuntimeError, match="must have 2 rows as num_tasks says, got 3"):
        SAMGS(num_tasks=2).load_state_dict(after(2).state_dict())


def test_reset_forgets_everything():
    aggregator = after(5)
    aggregator.reset()
    assert aggregator.report is None
    fresh = SAMGS(gamma=0.9)
    other = rows(1, tasks=2, size=9, dtype=torch.float64)
    assert torch.equal(aggregator(other), fresh(other))


def test_a_deep_copy_goes_its_own_way():
    aggregator = after(3)
    twin = copy.deepcopy(aggregator)
    first = twin(rows(5))
    assert torch.equal(aggregator(rows(5)), first)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (rows(0, tasks=2), ValueError, r"must have 3 rows, one per task, got 2.*reset\(\)"),
        (rows(0, size=5), ValueError, r"must have 6 columns as at the first call, got 5.*reset\(\)"),
        (rows(0, dtype=torch.float64), ValueError, r"kept in torch.float32, got torch.float64.*reset\(\)"),
        (torch.ones(3, 6, dtype=torch.int64), TypeError, "floating tensor"),
        (torch.ones(3, 6, dtype=torch.complex64), TypeError, "floating tensor"),
        (
            torch.ones(3, 6).to_sparse(),
            TypeError,
            "must be a dense tensor on one device, got Tensor of layout",
        ),
        (torch.ones(0, 6), ValueError, "at least one row and one column"),
        (torch.ones(3, 0), ValueError, "at least one row and one column"),
        (torch.ones(6), ValueError, "dimension 2"),
    ],
)
def test_a_matrix_that_does_not_fit_is_refused_and_changes_nothing(matrix, error, message):
    aggregator = after(2)
    before = state_of(aggregator)
    with pytest.raises(error, match=message):
        aggregator(matrix)
    assert unchanged(aggregator, before)


def test_the_declared_number_of_tasks_holds_from_the_first_call():
    with pytest.raises(ValueError, match="must have 4 rows"):
        SAMGS(num_tasks=4)(rows(0))


def test_one_task_is_returned_with_a_warning():
    aggregator = SAMGS()
    before = state_of(aggregator)
    row = 100 * rows(0, tasks=1)
    with pytest.warns(RuntimeWarning, match="a single row"):
        out = aggregator(row)
    assert torch.equal(out, row[0])
    assert out.data_ptr() != row.data_ptr()
    assert aggregator.report.branch == "single"
    assert unchanged(aggregator, before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_task_that_is_not_finite_is_refused_or_left_out(value, steps):
    bad = rows(9)
    bad[1, 2] = value
    aggregator = after(steps)
    before, report = state_of(aggregator), aggregator.report
    kind = "NaN" if math.isnan(value) else "Inf"
    with pytest.raises(
        ValueError, match=f"SAMGS, step {steps}: the gradient of 'task 1' holds {kind} in 1 of 6"
    ):
        aggregator(bad)
    assert unchanged(aggregator, before)
    assert aggregator.report == report
    skipping = after(steps, nonfinite="skip")
    assert torch.equal(skipping(bad), torch.zeros(6))
    assert skipping.report.branch == "skip"
    assert unchanged(skipping, before)
    assert torch.equal(skipping(rows(4)), aggregator(rows(4)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": -0.1}, "gamma must be >= 0, got -0.1"),
        ({"gamma": math.inf}, "gamma must be >= 0, got inf"),
        ({"beta1": 1.0}, "beta1 must be < 1, got 1.0"),
        ({"beta2": 1.0}, "beta2 must be < 1, got 1.0"),
        ({"beta1": -0.1}, r"beta1 must be in \[0, 1\], got -0.1"),
        ({"eps": 0.0}, "eps must be > 0, got 0.0"),
        ({"max_norm": 0.0}, "max_norm must be > 0, got 0.0.*inf to never clip"),
        ({"num_tasks": 0}, "num_tasks must be >= 1, got 0"),
        ({"variant": "printed"}, "variant must be one of 'official', 'paper', got 'printed'"),
        ({"reduction": "max"}, "reduction must be one of 'mean', 'min', got 'max'"),
        ({"nonfinite": "warn"}, "nonfinite must be one of 'raise', 'skip', got 'warn'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SAMGS(**settings)


def test_no_memory_at_all_is_allowed():
    aggregator = SAMGS(gamma=0.0, beta1=0.0, beta2=0.0, max_norm=math.inf, variant="paper")
    for step in range(3):
        g = rows(step, dtype=torch.float64)
        out = aggregator(g)
    apart = 1.0 - aggregator.report.similarity
    torch.testing.assert_close(out, (g * g.abs()).sum(0) / (apart + 1e-8))
