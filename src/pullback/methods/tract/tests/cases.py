"""What the contracts need to know of this room's component."""

from __future__ import annotations

from typing import Any

import torch

from pullback.methods.tract import TrAct
from pullback.testing import Case

_signal: Any = TrAct  # with arguments of wrong types, which must be refused


def _weight_and_samples(generator, dtype):
    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(4, 3), draw(12, 3)


def _few_samples(generator, dtype):
    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(4, 8), draw(5, 8)


def _backward(grad, weight, x):
    """grad C^-1, with an explicit inverse; the samples get no gradient."""
    rows = max(len(x), 1)
    covariance = x.mT @ x / rows + 0.5 * torch.eye(x.shape[-1], dtype=x.dtype)
    return grad @ torch.linalg.inv(covariance), None


def _disabled():
    signal = TrAct(lam=0.5)
    signal.enabled = False
    return signal


CASES = tuple(
    Case(
        name=f"TrAct[{name}]",
        kind="signal",
        build=lambda: TrAct(lam=0.5),
        neutral=_disabled,
        inputs=inputs,
        backward=_backward,
        bad=(
            lambda: TrAct(lam=0.0),
            lambda: TrAct(lam=-0.1),
            lambda: TrAct(lam=float("inf")),
            lambda: _signal(lam="strong"),
            lambda: TrAct(lam=lambda p: 0.0),
        ),
    )
    for name, inputs in (("covariance", _weight_and_samples), ("Gram", _few_samples))
)
