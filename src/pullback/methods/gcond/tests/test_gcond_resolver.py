"""The resolution against the literal reference, closed forms, TorchJD's PCGrad, and on hostile matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchjd.aggregation import PCGrad, Sum
from torchjd.autogram import Engine
from torchjd.autojac import backward, jac_to_grad, mtl_backward

from pullback.core.checks import NonFiniteError
from pullback.core.span import inner_products
from pullback.methods.gcond import ConflictResolver
from pullback.methods.gcond.resolver import projection_shares
from pullback.methods.gcond.tests import reference

OPTIONS = (
    {},
    {"max_iters": None},
    {"smooth": False, "max_iters": None},
    {"thresholds": (-0.9, -0.3, 0.2), "power": 1.5, "max_iters": 5},
    {"arbiter_weights": (0.0, 1.0), "ema_bias_correction": True},
    {"dominance_window": 2, "max_iters": 4},
    {"smooth": False, "dominance_window": 3},
    {"norm_cap": 1.5, "ema_decay": 0.5},
    {"stability_reference": "resolved", "max_iters": None},
    {"stability_reference": "resolved", "smooth": False, "max_iters": 6, "norm_cap": 2.0},
)


def gradients(tasks, n=7, steps=4, seed=0, spread=0.7):
    """Conflicting gradients that keep part of their direction from step to step: [steps, tasks, n]."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(tasks, n, generator=g, dtype=torch.float64)
    base = base - spread * base.mean(0)
    sizes = torch.exp(torch.randn(steps, tasks, 1, generator=g, dtype=torch.float64))
    return (base + torch.randn(steps, tasks, n, generator=g, dtype=torch.float64)) * sizes


def pair(c, sizes=(2.0, 0.9)):
    """Two gradients of cosine ``c`` in three dimensions; the first is the larger."""
    g = torch.tensor([[1.0, 0.0, 0.0], [c, math.sqrt(1 - c * c), 0.0]], dtype=torch.float64)
    return g * torch.tensor(sizes, dtype=torch.float64)[:, None]


class WithMemory:
    """The product's resolution over several steps, fed by hand with what the arbiter remembers."""

    def __init__(self, **options):
        self.resolver = ConflictResolver(**options)
        self.memory, self.previous = None, None

    def step(self, jacobian):
        raw = self.resolver.stability_reference == "raw"
        others = [] if self.previous is None else [self.previous]
        norms, cosines, cross = inner_products([jacobian], others, pairs=not raw)
        found = self.resolver.resolve(norms, cosines, alignment=cross or None, memory=self.memory)
        self.memory = found.memory
        resolved = torch.tensor(found.coefficients, dtype=jacobian.dtype) @ jacobian
        kept = jacobian if raw else resolved
        lengths = kept.norm(dim=1, keepdim=True)
        self.previous = torch.where(lengths > 0, kept / lengths.clamp_min(1e-300), 0.0)
        return torch.tensor(found.weights, dtype=jacobian.dtype) @ jacobian, found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_several_steps_equal_the_reference(tasks, options):
    ours, literal = WithMemory(**options), reference.Conductor(tasks, momentum=0.0, **options)
    rounds = 0
    for jacobian in gradients(tasks, seed=tasks, steps=12):
        direction, found = ours.step(jacobian)
        torch.testing.assert_close(direction, literal.step(list(jacobian)), rtol=1e-9, atol=1e-11)
        rounds += len(found.conflicts)
    assert rounds >= 6


@given(seed=st.integers(0, 10_000), tasks=st.integers(2, 6), choice=st.integers(0, len(OPTIONS) - 1))
def test_random_gradients_equal_the_reference(seed, tasks, choice):
    options = OPTIONS[choice]
    ours, literal = WithMemory(**options), reference.Conductor(tasks, momentum=0.0, **options)
    for jacobian in gradients(tasks, seed=seed, steps=3):
        direction, _ = ours.step(jacobian)
        torch.testing.assert_close(direction, literal.step(list(jacobian)), rtol=1e-7, atol=1e-9)


# --- closed forms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("c", "shares"),
    [
        (-0.25, (0.7071, 0.7071)),
        (-0.5, (1, 1)),
        (-0.65, (0.9239, 1)),
        (-0.8, (0, 1)),
        (-1.0, (0, 1)),
        (0.0, (0, 0)),
    ],
)
def test_the_table_of_shares(c, shares):
    assert projection_shares(c) == pytest.approx(shares, abs=5e-5)


def test_shares_are_continuous_and_monotone():
    grid = np.linspace(-1.0, 0.2, 4001)
    winner, loser = np.array([projection_shares(float(c)) for c in grid]).T
    assert np.abs(np.diff(winner)).max() < 0.01
    assert np.abs(np.diff(loser)).max() < 0.01
    assert (np.diff(loser) <= 1e-12).all()
    inside = grid < -0.5
    assert (np.diff(winner[inside]) >= -1e-12).all()
    assert (np.diff(winner[grid >= -0.5]) <= 1e-12).all()


