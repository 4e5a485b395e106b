"""Draws: one flat stream whatever the chunks, every dtype and layout, and no trace elsewhere."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch

from pullback.methods.gradient_noise import GradientNoise, add_gradient_noise_
from pullback.methods.gradient_noise.sampling import CHUNK, add_to_bucket_, buckets

SHAPES = [(3,), (50, 7), (), (0, 4), (129,), (16, 16)]


def gradients(dtype=torch.float32):
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=rng).to(dtype) for shape in SHAPES]


def noisy(grads, *, stds=None, **options):
    grads = [g.clone() for g in grads]
    stds = stds or [0.3] * len(grads)
    found = buckets(grads, stds, [str(i) for i in range(len(grads))], list(range(len(grads))))
    for (_, drawn, _), targets in found.items():
        add_to_bucket_(targets, drawn, torch.Generator().manual_seed(7), **options)
    return grads


def parameters(grads):
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return params


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- one stream ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_foreach_equals_the_loop_bitwise(dtype):
    stds = [0.3, 0.3, 0.1, 0.1, 0.0, 0.3]
    loop = noisy(gradients(dtype), stds=stds, foreach=False)
    assert equal(noisy(gradients(dtype), stds=stds, foreach=True), loop)
    assert not equal(gradients(dtype), loop)


@pytest.mark.parametrize("chunk", [16, 64, CHUNK])
def test_noise_is_one_randn_call_whatever_the_chunks(chunk):
    grads = [torch.zeros(shape) for shape in SHAPES]
    total = sum(g.numel() for g in grads)
    flat = torch.cat([g.flatten() for g in noisy(grads, stds=[1.0] * len(grads), chunk=chunk)])
    whole = torch.randn(total, generator=torch.Generator().manual_seed(7))
    assert torch.equal(flat[: total - 16], whole[: total - 16])  # torch draws the last 16 of a call anew
    assert torch.isfinite(flat).all()
    assert flat.count_nonzero() == total


def test_each_gradient_gets_its_own_std():
    grads = [torch.zeros(50_000) for _ in range(4)]
    stds = [0.1, 0.1, 2.0, 0.5]
    assert [g.std().item() for g in noisy(grads, stds=stds)] == pytest.approx(stds, rel=0.02)


def test_equal_shapes_get_independent_noise():
    first, second = noisy([torch.zeros(100_000), torch.zeros(100_000)])
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 4 / math.sqrt(100_000)


def test_steps_and_seeds_get_independent_noise():
    def draw(seed, t):
        (p,) = parameters([torch.zeros(100_000)])
        noise = GradientNoise(1.0, 0.0, seed=seed)
        noise.steps = t
        noise.update_([p])
        return p.grad

    drawn = torch.stack([draw(0, 0), draw(0, 1), draw(1, 0), draw(1, 1)])
    off_diagonal = torch.corrcoef(drawn) - torch.eye(4)
    assert off_diagonal.abs().max() < 5 / math.sqrt(100_000)
    assert torch.equal(drawn[0], draw(0, 0))


# --- dtypes and layouts --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once_after_the_addition(dtype):
    grads = gradients(dtype)
    exact = noisy([g.float() for g in grads])
    assert equal(noisy(grads), [g.to(dtype) for g in exact])


def test_complex_parts_share_the_variance():
    (noise,) = noisy([torch.zeros(200_000, dtype=torch.complex64)], stds=[0.2])
    assert noise.abs().square().mean().item() == pytest.approx(0.04, rel=0.02)
    assert noise.real.std().item() == pytest.approx(noise.imag.std().item(), rel=0.02)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "strided"])
def test_memory_layout_does_not_change_the_noise(layout):
    plain = torch.zeros(4, 6, 5, 3)
    views = {
        "transposed": torch.zeros(3, 5, 6, 4).permute(3, 2, 1, 0),
        "channels_last": torch.zeros(4, 6, 5, 3).to(memory_format=torch.channels_last),
        "strided": torch.zeros(4, 6, 5, 6)[..., ::2],
    }
    grad = views[layout]
    (target,) = next(iter(buckets([grad], [0.3], ["g"], [0]).values()))
    add_to_bucket_([target], torch.float32, torch.Generator().manual_seed(7))
    assert torch.equal(grad, noisy([plain])[0])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_gradients_get_one_draw_per_stored_entry():
    rows = torch.tensor([[1, 1, 3] * 1000])
    grad = torch.sparse_coo_tensor(rows, torch.ones(3000, 50), (5, 50))
    (p,) = parameters([torch.zeros(5, 50)])
    p.grad = grad
    add_gradient_noise_([p], 0.5, torch.Generator().manual_seed(0))
    assert p.grad.layout is torch.sparse_coo
    noise = p.grad.to_dense() - torch.sparse_coo_tensor(rows, torch.ones(3000, 50), (5, 50)).to_dense()
    assert noise[[0, 2, 4]].abs().max() == 0
    assert noise[[1, 3]].std().item() == pytest.approx(0.5, rel=0.3)  # not 0.5 * sqrt(2000)


def test_other_layouts_are_refused():
    (p,) = parameters([torch.zeros(2, 2)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grad = torch.eye(2).to_sparse_csr()
    with pytest.raises(
        TypeError, match=r"gradient of weight must be dense or sparse COO, got torch.sparse_csr"
    ):
        buckets([grad], [1.0], ["weight"], [0])
    assert not p.grad.any()


# --- the plain function --------------------------------------------------------------------------------


def test_function_takes_modules_mappings_and_tensor_std():
    results = []
    for std in (0.5, torch.tensor(0.5)):
        for form in (lambda m: m, lambda m: dict(m.named_parameters()), lambda m: m.parameters()):
            model = torch.nn.Linear(40, 3)
            grads = [torch.zeros_like(p) for p in model.parameters()]
            for p, grad in zip(model.parameters(), grads, strict=True):
                p.grad = grad
            add_gradient_noise_(form(model), std, torch.Generator().manual_seed(0))
            results.append(torch.cat([g.flatten() for g in grads]))
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(results[0], torch.randn(123, generator=torch.Generator().manual_seed(0)) * 0.5)


def test_function_leaves_out_missing_gradients_and_refuses_bad_std():
    params = parameters([torch.zeros(3), torch.zeros(3)])
    params[0].grad = None
    add_gradient_noise_(params, 1.0)
    assert params[0].grad is None
    assert params[1].grad.all()
    with pytest.raises(ValueError, match=r"std must be >= 0, got -1"):
        add_gradient_noise_(params, -1.0)


# --- no trace ------------------------------------------------------------------------------------------


def test_zero_eta_draws_nothing_and_nothing_moves_the_global_generator(monkeypatch):
    state = torch.get_rng_state()
    GradientNoise(0.5).update_(parameters(gradients()))
    assert torch.equal(torch.get_rng_state(), state)

    def refuse(*args, **kwargs):
        raise AssertionError("a stream was made")

    monkeypatch.setattr("pullback.methods.gradient_noise.noise.generator", refuse)
    params = parameters(gradients())
    params[0].grad[0] = -0.0
    kept = [p.grad.clone() for p in params]
    GradientNoise(0.0).update_(params)
    for p, g in zip(params, kept, strict=True):
        assert torch.equal(p.grad.reshape(-1).view(torch.int32), g.reshape(-1).view(torch.int32))


def test_gradients_are_edited_in_place():
    params = parameters(gradients())
    before = [p.grad.data_ptr() for p in params]
    GradientNoise().update_(params)
    assert [p.grad.data_ptr() for p in params] == before


def test_memory_stays_bounded_by_the_chunk(monkeypatch):
    drawn, empty = [], torch.empty

    def counted(size, **options):
        drawn.append(size)
        return empty(size, **options)

    monkeypatch.setattr(torch, "empty", counted)
    GradientNoise().update_(parameters([torch.zeros(1 << 19) for _ in range(8)]))
    assert drawn == [CHUNK]  # one buffer of 1 MiB for 16 MiB of gradients


# --- steps -------------------------------------------------------------------------------------------


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_resumed_run_is_bitwise_the_uninterrupted_one(make):
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    again = copy.deepcopy(model)
    whole = make(model.parameters(), lr=0.1)
    GradientNoise(0.1, seed=4).attach(whole)
    train(model, whole, 9)
    first = make(again.parameters(), lr=0.1)
    attachment = GradientNoise(0.1, seed=4).attach(first)
    train(again, first, 4)
    resumed = copy.deepcopy(again)
    second = make(resumed.parameters(), lr=0.1)
    second.load_state_dict(first.state_dict())
    other = GradientNoise(0.1, seed=4).attach(second)
    other.load_state_dict(attachment.state_dict())
    train(resumed, second, 5, start=4)
    assert equal(resumed.parameters(), model.parameters())


def test_skipped_scaler_step_leaves_t_unchanged():
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([p], lr=0.1)
    noise = GradientNoise(0.01)
    noise.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor, counted in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
        optimizer.zero_grad()
        scaler.scale(p.sum() * factor).backward()
        before = p.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert noise.steps == counted
        assert torch.equal(before, p) == (factor != 1.0)


def test_parameter_without_gradient_is_left_out():
    params = parameters([torch.zeros(4), torch.zeros(4)])
    params[0].grad = None
    GradientNoise().update_(params)
    assert params[0].grad is None
    assert params[1].grad.all()
