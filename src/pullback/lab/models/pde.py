"""Differential equations with known solutions, for networks that are trained on the equation itself.

A problem says where its points lie, what each loss is, and how far a network is from the exact solution. It asks
for derivatives through a function ``evaluate(x, order)``, so that any network, and the exact solution, fit in.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from pullback.lab.models.taylor import Derivatives

Evaluate: TypeAlias = Callable[[Tensor, Literal[0, 1, 2]], Derivatives]
"""``evaluate(x, order)``: derivatives up to ``order`` (0: the value alone) at points x [n, d], one output."""

Points: TypeAlias = Mapping[str, tuple[Tensor, Tensor]]
"""By loss: points [..., n, d] and the data there [..., n]."""


class Problem(ABC):
    """An equation on a box with its exact solution.

    Attributes:
        low: lower corner of the box.
        high: upper corner.
        terms: names of the losses besides ``residual``.
    """

    low: ClassVar[tuple[float, ...]]
    high: ClassVar[tuple[float, ...]]
    terms: ClassVar[tuple[str, ...]] = ("boundary",)

    @abstractmethod
    def exact(self, x: Tensor) -> Tensor:
        """Exact solution [...] at points [..., d]."""

    @abstractmethod
    def source(self, x: Tensor) -> Tensor:
        """Right-hand side of the equation [...] at points [..., d]."""

    @abstractmethod
    def operator(self, u: Derivatives) -> Tensor:
        """Left-hand side of the equation [n]."""

    @abstractmethod
    def edges(self, inside: Tensor) -> dict[str, Tensor]:
        """Points of the other losses, from uniform points [..., k, n, d] of the box, k = `faces` sets of them."""

    faces: ClassVar[int]

    def draw(self, count: int, batches: int, generator: torch.Generator, dtype: torch.dtype) -> Points:
        """Fresh uniform points for several steps: ``count`` inside and ``count`` on every face.

        Args:
            count: points per set.
            batches: number of steps.
            generator: where the numbers come from, always as float64, so that dtypes share their points.
            dtype: dtype of points and data.

        Returns:
            Points [batches, n, d] and data [batches, n] by loss.
        """
        low, high = (torch.tensor(each, dtype=torch.float64) for each in (self.low, self.high))
        shape = (batches, 1 + self.faces, count, len(self.low))
        box = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
        inside = box[:, 0]
        found = {"residual": (inside, self.source(inside))}
        found |= {name: (x, self.exact(x)) for name, x in self.edges(box[:, 1:]).items()}
        return {name: (x.to(dtype), data.to(dtype)) for name, (x, data) in found.items()}

    def losses(self, points: Points, evaluate: Evaluate) -> dict[str, Tensor]:
        """Unweighted losses of one step: points [n, d] and data [n] by name.

        Each face's loss is the mean over its own points and faces are added up, as in the paper's code.
        """
        x, source = points["residual"]
        residual = (self.operator(evaluate(x, 2)) - source).square().mean()
        return {"residual": residual, **self.data_losses(points, evaluate)}

    def data_losses(self, points: Points, evaluate: Evaluate) -> dict[str, Tensor]:
        """The losses besides the residual: here the squared error on the boundary."""
        x, data = points["boundary"]
        return {"boundary": self.faces * (evaluate(x, 0).value[:, 0] - data).square().mean()}

    def standardised(self, points: Points) -> Points:
        """The same points in units of `moments`; the losses then pass such points to ``evaluate``."""
        shift, scale = self.moments(points["residual"][0].dtype)
        return {name: ((x - shift) / scale, data) for name, (x, data) in points.items()}

    def grid(self, side: int, dtype: torch.dtype) -> Tensor:
        """Points [side^d, d] of an even grid over the box, its faces included."""
        axes = [
            torch.linspace(a, b, side, dtype=torch.float64) for a, b in zip(self.low, self.high, strict=True)
        ]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(axes)).to(dtype)

    def moments(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of uniform points of the box [d], by which inputs are standardised."""
        low, high = (torch.tensor(each, dtype=torch.float64) for each in (self.low, self.high))
        return ((low + high) / 2).to(dtype), ((high - low) / math.sqrt(12)).to(dtype)


def relative_l2(predicted: Tensor, exact: Tensor) -> float:
    """Euclidean norm of the error over that of the exact solution, in float64."""
    wanted = exact.double()
    return float((predicted.double() - wanted).norm() / wanted.norm())