@pytest.mark.parametrize("c", [0.0, 0.3, 1.0])
def test_agreement_is_left_alone(c):
    torch.testing.assert_close(ConflictResolver()(pair(c)), Sum()(pair(c)), rtol=1e-15, atol=0)


def test_switched_off_thresholds_give_the_sum():
    jacobian = gradients(4)[0]
    off = ConflictResolver(thresholds=(-1.0, -1.0, -1.0))
    torch.testing.assert_close(off(jacobian), Sum()(jacobian), rtol=1e-14, atol=0)
    assert not torch.allclose(ConflictResolver()(jacobian), Sum()(jacobian), rtol=1e-3)


@pytest.mark.parametrize("power", [0.5, 2.0, 7.0])
def test_at_minus_one_half_it_is_pcgrad_for_any_power(power):
    jacobian = pair(-0.5)
    torch.testing.assert_close(
        ConflictResolver(power=power)(jacobian), PCGrad()(jacobian), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("c", [-0.81, -0.95])
def test_critical_winner_keeps_its_gradient_and_the_loser_is_orthogonal_to_it(c):
    for jacobian in (pair(c), pair(c).flip(0)):
        direction = ConflictResolver()(jacobian)
        large = jacobian[jacobian.norm(dim=1).argmax()]
        assert float(direction @ large) == pytest.approx(float(large @ large), rel=1e-12)
        assert direction.norm() > large.norm()


def test_after_a_moderate_round_the_loser_is_orthogonal_to_the_old_winner():
    for c in (-0.6, -0.75, -0.9):
        jacobian = pair(c)
        found = ConflictResolver(max_iters=1).resolve(*inner_products([jacobian])[:2])
        (conflict,) = found.conflicts
        assert (conflict.winner, conflict.loser) == (0, 1)
        assert conflict.cosine == pytest.approx(c)
        resolved = torch.tensor(found.coefficients, dtype=torch.float64) @ jacobian
        assert float(resolved[1] @ jacobian[0]) == pytest.approx(0, abs=1e-14)
        assert resolved.norm(dim=1).tolist() == pytest.approx(found.norms)


def test_a_mild_pair_stays_in_conflict_only_above_minus_one_sixth():
    """One round turns c into about c (1 - 2 s), which is negative while s = sin(-pi c) < 1/2."""
    resolver = ConflictResolver(max_iters=3)
    for c, rounds in ((-0.1, 3), (-0.16, 3), (-0.18, 1), (-0.4, 1)):
        found = resolver.resolve(*inner_products([pair(c)])[:2]).conflicts
        assert len(found) == rounds
    s = math.sin(0.1 * math.pi)
    second = resolver.resolve(*inner_products([pair(-0.1)])[:2]).conflicts[1].cosine
    assert second == pytest.approx(-0.1 * (1 + 0.01 * s * s - 2 * s) / (1 - 0.02 * s + 0.01 * s * s))


def test_legacy_zones():
    legacy = ConflictResolver(smooth=False)
    critical, moderate, mild = pair(-0.9), pair(-0.6), pair(-0.3)
    torch.testing.assert_close(legacy(critical), critical[0])
    orthogonal = moderate[1] - (moderate[1] @ moderate[0]) / moderate[0].square().sum() * moderate[0]
    torch.testing.assert_close(legacy(moderate), moderate[0] + orthogonal)
    torch.testing.assert_close(ConflictResolver(smooth=False, max_iters=1)(mild), PCGrad()(mild))


def test_rotation_invariance_and_scale_equivariance():
    jacobian = gradients(4, n=6)[0]
    q, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    resolver = ConflictResolver(max_iters=None)
    torch.testing.assert_close(resolver(jacobian @ q), resolver(jacobian) @ q)
    torch.testing.assert_close(resolver(jacobian * 37.0), resolver(jacobian) * 37.0)


@pytest.mark.parametrize("smooth", [True, False])
def test_dominance_gives_every_fourth_conflict_to_the_other(smooth):
    for c in (-0.95, -0.6):
        run = WithMemory(dominance_window=3, smooth=smooth, max_iters=1)
        winners = [run.step(pair(c))[1].conflicts[0].winner for _ in range(9)]
        assert winners == [0, 0, 0, 1, 0, 0, 0, 1, 0]
        off = WithMemory(smooth=smooth, max_iters=1)
        assert {off.step(pair(c))[1].conflicts[0].winner for _ in range(5)} == {0}


def test_raw_and_resolved_references_differ_as_the_published_code_does():
    """The rotated reference of a loser lowers its stability, so that the incumbent keeps winning (trap 2)."""
    found = {}
    for kept in ("raw", "resolved"):
        run = WithMemory(stability_reference=kept)
        first = run.step(pair(-0.9, sizes=(1.0, 1.5)))[
            1
        ]  # the second wins, the first is rotated by 64 degrees
        assert first.conflicts[0].winner == 1
        found[kept] = run.step(pair(-0.9, sizes=(1.5, 1.0)))[1]
    assert found["raw"].stability == pytest.approx([1.0, 1.0])
    assert found["raw"].conflicts[0].winner == 0  # equally stable: now the first is the stronger
    assert found["resolved"].stability == pytest.approx([math.sqrt(1 - 0.81), 1.0])
    assert found["resolved"].conflicts[0].winner == 1  # the incumbent goes on winning


def test_stability_outweighs_strength_and_negative_stability_counts_as_none():
    old, aside = pair(-0.9, (1.0, 1.0)), torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    for before in (aside, -old[1]):  # of the second: no relation to its next one, or its opposite
        run = WithMemory()
        run.step(torch.stack([old[0], before]))
        found = run.step(pair(-0.9, (1.0, 3.0)))[1]
        assert found.stability == pytest.approx([1.0, 0.0 if before is aside else -1.0])
        assert found.conflicts[0].winner == 0  # the larger gradient loses to the one that keeps its direction
    new = pair(-0.9, (1.0, 3.0))
    for larger, jacobian in enumerate((new.flip(0), new)):  # neither keeps its direction: the larger wins
        run = WithMemory()
        run.step(torch.stack([aside, -new[1]] if larger else [-new[1], aside]))
        assert run.step(jacobian)[1].conflicts[0].winner == larger


def test_running_means_begin_at_one_or_are_corrected():
    jacobian = pair(-0.9, (1e-3, 2e-3))
    plain, corrected = WithMemory(), WithMemory(ema_bias_correction=True)
    for _ in range(10):
        (_, a), (_, b) = plain.step(jacobian), corrected.step(jacobian)
    assert a.memory.averages == pytest.approx([0.95**10 + (1 - 0.95**10) * s for s in (1e-3, 2e-3)])
    assert b.memory.averages == pytest.approx([(1 - 0.95**10) * s for s in (1e-3, 2e-3)])
    assert a.conflicts[0].winner == 1  # the larger, for about 130 steps
    assert b.conflicts[0].winner == 0  # both are as large as ever: a tie


def test_norm_cap_shortens_before_the_resolution():
    jacobian = pair(0.5, (4.0, 0.5))
    capped = ConflictResolver(norm_cap=1.0)(jacobian)
    torch.testing.assert_close(capped, jacobian[0] / 4 + jacobian[1])
    torch.testing.assert_close(ConflictResolver(norm_cap=1.0)(jacobian[:1]), jacobian[0] / 4)


# --- hostile matrices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_half_precision_is_read_in_float32(dtype):
    jacobian = gradients(3, n=50)[0].to(dtype)
    direction = ConflictResolver()(jacobian)
    assert direction.dtype == dtype
    torch.testing.assert_close(
        direction.double(), ConflictResolver()(jacobian.double()), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e22, 1e30])
