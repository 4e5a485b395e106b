"""What a client can do to a gradient before it is shared: noise, clipping, pruning, coarse numbers, and their chain.

A defence is a function of a list of gradients and returns a new list. Attackers who know it apply the same function to
their guess (`pullback.core.inversion_terms.GradientMatching`, ``transform``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pullback.core.checks import choice, fraction, instance, integer, non_negative, positive
from pullback.core.streams import generator


class Defence(ABC):
    """A change of gradients before they leave the client."""

    @abstractmethod
    def __call__(self, gradients: Sequence[Tensor], *, step: int = 0) -> list[Tensor]:
        """New gradients; those that are given stay as they are.

        Args:
            gradients: one tensor per parameter.
            step: number of the training step, for what is drawn anew each time.
        """

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({inside})"


class GaussianNoise(Defence):
    """Add independent normal noise to every entry (Zhu et al. 2019, arXiv:1906.08935, section 5).

    With clipping before it, this is the Gaussian mechanism of differential privacy; no privacy budget is computed here.

    Args:
        std: standard deviation, in the unit of the gradient; 0 changes nothing.
        seed: stream of the noise.
    """

    def __init__(self, std: float, *, seed: int = 0) -> None:
        self.std, self.seed = non_negative("std", std), integer("seed", seed)

    def __call__(self, gradients: Sequence[Tensor], *, step: int = 0) -> list[Tensor]:
        """Gradients plus the noise of this step."""
        if self.std == 0.0:
            return list(gradients)
        return [each + self.std * self._draw(each, step, index) for index, each in enumerate(gradients)]

    def _draw(self, gradient: Tensor, step: int, index: int) -> Tensor:
        stream = generator("defence.noise", self.seed, step, index, device=gradient.device)
        return torch.randn(gradient.shape, generator=stream, device=gradient.device, dtype=gradient.dtype)


class Clip(Defence):
    """Scale all gradients together by min(1, max_norm / (norm + 1e-6)) (Abadi et al. 2016, arXiv:1607.00133).

    Alone it does not change the direction: an attack on the cosine does not notice it.

    Args:
        max_norm: largest Euclidean norm of all gradients together.
    """

    def __init__(self, max_norm: float) -> None:
        self.max_norm = positive("max_norm", max_norm)

    def __call__(self, gradients: Sequence[Tensor], *, step: int = 0) -> list[Tensor]:
        """Gradients of at most that norm."""
        del step
        norm = torch.stack([torch.linalg.vector_norm(each) for each in gradients]).norm()
        factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        return [each * factor for each in gradients]


class Prune(Defence):
    """Set the entries of smallest magnitude to zero (Lin et al. 2018, arXiv:1712.01887; as a defence Zhu et al. 2019).

    Args:
        share: share of entries that become zero, in [0, 1). Ties at the threshold survive.
        per: ``"tensor"``: in every gradient by itself; ``"all"``: over all together.
    """

    def __init__(self, share: float, *, per: Literal["tensor", "all"] = "tensor") -> None:
        self.share = fraction("share", share)
        if self.share == 1.0:
            raise ValueError("share must be below 1, got 1: nothing would be shared. Use .99.")
        self.per = choice("per", per, ("tensor", "all"))

    def __call__(self, gradients: Sequence[Tensor], *, step: int = 0) -> list[Tensor]:
        """Gradients with zeros."""
        del step
        if self.share == 0.0 or not gradients:
            return list(gradients)
        if self.per == "tensor":
            return [each * (each.detach().abs() >= self._threshold(each)) for each in gradients]
        least = self._threshold(torch.cat([each.detach().reshape(-1) for each in gradients]))
        return [each * (each.detach().abs() >= least) for each in gradients]

    def _threshold(self, gradient: Tensor) -> Tensor:
        """The smallest magnitude that survives."""
        sizes = gradient.detach().abs().reshape(-1)
        return sizes.kthvalue(min(int(self.share * sizes.numel()) + 1, sizes.numel())).values


class Sign(Defence):
    """Keep one bit per entry: the sign, times the tensor's mean magnitude (after Seide et al. 2014).

    It has no slope, so that no attack can follow it: give an attacker None for ``transform``.
    """

    def __call__(self, gradients: Sequence[Tensor], *, step: int = 0) -> list[Tensor]:
        """Signs of one size per tensor."""
        del step
        return [each.sign() * each.abs().mean() for each in gradients]


class Quantize(Defence):
    """Round to 2^bits - 1 evenly spaced numbers between minus and plus the tensor's largest magnitude.

    Args:
        bits: 2 to 16. It has no slope: give an attacker None for ``transform``.
    """

    def __init__(self, bits: int) -> None:
        self.bits = integer("bits", bits, minimum=2, fix="For one bit use Sign.")
        if self.bits > 16:
            raise ValueError(f"bits must be at most 16, got {bits}. More change nothing in float32.")

    def __call__(self, gradients: Sequence[Tensor], *, step: int = 0) -> list[Tensor]:
        """Rounded gradients."""
        del step
        levels = 2 ** (self.bits - 1) - 1
        found = []
        for each in gradients:
            unit = each.detach().abs().max() / levels if each.numel() else each.new_ones(())
            unit = torch.where(unit > 0, unit, 1.0)
            found.append((each / unit).round() * unit)
        return found


class Compose(Defence):
    """One defence after the other.

    Args:
        *defences: in order.
    """

    def __init__(self, *defences: Defence) -> None:
        self.defences = tuple(instance("defences", each, Defence) for each in defences)

    def __call__(self, gradients: Sequence[Tensor], *, step: int = 0) -> list[Tensor]:
        """What the last one gives."""
        found = list(gradients)
        for defence in self.defences:
            found = defence(found, step=step)
        return found

    def __repr__(self) -> str:
        return f"Compose({', '.join(map(repr, self.defences))})"
