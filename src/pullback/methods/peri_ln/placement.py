"""Where the norms of a transformer block stand: post, pre, peri, sandwich, output (Kim et al. 2025, section 3)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback.core.checks import choice, fraction, instance, integer, non_negative, positive
from pullback.core.kinds import Layer
from pullback.core.norm_layers import Norm, build_norm, is_norm
from pullback.core.residual import Block, Branch, last_matrix

Placement: TypeAlias = Literal["post", "pre", "peri", "sandwich", "output"]

PLACEMENTS: tuple[Placement, ...] = ("post", "pre", "peri", "sandwich", "output")
OUTPUT_PLACEMENTS: tuple[Placement, ...] = ("peri", "sandwich", "output")
"""Placements that normalise what a sub-layer adds."""

SMALL = "For a quiet start give gain_init=1/sqrt(2 * blocks) instead, and leave the weights as they are."


# --- one sub-layer ------------------------------------------------------------------------------------------


class PeriNorm(Layer):
    """A residual branch with its norms, in the placement peri ``x + dropout(N_out(module(N_in(x))))``.

    The output norm stands **inside** the branch. What is added therefore has RMS ``gain_init`` per token at
    the start, whatever the scale of the branch's last weight W: the loss does not depend on that scale, <W,
    dL/dW> = 0, and the gradient shrinks as W grows (Kim et al. 2025, equation of Peri-LN and Proposition
    3.1).

    Args:
        module: the branch, a map [..., dim] -> [..., dim]. If it returns a tuple, its first entry is the
            branch's output and the rest is passed on.
        dim: channels of the residual stream, the last axis.
        norm: ``"rms"`` or ``"layer"``; with the latter the channel mean of what is added is removed as well.
        placement: ``peri`` and ``sandwich`` (two names for the same sub-layer; a *model* is called peri
            when its embedding is normalised too), ``pre``: x + M(N_in(x)), ``output``: x + N_out(M(x)),
            ``post``: N(x + M(x)).
        gain_init: gain of N_out at the start, in units of the residual stream.
        eps: added to the mean square (variance) under the root.
        dropout: rate on what is added, after N_out, so that its variance stays as stated.
        check_zero: refuse a branch whose last weight is all zeros. Switch it off only when the check finds
            the wrong weight (for example an adapter that is registered last).

    Attributes:
        norm_in: input norm, or None.
        norm_out: norm of the branch's output, or None.
        norm_post: norm of the sum, or None.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if an argument is out of range, if ``gain_init`` is given to a placement without N_out,
            or if the branch is initialised to zero and would be normalised: a norm multiplies the gradient
            of a zero output by 1/sqrt(eps).

    Shape:
        ``forward(x [..., dim], *args, **kwargs)`` gives [..., dim]; further arguments go to ``module``.
    """

    norm_in: nn.Module | None
    norm_out: nn.Module | None
    norm_post: nn.Module | None

    def __init__(
        self,
        module: nn.Module,
        dim: int,
        *,
        norm: Norm = "rms",
        placement: Placement = "peri",
        gain_init: float = 1.0,
        eps: float = 1e-6,
        dropout: float = 0.0,
        check_zero: bool = True,
    ) -> None:
        super().__init__()
        self.dim = integer("dim", dim, minimum=1)
        kind = choice("norm", norm, ("rms", "layer"))
        self.placement: Placement = choice("placement", placement, PLACEMENTS)
        gain, eps = checked_gain(gain_init, self.placement), non_negative("eps", eps)
        self.module = instance("module", module, nn.Module, fix="Wrap a function in an nn.Module.")
        if check_zero and self.placement in OUTPUT_PLACEMENTS:
            refuse_zero("module", module)
        self.norm_in = self.norm_out = self.norm_post = None
        if self.placement in ("pre", "peri", "sandwich"):
            self.norm_in = build_norm(kind, dim, eps=eps)
        if self.placement in OUTPUT_PLACEMENTS:
            self.norm_out = build_norm(kind, dim, eps=eps, gain=gain)
        if self.placement == "post":
            self.norm_post = build_norm(kind, dim, eps=eps)
        self.dropout = nn.Dropout(fraction("dropout", dropout))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add the branch to the residual stream; see the class."""
        out = self.module(x if self.norm_in is None else self.norm_in(x), *args, **kwargs)
        added, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, ())
        if self.norm_out is not None:
            added = self.norm_out(added)
        y = x + self.dropout(added)
        if self.norm_post is not None:
            y = self.norm_post(y)
        return (y, *rest) if isinstance(out, tuple) else y

    def residual_block(self, name: str) -> Block:
        """This sub-layer as a block of one branch, for probes and converters."""
        return Block(name, self, "own", self.placement, (Branch(self.first_norm, ("module",)),))

    @property
    def first_norm(self) -> str:
        """Name of the norm on the way in, or of the one on the sum (post), or nothing (output)."""
        return {"post": "norm_post", "output": ""}.get(self.placement, "norm_in")

    def extra_repr(self) -> str:
        """Width and placement."""
        return f"dim={self.dim}, placement={self.placement!r}"


