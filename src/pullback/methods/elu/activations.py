"""The two units that the paper compares ELU with and that torch has no name or another default for."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn


@final
class LReLU(nn.LeakyReLU):
    """Leaky ReLU with the paper's slope: x for x > 0, 0.1 x otherwise (torch's default is 0.01).

    Args:
        negative_slope: slope for negative inputs.
        inplace: overwrite the input.
    """

    def __init__(self, negative_slope: float = 0.1, inplace: bool = False) -> None:
        super().__init__(negative_slope, inplace)


@final
class SReLU(nn.Module):
    """Shifted ReLU, ``max(-1, x)``: as ELU(1) it saturates at -1, but at once.

    The gradient is 1 for x > -1 and 0 for x < -1; at the kink it is torch's (that of ``clamp``).

    Args:
        inplace: overwrite the input.
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        """Values of the shape of ``input``."""
        return torch.clamp_(input, min=-1.0) if self.inplace else torch.clamp(input, min=-1.0)

    def extra_repr(self) -> str:
        """Arguments as they are printed."""
        return "inplace=True" if self.inplace else ""
