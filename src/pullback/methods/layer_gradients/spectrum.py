"""From gradients, or their factors, to statistics of singular values: all matrices of a model at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from pullback.core.checks import choice, instance, integer, shown
from pullback.core.gradient_factors import FactorCapture
from pullback.core.matrices import Source
from pullback.core.spectra import Route, product_cosine, product_values, singular_values

Reduction: TypeAlias = Literal["per_sample", "batch"]
Values: TypeAlias = Mapping[str, Mapping[str, tuple[float, ...]]]
Layout: TypeAlias = Mapping[str, Sequence[tuple[int, int]]]
"""By projection: (layer, position among all matrices), in the order of the layers."""

# --- one matrix -----------------------------------------------------------------------------------------------------


def _ratio(values: Tensor) -> Tensor:
    total = values.sum(-1)
    return torch.where(total == 0, 0.0, values[..., 0] / torch.where(total == 0, 1.0, total))


def _effective_rank(values: Tensor) -> Tensor:
    total = values.sum(-1, keepdim=True)
    shares = values / torch.where(total == 0, 1.0, total)
    return torch.where(total[..., 0] == 0, 0.0, torch.special.entr(shares).sum(-1).exp())


_OF_VALUES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "nuclear": lambda s: s.sum(-1),
    "sigma1_ratio": _ratio,
    "effective_rank": _effective_rank,
    "frobenius": lambda s: s.square().sum(-1).sqrt(),
    "sigma_max": lambda s: s[..., 0],
    "sigma_min": lambda s: s[..., -1],
}
SPECTRAL = tuple(_OF_VALUES)
"""Statistics that depend on the singular values alone."""
STATISTICS = (*SPECTRAL, "nuclear_per_loss", "similarity")
"""All statistics: of single matrices, and the cosine between those of neighbouring layers."""


def spectrum_statistics(values: Tensor, *, full: int | None = None) -> dict[str, Tensor]:
    """Statistics of singular values s_1 >= s_2 >= ... >= 0.

    With p_k = s_k / sum s: ``nuclear`` = sum s, ``sigma1_ratio`` = p_1, ``effective_rank`` = exp(-sum p ln p) (Roy and
    Vetterli), ``frobenius`` = sqrt(sum s^2), ``sigma_max`` = s_1, ``sigma_min`` = s_min(m, n). All are 0 for a zero
    matrix, and NaN for one that is not finite. The smallest value of a rank-deficient matrix is rounding error where
    the decomposition was dense, and exactly 0 where values are missing: do not draw it on a logarithmic axis.

    Args:
        values: singular values [..., r], descending; further ones, up to ``full``, are zero.
        full: min(m, n) of the matrix; None: r.

    Returns:
        Tensors [...] in float64 (float32 on devices without it), by the names of `SPECTRAL`.
    """
    wide = torch.float32 if values.device.type == "mps" else torch.float64
    values = values.to(wide)
    found = {name: make(values) for name, make in _OF_VALUES.items()}
    if full is not None and values.shape[-1] < full:
        found["sigma_min"] = torch.where(found["nuclear"].isnan(), torch.nan, 0.0).to(wide)
    return found


# --- one example ----------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Record:
    """Statistics of one example, or of one batch.

    Args:
        tag: the group that it belongs to.
        key: the example's own name, ``""`` for none.
        reduction: ``"per_sample"``, or ``"batch"`` for the gradient of a sum over examples.
        loss: the loss that was handed over, NaN for none.
        values: ``values[statistic][projection]`` holds one number per layer (``"similarity"``: per pair of neighbours).
        nonfinite: matrices whose gradient holds NaN or Inf.
    """

    tag: str
    key: str
    reduction: Reduction
    loss: float
    values: Values
    nonfinite: int

    def to_dict(self) -> dict[str, object]:
        """Plain containers for JSON; NaN becomes None."""
        values = {
            name: {proj: [_plain(each) for each in row] for proj, row in rows.items()}
            for name, rows in self.values.items()
        }
        return {**vars(self), "loss": _plain(self.loss), "values": values}

    @classmethod
    def from_dict(cls, given: Mapping[str, object]) -> Record:
        """The inverse of `to_dict`.

        Raises:
            ValueError: if it is no such dict.
        """
        try:
            values = {
                str(name): {str(proj): tuple(_number(each) for each in row) for proj, row in rows.items()}
                for name, rows in given["values"].items()  # ty: ignore[missing-attribute]
            }
            return cls(
                tag=str(given["tag"]), key=str(given["key"]), loss=_number(given["loss"]), values=values,
                reduction=choice("reduction", given["reduction"], ("per_sample", "batch")),
                nonfinite=integer("nonfinite", given["nonfinite"], minimum=0),
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a record must come from Record.to_dict, got {shown(given)}.") from error


def _plain(value: float) -> float | str | None:
    if math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


def _number(value: object) -> float:
    return math.nan if value is None else float(value)  # ty: ignore[invalid-argument-type]


# --- all matrices of a model -----------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Signal:
    """The gradient of one matrix, sample by sample.

    Args:
        inputs: [S, T, n], or None where the gradient itself is known.
        errors: [S, T, m]; the gradient is ``errors^T inputs``. Without inputs: the gradient [S, m, n].
    """

    inputs: Tensor | None
    errors: Tensor

    @property
    def full(self) -> int:
        """min(m, n), the number of singular values."""
        widths = (
            self.errors.shape[1:] if self.inputs is None else (self.errors.shape[2], self.inputs.shape[2])
        )
        return min(widths)


def captured(capture: FactorCapture, samples: int) -> list[Signal]:
    """The gradients of all matrices, in the order of the capture's sources."""
    signals: list[Signal] = []
    for source in capture.sources:
        if capture.is_hooked(source):
            inputs, errors = capture.factors(source, samples)
            signals += [Signal(inputs, part.of(errors, 2)) for part in source.parts]
        else:
            gradient = capture.gradient(source)
            signals += [Signal(None, part.of(gradient, 0)[None]) for part in source.parts]
    return signals


