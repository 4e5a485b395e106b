"""Feature banks and prototypes, and reading them: why a logit has its value, which features live and what they mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, final, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback.core.checks import choice, floating, integer
from pullback.core.kinds import Layer
from pullback.methods.tversky.forms import FLOOR, Form, Side, denominator, measures, reduced, side

Init: TypeAlias = Literal["symmetric", "official"]
FEWEST = 8  # rows and features from which on a gate that is open everywhere, or nowhere, is no chance


@runtime_checkable
class Bank(Protocol):
    """Anything with feature rows [k, d]: a `FeatureBank`, or `EncodedRows`."""

    def rows(self) -> Tensor:
        """The features [k, d]."""
        ...


def new_weight(rows: int, columns: int, init: str, device: Any, dtype: Any) -> nn.Parameter:
    """A drawn parameter [rows, columns]; see `FeatureBank` for ``init``."""
    weight = nn.Parameter(torch.empty(rows, columns, device=device, dtype=dtype))
    _initialise(weight, init)
    return weight


@torch.no_grad()
def _initialise(weight: Tensor, init: str) -> None:
    """Uniform in +-1/sqrt(d), so that half of all scores are positive, or the official uniform(0, 1)."""
    bound = 1 / math.sqrt(weight.shape[1])
    weight.uniform_(*((-bound, bound) if init == "symmetric" else (0.0, 1.0)))


# --- rows: features and prototypes ---------------------------------------------------------------------------------


@final
class FeatureBank(Layer):
    """Learned features [k, d], shareable by any number of layers; calling it gives scores x . f_k.

    Args:
        in_features: d, width of the objects.
        features: k, number of features.
        init: ``symmetric``, uniform(-1/sqrt d, 1/sqrt d), or ``official``, uniform(0, 1). With the latter every
            prototype has every feature, and inputs of both signs hardly learn.
        device: of the weight.
        dtype: of the weight.

    Raises:
        TypeError, ValueError: if a size is no whole number >= 1, or ``init`` is unknown.
    """

    def __init__(
        self, in_features: int, features: int, *, init: Init = "symmetric", device: Any = None, dtype: Any = None
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features = integer("in_features", in_features, minimum=1)
        self.features = integer("features", features, minimum=1)
        self.init = choice("init", init, ("symmetric", "official"))
        self.weight = new_weight(self.features, self.in_features, init, device, dtype)

    def rows(self) -> Tensor:
        """The features [k, d]."""
        return self.weight

    def reset_parameters(self) -> None:
        """Draw the features anew from torch's generator."""
        _initialise(self.weight, self.init)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [..., k] of objects [..., d]; an object has the features with a positive score."""
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"in_features={self.in_features}, features={self.features}"


@final
class Prototypes(nn.Module):
    """Learned prototypes [m, d]. No ``nn.Embedding``: weight decay and parameter groups see an ordinary weight."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def rows(self) -> Tensor:
        """The prototypes [m, d]."""
        return self.weight


