"""Which processes average their gradients, for methods that must do it themselves and before anything non-linear."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core.checks import choice


class Ranks:
    """The processes that share one training run, and the DistributedDataParallel modules that would reduce for them.

    Args:
        source: what the user passed as parameters; a module is searched for DistributedDataParallel.
        process_group: ``"auto"`` takes the group of such a module, a group is taken as it is, None never reduces.

    Raises:
        TypeError: if the source is sharded by FSDP.
        ValueError: if several processes run and ``"auto"`` finds no DistributedDataParallel module.
    """

    def __init__(self, source: object, process_group: Any = "auto") -> None:
        self._replicas = _replicas(source)
        self._group: Any = None
        self.world = 1
        running = torch.distributed.is_available() and torch.distributed.is_initialized()
        if isinstance(process_group, str):
            choice("process_group", process_group, ("auto",), fix="Pass 'auto', a process group, or None.")
            if not running:
                return
            if not self._replicas and torch.distributed.get_world_size() > 1:
                raise ValueError(
                    f"process_group must be given when {torch.distributed.get_world_size()} processes run and params "
                    "holds no DistributedDataParallel module, got 'auto'. Pass the wrapped module as params, a group, "
                    "or None where every rank works alone."
                )
            process_group = self._replicas[0].process_group if self._replicas else None
        if process_group is not None:
            self._group = process_group
            self.world = torch.distributed.get_world_size(process_group)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over all ranks; the same on all of them."""
        if self.world > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor, group=self._group)

    @contextlib.contextmanager
    def no_sync(self) -> Generator[None]:
        """Keep DistributedDataParallel from reducing gradients in forward and backward passes of the block."""
        with contextlib.ExitStack() as stack:
            for replica in self._replicas:
                stack.enter_context(replica.no_sync())
            yield


def _replicas(source: object) -> list[Any]:
    if not isinstance(source, nn.Module):
        return []
    found = []
    for module in source.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise TypeError(
                "params must be held whole by every process, got FullyShardedDataParallel. Use DistributedDataParallel."
            )
        if torch.distributed.is_available() and isinstance(module, nn.parallel.DistributedDataParallel):
            found.append(module)
    return found
