"""Where the neurons of a weight lie, which of them are flipped, and the flip itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core.kinds.transform import Parameters
from pullback.core.parameters import named_parameters
from pullback.core.streams import numpy_generator

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Target:
    """One side of one weight.

    Args:
        name: for messages.
        weight: the parameter.
        axis: its dimension over which neurons are counted, 0 or 1.
        groups: of a convolution whose second dimension holds the neurons of one group only; else 1.
    """

    name: str
    weight: Tensor
    axis: int
    groups: int = 1

    @property
    def size(self) -> int:
        """Number of neurons n."""
        return self.weight.shape[self.axis] * self.groups

    def view(self, grad: Tensor) -> Tensor:
        """The gradient with its groups, if any, as a dimension of their own (never a copy)."""
        return grad if self.groups == 1 else grad.unflatten(0, (self.groups, -1))

    def shape(self) -> tuple[int, ...]:
        """Shape of the signs that broadcasts to `view`."""
        dims = self.weight.dim()
        if self.groups == 1:
            return tuple(self.size if dim == self.axis else 1 for dim in range(dims))
        return (self.groups, 1, self.size // self.groups, *[1] * (dims - 2))

    def broadcast(self, shaped: Tensor) -> Tensor:
        """Signs of the shape `shape` in one that broadcasts to the weight itself."""
        if self.groups == 1:
            return shaped
        rows = self.weight.shape[0] // self.groups
        return shaped.expand(-1, rows, *shaped.shape[2:]).flatten(0, 1)

    def check_hookable(self) -> None:
        """Refuse what a hook on the tensor cannot serve.

        Raises:
            TypeError: if the weight is sharded.
            ValueError: if it needs no gradient.
        """
        if hasattr(self.weight, "placements"):
            raise TypeError(
                f"{self.name} must be held whole by this process for hook(), got a sharded tensor. "
                "Attach the rule to the optimizer instead."
            )
        if not self.weight.requires_grad:
            raise ValueError(
                f"{self.name} must require a gradient, got requires_grad=False. Leave frozen layers out."
            )

    def hook(self, signs: Signs) -> torch.utils.hooks.RemovableHandle:
        """Multiply every gradient that arrives at the weight by the signs."""

        def flipped(grad: Tensor) -> Tensor | None:
            if signs.count == 0:
                return None
            _dense(grad, self.name)
            return (self.view(grad) * signs.factor(self, grad)).view(grad.shape)

        return self.weight.register_hook(flipped)


# --- where the neurons are ---------------------------------------------------------------------------------


def target_of(layer: nn.Module, side: str, index: int) -> Target:
    """The side of a layer's weight.

    Raises:
        TypeError: if the layer has no weight of two or more dimensions that is a parameter of its own.
    """
    weight = layer._parameters.get("weight")
    name, kind = f"layers[{index}]", type(layer).__name__
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise TypeError(
            f"{name} must know its shape, got a lazy {kind}. Run one batch through the model first."
        )
    if weight is None or weight.dim() < 2 or isinstance(layer, nn.Bilinear):
        raise TypeError(
            f"{name} must have a weight parameter with inputs and outputs, got {kind} without one. "
            "Pass linear and convolution layers; a parametrized weight is no parameter."
        )
    axis = int((side == "pre") != isinstance(layer, _TRANSPOSED))
    groups = int(getattr(layer, "groups", 1)) if axis == 1 else 1
    return Target(name, weight, axis, groups)


def named_target(name: str, weight: Tensor, side: str) -> Target:
    """The side of a weight [outputs, inputs, ...] that is known by name only."""
    return Target(name, weight, int(side == "pre"))


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter's name matches one of the globs."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def named(params: Parameters) -> list[tuple[str, Tensor]]:
    """Names and tensors; plain tensors are named by position.

    Raises:
        TypeError: if there are no tensors.
        ValueError: if it is empty.
    """
    rows: Any = params
    if not isinstance(params, nn.Module | Tensor | dict) and not hasattr(params, "items"):
        rows = [(f"param{i}", row) if isinstance(row, Tensor) else row for i, row in enumerate(params)]
    return list(named_parameters(rows).items())


# --- which are flipped -------------------------------------------------------------------------------------


class Signs:
    """The sign of each neuron of one side of a layer, and what follows from it once and for all.

    Args:
        signs: +1 or -1 [n], int8, on the CPU.
    """

    def __init__(self, signs: Tensor) -> None:
        self.signs = signs
        flipped = (signs < 0).nonzero().flatten().tolist()
        self.count = len(flipped)
        self.first = flipped[0] if flipped else 0
        self.neighbours = bool(flipped) and flipped[-1] - flipped[0] + 1 == len(flipped)
        self._factors: dict[tuple[Any, ...], Tensor] = {}

    def factor(self, target: Target, like: Tensor) -> Tensor:
        """The signs on the device and in the dtype of a gradient, shaped for `Target.view`."""
        shape = target.shape()
        key = (like.device, like.dtype, shape)
        if key not in self._factors:
            self._factors[key] = self.signs.to(device=like.device, dtype=like.dtype).view(shape)
        return self._factors[key]


def chosen_signs(amount: float | Tensor, target: Target, *, which: str, seed: int, index: int) -> Signs:
    """The sign of each neuron of a target.

    The random choice comes from NumPy's counted stream, so that it is the same on every device and torch version.

    Raises:
        ValueError: if a mask has another length than the layer has neurons.
    """
    if isinstance(amount, Tensor):
        if len(amount) != target.size:
            raise ValueError(
                f"mask must have one entry for each of the {target.size} neurons of {target.name}, got "
                f"{len(amount)}. The side decides: weight {tuple(target.weight.shape)}, axis {target.axis}."
            )
        return Signs(amount.to(device="cpu", dtype=torch.int8))
    count = round(amount * target.size)
    signs = torch.ones(target.size, dtype=torch.int8)
    if which == "first":
        signs[:count] = -1
    else:
        order = numpy_generator("rule flip", seed, index).random(target.size).argsort(kind="stable")
        signs[torch.from_numpy(order[:count])] = -1
    return Signs(signs)


# --- the flip ----------------------------------------------------------------------------------------------


def _dense(grad: Tensor, name: str) -> None:
    if grad.layout is not torch.strided:
        raise TypeError(
            f"the gradient of {name} must be dense, got the sparse layout {grad.layout}. "
            "Build the layer with sparse=False, or leave it out."
        )


def apply_(rows: Sequence[tuple[Tensor, Target, Signs]]) -> None:
    """Flip gradients in place; nothing is touched when one of them cannot be flipped.

    A run of neighbours is negated as a slice (only what changes is read and written), others by one product with the
    broadcast vector of signs.

    Raises:
        TypeError: if a gradient is sparse, or sharded with groups.
        RuntimeError: if a sharded gradient is not reduced yet.
    """
    negated: list[Tensor] = []
    scaled: list[tuple[Tensor, Tensor]] = []
    for grad, target, signs in rows:
        if signs.count == 0:
            continue
        _dense(grad, target.name)
        if hasattr(grad, "placements"):
            scaled.append((grad, _sharded(grad, target, signs)))
        elif signs.neighbours and target.groups == 1:
            negated.append(grad.narrow(target.axis, signs.first, signs.count))
        else:
            scaled.append((target.view(grad), signs.factor(target, grad)))
    if negated:
        torch._foreach_neg_(negated)
    for grad, factor in scaled:
        grad.mul_(factor)


def _sharded(grad: Any, target: Target, signs: Signs) -> Tensor:
    """Signs as a tensor that every rank holds whole; multiplying by it needs no communication."""
    from torch.distributed.tensor import DTensor, Replicate

    if any(placement.is_partial() for placement in grad.placements):
        raise RuntimeError(
            f"the gradient of {target.name} must be sharded or replicated, got {tuple(grad.placements)}. "
            "Reduce it over its mesh (grad.redistribute) first."
        )
    if target.groups > 1:
        raise TypeError(
            f"{target.name} must have one group when it is sharded, got groups={target.groups}. "
            "Flip side='post', or leave it whole."
        )
    mesh = grad.device_mesh
    whole = [Replicate()] * mesh.ndim
    return DTensor.from_local(signs.factor(target, grad), mesh, whole, run_check=False)
