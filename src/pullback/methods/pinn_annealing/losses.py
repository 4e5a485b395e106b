"""Named losses: their weighted sum, the gradient of each of them, and the statistics of those gradients."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from pullback.core.buffers import ExactBuffers
from pullback.core.checks import positive, shown
from pullback.core.kinds import Objective
from pullback.core.state import StateError, check_state

Statistics: TypeAlias = Literal["layer-mean", "global-mean", "cavity", "norm"]

# --- losses --------------------------------------------------------------------------------------------------------


def check_losses(losses: object) -> None:
    """Refuse losses that are not named real scalars.

    Raises:
        TypeError: if ``losses`` is no mapping or holds something else than floating tensors.
        ValueError: if it is empty or a loss is no scalar.
    """
    if type(losses) is not dict and not isinstance(losses, Mapping):
        raise TypeError(
            f"losses must be a mapping of names to scalar tensors, got {shown(losses)}. "
            'Name them: {"residual": loss_r, "boundary": loss_b}.'
        )
    if not losses:
        raise ValueError("losses must hold at least one loss, got an empty mapping. Pass every term by name.")
    for name, loss in losses.items():
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            raise TypeError(
                f"losses[{name!r}] must be a floating tensor, got {shown(loss)}. Do not detach it."
            )
        if loss.dim():
            raise ValueError(
                f"losses[{name!r}] must be a scalar, got {shown(loss)}. Reduce it, for example by .mean()."
            )


# --- gradients -----------------------------------------------------------------------------------------------------


def per_loss(
    losses: Mapping[str, Tensor], leaves: Sequence[Tensor], *, keep_graph: bool
) -> list[Sequence[Tensor | None] | None]:
    """Gradients of every loss for every leaf: one backward pass per loss, no ``.grad`` is touched.

    Args:
        losses: scalars by name.
        leaves: what to differentiate by.
        keep_graph: whether the graph is needed afterwards; if not, the last pass frees it.

    Returns:
        For each loss its gradients, None for a leaf that it does not reach; None for a loss that is a constant.
    """
    found: list[Sequence[Tensor | None] | None] = []
    alive = [name for name, loss in losses.items() if loss.requires_grad]
    for name, loss in losses.items():
        if name not in alive:
            found.append(None)
            continue
        keep = keep_graph or name != alive[-1]
        found.append(torch.autograd.grad(loss, leaves, retain_graph=keep, allow_unused=True))
    return found


def reached(name: str, grads: Sequence[Tensor | None], layers: Sequence[str]) -> list[Tensor]:
    """The gradients of one loss for the chosen parameters, all of which it must reach.

    Raises:
        ValueError: if it does not reach one of them.
        TypeError: if a gradient is sparse.
    """
    for layer, grad in zip(layers, grads, strict=True):
        if grad is None:
            raise ValueError(
                f"params must be reached by every loss, got {layer!r}, which losses[{name!r}] does not use. "
                "Choose the parameters that all losses share, for example weight_matrices(model.trunk)."
            )
        if grad.layout is not torch.strided:
            raise TypeError(
                f"params must have dense gradients, got layout {grad.layout} for {layer!r}. Leave it out of params."
            )
    return [grad for grad in grads if grad is not None]


def graph_leaves(losses: Iterable[Tensor]) -> list[Tensor]:
    """The leaves that ``backward()`` of these losses would give a gradient, found by walking their graphs."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    nodes: list[Any] = []
    for loss in losses:
        if loss.grad_fn is not None:
            nodes.append(loss.grad_fn)
        elif loss.requires_grad:
            found[id(loss)] = loss
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        nodes.extend(after for after, _ in node.next_functions if after is not None)
    return list(found.values())


def weighted_sum(
    grads: Sequence[Sequence[Tensor | None] | None], weights: Sequence[Tensor | None], count: int
) -> list[Tensor | None]:
    """Sum of weight times gradient for each of ``count`` leaves; a weight of None means 1.

    No gradient is edited: autograd may hand out one tensor for two leaves.
    """
    total: list[Tensor | None] = [None] * count
    for each, weight in zip(grads, weights, strict=True):
        if each is None:
            continue
        rows = [(at, grad) for at, grad in enumerate(each) if grad is not None]
        if not rows:
            continue
        scaled = (
            [grad for _, grad in rows] if weight is None else torch._foreach_mul([g for _, g in rows], weight)
        )
        old = [(k, total[at]) for k, (at, _) in enumerate(rows)]
        both = [(k, one) for k, one in old if one is not None]
        sums = torch._foreach_add([one for _, one in both], [scaled[k] for k, _ in both]) if both else ()
        merged = {k: new for (k, _), new in zip(both, sums, strict=True)}
        for k, (at, _) in enumerate(rows):
            total[at] = merged.get(k, scaled[k])
    return total


