"""Count the bytes that autograd keeps for the backward pass: the one meter behind every claim about memory.

A count is deterministic, so that it can be a test, where the memory of a process is only an impression::

    with SavedBytes(net, images) as meter:
        loss = net(images).sum()
    meter.bytes  # what the graph of ``loss`` holds, beside parameters, buffers and images
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pullback.core.checks import shown

_Key: TypeAlias = tuple[torch.device, int]


class _Kept:
    """What autograd holds in place of a saved tensor; its end of life is the release of that tensor."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedBytes:
    """Meter of the storages that saved tensors keep alive, each counted once however many tensors share it.

    Counted are whole storages (a saved view keeps all of what it views), made by operations that run inside the
    ``with`` block in the same thread. Tensors that a ``torch.autograd.Function`` hides from autograd on its ``ctx`` are
    not seen. Checkpoints (``torch.utils.checkpoint``, not reentrant) count with what they keep, not with what they
    compute again.

    Args:
        *exclude: modules, whose parameters and buffers are not counted, and tensors that are there anyway, such as the
            network's input.

    Raises:
        TypeError: if one of them is neither.
    """

    def __init__(self, *exclude: nn.Module | Tensor) -> None:
        self._there = {key for each in exclude for tensor in _tensors(each) for key, _ in _storages(tensor)}
        self._uses: dict[_Key, int] = {}
        self._sizes: dict[_Key, int] = {}
        self._now = self._peak = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    @property
    def bytes(self) -> int:
        """Bytes that are kept now; it falls when the graph, or the part of it that was gone through, is released."""
        return self._now

    @property
    def peak(self) -> int:
        """Largest value that ``bytes`` had."""
        return self._peak

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of every storage that is kept now, in the order in which they were saved."""
        return tuple(self._sizes.values())

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> _Kept:
        # Detached where it may be: a saved output that is wrapped as it is would hold its own graph for ever.
        kept = _Kept(tensor if tensor.is_leaf else tensor.detach())
        keys = [(key, size) for key, size in _storages(tensor) if key not in self._there]
        for key, size in keys:
            self._uses[key] = self._uses.get(key, 0) + 1
            if self._uses[key] == 1:
                self._sizes[key] = size
                self._now += size
        self._peak = max(self._peak, self._now)
        if keys:
            weakref.finalize(kept, self._release, [key for key, _ in keys]).atexit = False
        return kept

    def _release(self, keys: list[_Key]) -> None:
        for key in keys:
            self._uses[key] -= 1
            if not self._uses[key]:
                del self._uses[key]
                self._now -= self._sizes.pop(key)


def saved_bytes(call: Callable[[], object], *exclude: nn.Module | Tensor) -> int:
    """Bytes that the graph of what ``call()`` returns keeps for the backward pass; see :class:`SavedBytes`.

    Args:
        call: the forward pass; its result is dropped afterwards.
        *exclude: modules and tensors that are not counted.

    Returns:
        The bytes of distinct storages.

    Raises:
        TypeError: if something to exclude is neither a module nor a tensor.
    """
    with SavedBytes(*exclude) as meter:
        out = call()
    kept = meter.bytes
    del out
    return kept


def _tensors(source: object) -> Iterator[Tensor]:
    if isinstance(source, nn.Module):
        yield from source.parameters()
        yield from source.buffers()
    elif isinstance(source, Tensor):
        yield source
    else:
        raise TypeError(
            f"exclude must be modules and tensors, got {shown(source)}. Pass net, or *net.parameters()."
        )


def _storages(tensor: Tensor) -> Iterator[tuple[_Key, int]]:
    """Key and bytes of the storages behind a tensor; tensors without memory (``meta``) have sizes all the same."""
    if tensor.layout is torch.sparse_coo:
        yield from _storages(tensor._indices())
        yield from _storages(tensor._values())
        return
    storage: Any = tensor.untyped_storage()
    yield (tensor.device, storage.data_ptr() or storage._cdata), storage.nbytes()
