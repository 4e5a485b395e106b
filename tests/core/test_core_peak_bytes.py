"""The meter of living bytes, against sums by hand."""

import doctest

import torch

import pullback.core.peak_bytes as module
from pullback.core.peak_bytes import PeakBytes


def test_example_runs():
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_what_dies_no_longer_counts():
    x = torch.ones(1000)
    with PeakBytes(x) as meter:
        for _ in range(5):
            y = x + 1
            del y
    assert meter.most == 4000


def test_views_share_a_storage_and_given_tensors_do_not_count():
    x, there = torch.ones(1000), torch.ones(500)
    with PeakBytes(x, there) as meter:
        z = x.view(10, 100)[:5].t()
        there.add_(1)
        y = z.contiguous()
    assert meter.most == 2000
    assert y.shape == (100, 5)


def test_tuples_and_the_backward_pass_are_seen():
    w = torch.ones(100, 100, requires_grad=True)
    with PeakBytes(w) as meter:
        values, _ = (w * 2).max(0)
        values.sum().backward()
    # w * 2, its gradient before and after the product with 2 (40 kB each), and what max leaves
    assert 80_000 <= meter.most <= 130_000