def checked_gain(gain: float, placement: Placement) -> float:
    """The gain of N_out, which only placements with an output norm take."""
    value = positive("gain_init", gain, fix=SMALL)
    if value != 1.0 and placement not in OUTPUT_PLACEMENTS:
        raise ValueError(
            f"gain_init must be 1 with placement={placement!r}, which has no output norm, got {gain!r}. "
            "Leave it out, or choose 'peri', 'sandwich' or 'output'."
        )
    return value


def refuse_zero(name: str, module: nn.Module) -> None:
    """Refuse a branch whose output is zero at the start.

    Raises:
        ValueError: if the last weight is all zeros and has no bias other than zero.
    """
    found = last_matrix(module)
    if found is None or found[1].is_meta:
        return
    owner, weight = found
    bias = getattr(owner, "bias", None)
    if not bool(weight.detach().any()) and not (isinstance(bias, Tensor) and bool(bias.detach().any())):
        raise ValueError(
            f"{name} must not be initialised to zero under an output norm, got a last weight of shape "
            f"{tuple(weight.shape)} that is all zeros: its gradient would be multiplied by 1/sqrt(eps). {SMALL}"
        )


# --- one block ----------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Multi-head self-attention [..., t, dim] -> [..., t, dim] with one matrix for queries, keys and values."""

    def __init__(
        self, dim: int, heads: int, *, bias: bool = False, causal: bool = False, fused: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.causal, self.fused = heads, causal, fused
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=bias), nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix the tokens; ``mask`` is True where a query (row) may look at a key, or is added to the scores."""
        width = x.shape[-1] // self.heads
        split = self.qkv(x).unflatten(-1, (3, self.heads, width)).movedim(-3, 0).transpose(-2, -3)
        query, key, value = split.unbind(0)
        if self.causal and (mask is not None or not self.fused):
            past = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).tril()
            if mask is None:
                mask = past
            else:
                mask = mask & past if mask.dtype == torch.bool else mask.masked_fill(~past, -torch.inf)
        if self.fused:
            causal = self.causal and mask is None
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        else:
            mixed = _attend(query, key, value, mask)
        return self.out(mixed.transpose(-2, -3).flatten(-2))


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention written out; a query that may look at no key gets zeros, as in the fused kernel."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        blind = torch.isneginf(scores).all(-1, keepdim=True)
        return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0) @ value
    return scores.softmax(-1) @ value


class FeedForward(nn.Sequential):
    """dim -> hidden -> dim with GELU between."""

    def __init__(self, dim: int, hidden: int, *, bias: bool = False) -> None:
        super().__init__(nn.Linear(dim, hidden, bias=bias), nn.GELU(), nn.Linear(hidden, dim, bias=bias))


class PeriNormBlock(Layer):
    """A transformer block, attention then feed-forward, with a switch for the placement of its norms.

    A whole model is ``x = N(embedding)`` (peri; without it the model is called sandwich), the blocks, and a
    final norm before the head (all placements but post need one).

    Args:
        dim: channels of the residual stream.
        heads: attention heads; must divide ``dim``.
        placement: ``post``, ``pre``, ``peri``, ``sandwich`` or ``output``; see `PeriNorm`.
        norm: ``"rms"`` or ``"layer"``.
        hidden: units of the feed-forward layer; None: 4 dim.
        gain_init: gain of the output norms at the start; 1/sqrt(2 * blocks) keeps the stream's variance
            near 1.
        eps: added under the root of every norm.
        dropout: rate on what each sub-layer adds, after its output norm.
        bias: whether linear layers have biases. The exact scale invariance of `PeriNorm` needs none in the
            last one.
        causal: whether a token sees only itself and earlier ones.
        fused: use torch's fused attention. False writes it out: slower, but second derivatives and ``vmap``
            work.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if an argument is out of range or ``heads`` does not divide ``dim``.

    Shape:
        ``forward(x [batch, t, dim], mask=None)`` gives [batch, t, dim]; ``mask`` is broadcast to [batch,
        heads, t, t], True where a query may look at a key, or a float that is added to the scores.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        placement: Placement = "peri",
        norm: Norm = "rms",
        hidden: int | None = None,
        gain_init: float = 1.0,
        eps: float = 1e-6,
        dropout: float = 0.0,
        bias: bool = False,
        causal: bool = False,
        fused: bool = True,
    ) -> None:
        super().__init__()
        integer("dim", dim, minimum=1)
        integer("heads", heads, minimum=1)
        if dim % heads:
            raise ValueError(f"heads must divide dim={dim}, got {heads}. Use {_divisor(dim, heads)}.")
        inner = 4 * dim if hidden is None else integer("hidden", hidden, minimum=1)

        def wrapped(branch: nn.Module) -> PeriNorm:
            return PeriNorm(
                branch, dim, norm=norm, placement=placement, gain_init=gain_init, eps=eps, dropout=dropout
            )

        self.attention = wrapped(SelfAttention(dim, heads, bias=bias, causal=causal, fused=fused))
        self.feedforward = wrapped(FeedForward(dim, inner, bias=bias))

    @property
    def placement(self) -> Placement:
        """Where the norms stand."""
        return self.attention.placement

    def residual_block(self, name: str) -> Block:
        """Where the two sub-layers are, for probes and converters."""
        parts = ("attention", "feedforward")
        norm = self.attention.first_norm
        rows = tuple(Branch(f"{part}.{norm}", (f"{part}.module",)) for part in parts)
        return Block(name, self, "own", self.placement, rows)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply both sub-layers; see the class."""
        return self.feedforward(self.attention(x, mask=mask))


def _divisor(dim: int, heads: int) -> int:
    """The largest number of heads up to ``heads`` that divides ``dim``."""
    return max(n for n in range(1, min(heads, dim) + 1) if dim % n == 0)


# --- optimizer groups ---------------------------------------------------------------------------------------


def norm_param_groups(model: nn.Module | Iterable[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups in which gains and biases of norms do not decay.

    Decay pulls a gain towards 0, and one in the form 1 + w towards 1: under an output norm it would set how
    loud a sub-layer is. Everything else, other biases included, decays.

    Args:
        model: a module, or several.
        weight_decay: of all other parameters.

    Returns:
        One or two groups for a torch optimizer: the decaying parameters, then those of norms with weight
        decay 0. Frozen parameters are left out, tied ones are listed once.

    Raises:
        ValueError: if ``weight_decay`` is negative or nothing is trainable.
    """
    decay = non_negative("weight_decay", weight_decay)
    roots = [model] if isinstance(model, nn.Module) else list(model)
    modules = [module for root in roots for module in root.modules()]
    gains = {id(p) for module in modules if is_norm(module) for p in module.parameters(recurse=False)}
    trained = {id(p): p for root in roots for p in root.parameters() if p.requires_grad}
    if not trained:
        raise ValueError("model must have trainable parameters, got none. Set requires_grad on some.")
    groups = [
        {"params": [p for key, p in trained.items() if key not in gains], "weight_decay": decay},
        {"params": [p for key, p in trained.items() if key in gains], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
