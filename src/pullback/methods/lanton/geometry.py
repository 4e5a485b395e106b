"""Norms of layers, their linear minimisation oracles and dual norms, batched over layers of one shape.

A step of length 1 in the norm of a layer goes to ``LMO(B) = argmin_{||X|| <= 1} <B, X>``; how large a gradient is in
that geometry is told by the dual norm ``||G||_* = -<G, LMO(G)>``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pullback.core import checks
from pullback.core.norms import whole

Geometry: TypeAlias = Literal["spectral", "sign", "rms"]
"""RMS to RMS operator norm of a matrix, largest entry, or root mean square of a vector."""
GEOMETRIES: tuple[Geometry, ...] = get_args(Geometry)

Length: TypeAlias = Literal["spectral_unclamped", "original", "match_rms_adamw"]
"""How long a spectral step is; the names are those of ``torch.optim.Muon(adjust_lr_fn=...)``."""
LENGTHS: tuple[Length, ...] = get_args(Length)

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz iteration that Muon takes five times (torch's defaults)."""

MINIMAX = ((6.4949, -16.0795, 10.5554), (2.5629, -1.7805, 0.3823), (1.9589, -1.3144, 0.3623))
"""Three odd quintics whose composition differs from 1 by at most 0.0194 on [0.05, 1].

Each is the best uniform approximation of 1, by a x + b x^3 + c x^5, on the range that the one before leaves, widened by
5 % at both ends, so that rounding in bfloat16 leads nowhere where the next one grows.
"""

CHUNK = 1 << 21
"""Most entries of one batch: bounds the working memory beside the largest layer."""


def matrix(tensor: Tensor) -> Tensor:
    """A tensor of two or more dimensions as a matrix [first, all others]; kernels are [out, in * k * k]."""
    return tensor if tensor.dim() == 2 else tensor.flatten(1)


def length(geometry: Geometry, shape: Sequence[int], rule: Length = "spectral_unclamped") -> float:
    """How far, in units of its normalised direction, one LMO step of length 1 goes.

    Args:
        geometry: the norm.
        shape: shape of the layer, [d_out, d_in, ...] for a matrix or kernel.
        rule: for spectral layers: sqrt(d_out / d_in), Muon's sqrt(max(1, d_out / d_in)), or 0.2 sqrt(max(d_out, d_in)).

    Returns:
        The factor of U V^T (spectral), of the signs (1), or of the unit vector (sqrt(d)).
    """
    if geometry == "sign":
        return 1.0
    if geometry == "rms":
        return math.sqrt(math.prod(shape))
    rows, columns = shape[0], math.prod(shape[1:])
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    ratio = rows / columns
    return math.sqrt(max(1.0, ratio) if rule == "original" else ratio)


def default_geometry(tensor: Tensor) -> Geometry:
    """``"spectral"`` for matrices and kernels, ``"rms"`` for vectors and scalars."""
    return "spectral" if tensor.dim() >= 2 else "rms"


# --- batches of matrices -----------------------------------------------------------------------------------------


