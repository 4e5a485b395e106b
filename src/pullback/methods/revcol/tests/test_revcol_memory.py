"""Bytes by columns: slopes as counted by hand, the report, and the whole step's peak."""

from __future__ import annotations

import copy

import pytest
import torch

from pullback.core.peak_bytes import PeakBytes
from pullback.core.saved_bytes import saved_bytes
from pullback.methods.revcol import RevCol, memory_report
from pullback.methods.revcol.tests.nets import images, net

COUNTS = (1, 2, 4, 8, 16)


def kept(columns, **how):
    model, x = net(columns, **how), images(4)
    return saved_bytes(lambda: model(x), model, x)


def pyramid(n=4, side=32):
    """Bytes of one column's features in float64."""
    return sum(8 * n * c * (side // s) ** 2 for c, s in zip((3, 4, 5, 6), (4, 8, 16, 32), strict=True))


def inner_bytes(first: bool):
    """What plain autograd keeps inside a column, by hand: per level and position, in units of a channel."""
    channels, blocks, n, side = (3, 4, 5, 6), (1, 1, 2, 1), 4, 32
    total = 0
    for level, (c, b) in enumerate(zip(channels, blocks, strict=True)):
        places = n * (side // (4 * 2**level)) ** 2
        # A block keeps: its input for the depthwise kernel, that one's output for the norm, the norm's output for the
        # expansion, 4c in front of and 4c behind GELU, c behind the contraction for the layer scale, and the norm's
        # mean and deviation.
        total += places * b * (3 * c + 8 * c + c) * 8 + places * b * 2 * 8
        if (
            level
        ):  # the convolution's output for the norm, and its statistics; the convolution's input is a feature
            total += places * (c + 2) * 8
        if level < 3 and not first:  # the same a level higher, at a quarter of the places
            total += places // 4 * (c + 2) * 8
        # The features of the column before, for the gradient of the factor; from above the same tensor is read.
        if not first:
            total += places * c * 8
    return total


def test_plain_autograd_keeps_what_is_inside_the_columns():
    plain = [kept(n, recompute="none") for n in COUNTS]
    assert plain[1] - plain[0] == inner_bytes(first=False)
    assert plain[4] - plain[3] == 8 * inner_bytes(first=False)


@pytest.mark.parametrize("every", [1, 2, 4])
def test_an_anchor_costs_the_features_of_one_column(every):
    found = [kept(n, anchor_every=every) for n in COUNTS]
    base = found[0]
    assert [f - base for f in found] == [pyramid() * ((n - 1) // every) for n in COUNTS]


def test_without_anchors_memory_does_not_grow_at_all():
    assert len({kept(n, anchor_every=0) for n in COUNTS}) == 1


def test_checkpointed_columns_grow_by_their_features():
    found = [kept(n, recompute="checkpoint") for n in COUNTS]
    assert found[4] - found[3] == 8 * pyramid()


def test_the_report_counts_and_leaves_no_trace():
    model, x = net(8, drop_path=0.2, anchor_every=8), images(4)
    before, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    report = memory_report(model, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.recompute == "reversible"
    assert all(p.grad is None for p in model.parameters())
    assert (report.columns, report.pyramid) == (8, pyramid())
    assert report.plain > 3 * report.checkpoint
    states = (
        report.reversible - 24 * before.nbytes
    )  # level 0 drops nothing; a checkpoint keeps its own where nobody counts
    assert 0 < states < report.checkpoint
    assert report.reversible == saved_bytes(lambda: model(x), model, x)
    assert "8 columns" in str(report)
    assert "of plain" in str(report)
    assert report == memory_report(model, x)


def test_the_report_refuses_what_it_cannot_count():
    with pytest.raises(TypeError, match=r"net must be of type RevCol, got Linear"):
        memory_report(torch.nn.Linear(2, 2), images())  # ty: ignore[invalid-argument-type]
    with pytest.raises(ValueError, match=r"net must have parameters that require a gradient"):
        memory_report(net(2).requires_grad_(False), images())


def peak(columns, **how):
    torch.manual_seed(0)
    model, x = RevCol(columns, (8, 16), (1, 1), 3, layer_scale=0.5, **how), torch.randn(8, 3, 32, 32)
    params = list(model.parameters())
    with PeakBytes(x, *params) as meter:
        torch.autograd.grad(model(x).square().sum(), params)
    return meter.most - sum(p.nbytes for p in params)


def test_the_peak_of_a_whole_step_grows_by_less_than_a_column():
    features = 4 * 8 * (8 * 64 + 16 * 16)
    assert peak(8, anchor_every=0) - peak(4, anchor_every=0) < features
    assert peak(8, recompute="none") - peak(4, recompute="none") > 20 * features
