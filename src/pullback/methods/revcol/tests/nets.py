"""Small networks whose blocks and factors matter, and comparisons."""

from __future__ import annotations

import copy
from typing import Any

import torch

from pullback.methods.revcol import RevCol

CHANNELS, BLOCKS = (3, 4, 5, 6), (1, 1, 2, 1)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def net(columns: int = 4, *, factor: float | None = None, seed: int = 0, **how: Any) -> Any:
    """In float64, with weights and layer scales of order 1 and random factors; ``factor`` sets them all."""
    torch.manual_seed(seed)
    made = RevCol(columns, CHANNELS, BLOCKS, 5, **how).double()
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in made.named_parameters():
            drawn = torch.randn(p.shape, generator=g, dtype=torch.float64)
            if name.endswith("scale"):
                p.copy_(0.8 + 0.1 * drawn if factor is None else torch.full_like(p, factor))
            elif p.dim() > 1:
                p.copy_(drawn / p[0].numel() ** 0.5)
            elif name.endswith(("gamma", "norm.weight", "1.weight")):
                p.copy_(0.6 + 0.2 * drawn)
            else:
                p.copy_(0.2 * drawn)
    return made


def begun(columns: int, factor: float = 0.5, **how: Any) -> Any:
    """In float64 with the authors' initial weights, but layer scales that let the blocks take part."""
    torch.manual_seed(0)
    made = RevCol(columns, (8, 16, 32, 64), BLOCKS, 5, layer_scale=0.5, **how).double()
    with torch.no_grad():
        for step in made.columns.steps:
            step.scale.fill_(factor)  # ty: ignore[call-non-callable]
    return made


def off(model: Any, x: torch.Tensor) -> float:
    """Relative error of the gradients in float32 against plain automatic differentiation in float64."""
    exact = gradients(copy.deepcopy(model).set_reversible(False), x)[1]
    ours = gradients(copy.deepcopy(model).float(), x.float())[1]
    return relative([each.double() for each in ours], exact)


def images(n: int = 2, side: int = 32, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return draw(n, 3, side, side, seed=7).sigmoid().to(dtype)


def targets(n: int = 2) -> torch.Tensor:
    return torch.arange(n) % 5


def gradients(model: RevCol, x: torch.Tensor, seed: int = 3) -> tuple[Any, list[torch.Tensor]]:
    """Output and the gradients of its loss for all parameters; None where the loss does not reach."""
    torch.manual_seed(seed)
    out = model(x)
    loss = model.loss(out, x.detach(), targets(len(x)))
    return out, list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


def relative(ours: Any, theirs: Any) -> float:
    """Largest error, each tensor relative to its largest entry, or a thousandth of the largest of all."""
    least = 1e-3 * max(float(each.detach().abs().max()) for each in theirs if each is not None)
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            size = max(float(other.detach().abs().max()), least)
            worst = max(worst, float((one - other).detach().abs().max()) / size)
    return worst
