"""The model's predictive distribution: its negative log-likelihood, and labels drawn from it."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from pullback.core.checks import instance, shown

Kind: TypeAlias = Literal["auto", "categorical", "bernoulli", "gaussian"]
KINDS: tuple[Kind, ...] = ("auto", "categorical", "bernoulli", "gaussian")
IGNORED = -100
"""Label of an entry that carries no loss, as in ``torch.nn.functional.cross_entropy``."""


class Likelihood:
    """The distribution of ``y`` given the model's output ``out``; one *term* is one independent observation.

    Categorical: ``y`` holds classes [B, ...], ``out`` logits [B, C, ...] (as ``cross_entropy``) or [B, ..., C]; every
    label that is not -100 is a term. Bernoulli: ``out`` holds logits of the shape of ``y``; Gaussian: means, variance
    1. For these every row of the batch is a term.

    Args:
        out: output of the model; it may have a graph.
        y: real labels.
        kind: ``"auto"`` takes categorical for labels of an integer dtype, else Gaussian.

    Raises:
        TypeError: if ``out`` or ``y`` is no tensor, or ``out`` is not real and floating.
        ValueError: if their shapes do not fit, a class is out of range, or there is no term.
    """

    def __init__(self, out: Any, y: Any, kind: Kind = "auto") -> None:
        instance(
            "the model's output", out, Tensor, fix="Wrap the model so that it returns its logits or means."
        )
        instance("y", y, Tensor)
        if not out.is_floating_point():
            raise TypeError(f"the model's output must be floating, got {out.dtype}. Return logits or means.")
        if kind == "auto":
            kind = "gaussian" if y.is_floating_point() else "categorical"
        self.kind = kind
        self.y = y.detach()
        self.out = out if out.dtype == torch.float64 else out.float()
        if kind == "categorical":
            self.out, self.y = _classes(self.out, self.y)
            self.terms = int((self.y != IGNORED).sum())
        else:
            if out.shape != y.shape:
                raise ValueError(
                    f"y must have the shape of the model's output for a {kind} likelihood, got {tuple(y.shape)} and "
                    f"{tuple(out.shape)}. Classes as integers are taken for a categorical one."
                )
            self.y = self.y.to(self.out.dtype)
            self.terms = len(y) if y.dim() else 1
        if self.terms == 0 or out.numel() == 0:
            raise ValueError(f"y must hold at least one label, got {shown(y)}. Leave empty batches out.")

    def negative_log(self, y: Tensor | None = None) -> Tensor:
        """Sum over all terms of ``-ln p(y | out)`` up to a constant, 0-dim; ``y`` None: the real labels."""
        labels = self.y if y is None else y
        if self.kind == "categorical":
            return F.cross_entropy(self.out, labels, reduction="sum", ignore_index=IGNORED)
        if self.kind == "bernoulli":
            return F.binary_cross_entropy_with_logits(self.out, labels, reduction="sum")
        return 0.5 * (self.out - labels).square().sum()

    @torch.no_grad()
    def sample(self, generator: torch.Generator) -> Tensor:
        """Labels drawn from the model, in the form that `negative_log` takes; entries without a loss stay so."""
        if self.kind == "categorical":
            drawn = torch.multinomial(self.out.softmax(1), 1, generator=generator)[:, 0]
            return torch.where(self.y == IGNORED, self.y, drawn)
        if self.kind == "bernoulli":
            return torch.bernoulli(self.out.sigmoid(), generator=generator)
        noise = torch.randn(self.out.shape, generator=generator, dtype=self.out.dtype, device=self.out.device)
        return self.out + noise


def _classes(out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, C] and labels [N]."""
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(
            f"y must hold classes of an integer dtype, got {y.dtype}. Use y.long(), or another likelihood."
        )
    if out.dim() >= 1 and y.dim() == out.dim() - 1:
        if out.dim() > 1 and out.shape[:1] + out.shape[2:] == y.shape:
            out = out.movedim(1, -1)
        if out.shape[:-1] == y.shape:
            logits, labels = out.reshape(-1, out.shape[-1]), y.reshape(-1).long()
            wrong = ((labels < 0) & (labels != IGNORED)) | (labels >= logits.shape[1])
            if bool(wrong.any()):
                raise ValueError(
                    f"y must hold classes from 0 to {logits.shape[1] - 1} (or -100), got "
                    f"{int(labels[wrong][0])}. Check the labels or the width of the model's output."
                )
            return logits, labels
    raise ValueError(
        f"y must hold one class for each vector of logits, got shape {tuple(y.shape)} for an output of shape "
        f"{tuple(out.shape)}. Logits are [B, C, ...] or [B, ..., C]."
    )
