"""What the contracts need to know of this room's components."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pullback.core.kinds import Objective, Probe
from pullback.methods.paced import BetaKernel, distillation_loss, gradient_snr
from pullback.testing import Case

_kernel: Any = BetaKernel  # with arguments of wrong types, which must be refused


class BetaKernelOfEighths(BetaKernel):
    """A kernel whose rates come as whole eighths: no input of the contract's that wants a gradient."""

    def forward(self, loss, eighths):  # ty: ignore[incompatible-method-override]
        ids = torch.arange(len(loss)) if self.normalize == "pool-mean" else None
        return super().forward(eighths.double() / 8, loss, ids)


class Distillation(Objective):
    """`distillation_loss` as a module, with a teacher of its own; ``how`` are its keywords."""

    teacher: torch.Tensor

    def __init__(self, reduction: Any = "mean", **how: Any):
        super().__init__()
        self.reduction, self.how = reduction, how
        spread = torch.linspace(-2.0, 2.0, 5, dtype=torch.float64)
        self.register_buffer("teacher", torch.stack([spread, -spread, spread.abs(), torch.zeros(5).double()]))

    def forward(self, student, mask):
        teacher = self.teacher.to(student.dtype).expand(len(student), -1, -1)
        return distillation_loss(student, teacher, mask, reduction=self.reduction, **self.how)


class SNR(Probe):
    """`gradient_snr` as a probe of one group."""

    def __init__(self, vectorize=True):
        self.vectorize = vectorize

    def __repr__(self):
        return f"SNR(vectorize={self.vectorize})"

    def __call__(self, model, *batch):
        def loss(call, inputs):
            return call(*inputs).square().sum()

        return gradient_snr(loss, model, {"all": batch}, vectorize=self.vectorize, bootstrap=20)


def _losses(generator, dtype):
    loss = torch.randn(6, generator=generator, dtype=torch.float64).to(dtype)
    return loss, torch.tensor([1, 4, 7, 2, 5, 3])


def _some_zero(generator, dtype):
    loss, _ = _losses(generator, dtype)
    return loss, torch.tensor([4, 0, 7, 8, 5, 0])


def _logits(generator, dtype):
    student = torch.randn(4, 4, 5, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    return student, mask


def _model():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def _objective(name, build, inputs, **facts):
    return Case(name=name, kind="objective", build=build, inputs=inputs, **facts)


CASES = (
    _objective(
        "BetaKernel",
        BetaKernelOfEighths,
        _losses,
        neutral=lambda: BetaKernelOfEighths(alpha=0.0, beta=0.0),
        baseline=lambda loss, eighths: loss.mean(),
        bad=(
            lambda: BetaKernel(alpha=-0.5),
            lambda: BetaKernel(beta=-1.0),
            lambda: BetaKernel(alpha=float("inf")),
            lambda: _kernel(normalize="pool"),
            lambda: _kernel(reduction="average"),
            lambda: _kernel(nonfinite="ignore"),
            lambda: _kernel(beta=True),
        ),
    ),
    _objective(
        "BetaKernel[batch]", lambda: BetaKernelOfEighths(2.0, 0.5, normalize="batch-mean"), _some_zero
    ),
    _objective("BetaKernel[none]", lambda: BetaKernelOfEighths(normalize="none"), _some_zero),
    _objective("distillation_loss[forward]", Distillation, _logits),
    _objective(
        "distillation_loss[reverse]",
        lambda: Distillation(divergence="reverse_kl", temperature=2.0, chunk=3),
        _logits,
    ),
    _objective(
        "distillation_loss[jsd]", lambda: Distillation(divergence="jsd", beta=0.3, tokens="sum"), _logits
    ),
    Case(name="gradient_snr", kind="probe", build=SNR, model=_model),
    Case(name="gradient_snr[looped]", kind="probe", build=lambda: SNR(vectorize=False), model=_model),
)