def read(sources: Sequence[Source], step: int) -> list[Signal]:
    """The gradients that lie in ``.grad`` now; NaN where there is none, for it is unknown and not zero.

    Raises:
        RuntimeError: if no weight has one.
        TypeError: if one is sharded.
    """
    signals: list[Signal] = []
    arrived = False
    for source in sources:
        weight = source.weight
        grad = weight.grad if weight.is_leaf else None
        arrived |= grad is not None
        if type(grad).__name__ == "DTensor":
            raise TypeError(
                f"gradients must be whole, got a DTensor for {source.name!r}. Watch before fully_shard."
            )
        grad = torch.full_like(weight, torch.nan) if grad is None else grad
        signals += [Signal(None, part.of(grad, int(source.transposed))[None]) for part in source.parts]
    if not arrived:
        raise RuntimeError(
            f"a watched weight must have a gradient when the optimizer steps, got none in step {step}. Call "
            "loss.backward() between zero_grad() and step()."
        )
    return signals


def layout_of(sources: Sequence[Source]) -> dict[str, list[tuple[int, int]]]:
    """(layer, position among all matrices) in the order of the layers, by projection."""
    layout: dict[str, list[tuple[int, int]]] = {}
    parts = [part for source in sources for part in source.parts]
    for index, part in enumerate(parts):
        layout.setdefault(part.proj, []).append((part.layer, index))
    return {proj: sorted(rows) for proj, rows in layout.items()}


def _spectra(signals: Sequence[Signal], route: Route) -> list[Tensor]:
    products = [index for index, each in enumerate(signals) if each.inputs is not None]
    others = [index for index, each in enumerate(signals) if each.inputs is None]
    pairs = [(each.inputs, each.errors) for each in signals if each.inputs is not None]
    found = dict(zip(products, product_values(pairs, route=route), strict=True))
    found |= dict(zip(others, singular_values([signals[index].errors for index in others]), strict=True))
    return [found[index] for index in range(len(signals))]


def _neighbours(signals: Sequence[Signal], layout: Layout, norms: Tensor) -> Tensor:
    """Cosine of each matrix with that of the next layer [matrices, samples]; NaN for the last and unequal shapes."""
    found = torch.full_like(norms, torch.nan)
    for rows in layout.values():
        for (_, one), (_, other) in itertools.pairwise(rows):
            first, second = signals[one], signals[other]
            cosine = product_cosine(
                (first.inputs, first.errors), (second.inputs, second.errors), norms[one], norms[other]
            )
            if cosine is not None:
                found[one] = cosine.to(found)
    return found


