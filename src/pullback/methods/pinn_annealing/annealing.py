"""Learning-rate annealing: loss weights from gradient statistics (Wang, Teng, Perdikaris, arXiv:2001.04536)."""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor

from pullback.core.checks import (
    NON_FINITE_POLICIES,
    NonFinite,
    NonFiniteError,
    choice,
    fraction,
    integer,
    shown,
)
from pullback.methods.pinn_annealing.losses import (
    Statistics,
    WeightedLosses,
    added,
    averaged,
    graph_leaves,
    layer_norms,
    per_loss,
    ratios,
    reached,
    weighted_sum,
)
from pullback.methods.pinn_annealing.networks import (
    AnnealingStatistics,
    Chosen,
    GradientHistograms,
    GradientTable,
    chosen_parameters,
)

Variant: TypeAlias = Literal["siam", "arxiv-v1"]

_LBFGS_STEP = inspect.unwrap(torch.optim.LBFGS.step).__code__


@final
class GradientAnnealing(WeightedLosses):
    r"""Weighted sum of named losses whose weights follow the sizes of their gradients (SIAM eq. 2.30-2.31).

    Every ``update_every`` steps each term i gets a new weight,

    .. math:: \hat\lambda_i = \frac{\max |\nabla L_r|}{\overline{|\nabla (\lambda_i L_i)|}}, \qquad
              \lambda_i \leftarrow (1 - \alpha) \lambda_i + \alpha \hat\lambda_i,

    with r the ``reference``, whose own weight stays 1. Weights are constants for the gradient. With frozen
    gradients they settle at the square root of the ratio. ``variant="arxiv-v1"`` leaves :math:`\lambda_i` out of
    the denominator, as the first preprint does (there with ``alpha=0.9``); they then settle at the ratio itself,
    which diverges as a term is fitted.

    Args:
        terms: names of the losses whose weights are learned.
        reference: name of the loss, or losses, that set the scale; of several the largest entry counts.
        params: parameters over which the statistics run, by name or as a list; chosen explicitly because the
            choice changes the weights: `weight_matrices` gives the paper's. Every loss must reach all of them.
        alpha: weight of the newest ratio, in [0, 1]; 0 leaves the weights alone, measures and counts nothing.
        update_every: steps from one update to the next, the first step being one.
        variant: ``"siam"`` or ``"arxiv-v1"``; None: the first, for ``statistics="norm"`` the second.
        statistics: ``"layer-mean"``: mean over layers of each layer's mean entry (the published code);
            ``"global-mean"``: mean of all entries; ``"cavity"``: largest over mean entry in each layer, then the
            largest layer (the published lid-driven cavity); ``"norm"``: mean of all terms' gradient norms over
            the term's own norm, for the reference as well (the authors' later library).
        lam_min: least weight, > 0.
        lam_max: largest weight; a term that is fitted exactly has no gradient and would ask for an infinite one.
        initial: weight of every term at the start, or one by name.
        apply: ``"next"``: a new weight holds from the next step on (the published code); ``"now"``: from the step
            whose gradients gave it (algorithm 1).
        nonfinite: when a statistic is NaN or Inf, or a loss is a constant: ``"skip"`` keeps the weight and counts
            the event in ``skipped``, without a host read; ``"warn"`` also warns; ``"raise"`` stops before any change.
        process_group: processes whose gradients are averaged before the statistics; None: all, when
            ``torch.distributed`` is initialised; False: none.

    Attributes:
        steps: how many steps were counted (int64, 0-dim).
        updates: how many updates took place.
        skipped: how many of them met a statistic that was not finite.

    Raises:
        TypeError: if names are no strings or ``params`` is a module.
        ValueError: if an argument is out of its range, names repeat, or no parameter can be trained.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([[2.0, 1.0]]))
        >>> balance = GradientAnnealing("data", "residual", params={"w": w}, alpha=0.5, update_every=1)
        >>> total = balance({"residual": 8 * w.sum(), "data": 2 * w.sum()})
        >>> total.item(), balance.weights["data"].item()
        (30.0, 2.5)
    """

    refuses = {  # noqa: RUF012 - as declared by the base class
        "gradcheck": "weights move with the parameters but are constants for the gradient; frozen ones pass",
        "gradgradcheck": "as gradcheck",
        "compiles": "an update reads gradients, which no single graph can hold; frozen weights compile",
        "func_grad": "an update reads gradients of real parameters, which torch.func hides; frozen ones pass",
    }

    peak: Tensor
    spread: Tensor

    def __init__(
        self,
        terms: str | Iterable[str],
        reference: str | Iterable[str] = "residual",
        *,
        params: Chosen,
        alpha: float = 0.1,
        update_every: int = 10,
        variant: Variant | None = None,
        statistics: Statistics = "layer-mean",
        lam_min: float = 1e-6,
        lam_max: float = 1e6,
        initial: float | Mapping[str, float] = 1.0,
        apply: Literal["next", "now"] = "next",
        nonfinite: NonFinite = "skip",
        process_group: Any = None,
    ) -> None:
        chosen = chosen_parameters(params)
        kinds = ("layer-mean", "global-mean", "cavity", "norm")
        self.statistics: Statistics = choice("statistics", statistics, kinds)
        norm = statistics == "norm"
        super().__init__(
            terms,
            reference,
            initial=initial,
            limits=(lam_min, lam_max),
            like=max(chosen.values(), key=lambda p: p.dtype.itemsize),
            weigh_reference=norm,
        )
        self.layers = tuple(chosen)
        self._params = list(chosen.values())  # in a list: they belong to the model, not to this module
        self.alpha = fraction("alpha", alpha)
        self.update_every = integer("update_every", update_every, minimum=1)
        usual = "arxiv-v1" if norm else "siam"
        self.variant = choice("variant", usual if variant is None else variant, ("siam", "arxiv-v1"))
        self.apply_at = choice("apply", apply, ("next", "now"))
        self.nonfinite = choice("nonfinite", nonfinite, NON_FINITE_POLICIES)
        self.process_group = process_group
        self._pending: Sequence[Sequence[Tensor] | None] | None = None
        for name, rows in (("peak", len(self.reference)), ("spread", len(self.terms))):
            empty = self.lam.new_full((rows, len(self.layers)), math.nan)
            self.register_buffer(name, empty, persistent=False)

    # --- use -------------------------------------------------------------------------------------------------------

    def forward(self, losses: Mapping[str, Tensor], *, last: bool = True) -> Tensor:
        """Weighted sum of the losses; counts a step and updates the weights when that is due.

        Nothing is counted or updated inside `frozen`, in evaluation mode, or without gradients. On update steps
        this costs one more backward pass per loss, for the chosen parameters; `backward` avoids it.

        Args:
            losses: exactly the declared losses by name, unweighted scalars with their graphs. With ``GradScaler``
                pass scaled ones (``scaler.scale(loss)``): a common factor changes no weight.
            last: False for all but the last of several batches whose gradients are accumulated into one step.

        Returns:
            0-dim sum, in the order of ``losses``.

        Raises:
            TypeError: if ``losses`` is no mapping of floating tensors.
            ValueError: if a name is missing or unknown, a loss is no scalar or does not reach ``params``.
            RuntimeError: if an update is due inside ``LBFGS.step``, ``torch.func`` or ``torch.compile``.
            NonFiniteError: if a statistic is not finite and ``nonfinite="raise"``.
        """
        self._check(losses)
        return self._sum(losses, self._due(losses), last)

    def backward(
        self, losses: Mapping[str, Tensor], inputs: Iterable[Tensor] | None = None, *, last: bool = True
    ) -> Tensor:
        """Do ``self(losses).backward()`` without any further backward pass: one per loss on update steps.

        Update steps take the gradient of every loss apart, read the statistics from them, and add their weighted
        sum to ``.grad``; hooks after accumulation, such as those of ``DistributedDataParallel``, run once. Where
        losses share layers, the shared part is passed once per loss; memory holds one set of gradients per loss.
        A leaf with hooks of its own (``tensor.register_hook``) would see each loss: then this falls back to
        ``self(losses).backward()``.

        Args:
            losses: as for a call.
            inputs: leaves to fill, as in ``torch.Tensor.backward``; None: all that the losses depend on.
            last: as for a call.

        Returns:
            The weighted sum, detached. Errors are those of a call and come before any ``.grad`` is touched.
        """
        self._check(losses)
        leaves = None if inputs is None else _leaves(inputs)
        due = self._due(losses)
        if due:
            targets = graph_leaves(losses.values()) if leaves is None else leaves
            if not any(leaf._backward_hooks for leaf in targets):
                return self._backward_apart(losses, targets, last)
        total = self._sum(losses, due, last)
        total.backward(inputs=leaves)
        return total.detach()

    def _backward_apart(self, losses: Mapping[str, Tensor], targets: list[Tensor], last: bool) -> Tensor:
        """One backward pass per loss; statistics and ``.grad`` from the same gradients."""
        weights, live = self.lam.clone(), self._live()
        known = {id(leaf) for leaf in targets}
        wanted = [*targets, *(p for p in live if id(p) not in known)]
        place = {id(leaf): at for at, leaf in enumerate(wanted)}
        apart = per_loss(losses, wanted, keep_graph=False)
        chosen = [None if row is None else [row[place[id(p)]] for p in live] for row in apart]
        self._collect(chosen, losses, last)
        self._advance(last)
        weights = self.lam.clone() if self.apply_at == "now" else weights
        factors = [self._factor(name, weights) for name in losses]
        summed = weighted_sum([row and row[: len(targets)] for row in apart], factors, len(targets))
        rows = [(leaf, grad) for leaf, grad in zip(targets, summed, strict=True) if grad is not None]
        # leaves as roots: accumulation, and the hooks after it, run as in any backward pass
        torch.autograd.backward([leaf for leaf, _ in rows], [grad for _, grad in rows])
        return self._total({name: loss.detach() for name, loss in losses.items()}, weights)

    def update(self, losses: Mapping[str, Tensor]) -> None:
        """Update the weights now, whatever the counter says, and count no step; errors as for a call.

        For closures: ``balance.update(losses())``, then ``with balance.frozen(): optimizer.step(closure)``.
        """
        self._check(losses)
        self._refuse_inside(True)
        self._collect(per_loss(losses, self._live(), keep_graph=True), losses, last=True)

    @property
    def stats(self) -> AnnealingStatistics:
        """Sizes of the gradients at the last update."""
        peaks = dict(zip(self.reference, self.peak.clone(), strict=True))
        return AnnealingStatistics(
            self.layers, peaks, dict(zip(self.terms, self.spread.clone(), strict=True))
        )

    def gradient_histograms(
        self, losses: Mapping[str, Tensor], *, bins: int = 50, weighted: bool = True
    ) -> GradientTable:
        """Histograms of each loss's gradient, per chosen parameter; leaves no trace (see `GradientHistograms`).

        Args:
            losses: as for a call; their graphs are kept.
            bins: bins of each histogram.
            weighted: whether gradients carry their present weights.
        """
        self._check(losses)
        chosen = dict(zip(self.layers, self._params, strict=True))
        return GradientHistograms(bins)(losses, chosen, weights=self.weights if weighted else None)

    # --- one step --------------------------------------------------------------------------------------------------

    def _due(self, losses: Mapping[str, Tensor]) -> bool | None:
        """Whether this call updates the weights; None when it does not even count, being no part of training."""
        if self._frozen or not self.training or self.alpha == 0.0 or not torch.is_grad_enabled():
            return None
        if not any(loss.requires_grad for loss in losses.values()):
            return None
        due = self._count % self.update_every == 0
        self._refuse_inside(due)
        return due

    def _sum(self, losses: Mapping[str, Tensor], due: bool | None, last: bool) -> Tensor:
        """The weighted sum, with what `_due` said done."""
        weights = self.lam.clone()  # backward needs them as they are now
        if due:
            self._collect(per_loss(losses, self._live(), keep_graph=True), losses, last)
            weights = self.lam.clone() if self.apply_at == "now" else weights
        if due is not None:
            self._advance(last)
        return self._total(losses, weights)

    @staticmethod
    def _refuse_inside(moves: bool) -> None:
        """Refuse to count, or to move, weights where that would be wrong or is impossible."""
        if torch.compiler.is_compiling():
            where, fix = (
                "inside torch.compile",
                "Compile the model and the losses, and call the balance outside.",
            )
        elif torch._C._functorch.peek_interpreter_stack() is not None:
            where, fix = "inside a torch.func transform", "Wrap the call in balance.frozen()."
        elif moves and _inside_lbfgs():
            where = "inside LBFGS.step(closure), whose line search compares values of one loss"
            fix = "Call balance.update(losses) before it and step within balance.frozen()."
        else:
            return
        raise RuntimeError(f"balance must move its weights in the training loop, got a call {where}. {fix}")

    def _live(self) -> list[Tensor]:
        """The chosen parameters that are not frozen."""
        live = [p for p in self._params if p.requires_grad]
        if not live:
            raise ValueError(
                f"params must hold a trainable parameter, got {len(self._params)} frozen ones. Unfreeze one, or "
                "wrap the loop in balance.frozen()."
            )
        return live

    def _advance(self, last: bool) -> None:
        if last:
            self._count += 1
            self.steps.add_(1)

    # --- the weights -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _collect(
        self, apart: Sequence[Sequence[Tensor | None] | None], losses: Mapping[str, Tensor], last: bool
    ) -> None:
        """Add one batch's gradients to those of the step; update the weights with the last one."""
        if not last and self.apply_at == "now":
            raise ValueError(
                "last must be True with apply='now', got False: the step's first batches would carry other weights. "
                "Use apply='next' to accumulate gradients."
            )
        layers = [name for name, p in zip(self.layers, self._params, strict=True) if p.requires_grad]
        found = {
            name: None if row is None else reached(name, row, layers)
            for name, row in zip(losses, apart, strict=True)
        }
        rows = [found[name] for name in self.names]
        if self._pending is not None:
            rows = [added(old, new) for old, new in zip(self._pending, rows, strict=True)]
        self._pending = None if last else rows
        if last:
            self._update(rows)

    def _update(self, rows: Sequence[Sequence[Tensor] | None]) -> None:
        """Move the weights by the gradients of a whole step (SIAM eq. 2.30-2.31)."""
        at = [index for index, p in enumerate(self._params) if p.requires_grad]
        live = [self._params[index] for index in at]
        rows = averaged(rows, live, self.process_group)
        sizes = torch.tensor([p.numel() for p in live], dtype=self.lam.dtype, device=self.lam.device)
        norm, first = self.statistics == "norm", len(self.reference)
        orders = [2.0 if norm else math.inf] * first + [2.0 if norm else 1.0] * len(self.terms)
        norms = [layer_norms(row, o, self.lam, len(at)) for row, o in zip(rows, orders, strict=True)]
        table = torch.stack(norms)
        peak, spread = table[:first], table[first:] if norm else table[first:] / sizes
        inner = self.lam if self.variant == "siam" else torch.ones_like(self.lam)
        ratio = ratios(self.statistics, peak, spread, inner, sizes)
        finite = table.isfinite().all(1)
        good = finite.all().expand_as(ratio) if norm else finite[:first].all() & finite[first:]
        good = good & ~ratio.isnan()
        self._report(good, finite)
        old = self.lam[self.fixed :]
        new = (1.0 - self.alpha) * old + self.alpha * ratio.clamp(max=self.lam_max)
        self.lam[self.fixed :] = torch.where(good, new.clamp(self.lam_min, self.lam_max), old)
        self.updates.add_(1)
        self.skipped.add_((~good).any())
        every = slice(None) if len(at) == len(self.layers) else at
        self.peak[:, every], self.spread[:, every] = peak, spread

    def _report(self, good: Tensor, finite: Tensor) -> None:
        """Raise or warn about statistics that are not finite; ``"skip"`` reads nothing."""
        if self.nonfinite == "skip" or bool(good.all()):
            return
        bad = [name for name, fine in zip(self.names, finite.tolist(), strict=True) if not fine]
        which = ", ".join(bad) or "the sum"
        text = f"GradientAnnealing, step {self._count}: the gradient of {which} is NaN, Inf or none"
        if self.nonfinite == "raise":
            raise NonFiniteError(f"{text}. Look at that loss; nonfinite='skip' keeps the weight as it is.")
        warnings.warn(f"{text}. Its weight stays because nonfinite='warn'.", RuntimeWarning, stacklevel=5)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._pending = None  # a step begins anew

    def extra_repr(self) -> str:
        """Names and settings."""
        names = f"terms={list(self.terms)}, reference={list(self.reference)}, params={len(self.layers)}"
        shape = f"variant={self.variant!r}, statistics={self.statistics!r}, apply={self.apply_at!r}"
        return f"{names}, alpha={self.alpha:g}, update_every={self.update_every}, {shape}"


def _leaves(inputs: Iterable[Tensor]) -> list[Tensor]:
    found = list({id(leaf): leaf for leaf in inputs}.values())
    wrong = [leaf for leaf in found if not leaf.is_leaf or not leaf.requires_grad]
    if wrong or not found:
        what = shown(wrong[0]) if wrong else "none"
        raise ValueError(
            f"inputs must be leaves that require gradients, got {what}. Pass model.parameters()."
        )
    return found


def _inside_lbfgs() -> bool:
    """Whether the caller is a closure that ``LBFGS.step`` evaluates."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _LBFGS_STEP:
        frame = frame.f_back
    return frame is not None
