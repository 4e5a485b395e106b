"""Flat rows of parameters, robust inner products of long vectors, and vectors kept in their span."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pullback.core.flat import FlatLayout
from pullback.core.ranks import Ranks
from pullback.core.span import Span, inner_products, normalised, product
from pullback.core.state import StateError
from pullback.core.stepping import inside_line_search

# --- layout --------------------------------------------------------------------------------------------------------


def test_views_share_memory_and_follow_each_other():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    layout = FlatLayout(net)
    (group,) = layout.groups
    rows = group.rows(2)
    views = group.views(rows[1])
    for k, view in enumerate(views):
        view.fill_(k + 1)
    assert rows.tolist() == [[0.0] * 11, [1.0] * 6 + [2.0] * 2 + [3.0] * 2 + [4.0]]
    assert group.names == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert (layout.size, layout.sizes()) == (11, [[6, 2, 2, 1]])


def test_strides_are_those_of_the_parameter_if_it_is_dense():
    dense = nn.Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    gaps = nn.Parameter(torch.zeros(4, 6)[:, ::2])
    scalar, nothing = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.zeros(0, 3))
    layout = FlatLayout([dense, gaps, scalar, nothing])
    (group,) = layout.groups
    views = group.views(group.rows(1)[0])
    assert [v.shape for v in views] == [dense.shape, gaps.shape, scalar.shape, nothing.shape]
    assert views[0].stride() == dense.stride()
    assert views[1].stride() == (3, 1)
    assert layout.size == 120 + 12 + 1


def test_groups_by_dtype_frozen_left_out_tied_once_optimizers_welcome():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    frozen = nn.Parameter(torch.zeros(9), requires_grad=False)
    layout = FlatLayout([a, b, frozen, a])
    assert [(g.dtype, g.wide, g.size) for g in layout.groups] == [
        (torch.float32, torch.float32, 2), (torch.bfloat16, torch.float32, 3)]  # fmt: skip
    assert FlatLayout(torch.optim.SGD([a], lr=0.1)).groups[0].params == [a]
    assert FlatLayout({"w": a}).groups[0].names == ["w"]
    assert FlatLayout([("w", a)]).groups[0].names == ["w"]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([], ValueError, "parameters must not be empty"),
        ([nn.Parameter(torch.zeros(1), requires_grad=False)], ValueError, "must include a trainable one, got 1 frozen"),
        ([torch.zeros(1, dtype=torch.complex64).requires_grad_()], TypeError, "'param0' must be real, got"),
        ([torch.zeros(2, 2).to_sparse().requires_grad_()], TypeError, "must be a dense tensor held whole"),
        ("weights", TypeError, r"parameters must be \(name, tensor\) pairs, got 'w'"),
        (torch.zeros(2), TypeError, "parameters must be a module"),
        ([1, 2], TypeError, r"parameters must be \(name, tensor\) pairs, got 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_laid_out_is_refused(source, error, message):
    with pytest.raises(error, match=message):
        FlatLayout(source)


def test_moved_parameters_and_foreign_sizes_are_refused():
    net = nn.Linear(2, 2)
    layout = FlatLayout(net)
    layout.check_places("Writer")
    layout.check_sizes("Writer", [[4, 2]])
    with pytest.raises(StateError, match="Writer: sizes must be those of the parameters"):
        layout.check_sizes("Writer", [[4, 3]])
    net.double()
    with pytest.raises(RuntimeError, match=r"Writer: 'weight' must stay on cpu in torch\.float32"):
        layout.check_places("Writer")


# --- inner products ------------------------------------------------------------------------------------------------


def expected(a, b=None):
    a = a.double()
    norms = a.norm(dim=1)
    unit = torch.where(norms[:, None] > 0, a / norms[:, None].clamp_min(1e-300), 0.0)
    cross = [] if b is None else (unit @ b.double().T).tolist()
    return norms.tolist(), (unit @ unit.T).tolist(), cross


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_cosines_and_products_with_others(dtype, count, pairs):
    g = torch.Generator().manual_seed(count)
    a, b = (torch.randn(count, 500, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    norms, cosines, cross = expected(a, b)
    for cut in ([a], list(a.split(123, dim=1))):
        others = [b] if len(cut) == 1 else list(b.split(123, dim=1))
        found = inner_products(cut, others, pairs=pairs)
        assert found[0] == pytest.approx(norms, rel=tolerance)
        assert torch.tensor(found[1]).flatten().tolist() == pytest.approx(
            torch.tensor(cosines).flatten().tolist(), abs=tolerance
        )
        for i in range(count):
            for j in range(count):
                wanted = cross[i][j] if pairs or i == j else 0.0
                assert found[2][i][j] == pytest.approx(wanted, abs=50 * tolerance)
    assert inner_products([a])[2] == []


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-21, 1e21, 1e37])
def test_entries_whose_squares_leave_the_range(scale):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 20, generator=g)
    a = a * torch.tensor([1.0, scale, 0.0])[:, None]
    norms, cosines, cross = expected(a, b)
    found = inner_products([a], [b], pairs=True)
    assert found[0] == pytest.approx(norms, rel=1e-6)
    assert found[1][0] == pytest.approx(cosines[0], abs=1e-6)
    assert found[1][2] == [0.0, 0.0, 0.0]
    assert found[2][1] == pytest.approx(cross[1], abs=1e-5)
    diagonal = inner_products([a], [b])[2]
    assert diagonal[1] == pytest.approx([0.0, cross[1][1], 0.0], abs=1e-5)


@pytest.mark.parametrize("scale", [1e-250, 1e200])
def test_float64_far_beyond_its_range_of_squares(scale):
    a = torch.tensor([[3.0, 4.0], [4.0, -3.0]], dtype=torch.float64) * scale
    norms, cosines, _ = inner_products([a])
    assert [n / scale for n in norms] == pytest.approx([5.0, 5.0])
    assert cosines == [[1.0, pytest.approx(0.0, abs=1e-15)], [pytest.approx(0.0, abs=1e-15), 1.0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("count", [2, 5])
def test_vectors_that_are_not_finite_have_no_finite_norm(bad, count):
    a = torch.ones(count, 4)
    a[1, 2] = bad
    norms, _, _ = inner_products([a])
    assert [math.isfinite(n) for n in norms] == [i != 1 for i in range(count)]


def test_empty_vectors_and_empty_parts():
    assert inner_products([torch.zeros(2, 0)]) == ([0.0, 0.0], [[0.0, 0.0], [0.0, 0.0]], [])
    norms, cosines, _ = inner_products([torch.zeros(2, 0), torch.ones(2, 3)])
    assert norms == pytest.approx([math.sqrt(3)] * 2)
    assert cosines[0][1] == pytest.approx(1.0)


def test_normalised_keeps_cosines_in_range():
    norms, cosines = normalised([[1.0, -1.0000001, 0.0], [-1.0000001, 1.0, 0.0], [0.0, 0.0, -1e-20]])
    assert norms == [1.0, 1.0, 0.0]
    assert cosines == [[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert product([[1.0, 2.0]], [[3.0], [4.0]]) == [[11.0]]


# --- span ----------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000), count=st.integers(2, 5), steps=st.integers(0, 6))
def test_combinations_in_the_span_are_those_of_the_vectors(seed, count, steps):
    g = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, 8, generator=g, dtype=torch.float64)
    norms, cosines, _ = inner_products([vectors])
    state, now = Span(cosines, [True] * count, 1e-14), vectors / vectors.norm(dim=1, keepdim=True)
    target = torch.randn(count, 8, generator=g, dtype=torch.float64)
    for _ in range(steps):
        i, j = torch.randperm(count, generator=g)[:2].tolist()
        block = torch.randn(2, 2, generator=g, dtype=torch.float64)
        state.combine(i, j, tuple(map(tuple, block.tolist())))
        now[[i, j]] = block @ now[[i, j]]
    gram = now @ now.T
    for i in range(count):
        assert state.length(i) ** 2 == pytest.approx(float(gram[i, i]), rel=1e-8, abs=1e-9)
        for j in range(count):
            assert state.inner(i, j) == pytest.approx(
                float(gram[i, j]), rel=1e-8, abs=1e-8 * float(gram.diag().max())
            )
    lengths = gram.diag().sqrt()
    cosine, i, j = state.worst_pair()
    off = (gram / lengths[:, None] / lengths).masked_fill(torch.eye(count, dtype=torch.bool), 9.0)
    assert cosine == pytest.approx(float(off.min()), abs=1e-7)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    along = state.along((unit @ target.T).tolist())
    assert along == pytest.approx(((now * target).sum(1) / lengths).tolist(), rel=1e-7, abs=1e-8)
    over = torch.tensor(state.over(norms, [2.0] * count), dtype=torch.float64) @ vectors
    torch.testing.assert_close(over, 2.0 * now, rtol=1e-8, atol=1e-8)


def test_vectors_that_take_no_part_keep_still():
    state = Span([[1.0, -0.9, -1.0], [-0.9, 1.0, 0.9], [-1.0, 0.9, 1.0]], [True, True, False], 1e-12)
    assert state.worst_pair() == (-0.9, 0, 1)
    state.combine(1, 0, ((0.0, 0.0), (0.0, 1.0)))
    assert state.worst_pair() == (2.0, 0, 0)
    assert state.over([1.0, 1.0, 4.0], [1.0, 1.0, 2.0]) == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.5]]


# --- ranks and line searches ---------------------------------------------------------------------------------------


def test_one_process_reduces_nothing():
    ranks = Ranks(nn.Linear(2, 2))
    rows = torch.ones(3)
    ranks.sum_([rows])
    with ranks.no_sync():
        pass
    assert (ranks.world, rows.tolist()) == (1, [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="process_group must be one of 'auto', got 'world'"):
        Ranks(None, "world")

    class FullyShardedDataParallel(nn.Module):
        pass

    with pytest.raises(TypeError, match=r"got FullyShardedDataParallel\. Use DistributedDataParallel"):
        Ranks(FullyShardedDataParallel())


def test_only_the_closure_of_lbfgs_is_a_line_search():
    found = []
    weight = nn.Parameter(torch.zeros(1))

    def closure():
        found.append(inside_line_search())
        weight.grad = torch.ones(1)
        return torch.tensor(1.0)

    torch.optim.SGD([weight], lr=0.1).step(closure)
    torch.optim.LBFGS([weight], max_iter=1).step(closure)
    assert found[0] is False
    assert all(found[1:])
    assert not inside_line_search()
