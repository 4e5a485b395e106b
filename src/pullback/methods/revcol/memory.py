"""How much one forward pass of a network keeps, counted for each way to treat activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pullback.core.checks import instance
from pullback.core.saved_bytes import saved_bytes
from pullback.methods.revcol.network import Recomputation, RevCol


@dataclass(frozen=True)
class MemoryReport:
    """Bytes that autograd keeps for the backward pass of one batch, beside parameters and images.

    Args:
        plain: with all activations kept.
        checkpoint: with every column checkpointed.
        reversible: with columns that are undone, and the network's anchors.
        pyramid: bytes of the features of one column, the price of an anchor.
        columns: number of columns.
    """

    plain: int
    checkpoint: int
    reversible: int
    pyramid: int
    columns: int

    def __str__(self) -> str:
        rows = [
            f"{name:<11}{value / 2**20:10.2f} MiB{value / self.plain:8.1%} of plain"
            for name, value in (
                ("plain", self.plain),
                ("checkpoint", self.checkpoint),
                ("reversible", self.reversible),
            )
        ]
        return "\n".join([*rows, f"{self.columns} columns, {self.pyramid / 2**20:.2f} MiB of features each"])


def memory_report(net: RevCol, images: Tensor) -> MemoryReport:
    """Count what a forward pass keeps: plain, checkpointed by column, reversible.

    Runs four forward passes; weights, modes, gradients and random generators are left as they are. In evaluation mode
    the heads in mid-network are left out, as in a call.

    Args:
        net: the network.
        images: one batch, [batch, colours, height, width].

    Returns:
        The counts, exact and the same on every run.

    Raises:
        TypeError: if ``net`` is no `RevCol`.
        ValueError: if ``images`` do not fit the network, or nothing in the network requires a gradient.
    """
    instance("net", net, RevCol, fix="Use pullback.core.saved_bytes.SavedBytes for other networks.")
    if not any(p.requires_grad for p in net.parameters()):
        raise ValueError("net must have parameters that require a gradient, got none. Unfreeze it first.")
    before, counts = net.recompute, {}
    devices = [images.device] if images.device.type not in {"cpu", "meta"} else []
    modes: tuple[Recomputation, ...] = ("none", "checkpoint", "reversible")
    kind = devices[0].type if devices else "cuda"
    with torch.random.fork_rng(devices=devices, device_type=kind), torch.enable_grad():
        try:
            for mode in modes:
                net.recompute = mode
                counts[mode] = saved_bytes(lambda: net(images), net, images)
        finally:
            net.recompute = before
    with torch.no_grad():
        pyramid = sum(each.nbytes for each in _pyramid(net, images))
    columns = len(net.columns.steps) // net.levels
    return MemoryReport(counts["none"], counts["checkpoint"], counts["reversible"], pyramid, columns)


def _pyramid(net: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        return net.forward_features(images)  # ty: ignore[call-non-callable]
