r"""Tversky similarity of two sets of scores: all reductions, both models, and no tensor of pairs times features.

Objects are given by their scores ``s = x @ bank.T`` [n, k] and ``t = y @ bank.T`` [m, k]. A feature is in a set where
its score is positive; ``u = s * [s > 0]`` is its salience there. Sums over features are matrix products of saliences
and memberships, so that everything but the non-linear per-feature reductions needs O(nk + mk + nm) memory. Sections
and equations are those of Doumbouya et al., arXiv:2506.11035, and of its official code where that differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from pullback.core.checks import choice, integer, positive

Intersection: TypeAlias = Literal["product", "min", "max", "mean", "gmean", "softmin"]
Difference: TypeAlias = Literal["ignorematch", "subtractmatch", "substractmatch"]
Model: TypeAlias = Literal["contrast", "ratio"]
Reduce: TypeAlias = Literal["aggregate", "feature"]
Gate: TypeAlias = Literal["hard", "tanh"]

INTERSECTIONS: tuple[Intersection, ...] = ("product", "min", "max", "mean", "gmean", "softmin")
DIFFERENCES: tuple[Difference, ...] = ("ignorematch", "subtractmatch", "substractmatch")
SHARPNESS = 13.0
FLOOR = 0.25
"""Smallest denominator of the ratio model. For alpha, beta >= 0, hard gates and aggregated reductions it never acts:
the denominator is then at least 1 - log 2."""
_BLOCK = 1 << 18  # numbers of a block of pairs times features: about what a core's own cache holds
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Form:
    """Which similarity: the choices that a layer is built with.

    Args:
        intersection: how two saliences become one common measure.
        difference: ``ignorematch`` counts what the other lacks; ``subtractmatch`` adds by how much the own measure of
            shared features exceeds the other's (``substractmatch``, the official spelling, is the same).
        model: ``contrast`` (weighted sum) or ``ratio``.
        reduce: ``aggregate`` sums over features before a non-linear reduction, as the official code does; ``feature``
            reduces feature by feature, as the paper writes it.
        gate: membership: ``hard`` is [s > 0], ``tanh`` is (1 + tanh(c s)) / 2 and passes gradients.
        sharpness: c of the soft gate.
        chunk: prototypes in a block of a non-linear per-feature reduction; None fits the block to a core's cache.
    """

    intersection: Intersection = "product"
    difference: Difference = "ignorematch"
    model: Model = "contrast"
    reduce: Reduce = "aggregate"
    gate: Gate = "hard"
    sharpness: float = SHARPNESS
    chunk: int | None = None

    def __post_init__(self) -> None:
        choice("intersection", self.intersection, INTERSECTIONS)
        choice("difference", self.difference, DIFFERENCES)
        if self.difference == "substractmatch":
            object.__setattr__(self, "difference", "subtractmatch")
        choice("model", self.model, ("contrast", "ratio"))
        choice("reduce", self.reduce, ("aggregate", "feature"))
        choice("gate", self.gate, ("hard", "tanh"))
        positive("sharpness", self.sharpness)
        if self.chunk is not None:
            integer("chunk", self.chunk, minimum=1, fix="Pass None to let the layer choose.")

    @property
    def fused(self) -> bool:
        """Whether two products are enough: product and ignorematch in the contrast model."""
        return (self.intersection, self.difference, self.model) == ("product", "ignorematch", "contrast")


class Side(NamedTuple):
    """One set of objects: scores, saliences ``u``, memberships, and one minus those.

    Of the last two a form needs one only; the other is None.
    """

    scores: Tensor
    salience: Tensor
    present: Any
    absent: Any


def side(form: Form, scores: Tensor, *, whole: bool = False) -> Side:
    """Gate scores [..., n, k]; memberships have the dtype of the scores, a score of 0 is no member.

    Args:
        form: which similarity.
        scores: inner products with the features.
        whole: give both memberships and what is absent, needed or not.
    """
    lean = form.intersection == "product" and form.difference == "ignorematch"
    if form.gate == "hard":
        salience = scores.relu()
        present = (scores > 0).to(scores.dtype) if whole or not lean else None
        absent = (scores <= 0).to(scores.dtype) if whole or lean else None
    else:
        present = torch.sigmoid(2 * form.sharpness * scores)  # = (1 + tanh(c s)) / 2
        salience = scores * present
        absent = torch.sigmoid(-2 * form.sharpness * scores) if whole or lean else None
    return Side(scores, salience, present, absent)


def similarity(form: Form, s: Tensor, t: Tensor | Side, theta: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """S(x_i, y_j) for all pairs.

    Args:
        form: which similarity.
        s: scores of the inputs [..., n, k].
        t: scores of the prototypes [..., m, k], or their side, gated before.
        theta: weight of what is common (unused by the ratio model), 0-dim.
        alpha: weight of what the input has alone, 0-dim.
        beta: weight of what the prototype has alone, 0-dim.

    Returns:
        Similarities [..., n, m] in the dtype of ``s``; of half-precision scores sums are taken in float32.
    """
    a, b = side(form, s), t if isinstance(t, Side) else side(form, t)
    if form.fused:
        return _Contrast.apply(a.salience, a.absent, b.salience, b.absent, theta, alpha, beta)
    common, mine, theirs = measures(form, a, b)
    if form.model == "contrast":
        return (theta * common - alpha * mine - beta * theirs).to(s.dtype)
    return (common / denominator(common, mine, theirs, alpha, beta).clamp_min(FLOOR)).to(s.dtype)


def denominator(common: Tensor, mine: Tensor, theirs: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Denominator of the ratio model, before the floor: common + alpha mine + beta theirs + 1 (official code)."""
    return common + alpha * mine + beta * theirs + 1


