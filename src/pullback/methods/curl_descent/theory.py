"""When sign flips make a solution unstable, what they conserve, how chaotic weights are, how much of a field is curl.

The setting is a two-layer linear network, y = W2 W1 x, with M inputs and N hidden units, trained by flipped gradient
descent: ``W1 -= eta g1 D1`` and ``W2 -= eta g2 D2`` with D1, D2 diagonal matrices of signs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pullback.core.checks import choice, floating, integer, positive, shown
from pullback.core.kinds.transform import Parameters
from pullback.core.streams import generator
from pullback.methods.curl_descent.targets import named

Layer = Literal["hidden", "readout"]


# --- a given network ---------------------------------------------------------------------------------------


def stability_operator(
    W1: Tensor, W2: Tensor, signs_in: Tensor | None = None, signs_hidden: Tensor | None = None
) -> Tensor:
    r"""The symmetric operator S = ||W2||^2 D1 + W1^T D2 W1 that rules the error near a solution.

    With w = W2 W1 near a solution w*, the error delta = w - w* obeys ``delta' = -delta Sigma S`` under inputs of
    covariance Sigma. Every eigenvalue of the Jacobian that is not zero is minus one of Sigma S: real, and by
    Sylvester's law of the sign that S has, whatever Sigma is.

    With P outputs, errors along the eigenvectors of W2 W2^T decouple, each with an operator of its own in which
    ||W2||^2 is the eigenvalue; they are stacked.

    Args:
        W1: hidden weights [..., N, M]; leading dimensions are a stack of networks.
        W2: readout weights [..., P, N], or [N] for one network with one output.
        signs_in: +1 or -1 of each input [M] or [..., M]; ``None``: no flip.
        signs_hidden: +1 or -1 of each hidden unit [N] or [..., N]; ``None``: no flip.

    Returns:
        [..., M, M] in float64; [..., P, M, M] for P > 1.

    Raises:
        TypeError: if a weight is no real floating tensor.
        ValueError: if shapes do not fit or signs are other than +1 and -1.
    """
    first, second, d1, d2 = _checked(W1, W2, signs_in, signs_hidden)
    middle = first.mT @ (d2[..., :, None] * first)
    sizes = (
        second.square().sum((-1, -2))[..., None]
        if second.shape[-2] == 1
        else torch.linalg.eigvalsh(second @ second.mT)
    )
    operator = middle[..., None, :, :] + sizes[..., None, None] * torch.diag_embed(d1)[..., None, :, :]
    return operator.squeeze(-3) if second.shape[-2] == 1 else operator


def solution_stability(
    W1: Tensor, W2: Tensor, signs_in: Tensor | None = None, signs_hidden: Tensor | None = None
) -> Tensor:
    """Smallest eigenvalue of `stability_operator`: a solution with these weights is stable iff it is positive.

    Args:
        W1: hidden weights [..., N, M].
        W2: readout weights [..., P, N], or [N].
        signs_in: signs of the inputs, i.e. of the columns of the update of W1.
        signs_hidden: signs of the hidden units, i.e. of the columns of the update of W2.

    Returns:
        Shape [...], float64, in the unit of a squared weight.

    Raises:
        TypeError: if a weight is no real floating tensor.
        ValueError: if shapes do not fit or signs are other than +1 and -1.

    Example:
        >>> W1, W2 = torch.tensor([[1.5]]), torch.tensor([[0.5]])
        >>> solution_stability(W1, W2, torch.tensor([-1.0])) > 0  # W1^2 > W2^2
        tensor(True)
    """
    lowest = torch.linalg.eigvalsh(stability_operator(W1, W2, signs_in, signs_hidden))[..., 0]
    return lowest if W2.dim() == 1 or W2.shape[-2] == 1 else lowest.amin(-1)


def conserved_quantities(
    W1: Tensor, W2: Tensor, signs_in: Tensor | None = None, signs_hidden: Tensor | None = None
) -> Tensor:
    """What flipped gradient flow conserves, one number per hidden unit i: sum_j D1_j W1_ij^2 - D2_i sum_p W2_pi^2.

    Exact in continuous time for linear and ReLU hidden units, whatever loss or layers follow; with steps of size eta
    it drifts in proportion to eta. A flipped readout unit (D2 = -1) moves on a sphere.

    Args:
        W1: hidden weights [..., N, M].
        W2: readout weights [..., P, N], or [N].
        signs_in: signs of the inputs.
        signs_hidden: signs of the hidden units.

    Returns:
        Shape [..., N], float64.

    Raises:
        TypeError: if a weight is no real floating tensor.
        ValueError: if shapes do not fit or signs are other than +1 and -1.
    """
    first, second, d1, d2 = _checked(W1, W2, signs_in, signs_hidden)
    return (d1[..., None, :] * first.square()).sum(-1) - d2 * second.square().sum(-2)


def chaos_order(path: Tensor) -> Tensor:
    """How much weights still move: q = mean_i Var_t(w_i) / Var_i(mean_t w_i), 0 at rest, large in chaos.

    Args:
        path: weights over time [time, ..., weights], at least two times and two weights.

    Returns:
        Shape [...] (0-dim for one path), float64; infinite when all weights have the same mean.

    Raises:
        TypeError: if it is no real floating tensor.
        ValueError: if there are fewer than two dimensions, times or weights.
    """
    floating("path", path)
    if path.dim() < 2 or path.shape[0] < 2 or path.shape[-1] < 2:
        raise ValueError(
            f"path must be [time, ..., weights] with two of each at least, got {shown(path)}. "
            "Stack snapshots of the weights with torch.stack."
        )
    exact = path.double()
    return exact.var(0, correction=0).mean(-1) / exact.mean(0).var(-1, correction=0)


# --- large random networks ---------------------------------------------------------------------------------


def flip_threshold(ratio: float, layer: Layer, *, balance: float = 1.0) -> float:
    r"""Share of flipped neurons beyond which solutions of a large random linear network are unstable.

    In the limit of many units D1 and W1^T D2 W1 are free of each other, and the lower edge of the spectrum of S is a
    maximum over one variable. Setting it to zero and solving for the share gives, with c = M / N and balance b,

    - hidden layer:  max over t > 1 of  [ (t - 1/t) / c - b (t^2 - 1) - (t - 1) ] / 2,
    - readout:       max over 0 < s < 1 of  [ (1 - s) - c (1 - s^2) (1/s - b) ] / 2.

    Both functions are concave, with a maximum at the one positive root of a cubic.

    Args:
        ratio: c = inputs / hidden units, > 0.
        layer: ``"hidden"``: a share of the *inputs* is flipped, i.e. columns of the update of W1; ``"readout"``: a
            share of the hidden units, i.e. columns of the update of W2.
        balance: ||W2||^2 over inputs times the variance of W1's entries; 1 for both layers scaled alike.

    Returns:
        A share in [0, 1]; 1 means that no share makes them unstable, 0 that the smallest one does.

    Raises:
        TypeError: if ``ratio`` or ``balance`` is no number.
        ValueError: if ``ratio`` or ``balance`` is not positive or ``layer`` is unknown.

    Example:
        >>> round(flip_threshold(0.5, "readout"), 2), flip_threshold(0.2, "hidden"), flip_threshold(0.7, "hidden")
        (0.1, 1.0, 0.0)
    """
    c = positive("ratio", ratio, fix="Give inputs / hidden units.")
    b = positive("balance", balance)
    if choice("layer", layer, ("hidden", "readout")) == "hidden":
        t = max(1.0, _positive_root(2.0 * b * c, c - 1.0, -1.0))
        share = ((t - 1.0 / t) / c - b * (t * t - 1.0) - (t - 1.0)) / 2.0
    else:
        s = min(1.0, _positive_root(2.0 * b * c, 1.0 - c, -c))
        share = ((1.0 - s) - c * (1.0 - s * s) * (1.0 / s - b)) / 2.0
    return min(1.0, max(0.0, share))


def _positive_root(cubic: float, square: float, constant: float) -> float:
    """The one positive root of ``cubic x^3 + square x^2 + constant`` with cubic > 0 > constant."""
    roots = np.roots([cubic, square, 0.0, constant])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9 * max(1.0, abs(root))))


# --- curl --------------------------------------------------------------------------------------------------


def curl_fraction(
    loss_fn: Callable[[], Tensor],
    params: Parameters,
    signs: Sequence[Tensor],
    *,
    probes: int = 1,
    seed: int = 0,
) -> Tensor:
    r"""Share of the field's Jacobian that is curl: ||(H D - D H) v|| / (||H D v|| + ||D H v||).

    The flipped field -D grad L has the Jacobian -D H, whose antisymmetric part (H D - D H) / 2 vanishes iff D commutes
    with the Hessian H: then the field is a gradient. The number is 0 for D = +-I, at most 1, and with many probes tends
    to the ratio of Frobenius norms. Nothing is changed: no ``.grad``, no mode, no generator.

    Args:
        loss_fn: makes the scalar loss, twice differentiable; called once.
        params: a module, a mapping, tensors or (name, tensor) pairs; the point at which the field is examined.
        signs: one tensor of +1 and -1 per parameter that broadcasts to it (`RuleFlip.signs` makes them).
        probes: number of random vectors v (independent normal entries); two Hessian-vector products each.
        seed: stream of the probes.

    Returns:
        0-dim tensor in [0, 1] of the parameters' dtype; 0 where the Hessian vanishes along all probes.

    Raises:
        TypeError: if ``loss_fn`` gives no scalar tensor, or a parameter is not floating.
        ValueError: if there is no parameter, or a parameter needs no gradient, or signs do not fit.
        RuntimeError: if the loss does not depend on the parameters.

    Example:
        >>> w = torch.ones(2, requires_grad=True)
        >>> curl_fraction(lambda: (w[0] * w[1]).square(), [w], [torch.tensor([-1.0, 1.0])]) > 0.1
        tensor(True)
    """
    points = _points(params)
    broadcast = _broadcast(signs, points)
    integer("probes", probes, minimum=1)
    with torch.enable_grad():
        loss = loss_fn()
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise TypeError(f"loss_fn must give a scalar tensor, got {shown(loss)}. Reduce it with .mean().")
        if not loss.requires_grad:
            raise RuntimeError(
                "loss_fn must depend on the parameters, got a loss without graph. "
                "Compute it inside loss_fn, without torch.no_grad."
            )
        grads = torch.autograd.grad(loss, points, create_graph=True, materialize_grads=True)
    totals = torch.zeros(3, dtype=points[0].dtype, device=points[0].device)
    for probe in range(probes):
        v = _probe(points, seed, probe)
        first = _product(grads, points, _times(broadcast, v))  # H D v
        second = _times(broadcast, _product(grads, points, v))  # D H v
        difference = [a - b for a, b in zip(first, second, strict=True)]
        totals += torch.stack([_square(row) for row in (difference, first, second)])
    part, one, other = totals.sqrt()
    whole = one + other
    return torch.where(whole > 0, part / whole.clamp_min(torch.finfo(whole.dtype).tiny), 0.0)


def _points(params: Parameters) -> list[Tensor]:
    rows = named(params)
    for name, tensor in rows:
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got {tensor.dtype}. Leave it out of params.")
        if not tensor.requires_grad:
            raise ValueError(
                f"{name} must require a gradient, got requires_grad=False. Leave it out of params."
            )
    return [tensor for _, tensor in rows]


def _broadcast(signs: Sequence[Tensor], points: list[Tensor]) -> list[Tensor]:
    given = list(signs)
    if len(given) != len(points):
        raise ValueError(
            f"signs must hold one tensor for each of {len(points)} parameters, got {len(given)}. "
            "RuleFlip(...).signs(model) makes them."
        )
    for sign, point in zip(given, points, strict=True):
        if not _fits(sign, point) or not bool((sign.abs() == 1).all()):
            raise ValueError(
                f"signs must hold +1 or -1 and broadcast to a parameter of shape {tuple(point.shape)}, "
                f"got {shown(sign)}. RuleFlip(...).signs(model) makes them."
            )
    return [sign.to(point) for sign, point in zip(given, points, strict=True)]


def _fits(sign: object, point: Tensor) -> bool:
    """Whether a tensor broadcasts to a parameter without making it larger."""
    if not isinstance(sign, Tensor) or sign.dim() > point.dim():
        return False
    trailing = zip(reversed(sign.shape), reversed(point.shape), strict=False)
    return all(mine in {1, theirs} for mine, theirs in trailing)


def _probe(points: list[Tensor], seed: int, probe: int) -> list[Tensor]:
    drawn = []
    for index, point in enumerate(points):
        stream = generator("curl probe", seed, probe, index, device=point.device)
        drawn.append(torch.randn(point.shape, generator=stream, dtype=point.dtype, device=point.device))
    return drawn


def _product(grads: Sequence[Tensor], points: list[Tensor], v: list[Tensor]) -> list[Tensor]:
    """The Hessian times ``v``; zero where the gradient is constant."""
    rows = [(grad, each) for grad, each in zip(grads, v, strict=True) if grad.requires_grad]
    if not rows:
        return [torch.zeros_like(point) for point in points]
    outs, vectors = zip(*rows, strict=True)
    return list(torch.autograd.grad(outs, points, vectors, retain_graph=True, materialize_grads=True))


def _times(signs: list[Tensor], v: list[Tensor]) -> list[Tensor]:
    return [sign * each for sign, each in zip(signs, v, strict=True)]


def _square(rows: list[Tensor]) -> Tensor:
    return torch.stack([row.square().sum() for row in rows]).sum()


# --- checks ------------------------------------------------------------------------------------------------


def _checked(
    W1: Tensor, W2: Tensor, signs_in: Tensor | None, signs_hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both weights and both sign vectors in float64, of shapes that fit."""
    first, second = floating("W1", W1).double(), floating("W2", W2).double()
    if first.dim() < 2 or not first.numel():
        raise ValueError(
            f"W1 must be [..., hidden, inputs] and not empty, got {shown(W1)}. Use layer.weight."
        )
    units, inputs = first.shape[-2:]
    if second.dim() == 1:
        second = second[None]
    if second.shape[-1] != units or not second.numel():
        raise ValueError(
            f"W2 must be [..., outputs, {units}] for W1 of shape {tuple(W1.shape)}, got {shown(W2)}. "
            "Its last dimension counts hidden units."
        )
    d1 = _signs("signs_in", signs_in, inputs, first)
    return first, second, d1, _signs("signs_hidden", signs_hidden, units, first)


def _signs(name: str, signs: Tensor | None, size: int, like: Tensor) -> Tensor:
    if signs is None:
        return like.new_ones(size)
    given = signs.to(like) if isinstance(signs, Tensor) else torch.as_tensor(signs).to(like)
    if given.dim() == 0 or given.shape[-1] != size or not bool((given.abs() == 1).all()):
        raise ValueError(
            f"{name} must hold +1 or -1 for each of {size} units, got {shown(signs)}. "
            "Build it with torch.ones(n) and negate entries."
        )
    return given
