"""Costs of a network's output with their derivative written out, also for complex outputs (where C is holomorphic).

A cost turns the user's labels into targets once (`target`), and then gives C for each example (`value`), dC/d(output)
(`pull`), and the gradients of parameters of its own (`gradients`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback.core.checks import choice, shown
from pullback.core.holomorphic import derivative


class SquaredError:
    """C = ``|output - y|^2 / 2``, summed over outputs [batch, n]; class numbers become one-hot rows."""

    def target(self, y: Tensor, output: Tensor) -> Tensor:
        """Targets [batch, n] in the dtype of the outputs.

        Raises:
            ValueError: if the shape or a class number does not fit.
        """
        if y.dim() == 1 and y.dtype == torch.int64:
            return one_hot(y, len(output), output.shape[1]).to(output.dtype)
        if y.shape != output.shape or not y.is_floating_point():
            raise ValueError(
                f"y must be floating [{len(output)}, {output.shape[1]}] or int64 [{len(output)}], got {shown(y)}. "
                "Pass one target for each output unit, or class numbers."
            )
        return y.to(output.dtype)

    def value(self, output: Tensor, target: Tensor) -> Tensor:
        """C for each example."""
        return 0.5 * (output - target).pow(2).sum(1)

    def pull(self, output: Tensor, target: Tensor) -> Tensor:
        """dC/d(output)."""
        return output - target

    def gradients(self, output: Tensor, target: Tensor, share: Tensor) -> dict[Tensor, Tensor]:
        """No parameters of its own."""
        del output, target, share
        return {}


class CrossEntropy:
    """C = cross-entropy of softmax(W output + b).

    Args:
        readout: the linear map to the classes.
    """

    def __init__(self, readout: nn.Linear) -> None:
        self._map = readout

    def target(self, y: Tensor, output: Tensor) -> Tensor:
        """One-hot rows of class numbers, or probabilities as they are.

        Raises:
            ValueError: if the shape or a class number does not fit.
        """
        classes = self._map.out_features
        if y.dim() == 1 and y.dtype == torch.int64:
            return one_hot(y, len(output), classes).to(output.dtype)
        if y.shape != (len(output), classes) or not y.is_floating_point():
            raise ValueError(
                f"y must be int64 [{len(output)}] or probabilities [{len(output)}, {classes}], got {shown(y)}. "
                "Pass class numbers."
            )
        return y.to(output.dtype)

    def logits(self, output: Tensor) -> Tensor:
        """W output + b, also of a complex output."""
        if output.is_complex():
            return torch.complex(self._map(output.real), F.linear(output.imag, self._map.weight))
        return self._map(output)

    def value(self, output: Tensor, target: Tensor) -> Tensor:
        """C for each example."""
        z = self.logits(output)
        shift = z.real.amax(1, keepdim=True) if z.is_complex() else z.amax(1, keepdim=True)
        total = (z - shift).exp().sum(1).log() + shift.squeeze(1)
        return total * target.sum(1) - (z * target).sum(1)

    def slope(self, output: Tensor, target: Tensor) -> Tensor:
        """dC/d(logits); the softmax is written out, torch's own knows no complex numbers."""
        z = self.logits(output)
        if not z.is_complex():
            return z.softmax(1) - target
        powers = (z - z.real.amax(1, keepdim=True)).exp()
        return powers / powers.sum(1, keepdim=True) - target

    def pull(self, output: Tensor, target: Tensor) -> Tensor:
        """dC/d(output)."""
        slope = self.slope(output, target)
        return slope @ self._map.weight.to(slope.dtype)

    def gradients(self, output: Tensor, target: Tensor, share: Tensor) -> dict[Tensor, Tensor]:
        """Real part of the sum over examples of ``share`` [batch, 1] dC/d(parameter), by parameter of the read-out."""
        slope = self.slope(output, target) * share
        both = {self._map.weight: slope.T @ output}
        if self._map.bias is not None:
            both[self._map.bias] = slope.sum(0)
        return {p: grad.real if grad.is_complex() else grad for p, grad in both.items()}


class CustomCost:
    """A cost ``function(output, y) -> [batch]`` of the user's own; its derivative by autograd."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.function = function

    def target(self, y: Tensor, output: Tensor) -> Tensor:
        """Whatever the function wants.

        Raises:
            ValueError: if it does not have the batch as its first axis.
        """
        if y.dim() == 0 or len(y) != len(output):
            raise ValueError(
                f"y must have {len(output)} rows as x has, got {shown(y)}. Pass matching batches."
            )
        return y

    def value(self, output: Tensor, target: Tensor) -> Tensor:
        """C for each example.

        Raises:
            ValueError: if the function gives another shape.
        """
        found = self.function(output, target)
        if found.shape != output.shape[:1]:
            raise ValueError(
                f"cost must return one number for each of {len(output)} examples, got {shown(found)}. "
                "Sum over outputs, not over the batch."
            )
        return found

    def pull(self, output: Tensor, target: Tensor) -> Tensor:
        """dC/d(output)."""
        with torch.enable_grad():
            held = output.detach().requires_grad_()
            return derivative(self.value(held, target), [held])[0]

    def gradients(self, output: Tensor, target: Tensor, share: Tensor) -> dict[Tensor, Tensor]:
        """No parameters of its own."""
        del output, target, share
        return {}


Cost: TypeAlias = SquaredError | CrossEntropy | CustomCost


def one_hot(y: Tensor, batch: int, classes: int) -> Tensor:
    """Class numbers [batch] as rows [batch, classes]; a number out of range is refused.

    Raises:
        ValueError: if there is another number of them, or one is out of range.
    """
    if len(y) != batch:
        raise ValueError(f"y must have {batch} rows as x has, got {len(y)}. Pass matching batches.")
    if not bool(((y >= 0) & (y < classes)).all()):
        raise ValueError(
            f"y must hold class numbers in [0, {classes}), got {int(y.min())} to {int(y.max())}. Widen the output."
        )
    return F.one_hot(y, classes)


def cost_of(cost: str | Callable[[Tensor, Tensor], Tensor], readout: nn.Linear | None) -> Cost:
    """The cost that a name or a function stands for.

    Args:
        cost: "mse", "cross_entropy", or ``cost(output, y) -> [batch]``.
        readout: linear map to the classes for "cross_entropy", or None.

    Raises:
        ValueError: if the name is unknown, or there is no read-out for it.
    """
    if not isinstance(cost, str):
        return CustomCost(cost)
    if choice("cost", cost, ("mse", "cross_entropy")) == "mse":
        return SquaredError()
    if readout is None:
        raise ValueError(
            "cost='cross_entropy' must have a read-out, got a model without one. Build it with readout=10."
        )
    return CrossEntropy(readout)