@dataclass(frozen=True)
class Helmholtz(Problem):
    """``u_xx + u_yy + k^2 u = q`` on [-1, 1]^2 with u = sin(a1 pi x) sin(a2 pi y), zero on the boundary."""

    a1: float = 1.0
    a2: float = 4.0
    k: float = 1.0

    low: ClassVar[tuple[float, ...]] = (-1.0, -1.0)
    high: ClassVar[tuple[float, ...]] = (1.0, 1.0)
    faces: ClassVar[int] = 4

    def exact(self, x: Tensor) -> Tensor:
        """Exact solution."""
        return torch.sin(self.a1 * math.pi * x[..., 0]) * torch.sin(self.a2 * math.pi * x[..., 1])

    def source(self, x: Tensor) -> Tensor:
        """Q."""
        return (self.k**2 - (self.a1 * math.pi) ** 2 - (self.a2 * math.pi) ** 2) * self.exact(x)

    def operator(self, u: Derivatives) -> Tensor:
        """Laplacian plus k^2 u."""
        return second(u)[:, :, 0].sum(0) + self.k**2 * u.value[:, 0]

    def edges(self, inside: Tensor) -> dict[str, Tensor]:
        """Points pushed to the four sides."""
        x = inside.clone()
        for face in range(4):
            x[..., face, :, face // 2] = -1.0 if face % 2 == 0 else 1.0
        return {"boundary": x.flatten(-3, -2)}


@dataclass(frozen=True)
class KleinGordon(Problem):
    """``u_tt - u_xx + u^3 = f`` for (t, x) in [0, 1]^2 with u = x cos(5 pi t) + (x t)^3.

    Two losses besides the residual: the values at x = 0 and x = 1, and value and velocity at t = 0.
    """

    low: ClassVar[tuple[float, ...]] = (0.0, 0.0)
    high: ClassVar[tuple[float, ...]] = (1.0, 1.0)
    terms: ClassVar[tuple[str, ...]] = ("boundary", "initial")
    faces: ClassVar[int] = 3

    def exact(self, x: Tensor) -> Tensor:
        """Exact solution."""
        t, x = x[..., 0], x[..., 1]
        return x * torch.cos(5 * math.pi * t) + (x * t) ** 3

    def source(self, x: Tensor) -> Tensor:
        """f, by differentiating the exact solution twice."""
        u, (t, s) = self.exact(x), x.unbind(-1)
        u_tt = -((5 * math.pi) ** 2) * s * torch.cos(5 * math.pi * t) + 6 * s**3 * t
        return u_tt - 6 * s * t**3 + u**3

    def operator(self, u: Derivatives) -> Tensor:
        """Wave operator plus the cube."""
        curves = second(u)[:, :, 0]
        return curves[0] - curves[1] + u.value[:, 0] ** 3

    def edges(self, inside: Tensor) -> dict[str, Tensor]:
        """Points pushed to x = 0 and x = 1, and to t = 0."""
        x = inside.clone()
        x[..., 0, :, 1], x[..., 1, :, 1], x[..., 2, :, 0] = 0.0, 1.0, 0.0
        return {"boundary": x[..., :2, :, :].flatten(-3, -2), "initial": x[..., 2, :, :]}

    def data_losses(self, points: Points, evaluate: Evaluate) -> dict[str, Tensor]:
        """Squared error of the value on two sides; at t = 0 that of value and velocity, which is 0 there."""
        (x, data), (start, begun) = points["boundary"], points["initial"]
        u = evaluate(start, 1)
        return {
            "boundary": 2 * (evaluate(x, 0).value[:, 0] - data).square().mean(),
            "initial": (u.value[:, 0] - begun).square().mean() + u.first[0, :, 0].square().mean(),
        }


@dataclass(frozen=True)
class Poisson(Problem):
    """``u_xx = g`` on [0, 1] with u = sin(c x)."""

    c: float = 4.0

    low: ClassVar[tuple[float, ...]] = (0.0,)
    high: ClassVar[tuple[float, ...]] = (1.0,)
    faces: ClassVar[int] = 2

    def exact(self, x: Tensor) -> Tensor:
        """Exact solution."""
        return torch.sin(self.c * x[..., 0])

    def source(self, x: Tensor) -> Tensor:
        """G."""
        return -(self.c**2) * self.exact(x)

    def operator(self, u: Derivatives) -> Tensor:
        """Second derivative."""
        return second(u)[0, :, 0]

    def edges(self, inside: Tensor) -> dict[str, Tensor]:
        """The two ends, each once: random points have nowhere else to go."""
        x = inside[..., :1, :].clone()
        x[..., 0, :, :], x[..., 1, :, :] = 0.0, 1.0
        return {"boundary": x.flatten(-3, -2)}


def second(u: Derivatives) -> Tensor:
    """Second derivatives [d, n, out].

    Raises:
        ValueError: if they were not computed.
    """
    if u.second is None:
        raise ValueError("evaluate must return second derivatives for order 2, got None. Carry them along.")
    return u.second
