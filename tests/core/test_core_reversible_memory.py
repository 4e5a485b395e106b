"""What is kept, counted in bytes: flat in depth, one state an anchor; what rebuilding costs and how far it drifts."""

from __future__ import annotations

import pytest
import torch
from reversible_parts import chain, learned, pair, plain, relative, total, trained

from pullback.core.peak_bytes import PeakBytes
from pullback.core.saved_bytes import saved_bytes

DEPTHS = (1, 2, 4, 8)


def kept(blocks, state, *, reversible=True, **how):
    seq = chain(blocks, **how)
    seq = seq if reversible else plain(seq)
    return saved_bytes(lambda: seq(state), seq, *state)


def test_bytes_are_flat_in_depth_and_those_of_one_state():
    state = pair(batch=2, side=16)
    size = sum(each.nbytes for each in state)
    assert [kept(blocks, state, scale=learned) for blocks in DEPTHS] == [size] * 4
    plainly = [kept(blocks, state, reversible=False) for blocks in DEPTHS]
    slopes = [(b - a) / (n - m) for a, b, m, n in zip(plainly, plainly[1:], DEPTHS, DEPTHS[1:], strict=False)]
    assert min(slopes) > 4 * size


@pytest.mark.parametrize("every", [1, 2, 4, 8])
def test_every_anchor_costs_one_state_and_slots_that_did_not_change_are_shared(every):
    state = pair(batch=2, side=16)
    size = state[0].nbytes
    for blocks in DEPTHS:
        anchors = range(every, 2 * blocks, every)
        # In front of step k the state holds what steps k - 1 and k - 2 wrote; the input, of which nothing is kept
        # twice, is left out of the count.
        written = {n for k in (*anchors, 2 * blocks) for n in (k - 1, k - 2)}
        assert kept(blocks, state, anchor_every=every) == size * len({n for n in written if n >= 0})


def test_random_states_are_kept_for_functions_that_draw_and_counted():
    state = pair(batch=2, side=16)
    size = sum(each.nbytes for each in state)
    one = torch.get_rng_state().nbytes
    assert kept(4, state, drop=0.5) == size + 8 * one
    assert kept(4, state, drop=0.5, preserve_rng_state=False) == size


def test_nothing_is_kept_without_a_graph():
    state, seq = pair(), chain(2)
    with torch.no_grad():
        assert saved_bytes(lambda: seq(state)) == 0


def most(blocks, *, reversible=True, **how):
    """Peak bytes of forward and backward, beside input, weights and the gradients of weights."""
    torch.manual_seed(0)
    seq, state = chain(blocks, **how), pair(batch=2, side=16)
    seq = seq if reversible else plain(seq)
    params = list(seq.parameters())
    with PeakBytes(*state, *params) as meter:
        torch.autograd.grad(sum(each.sum() for each in seq(state)), [*state, *params])
    return meter.most - sum(p.nbytes for p in params)


def test_the_peak_of_a_whole_step_is_flat_in_depth():
    state = sum(each.nbytes for each in pair(batch=2, side=16))
    two, eight = most(2), most(8)
    assert eight - two < 0.1 * state
    assert most(8, reversible=False) - most(2, reversible=False) > 12 * state


def test_each_function_runs_twice_and_no_more():
    seq, calls = chain(3), []
    for step in seq.steps:
        step.fn.register_forward_hook(lambda *_: calls.append(1))
    loss = total(seq(pair()))
    assert len(calls) == 6
    loss.backward()
    assert len(calls) == 12


# --- drift -----------------------------------------------------------------------------------------------------------


def drift(blocks, factor, **how):
    """Gradient error against float64, and the report."""
    seq = chain(blocks, scale=factor, drift_check=True, **how)
    exact = trained(plain(seq), pair())[1]
    seq = seq.float()
    state = pair(dtype=torch.float32)
    grads = torch.autograd.grad(total(seq(state)), [*state, *seq.parameters()])
    return relative([each.double() for each in grads], exact), seq.drift


def test_drift_grows_with_depth_for_small_factors_is_flat_for_one_and_bounded_by_anchors():
    (_, short), (_, long) = drift(2, 0.4), drift(12, 0.4)
    assert float(long.absolute) > 100 * float(short.absolute)
    (_, short), (error, long) = drift(2, None), drift(12, None)
    assert float(long.absolute) < 20 * float(short.absolute)
    assert error < 1e-5
    (loose, without), (tight, anchored) = drift(12, 0.4), drift(12, 0.4, anchor_every=4)
    assert float(anchored.absolute) < 0.01 * float(without.absolute)
    assert tight < 0.1 * loose
    assert (without.compared, anchored.compared) == (2, 12)


def test_the_report_is_the_error_of_what_was_rebuilt():
    seq, state = chain(6, scale=0.4, drift_check=True).float(), pair(dtype=torch.float32)
    assert seq.drift is None
    out = seq(state)
    with torch.no_grad():
        back = seq.inverse(out)
    total(out).backward()
    errors = [(a - b).abs().max() for a, b in zip(back, state, strict=True)]
    assert torch.equal(seq.drift.absolute, max(errors).double())
    ratios = [e.double() / s.detach().abs().max().double() for e, s in zip(errors, state, strict=True)]
    torch.testing.assert_close(seq.drift.relative, max(ratios))


def test_anchors_in_front_of_every_step_make_gradients_bitwise_exact():
    seq, state = chain(4, scale=0.3, anchor_every=1).float(), pair(dtype=torch.float32)
    for each in state:
        each.requires_grad_()
    ours, theirs = (
        torch.autograd.grad(total(each(state)), [p for p in each.parameters() if p.dim() == 4])
        for each in (seq, plain(seq))
    )
    assert all(map(torch.equal, ours, theirs))


def test_the_check_changes_no_gradient():
    state = pair(dtype=torch.float32)
    one, other = (chain(4, scale=learned, anchor_every=3, drift_check=c).float() for c in (False, True))
    assert all(map(torch.equal, trained(one, state)[1], trained(other, state)[1]))
