"""Distillation losses per problem, in float32 and in chunks, and the schedule of two stages (arXiv:2603.11178, 3.3)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pullback.core.checks import choice, floating, fraction, integer, positive

Divergence: TypeAlias = Literal["forward_kl", "reverse_kl", "jsd"]
"""What is measured between teacher and student."""

DIVERGENCES: tuple[Divergence, ...] = ("forward_kl", "reverse_kl", "jsd")
_How: TypeAlias = tuple[str, float, float, int]  # divergence, beta, temperature, positions per chunk
CHUNK = (
    2**18
)  # logits that are worked on at a time: 1 MiB in float32, which stays in the cache of a processor core

# --- one position --------------------------------------------------------------------------------------------------


def _raised(x: Tensor, temperature: float) -> Tensor:
    """Logits over the temperature, in float32 at least."""
    x = x if x.dtype == torch.float64 else x.float()
    return x if temperature == 1.0 else x / temperature


def _expected(log_weight: Tensor, value: Tensor) -> Tensor:
    """Sum of exp(log_weight) * value over the vocabulary; symbols of probability zero count nothing, NaN stays NaN."""
    weight = log_weight.exp()
    return torch.where(weight == 0, 0, weight * value).sum(-1)


def _middle(s: Tensor, t: Tensor, beta: float) -> Tensor:
    """Log of the mixture: beta of the teacher, 1 - beta of the student."""
    return torch.logaddexp(t + math.log(beta), s + math.log1p(-beta))


def _values(z: Tensor, y: Tensor, kind: str, beta: float) -> Tensor:
    """Divergences [m] of student logits z and teacher logits y [m, vocabulary]."""
    s, t = z.log_softmax(-1), y.log_softmax(-1)
    if kind == "forward_kl":
        return _expected(t, t - s)
    if kind == "reverse_kl":
        return _expected(s, s - t)
    m = _middle(s, t, beta)
    return beta * _expected(t, t - m) + (1 - beta) * _expected(s, s - m)


def _slopes(z: Tensor, y: Tensor, kind: str, beta: float) -> Tensor:
    """Their gradients for z: p_S - p_T, or p_S (r - E_S r) with r = log p_S - log p_T (jsd: minus log mixture)."""
    if kind == "forward_kl":
        return z.softmax(-1) - y.softmax(-1)
    s, t = z.log_softmax(-1), y.log_softmax(-1)
    share = 1.0 if kind == "reverse_kl" else 1 - beta
    r = s - (t if kind == "reverse_kl" else _middle(s, t, beta))
    q = s.exp()
    r = torch.where(q == 0, 0, r)
    return share * q * (r - (q * r).sum(-1, keepdim=True))


# --- many positions ------------------------------------------------------------------------------------------------


class _Positions(torch.autograd.Function):
    """Divergence of every chosen position; saves no copy of the logits and recomputes its chunks backwards.

    Peak memory beside the logits and their gradient is a few chunks, whatever the vocabulary and the length.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, rows: Tensor | None, columns: Tensor | None, how: _How
    ) -> Tensor:
        kind, beta, temperature, chunk = how
        parts = [
            _values(
                _raised(_take(student, at), temperature), _raised(_take(teacher, at), temperature), kind, beta
            )
            for at in _pieces(student, rows, columns, chunk)
        ]
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        student, teacher, rows, columns, ctx.how = inputs
        ctx.save_for_backward(student, teacher, rows, columns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        student, teacher, rows, columns = ctx.saved_tensors
        kind, beta, temperature, chunk = ctx.how
        pieces = list(_pieces(student, rows, columns, chunk))
        slopes = (
            _slopes(
                _raised(_take(student, at), temperature), _raised(_take(teacher, at), temperature), kind, beta
            )
            for at in pieces
        )
        scale = (grads[0] / temperature).unsqueeze(-1).split([_length(at) for at in pieces])
        found = ((slope * each).to(student.dtype) for slope, each in zip(slopes, scale, strict=True))
        if rows is None and (len(pieces) == 1 or transformed()):
            return torch.cat(list(found)), None, None, None, None
        result = torch.empty_like(student) if rows is None else torch.zeros_like(student)
        for at, each in zip(pieces, found, strict=True):
            result[at] = each
        return result, None, None, None, None


def transformed() -> bool:
    """Whether a ``torch.func`` transform is at work, under which no value can be read."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _pieces(student: Tensor, rows: Tensor | None, columns: Tensor | None, chunk: int) -> Iterator[Any]:
    """Chunks of the chosen positions: slices or indices of [m, vocabulary], or pairs of indices of the 3-dim logits."""
    length = len(student if rows is None else rows)
    for i in _starts(length, chunk):
        part = slice(i, min(i + chunk, length))
        if rows is None:
            yield part
        else:
            yield rows[part] if columns is None else (rows[part], columns[part])


def _take(x: Tensor, at: Any) -> Tensor:
    return x.index_select(0, at) if isinstance(at, Tensor) else x[at]


def _starts(length: int, chunk: int) -> range:
    return range(0, max(length, 1), chunk)


def _length(at: Any) -> int:
    return at.stop - at.start if isinstance(at, slice) else len(at[0] if isinstance(at, tuple) else at)


# --- problems ------------------------------------------------------------------------------------------------------


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    tokens: Literal["mean", "sum"] = "mean",
    reduction: Literal["mean", "sum", "none"] = "mean",
    chunk: int | None = None,
) -> Tensor:
    r"""Divergence between teacher and student over the whole vocabulary, per problem (paper section 3.3).

    ``"forward_kl"`` is :math:`\sum_t KL(p_T \| p_S)`, for tokens that the *teacher* wrote; ``"reverse_kl"`` is
    :math:`\sum_t KL(p_S \| p_T)`, for tokens that the *student* wrote, without a term for their sampling; ``"jsd"`` is
    the generalised Jensen-Shannon divergence :math:`\beta KL(p_T \| m) + (1 - \beta) KL(p_S \| m)` with
    :math:`m = \beta p_T + (1 - \beta) p_S` (Agarwal et al. 2024); at ``beta`` 0 and 1, where it would vanish, it is
    the forward and the reverse KL. Which tokens the logits belong to is the caller's business.

    Arithmetic is in float32 at least, also under autocast. Positions outside the mask are not computed, and what
    their logits hold (NaN included) does not matter. The teacher gets no gradient.

    Args:
        student_logits: [problems, positions, vocabulary], floating.
        teacher_logits: of the same shape, any floating dtype.
        mask: bool [problems, positions], true where a response token is *predicted* (logits at position t belong to
            token t + 1; with labels that are -100 elsewhere: ``labels[:, 1:] != -100`` for ``logits[:, :-1]``);
            None: all positions.
        divergence: see above.
        beta: share of the teacher in the mixture of ``"jsd"``, in [0, 1].
        temperature: divides the logits of both before the divergence; the loss is not multiplied by its square.
        tokens: ``"mean"`` over a problem's response tokens, so that long answers weigh no more than short ones, or
            their ``"sum"``. An empty response gives 0.
        reduction: over problems: ``"mean"``, ``"sum"``, or ``"none"`` for a loss per problem, as weights need it.
        chunk: positions that are worked on at a time; None: as many as make about 2^18 logits.

    Returns:
        Loss in nats, float32 (float64 for float64 student logits): 0-dim, or [problems] with ``reduction="none"``.
        Reads the number of masked positions from the device once, except inside a compiled region.

    Raises:
        TypeError: if logits are no floating tensors or the mask is not bool.
        ValueError: if shapes do not fit, there is no problem to average over, or an option is out of its range.

    Example:
        >>> student, teacher = torch.zeros(2, 3, 5), torch.eye(5)[:3].expand(2, 3, 5)
        >>> mask = torch.tensor([[False, True, True], [False, False, False]])
        >>> distillation_loss(student, teacher, mask, reduction="none")
        tensor([0.1092, 0.0000])
    """
    shape = _shapes(student_logits, teacher_logits, mask)
    kind = _kind(divergence, fraction("beta", beta))
    per_token = choice("tokens", tokens, ("mean", "sum"))
    over = choice("reduction", reduction, ("mean", "sum", "none"))
    if over == "mean" and not shape[0]:
        raise ValueError("student_logits must hold at least one problem, got none. Leave the step out.")
    if chunk is None:
        chunk = max(1, CHUNK // max(shape[2], 1))
    how = (kind, float(beta), positive("temperature", temperature), integer("chunk", chunk, minimum=1))
    found = _table(student_logits, teacher_logits.detach(), mask, how)
    losses = found.sum(1)
    if per_token == "mean":
        count = torch.full_like(losses, shape[1]) if mask is None else mask.sum(1).to(losses.device)
        losses = losses / count.clamp(min=1)
    return losses if over == "none" else losses.mean() if over == "mean" else losses.sum()


def _table(student: Tensor, teacher: Tensor, mask: Tensor | None, how: _How) -> Tensor:
    """Divergences [problems, positions], zero outside the mask."""
    shape, vocabulary = student.shape[:2], student.shape[2]
    flat = student.is_contiguous() and teacher.is_contiguous()
    if transformed() or torch.compiler.is_compiling() or (mask is None and flat):
        rows = (x.reshape(-1, vocabulary) for x in (student, teacher))
        found = _Positions.apply(*rows, None, None, how).view(shape)
        return found if mask is None else torch.where(mask.to(found.device), found, 0)
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=student.device)
    mask = mask.to(student.device)
    if flat:
        rows = mask.reshape(-1).nonzero().squeeze(1)
        found = _Positions.apply(student.view(-1, vocabulary), teacher.view(-1, vocabulary), rows, None, how)
        return found.new_zeros(mask.numel()).index_put((rows,), found).view(shape)
    rows, columns = mask.nonzero(as_tuple=True)  # flattening a slice of the logits would copy it
    found = _Positions.apply(student, teacher, rows, columns, how)
    return found.new_zeros(shape).index_put((rows, columns), found)


def _kind(divergence: str, beta: float) -> str:
    """The divergence that is meant; the ends of ``"jsd"`` are the two KL."""
    kind = choice("divergence", divergence, DIVERGENCES)
    return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, kind) if kind == "jsd" else kind


def _shapes(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[int, ...]:
    fix = "Logits are [problems, positions, vocabulary]."
    floating("student_logits", student, ndim=3, fix=fix)
    floating("teacher_logits", teacher, fix=fix)
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher_logits must be of shape {tuple(student.shape)} as student_logits, got {tuple(teacher.shape)}. "
            "Both models must share tokens and vocabulary."
        )
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor, got {got}. Use labels != -100, or mask.bool().")
        if mask.shape != student.shape[:2]:
            raise ValueError(
                f"mask must be of shape {tuple(student.shape[:2])}, got {tuple(mask.shape)}. One entry per position."
            )
    return tuple(student.shape)


# --- stages --------------------------------------------------------------------------------------------------------


def two_stage(step: int, total: int, *, switch: float = 0.5) -> Literal["forward_kl", "reverse_kl"]:
    """Divergence of a step: forward KL on the teacher's answers first, reverse KL on the student's own afterwards.

    Args:
        step: training step, from 0.
        total: number of steps, at least 1; steps beyond it belong to the second stage.
        switch: share of the steps in the first stage, in [0, 1]. The paper does not say where it switches.

    Returns:
        The ``divergence`` for `distillation_loss`. Measure pass rates anew at the switch.

    Raises:
        TypeError: if a number is of a wrong type.
        ValueError: if a number is out of its range.

    Example:
        >>> [two_stage(step, 4) for step in range(4)]
        ['forward_kl', 'forward_kl', 'reverse_kl', 'reverse_kl']
    """
    done, every = integer("step", step, minimum=0), integer("total", total, minimum=1)
    return "forward_kl" if done < fraction("switch", switch) * every else "reverse_kl"
