"""Buffers that a cast of the model must not round."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

_Module = nn.Module if TYPE_CHECKING else object


class ExactBuffers(_Module):
    """Mix-in for modules whose floating buffers are coefficients or state: they move, but never become narrower.

    ``model.half()`` and ``model.bfloat16()`` leave them as they are; ``model.to(device)`` moves them, and
    ``model.double()`` widens them. Put it before ``nn.Module`` among the bases.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: each for name, each in self.named_buffers(recurse=False) if each.is_floating_point()}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            wide = torch.promote_types(new.dtype, old.dtype)
            setattr(self, name, new.to(wide) if old.is_meta else old.to(new.device, wide))
        return self