def batches(tensors: Sequence[Tensor], limit: int = CHUNK) -> list[tuple[list[int], int]]:
    """Sort matrices or kernels into batches of one shape, a matrix and its transpose counting as the same.

    Args:
        tensors: at least two dimensions each.
        limit: most entries of a batch; a larger matrix stands alone.

    Returns:
        Positions of each batch, those with at most as many rows as columns first, and how many these are.
    """
    found: dict[tuple[object, ...], tuple[list[int], list[int]]] = {}
    for position, tensor in enumerate(tensors):
        rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
        key = (min(rows, columns), max(rows, columns), tensor.dtype, tensor.device)
        found.setdefault(key, ([], []))[rows > columns].append(position)
    result = []
    for (low, high, *_), (wide, tall) in found.items():
        size = max(1, limit // (int(str(low)) * int(str(high))))
        order = wide + tall
        for start in range(0, len(order), size):
            part = order[start : start + size]
            result.append((part, min(max(len(wide) - start, 0), len(part))))
    return result


def stacked(tensors: Sequence[Tensor], wide: int) -> Tensor:
    """A new tensor [b, m, n] with m <= n of matrices or kernels; those from position ``wide`` on are transposed."""
    return torch.stack([matrix(t) if i < wide else matrix(t).mT for i, t in enumerate(tensors)])


def unstacked(batch: Tensor, shapes: Sequence[Sequence[int]], wide: int) -> list[Tensor]:
    """The parts of a batch in the shapes that `stacked` was given."""
    parts = batch.unbind()
    return [(x if i < wide else x.mT).reshape(s) for i, (x, s) in enumerate(zip(parts, shapes, strict=True))]


def newton_schulz(
    batch: Tensor,
    *,
    steps: int = 5,
    coefficients: Sequence[float] = QUINTIC,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Orthogonalise matrices approximately: singular values go to about 0.7 to 1.15, singular vectors stay.

    Args:
        batch: [b, m, n] with m <= n.
        steps: iterations X <- a X + (b A + c A^2) X with A = X X^T, from X / ||X||_F.
        coefficients: a, b, c.
        eps: least Frobenius norm that is divided by; a zero matrix stays zero.
        dtype: of the iteration, bfloat16 as in torch's Muon; ``None``: that of the batch.

    Returns:
        [b, m, n] in ``dtype``.
    """
    a, b, c = coefficients
    x = batch if dtype is None else batch.to(dtype)
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_(min=eps)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def polar(batch: Tensor) -> Tensor:
    """U V^T of the singular value decomposition of [..., m, n]; singular values below rounding give none."""
    u, s, v = torch.linalg.svd(batch, full_matrices=False)
    least = torch.finfo(s.dtype).eps * max(batch.shape[-2:]) * s.amax(-1, keepdim=True)
    return (u * ((s > least) & (s > 0)).to(u.dtype).unsqueeze(-2)) @ v


def nuclear_norms(batch: Tensor, *, exact: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """Sum of the singular values of every matrix.

    The estimate is <D, p(D)> = sum_i s_i p(s_i / c) for the odd polynomial p of degree 125 made of `MINIMAX` and
    c = ||D D^T||_F^(1/2) >= s_1, computed on Gram matrices [m, m] alone: one product of size m m n and eight of size
    m^3, against 5 (2 m m n + m^3) of a Newton-Schulz iteration. It lies within 2 % of the part of the sum that
    singular values above 0.05 c make; smaller ones are counted in part. In bfloat16 rounding adds up to 6 %.

    Args:
        batch: [b, m, n] with m <= n.
        exact: by singular value decomposition instead.
        dtype: of the iteration; ``None``: that of the batch.

    Returns:
        [b], float32 or wider.
    """
    wide = torch.promote_types(batch.dtype, torch.float32)
    if exact:
        return torch.linalg.svdvals(batch.to(wide)).sum(-1)
    # Squares of small or large entries leave the range of float32: scaled by the largest entry they do not.
    largest = batch.abs().amax((-2, -1), keepdim=True).to(wide)
    unit = batch / torch.where(largest > 0, largest, 1.0)
    x = unit if dtype is None else unit.to(dtype)
    gram = torch.bmm(x, x.mT)
    square = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True, dtype=wide)
    ratio = gram / torch.where(square > 0, square, 1.0).to(gram.dtype)
    product = ratio  # p_k(X) X^T of the scaled X; R = p_k(X) p_k(X)^T
    for position, (a, b, c) in enumerate(MINIMAX):
        factor = torch.baddbmm(ratio, ratio, ratio, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        if position == len(MINIMAX) - 1:
            break
        product = torch.bmm(factor, product)
        ratio = product if position == 0 else torch.bmm(factor, ratio)
        ratio = torch.bmm(factor, ratio)
    total = (factor.to(wide) * product.to(wide)).sum((-2, -1))
    return total * square.sqrt().flatten() * largest.flatten()


# --- steps ------------------------------------------------------------------------------------------------------


def step_(
    params: Sequence[Tensor],
    sources: Sequence[Tensor],
    geometry: Geometry,
    *,
    lr: float | Tensor,
    rates: Tensor | None = None,
    towards: tuple[Sequence[Tensor], float] | None = None,
    rule: Length = "spectral_unclamped",
    ns_steps: int = 5,
    dtype: torch.dtype | None = None,
    foreach: bool = True,
) -> None:
    """Move layers of one geometry by lr r LMO(source), in place and batched by shape (Algorithm 1, line 5).

    Args:
        params: what is moved; plain or sharded, none empty.
        sources: what the directions come from (momentum).
        geometry: the norm of all of them.
        lr: step length, a number or a 0-dim tensor.
        rates: multipliers r [n]; ``None``: all 1.
        towards: tensors and a weight: directions come from ``source.lerp(tensor, weight)`` instead (Nesterov).
        rule: length of spectral steps.
        ns_steps: Newton-Schulz iterations.
        dtype: of these.
        foreach: whether layers are batched; one by one otherwise.
    """
    scale = -1.0 if isinstance(lr, Tensor) else -lr
    if isinstance(lr, Tensor):
        rates = lr.to(params[0].device) * (1.0 if rates is None else rates)
    factors = None if rates is None else list(rates.expand(len(params)).unbind())
    runs = batches(sources, CHUNK if foreach else 1) if geometry == "spectral" else []
    for rows, wide in runs:
        batch = stacked([whole(sources[i]) for i in rows], wide)
        if towards is not None:
            batch.lerp_(stacked([whole(towards[0][i]) for i in rows], wide), towards[1])
        batch = newton_schulz(batch, steps=ns_steps, dtype=dtype)
        if factors is not None:
            batch = batch * torch.stack([factors[i] for i in rows]).to(batch.device).view(-1, 1, 1)
        moves = unstacked(batch, [params[i].shape for i in rows], wide)
        for part in (slice(0, wide), slice(wide, None)):
            some = [params[i] for i in rows[part]]
            if some:
                _add_(some, moves[part], scale * length(geometry, some[0].shape, rule))
    for rows in [] if geometry == "spectral" else pieces(sources, CHUNK if foreach else 1):
        some = [sources[i] for i in rows]
        if towards is not None:
            some = [source.lerp(towards[0][i], towards[1]) for i, source in zip(rows, some, strict=True)]
        own = None if factors is None else [factors[i].to(params[i].device) for i in rows]
        _add_([params[i] for i in rows], _directions(some, geometry, own), scale)


def _directions(tensors: list[Tensor], geometry: Geometry, factors: list[Tensor] | None) -> list[Tensor]:
    """Signs, or vectors of root mean square 1, times factors; zero for zero."""
    if geometry == "sign":
        moves = list(torch._foreach_sign(tensors)) if len(tensors) > 1 else [tensors[0].sign()]
    else:
        norms = [
            whole(torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)))
            for t in tensors
        ]
        roots = [length(geometry, tensor.shape) for tensor in tensors]
        sizes = torch._foreach_div(torch._foreach_clamp_min(norms, torch.finfo(torch.float32).tiny), roots)
        moves = [tensor / size for tensor, size in zip(tensors, sizes, strict=True)]
    if factors is not None:
        moves = [move * factor for move, factor in zip(moves, factors, strict=True)]
    return moves


def _add_(params: list[Tensor], moves: list[Tensor], alpha: float) -> None:
    """Add moves to parameters; each rank takes its own part where these are sharded and the moves whole."""
    if not any(hasattr(param, "full_tensor") for param in params):
        torch._foreach_add_(params, moves, alpha=alpha)
        return
    from torch.distributed.tensor import DTensor, distribute_tensor  # too slow to import for everyone

    for param, move in zip(params, moves, strict=True):
        if isinstance(param, DTensor) and not isinstance(move, DTensor):
            move = distribute_tensor(
                move.to(param.dtype), param.device_mesh, param.placements, src_data_rank=None
            )
        param.add_(move, alpha=alpha)


# --- directions and dual norms -----------------------------------------------------------------------------------


def lmo(gradient: Tensor, geometry: Geometry, rule: Length = "spectral_unclamped") -> Tensor:
    """The exact direction argmin_{||X|| <= 1} <gradient, X> of one layer, zero for a zero gradient.

    Args:
        gradient: a layer's gradient or momentum, of two or more dimensions where spectral.
        geometry: the layer's norm.
        rule: length of spectral steps, see `length`.

    Raises:
        TypeError, ValueError: if ``gradient`` is no real floating tensor, or the geometry is unknown.
    """
    checks.floating("gradient", gradient)
    if checks.choice("geometry", geometry, GEOMETRIES) == "spectral":
        return polar(matrix(gradient)).reshape(gradient.shape) * -length(geometry, gradient.shape, rule)
    return -_directions([gradient], geometry, None)[0]


def dual_norms(
    tensors: Sequence[Tensor],
    geometry: Geometry,
    *,
    minus: Sequence[Tensor] | None = None,
    rule: Length = "spectral_unclamped",
    exact: bool = False,
    dtype: torch.dtype | None = None,
    foreach: bool = True,
) -> Tensor:
    """Dual norms of many layers of one geometry, or of their differences from ``minus``, batched by shape.

    Args:
        tensors: plain tensors, none empty.
        geometry: the norm of all of them.
        minus: what is subtracted, one tensor for each.
        rule: length of spectral steps.
        exact: nuclear norms by singular values; else estimated, see `nuclear_norms`.
        dtype: of the estimate; ``None``: that of the tensors.
        foreach: whether layers are batched; one by one otherwise.

    Returns:
        [len(tensors)] on the first one's device, float32 or wider.
    """
    norms: dict[int, Tensor] = {}
    if geometry == "spectral":
        for rows, wide in batches(tensors, CHUNK if foreach else 1):
            batch = stacked([tensors[i] for i in rows], wide)
            if minus is not None:
                batch -= stacked([minus[i] for i in rows], wide)
            norms.update(zip(rows, nuclear_norms(batch, exact=exact, dtype=dtype).unbind(), strict=True))
    else:
        order = 1 if geometry == "sign" else 2
        for rows in pieces(tensors, CHUNK if foreach else 1):
            some = [tensors[i] for i in rows]
            if minus is not None:
                some = list(torch._foreach_sub(some, [minus[i] for i in rows]))
            for row, tensor in zip(rows, some, strict=True):
                wide_type = torch.promote_types(tensor.dtype, torch.float32)
                norms[row] = torch.linalg.vector_norm(tensor, order, dtype=wide_type)
    ordered = [norms[i].to(tensors[0].device) for i in range(len(tensors))]
    sizes = [length(geometry, tensor.shape, rule) for tensor in tensors]
    return torch.stack(list(torch._foreach_mul(ordered, sizes)))


def pieces(tensors: Sequence[Tensor], limit: int = CHUNK) -> list[list[int]]:
    """Cut a list into runs of at most ``limit`` entries (one tensor at least), in order."""
    runs: list[list[int]] = []
    filled = limit
    for position, tensor in enumerate(tensors):
        if filled + tensor.numel() > limit or not runs:
            runs.append([])
            filled = 0
        runs[-1].append(position)
        filled += tensor.numel()
    return runs


# --- settings ----------------------------------------------------------------------------------------------------


def decay(name: str, value: object) -> float:
    """Check the decay of an average, in [0, 1)."""
    number = checks.fraction(name, value, fix="Use 0 for no averaging.")
    if number == 1.0:
        raise ValueError(
            f"{name} must be in [0, 1), got 1.0. At 1 nothing is ever taken in; use 0.95, for example."
        )
    return number


def check_alpha(value: object) -> float:
    """Check ``alpha``: positive, ``inf`` allowed."""
    if isinstance(value, float | int) and not isinstance(value, bool) and value == torch.inf:
        return torch.inf
    return checks.positive(
        "alpha", value, fix="Use 'auto', a noise level > 0, or math.inf for the base optimizer."
    )


def check_settings(given: Mapping[str, Any]) -> None:
    """Check all settings of a group.

    Raises:
        TypeError: if one is of another type.
        ValueError: if one is out of range.
    """
    checks.non_negative("lr", given["lr"])
    betas = given["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(
            f"betas must be a pair of numbers, got {checks.shown(betas)}. Use (0.95, 0.9), for example."
        )
    for position, beta in enumerate(betas):
        decay(f"betas[{position}]", beta)
    if given["alpha"] != "auto":
        check_alpha(given["alpha"])
    checks.choice("geometry", given["geometry"], (*GEOMETRIES, "auto"))
    checks.choice("difference", given["difference"], ("previous", "independent"))
    if given["noise_every"] is not None:
        checks.integer("noise_every", given["noise_every"], minimum=1, fix="Use None to measure nothing.")
    checks.non_negative("weight_decay", given["weight_decay"])
    checks.integer("ns_steps", given["ns_steps"], minimum=1)
    checks.choice("ns_dtype", given["ns_dtype"], ("bfloat16", "float32", "float64"))
    checks.choice("adjust_lr_fn", given["adjust_lr_fn"], LENGTHS)
    if given["nonfinite"] is not None:
        checks.choice("nonfinite", given["nonfinite"], checks.NON_FINITE_POLICIES)
