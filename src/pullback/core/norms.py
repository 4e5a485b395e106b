"""Norms of many gradients together, sharded ones included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def total_norm(tensors: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """Norm of all entries of all tensors, left on the device.

    torch's own function, which this calls, takes neither sharded and plain tensors in one call, nor shards of several
    meshes, nor the largest entry where a rank's shard is empty.

    Args:
        tensors: dense tensors, plain or sharded (DTensor), at least one.
        order: 2 for the Euclidean norm, ``inf`` for the largest absolute value.

    Returns:
        A 0-dim tensor; a DTensor when all of ``tensors`` are shards of one mesh.
    """
    norms = [_of_one_mesh(group, order) for group in by_mesh(tensors)]
    if len(norms) == 1:
        return norms[0]
    return torch.nn.utils.get_total_norm([whole(norm) for norm in norms], norm_type=order)


def by_mesh(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Sort tensors by the device mesh over which they are sharded; plain ones share the place of none."""
    if all(type(tensor) is Tensor for tensor in tensors):
        return [list(tensors)]
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    return list(groups.values())


def whole(value: Tensor) -> Tensor:
    """The number that all shards make together: every rank reads the same one."""
    gather = getattr(value, "full_tensor", None)
    return value if gather is None else gather()


def _of_one_mesh(tensors: list[Tensor], order: float) -> Tensor:
    if order == math.inf:
        tensors = [_largest(tensor) for tensor in tensors]
    return torch.nn.utils.get_total_norm(tensors, norm_type=order)


def _largest(tensor: Tensor) -> Tensor:
    """Reduce a sharded tensor to one entry per rank: a rank whose shard is empty has no largest one of its own."""
    if not hasattr(tensor, "placements"):
        return tensor
    sharded: Any = tensor  # a DTensor, whose module is too slow to import for a type test
    if any(placement.is_partial() for placement in sharded.placements):
        return tensor
    from torch.distributed.tensor import DTensor, Shard

    local = sharded.to_local().abs()
    top = local.max() if local.numel() else local.new_zeros(())
    mesh = sharded.device_mesh
    return DTensor.from_local(top.reshape(1), mesh, [Shard(0)] * mesh.ndim, run_check=False)
