"""What a gradient inversion makes small: the distance between two gradients, and total variation of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pullback.core.checks import choice, non_negative, shown

Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]
MatchingKind: TypeAlias = Literal["cosine", "euclidean"]
GradientTransform: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""A function of a list of gradients that gives a list of the same shapes."""


class GradientMatching:
    """Distance between the gradient of a guess and the one that was shared, over all parameters together.

    ``"cosine"`` is 1 - <a, b> / (norm of a, norm of b), one cosine over the concatenation of all parameters (Geiping et
    al. 2020, arXiv:2003.14053, equation 4). It lies in [0, 2] and does not depend on the length of either side.
    ``"euclidean"`` is the squared distance, summed over all entries (Zhu et al. 2019, arXiv:1906.08935, equation 4).

    Args:
        kind: which distance.
        weights: factor of every parameter's share of inner products and squares, by name; names that are left out
            count 1. None: all 1.
        layers: names of parameters, or of modules with all their parameters, that are compared; None: all.
        transform: what the attacker believes was done to the gradient before it was shared, for example
            `pullback.core.gradient_defences.Prune`. It is applied to the guess's gradient and must be differentiable.

    Raises:
        ValueError: if the kind is unknown, or a weight negative or not finite.
        TypeError: if ``layers`` is one string, or ``transform`` cannot be called.
    """

    def __init__(
        self,
        kind: MatchingKind = "cosine",
        *,
        weights: Mapping[str, float] | None = None,
        layers: Sequence[str] | None = None,
        transform: GradientTransform | None = None,
    ) -> None:
        self.kind = choice("kind", kind, ("cosine", "euclidean"))
        if isinstance(layers, str):
            raise TypeError(f"layers must be a list of names, got {layers!r}. Pass [{layers!r}].")
        if transform is not None and not callable(transform):
            raise TypeError(
                f"transform must be a function of a list of gradients, got {shown(transform)}. Pass one, or None."
            )
        rows = {} if weights is None else dict(weights)
        self.weights = {name: non_negative(f"weights[{name!r}]", value) for name, value in rows.items()}
        self.layers = None if layers is None else tuple(layers)
        self.transform = transform

    def __repr__(self) -> str:
        parts = [repr(self.kind)]
        parts += [f"weights={self.weights}"] if self.weights else []
        parts += [f"layers={list(self.layers)}"] if self.layers is not None else []
        parts += [f"transform={self.transform!r}"] if self.transform is not None else []
        return f"GradientMatching({', '.join(parts)})"

    def select(self, names: Sequence[str]) -> list[int]:
        """Positions of the parameters that are compared.

        Raises:
            ValueError: if a name of ``layers`` or ``weights`` fits no parameter.
        """
        wanted = self.layers
        for name in wanted or ():
            if not any(_inside(each, name) for each in names):
                raise ValueError(_unknown("layers", name, names))
        for name in self.weights:
            if name not in names:
                raise ValueError(_unknown("weights", name, names))
        return [i for i, n in enumerate(names) if wanted is None or any(_inside(n, w) for w in wanted)]

    def bind(self, target: Sequence[Tensor], names: Sequence[str]) -> Callable[[Sequence[Tensor]], Tensor]:
        """The distance from ``target`` as a function of the other gradients, with all that is constant done once.

        Args:
            target: shared gradients of the parameters that `select` names, in their order.
            names: their names.

        Returns:
            A function of gradients of the same shapes that gives a 0-dim tensor. It can be differentiated once.
        """
        weights = [self.weights.get(name, 1.0) for name in names] if self.weights else None
        target = list(target)
        if self.kind == "cosine":
            target = _unit(target, weights)
            distance: Any = _Cosine
        else:
            distance = _Euclidean
        fixed = _Fixed(target, None if weights is None else torch.tensor(weights).to(target[0]))
        transform = self.transform
        if transform is None:
            return lambda gradients: distance.apply(fixed, *gradients)
        return lambda gradients: distance.apply(fixed, *transform(gradients))

    def __call__(self, gradients: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
        """The distance between two lists of gradients, without names: ``weights`` and ``layers`` must be None.

        Raises:
            ValueError: if there are weights or layers.
        """
        if self.weights or self.layers is not None:
            raise ValueError("weights and layers must be None here, got some. Use bind(target, names).")
        return self.bind(target, [""] * len(target))(gradients)


def _inside(parameter: str, name: str) -> bool:
    return parameter == name or parameter.startswith(f"{name}.")


def _unknown(argument: str, name: str, names: Sequence[str]) -> str:
    return f"{argument} must name shared parameters, got {name!r}. The shared ones are {shown(list(names))}."


def _unit(target: Sequence[Tensor], weights: Sequence[float] | None) -> list[Tensor]:
    """The target divided by its length, which is taken in float64, times the weights."""
    factors = [1.0] * len(target) if weights is None else list(weights)
    squares = sum(w * float(t.double().square().sum()) for w, t in zip(factors, target, strict=True))
    length = float(squares) ** 0.5
    if length == 0.0:
        raise ValueError("gradients must not be zero in the compared layers, got zeros only. Compare others.")
    return [(t.double() * (w / length)).to(t.dtype) for w, t in zip(factors, target, strict=True)]


class _Fixed:
    """What does not change while the guess does; no tensor argument of the functions below."""

    def __init__(self, target: list[Tensor], weights: Tensor | None) -> None:
        self.target, self.weights = target, weights

    def weighted(self, tensors: Tensors) -> Tensors:
        return tensors if self.weights is None else torch._foreach_mul(tensors, self.weights.unbind())

    def squares(self, tensors: Tensors) -> Tensor:
        norms = torch.stack(torch._foreach_norm(tensors)).square()
        return (norms if self.weights is None else norms * self.weights).sum()


class _Cosine(torch.autograd.Function):
    """1 - cosine; one pass for the products, one for the norms, and three grouped calls backwards."""

    @staticmethod
    def forward(ctx: Any, fixed: _Fixed, *gradients: Tensor) -> Tensor:
        rows = [torch.dot(g.reshape(-1), t.reshape(-1)) for g, t in zip(gradients, fixed.target, strict=True)]
        norm = fixed.squares(gradients).sqrt()
        inverse = torch.where(
            norm > 0, norm.reciprocal(), 0.0
        )  # a guess without gradient: distance 1, no slope
        cosine = torch.stack(rows).sum() * inverse
        ctx.fixed = fixed
        ctx.save_for_backward(inverse, cosine, *gradients)
        return 1 - cosine

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output: Tensor) -> tuple[Tensor | None, ...]:
        inverse, cosine, *gradients = ctx.saved_tensors
        rows = torch._foreach_mul(ctx.fixed.weighted(gradients), output * cosine * inverse.square())
        torch._foreach_sub_(rows, torch._foreach_mul(ctx.fixed.target, output * inverse))
        return (None, *rows)


class _Euclidean(torch.autograd.Function):
    """Squared distance; the differences are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, fixed: _Fixed, *gradients: Tensor) -> Tensor:
        apart = torch._foreach_sub(gradients, fixed.target)
        ctx.fixed = fixed
        ctx.save_for_backward(*apart)
        return fixed.squares(apart)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *torch._foreach_mul(ctx.fixed.weighted(ctx.saved_tensors), 2 * output))


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference between horizontal neighbours plus that between vertical ones.

    Args:
        images: [B, ..., H, W]; signals [B, C, L] have horizontal neighbours only.

    Returns:
        A 0-dim tensor. An axis of one entry contributes 0.
    """
    total = images.new_zeros(())
    if images.shape[-1] > 1:
        total = total + (images[..., 1:] - images[..., :-1]).abs().mean()
    if images.dim() > 3 and images.shape[-2] > 1:
        total = total + (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    return total
