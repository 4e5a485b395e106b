"""The aggregator against the literal reference, its closed forms and its invariances."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchjd.aggregation import Sum

from pullback.methods import sam_gs
from pullback.methods.sam_gs import surgery
from pullback.methods.sam_gs.tests.reference import Reference, mean_similarity, pair

SAMGS: Any = sam_gs.SAMGS  # takes settings from dictionaries, and its report is there after a call

F64 = torch.float64
FREE = math.inf


def gradients(seed, tasks=3, size=7, spread=1.0):
    """Rows of random direction whose sizes differ by factors of up to e^spread."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.exp(spread * torch.randn(tasks, 1, generator=g, dtype=F64))
    return torch.randn(tasks, size, generator=g, dtype=F64) * sizes


# --- the whole algorithm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [2, 3, 6])
@pytest.mark.parametrize("gamma", [0.0, 0.6, 0.85, 2.0])
@pytest.mark.parametrize("max_norm", [None, 0.3, FREE])
@pytest.mark.parametrize("variant", ["official", "paper"])
def test_thirty_steps_equal_the_reference(variant, max_norm, gamma, tasks):
    settings = {"variant": variant, "beta1": 0.8, "beta2": 0.95, "gamma": gamma, "max_norm": max_norm}
    aggregator, reference = SAMGS(**settings), Reference(**settings)
    for step in range(30):
        rows = gradients(step, tasks)
        wanted = torch.tensor(reference.step(rows.tolist()), dtype=F64)
        torch.testing.assert_close(aggregator(rows), wanted, rtol=1e-9, atol=1e-12)
        assert aggregator.report.branch == reference.branch
        assert aggregator.report.step == step
    seen = mean_similarity([float(row.norm()) for row in rows], variant)
    assert aggregator.report.similarity == pytest.approx(seen, abs=1e-12)


def test_the_least_similar_pair_can_choose_the_branch_while_the_mean_feeds_the_memory():
    equalised = {}
    for reduction in ("mean", "min"):
        settings = {"gamma": 0.5, "reduction": reduction, "max_norm": FREE}
        aggregator, reference = SAMGS(**settings), Reference(**settings)
        branches = []
        for step in range(30):
            rows = gradients(step)
            wanted = torch.tensor(reference.step(rows.tolist()), dtype=F64)
            torch.testing.assert_close(aggregator(rows), wanted, rtol=1e-9, atol=1e-12)
            branches.append(aggregator.report.branch)
        equalised[reduction] = branches.count("equalise")
    assert 0 < equalised["mean"] < equalised["min"] < 30


@pytest.mark.parametrize("tasks", [2, 5])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_blocks_do_not_change_the_sum(monkeypatch, tasks, gamma):
    whole = SAMGS(gamma=gamma)
    wanted = [whole(gradients(step, tasks, 103)) for step in range(3)]
    monkeypatch.setattr(surgery, "CPU_BLOCK", 10)
    cut = SAMGS(gamma=gamma)
    got = [cut(gradients(step, tasks, 103)) for step in range(3)]
    torch.testing.assert_close(torch.stack(got), torch.stack(wanted), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(cut.momentum, whole.momentum, rtol=1e-12, atol=1e-15)


def test_official_code_on_a_step_worked_out_by_hand():
    # |g1| = 5, |g2| = 1: Psi = 10/26; first step: m-hat = g, h = 0.01 (16/26)^2 + 1e-8
    rows = torch.tensor([[3.0, 4.0], [0.0, -1.0]], dtype=F64)
    root = math.sqrt((0.01 * (16 / 26) ** 2 + 1e-8) / 0.01)
    wanted = 2 * torch.tensor([9.0, 16.0 - 1.0], dtype=F64) / root
    torch.testing.assert_close(SAMGS(gamma=0.3, max_norm=FREE)(rows), wanted, rtol=1e-12, atol=0)
    clipped = SAMGS(gamma=0.3)(rows)
    torch.testing.assert_close(clipped, wanted / (wanted.norm() + 1e-6), rtol=1e-12, atol=0)
    equal = 2 * 3.0 * torch.tensor([0.6, 0.8 - 1.0], dtype=F64)
    torch.testing.assert_close(SAMGS(gamma=0.4, max_norm=FREE)(rows), equal, rtol=1e-12, atol=0)
    # the paper's Psi has the diagonal: (10/26 + 1) / 2
    printed = SAMGS(gamma=0.6, variant="paper")
    printed(rows)
    assert printed.report.similarity == pytest.approx(18 / 26, abs=1e-14)
    assert printed.report.branch == "momentum"


def test_two_identical_gradients_give_the_cards_numbers():
    # h decays to 1e-8: the momentum branch divides by about 1e-3, and the factor 2 comes on top
    rows = torch.tensor([[1.0, 2.0], [1.0, 2.0]], dtype=F64)
    unclipped = SAMGS(gamma=0.1, max_norm=FREE)(rows)
    torch.testing.assert_close(unclipped, 2 * torch.tensor([2000.0, 8000.0], dtype=F64), rtol=1e-9, atol=0)
    assert float(SAMGS(gamma=0.1)(rows).norm()) == pytest.approx(1.0, abs=1e-8)


# --- closed forms --------------------------------------------------------------------------------------------------


def test_equal_norms_never_equalise_up_to_gamma_one_and_gamma_sets_the_extremes():
    rows = torch.eye(3, dtype=F64)
    for gamma, branch in ((0.0, "momentum"), (1.0, "momentum"), (1.0 + 1e-9, "equalise")):
        aggregator = SAMGS(gamma=gamma)
        aggregator(rows)
        assert aggregator.report.branch == branch
    never = SAMGS(gamma=0.0)
    never(torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=F64))  # Psi = 0 is not below 0
    assert never.report.branch == "momentum"


