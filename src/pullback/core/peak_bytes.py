"""The most memory that tensors take at a time, counted and not timed, on any device."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class PeakBytes(TorchDispatchMode):
    """Largest number of bytes that live at a time in tensors which operations made inside this context.

    A storage counts once, from the operation that made it until nothing refers to it. What an operation takes and
    frees inside itself (workspaces of a library) is not seen.

    Args:
        *given: tensors that do not count: inputs, parameters, what was there before.

    Example:
        >>> import torch
        >>> x = torch.ones(1000)
        >>> with PeakBytes(x) as meter:
        ...     y = (x + 1) * 2
        >>> meter.most
        8000
    """

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {each.untyped_storage().data_ptr() for each in given}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count what is alive after it."""
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            storage = each.untyped_storage() if isinstance(each, Tensor) else None
            if storage is not None and storage.data_ptr() not in self.given:
                self.live[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: row for key, row in self.live.items() if not row[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.live.values()))
        return out
