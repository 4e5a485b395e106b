"""Noise on 200 tensors against one ``torch.randn`` of the same size, and against what peers do."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from benchmarks.harness import Row, ratio
from torch import Tensor

from pullback.methods.gradient_noise import GradientNoise, add_gradient_noise_

ENTRIES = 2_000_000
TENSORS = 200


def parameters(count: int = TENSORS) -> list[torch.nn.Parameter]:
    """``count`` parameters with gradients, ``ENTRIES`` entries in all."""
    params = [torch.nn.Parameter(torch.zeros(ENTRIES // count)) for _ in range(count)]
    for p in params:
        p.grad = torch.zeros_like(p)
    return params


def per_tensor(params: list[torch.nn.Parameter]) -> Callable[[], None]:
    """The usual loop: one ``randn_like`` per gradient."""

    def step() -> None:
        for p in params:
            if p.grad is not None:
                p.grad.add_(torch.randn_like(p.grad), alpha=0.1)

    return step


def bare_step(params: list[torch.nn.Parameter]) -> Callable[[], None]:
    """One attached step: noise, and an optimizer whose own work is small."""
    optimizer = torch.optim.SGD(params, lr=1e-3)
    GradientNoise(0.01).attach(optimizer)
    return optimizer.step


def plain_and_draw(params: list[torch.nn.Parameter], draw: Callable[[], Tensor]) -> Callable[[], None]:
    """The bare optimizer, and the same random numbers in one call."""
    optimizer = torch.optim.SGD(params, lr=1e-3)

    def step() -> None:
        draw()
        optimizer.step()

    return step


def opacus_rows() -> list[Row]:
    """opacus draws its noise per parameter, after per-sample clipping; only the drawing is compared."""
    what, against = "add_gradient_noise_, 200 tensors", "opacus DPOptimizer.add_noise"
    if importlib.util.find_spec("opacus") is None:
        return [Row(what, against, skipped="opacus is not installed")]
    from opacus.optimizers import DPOptimizer

    params = parameters()
    optimizer = DPOptimizer(
        torch.optim.SGD(params, lr=1e-3), noise_multiplier=1.0, max_grad_norm=0.1, expected_batch_size=1
    )
    for p in params:
        p.summed_grad = torch.zeros_like(p)
    mine = parameters()
    return [Row(what, against, ratio(lambda: add_gradient_noise_(mine, 0.1), optimizer.add_noise))]


def optax_rows() -> list[Row]:
    """optax.add_noise, compiled, on the same shapes."""
    what, against = "add_gradient_noise_, 200 tensors", "optax.add_noise (jit)"
    if importlib.util.find_spec("optax") is None:
        return [Row(what, against, skipped="optax is not installed")]
    import jax
    import optax

    transform = optax.add_noise(0.01, 0.55, 0)
    updates = [jax.numpy.zeros(ENTRIES // TENSORS) for _ in range(TENSORS)]
    state, update = transform.init(updates), jax.jit(transform.update)
    mine = parameters()
    call = lambda: jax.block_until_ready(update(updates, state))  # noqa: E731
    return [Row(what, against, ratio(lambda: add_gradient_noise_(mine, 0.1), call))]


def ratios() -> list[Row]:
    """All rows of this benchmark."""
    stream = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(ENTRIES, generator=stream)

    params, noise = parameters(), GradientNoise(0.01)
    big = parameters(1)
    return [
        Row("GradientNoise, 200 tensors of 10,000", "one torch.randn", noise_ratio(noise, params, draw), 1.3),
        Row(
            "add_gradient_noise_, 1 tensor",
            "one torch.randn",
            ratio(lambda: add_gradient_noise_(big, 0.1), draw),
        ),
        Row(
            "GradientNoise, 200 tensors",
            "randn_like per tensor",
            noise_ratio(noise, params, per_tensor(params)),
        ),
        Row(
            "SGD step with GradientNoise attached",
            "SGD step and one torch.randn",
            ratio(bare_step(parameters()), plain_and_draw(parameters(), draw)),
            note="includes the attachment's test for NaN",
        ),
        *opacus_rows(),
        *optax_rows(),
    ]


def noise_ratio(
    noise: GradientNoise, params: list[torch.nn.Parameter], against: Callable[[], object]
) -> float:
    """Ratio of the transform's own edit, without the attachment around it."""
    from pullback.core.kinds import StepBatch

    grads = [p.grad for p in params if p.grad is not None]
    names, indices = [str(i) for i in range(len(params))], list(range(len(params)))
    batch = StepBatch([*params], grads, names, indices, [{}] * len(params), 5)
    return ratio(lambda: noise.pre_step_(batch), against)
