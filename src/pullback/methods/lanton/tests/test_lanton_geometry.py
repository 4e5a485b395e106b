"""Norms and their duals against exact singular values, and one Newton-Schulz iteration for all layers of a shape."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pullback.methods.lanton import geometry
from pullback.methods.lanton.tests import reference

SHAPES = [(5, 5), (3, 7), (7, 3), (4, 2, 3, 3), (1, 6), (6, 1)]


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(m, n, values, seed=0):
    u, _, v = torch.linalg.svd(drawn(m, n, seed=seed), full_matrices=False)
    return (u * torch.as_tensor(values, dtype=torch.float64)) @ v


# --- exact ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", geometry.GEOMETRIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dual_norm_is_the_largest_product_with_a_step_of_norm_one(kind, shape):
    g = drawn(*shape)
    step = geometry.lmo(g, kind)
    dual = geometry.dual_norms([g], kind, exact=True).item()
    assert dual == pytest.approx(-(g * step).sum().item(), rel=1e-10)
    assert dual == pytest.approx(reference.dual(g, kind), rel=1e-6)
    assert torch.allclose(step, reference.direction(g, kind), atol=1e-10)
    m = step.reshape(step.shape[0], -1)
    primal = {
        "spectral": math.sqrt(m.shape[1] / m.shape[0]) * torch.linalg.matrix_norm(m, 2),
        "sign": step.abs().max(),
        "rms": step.square().mean().sqrt(),
    }[kind]
    assert primal.item() == pytest.approx(1.0, rel=1e-10)
    for seed in range(1, 20):  # no other step of norm 1 goes further down
        other = geometry.lmo(drawn(*shape, seed=seed), kind)
        assert (g * other).sum() >= (g * step).sum() - 1e-12


@pytest.mark.parametrize("rule", geometry.LENGTHS)
def test_dual_norm_carries_the_length_of_the_step(rule):
    for shape in ((3, 12), (12, 3)):
        g = drawn(*shape)
        dual = geometry.dual_norms([g], "spectral", rule=rule, exact=True).item()
        assert dual == pytest.approx(-(g * geometry.lmo(g, "spectral", rule)).sum().item(), rel=1e-10)
    wide, tall = (geometry.length("spectral", shape, rule) for shape in ((3, 12), (12, 3)))
    wanted = {
        "spectral_unclamped": (0.5, 2.0),
        "original": (1.0, 2.0),
        "match_rms_adamw": (0.2 * 12**0.5,) * 2,
    }
    assert (wide, tall) == pytest.approx(wanted[rule])


def test_a_zero_gradient_gives_no_step():
    for kind in geometry.GEOMETRIES:
        assert not geometry.lmo(torch.zeros(3, 4), kind).any()
        assert geometry.dual_norms([torch.zeros(3, 4)], kind).item() == 0.0
    low = with_spectrum(4, 6, [2.0, 1.0, 0.0, 0.0])
    assert torch.linalg.matrix_rank(geometry.polar(low)) == 2


def test_what_has_no_geometry_is_refused():
    with pytest.raises(ValueError, match=r"geometry must be one of 'spectral', .*got 'nuclear'"):
        geometry.lmo(torch.ones(2, 2), "nuclear")  # ty: ignore[invalid-argument-type]
    with pytest.raises(TypeError, match="gradient must be a floating tensor"):
        geometry.lmo(torch.ones(2, 2, dtype=torch.int64), "sign")


# --- the estimate of the nuclear norm --------------------------------------------------------------------


def polynomial(x):
    for a, b, c in geometry.MINIMAX:
        x = a * x + b * x**3 + c * x**5
    return x


def test_the_polynomial_is_within_its_bound_of_one():
    x = torch.logspace(math.log10(0.05), 0, 20_001, dtype=torch.float64)
    worst = (polynomial(x) - 1).abs().max().item()
    assert 0.015 < worst <= 0.0194
    small = torch.linspace(0, 0.05, 1001, dtype=torch.float64)
    assert polynomial(small).min() >= 0  # a singular value is never counted against the others
    assert polynomial(small).max() <= 1.0194
    assert (polynomial(torch.linspace(1, 1.03, 99)) - 1).abs().max() < 0.1  # what rounding may lead to


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 9), (6, 6), (24, 60)])
def test_the_estimate_is_the_polynomial_of_exact_singular_values(m, n):
    x = torch.stack([drawn(m, n, seed=seed) for seed in range(3)])
    s = torch.linalg.svdvals(x)
    c = s.pow(4).sum(-1, keepdim=True).pow(0.25)
    wanted = (s * polynomial(s / c)).sum(-1)
    assert torch.allclose(geometry.nuclear_norms(x), wanted, rtol=1e-9)


SPECTRA = {
    "gaussian": None,
    "equal": [1.0] * 48,
    "rank 1": [1.0] + [0.0] * 47,
    "rank 4": [1.0] * 4 + [0.0] * 44,
    "power": [(i + 1.0) ** -1 for i in range(48)],
    "exponential": [0.9**i for i in range(48)],
}


@pytest.mark.parametrize("name", SPECTRA)
def test_the_estimate_against_exact_singular_values(name):
    values = SPECTRA[name]
    x = (drawn(48, 96) if values is None else with_spectrum(48, 96, values)).float()[None]
    exact = geometry.nuclear_norms(x, exact=True).item()
    assert exact == pytest.approx(reference.dual(x[0].double(), "spectral") * math.sqrt(2), rel=1e-4)
    assert geometry.nuclear_norms(x).item() == pytest.approx(exact, rel=0.05)
    assert geometry.nuclear_norms(x, dtype=torch.bfloat16).item() == pytest.approx(exact, rel=0.09)


def test_a_long_tail_of_small_singular_values_is_counted_in_part():
    x = with_spectrum(256, 256, [(i + 1.0) ** -1 for i in range(256)])[None]
    assert 0.7 < geometry.nuclear_norms(x).item() / geometry.nuclear_norms(x, exact=True).item() < 0.9


@given(scale=st.sampled_from([1e-35, 1e-20, 1e-10, 1.0, 1e10, 1e20, 1e35]))
def test_the_estimate_is_homogeneous_over_the_range_of_float32(scale):
    x = drawn(1, 6, 9, dtype=torch.float32)
    one = geometry.nuclear_norms(x).item()
    assert geometry.nuclear_norms(x * scale).item() == pytest.approx(one * scale, rel=1e-4)


# --- batches ---------------------------------------------------------------------------------------------


def test_matrices_and_their_transposes_share_a_batch_and_come_back_in_their_shapes():
    tensors = [drawn(4, 6), drawn(6, 4, seed=1), drawn(6, 2, 2, seed=2), drawn(3, 3), drawn(4, 6, seed=3)]
    found = geometry.batches(tensors)
    assert found == [([0, 4, 1, 2], 2), ([3], 1)]
    for rows, wide in found:
        some = [tensors[i] for i in rows]
        batch = geometry.stacked(some, wide)
        assert batch.shape[1] <= batch.shape[2]
        back = geometry.unstacked(batch, [t.shape for t in some], wide)
        assert all(torch.equal(a, b) for a, b in zip(back, some, strict=True))


def test_batches_are_bounded_and_lose_nothing():
    tensors = [torch.zeros(4, 5) if i % 3 else torch.zeros(5, 4) for i in range(10)] + [torch.zeros(100, 100)]
    found = geometry.batches(tensors, limit=60)
    assert sorted(i for rows, _ in found for i in rows) == list(range(11))
    assert max(len(rows) for rows, _ in found) == 3
    for rows, wide in found:
        assert [tensors[i].shape[0] <= tensors[i].shape[1] for i in rows] == [
            i < wide for i in range(len(rows))
        ]
    assert geometry.pieces(tensors, limit=45) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]


def test_other_dtypes_stay_apart():
    assert len(geometry.batches([torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64)])) == 2


def test_one_iteration_serves_all_layers_of_a_shape(monkeypatch):
    calls, plain = [], geometry.newton_schulz
    monkeypatch.setattr(geometry, "newton_schulz", lambda x, **how: calls.append(x.shape) or plain(x, **how))
    params = (
        [torch.zeros(8, 32) for _ in range(5)] + [torch.zeros(32, 8) for _ in range(4)] + [torch.zeros(8, 8)]
    )
    geometry.step_(params, [drawn(*p.shape, dtype=torch.float32) for p in params], "spectral", lr=0.1)
    assert sorted(calls) == [(1, 8, 8), (9, 8, 32)]


def test_newton_schulz_is_torchs():
    from torch.optim._muon import _zeropower_via_newtonschulz as torchs

    x = torch.stack([drawn(16, 24, seed=seed, dtype=torch.float32) for seed in range(4)])
    got = geometry.newton_schulz(x, dtype=torch.bfloat16)
    wanted = torch.stack([torchs(each, geometry.QUINTIC, 5, 1e-7) for each in x])
    assert got.dtype == torch.bfloat16
    assert (got.float() - wanted.float()).abs().max() <= 0.02
    fine = geometry.newton_schulz(x)
    values = torch.linalg.svdvals(fine)
    assert 0.6 < values.min() <= values.max() < 1.25
    overlap = (fine * geometry.polar(x)).sum((-2, -1)) / fine.norm(dim=(-2, -1)) / 4
    assert overlap.min() > 0.97
