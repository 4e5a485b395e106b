"""Buffers that a cast of the model must not round, and buffers that a measurement must not touch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
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


@contextlib.contextmanager
def buffers_apart(model: nn.Module) -> Generator[None]:
    """Exchange all buffers for copies meanwhile, and put the originals back, also after an exception.

    Writing to the originals and restoring their values would still spoil a graph of the user's that waits for its
    backward pass.
    """
    kept = [(module, dict(module._buffers)) for module in model.modules()]
    copies = {id(each): each.detach().clone() for _, own in kept for each in own.values() if each is not None}
    try:
        for module, own in kept:
            module._buffers.update({name: copies.get(id(each)) for name, each in own.items()})
        yield
    finally:
        for module, own in kept:
            module._buffers.update(own)
