"""Affine maps that also act backwards: c(s) = W s + b upwards, the transpose of its derivative downwards.

For networks whose connections are symmetric. Complex states pass through real weights, by two real products.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback.core.checks import choice, integer


class Dense(nn.Module):
    """The affine map c(s) = W s + b of a flattened state.

    Args:
        inputs: units below.
        outputs: units above.
        gain: of Glorot's uniform initialisation; biases begin at zero.
    """

    def __init__(self, inputs: int, outputs: int, *, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.xavier_uniform_(self.weight, gain=gain)

    def shape(self, lower: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the state above.

        Raises:
            ValueError: if the state below has another number of units.
        """
        outputs, inputs = self.weight.shape
        if math.prod(lower) != inputs:
            raise ValueError(
                f"x must have {inputs} values for each example, got {math.prod(lower)} (shape {tuple(lower)}). "
                "Build the network with the input's own size."
            )
        return (outputs,)

    def forward(self, lower: Tensor) -> Tensor:
        """W s + b."""
        flat = lower if lower.dim() == 2 else lower.flatten(1)
        if flat.is_complex():
            return torch.complex(
                F.linear(flat.real, self.weight, self.bias), F.linear(flat.imag, self.weight)
            )
        return F.linear(flat, self.weight, self.bias)

    def tangent(self, lower: Tensor, at: Tensor) -> Tensor:
        """dc(at) applied to ``lower``."""
        del at
        return F.linear(lower.flatten(1), self.weight)

    def back(self, total: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
        """``total`` + W^T ``upper``, in the shape of ``lower``."""
        if upper.is_complex():
            down = torch.complex(upper.real @ self.weight, upper.imag @ self.weight)
            return total + down.view_as(lower)
        if total.dim() == 2:
            return torch.addmm(total, upper, self.weight)
        return total + (upper @ self.weight).view_as(lower)


class Conv(nn.Module):
    """The map c(s) = pool(W * s + b): a convolution of stride 1 that keeps the size, then pooling by 2.

    Args:
        inputs: channels below.
        outputs: channels above.
        kernel: odd size of the kernel.
        pool: "max", "avg" or "none". Switches of max pooling are those of the state below at the time.
        gain: of Glorot's uniform initialisation; biases begin at zero.
    """

    def __init__(
        self, inputs: int, outputs: int, *, kernel: int = 3, pool: str = "max", gain: float = 1.0
    ) -> None:
        super().__init__()
        if integer("kernel", kernel, minimum=1) % 2 == 0:
            raise ValueError(f"kernel must be odd, so that the size is kept, got {kernel}. Use 3 or 5.")
        self.pool, self.padding = choice("pool", pool, ("max", "avg", "none")), kernel // 2
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.xavier_uniform_(self.weight, gain=gain)

    def shape(self, lower: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the state above.

        Raises:
            ValueError: if the state below is no image of as many channels.
        """
        inputs = self.weight.shape[1]
        if len(lower) != 3 or lower[0] != inputs:
            raise ValueError(
                f"x must be images [batch, {inputs}, height, width], got examples of shape {tuple(lower)}. "
                "Move channels to the second axis, or build the network with the images' own channels."
            )
        _, height, width = lower
        by = 1 if self.pool == "none" else 2
        return (self.weight.shape[0], height // by, width // by)

    def _conv(self, lower: Tensor, bias: Tensor | None) -> Tensor:
        if lower.is_complex():
            return torch.complex(self._conv(lower.real, bias), self._conv(lower.imag, None))
        return F.conv2d(lower, self.weight, bias, padding=self.padding)

    def _average(self, value: Tensor) -> Tensor:
        if value.is_complex():
            return torch.complex(F.avg_pool2d(value.real, 2), F.avg_pool2d(value.imag, 2))
        return F.avg_pool2d(value, 2)

    def forward(self, lower: Tensor) -> Tensor:
        """pool(W * s + b)."""
        value = self._conv(lower, self.bias)
        if self.pool == "none":
            return value
        return F.max_pool2d(value, 2) if self.pool == "max" else self._average(value)

    def tangent(self, lower: Tensor, at: Tensor) -> Tensor:
        """dc(at) applied to ``lower``, with the switches of ``at``."""
        value = self._conv(lower, None)
        if self.pool == "max":
            _, switches = F.max_pool2d(self._conv(at, self.bias), 2, return_indices=True)
            return value.flatten(2).gather(2, switches.flatten(2)).view_as(switches)
        return value if self.pool == "none" else self._average(value)

    def back(self, total: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
        """``total`` + dc(lower)^T ``upper``, in the shape of ``lower``."""
        if upper.is_complex():  # no max pooling there
            return total + torch.complex(
                self._transposed(upper.real, lower.real), self._transposed(upper.imag, lower.imag)
            )
        return total + self._transposed(upper, lower)

    def _transposed(self, upper: Tensor, lower: Tensor) -> Tensor:
        if self.pool == "max":
            value, switches = F.max_pool2d(self._conv(lower, self.bias), 2, return_indices=True)
            upper = F.max_unpool2d(upper.expand_as(value), switches, [2, 2], output_size=lower.shape[2:])
        elif self.pool == "avg":
            upper = F.interpolate(upper, scale_factor=2.0, mode="nearest") / 4.0
            upper = F.pad(upper, (0, lower.shape[3] - upper.shape[3], 0, lower.shape[2] - upper.shape[2]))
        return F.conv_transpose2d(upper, self.weight, padding=self.padding)
