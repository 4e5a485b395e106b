"""Buffers that a cast of the model must not round."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

_Module = nn.Module if TYPE_CHECKING else object


class ExactBuffers(_Module):
    """Mix-in for modules whose floating buffers are coefficients or state, which half precision would round.

    They follow casts of the model, but never below single precision: ``model.half()`` and ``model.bfloat16()`` give
    float32. ``model.to(device)`` moves them. Put it before ``nn.Module`` among the bases.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: each for name, each in self.named_buffers(recurse=False) if each.is_floating_point()}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            dtype = torch.promote_types(new.dtype, torch.float32)
            setattr(self, name, new.to(dtype) if old.is_meta else old.to(new.device, dtype))
        return self
