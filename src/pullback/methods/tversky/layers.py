"""Similarity and projection layers by Tversky, and the swap of linear layers for them."""

from __future__ import annotations

import warnings
from typing import Any, TypedDict, Unpack, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback.core.checks import choice, finite, floating, instance, integer
from pullback.core.kept import Kept
from pullback.core.kinds import Layer
from pullback.core.swap import Names, swap_modules
from pullback.methods.tversky import features as reading
from pullback.methods.tversky.features import EncodedRows, FeatureBank, Init, Prototypes, new_weight
from pullback.methods.tversky.forms import (
    Difference,
    Form,
    Gate,
    Intersection,
    Model,
    Reduce,
    Side,
    side,
    similarity,
)


class FormOptions(TypedDict, total=False):
    """Keywords of both layers that choose the similarity; see `Form` for their meaning."""

    intersection: Intersection
    difference: Difference
    model: Model
    reduce: Reduce
    gate: Gate
    sharpness: float
    chunk: int | None


# --- layers --------------------------------------------------------------------------------------------------------


class _Tversky(Layer):
    """What both layers share: bank, three weights, the form."""

    theta: nn.Parameter
    alpha: nn.Parameter
    beta: nn.Parameter

    def __init__(
        self,
        in_features: int,
        features: int | None,
        feature_bank: Any,
        options: FormOptions,
        weights: tuple[float, float, float],
        normalize: bool,
        init: Init,
        device: Any,
        dtype: Any,
    ) -> None:
        super().__init__()
        self.in_features = integer("in_features", in_features, minimum=1)
        self.init = choice("init", init, ("symmetric", "official"))
        self.form = form = Form(**options)
        self.normalize = instance("normalize", normalize, bool, fix="Pass True or False.")
        for name, value in zip(("theta", "alpha", "beta"), weights, strict=True):
            number = finite(name, value)
            if form.model == "ratio" and name != "theta" and number < 0:
                raise ValueError(
                    f"{name} must be >= 0 in the ratio model, got {number}. Start at 0 or above."
                )
            setattr(self, name, nn.Parameter(torch.tensor(number, device=device, dtype=dtype)))
        self.feature_bank = self._bank(features, feature_bank, init, device, dtype)
        self.theta.requires_grad_(form.model == "contrast")  # the ratio model does not use it
        self._watched = False

    def _bank(self, features: int | None, bank: Any, init: Init, device: Any, dtype: Any) -> Any:
        if bank is None:
            if features is None:
                raise ValueError(
                    "features must be given without a feature_bank, got None. Pass the number of features."
                )
            return FeatureBank(self.in_features, features, init=init, device=device, dtype=dtype)
        instance("feature_bank", bank, (FeatureBank, EncodedRows), fix="Pass FeatureBank(width, features).")
        if isinstance(bank, FeatureBank):
            if bank.in_features != self.in_features:
                raise ValueError(
                    f"feature_bank must have in_features={self.in_features}, got {bank.in_features}. Share a bank "
                    "among layers of equal input width only."
                )
            if features not in (None, bank.features):
                raise ValueError(
                    f"features must be the bank's {bank.features} or None, got {features}. Leave it out."
                )
        return bank

    def _scores(self, x: Tensor, bank: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=-1) if self.normalize else x, bank)

    def _check(self, name: str, x: Tensor) -> Tensor:
        floating(name, x)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"{name} must be [..., {self.in_features}], got shape {tuple(x.shape)}. Move the features last."
            )
        return x

    def _score(self, s: Tensor, t: Tensor | Side) -> Tensor:
        out = similarity(self.form, s, t, self.theta, self.alpha, self.beta)
        if self.training and not self._watched and not torch.compiler.is_compiling():
            self._watch(s, t.scores if isinstance(t, Side) else t)
        return out

    def _watch(self, s: Tensor, t: Tensor) -> None:
        """Look at the gates of the first training batch, once: the layer's only host read."""
        if min(s.shape[-2], s.shape[-1]) < reading.FEWEST:
            return
        try:
            states = {"input": reading.open_share(s.detach()), "prototype": reading.open_share(t.detach())}
        except RuntimeError:  # inside torch.func.vmap no number can be read
            return
        self._watched = True
        for who, share in states.items():
            if share in (0.0, 1.0):
                what = "has no feature of the bank" if share == 0.0 else "has every feature of the bank"
                warnings.warn(
                    f"every {who} {what}: {type(self).__name__} is "
                    + ("constant in it" if share == 0.0 else "linear there, and alpha or beta learns nothing")
                    + '. Use init="symmetric" and centred inputs; diagnostics(x) shows the fractions.',
                    RuntimeWarning,
                    stacklevel=4,
                )

    def extra_repr(self) -> str:
        form = self.form
        kind = form.intersection, form.difference, form.model, form.reduce, form.gate
        sizes = f"in_features={self.in_features}, out_features={getattr(self, 'out_features', None)}, "
        return sizes + ", ".join(kind) + ", normalize" * self.normalize


