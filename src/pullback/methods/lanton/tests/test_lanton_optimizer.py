"""The optimizer against the literal reference, torch's Muon, and closed forms of its multipliers."""

from __future__ import annotations

import math

import pytest
import torch

from pullback.methods.lanton import LANTON, geometry
from pullback.methods.lanton.layers import auto_alpha, averaged, multipliers
from pullback.methods.lanton.tests import reference

KINDS = ("spectral", "spectral", "sign", "sign", "rms", "rms")
SHAPES = ((4, 6), (6, 4), (5, 3), (2, 3), (7,), (3,))


def drawn(shape, *seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(hash(seed) % 2**31)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def groups_of(params, kinds=KINDS):
    found = {}
    for p, kind in zip(params, kinds, strict=True):
        found.setdefault(kind, []).append(p)
    return [{"params": some, "geometry": kind} for kind, some in found.items()]


def give(params, *seed, scale=1.0):
    for i, p in enumerate(params):
        p.grad = (scale * drawn(p.shape, i, *seed)).to(p.dtype)


def parameters(shapes=SHAPES, dtype=torch.float64):
    return [torch.nn.Parameter(drawn(shape, i, 99).to(dtype)) for i, shape in enumerate(shapes)]


@pytest.fixture
def exactly(monkeypatch):
    """Polar factors by singular values, so that a step is the paper's to the last digits."""
    monkeypatch.setattr(geometry, "newton_schulz", lambda batch, **_: geometry.polar(batch))


# --- the algorithm ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.5, 10.0, math.inf])
@pytest.mark.parametrize("foreach", [True, False])
def test_previous_gradients_follow_the_reference(exactly, alpha, foreach):
    params = parameters()
    wanted = []
    for k in geometry.GEOMETRIES:
        own = [p.detach() for p, kind in zip(params, KINDS, strict=True) if kind == k]
        wanted.append(reference.Lanton(own, [k] * 2, 0.1, (0.8, 0.7), alpha, 0.05))
    optimizer = LANTON(
        groups_of(params), lr=0.1, betas=(0.8, 0.7), alpha=alpha, weight_decay=0.05, exact_noise=True,
        ns_dtype="float64", foreach=foreach,
    )  # fmt: skip
    for step in range(6):
        give(params, step, scale=1 + step)
        optimizer.step()
        rates = []
        for k, expected in zip(geometry.GEOMETRIES, wanted, strict=True):
            rates += expected.step([p.grad for p, kind in zip(params, KINDS, strict=True) if kind == k])
        assert list(optimizer.layer_rates(relative=True).values()) == pytest.approx(rates, rel=1e-5)
    for p, w in zip(params, [w for each in wanted for w in each.w], strict=True):
        assert torch.allclose(p, w, rtol=1e-5, atol=1e-6)
    assert list(optimizer.noise().values()) == pytest.approx(
        [math.sqrt(h) for each in wanted for h in each.h], rel=1e-5
    )


def test_independent_gradients_follow_the_reference(exactly):
    params = parameters(SHAPES[:2])
    wanted = reference.Lanton([p.detach() for p in params], KINDS[:2], 0.1, (0.8, 0.7), 0.5)
    optimizer = LANTON(
        params,
        lr=0.1,
        betas=(0.8, 0.7),
        alpha=0.5,
        difference="independent",
        exact_noise=True,
        ns_dtype="float64",
    )
    for step in range(5):
        give(params, step, 1)
        for p in params:
            p.grad.mul_(4.0)
        other = [p.grad / 4.0 for p in params]
        assert optimizer.measures_next
        optimizer.record_independent(grad_scale=4.0)
        give(params, step, 2)
        gradients = [p.grad.clone() for p in params]
        optimizer.step()
        wanted.step(gradients, independent=other)
    assert all(torch.allclose(p, w, rtol=1e-5, atol=1e-6) for p, w in zip(params, wanted.w, strict=True))
    assert not any("reference_grad" in state for state in optimizer.state.values())


def test_noise_is_measured_every_k_steps_against_the_step_before():
    params = parameters(((4, 6), (4, 6)))
    optimizer = LANTON(params, lr=0.0, alpha=1.0, betas=(0.9, 0.5), noise_every=3, exact_noise=True)
    previous, expected = [torch.zeros(())] * 2, [0.0, 0.0]
    for step in range(8):
        give(params, step)
        optimizer.step()
        if step in {3, 6}:
            for i, p in enumerate(params):
                expected[i] = 0.5 * expected[i] + 0.5 * reference.dual(p.grad - previous[i], "spectral") ** 2
        previous = [p.grad.clone() for p in params]
    assert list(optimizer.noise().values()) == pytest.approx([math.sqrt(h) for h in expected], rel=1e-5)
    assert optimizer.param_groups[0]["measured"] == 2


def test_a_layer_without_gradient_stays_and_counts_for_nothing():
    params = parameters(((4, 6), (4, 6), (4, 6)))
    optimizer = LANTON(params, lr=0.1, alpha=0.1)
    for step in range(3):
        give(params, step)
        params[0].grad *= 0.01  # by far the quietest
        optimizer.step()
    state = {key: value.clone() for key, value in optimizer.state[params[0]].items()}
    kept = params[0].detach().clone()
    give(params, 9)
    params[0].grad = None
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert torch.equal(params[0], kept)
    assert all(torch.equal(value, optimizer.state[params[0]][key]) for key, value in state.items())
    moved = [geometry.dual_norms([p - b], "sign").item() for p, b in zip(params[1:], before[1:], strict=True)]
    noise = torch.stack([optimizer.state[p]["noise"] for p in params[1:]])
    rates = multipliers(noise, 0.1)
    assert rates.max() == 1.0  # the maximum runs over the layers of this step
    assert moved[0] / moved[1] == pytest.approx((rates[0] / rates[1]).item(), rel=0.3)


# --- torch's Muon ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("rule", ["original", "match_rms_adamw"])
def test_without_adaptation_it_is_torchs_muon(nesterov, rule):
    shapes = ((16, 24), (24, 16), (16, 16), (16, 24))
    mine, theirs = (parameters(shapes, torch.float32) for _ in range(2))
    ours = LANTON(
        mine,
        lr=0.05,
        betas=(0.9, 0.9),
        alpha=math.inf,
        nesterov=nesterov,
        weight_decay=0.1,
        adjust_lr_fn=rule,
    )
    muon = torch.optim.Muon(
        theirs, lr=0.05, momentum=0.9, nesterov=nesterov, weight_decay=0.1, adjust_lr_fn=rule
    )
    for step in range(4):
        give(mine, step)
        give(theirs, step)
        ours.step()
        muon.step()
    for a, b in zip(mine, theirs, strict=True):  # bfloat16 rounds both; a wrong factor or sign is far off
        assert (a - b).norm() <= 0.01 * (b - parameters((b.shape,), torch.float32)[0]).norm()
        assert (a - b).abs().max() < 4 * 0.05 * 0.03 * geometry.length("spectral", b.shape, rule)


def test_alpha_inf_one_layer_and_no_measurement_are_bitwise_the_base():
    def run(count=6, **settings):
        params = parameters(SHAPES[:count], torch.float32)
        optimizer = LANTON(groups_of(params, KINDS[:count]), lr=0.1, **settings)
        for step in range(25):
            give(params, step)
            optimizer.step()
        return params

    base = run(noise_every=None)
    assert all(torch.equal(a, b) for a, b in zip(run(alpha=math.inf), base, strict=True))
    assert torch.equal(run(count=1, alpha=1e-3)[0], base[0])
    assert not torch.equal(run(alpha=1e-3)[0], base[0]) or not torch.equal(run(alpha=1e-3)[1], base[1])


# --- multipliers -----------------------------------------------------------------------------------------


def test_multipliers_are_the_closed_form_and_bounded():
    noise = torch.tensor([4.0, 1.0, 100.0])
    for alpha in (1e-3, 1.0, 50.0):
        wanted = [((alpha**2 + 1) / (alpha**2 + h)) ** 0.25 for h in noise.tolist()]
        assert multipliers(noise, alpha).tolist() == pytest.approx(wanted, rel=1e-6)
        assert multipliers(noise, alpha).tolist() == pytest.approx(
            reference.multipliers(noise.tolist(), alpha), rel=1e-6
        )
    assert multipliers(noise, math.inf).tolist() == [1.0, 1.0, 1.0]
    small = multipliers(noise, 1e-6)  # proportional to noise^(-1/2), noise being sqrt(H)
    assert small.tolist() == pytest.approx([0.5**0.5, 1.0, 0.1**0.5], rel=1e-5)
    unknown = torch.tensor([math.nan, 4.0, 1.0])
    assert multipliers(unknown, 1e-6).tolist() == pytest.approx([1.0, 0.5**0.5, 1.0], rel=1e-5)
    for odd in ([math.nan] * 2, [0.0, 0.0], [3.0]):
        assert (multipliers(torch.tensor(odd), 0.1) == 1).all()


def test_every_step_keeps_the_bounds_and_one_layer_at_the_full_rate():
    params = parameters()
    optimizer = LANTON(groups_of(params), lr=0.1, alpha=0.05)
    for step in range(12):
        give(params, step, scale=10.0 ** (step % 5 - 2))
        optimizer.step()
        rates = list(optimizer.layer_rates(relative=True).values())
        assert all(0 < rate <= 1 for rate in rates)
        assert [max(rates[i : i + 2]) for i in (0, 2, 4)] == [1.0, 1.0, 1.0]
    assert min(rates) < 0.99
    assert list(optimizer.layer_rates().values()) == pytest.approx([0.1 * rate for rate in rates])


def test_averaging_starts_at_zero_and_leaves_out_what_is_not_finite():
    noise = torch.tensor([math.nan, 2.0, 2.0, math.nan])
    got = averaged(noise, torch.tensor([3.0, 1.0, math.nan, math.inf]), 0.9)
    assert got[:3].tolist() == pytest.approx([0.9, 1.9, 2.0])
    assert got[3].isnan()


def test_auto_alpha_is_a_share_of_the_median_and_is_fixed_after_twenty_measurements():
    assert auto_alpha(torch.tensor([1.0, 4.0, 100.0, math.nan])).item() == pytest.approx(0.6)
    assert auto_alpha(torch.tensor([math.nan])).item() == math.inf
    params = parameters(((4, 6), (4, 6), (4, 6)))
    optimizer = LANTON(params, lr=0.01)
    for step in range(30):
        give(params, step)
        params[2].grad *= 5
        optimizer.step()
        rates = list(optimizer.layer_rates(relative=True).values())
        if step < 20:
            assert rates == [1.0, 1.0, 1.0]
        if step == 20:
            fixed = optimizer.param_groups[0]["auto_alpha"][0].item()
            assert fixed == pytest.approx(0.3 * sorted(optimizer.noise().values())[1], rel=1e-6)
    assert rates[2] < 0.6
    assert optimizer.param_groups[0]["auto_alpha"].tolist() == pytest.approx([fixed, math.inf, math.inf])


# --- noise -----------------------------------------------------------------------------------------------


def test_independent_gaussian_gradients_give_their_variance():
    levels = (0.5, 1.0, 3.0)
    params = [torch.nn.Parameter(torch.zeros(12, 20, dtype=torch.float64)) for _ in range(3 * len(levels))]
    kinds = [kind for kind in geometry.GEOMETRIES for _ in levels]
    optimizer = LANTON(groups_of(params, kinds), lr=0.0, betas=(0.9, 0.99), alpha=1.0, exact_noise=True)
    for step in range(500):
        for i, p in enumerate(params):
            p.grad = levels[i % 3] * drawn(p.shape, i, step)
        optimizer.step()
    noise = list(optimizer.noise().values())
    for start in (0, 3, 6):
        ratios = [n**2 / s**2 for n, s in zip(noise[start : start + 3], levels, strict=True)]
        assert max(ratios) / min(ratios) < 1.05
    # E ||G_t - G_{t-1}||_F^2 = 2 s^2 d, hence H = 2 s^2 d^2 for the root mean square, whose dual is sqrt(d) ||.||_2
    assert noise[7] ** 2 == pytest.approx(2 * 240**2, rel=0.05)
    c = (noise[0] / levels[0]) ** 2
    wanted = [((1 + c * levels[0] ** 2) / (1 + c * s**2)) ** 0.25 for s in levels]
    assert list(optimizer.layer_rates(relative=True).values())[:3] == pytest.approx(wanted, rel=0.02)


def test_deterministic_gradients_give_no_noise_and_the_full_rate():
    params = parameters(((4, 6), (4, 6)))
    optimizer = LANTON(params, lr=0.0, alpha=0.1, betas=(0.95, 0.5))
    for step in range(60):
        give(params, min(step, 1))  # one jump, then the same gradient for ever
        optimizer.step()
    assert max(optimizer.noise().values()) < 1e-6
    assert list(optimizer.layer_rates(relative=True).values()) == [1.0, 1.0]


@pytest.mark.parametrize("alpha", [0.5, "auto"])
def test_scaling_the_loss_and_alpha_leaves_the_trajectory(alpha):
    def run(scale):
        params = parameters(dtype=torch.float32)
        optimizer = LANTON(groups_of(params), lr=0.05, alpha=alpha if alpha == "auto" else alpha * scale)
        for step in range(26):
            give(params, step, scale=scale)
            optimizer.step()
        return params

    one = run(1.0)
    for scale in (2.0**10, 2.0**-12):
        assert all(torch.equal(a, b) for a, b in zip(run(scale), one, strict=True))


def test_momentum_is_not_what_is_measured():
    params = parameters(((4, 6), (4, 6)))
    seen = []
    for beta in (0.0, 0.99):
        optimizer = LANTON(params, lr=0.0, betas=(beta, 0.5), alpha=1.0)
        for step in range(5):
            give(params, step)
            optimizer.step()
        seen.append(optimizer.noise())
    assert seen[0] == seen[1]
