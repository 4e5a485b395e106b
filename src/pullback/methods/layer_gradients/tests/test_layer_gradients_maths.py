"""Statistics, curves and their differences against closed forms and the literal reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pullback.core.spectra import product_values, singular_values
from pullback.methods.layer_gradients import (
    GradientSpectrum,
    Record,
    layer_curve,
    mean_absolute_difference,
    relative_difference,
    spectrum_statistics,
)
from pullback.methods.layer_gradients.tests import cases as models
from pullback.methods.layer_gradients.tests import reference

_mad: Any = mean_absolute_difference  # with arguments of wrong types
NAMES = ("nuclear", "sigma1_ratio", "effective_rank", "frobenius", "sigma_max", "sigma_min")


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def statistics(matrix):
    return {
        name: float(each) for name, each in spectrum_statistics(singular_values([matrix[None]])[0][0]).items()
    }


# --- oracles 1 to 4: single matrices --------------------------------------------------------------------------------


def test_diagonal_matrix():
    found = statistics(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]], dtype=torch.float64))
    p = 3 / 7, 4 / 7
    assert found["nuclear"] == pytest.approx(7)
    assert found["sigma1_ratio"] == pytest.approx(4 / 7)
    assert found["frobenius"] == pytest.approx(5)
    assert found["effective_rank"] == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    assert (found["sigma_max"], found["sigma_min"]) == (pytest.approx(4), pytest.approx(3))


@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (7, 3), (1, 4)])
def test_statistics_equal_the_reference(shape):
    matrix = drawn(*shape, dtype=torch.float64)
    assert statistics(matrix) == pytest.approx(reference.statistics(matrix), rel=1e-10)


def test_zero_matrix_is_all_zero_and_nan_is_nan():
    zero = statistics(torch.zeros(3, 4))
    assert set(zero.values()) == {0.0}
    values = singular_values([torch.tensor([[[1.0, math.inf]], [[1.0, 2.0]]])])[0]
    assert values[0].isnan().all()
    assert float(values[1, 0]) == pytest.approx(math.sqrt(5))
    assert all(math.isnan(float(each)) for each in spectrum_statistics(values[0], full=2).values())


@given(seed=st.integers(0, 1000), scale=st.floats(1e-20, 1e20))
def test_rotations_change_nothing_and_scale_only_sizes(seed, scale):
    matrix = drawn(4, 6, seed=seed, dtype=torch.float64)
    u, v = (torch.linalg.qr(drawn(n, n, seed=seed + 1, dtype=torch.float64)).Q for n in (4, 6))
    before = statistics(matrix)
    assert statistics(u @ matrix @ v) == pytest.approx(before, rel=1e-9)
    scaled = statistics(-scale * matrix)
    for name in NAMES:
        factor = 1.0 if name in {"sigma1_ratio", "effective_rank"} else scale
        assert scaled[name] == pytest.approx(factor * before[name], rel=1e-9)


@given(seed=st.integers(0, 1000), rank=st.integers(1, 4))
def test_norms_are_ordered(seed, rank):
    matrix = drawn(5, rank, seed=seed, dtype=torch.float64) @ drawn(
        rank, 6, seed=seed + 1, dtype=torch.float64
    )
    s = statistics(matrix)
    slack = 1 + 1e-12
    assert s["sigma_max"] <= s["frobenius"] * slack
    assert s["frobenius"] <= s["nuclear"] * slack
    assert s["nuclear"] <= math.sqrt(rank) * s["frobenius"] * slack
    assert s["effective_rank"] * slack >= 1
    assert s["effective_rank"] <= rank * (1 + 1e-6)


# --- oracle 5: values of products that are not formed ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "n", "m", "ill"),
    [
        (1, 8, 8, 0),
        (5, 40, 24, 0),
        (30, 64, 48, 0),
        (30, 64, 48, 4),
        (48, 48, 48, 0),
        (60, 24, 40, 0),
        (60, 24, 40, 3),
    ],
)
def test_core_equals_the_dense_values(tokens, n, m, ill):
    inputs, errors = drawn(3, tokens, n, seed=1), drawn(3, tokens, m, seed=2)
    spread = torch.logspace(0, -ill, tokens)[:, None]
    inputs = inputs * spread + 5 * (ill > 0)  # a large common part, and errors of very unequal size
    errors = errors * spread
    truth = torch.linalg.svdvals(errors.double().mT @ inputs.double())
    for route in ("auto", "low_rank", "dense"):
        (found,) = product_values([(inputs, errors)], route=route)
        assert found.shape[1] <= min(n, m)
        full = nn.functional.pad(found.double(), (0, min(n, m) - found.shape[1]))
        assert (full.sum(1) / truth.sum(1)).tolist() == pytest.approx([1.0] * 3, rel=1e-5)
        assert (full - truth).abs().amax() <= 1e-5 * truth.amax()


def test_rows_without_errors_are_left_out_sample_by_sample():
    inputs, errors = drawn(3, 40, 50, seed=1), drawn(3, 40, 50, seed=2)
    errors[0, 5:] = 0
    errors[1, :33] = 0
    errors[2] = 0
    inputs[0, 20] = math.nan  # meets no error
    (found,) = product_values([(inputs, errors)], route="low_rank")
    assert found.shape[1] == 8  # seven rows, rounded up
    for sample in (0, 1):
        used = errors[sample].any(1)
        truth = torch.linalg.svdvals(errors[sample, used].double().T @ inputs[sample, used].double())
        assert float(found[sample].double().sum()) == pytest.approx(float(truth.sum()), rel=1e-5)
    assert not found[2].any()


def test_shared_inputs_with_unequal_rows_are_not_confused():
    inputs = drawn(1, 40, 64, seed=1)
    first, second = drawn(1, 40, 64, seed=2), drawn(1, 40, 64, seed=3)
    first[:, :30] = 0
    second[:, 20:] = 0
    found = product_values([(inputs, first), (inputs, second), (inputs, 2 * first)])
    for values, errors in zip(found, (first, second, 2 * first), strict=True):
        truth = torch.linalg.svdvals(errors.double().mT @ inputs.double())
        assert float(values.double().sum()) == pytest.approx(float(truth.sum()), rel=1e-5)


def test_a_product_that_is_not_finite_is_nan_alone():
    inputs, errors = drawn(2, 4, 16), drawn(2, 4, 16, seed=1)
    errors[1, 2, 3] = math.nan
    for route in ("low_rank", "dense"):
        (found,) = product_values([(inputs, errors)], route=route)
        assert found[1].isnan().all()
        assert found[0].isfinite().all()


# --- oracles 2 and 9: rank one and softmax regression ---------------------------------------------------------------


def regression(x, label, **settings):
    model = models.seeded(lambda: nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(7, 5)])})).double()
    layer = model["layers"][0]
    spec = GradientSpectrum(
        model, models.LINEAR, reduction="batch", stats=(*NAMES, "nuclear_per_loss"), **settings
    )
    with spec.sample("x") as sample:
        scores = layer(x)
        sample.backward(nn.functional.cross_entropy(scores, label))
    return layer, scores.detach(), sample.records[0]


@pytest.mark.parametrize("route", ["auto", "dense", "low_rank"])
def test_softmax_regression_in_closed_form(route):
    x, label = drawn(1, 7, dtype=torch.float64), torch.tensor([3])
    _, scores, record = regression(x, label, route=route)
    delta = scores.softmax(1) - nn.functional.one_hot(label, 5)
    found = {name: row["weight"][0] for name, row in record.values.items()}
    norm = float(delta.norm() * x.norm())
    loss = float(nn.functional.cross_entropy(scores, label))
    assert record.loss == pytest.approx(loss, rel=1e-12)
    assert found["nuclear_per_loss"] == pytest.approx(norm / loss, rel=1e-9)
    for name in ("nuclear", "frobenius", "sigma_max"):
        assert found[name] == pytest.approx(norm, rel=1e-9)
    assert found["sigma1_ratio"] == pytest.approx(1, rel=1e-9)
    assert found["effective_rank"] == pytest.approx(1, rel=1e-9)
    assert abs(found["sigma_min"]) < 1e-12
    if route != "dense":
        assert found["sigma_min"] == 0.0


# --- oracle 8: curves -----------------------------------------------------------------------------------------------


def test_unevenness_of_simple_curves():
    assert mean_absolute_difference([2.0] * 6).whole == 0
    zigzag = mean_absolute_difference([0.0, 1.0] * 6)
    assert (zigzag.whole, zigzag.early, zigzag.middle, zigzag.late) == (1, 1, 1, 1)
    assert zigzag.over_mean == pytest.approx(2)
    assert float(zigzag) == 1
    short = mean_absolute_difference([1.0, 4.0])
    assert short.whole == 3
    assert math.isnan(short.early)
    assert short.over_mean == pytest.approx(3 / 2.5)
    assert mean_absolute_difference([0.0, 0.0]).over_mean == 0


def test_unevenness_equals_the_reference_on_all_parts():
    curve = drawn(32, dtype=torch.float64).abs()
    rows = curve.tolist()
    thirds = mean_absolute_difference(curve)
    official = mean_absolute_difference(curve, bounds="official")
    assert thirds.whole == pytest.approx(reference.mad(rows))
    assert (thirds.early, thirds.middle, thirds.late) == tuple(
        pytest.approx(reference.mad(part)) for part in (rows[:11], rows[11:21], rows[21:])
    )
    assert (official.early, official.middle, official.late) == tuple(
        pytest.approx(reference.mad(part)) for part in (rows[:10], rows[10:20], rows[20:])
    )
    assert mean_absolute_difference(curve, bounds=(10, 20)) == official
    assert thirds.over_mean == pytest.approx(reference.mad(rows) / (sum(rows) / 32))


def test_relative_difference():
    a = drawn(9, dtype=torch.float64)
    same = relative_difference(a, a)
    assert same.mean == 0
    assert not same.per_layer.any()
    assert relative_difference(a, 2 * a).mean == pytest.approx(1)
    assert relative_difference(2 * a, a).mean == pytest.approx(0.5)  # not symmetric
    b = drawn(9, seed=1, dtype=torch.float64)
    a[4] = 0.0
    mean, rows, order = reference.relative(a.tolist(), b.tolist())
    found = relative_difference(a, b)
    assert float(found) == pytest.approx(mean)
    assert found.per_layer.tolist() == pytest.approx(rows)
    assert [layer for layer, _ in found.largest] == order
    assert found.largest[0] == (4, pytest.approx(abs(float(b[4])) * 1e10))


def records(rows, tag="t", reduction="per_sample", loss=math.nan):
    return [
        Record(tag, "", reduction, loss, {"nuclear": {"q": tuple(row), "k": (1.0, 2.0)}}, 0) for row in rows
    ]


def test_curve_is_the_mean_over_examples_without_those_that_hold_nan():
    rows = [[1.0, 2.0, 3.0], [2.0, math.nan, 1.0], [4.0, 4.0, 4.0], [0.0, 1.0, 8.0]]
    found = layer_curve(records(rows), "nuclear", tag="t")
    mean, error, dropped = reference.curve(rows)
    assert found["q"].tolist() == pytest.approx(mean)
    assert found.sem["q"].tolist() == pytest.approx(error)
    assert (found.dropped, found.count) == ({"q": dropped, "k": 0}, {"q": 3, "k": 4})
    assert (list(found), len(found), found.layers["q"]) == (["q", "k"], 2, (0, 1, 2))
    assert "3 examples" in repr(found)
    one = layer_curve(records(rows[:1]))
    assert one.sem["q"].isnan().all()
    assert one["q"].tolist() == rows[0]
    none = layer_curve(records(rows[1:2]))
    assert none["q"].isnan().all()
    assert none.count["q"] == 0


def test_curves_refuse_what_they_cannot_average():
    rows = records([[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match=r"tag must be that of some records, got 'x'. There are 't'"):
        layer_curve(rows, tag="x")
    with pytest.raises(ValueError, match="none at all"):
        layer_curve([])
    with pytest.raises(ValueError, match="all of single examples or all of batches"):
        layer_curve([*rows, *records([[1.0, 2.0, 3.0]], reduction="batch")])
    with pytest.raises(ValueError, match=r"statistic must be one of 'nuclear', got 'frobenius'"):
        layer_curve(rows, "frobenius")
    with pytest.raises(ValueError, match="of one model"):
        layer_curve([*rows, *records([[1.0, 2.0]])])
    with pytest.raises(TypeError, match="records must be of type Record"):
        layer_curve([rows[0].to_dict()])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_absolute_difference([1.0]), "at least 2 layers, got 1"),
        (lambda: mean_absolute_difference(torch.zeros(2, 2)), "one dimension"),
        (lambda: _mad("ab"), "one number per layer"),
        (lambda: mean_absolute_difference([1.0, 2.0], bounds="official"), "26, 28, 32, 42 layers, got 2"),
        (lambda: _mad([1.0, 2.0], bounds="halves"), "bounds must be one of"),
        (lambda: mean_absolute_difference([1.0, 2.0], bounds=(2, 1)), r"0 <= low <= high <= 2, got \(2, 1\)"),
        (lambda: _mad([1.0, 2.0], bounds=3), "two numbers"),
        (lambda: relative_difference([1.0], [1.0, 2.0]), "the layers of reference, got 2 against 1"),
        (lambda: relative_difference([], []), "got 0 against 0"),
    ],
    ids=["one", "matrix", "text", "official", "halves", "order", "number", "lengths", "empty"],
)
def test_bad_curves_are_refused(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_records_travel_as_plain_dicts():
    record = Record("t", "k", "batch", math.nan, {"nuclear": {"q": (1.5, math.nan, math.inf)}}, 2)
    there = record.to_dict()
    assert there["values"] == {"nuclear": {"q": [1.5, None, "inf"]}}
    back = Record.from_dict(there)
    assert back.values["nuclear"]["q"][::2] == (1.5, math.inf)
    assert math.isnan(back.values["nuclear"]["q"][1])
    assert (back.tag, back.key, back.reduction, back.nonfinite) == ("t", "k", "batch", 2)
    for broken in ({}, {**there, "values": 3}, {**there, "reduction": "x"}, {**there, "nonfinite": -1}):
        with pytest.raises(ValueError, match=r"must be|must come"):
            Record.from_dict(broken)
