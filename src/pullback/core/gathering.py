"""Plain values of all ranks on every rank."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, distributed


def gather_json(value: Any) -> list[Any]:
    """What every rank passes, in the order of the ranks; ``[value]`` outside a process group.

    Values travel as JSON text in tensors: nothing received is executed.

    Args:
        value: strings, numbers, None and containers of these; every rank must call.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    device = _device()
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(sizes, torch.tensor([len(mine)], device=device))
    longest = max(int(each) for each in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(mine)] = mine
    received = [torch.zeros_like(padded) for _ in sizes]
    distributed.all_gather(received, padded)
    return [_value(each[: int(size)]) for each, size in zip(received, sizes, strict=True)]


def _value(text: Tensor) -> Any:
    return json.loads(bytes(text.tolist()).decode())


def _device() -> torch.device:
    """Where the group's backend wants its tensors."""
    if distributed.get_backend() in {"gloo", "mpi"}:
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")
