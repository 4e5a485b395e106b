"""Norms of many blocks of parameters at once, and their multiplication by one factor each, without a host read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from pullback.core.checks import shown
from pullback.core.kinds.transform import Parameters
from pullback.core.parameters import named_parameters

Per: TypeAlias = Literal["tensor", "row"]
"""What has a norm of its own."""

HALF_TOLERANCE = 2.0**-9
"""Half-precision tensors whose norm is off by less, relatively, are left alone."""


# --- which tensors ------------------------------------------------------------------------------------------


def projectable(params: Parameters, per: Per, joint: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """Names and tensors of ``params``, each checked to have a norm that can be kept.

    Args:
        params: a module, a mapping, (name, tensor) pairs or tensors.
        per: what has a norm of its own.
        joint: names of tensors with a joint norm.

    Raises:
        TypeError: if a tensor is complex or of an integer type.
        ValueError: if there is none, or one is sparse, without memory, shared or too small for ``per``.
    """
    named = named_parameters(_pairs(params))
    grouped = _check_joint(named, joint, per)
    memory: dict[int, str] = {}
    for name, tensor in named.items():
        _check_tensor(name, tensor)
        if per == "row" and tensor.dim() < 2 and name not in grouped:
            raise ValueError(
                f"{name} must have at least 2 dimensions for per='row', got shape {tuple(tensor.shape)}. "
                "Leave it out or use per='tensor'."
            )
        if per == "row" and sharding(tensor) is not None:
            raise ValueError(f"{name} must not be sharded for per='row', got a DTensor. Use per='tensor'.")
        local = local_of(tensor)
        other = memory.setdefault(local.data_ptr(), name) if local.numel() else name
        if other != name and local_of(named[other]).shape == local.shape:
            raise ValueError(f"{name} must have memory of its own, got that of {other}. Pass one of the two.")
    return named


def _pairs(params: Parameters) -> Any:
    if isinstance(params, Tensor):
        raise TypeError("params must be a mapping or list of tensors, got one tensor. Pass [tensor].")
    if isinstance(params, nn.Module | Mapping) or not isinstance(params, Iterable):
        return params
    rows: list[Any] = list(params)
    return [(f"param{i}", row) if isinstance(row, Tensor) else row for i, row in enumerate(rows)]


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be a real floating tensor, got dtype {tensor.dtype}. Leave it out.")
    if tensor.layout is not torch.strided:
        raise ValueError(
            f"{name} must be dense, got layout {tensor.layout}. Leave it out or use .to_dense()."
        )
    if nn.parameter.is_lazy(tensor):
        raise ValueError(
            f"{name} must be initialised, got a lazy parameter. Run one batch through the model first."
        )
    if tensor.is_meta:
        raise ValueError(f"{name} must have memory, got the meta device. Initialise the model first.")
    sharding(tensor)


def _check_joint(named: Mapping[str, Tensor], joint: Sequence[Sequence[str]], per: Per) -> set[str]:
    seen: set[str] = set()
    for group in joint:
        if isinstance(group, str) or not group:
            raise ValueError(
                f"joint must hold lists of names, got {shown(group)}. Write [('weight', 'bias')]."
            )
        for name in group:
            if name not in named or name in seen:
                what = "an unknown name" if name not in named else "a name twice"
                raise ValueError(
                    f"joint must name given tensors once, got {what}: {name!r}. Known: {list(named)[:5]}."
                )
            seen.add(name)
        tensors = [named[name] for name in group]
        if len({_key(tensor) for tensor in tensors}) > 1:
            raise ValueError(
                f"joint tensors must share device, dtype and shards, got {list(group)}. Keep them apart."
            )
        if per == "row" and len({tensor.shape[:1] for tensor in tensors}) > 1:
            raise ValueError(
                f"joint tensors must have equally many rows, got {list(group)}. Keep them apart."
            )
    return seen


# --- shards -------------------------------------------------------------------------------------------------


def sharding(tensor: Tensor) -> tuple[Any, tuple[int, ...]] | None:
    """Mesh of a DTensor and the mesh dimensions over which it is cut; None for an ordinary tensor.

    Raises:
        ValueError: if it holds sums that are not reduced yet.
    """
    if type(tensor) is Tensor or type(tensor) is nn.Parameter or not hasattr(tensor, "placements"):
        return None
    sharded: Any = tensor  # a DTensor, whose module is too slow to import for a type test
    if any(placement.is_partial() for placement in sharded.placements):
        raise ValueError(
            f"a sharded parameter must be cut or copied, got placements {sharded.placements}. Redistribute it first."
        )
    # What is not copied to all ranks is cut, in whatever way.
    return sharded.device_mesh, tuple(d for d, p in enumerate(sharded.placements) if not p.is_replicate())


def local_of(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory, or the tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _key(tensor: Tensor) -> tuple[Any, ...]:
    """What tensors of one bucket share."""
    return tensor.device, tensor.dtype, sharding(tensor)


# --- norms --------------------------------------------------------------------------------------------------


def _summed(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms are taken and kept: never half."""
    return dtype if dtype.itemsize >= 4 else torch.float32


