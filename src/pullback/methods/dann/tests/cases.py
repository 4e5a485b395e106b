"""What the contracts need to know of this room's components."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pullback.core import schedules
from pullback.methods.dann import DomainAdversarialLoss, GradientReversal, ShallowDANN
from pullback.testing import Case

_reversal: Any = GradientReversal  # with arguments of wrong types, which must be refused
_loss: Any = DomainAdversarialLoss


class _Head(nn.Module):
    """A domain head with fixed weights, so that every build is equal and the dtype follows the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1.0, 1.0, 8, dtype=torch.float64))

    def forward(self, x):
        return torch.tanh(x) @ self.weight.to(x.dtype)


def _two_domains(generator, dtype):
    def draw():
        return torch.randn(4, 8, generator=generator, dtype=torch.float64).to(dtype)

    return draw(), draw() + 0.5


def _blobs(generator):
    labels = torch.arange(60) % 2
    points = torch.randn(60, 4, generator=generator, dtype=torch.float64) + 6.0 * labels[:, None]
    return points.numpy(), labels.numpy()


CASES = (
    Case(
        name="GradientReversal",
        kind="signal",
        build=lambda: GradientReversal(lam=0.5),
        neutral=lambda: GradientReversal(lam=-1.0),
        backward=lambda grad, x: (-0.5 * grad,),
        bad=(
            lambda: GradientReversal(lam=float("nan")),
            lambda: _reversal(lam="strong"),
            lambda: GradientReversal(clip=0.0),
        ),
    ),
    Case(
        name="GradientReversal[scheduled]",
        kind="signal",
        build=lambda: _moved(GradientReversal(lam=schedules.dann(gamma=0.0, low=0.25))),
        backward=lambda grad, x: (-0.25 * grad,),
    ),
    Case(
        name="DomainAdversarialLoss",
        kind="objective",
        # strength -1 passes the gradient as it is, so that finite differences agree with it
        build=lambda: DomainAdversarialLoss(_Head(), GradientReversal(lam=-1.0)),
        inputs=_two_domains,
        bad=(lambda: _loss(_Head(), forward="both"),),
    ),
    Case(
        name="ShallowDANN",
        kind="learner",
        build=lambda: ShallowDANN(hidden=4, lr=0.1, epochs=20),
        data=_blobs,
    ),
)


def _moved(grl):
    grl.progress(0.5)
    return grl
