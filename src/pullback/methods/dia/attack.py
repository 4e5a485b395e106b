"""The Dropout Inversion Attack (Scheliga et al. 2023, arXiv:2208.06163): images and dropout masks searched together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pullback.core.checks import choice, fraction, non_negative, shown
from pullback.core.inversion import GradientInversion
from pullback.core.inversion_problem import PixelProblem
from pullback.core.inversion_victim import LossFunction, Victim
from pullback.core.streams import generator
from pullback.methods.dia.masks import Injection, Site, dropout_sites

MaskInit: TypeAlias = Literal["bernoulli", "zero_columns"]


class DropoutInversion(GradientInversion):
    """Reconstruct inputs from a gradient that was taken under dropout.

    Every dropout mask of the client's forward pass is an unknown, relaxed to real numbers in [0, 1]. Minimised is

        distance of gradients + tv * TV(x) + mask_reg * sum over calls of abs((1 - mean of the mask) - p)

    by one Adam over images and masks; images move by the sign of their gradient, masks by the gradient itself, and both
    are clipped after every step. The shapes of the masks come from one forward pass. Where no dropout has p > 0 this is
    `GradientInversion`, bit for bit.

    Args:
        model: the client's model; see `GradientInversion`.
        loss_fn: the client's loss.
        masks: ``"search"``; or the true masks by call, as `record_masks` gives them, which makes it the *well-informed*
            attack of the paper; or None, which attacks the network without dropout, as an attack that knows nothing of
            dropout does.
        mask_reg: weight of the penalty on the share of dropped units.
        mask_init: ``"bernoulli"``, or ``"zero_columns"``: where a linear layer reads a masked activation, a zero column
            of its weight gradient says that the unit was dropped, by all samples of a batch. Ours.
        **settings: as `GradientInversion`.

    Raises:
        TypeError, ValueError: if a setting makes no sense.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        *,
        masks: Literal["search"] | Mapping[str, Tensor | None] | None = "search",
        mask_reg: float = 1e-4,
        mask_init: MaskInit = "bernoulli",
        **settings: Any,
    ) -> None:
        super().__init__(model, loss_fn, **settings)
        if isinstance(masks, str):
            choice("masks", masks, ("search",), fix="Pass 'search', the true masks by call, or None.")
        elif masks is not None and not isinstance(masks, Mapping):
            raise TypeError(
                f"masks must be 'search', a mapping from calls or None, got {shown(masks)}. See record_masks."
            )
        self.masks = masks
        self.mask_reg = non_negative("mask_reg", mask_reg)
        self.mask_init = choice("mask_init", mask_init, ("bernoulli", "zero_columns"))

    def _problem(
        self, victim: Victim, labels: Tensor | None, shape: tuple[int, ...], classes: int, seed: int
    ) -> PixelProblem:
        return _DropoutProblem(self, victim, labels, shape, classes, seed, **self._pixels())

    def _settings(self) -> dict[str, Any]:
        kind = self.masks if self.masks is None or isinstance(self.masks, str) else "given"
        return super()._settings() | {"masks": kind, "mask_reg": self.mask_reg, "mask_init": self.mask_init}


