"""Norms over the last axis that compute in float32, how to tell a norm, and a fresh twin of any norm."""

from __future__ import annotations

import copy
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm: TypeAlias = Literal["rms", "layer"]


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 when x is of half precision.

    The result has the wider dtype of input and weight: under autocast the residual stream stays in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., dim]."""
        return F.rms_norm(*_wide(x, self.weight, self.normalized_shape), eps=self.eps).to(
            _out(x, self.weight)
        )


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, in float32 for half precision.

    The result has the wider dtype of input and weight: under autocast the residual stream stays in float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [..., dim]."""
        wide, shape, weight = _wide(input, self.weight, self.normalized_shape)
        bias = None if self.bias is None else self.bias.to(wide.dtype)
        return F.layer_norm(wide, shape, weight, bias, self.eps).to(_out(input, self.weight))


def _wide(x: Tensor, weight: Tensor | None, shape: Any) -> tuple[Tensor, list[int], Tensor | None]:
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else _out(x, weight)
    return x.to(dtype), list(shape), None if weight is None else weight.to(dtype)


def _out(x: Tensor, weight: Tensor | None) -> torch.dtype:
    return x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)


def build_norm(norm: Norm, dim: int, *, eps: float, gain: float = 1.0) -> RMSNorm | LayerNorm:
    """A norm over ``dim`` channels with its gain at ``gain`` (LayerNorm: bias 0)."""
    module = RMSNorm(dim, eps=eps) if norm == "rms" else LayerNorm(dim, eps=eps)
    nn.init.constant_(module.weight, gain)
    return module


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: a class of torch, or any class called so whose parameters are vectors."""
    known = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
    named = type(module).__name__.lower().endswith(("norm", "norm1d", "norm2d"))
    vectors = all(p.dim() <= 1 for p in module.parameters()) and not list(module.children())
    return isinstance(module, known) or (named and vectors)


@torch.no_grad()
def twin_norm(norm: nn.Module, gain: float) -> nn.Module:
    """A fresh norm of the same class, width, eps, device and dtype; its gain is ``gain``, its bias 0.

    A norm that multiplies by 1 + weight (told by its output with a weight of zero) gets the weight ``gain``
    - 1.

    Raises:
        ValueError: if the norm has no gain, or is on the meta device.
    """
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor) and weight.is_meta:
        raise ValueError(
            "model must have its weights, got a norm on the meta device. Materialise it, then convert."
        )
    fresh = copy.deepcopy(norm)
    if type(norm) in (nn.LayerNorm, nn.RMSNorm):
        fresh.__class__ = LayerNorm if type(norm) is nn.LayerNorm else RMSNorm
    for hooks in (fresh._forward_hooks, fresh._forward_pre_hooks, fresh._backward_hooks):
        hooks.clear()
    if not isinstance(weight, Tensor):
        if gain != 1.0:
            raise ValueError(f"gain_init must be 1 where norms have no gain, got {gain!r}. Use affine norms.")
        return fresh
    for name, parameter in fresh.named_parameters():
        parameter.fill_(0.0).requires_grad_(True)
        if name == "weight":
            parameter.add_(gain - 1.0 if _adds_one(norm) else gain)
    return fresh


def _adds_one(norm: nn.Module) -> bool:
    """Whether the norm multiplies by 1 + weight."""
    if isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        return False
    silent = copy.deepcopy(norm).float().cpu()
    for parameter in silent.parameters():
        parameter.zero_()
    width = next(silent.parameters()).numel()
    return bool(silent(torch.linspace(-1.0, 1.0, width)[None]).any())