@final
class EncodedRows(nn.Module):
    """Prototypes or features that are learned as inputs, and mapped through the current encoder at every call.

    What a prototype looks like can then be shown: it is ``inputs[j]``. Every forward pass encodes all of them; the
    encoder runs in its own mode, so that batch norm in training sees them as one more batch.

    Args:
        inputs: first values [m, ...] in the data domain, for example training images; they are copied.
        encoder: maps them to [m, d]. It is not registered here: it belongs to the model that trains it.

    Example:
        >>> from pullback.methods.tversky import EncodedRows, TverskyProjection
        >>> encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 16))
        >>> prototypes = EncodedRows(torch.rand(10, 8, 8), encoder)
        >>> head = TverskyProjection(16, 10, 32, prototypes=prototypes)
        >>> head(encoder(torch.rand(5, 8, 8))).shape
        torch.Size([5, 10])
    """

    def __init__(self, inputs: Tensor, encoder: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        floating("inputs", inputs)
        if inputs.dim() < 2:
            raise ValueError(f"inputs must be [rows, ...], got shape {tuple(inputs.shape)}. Stack them.")
        self.inputs = nn.Parameter(inputs.detach().clone())
        self._encoder = (encoder,)  # in a tuple: no submodule, so that state_dict names the encoder once

    def rows(self) -> Tensor:
        """The encoded rows [m, d]."""
        return self._encoder[0](self.inputs).flatten(1)

    def extra_repr(self) -> str:
        """The shape of the inputs."""
        return f"inputs={tuple(self.inputs.shape)}"


# --- one logit -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """What every feature contributes to one similarity, in float64.

    Args:
        common: contribution of what both have [k].
        input_only: contribution of what the input has more, or alone [k]; negative for alpha > 0.
        prototype_only: contribution of what the prototype has more, or alone [k]; negative for beta > 0.
        offset: what belongs to no feature: of aggregated ``softmin``, which is -log 2 for two empty sets.
        logit: the similarity; equals the sum of all of the above.
    """

    common: Tensor
    input_only: Tensor
    prototype_only: Tensor
    offset: float
    logit: float

    def top(self, count: int = 5) -> list[tuple[int, float]]:
        """The features with the largest total contribution in absolute value, as (feature, contribution)."""
        total = self.common + self.input_only + self.prototype_only
        order = total.abs().topk(min(integer("count", count, minimum=1), len(total))).indices
        return [(int(k), float(total[k])) for k in order]


def explain(form: Form, s: Tensor, t: Tensor, theta: Tensor, alpha: Tensor, beta: Tensor) -> Explanation:
    """Contributions of features to the similarity of one pair.

    A reduction of sums that is no sum (aggregated min, max, gmean) is split by its slopes, which is exact because it
    scales with its arguments; softmin leaves an offset. In the ratio model common features count as if nothing were
    distinctive, I / (I + 1), and distinctive ones by what they take away from that.

    Args:
        form: which similarity.
        s: scores of the input [k].
        t: scores of the prototype [k].
        theta: weight of what is common, 0-dim.
        alpha: weight of what the input has alone, 0-dim.
        beta: weight of what the prototype has alone, 0-dim.
    """
    a, b = (side(form, each.detach().double().unsqueeze(0), whole=True) for each in (s, t))
    weights = [each.detach().double() for each in (theta, alpha, beta)]
    common, offset = _common(form, a, b)
    mine, theirs = _distinct(form, a, b), _distinct(form, b, a)
    if form.model == "contrast":
        parts = weights[0] * common, -weights[1] * mine, -weights[2] * theirs
        offset = weights[0] * offset
    else:
        total = common.sum() + offset
        full = denominator(total, mine.sum(), theirs.sum(), weights[1], weights[2])
        if min(float(full), float(total) + 1) < FLOOR:  # no such split at the floor
            bottom = full.clamp_min(FLOOR)
            parts, offset = (common / bottom, 0 * mine, 0 * theirs), offset / bottom
        else:
            loss = total / ((total + 1) * full)
            parts = common / (total + 1), -weights[1] * mine * loss, -weights[2] * theirs * loss
            offset = offset / (total + 1)
    logit = sum(each.sum() for each in parts) + offset
    return Explanation(*parts, offset=float(offset), logit=float(logit))


def _common(form: Form, a: Side, b: Side) -> tuple[Tensor, Tensor]:
    """The common measure [k] feature by feature, and what is left over (0-dim)."""
    zero = a.scores.new_zeros(())
    if form.intersection == "product":
        return (a.salience * b.salience)[0], zero
    inside_x, inside_y = (a.salience * b.present)[0], (a.present * b.salience)[0]
    if form.reduce == "feature":
        if form.intersection == "mean":
            return (inside_x + inside_y) / 2, zero
        s, t = a.scores[0], b.scores[0]
        value = torch.minimum(s, t) if form.intersection == "max" else reduced(form.intersection, s, t)
        shared = value * a.present[0] * b.present[0]
        return (inside_x + inside_y - shared if form.intersection == "max" else shared), zero
    with torch.enable_grad():
        sums = [each.sum().requires_grad_() for each in (inside_x, inside_y)]
        value = reduced(form.intersection, *sums)
        slopes = torch.autograd.grad(value, sums)
    split = slopes[0] * inside_x + slopes[1] * inside_y
    return split, value.detach() - split.sum() if form.intersection == "softmin" else zero


def _distinct(form: Form, a: Side, b: Side) -> Tensor:
    """f(A - B) [k], feature by feature."""
    alone = (a.salience * b.absent)[0]
    if form.difference == "ignorematch":
        return alone
    if form.reduce == "feature":
        return alone + ((a.scores - b.scores).relu() * a.present * b.present)[0]
    excess = (a.salience * b.present - a.present * b.salience)[0]
    return alone + excess * (excess.sum() > 0)


# --- the state of a layer ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diagnostics:
    """What lives in a layer, seen on one batch. Fractions are in [0, 1].

    Args:
        input_active: share of (input, feature) pairs with a positive score.
        prototype_active: share of (prototype, feature) pairs; at exactly 1 alpha and beta learn nothing.
        dead_inputs: share of inputs without a feature: all get the same logits, and no gradient.
        dead_prototypes: share of prototypes without a feature.
        dead_features: features [k] that no input has.
        saturated_features: features [k] that every input and every prototype has: there the layer is linear.
        floored: share of denominators of the ratio model that are held at the floor; 0 in the contrast model.
        theta: weight of what is common.
        alpha: weight of what the input has alone.
        beta: weight of what the prototype has alone.
        feature_grad_norms: norm of every feature's gradient [k], or None before a backward pass.
        prototype_grad_norms: norm of every prototype's gradient [m], or None.
    """

    input_active: float
    prototype_active: float
    dead_inputs: float
    dead_prototypes: float
    dead_features: Tensor
    saturated_features: Tensor
    floored: float
    theta: float
    alpha: float
    beta: float
    feature_grad_norms: Tensor | None
    prototype_grad_norms: Tensor | None


def open_share(scores: Tensor) -> float:
    """Share of positive scores; a half where all are exactly zero, which says nothing of the gates."""
    if scores.shape[-2] * scores.shape[-1] < FEWEST * FEWEST or not bool(scores.any()):
        return 0.5
    return float((scores > 0).double().mean())


@torch.no_grad()
def diagnose(
    form: Form, s: Tensor, t: Tensor, scalars: tuple[Tensor, Tensor, Tensor], grads: tuple[Any, Any]
) -> Diagnostics:
    """Diagnostics of scores of inputs [n, k] and prototypes [m, k]; ``grads`` of bank and prototypes, or None."""
    has, wants = s > 0, t > 0
    floored = 0.0
    if form.model == "ratio" and s.numel():
        bottom = denominator(*measures(form, side(form, s), side(form, t)), *scalars[1:])
        floored = float((bottom < FLOOR).double().mean())
    norms = [None if grad is None else grad.detach().flatten(1).norm(dim=1) for grad in grads]
    return Diagnostics(
        input_active=_share(has),
        prototype_active=_share(wants),
        dead_inputs=_share(~has.any(1)),
        dead_prototypes=_share(~wants.any(1)),
        dead_features=(~has.any(0)).nonzero().flatten(),
        saturated_features=(has.all(0) & wants.all(0)).nonzero().flatten(),
        floored=floored,
        theta=float(scalars[0]),
        alpha=float(scalars[1]),
        beta=float(scalars[2]),
        feature_grad_norms=norms[0],
        prototype_grad_norms=norms[1],
    )


def _share(mask: Tensor) -> float:
    return float(mask.double().mean()) if mask.numel() else 0.0


# --- what features and prototypes stand for ------------------------------------------------------------------------


class Nearest(NamedTuple):
    """Rows of the inputs that stand for a layer: of every prototype [m, count] and of every feature [k, count]."""

    prototypes: Tensor
    features: Tensor


@torch.no_grad()
def nearest_inputs(layer: Any, inputs: Tensor, count: int = 5) -> Nearest:
    """For every prototype the inputs most similar to it, for every feature those with the highest score.

    Args:
        layer: a `TverskyProjection`.
        inputs: what the layer is fed [n, d], for example encoded training images.
        count: how many of each, at most n.

    Returns:
        Indices into ``inputs``, best first.

    Raises:
        ValueError: if ``inputs`` is no matrix or ``count`` is out of range.
    """
    floating("inputs", inputs, ndim=2)
    integer("count", count, minimum=1)
    if count > len(inputs):
        raise ValueError(
            f"count must be at most the {len(inputs)} inputs, got {count}. Ask for fewer, or pass more inputs."
        )
    scores = torch.nn.functional.linear(inputs, layer.feature_bank.rows())
    return Nearest(*(each.topk(count, dim=0).indices.T for each in (layer(inputs), scores)))


class SemanticField(NamedTuple):
    """What a set expression picks out.

    Attributes:
        features: which features are in the set [k].
        scores: sum of every candidate's scores on them [n]; 0 for an empty set.
        order: candidates from the highest score to the lowest [n].
    """

    features: Tensor
    scores: Tensor
    order: Tensor


@torch.no_grad()
def semantic_field(
    bank: Bank, candidates: Tensor, having: Tensor, lacking: Tensor | None = None
) -> SemanticField:
    """Rank candidates on the features that all of some objects have and none of some others has (section 3.5).

    ``having=stack([a, b]), lacking=c[None]`` is "a and b and not c": {k: s_a > 0, s_b > 0, s_c <= 0}.

    Args:
        bank: the features.
        candidates: objects to rank [n, d].
        having: objects whose features are meant [j, d], j >= 1.
        lacking: objects whose features are left out [l, d].

    Raises:
        ValueError: if a shape does not fit, or ``having`` is empty.
    """
    rows = bank.rows()
    for name, each in (("candidates", candidates), ("having", having), ("lacking", lacking)):
        if each is not None:
            floating(name, each, shape=(None, rows.shape[1]), fix="Pass one object in a row.")
    if not len(having):
        raise ValueError(
            "having must hold at least one object, got none. Pass the objects whose features are meant."
        )
    inside = (having @ rows.T > 0).all(0)
    if lacking is not None:
        inside = inside & (lacking @ rows.T <= 0).all(0)
    scores = (candidates @ rows.T)[:, inside].sum(1)
    return SemanticField(inside, scores, scores.argsort(descending=True, stable=True))
