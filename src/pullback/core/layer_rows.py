"""What a layer sees and does in one pass: its inputs, where its outputs stand in the graph, and both as rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeAlias, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pullback.core.checks import instance, shown
from pullback.core.windows import padding_of, sliding_windows

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside DistributedDataParallel, DataParallel and a compiled wrapper.

    A forward pass through DistributedDataParallel would wait for a backward pass that never reaches the parameters, and
    for the other ranks; a compiled one would not run hooks that came after compilation.
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = getattr(model, "_orig_mod")  # noqa: B009 - torch's own name, unknown to nn.Module
        else:
            return model


def named_layers(
    model: nn.Module, wanted: Iterable[str] | None, *, fix: str = "The unit Fisher is defined for these."
) -> dict[str, Any]:
    """The layers named in ``wanted``, or all linear and convolutional ones, in the order of the model.

    Raises:
        TypeError: if a named module is neither linear nor a convolution, or ``wanted`` is a string.
        ValueError: if there is none, or a name is unknown.
    """
    known = dict(model.named_modules())
    if wanted is None:
        found = {name: module for name, module in known.items() if isinstance(module, LAYERS)}
        if not found:
            raise ValueError(
                f"model must hold a Linear, Conv1d, Conv2d or Conv3d layer, got {type(model).__name__} without one. "
                f"{fix}"
            )
        return found
    if isinstance(wanted, str):
        raise TypeError(f"layers must be names of layers, got the string {wanted!r}. Write ({wanted!r},).")
    names = list(wanted)
    if not names:
        raise ValueError("layers must name at least one layer, got none. Pass None for all layers.")
    for name in names:
        if name not in known:
            raise ValueError(
                f"layers must name modules of the model, got {name!r}. It has {shown(', '.join(known)[2:])}."
            )
        instance(f"layers: {name!r}", known[name], LAYERS, fix=fix)
    return {name: module for name, module in known.items() if name in set(names)}


@dataclass(frozen=True)
class Call:
    """One call of a layer: its input, and the place of its output in the graph."""

    input: Tensor
    version: int
    edge: GradientEdge
    shape: torch.Size


@final
class Recorder:
    """While entered, keeps every call of ``layers``; leaving removes the hooks, also after an exception."""

    def __init__(self, layers: dict[str, Any]) -> None:
        self.layers = layers
        self.calls: dict[str, list[Call]] = {name: [] for name in layers}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for name, layer in self.layers.items():
            hook = self._hook(name)
            self._handles.append(layer.register_forward_hook(hook, with_kwargs=True, prepend=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, value, trace
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
        ) -> Tensor | None:
            del module
            if not torch.is_grad_enabled():
                raise RuntimeError(
                    f"layer {name!r} must run with gradients, got a call under no_grad. A reentrant checkpoint does "
                    "that: use use_reentrant=False, or leave the layer out."
                )
            seen = args[0] if args else kwargs["input"]
            # A pre-activation without a graph (frozen layers) starts one; a view is copied, because an activation that
            # overwrites a view takes its place in the graph.
            fresh = None
            if not out.requires_grad:
                fresh = out.detach().requires_grad_().clone()
            elif out._is_view():
                fresh = out.clone()
            edge = get_gradient_edge(out if fresh is None else fresh)
            self.calls[name].append(Call(seen.detach(), seen._version, edge, out.shape))
            return fresh

        return hook


def check_unchanged(name: str, call: Call) -> None:
    """Refuse an input that was overwritten after the layer had read it.

    Raises:
        RuntimeError: if it was.
    """
    if call.input._version != call.version:
        raise RuntimeError(
            f"the input of layer {name!r} must not be overwritten after its call, got a tensor changed in place. Use "
            "the out-of-place operation in the model."
        )


# --- rows -----------------------------------------------------------------------------------------------------------


def count_rows(layer: Layer, call: Call) -> int:
    """Rows of one call: every leading index of a linear layer, every position of a convolution."""
    if isinstance(layer, nn.Linear):
        return math.prod(call.shape[:-1])
    return call.shape.numel() // max(layer.out_channels, 1)


def input_rows(layer: Layer, x: Tensor, picked: Tensor | None) -> Tensor:
    """Incoming activations [groups, R, n] of a unit, of all rows or of those numbered in ``picked`` [R]."""
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, layer.in_features)
        return (rows if picked is None else rows[picked]).unsqueeze(0)
    x = _batched(layer, x)
    windows = sliding_windows(
        x, layer.kernel_size, stride=layer.stride, dilation=layer.dilation, pads=padding_of(layer),
        mode=layer.padding_mode,
    )  # fmt: skip
    spatial = len(layer.kernel_size)
    places = windows.movedim(1, 1 + spatial)  # [N, *out, C, *kernel]
    if picked is None:
        rows = places.flatten(0, spatial)
    else:
        rows = places[torch.unravel_index(picked, places.shape[: 1 + spatial])]
    grouped = rows.unflatten(1, (layer.groups, -1)).flatten(2)  # [R, groups, n]
    return grouped.transpose(0, 1)


def output_rows(layer: Layer, delta: Tensor, picked: Tensor | None) -> Tensor:
    """Derivatives [R, m] of the rows in the same order."""
    if isinstance(layer, nn.Linear):
        rows = delta.reshape(-1, layer.out_features)
    else:
        rows = _batched(layer, delta).movedim(1, -1).reshape(-1, layer.out_channels)
    return rows if picked is None else rows[picked]


def weight_gradient(layer: Layer, x: Tensor, delta: Tensor) -> Tensor:
    """Sum over all rows of ``delta a^T``, [m, n]: the weight's gradient, from the layer's own kernels."""
    if isinstance(layer, nn.Linear):
        return delta.reshape(-1, layer.out_features).T @ x.reshape(-1, layer.in_features)
    x, delta = _batched(layer, x), _batched(layer, delta)
    pads = [pad for both in reversed(padding_of(layer)) for pad in both]
    if any(pads):
        x = F.pad(x, pads, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    spatial = len(layer.kernel_size)
    shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    none = [0] * spatial
    grad = torch.ops.aten.convolution_backward(
        delta, x, x.new_empty(1).expand(shape), None, list(layer.stride), none, list(layer.dilation), False, none,
        layer.groups, [False, True, False],
    )[1]  # fmt: skip
    return grad.flatten(1)


def _batched(layer: Any, x: Tensor) -> Tensor:
    return x.unsqueeze(0) if x.dim() == len(layer.kernel_size) + 1 else x
