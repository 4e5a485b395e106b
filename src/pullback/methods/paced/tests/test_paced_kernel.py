"""The Beta kernel: closed forms, exactness of what it leaves out, normalisers, trouble."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pullback.core.checks import NonFiniteError
from pullback.methods.paced import BetaKernel
from pullback.methods.paced.tests import reference

RATES = st.one_of(st.floats(0, 1, width=32), st.just(math.nan), st.sampled_from([0.0, 0.125, 0.5, 1.0]))
UNLIKE: Any = ("pool-mean", "batch-mean", "none")


def weights(rates, alpha=1.0, beta=1.0, normalize: Any = "none"):
    return BetaKernel(alpha, beta, normalize=normalize)(torch.tensor(rates, dtype=torch.float64)).tolist()


# --- closed forms --------------------------------------------------------------------------------------------------


def test_default_weights_at_eighths():
    assert weights([0.0, 0.125, 0.5, 0.875, 1.0]) == [0.0, 0.109375, 0.25, 0.109375, 0.0]


def test_largest_weight_is_at_alpha_over_alpha_plus_beta():
    grid = torch.linspace(0, 1, 3001, dtype=torch.float64)
    found = BetaKernel(2.0, 1.0, normalize="none")(grid)
    assert grid[found.argmax()].item() == pytest.approx(2 / 3)
    assert found.max().item() == pytest.approx(4 / 27)


@given(alpha=st.floats(0, 4), beta=st.floats(0, 4), p=st.floats(0.01, 0.49))
def test_symmetric_only_for_equal_exponents(alpha, beta, p):
    left, right = weights([p, 1 - p], alpha, beta)
    assert (left == pytest.approx(right)) == (abs(alpha - beta) * abs(math.log(p / (1 - p))) < 1e-6)


def test_zero_exponents_weigh_all_alike_also_at_the_ends():
    assert weights([0.0, 0.3, 1.0], 0.0, 0.0) == [1.0, 1.0, 1.0]
    assert weights([0.0, 0.25, 1.0], 1.0, 0.0) == [0.0, 0.25, 1.0]
    assert weights([0.0, 0.25, 1.0], 0.0, 2.0) == [1.0, 0.5625, 0.0]


@given(st.lists(RATES, min_size=1, max_size=8), st.floats(0, 3), st.floats(0, 3), st.data())
def test_weighted_loss_is_the_papers(rates, alpha, beta, data):
    ids = data.draw(st.lists(st.integers(0, len(rates) - 1), min_size=1, max_size=6))
    losses = [math.sin(7.0 * i + k) + 2.0 for k, i in enumerate(ids)]
    for normalize in UNLIKE:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # some draws weigh nothing
            got = BetaKernel(alpha, beta, normalize=normalize)(
                torch.tensor(rates, dtype=torch.float64),
                torch.tensor(losses, dtype=torch.float64),
                torch.tensor(ids),
            )
        wanted = reference.weighted_mean(rates, losses, ids, alpha, beta, normalize)
        assert float(got) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@given(st.floats(0.0, 0.4), st.floats(0, 2), st.floats(0, 2))
def test_a_misspecified_weight_loses_at_most_delta_squared(delta, alpha, beta):
    """Optimal weights are signal over variance; factors within 1 +- delta cost delta^2 of the efficiency at most."""
    p = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    kernel = BetaKernel(alpha, beta, normalize="none")(p).tolist()
    noise = [0.5 + math.cos(3 * x) ** 2 for x in p.tolist()]
    for low in range(
        1, 19
    ):  # truth: the kernel times (1 - delta) on some rates and (1 + delta) on the others
        truth = [k * (1 - delta if i < low else 1 + delta) for i, k in enumerate(kernel)]
        signal = [t * v for t, v in zip(truth, noise, strict=True)]
        best = reference.efficiency(truth, signal, noise)
        assert reference.efficiency(kernel, signal, noise) >= best * (1 - delta**2) - 1e-12


def test_that_loss_is_attained():
    """With the share (1 + delta) / 2 of the signal on the low side the bound holds with equality."""
    delta, kernel = 0.3, BetaKernel(normalize="none")(torch.tensor([0.3, 0.3], dtype=torch.float64)).tolist()
    truth = [kernel[0] * (1 + delta), kernel[1] * (1 - delta)]  # the first weight is too low
    share = (1 + delta) / 2
    noise = [share / truth[0] ** 2, (1 - share) / truth[1] ** 2]  # signal^2 / noise in the shares wanted
    signal = [t * v for t, v in zip(truth, noise, strict=True)]
    lost = 1 - reference.efficiency(kernel, signal, noise) / reference.efficiency(truth, signal, noise)
    assert lost == pytest.approx(delta**2)


# --- what is exact -------------------------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))


def per_example(model, x):
    return model(x).square().mean(1)


def slope(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None
    return leaf.grad


def gradients(model):
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def test_equal_weights_give_the_plain_gradient_bitwise():
    model, x = network(), torch.randn(8, 5)
    per_example(model, x).mean().backward()
    wanted = gradients(model)
    for rate in (0.5, 0.125):
        for normalize in ("pool-mean", "batch-mean"):
            model.zero_grad()
            rates = torch.full((8,), rate)
            BetaKernel(normalize=normalize)(rates, per_example(model, x), torch.arange(8)).backward()
            assert torch.equal(gradients(model), wanted)


def test_weight_zero_gives_a_gradient_of_exactly_zero_whatever_the_loss():
    loss = torch.tensor([1.0, math.nan, math.inf, 2.0], requires_grad=True)
    total = BetaKernel()(torch.tensor([0.5, 0.0, 1.0, 0.25]), loss, torch.arange(4))
    total.backward()
    assert slope(loss)[1:3].tolist() == [0.0, 0.0]
    assert total.isfinite()
    assert bool((slope(loss)[::3] > 0).all())


def test_examples_of_weight_zero_may_be_left_out_exactly():
    rates = torch.tensor([0.0, 0.5, 1.0, 0.25, math.nan, 0.0, 0.75])
    for normalize in UNLIKE:
        kernel = BetaKernel(normalize=normalize)
        keep = kernel.active(rates)
        assert keep.tolist() == [1, 3, 4, 6]
        full = torch.arange(1.0, 8.0, requires_grad=True)
        kernel(rates, full, torch.arange(7)).backward()
        part = full.detach()[keep].requires_grad_()
        kernel(rates, part, keep, count=7).backward()
        assert torch.equal(slope(part), slope(full)[keep])
        assert slope(full)[[0, 2, 5]].tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(
        BetaKernel(normalize="batch-mean")(rates[keep], count=7),
        BetaKernel(normalize="batch-mean")(rates)[keep],
    )


@pytest.mark.parametrize("pieces", [1, 2, 4, 8])
def test_accumulation_gives_the_gradient_of_one_batch(pieces):
    model, x = network(), torch.randn(8, 5)
    rates, ids = torch.rand(20), torch.randperm(20)[:8]
    kernel = BetaKernel()
    kernel(rates, per_example(model, x), ids).backward()
    wanted = gradients(model)
    model.zero_grad()
    for rows in torch.arange(8).chunk(pieces):
        kernel(rates, per_example(model, x[rows]), ids[rows], count=8).backward()
    torch.testing.assert_close(gradients(model), wanted, rtol=0, atol=1e-6)
    model.zero_grad()
    batch = BetaKernel(normalize="batch-mean")
    whole = batch(rates[ids])
    for rows in torch.arange(8).chunk(pieces):
        ((whole[rows] * per_example(model, x[rows])).sum() / 8).backward()
    split = gradients(model)
    model.zero_grad()
    batch(rates, per_example(model, x), ids).backward()
    torch.testing.assert_close(split, gradients(model), rtol=0, atol=1e-6)


def test_weighting_adds_no_backward_pass_and_skipping_saves_its_share():
    model, x = network(), torch.randn(8, 5)
    passes = []
    model[0].weight.register_post_accumulate_grad_hook(lambda _: passes.append(1))
    rates, ids = torch.tensor([0.0, 0.5] * 4), torch.arange(8)
    kernel = BetaKernel()

    def flops(step):
        passes.clear()
        model.zero_grad()
        with FlopCounterMode(display=False) as counter:
            step()
        assert len(passes) == 1
        return counter.get_total_flops()

    plain = flops(lambda: per_example(model, x).mean().backward())
    assert flops(lambda: kernel(rates, per_example(model, x), ids).backward()) == plain
    keep = kernel.active(rates, ids)
    half = flops(lambda: kernel(rates, per_example(model, x[keep]), keep, count=8).backward())
    assert half == plain / 2


def test_rates_are_constants_of_the_gradient():
    rates = torch.full((3,), 0.25, requires_grad=True)
    assert not BetaKernel()(rates).requires_grad
    loss = torch.ones(3, requires_grad=True)
    BetaKernel(normalize="none")(rates, loss).backward()
    assert rates.grad is None
    assert slope(loss).tolist() == [0.0625] * 3


# --- trouble -------------------------------------------------------------------------------------------------------


def test_nothing_at_the_frontier_is_skipped_warned_of_once_and_counted():
    kernel, model, x = BetaKernel(), network(), torch.randn(4, 5)
    rates, ids = torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.arange(4)
    with pytest.warns(RuntimeWarning, match="every weight is zero") as caught:
        total = kernel(rates, per_example(model, x), ids)
    assert caught[0].filename == __file__
    total.backward()
    assert float(total.detach()) == 0.0
    assert not gradients(model).any()
    assert kernel(rates).tolist() == [0.0] * 4  # a second warning would be an error here
    assert kernel.active(rates).tolist() == []
    assert int(kernel.empty) == 3
    assert kernel.active(rates, least=2).tolist() == [0, 1]
    assert int(kernel.empty) == 3
    fresh = BetaKernel()
    fresh.load_state_dict(kernel.state_dict())
    assert int(fresh.empty) == 3


def test_a_batch_of_weight_zero_out_of_a_living_pool_is_counted_without_a_warning():
    kernel, rates, ids = BetaKernel(), torch.tensor([0.0, 0.5, 1.0]), torch.tensor([2, 0])
    loss = torch.ones(2, requires_grad=True)
    total = kernel(rates, loss, ids)
    assert float(total.detach()) == 0.0
    assert kernel.active(rates, ids).tolist() == []
    assert int(kernel.empty) == 2
    assert kernel.active(rates, torch.tensor([2, 1, 0]), least=2).tolist() == [2, 1]
    assert int(kernel.empty) == 2


def test_active_warns_of_a_pool_without_a_weight():
    with pytest.warns(RuntimeWarning, match="every weight is zero") as caught:
        BetaKernel().active(torch.tensor([0.0, 1.0]), torch.tensor([1]))
    assert caught[0].filename == __file__


def test_some_are_kept_for_ranks_that_must_run_backward():
    kernel = BetaKernel()
    assert kernel.active(torch.tensor([0.0, 0.5, 1.0, 0.25]), least=3).tolist() == [0, 1, 3]
    assert kernel.active(torch.tensor([0.0, 0.5]), least=1).tolist() == [1]
    assert kernel.active(torch.tensor([0.0, 0.5]), torch.tensor([0]), least=9).tolist() == [0]


def test_unknown_competence_gets_the_mean_weight():
    assert weights([0.5, math.nan, 0.0]) == [0.25, 0.125, 0.0]
    assert weights([0.5, math.nan, 0.0], normalize="pool-mean") == [2.0, 1.0, 0.0]
    for normalize in UNLIKE:
        assert weights([math.nan] * 2, normalize=normalize) == [1.0, 1.0]
    kernel = BetaKernel()
    with pytest.warns(RuntimeWarning, match="every weight is zero"):
        assert kernel(torch.tensor([0.0, math.nan, 1.0])).tolist() == [0.0] * 3
    assert kernel.active(torch.tensor([0.0, math.nan, 1.0])).tolist() == [1]


def test_a_pool_of_one_problem():
    assert weights([0.25], normalize="pool-mean") == [1.0]
    loss = torch.tensor([3.0])
    assert float(BetaKernel()(torch.tensor([0.25]), loss, torch.tensor([0]))) == 3.0


@pytest.mark.parametrize("bad", [-0.01, 1.001, math.inf, -math.inf])
def test_rates_out_of_range_are_refused(bad):
    rates = torch.tensor([0.5, bad])
    for call in (
        lambda: BetaKernel()(rates),
        lambda: BetaKernel()(rates, torch.ones(1), torch.tensor([0])),
        lambda: BetaKernel().active(rates),
    ):
        with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\], got (-0.01|1.001|inf|-inf)"):
            call()


def test_misuse_is_refused():
    kernel, rates, loss = BetaKernel(), torch.rand(5), torch.ones(2)
    with pytest.raises(ValueError, match="ids must be given with normalize='pool-mean', got None"):
        kernel(rates, torch.ones(5))
    with pytest.raises(ValueError, match="one value per weight, got 2 for 3"):
        kernel(rates, loss, torch.tensor([0, 1, 2]))
    with pytest.raises(TypeError, match="ids must be a 1-dim integer tensor"):
        kernel(rates, loss, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="loss must be a tensor with 1 dimensions"):
        kernel(rates, torch.tensor(1.0), torch.tensor([0]))
    with pytest.raises(TypeError, match="rate must be a floating tensor"):
        kernel(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="loss must hold at least one example, got none"):
        kernel(rates, torch.ones(0), torch.tensor([], dtype=torch.int64))
    with pytest.raises(ValueError, match="count must be >= 2, got 1"):
        kernel(rates, loss, torch.tensor([0, 1]), count=1)
    with pytest.raises(ValueError, match="least must be >= 0, got -1"):
        kernel.active(rates, least=-1)


def test_a_loss_that_is_not_finite_follows_the_policy():
    rates, ids = torch.tensor([0.5, 0.25]), torch.arange(2)

    def call(policy):
        loss = torch.tensor([1.0, math.nan], requires_grad=True)
        return BetaKernel(nonfinite=policy)(rates, loss, ids), loss

    with pytest.raises(NonFiniteError, match="weighted loss is NaN or Inf"):
        call("raise")
    total, loss = call("skip")
    total.backward()
    assert float(total.detach()) == 0.0
    assert loss.grad is None
    with pytest.warns(RuntimeWarning, match="nonfinite='warn'"):
        total, _ = call("warn")
    assert total.isnan()


def test_reductions_and_half_precision():
    rates, ids = torch.tensor([0.5, 0.25, 0.0]), torch.arange(3)
    loss = torch.tensor([2.0, 4.0, 8.0], dtype=torch.bfloat16)
    each = BetaKernel(normalize="none", reduction="none")(rates, loss, ids)
    assert each.dtype == torch.float32
    assert each.tolist() == [0.5, 0.75, 0.0]
    assert float(BetaKernel(normalize="none", reduction="sum")(rates, loss, ids)) == 1.25
    assert BetaKernel()(rates.bfloat16()).dtype == torch.float32
    assert repr(BetaKernel(2.0)) == "BetaKernel(alpha=2, beta=1, normalize='pool-mean', reduction='mean')"