def test_float32_gradients_whose_squares_leave_the_range(scale):
    jacobian = gradients(3, n=20)[0]
    expected = ConflictResolver()(jacobian)
    small = (jacobian * scale).float()
    torch.testing.assert_close(ConflictResolver()(small).double() / scale, expected, rtol=1e-5, atol=1e-5)


def test_sizes_may_differ_by_many_orders():
    """Norms of 1e-5 conflict as well: the test for zero is relative (trap 4)."""
    jacobian = pair(-0.9, (1e-5, 1e-9))
    direction = ConflictResolver()(jacobian)
    loser = jacobian[1] - (jacobian[1] @ jacobian[0]) / jacobian[0].square().sum() * jacobian[0]
    torch.testing.assert_close(direction - jacobian[0], loser, rtol=1e-6, atol=1e-20)


def test_zero_and_nearly_zero_gradients_take_part_in_nothing():
    jacobian = torch.cat([pair(-0.9), torch.zeros(1, 3, dtype=torch.float64)])
    found = ConflictResolver(max_iters=None).resolve(*inner_products([jacobian])[:2])
    assert {found.conflicts[0].winner, found.conflicts[0].loser} == {0, 1}
    assert found.weights[2] == 1.0
    tiny = torch.cat([pair(-0.9), -1e-15 * pair(-0.9)[:1]])
    torch.testing.assert_close(
        ConflictResolver()(tiny), ConflictResolver()(pair(-0.9)), rtol=1e-12, atol=1e-12
    )
    assert torch.equal(ConflictResolver()(torch.zeros(3, 4)), torch.zeros(4))
    assert torch.equal(ConflictResolver()(torch.zeros(0, 4)), torch.zeros(4))
    assert ConflictResolver()(torch.zeros(2, 0)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parallel_and_opposite_gradients(dtype):
    row = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.testing.assert_close(ConflictResolver()(torch.cat([row, 2 * row])), 3 * row[0])
    opposed = ConflictResolver(max_iters=None)(torch.cat([-2 * row, row, row]))
    torch.testing.assert_close(opposed, -2 * row[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(ConflictResolver()(torch.cat([row, -row])), row[0], rtol=1e-3, atol=1e-3)


@given(
    data=st.lists(
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3),
        min_size=1,
        max_size=5,
    )
)
def test_any_finite_matrix_gives_a_finite_direction_no_longer_than_its_parts(data):
    jacobian = torch.tensor(data, dtype=torch.float64)
    direction = ConflictResolver(max_iters=None)(jacobian)
    assert bool(direction.isfinite().all())
    assert float(direction.norm()) <= float(jacobian.norm(dim=1).sum()) * (1 + 1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_named(bad):
    jacobian = gradients(3)[0]
    jacobian[1, 2] = bad
    with pytest.raises(NonFiniteError, match="matrix must be finite, got NaN or Inf in row 1"):
        ConflictResolver()(jacobian)


# --- with TorchJD --------------------------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    trunk = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh()).double()
    heads = [torch.nn.Linear(6, 1).double() for _ in range(3)]
    return trunk, heads, torch.randn(9, 5, dtype=torch.float64)


def losses_of(trunk, heads, x):
    features = trunk(x)
    return features, [((-1) ** k * head(features)).exp().mean() for k, head in enumerate(heads)]


def test_mtl_backward_and_both_forms_of_jac_to_grad():
    found = {}
    for optimized in (False, True):
        trunk, heads, x = network()
        features, losses = losses_of(trunk, heads, x)
        mtl_backward(losses, features=features)
        weights = jac_to_grad(trunk.parameters(), ConflictResolver(), optimize_gramian_computation=optimized)
        found[optimized] = [p.grad for p in trunk.parameters()]
        assert weights.shape == (3,)
    trunk, heads, x = network()
    rows = []
    for loss in losses_of(trunk, heads, x)[1]:
        grads = torch.autograd.grad(loss, list(trunk.parameters()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    wanted = ConflictResolver()(torch.stack(rows))
    assert not torch.allclose(wanted, torch.stack(rows).sum(0), rtol=1e-3)
    for grads in found.values():
        torch.testing.assert_close(torch.cat([g.flatten() for g in grads]), wanted)


def test_backward_and_autogram():
    trunk, heads, x = network()
    backward(losses_of(trunk, heads, x)[1], inputs=list(trunk.parameters()))
    jac_to_grad(trunk.parameters(), ConflictResolver())
    wanted = [p.grad for p in trunk.parameters()]
    trunk, heads, x = network()
    engine = Engine(trunk, batch_dim=None)
    losses = torch.stack(losses_of(trunk, heads, x)[1])
    weights = ConflictResolver().gramian_weighting(engine.compute_gramian(losses))
    losses.backward(weights)
    for p, grad in zip(trunk.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"thresholds": (-1.5, -0.8, 0.0)}, ValueError, r"thresholds must ascend within \[-1, 1\], got"),
        ({"thresholds": (-0.5, 0.0)}, ValueError, r"thresholds must be \(critical, main, weak\), got"),
        ({"thresholds": -0.5}, ValueError, "thresholds must be"),
        ({"power": 0.0}, ValueError, "power must be > 0, got 0"),
        ({"smooth": "yes"}, ValueError, "smooth must be one of True, False"),
        ({"arbiter_weights": (-1.0, 1.0)}, ValueError, "arbiter_weights must be >= 0, got -1"),
        ({"stability_reference": "Raw"}, ValueError, "Did you mean 'raw'"),
        ({"ema_decay": 1.1}, ValueError, r"ema_decay must be in \[0, 1\], got 1.1"),
        ({"zero_tolerance": -1.0}, ValueError, "zero_tolerance must be >= 0, got -1"),
        ({"power": "2"}, TypeError, "power must be a number"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        ConflictResolver(**options)


def test_foreign_memory_and_other_shapes_are_refused():
    resolver = ConflictResolver()
    with pytest.raises(ValueError, match="memory must be that of 2 tasks, got one of 3"):
        resolver.resolve([1.0, 1.0], [[1.0, 0.0], [0.0, 1.0]], memory=resolver.start(3))
    with pytest.raises(ValueError, match="dimension 2"):
        resolver(torch.ones(3))
