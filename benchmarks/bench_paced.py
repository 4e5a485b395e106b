"""Paced distillation: what weights cost a step, what leaving examples out saves, and chunked against plain losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from benchmarks.harness import Row, ratio
from torch import Tensor, nn

from pullback.core.peak_bytes import PeakBytes
from pullback.methods.paced import BetaKernel, distillation_loss, rollout

POOL, BATCH, POSITIONS, WIDTH, SYMBOLS = 4000, 32, 32, 128, 2000


class Student(nn.Module):
    """A recurrent student, whose state is also its cache."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(SYMBOLS, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(tokens))[0])

    def with_cache(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        out, state = self.mix(
            self.embed(tokens), None if cache is None else cache.transpose(0, 1).contiguous()
        )
        return self.head(out[:, -1:]), state.transpose(0, 1)


class Batch:
    """One batch, a pool of which half has weight zero, and the steps that are compared."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.student, self.teacher = Student(), torch.randn(BATCH, POSITIONS, SYMBOLS)
        self.tokens, self.kernel = torch.randint(SYMBOLS, (BATCH, POSITIONS)), BetaKernel()
        self.rate = torch.where(torch.arange(POOL) % 2 == 0, 0.5, 0.0)
        self.ids = torch.arange(BATCH)

    def losses(self, rows: Tensor | slice) -> Tensor:
        return distillation_loss(self.student(self.tokens[rows]), self.teacher[rows], reduction="none")

    def plain(self) -> None:
        self.losses(slice(None)).mean().backward()

    def weighted(self) -> None:
        self.kernel(self.rate, self.losses(slice(None)), self.ids).backward()

    def skipping(self) -> None:
        keep = self.kernel.active(self.rate, self.ids)
        self.kernel(self.rate, self.losses(keep), keep, count=BATCH).backward()


def textbook(student: Tensor, teacher: Tensor) -> Tensor:
    """Forward KL without chunks: both log-softmaxes at once."""
    s, t = student.log_softmax(-1), teacher.log_softmax(-1)
    return (t.exp() * (t - s)).sum(-1).mean(1)


def peak(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> int:
    """Peak bytes of a forward and backward pass, the gradient included, the two inputs not."""
    point = student.detach().requires_grad_()
    with PeakBytes(student, teacher) as meter:
        torch.autograd.grad(loss(point, teacher).sum(), point)
    return meter.most


def ratios() -> list[Row]:
    """All rows of this benchmark."""
    batch = Batch()
    student, teacher = torch.randn(2, 8, 128, 8000)
    student.requires_grad_()
    mask = torch.rand(8, 128) < 0.5

    def chunked(x: Tensor, y: Tensor, kept: Tensor | None = None) -> Tensor:
        return distillation_loss(x, y, kept, reduction="none")

    def call(loss: Callable[..., Tensor], *more: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(student, teacher, *more).sum(), student)

    weightless = "step without weights"
    kl, plain_kl = "forward KL and gradient, 1,024 x 8,000 logits", "log_softmax of all at once"
    prompts = torch.randint(SYMBOLS, (8, 16))

    def answers(model: Any, cached: bool) -> Callable[[], object]:
        return lambda: rollout(model, prompts, 8, max_tokens=24, cached=cached)

    return [
        Row("step weighted by a pool of 4,000", weightless, ratio(batch.weighted, batch.plain), bound=1.1),
        Row("step that leaves out the half of weight zero", weightless, ratio(batch.skipping, batch.plain), 0.75),
        Row(kl, plain_kl, ratio(call(chunked), call(textbook)), bound=1.3),
        Row(
            "peak bytes of the same", plain_kl, peak(chunked, student, teacher) / peak(textbook, student, teacher),
            bound=0.5, note="beside the logits themselves",
        ),
        Row(f"{kl}, half masked", plain_kl, ratio(call(chunked, mask), call(textbook))),
        Row(
            "rollouts of 24 tokens with a cache", "without",
            ratio(answers(batch.student.with_cache, True), answers(batch.student, False), repeats=5), bound=0.5,
        ),
    ]  # fmt: skip