def test_equalised_sum_is_the_mean_norm_times_unit_vectors_and_keeps_its_direction():
    rows = gradients(0)
    free = {"gamma": 2.0, "max_norm": FREE}
    norms = rows.norm(dim=1, keepdim=True)
    wanted = 3 * norms.mean() * (rows / norms).sum(0)
    torch.testing.assert_close(SAMGS(**free)(rows), wanted, rtol=1e-12, atol=0)
    stretched = rows * torch.tensor([[1.0], [50.0], [1.0]], dtype=F64)
    one, other = SAMGS(**free)(rows), SAMGS(**free)(stretched)
    torch.testing.assert_close(one / one.norm(), other / other.norm(), rtol=1e-12, atol=0)


def test_identical_gradients_equalised_are_the_plain_sum():
    rows = gradients(3, tasks=1).repeat(4, 1)
    got = SAMGS(gamma=2.0, variant="paper")(rows)
    torch.testing.assert_close(got, Sum()(rows), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("gamma", "degree"), [(0.0, 2), (2.0, 1)])
def test_degree(gamma, degree):
    free = {"gamma": gamma, "max_norm": FREE}
    rows = gradients(1)
    got = SAMGS(**free)(3 * rows)
    torch.testing.assert_close(got, 3**degree * SAMGS(**free)(rows), rtol=1e-12, atol=0)


def test_momentum_moves_on_in_both_branches():
    twins = SAMGS(gamma=2.0), SAMGS(gamma=0.0)
    for step in range(4):
        for each in twins:
            each(gradients(step))
    torch.testing.assert_close(twins[0].momentum, twins[1].momentum, rtol=1e-12, atol=0)
    m = torch.zeros(3, 7, dtype=F64)
    for step in range(4):
        m = 0.9 * m + 0.1 * gradients(step)
    torch.testing.assert_close(twins[0].momentum, m, rtol=1e-12, atol=1e-15)


# --- similarity ----------------------------------------------------------------------------------------------------

sizes = st.floats(1e-6, 1e6)


@given(sizes, sizes, sizes, st.floats(1e-3, 1e3))
def test_similarity_is_a_symmetric_scale_free_number_that_ignores_directions(a, b, c, scale):
    norms = torch.tensor([a, b, c], dtype=F64)
    rows = torch.diag(norms)
    found = SAMGS().similarity_matrix(rows)
    wanted = torch.tensor([[pair(x, y) for y in (a, b, c)] for x in (a, b, c)], dtype=F64)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert torch.equal(found, found.T)
    assert bool(((found >= 0) & (found <= 1)).all())
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=F64))[0]
    torch.testing.assert_close(SAMGS().similarity_matrix(scale * rows @ turn), found, rtol=1e-9, atol=1e-12)
    listed = [1.0 - x for x in surgery.pair_dissimilarities([a, b, c])]
    torch.testing.assert_close(torch.tensor(listed), found[[0, 0, 1], [1, 2, 2]].float())