def added(old: Sequence[Tensor] | None, new: Sequence[Tensor] | None) -> Sequence[Tensor] | None:
    """Sum of two sets of gradients; a loss that is a constant in one batch adds nothing."""
    return new if old is None else old if new is None else torch._foreach_add(list(old), list(new))


# --- statistics ----------------------------------------------------------------------------------------------------


def averaged(
    rows: Sequence[Sequence[Tensor] | None], like: Sequence[Tensor], group: Any
) -> Sequence[Sequence[Tensor] | None]:
    """Mean over processes of the gradients of every loss, in one collective call; unchanged with one process.

    A loss that is a constant on some process counts as NaN, so that all processes see the same.

    Args:
        rows: gradients by loss; None for a constant.
        like: the parameters, for shapes.
        group: the process group; None: all processes; False: this process alone.
    """
    if (
        group is False
        or not (dist.is_available() and dist.is_initialized())
        or dist.get_world_size(group) < 2
    ):
        return rows
    filled = [[torch.full_like(p, math.nan) for p in like] if row is None else row for row in rows]
    wide = [[grad.to(torch.promote_types(grad.dtype, torch.float32)) for grad in row] for row in filled]
    flat = torch.cat([grad.reshape(-1) for row in wide for grad in row])
    dist.all_reduce(flat, group=group)
    flat.div_(dist.get_world_size(group))
    pieces = iter(flat.split([grad.numel() for row in wide for grad in row]))
    return [[next(pieces).view_as(grad) for grad in row] for row in wide]


def layer_norms(row: Sequence[Tensor] | None, order: float, like: Tensor, count: int) -> Tensor:
    """Norms of one loss's gradients [P] in the dtype of ``like``; NaN for a constant loss."""
    if row is None:
        return like.new_full((count,), math.nan)
    norms = torch._foreach_norm(list(row), order, dtype=like.dtype)
    return torch.stack(norms).to(like.device)


def ratios(kind: Statistics, peak: Tensor, spread: Tensor, inner: Tensor, sizes: Tensor) -> Tensor:
    r"""The values :math:`\hat\lambda` towards which weights move (SIAM eq. 2.30 and the published code).

    Args:
        kind: the statistic.
        peak: by reference and layer [R, P]: largest entry (``"norm"``: norm).
        spread: by term and layer [M, P]: mean entry of the unweighted gradient (``"norm"``: norm).
        inner: weights inside the denominator [R + M]; ones leave them out.
        sizes: entries of each layer [P].

    Returns:
        [M], for ``"norm"`` [R + M]; Inf where a term has no gradient at all, NaN where a statistic is NaN.
    """
    tiny = torch.finfo(peak.dtype).tiny
    if kind == "norm":
        norms = inner * torch.linalg.vector_norm(torch.cat([peak, spread]), dim=1)
        return norms.mean() / norms.clamp_min(tiny)
    data = inner[len(peak) :, None] * spread
    if kind == "cavity":
        return (peak.amax(0) / data.clamp_min(tiny)).amax(1)
    mean = data.mean(1) if kind == "layer-mean" else (data * sizes).sum(1) / sizes.sum()
    return peak.amax() / mean.clamp_min(tiny)


# --- the sum -------------------------------------------------------------------------------------------------------