@final
class TverskySimilarity(_Tversky):
    r"""Tversky similarity of given objects, on learned features.

    With scores :math:`s = \Omega x`, :math:`t = \Omega y`, sets :math:`X = \{k: s_k > 0\}`, :math:`Y` alike and
    saliences :math:`f`, the contrast model is :math:`S = \theta f(X \cap Y) - \alpha f(X - Y) - \beta f(Y - X)`; the
    ratio model is :math:`f(X \cap Y) / (f(X \cap Y) + \alpha f(X - Y) + \beta f(Y - X) + 1)` (section 3.1), its
    denominator held at 0.25 or above.

    Args:
        in_features: d, width of the objects.
        features: k, number of features; may be left out with a ``feature_bank``.
        feature_bank: a `FeatureBank` to share, or `EncodedRows`; None makes one.
        normalize: scale objects (not features) to length 1.
        init: of a new bank; see `FeatureBank`.
        theta: first weight of what is common.
        alpha: first weight of what x has alone.
        beta: first weight of what y has alone. All three are learned, and may change sign.
        device: of the parameters.
        dtype: of the parameters.
        **form: which similarity, see `Form`: intersection, difference, model, reduce, gate, sharpness, chunk.

    Raises:
        TypeError, ValueError: if an argument makes no sense, or the bank has another width.
    """

    def __init__(
        self,
        in_features: int,
        features: int | None = None,
        *,
        feature_bank: FeatureBank | EncodedRows | None = None,
        normalize: bool = False,
        init: Init = "symmetric",
        theta: float = 1.0,
        alpha: float = 0.5,
        beta: float = 0.5,
        device: Any = None,
        dtype: Any = None,
        **form: Unpack[FormOptions],
    ) -> None:
        super().__init__(
            in_features, features, feature_bank, form, (theta, alpha, beta), normalize, init, device, dtype
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Similarities [..., n, m] of x [..., n, d] to y [m, d], or to y [..., m, d] with the same leading sizes.

        Raises:
            TypeError: if one is no floating tensor.
            ValueError: if the sizes do not fit.
        """
        x, y = self._check("x", x), self._check("y", y)
        if y.dim() < 2 or (y.dim() > 2 and (x.dim() != y.dim() or x.shape[:-2] != y.shape[:-2])):
            raise ValueError(
                f"y must be [m, {self.in_features}] or have the leading sizes of x, {tuple(x.shape[:-2])}, got shape "
                f"{tuple(y.shape)}. Expand it first."
            )
        bank = self.feature_bank.rows()
        s, t = self._scores(x, bank), self._scores(y, bank)
        if y.dim() > 2:
            return self._score(s, t)
        return self._score(s.reshape(-1, s.shape[-1]), t).reshape(*x.shape[:-1], len(y))


@final
class TverskyProjection(_Tversky):
    """Tversky similarity to learned prototypes: a non-linear layer in the place of a linear one.

    With all features in all sets, product contrast is the linear map ``theta x bank' bank prototypes'``. There are
    k d + m d + 3 parameters (a linear layer: m d + m) and no bias. Names in ``state_dict`` are those of the official
    code. In evaluation mode, without gradients to the parameters, the prototypes' side is kept from call to call and
    made again when a parameter has changed; ``train()`` and ``eval()`` drop it. Edits through
    ``.data`` leave no trace: call ``eval()`` again after them.

    Args:
        in_features: d, width of the inputs.
        out_features: m, number of prototypes.
        features: k, number of features; may be left out with a ``feature_bank``.
        feature_bank: a `FeatureBank` to share, or `EncodedRows`; None makes one.
        prototypes: a parameter [m, d] to tie, such as ``embedding.weight``, or `EncodedRows`; None makes them.
        normalize: scale inputs and prototypes (not features) to length 1.
        init: of a new bank and new prototypes; see `FeatureBank`.
        theta: first weight of what is common.
        alpha: first weight of what the input has alone.
        beta: first weight of what the prototype has alone. All three are learned, and may change sign.
        device: of the parameters.
        dtype: of the parameters.
        **form: which similarity, see `Form`: intersection, difference, model, reduce, gate, sharpness, chunk.

    Raises:
        TypeError, ValueError: if an argument makes no sense, or bank or prototypes have another shape.

    Example:
        >>> bank = FeatureBank(64, 256)
        >>> head = TverskyProjection(64, 10, feature_bank=bank)
        >>> head(torch.randn(2, 7, 64)).shape
        torch.Size([2, 7, 10])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        features: int | None = None,
        *,
        feature_bank: FeatureBank | EncodedRows | None = None,
        prototypes: nn.Parameter | EncodedRows | None = None,
        normalize: bool = False,
        init: Init = "symmetric",
        theta: float = 1.0,
        alpha: float = 0.5,
        beta: float = 0.5,
        device: Any = None,
        dtype: Any = None,
        **form: Unpack[FormOptions],
    ) -> None:
        super().__init__(
            in_features, features, feature_bank, form, (theta, alpha, beta), normalize, init, device, dtype
        )
        self.out_features = integer("out_features", out_features, minimum=1)
        if prototypes is None:
            prototypes = new_weight(self.out_features, self.in_features, init, device, dtype)
        instance("prototypes", prototypes, (nn.Parameter, EncodedRows), fix="Pass embedding.weight, say.")
        if isinstance(prototypes, nn.Parameter):
            floating("prototypes", prototypes, shape=(self.out_features, self.in_features))
            self.prototypes: Prototypes | EncodedRows = Prototypes(prototypes)
        else:
            self.prototypes = prototypes
        self._kept = Kept[Side]()

    def train(self, mode: bool = True) -> TverskyProjection:
        """Set the mode, as in torch, and drop what evaluation kept."""
        self._kept.clear()
        return super().train(mode)

    def _prototype_scores(self, bank: Tensor) -> Tensor | Side:
        changing = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        rows = self.prototypes.rows()
        if self.training or changing or torch.compiler.is_compiling():
            return self._scores(rows, bank)
        return self._kept.get((bank, rows), lambda: self._gated(rows, bank))

    @torch.no_grad()
    def _gated(self, rows: Tensor, bank: Tensor) -> Side:
        return side(self.form, self._scores(rows, bank))

    def forward(self, x: Tensor) -> Tensor:
        """Similarities [..., m] of inputs [..., d] to every prototype.

        Raises:
            TypeError: if x is no floating tensor.
            ValueError: if its last size is not d.
        """
        self._check("x", x)
        bank = self.feature_bank.rows()
        s = self._scores(x, bank)
        out = self._score(s.reshape(-1, s.shape[-1]), self._prototype_scores(bank))
        return out.reshape(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def explain(self, x: Tensor, index: int) -> reading.Explanation:
        """What every feature contributes to the logit ``index`` of one input [d].

        Raises:
            TypeError, ValueError: if x is no floating tensor [d].
            IndexError: if there is no such prototype.
        """
        floating("x", x, shape=(self.in_features,), fix="Explain one input at a time.")
        if not -self.out_features <= index < self.out_features:
            raise IndexError(f"index must be below {self.out_features}, got {index}. Name a prototype.")
        bank = self.feature_bank.rows()
        s, t = self._scores(x, bank), self._scores(self.prototypes.rows()[index], bank)
        return reading.explain(self.form, s, t, self.theta, self.alpha, self.beta)

    @torch.no_grad()
    def diagnostics(self, x: Tensor) -> reading.Diagnostics:
        """Which inputs [..., d], prototypes and features live, the three weights, and gradient norms by row."""
        bank = self.feature_bank.rows()
        s = self._scores(self._check("x", x), bank)
        t = self._scores(self.prototypes.rows(), bank)
        grads = [next(iter(m.parameters())).grad for m in (self.feature_bank, self.prototypes)]
        scalars = (self.theta, self.alpha, self.beta)
        return reading.diagnose(self.form, s.reshape(-1, s.shape[-1]), t, scalars, (grads[0], grads[1]))


# --- in the place of linear layers ---------------------------------------------------------------------------------


def replace_linear(
    model: nn.Module,
    names: Names,
    features: int | None = None,
    bank: FeatureBank | None = None,
    **options: Any,
) -> int:
    """Put a `TverskyProjection` in the place of linear layers, in place.

    A weight that another module holds too (an embedding tied to the head) stays the very same parameter and becomes
    the prototypes; otherwise prototypes are drawn anew, as the old weight is no good start for them. A layer that
    appears at several places becomes one layer at all of them. Biases are dropped: a Tversky layer has none. Build
    the optimizer afterwards.

    Args:
        model: the model to change.
        names: names of layers as in ``model.named_modules()``, or ``names(name, module)`` that picks them.
        features: number of features of each layer's own bank; may be left out with ``bank``.
        bank: one bank for all layers, which then need equal input widths.
        **options: keywords of `TverskyProjection`.

    Returns:
        How many layers were replaced.

    Raises:
        TypeError: if a named module is no linear layer (``nn.Linear``, or the Conv1D of transformers).
        ValueError: if a name is unknown, no layer is picked, or a bank does not fit. Nothing is changed then.
    """
    return swap_modules(
        model,
        names,
        lambda old: _projection(model, old, features, bank, options),
        fits=lambda module: _widths(module) is not None,
        what="linear layer",
    )


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a linear layer; None for anything else."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(weight, Tensor):
        return weight.shape[0], weight.shape[1]  # transformers: a linear layer with a transposed weight
    return None


def _projection(
    model: nn.Module, old: Any, features: int | None, bank: FeatureBank | None, options: dict[str, Any]
) -> TverskyProjection:
    inputs, outputs = _widths(old) or (0, 0)
    tied = any(p is old.weight for m in model.modules() if m is not old for p in m._parameters.values())
    if tied and isinstance(old, nn.Linear):
        options = {**options, "prototypes": old.weight}
    place = {"device": old.weight.device, "dtype": old.weight.dtype}
    return TverskyProjection(inputs, outputs, features, feature_bank=bank, **{**place, **options})