def test_similarity_of_nearly_equal_norms_does_not_cancel():
    apart = surgery.pair_dissimilarities([1.0, 1.0 + 1e-10])[0]
    assert apart == pytest.approx(5e-21, rel=1e-5)  # (1e-10)^2 / 2, where 1 - psi in floats gives 0 or 1e-16


def test_zero_gradients():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]], dtype=F64)
    psi = SAMGS().similarity_matrix(rows)
    assert psi.tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    aggregator = SAMGS(gamma=0.5, max_norm=FREE)
    got = aggregator(rows)  # mean norm over all three tasks, 5/3; the zeros stay zeros
    torch.testing.assert_close(got, 3 * 5 / 3 * torch.tensor([0.6, 0.8], dtype=F64), rtol=1e-12, atol=0)
    assert aggregator.report.similarity == pytest.approx(1 / 3)
    for gamma in (0.0, 2.0):
        aggregator = SAMGS(gamma=gamma)
        assert torch.equal(aggregator(torch.zeros(2, 4)), torch.zeros(4))
        assert aggregator.report.similarity == 1.0


def test_opposite_gradients_cancel():
    row = gradients(2, tasks=1)
    assert torch.equal(SAMGS(gamma=2.0)(torch.cat([row, -row])), torch.zeros(7, dtype=F64))
    assert torch.equal(SAMGS(gamma=0.0)(torch.cat([row, -row])), torch.zeros(7, dtype=F64))


# --- numbers of every size and kind ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-12, 1.0, 1e12, 1e30, 1e36])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("size", [7, 300_000])
def test_float32_gradients_of_any_size_keep_their_direction(scale, gamma, size):
    rows = gradients(4, size=size)
    one, same = SAMGS(gamma=gamma, max_norm=1e-4), SAMGS(gamma=gamma, max_norm=1e-4)
    for _ in range(2):
        got = one((rows * scale).float()).double()
        wanted = same(rows)
    assert bool(got.isfinite().all())
    if scale >= 1e-12 or gamma:  # else the square is below the smallest float32
        expected = wanted / wanted.norm() * min(1e-4, float(got.norm()))
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()))
    if scale >= 1.0:
        assert float(got.norm()) == pytest.approx(1e-4, rel=1e-3)


def test_a_spike_in_the_past_does_not_spoil_the_step():
    aggregator = SAMGS(gamma=0.0)
    aggregator(torch.full((2, 3), 1e30))
    got = aggregator(torch.full((2, 3), 1e10))
    assert float(got.norm()) == pytest.approx(1.0, rel=1e-3)


def test_an_unclipped_result_beyond_float32_is_refused_and_changes_nothing():
    aggregator = SAMGS(variant="paper", gamma=0.0)
    aggregator(torch.ones(2, 3))
    before = {key: value.clone() for key, value in aggregator.state_dict().items()}
    with pytest.raises(ValueError, match=r"beyond the range of torch\.float32.*Set max_norm"):
        aggregator(torch.full((2, 3), 1e30))
    assert all(torch.equal(value, before[key]) for key, value in aggregator.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("size", [7, 200_000])
def test_half_precision_is_summed_in_float32(dtype, gamma, size):
    rows = gradients(5, size=size).to(dtype)
    half, full = SAMGS(gamma=gamma), SAMGS(gamma=gamma)
    for _ in range(3):
        got, wanted = half(rows), full(rows.float())
    assert got.dtype == dtype
    assert half.momentum.dtype == torch.float32
    assert torch.equal(got, wanted.to(dtype))


def test_autocast_changes_nothing():
    rows = gradients(6, tasks=5, size=33).float()
    for gamma in (0.0, 2.0):
        wanted = SAMGS(gamma=gamma)(rows)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(SAMGS(gamma=gamma)(rows), wanted)


def test_compiled_calls_equal_plain_ones():
    compiled = SAMGS(gamma=0.8)
    plain = SAMGS(gamma=0.8)
    call = torch.compile(lambda rows: compiled(rows), backend="eager")
    for step in range(12):
        rows = gradients(step)
        assert torch.equal(call(rows), plain(rows))
