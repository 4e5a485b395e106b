"""Branches of linear or convolution layers that read the same input, computed together as wide products.

Weights are gathered from the branches' own parameters in every call, so that these stay the leaves of autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback.core.branches import jvp, plain

ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU,
    nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign,
    nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
"""Activations that act on every entry by itself and own no parameter, so that one call serves all branches."""

CONVOLUTIONS: dict[type[nn.Module], Any] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
Weights: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""Weight and bias of the first product of all branches, and of the second one where there is one."""

Layers: TypeAlias = tuple[nn.Module, ...]


@dataclass(frozen=True)
class Wide:
    """Branches ``act(product(act(x)))`` or ``product(act(product(act(x))))``, a product being linear or a convolution.

    The first product of all branches is one product with stacked outputs. A second one reads them side by side, so
    that the sum over branches happens inside it; without activation after the first, the weights are summed instead.

    Args:
        first: position of the first product in the branch.
        second: position of the second product, or None.
        length: number of layers of a branch.
    """

    first: int
    second: int | None
    length: int

    @classmethod
    def plan(cls, branches: Sequence[nn.Module]) -> Wide | str:
        """How to compute the branches, or why they cannot be computed so."""
        if reason := plain(branches):
            return reason
        layers = layers_of(branches[0])
        products = [i for i, layer in enumerate(layers) if _is_product(layer)]
        if not 1 <= len(products) <= 2:
            return "a branch needs one or two plain linear or convolution layers"
        if len(products) == 2 and products[1] != len(layers) - 1:
            return "an activation follows the second layer"
        if len({type(layers[i]) for i in products}) > 1:
            return "the two layers are of different kinds"
        start = products[0]
        for i, layer in enumerate(layers):
            if i in products:
                continue
            if type(layer) not in ELEMENTWISE and not (type(layer) is nn.Dropout and i > start):
                return f"{type(layer).__name__} does not act on every entry by itself"
            if i < start and getattr(layer, "inplace", False):
                return "the first layer edits the stack's input in place"
        return cls(start, products[1] if len(products) == 2 else None, len(layers))

    def gather(self, branches: Sequence[nn.Module], *, apart: bool = False) -> Weights:
        """Weights of all branches; ``apart``: those of the second product stacked like the first's, for each F_i."""
        rows = [layers_of(branch) for branch in branches]
        first = [row[self.first] for row in rows]
        if self.collapses and not apart:
            return *_summed(first), None, None  # linear in the weights: the sum of the branches is one branch
        if self.second is None:
            return *_stacked(first), None, None
        second: list[Any] = [row[self.second] for row in rows]
        if apart:
            return *_stacked(first), *_stacked(second)
        side_by_side = torch.cat([layer.weight for layer in second], 1)
        return *_stacked(first), side_by_side, _summed_bias(second)

    @property
    def collapses(self) -> bool:
        """Whether the branches are linear in their weights, so that their sum is one branch (order 1)."""
        return self.second is None and self.first == self.length - 1

    def part(self, weights: Weights, start: int, stop: int, count: int, *, apart: bool) -> Weights:
        """The share of branches ``start`` to ``stop`` of ``count`` in what `gather` gave, as views."""
        first, bias, second, offset = weights
        rows = len(first) // count
        mine = slice(start * rows, stop * rows)
        bias = None if bias is None else bias[mine]
        if second is None:
            return first[mine], bias, None, None
        if not apart:
            return (
                first[mine],
                bias,
                second[:, mine],
                offset if start == 0 else None,
            )  # one sum of all offsets
        rows = len(second) // count
        share = slice(start * rows, stop * rows)
        return first[mine], bias, second[share], None if offset is None else offset[share]

    def terms(
        self,
        branch: nn.Module,
        x: Tensor,
        weights: Weights,
        count: int,
        order: int,
        before: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Sums over ``count`` branches, of the shape of x: of F_j(x), and with order 2 of J_j(x) t_j.

        Here t_j is the sum of all earlier F_i(x), also of those in ``before``.

        Args:
            branch: any one of the branches, whose activations are called.
            x: [..., features], or [..., channels, *space].
            weights: what `gather` or `part` gave; with order 2 ``apart``.
            count: how many branches these hold.
            order: 1 or 2.
            before: sum of the branches that come before these, or None.
        """
        layers = layers_of(branch)
        h = _product(layers[self.first], _through(layers[: self.first], x), weights[0], weights[1])
        if order == 2:
            return self._both(layers, x, h, weights, count, before)
        if self.collapses:
            return h, None
        h = _through(layers[self.first + 1 : self.second], h)
        if self.second is not None and weights[2] is not None:
            return _product(layers[self.second], h, weights[2], weights[3]), None
        axis = _channels(layers[self.first])
        return h.unflatten(axis, (count, -1)).sum(axis - 1), None

    def _both(
        self, layers: Layers, x: Tensor, h: Tensor, weights: Weights, count: int, before: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The two sums of `terms` of order 2, from ``h``, the first product of all branches."""
        axis = _channels(layers[self.first])
        ahead, between = layers[: self.first], layers[self.first + 1 : self.second]
        each = _through(between, h.clone() if _in_place(between) else h)
        if self.second is not None and weights[2] is not None:
            each = _each(layers[self.second], each, weights[2], weights[3], count)
        each = each.unflatten(axis, (count, -1))
        tangent = each.cumsum(axis - 1) - each
        tangent = (tangent if before is None else tangent + before.unsqueeze(axis - 1)).to(x.dtype)
        if ahead:
            wide = (
                x.unsqueeze(axis - 1).expand_as(tangent).contiguous()
            )  # forward mode takes no shared memory
            tangent = jvp(partial(_through, ahead), wide, tangent)[1]
        moved = _each(layers[self.first], tangent.flatten(axis - 1, axis), weights[0], None, count)
        if between:
            copied = _in_place(between)
            moved = jvp(partial(_through, between, copied=copied), h, moved.to(h.dtype))[1]
        if self.second is not None and weights[2] is not None:
            moved = _each(layers[self.second], moved, weights[2], None, count)
        return each.sum(axis - 1), moved.unflatten(axis, (count, -1)).sum(axis - 1)

    def width(self, branch: nn.Module, x: Tensor) -> int:
        """Entries of the widest tensor that one branch makes of ``x``, the input's size where it keeps space."""
        layer: Any = layers_of(branch)[self.first]
        return x.numel() // x.shape[_channels(layer)] * layer.weight.shape[0] if x.numel() else 0


def layers_of(branch: nn.Module) -> Layers:
    """The layers that a branch calls one after the other."""
    return tuple(branch) if type(branch) is nn.Sequential else (branch,)


def _is_product(layer: Any) -> bool:
    if type(layer) in CONVOLUTIONS:
        return layer.groups == 1 and layer.padding_mode == "zeros"
    return type(layer) is nn.Linear


def _channels(layer: Any) -> int:
    """Axis of the features, counted from the end."""
    return -1 if type(layer) is nn.Linear else -(layer.weight.dim() - 1)


def _product(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
    if type(layer) is nn.Linear:
        return F.linear(x, weight, bias)
    return CONVOLUTIONS[type(layer)](x, weight, bias, layer.stride, layer.padding, layer.dilation, groups)


def _each(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, count: int) -> Tensor:
    """Branch i's product on the i-th share of the features of ``x``, all in one product."""
    if type(layer) is not nn.Linear:
        return _product(layer, x, weight, bias, count)
    shares = x.unflatten(-1, (count, -1)).flatten(0, -3).transpose(0, 1)  # [count, rows, features]
    out = shares @ weight.unflatten(0, (count, -1)).mT
    out = out.transpose(0, 1).flatten(1).unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias


def _stacked(layers: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return torch.cat([layer.weight for layer in layers]), bias


def _summed(layers: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    return torch.stack([layer.weight for layer in layers]).sum(0), _summed_bias(layers)


def _summed_bias(layers: Sequence[Any]) -> Tensor | None:
    return None if layers[0].bias is None else torch.stack([layer.bias for layer in layers]).sum(0)


def _through(layers: Layers, x: Tensor, *, copied: bool = False) -> Tensor:
    """``x`` through the layers; ``copied``: the first of them works on a copy."""
    if copied:
        x = x.clone()
    for layer in layers:
        x = layer(x)
    return x


def _in_place(layers: Layers) -> bool:
    return any(getattr(layer, "inplace", False) for layer in layers)