# --- product and ignorematch in the contrast model ---------------------------------------------------------------


class _Contrast(torch.autograd.Function):
    """theta u v' - alpha u (1 - Iy)' - beta (1 - Ix) v' in two products: what multiplies v' is added up before.

    Inputs are u [.., n, k], 1 - Ix, v [.., m, k], 1 - Iy and the weights. The backward pass takes three products (four
    where gates are soft), autograd on the formula as it stands four (six).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        u: Tensor, no_x: Tensor, v: Tensor, no_y: Tensor, theta: Tensor, alpha: Tensor, beta: Tensor
    ) -> Tensor:
        onto_v, onto_absent = theta * u - beta * no_x, -alpha * u
        if onto_v.dtype in _HALF:  # one product, so that the sum is rounded once
            return torch.cat([onto_v, onto_absent], -1) @ torch.cat([v, no_y], -1).mT
        first = onto_absent @ no_y.mT
        if first.dim() == 2:
            return torch.addmm(first, onto_v, v.mT)
        return first + onto_v @ v.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, no_x, v, no_y, theta, alpha, beta = ctx.saved_tensors
        (grad,) = grads
        needs = ctx.needs_input_grad
        back: list[Tensor | None] = [None] * 7
        if needs[0] or needs[1] or any(needs[4:]):
            by_v = grad @ v
            by_absent = grad @ no_y if needs[0] or needs[5] else u
            if needs[0]:
                back[0] = theta * by_v - alpha * by_absent
            if needs[1]:
                back[1] = -beta * by_v
            for index, left, right, sign in ((4, u, by_v, 1), (5, u, by_absent, -1), (6, no_x, by_v, -1)):
                if needs[index]:
                    back[index] = (sign * (left * right).sum(dtype=_wide(left.dtype))).to(theta.dtype)
        if needs[2]:
            back[2] = grad.mT @ (theta * u - beta * no_x)
        if needs[3]:
            back[3] = grad.mT @ (-alpha * u)
        return tuple(back)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _HALF else dtype


# --- all other forms ---------------------------------------------------------------------------------------------


def measures(form: Form, a: Side, b: Side) -> tuple[Tensor, Tensor, Tensor]:
    """f(X and Y), f(X - Y) and f(Y - X) for all pairs, each [..., n, m] (sections 3.2 to 3.4).

    Half-precision products are summed further in float32.
    """
    dtype = _wide(a.scores.dtype)

    def product(left: Tensor, right: Tensor) -> Tensor:
        return (left @ right.mT).to(dtype)

    if form.intersection == "product" and form.difference == "ignorematch":
        return (
            product(a.salience, b.salience),
            product(a.salience, b.absent),
            product(a.absent, b.salience),
        )
    inside_x, inside_y = product(a.salience, b.present), product(a.present, b.salience)
    mine = a.salience.sum(-1, dtype=dtype).unsqueeze(-1) - inside_x
    theirs = b.salience.sum(-1, dtype=dtype).unsqueeze(-2) - inside_y
    least: Any = None
    if form.reduce == "feature" and (
        form.intersection in ("min", "max") or form.difference == "subtractmatch"
    ):
        least = pairwise(form, "min", a, b)
    if form.difference == "subtractmatch":
        if least is not None:
            mine, theirs = mine + (inside_x - least), theirs + (inside_y - least)
        else:
            mine, theirs = mine + (inside_x - inside_y).relu(), theirs + (inside_y - inside_x).relu()
    if form.intersection == "product":
        common = product(a.salience, b.salience)
    elif form.reduce == "aggregate" or form.intersection == "mean":
        common = reduced(form.intersection, inside_x, inside_y)
    elif form.intersection == "gmean":
        common = product(_root(a), _root(b))  # the root of a product is a product of roots
    elif form.intersection == "softmin":
        common = pairwise(form, "softmin", a, b)
    else:
        common = inside_x + inside_y - least if form.intersection == "max" else least
    return common, mine, theirs


def reduced(intersection: str, a: Tensor, b: Tensor) -> Tensor:
    """Psi(a, b), entry by entry (section 3.2). The geometric mean is 0, with gradient 0, unless both are positive."""
    if intersection == "min":
        return torch.minimum(a, b)
    if intersection == "max":
        return torch.maximum(a, b)
    if intersection == "mean":
        return (a + b) / 2
    if intersection == "softmin":
        return -torch.logaddexp(-a, -b)
    if intersection == "product":
        return a * b
    both = (a > 0) & (b > 0)
    return torch.where(both, torch.where(both, a, 1).sqrt() * torch.where(both, b, 1).sqrt(), 0)


def _root(one: Side) -> Tensor:
    positive_score = one.scores > 0
    return torch.where(positive_score, torch.where(positive_score, one.scores, 1).sqrt() * one.present, 0)


# --- reductions that are not linear in the features: in blocks of prototypes --------------------------------------


def pairwise(form: Form, kind: Literal["min", "softmin"], a: Side, b: Side) -> Tensor:
    """Sum over features of Psi(s, t) gx gy, [..., n, m], in float32 for half precision."""
    dtype = _wide(a.scores.dtype)
    wide_a, wide_b = (Side(*(e if e is None else e.to(dtype) for e in one)) for one in (a, b))
    if kind == "min" and form.gate == "hard":  # saliences are gated already
        return _Pairwise.apply(wide_a.salience, wide_b.salience, None, None, kind, form.chunk)
    inputs = (wide_a.scores, wide_b.scores, wide_a.present, wide_b.present)
    return _Pairwise.apply(*inputs, kind, form.chunk)


class _Pairwise(torch.autograd.Function):
    """`pairwise`, with the backward pass recomputed block by block: n * k * chunk numbers live at a time.

    The sum of plain minima is (sum u + sum v - |u - v|_1) / 2; on a CPU, and unless ``chunk`` is given, torch's own
    distance kernel computes that without blocks.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        p: Tensor, q: Tensor, gp: Tensor | None, gq: Tensor | None, kind: str, chunk: int | None
    ) -> Tensor:
        if _plain_distance(p, gp, kind, chunk):
            both = p.sum(-1).unsqueeze(-1) + q.sum(-1).unsqueeze(-2)
            return (both - torch.cdist(p, q, p=1.0)) / 2
        blocks = []
        for start, stop in _spans(p, q, chunk):
            b, gb = _rows(q, start, stop), _rows(gq, start, stop)
            blocks.append(_gated(_value(kind, p.unsqueeze(-2), b), gp, gb).sum(-1))
        return torch.cat(blocks, -1) if blocks else p.new_zeros(*p.shape[:-1], 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        *tensors, ctx.kind, ctx.chunk = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        p, q, gp, gq = ctx.saved_tensors
        (grad,) = grads
        if _plain_distance(p, gp, ctx.kind, ctx.chunk) and not torch.is_grad_enabled():
            return *_distance_backward(grad, p, q), None, None, None, None
        dp, dgp = torch.zeros_like(p), None if gp is None else torch.zeros_like(gp)
        dq, dgq = [], []
        for start, stop in _spans(p, q, ctx.chunk):
            a, b, gb = p.unsqueeze(-2), _rows(q, start, stop), _rows(gq, start, stop)
            outer = grad[..., start:stop].unsqueeze(-1)
            weighted = _gated(outer, gp, gb)
            share = weighted * _share(ctx.kind, a, b)  # what belongs to p; q has the rest
            dp = dp + share.sum(-2)
            dq.append((weighted - share).sum(-3))
            if gp is not None and any(ctx.needs_input_grad[2:4]):
                value = outer * _value(ctx.kind, a, b)
                dgp = dgp + (value * gb).sum(-2)
                dgq.append((value * gp.unsqueeze(-2)).sum(-3))
        back = torch.cat(dq, -2) if dq else torch.zeros_like(q)
        return dp, back, dgp, torch.cat(dgq, -2) if dgq else None, None, None


def _plain_distance(p: Tensor, gate: Tensor | None, kind: str, chunk: int | None) -> bool:
    """Other devices than the CPU keep all pairs times features in this kernel's backward pass."""
    return kind == "min" and gate is None and chunk is None and p.device.type == "cpu"


def _distance_backward(grad: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Half of what every sum brings, minus half of the distance's gradient (sign(p - q), 0 at ties)."""
    grad, flipped = grad.contiguous(), grad.mT.contiguous()
    p, q = p.contiguous(), q.contiguous()
    dp = torch.ops.aten._cdist_backward(
        grad, p, q, 1.0, grad
    )  # the distances themselves are not needed for 1.0
    dq = torch.ops.aten._cdist_backward(flipped, q, p, 1.0, flipped)
    return (grad.sum(-1, keepdim=True) - dp) / 2, (flipped.sum(-1, keepdim=True) - dq) / 2


def _spans(p: Tensor, q: Tensor, chunk: int | None) -> list[tuple[int, int]]:
    size = chunk or max(1, _BLOCK // max(p.numel(), 1))
    return [(start, min(start + size, q.shape[-2])) for start in range(0, q.shape[-2], size)]


def _rows(tensor: Tensor | None, start: int, stop: int) -> Any:
    """Rows of a block as [..., 1, rows, k]; None stays None."""
    return None if tensor is None else tensor[..., start:stop, :].unsqueeze(-3)


def _gated(value: Tensor, gp: Tensor | None, gb: Tensor | None) -> Tensor:
    return value if gp is None or gb is None else value * gp.unsqueeze(-2) * gb


def _value(kind: str, a: Tensor, b: Tensor) -> Tensor:
    return torch.minimum(a, b) if kind == "min" else -torch.logaddexp(-a, -b)


def _share(kind: str, a: Tensor, b: Tensor) -> Tensor:
    """Derivative of `_value` by its first argument; that by the second is one minus it. Ties are halved."""
    if kind == "softmin":
        return torch.sigmoid(b - a)
    return torch.heaviside((b - a).detach(), torch.full((), 0.5, dtype=a.dtype, device=a.device))