def _row_norm(block: Sequence[Tensor]) -> Tensor:
    """Joint norm of every row of a block, [rows]."""
    found = []
    for tensor in block:
        flat = tensor.reshape(len(tensor), -1)
        found.append(torch.linalg.vector_norm(flat, dim=1, dtype=_summed(tensor.dtype)))
    return found[0] if len(found) == 1 else torch.linalg.vector_norm(torch.stack(found), dim=0)


@torch.no_grad()
def norms_of(tensors: Sequence[Tensor], blocks: Sequence[Sequence[int]], per: Per) -> list[Tensor]:
    """Norm of every block: 0-dim, or [rows]; float64 for float64 tensors, else float32."""
    found: dict[int, Tensor] = {}
    rows = [(b, [tensors[i] for i in block]) for b, block in enumerate(blocks)]
    for bucket in buckets(rows, None, per):
        found |= dict(zip(bucket.blocks, bucket.norms(), strict=True))
    return [found[b].clone() for b in range(len(blocks))]


def buckets(rows: Iterable[tuple[int, list[Tensor]]], rho: Sequence[Tensor] | None, per: Per) -> list[Bucket]:
    """Sort blocks by what can be computed in one call.

    Args:
        rows: number of every block and its tensors.
        rho: wanted norm of every block by its number; None where only norms are asked for.
        per: what has a norm of its own.
    """
    sorted_: dict[Any, list[tuple[int, list[Tensor]]]] = {}
    for number, block in rows:
        keys = {_key(tensor) for tensor in block}
        if len(keys) > 1:
            raise RuntimeError(
                f"tensors that are scaled together must share device, dtype and shards, got {sorted(map(str, keys))}. "
                "Move or convert them together."
            )
        sorted_.setdefault(keys.pop(), []).append((number, block))
    return [Bucket(found, rho, per) for found in sorted_.values()]