class WeightedLosses(ExactBuffers, Objective):
    """Weighted sum of named losses; the weights are a buffer, the names part of the versioned state.

    Args:
        terms: names of the losses that have a weight.
        reference: names of the losses whose weight is 1, unless ``weigh_reference``.
        initial: weight of every term, or one by name.
        limits: least and largest weight.
        like: a tensor on the device where the weights shall live; their dtype is its own, float32 at least.
        weigh_reference: whether the reference has weights as well.
    """

    format_version = 1
    counters = ("steps", "updates", "skipped")
    lam: Tensor
    steps: Tensor
    updates: Tensor
    skipped: Tensor

    def __init__(
        self,
        terms: str | Iterable[str],
        reference: str | Iterable[str],
        *,
        initial: float | Mapping[str, float],
        limits: tuple[float, float],
        like: Tensor,
        weigh_reference: bool,
    ) -> None:
        super().__init__()
        self.terms, self.reference = _names("terms", terms), _names("reference", reference)
        self.names = (*self.reference, *self.terms)
        self._known = frozenset(self.names)
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"terms and reference must be distinct, got {list(self.names)}. Rename one.")
        self.fixed = 0 if weigh_reference else len(self.reference)
        self.lam_min, self.lam_max = positive("lam_min", limits[0]), positive("lam_max", limits[1])
        if self.lam_max <= self.lam_min:
            raise ValueError(f"lam_max must be > lam_min = {self.lam_min:g}, got {self.lam_max:g}.")
        wide = torch.promote_types(like.dtype, torch.float32)
        lam = torch.tensor(self._start(initial), dtype=wide, device=like.device)
        self.register_buffer("lam", lam)
        for name in self.counters:
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=like.device))
        self._frozen = self._count = 0  # _count is what steps holds, so that no step need read a device

    def _start(self, initial: float | Mapping[str, float]) -> list[float]:
        start = dict.fromkeys(self.names, 1.0)
        given = initial if isinstance(initial, Mapping) else dict.fromkeys(self.terms, initial)
        for name, value in given.items():
            if name not in self.names[self.fixed :]:
                raise ValueError(f"initial must name terms, got {name!r}. Terms are {', '.join(self.terms)}.")
            start[name] = positive(f"initial[{name!r}]", value)
        wrong = [name for name, value in start.items() if not self.lam_min <= value <= self.lam_max]
        if wrong:
            raise ValueError(
                f"initial must lie between lam_min = {self.lam_min:g} and lam_max = {self.lam_max:g}, got "
                f"{start[wrong[0]]:g} for {wrong[0]!r}. Widen the range."
            )
        return list(start.values())

    def _check(self, losses: Mapping[str, Tensor]) -> None:
        """Refuse anything but exactly the declared losses."""
        check_losses(losses)
        if losses.keys() != self._known:
            missing = [name for name in self.names if name not in losses]
            unknown = [name for name in losses if name not in self.names]
            raise ValueError(
                f"losses must hold exactly {', '.join(self.names)}, got missing {missing} and unknown {unknown}. "
                "Declare every loss in terms or reference."
            )

    def _factor(self, name: str, weights: Tensor) -> Tensor | None:
        """The weight of a loss; None for one that is always 1."""
        at = self.names.index(name)
        return None if at < self.fixed else weights[at]

    def _total(self, losses: Mapping[str, Tensor], weights: Tensor) -> Tensor:
        """Sum in the order of ``losses``."""
        parts = [(loss, self._factor(name, weights)) for name, loss in losses.items()]
        total, *others = [loss if factor is None else factor * loss for loss, factor in parts]
        for part in others:
            total = total + part
        return total

    @contextmanager
    def frozen(self) -> Generator[WeightedLosses]:
        """Within this block the weights stay and no step is counted; for closures and for evaluation."""
        self._frozen += 1
        try:
            yield self
        finally:
            self._frozen -= 1

    @property
    def weights(self) -> dict[str, Tensor]:
        """The present weight of every loss as a 0-dim tensor, a copy; 1 for the reference."""
        return dict(zip(self.names, self.lam.clone().unbind(), strict=True))

    # --- state -----------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """Version and names, which a state must share with the module that loads it."""
        return {
            "format_version": self.format_version,
            "terms": list(self.terms),
            "reference": list(self.reference),
            "fixed": self.fixed,
        }

    def set_extra_state(self, state: Any) -> None:
        """Nothing to take over: loading has compared it already."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take over a state, or nothing of it when any part does not fit."""
        given = {key.removeprefix(prefix): each for key, each in state_dict.items() if key.startswith(prefix)}
        wanted = [name for name in ("lam", *self.counters, "_extra_state") if name not in given]
        missing_keys.extend(prefix + name for name in wanted)
        problem = "" if wanted else self._misfit(given)
        error_msgs.extend([problem] if problem else [])
        if not wanted and not problem:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            self._count = 0 if self.steps.is_meta else int(self.steps)

    def _misfit(self, given: Mapping[str, Any]) -> str:
        """What keeps a saved state from fitting, or nothing."""
        own, extra = {name: getattr(self, name) for name in ("lam", *self.counters)}, self.get_extra_state()
        try:
            check_state(type(self).__name__, given["_extra_state"], extra, version=self.format_version)
            check_state(type(self).__name__, {name: given[name] for name in own}, own)
        except StateError as error:
            return str(error)
        for key, value in extra.items():
            if key != "format_version" and given["_extra_state"][key] != value:
                saved = given["_extra_state"][key]
                return f"{type(self).__name__}.{key} must be {value}, got {saved}. Declare the same losses."
        return ""


def _names(argument: str, value: str | Iterable[str]) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{argument} must be names, got {shown(name)}. Pass the keys of your losses.")
    if not names:
        raise ValueError(f"{argument} must hold at least one name, got none. Pass the keys of your losses.")
    return names