def statistics(
    signals: Sequence[Signal],
    layout: Layout,
    names: Sequence[str],
    *,
    route: Route,
    losses: Sequence[float],
    scale: Any,
) -> dict[str, Tensor]:
    """Statistics of all matrices, and always the nuclear norm.

    Args:
        signals: one per matrix.
        layout: from `layout_of`.
        names: of the statistics wanted.
        route: see `product_values`.
        losses: of the samples, for ``"nuclear_per_loss"``.
        scale: what the gradients are multiplied by; a number or a 0-dim tensor.

    Returns:
        Tensors [matrices, samples] by name; no host read but the one of `product_values`.
    """
    spectra = _spectra(signals, route)
    longest = max(each.shape[1] for each in spectra)
    device = spectra[0].device
    stacked = torch.stack([nn.functional.pad(s, (0, longest - s.shape[1])).to(device) for s in spectra])
    found = spectrum_statistics(stacked)
    if "sigma_min" in names:
        last = [
            s[:, -1] if s.shape[1] == each.full else s[:, 0] * 0.0
            for s, each in zip(spectra, signals, strict=True)
        ]
        found["sigma_min"] = torch.stack([each.to(device) for each in last]).to(found["nuclear"].dtype)
    if "similarity" in names:
        found["similarity"] = _neighbours(signals, layout, found["frobenius"])
    for name in ("nuclear", "frobenius", "sigma_max", "sigma_min"):
        found[name] = found[name] / scale
    if "nuclear_per_loss" in names:
        found["nuclear_per_loss"] = found["nuclear"] / found["nuclear"].new_tensor(losses)
    return {name: found[name] for name in dict.fromkeys(("nuclear", *names))}


def records_of(
    found: Mapping[str, Tensor], layout: Layout, names: Sequence[str], *, tags: Sequence[str], keys: Sequence[str],
    losses: Sequence[float], reduction: Reduction,
) -> list[Record]:  # fmt: skip
    """One record per sample, by one read of the host."""
    order = list(found)
    per_sample = torch.stack([found[name] for name in order]).permute(2, 0, 1).tolist()
    records = []
    for tag, key, loss, rows in zip(tags, keys, losses, per_sample, strict=True):
        table = dict(zip(order, rows, strict=True))
        bad = sum(math.isnan(each) for each in table["nuclear"])
        values = {
            name: {
                proj: tuple(
                    table[name][index] for _, index in (cells[:-1] if name == "similarity" else cells)
                )
                for proj, cells in layout.items()
            }
            for name in names
        }
        records.append(Record(tag, key, reduction, loss, values, bad))
    return records


def losses_of(loss: Any, samples: int, reduction: Reduction, *, required: bool) -> list[float]:
    """One loss per record as plain numbers, NaN where none was handed over.

    Raises:
        RuntimeError: if one is required and missing, or their number is not that of the samples.
    """
    if loss is None:
        if required:
            raise RuntimeError(
                "the loss must be known for 'nuclear_per_loss', got none. Call "
                "sample.backward(loss), or set sample.loss."
            )
        return [math.nan] * samples
    given = torch.as_tensor(loss).detach().to("cpu", torch.float64).reshape(-1)
    if reduction == "batch":
        return [float(given.sum())]
    if len(given) != samples:
        raise RuntimeError(
            f"loss must hold one number per example, got {len(given)} for {samples}. Hand over the losses before they "
            "are averaged, such as those of response_loss."
        )
    return given.tolist()


def one_each(name: str, given: str | Sequence[str], samples: int) -> list[str]:
    """One string per sample.

    Raises:
        TypeError: if one is no string.
        ValueError: if there are too few or too many.
    """
    rows = [given] * samples if isinstance(given, str) else [instance(name, each, str) for each in given]
    if len(rows) != samples:
        raise ValueError(
            f"{name} must be one string or one per example, got {len(rows)} for {samples} examples."
        )
    return rows