class Bucket:
    """Blocks of one device, dtype and sharding: all their norms in one vector, all their factors in another.

    Attributes:
        blocks: numbers of the blocks.
        left: how often each block (or a row of it) was left alone, on the device.
    """

    def __init__(
        self, rows: Sequence[tuple[int, list[Tensor]]], rho: Sequence[Tensor] | None, per: Per
    ) -> None:
        first = rows[0][1][0]
        self.blocks = [number for number, _ in rows]
        self._per = per
        self._parts = [block for _, block in rows]
        self._tensors = [tensor for block in self._parts for tensor in block]
        self._sharding = sharding(first)
        self._dtype = _summed(first.dtype)
        self._half = first.dtype.itemsize < 4
        device = local_of(first).device
        self.left = torch.zeros(len(rows), dtype=torch.int64, device=device)
        self._sizes = [len(block[0]) if per == "row" else 1 for block in self._parts]
        self._member = self._owner = None
        if per == "row":  # by norm, the place of its block
            self._owner = _places(self._sizes, device)
        elif len(self._tensors) > len(rows):  # by tensor, the place of its block
            self._member = _places([len(block) for block in self._parts], device)
        if rho is not None:
            wanted = [rho[number].reshape(-1).to(device=device, dtype=self._dtype) for number in self.blocks]
            self._rho = torch.cat(wanted)
            self._ratio = torch.ones_like(self._rho)
            self._bad = torch.zeros_like(self._rho, dtype=torch.bool)
            self._factors = self._views()

    def _views(self) -> list[Tensor]:
        """For every tensor its part of the vector of factors, in a shape that multiplies it."""
        if self._per == "tensor":
            pairs = zip(self._ratio.unbind(), self._parts, strict=True)
            return [factor for factor, block in pairs for _ in block]
        pairs = zip(self._ratio.split(self._sizes), self._parts, strict=True)
        return [factor.view(-1, *[1] * (t.dim() - 1)) for factor, block in pairs for t in block]

    def norms(self) -> list[Tensor]:
        """Norm of every block, 0-dim or [rows]."""
        found = self._vector()
        return list(found.unbind() if self._per == "tensor" else found.split(self._sizes))

    def _vector(self) -> Tensor:
        """All norms in one vector; of shards those of the whole."""
        if self._per == "row":
            return torch.cat([_row_norm(block) for block in self._parts])
        norms = torch.stack(torch._foreach_norm(self._local(), 2.0, dtype=self._dtype))
        if self._sharding is not None:
            mesh, cut = self._sharding
            for dim in cut:
                squares = norms.square()
                torch.distributed.all_reduce(squares, group=mesh.get_group(dim))
                norms = squares.sqrt()
        if self._member is None:
            return norms
        return norms.new_zeros(len(self.blocks)).index_add(0, self._member, norms.square()).sqrt()

    def _local(self) -> list[Tensor]:
        return self._tensors if self._sharding is None else [local_of(tensor) for tensor in self._tensors]

    def measure(self) -> None:
        """Find all factors; 1 where there is none or, in half precision, where it is nearly 1."""
        ratio = torch.div(self._rho, self._vector(), out=self._ratio)
        # A norm that is zero, infinite or NaN gives a ratio that is infinite, zero or NaN.
        self._bad = ((ratio > 0) & (ratio < math.inf)).logical_not_()
        keep = self._bad | ((ratio - 1).abs() < HALF_TOLERANCE) if self._half else self._bad
        ratio.masked_fill_(keep, 1.0)

    def troubled(self) -> list[int]:
        """Numbers of the blocks of which something is about to be left alone: one read by the host."""
        parts = self._bad.tolist() if self._owner is None else self._counts().tolist()
        return [number for number, wrong in zip(self.blocks, parts, strict=True) if wrong]

    def _counts(self) -> Tensor:
        """By block, how many of its norms are zero or not finite."""
        if self._owner is None:
            return self._bad.to(torch.int64)
        return torch.zeros_like(self.left).index_add_(0, self._owner, self._bad.to(torch.int64))

    def rescale_(self) -> None:
        """Multiply every tensor by the factor of its block, and count those that are left alone."""
        self.left.add_(self._counts())
        tensors = self._local()
        if not self._half:
            torch._foreach_mul_(tensors, self._factors)
            return
        # A product with a factor of the tensor's own precision would round the factor first.
        for tensor, factor in zip(tensors, self._factors, strict=True):
            tensor.copy_(tensor.to(self._dtype).mul_(factor))


def _places(counts: Sequence[int], device: torch.device) -> Tensor:
    """0 as often as the first count says, then 1, and so on."""
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)