class _DropoutProblem(PixelProblem):
    """Images with one flat tensor of all unknown masks, so that Adam, clipping and bookkeeping see one leaf."""

    def __init__(self, attack: DropoutInversion, victim: Victim, *args: Any, **pixels: Any) -> None:
        super().__init__(victim, *args, **pixels)
        self.attack = attack
        self.sites: list[Site] = []
        self.given: dict[str, Tensor | None] = {}
        if attack.masks is not None:
            found = dropout_sites(
                victim.model, torch.zeros(self.shape, device=victim.device, dtype=victim.dtype)
            )
            if isinstance(attack.masks, str):
                self.sites = found
            else:
                self.given = _fitting(attack.masks, found, victim)
        self.sizes = [math.prod(site.shape) for site in self.sites]
        self.injection = Injection(victim.model, self.given) if self.sites or self.given else None
        self.penalised = bool(self.sites and attack.mask_reg)
        self.terms += ["mask_share"] if self.penalised else []

    @property
    def unknowns(self) -> int:
        """Pixels, label scores and mask entries."""
        return super().unknowns + sum(self.sizes)

    def installed(self) -> AbstractContextManager[object]:
        """Dropout modules take the masks of the guess while this is open."""
        return nullcontext() if self.injection is None else self.injection.installed()

    def start(self, restart: int) -> dict[str, Tensor]:
        """First images, label scores and masks."""
        leaves = super().start(restart)
        if self.sites:
            rows = [self._first_mask(site, number, restart) for number, site in enumerate(self.sites)]
            leaves["masks"] = torch.cat([row.reshape(-1) for row in rows])
        return leaves

    def _first_mask(self, site: Site, number: int, restart: int) -> Tensor:
        victim = self.victim
        stream = generator("inversion.masks", self.seed, restart, number)
        mask = (
            torch.empty(site.shape, dtype=victim.dtype)
            .bernoulli_(1 - site.p, generator=stream)
            .to(victim.device)
        )
        weight = victim.gradients.get(f"{site.linear}.weight")
        if self.attack.mask_init == "bernoulli" or weight is None or weight.shape[1] != site.shape[-1]:
            return mask
        live = (weight != 0).any(0).to(mask)
        return (live if mask.numel() == len(live) else mask * live).expand(site.shape).clone()

    def _views(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = leaves["masks"].split(self.sizes)
        return {site.name: part.view(site.shape) for site, part in zip(self.sites, parts, strict=True)}

    def prepare(self, leaves: Mapping[str, Tensor]) -> None:
        """Give the guess's masks to the dropout modules of the pass that follows."""
        if self.injection is not None:
            self.injection.begin()
            self.injection.masks = self._views(leaves) if self.sites else self.given

    def penalties(self, leaves: Mapping[str, Tensor]) -> list[tuple[float, Tensor]]:
        """The penalty on the share of dropped units."""
        if not self.penalised:
            return []
        rates = [site.p for site in self.sites]
        return [(self.attack.mask_reg, mask_share(list(leaves["masks"].split(self.sizes)), rates))]

    @torch.no_grad()
    def project_(self, leaves: Mapping[str, Tensor]) -> None:
        """Clip images to the box and masks to [0, 1]."""
        super().project_(leaves)
        if "masks" in leaves:
            leaves["masks"].clamp_(0.0, 1.0)

    def masks(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The masks by call: those that were found, or those that were given."""
        rows = self._views(leaves) if self.sites else self.given
        return {name: mask.detach().clone() for name, mask in rows.items() if mask is not None}

    def fixed(self) -> list[Tensor]:
        """Given masks belong to what makes another attack."""
        return [*super().fixed(), *(mask for mask in self.given.values() if mask is not None)]


def _fitting(
    masks: Mapping[str, Tensor | None], sites: Sequence[Site], victim: Victim
) -> dict[str, Tensor | None]:
    shapes = {site.name: site.shape for site in sites}
    missing, unknown = sorted(set(shapes) - set(masks)), sorted(set(masks) - set(shapes))
    if missing or unknown:
        raise ValueError(
            f"masks must have one for every dropout call, got missing {missing} and unknown {unknown}. None stands "
            "for a call without dropout."
        )
    found: dict[str, Tensor | None] = {}
    for name, shape in shapes.items():
        mask = masks[name]
        if mask is not None and (not isinstance(mask, Tensor) or tuple(mask.shape) != shape):
            raise ValueError(
                f"masks[{name!r}] must have the shape {shape}, got {shown(mask)}. Masks have a batch axis."
            )
        found[name] = None if mask is None else mask.detach().to(victim.device, victim.dtype).clone()
    return found


def mask_share(masks: Sequence[Tensor], rates: Sequence[float]) -> Tensor:
    """Sum over masks of abs((1 - mean) - p): the share of dropped units must be p, whichever they are.

    Args:
        masks: relaxed masks.
        rates: p of each.

    Returns:
        A 0-dim tensor. It can be differentiated once.
    """
    value: Any = _MaskShare.apply(tuple(rates), *masks)
    return value


class _MaskShare(torch.autograd.Function):
    """One mean per mask forwards; one number per mask, spread without memory, backwards."""

    @staticmethod
    def forward(ctx: Any, rates: tuple[float, ...], *masks: Tensor) -> Tensor:
        off = (1 - torch.stack([mask.mean() for mask in masks])) - masks[0].new_tensor(rates)
        ctx.save_for_backward(off)
        ctx.shapes = [mask.shape for mask in masks]
        return off.abs().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output: Tensor) -> tuple[Tensor | None, ...]:
        (off,) = ctx.saved_tensors
        slopes = (-output * off.sign()).unbind()
        rows = (slope / shape.numel() for slope, shape in zip(slopes, ctx.shapes, strict=True))
        return (None, *(row.expand(shape) for row, shape in zip(rows, ctx.shapes, strict=True)))


def mask_accuracy(
    masks: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    *,
    order: Sequence[int] | Tensor | None = None,
    threshold: float = 0.5,
) -> float:
    """Share of units whose mask is right, over all calls together.

    Args:
        masks: found masks by call, real numbers; kept means at least ``threshold``.
        truth: recorded masks by call.
        order: for every true sample the row that was reconstructed for it, as `pullback.core.image_quality.match`
            gives it; None: as they are.
        threshold: where a relaxed mask counts as kept.

    Returns:
        A number in [0, 1]. Guessing the more frequent value everywhere gives max(p, 1 - p).

    Raises:
        ValueError: if the calls or a shape differ.
    """
    fraction("threshold", threshold)
    if set(masks) != set(truth) or not truth:
        raise ValueError(
            f"masks must have the calls of truth, got {sorted(masks)} and {sorted(truth)}. See record_masks."
        )
    right, units = 0, 0
    for name, true in truth.items():
        found = masks[name] if order is None else masks[name][torch.as_tensor(order)]
        if found.shape != true.shape:
            raise ValueError(
                f"masks[{name!r}] must have the shape {tuple(true.shape)}, got {tuple(found.shape)}."
            )
        right += int(((found >= threshold) == (true.to(found.device) >= threshold)).sum())
        units += true.numel()
    return right / units
