"""What a network keeps for its backward pass: by formula from its settings, and by counting saved tensors.

The unit of the formulas is u, one half state of a level: batch x channels / 2 x voxels. A bottleneck keeps 6e + 2
units (4e + 2 where the activation works in place), so that a plain stage of B blocks keeps B (12e + 4) + 1, one
checkpoint per block 2B + 2, and a reversible stage 2, whatever B is. Statistics of norms, a fraction of a per cent,
are counted too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import torch
from torch import nn

from pullback.core.checks import choice, integer, shown
from pullback.core.saved_bytes import saved_bytes
from pullback.methods.rev_mbconv_unet.blocks import MBConv

if TYPE_CHECKING:
    from pullback.methods.rev_mbconv_unet.unet import ReversibleUNet

Mode: TypeAlias = Literal["plain", "checkpoint", "reversible"]

MODES: Final[tuple[Mode, ...]] = ("plain", "checkpoint", "reversible")
_INDEX = 8  # bytes of an index of max-pooling


# --- by formula ---------------------------------------------------------------------------------------------


def saved_by_mbconv(fn: MBConv, batch: int, voxels: int) -> int:
    """Elements that one call of a bottleneck keeps, its input included.

    Args:
        fn: the bottleneck, in the mode (training or not) in which it will be called.
        batch: examples.
        voxels: product of the spatial sizes.

    Returns:
        The number of elements: ``6 e + 2`` (``4 e + 2`` in place) times the input's, statistics of the norms, and
        what a gate needs.
    """
    wide, in_place = fn.channels * fn.expansion, fn.act == "leaky_relu"
    maps = (4 if in_place else 6) * wide + 2 * fn.channels
    small = sum(_statistics(norm, batch) for norm in (fn.norm1, fn.norm2, fn.norm3))
    if not isinstance(fn.gate, nn.Identity):
        squeeze: Any = fn.gate.squeeze
        maps += wide  # the product with the gate, which the projection reads
        small += batch * (2 * wide + (1 if in_place else 2) * squeeze.out_channels)
    return maps * batch * voxels + small


def _statistics(norm: nn.Module, batch: int) -> int:
    """Means and deviations, and the gain of an instance norm, which is repeated for every example."""
    if isinstance(norm, nn.GroupNorm):
        return 2 * batch * norm.num_groups
    channels: Any = norm.num_features
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return 2 * channels if norm.training else 0
    return 3 * batch * channels


@dataclass(frozen=True)
class _Level:
    """Elements at one level: a half state, one bottleneck, the max-pooling and the change of width below it."""

    half: int
    bottleneck: int
    blocks: int
    pooled: int

    def stage(self, mode: Mode) -> int:
        """Elements that a stage keeps besides the part of its output that the next operation keeps anyway."""
        if mode == "reversible":
            return 2 * self.half
        return 2 * self.blocks * (self.bottleneck if mode == "plain" else self.half)

    def output(self, mode: Mode) -> int:
        """Elements that keeping the output of a stage adds to `stage`."""
        return {"plain": 1, "checkpoint": 2, "reversible": 0}[mode] * self.half

    def transient(self, mode: Mode) -> int:
        """Elements that live besides, while one block is computed again: activations, states and gradients."""
        if mode == "plain":
            return 0
        again = self.bottleneck - self.half
        return 2 * again + 3 * self.half if mode == "checkpoint" else again + 4 * self.half


def _levels(net: ReversibleUNet, shape: Sequence[int]) -> list[_Level]:
    sides, batch, found = net.padded_sides(shape[2:]), shape[0], []
    for level, stage in enumerate(net.encoder):
        voxels = math.prod(side >> level for side in sides)
        fn = next(module for module in stage.modules() if isinstance(module, MBConv))
        half = batch * fn.channels * voxels
        pooled = 2 * half >> net.spatial_dims
        found.append(_Level(half, saved_by_mbconv(fn, batch, voxels), net.blocks[level], pooled))
    return found


def analytic_bytes(net: ReversibleUNet, input_shape: Sequence[int], mode: Mode = "reversible") -> int:
    """Bytes that one forward pass keeps, by formula; parameters, buffers and the input itself are not counted.

    Args:
        net: the network; neither its mode nor its device matters.
        input_shape: shape [batch, in_channels, ...] of an input.
        mode: ``"reversible"``, ``"plain"`` or ``"checkpoint"`` (one per block).

    Returns:
        The bytes.

    Raises:
        ValueError: if the shape is none of an input, or the mode is unknown.
    """
    choice("mode", mode, MODES)
    shape, size = _checked(net, input_shape), net.last.conv.weight.element_size()
    levels = _levels(net, shape)
    total = 0
    for level, each in enumerate(levels):
        deepest = level == len(levels) - 1
        # At the deepest level the encoder's output is the decoder's input, which the decoder's stage counts.
        total += 2 * each.stage(mode) + (1 if deepest else 2) * each.output(mode)
        if not deepest:
            total += each.pooled
    kept = total * size + _INDEX * sum(each.pooled for each in levels[:-1])
    padded = net.padded_sides(shape[2:])
    return kept + (size * math.prod((*shape[:2], *padded)) if padded != tuple(shape[2:]) else 0)


def peak_bytes(net: ReversibleUNet, input_shape: Sequence[int], mode: Mode = "reversible") -> int:
    """Most bytes alive in the backward pass: what is kept, and what computing one block again needs, by formula.

    While a reversible stage goes back there are two half states that are being rebuilt, two of gradients, and one
    bottleneck's activations (6e + 7 units with the output that is kept); with one checkpoint per block there are both
    bottlenecks of a block. For the plain network, gradients are not counted, which favours it.

    Args:
        net: the network.
        input_shape: shape [batch, in_channels, ...] of an input.
        mode: as in `analytic_bytes`.

    Returns:
        The bytes.

    Raises:
        ValueError: if the shape is none of an input, or the mode is unknown.
    """
    kept = analytic_bytes(net, input_shape, mode)
    size = net.last.conv.weight.element_size()
    return kept + size * max(each.transient(mode) for each in _levels(net, _checked(net, input_shape)))


def _checked(net: ReversibleUNet, input_shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(integer("input_shape", side, minimum=1) for side in input_shape)
    if len(shape) != 2 + net.spatial_dims or shape[1] != net.in_channels:
        raise ValueError(
            f"input_shape must be [batch, {net.in_channels}, *{net.spatial_dims} sides], got {shown(shape)}. "
            "Pass tuple(x.shape) of an input."
        )
    return shape


# --- the report ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ActivationReport:
    """Bytes that a forward pass keeps and that a backward pass needs, by mode.

    Args:
        input_shape: shape of the input.
        kept: bytes kept after the forward pass, by formula, for each of ``plain``, ``checkpoint``, ``reversible``.
        peak: bytes alive at most in the backward pass, by formula.
        counted: bytes kept as counted, for ``plain`` and ``reversible``; empty when nothing was run.
    """

    input_shape: tuple[int, ...]
    kept: Mapping[str, int]
    peak: Mapping[str, int]
    counted: Mapping[str, int] = field(default_factory=dict)

    @property
    def disagreement(self) -> float:
        """Largest relative difference between formula and count; NaN when nothing was counted."""
        errors = [abs(self.kept[mode] / count - 1.0) for mode, count in self.counted.items()]
        return max(errors, default=math.nan)

    def __str__(self) -> str:
        """A table in MiB."""
        lines = [f"input {list(self.input_shape)}, MiB".ljust(28) + "kept   counted      peak"]
        for mode in self.kept:
            counted = f"{self.counted[mode] / 2**20:10.2f}" if mode in self.counted else " " * 9 + "-"
            kept, peak = self.kept[mode] / 2**20, self.peak[mode] / 2**20
            lines.append(f"{mode:<20}{kept:12.2f}{counted}{peak:10.2f}")
        return "\n".join(lines)


def report_of(net: ReversibleUNet, input_shape: Sequence[int], *, count: bool = True) -> ActivationReport:
    """The report behind `ReversibleUNet.activation_report`.

    Args:
        net: the network, which stays as it is: a copy is run.
        input_shape: shape [batch, in_channels, ...] of an input.
        count: run the network and count.

    Returns:
        The report.

    Raises:
        ValueError: if the shape is none of an input.
    """
    shape = _checked(net, input_shape)
    kept: dict[str, int] = {mode: analytic_bytes(net, shape, mode) for mode in MODES}
    peak: dict[str, int] = {mode: peak_bytes(net, shape, mode) for mode in MODES}
    counted = {}
    if count:
        counted = {
            mode: _count(net, shape, reversible=mode == "reversible") for mode in ("plain", "reversible")
        }
    return ActivationReport(shape, kept, peak, counted)


def _count(net: ReversibleUNet, shape: tuple[int, ...], *, reversible: bool) -> int:
    """Count on a copy, whose norm statistics and flags may move; all parameters count as trained."""
    weight = net.last.conv.weight
    twin = copy.deepcopy(net).set_reversible(reversible).requires_grad_(True)
    x = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
    devices = [weight.device] if weight.device.type not in {"cpu", "meta"} else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        return saved_bytes(lambda: twin(x), twin, x)
