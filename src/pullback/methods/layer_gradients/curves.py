"""Curves of a statistic over the layers, averaged over examples, and how two curves differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from pullback.core.checks import choice, instance, integer, shown
from pullback.methods.layer_gradients.spectrum import Record, Reduction

_ZERO = 1e-10  # stands for a reference of exactly zero in a relative difference
_LARGEST = 5
OFFICIAL_BOUNDS: Mapping[int, tuple[int, int]] = {26: (7, 20), 28: (7, 21), 32: (10, 20), 42: (12, 30)}
"""Ends of the early and middle layers in the authors' script, by number of layers."""


# --- curves ------ --------------------------------------------------------------------------------------------------


@final
class Curves(Mapping[str, Tensor]):
    """Mean over examples of one statistic against depth: ``curves["v"]`` is a float64 tensor [layers].

    Attributes:
        statistic: its name.
        tag: the examples' tag, None for all.
        reduction: whether single examples or batches were averaged.
        layers: numbers of the layers [layers], by projection; of neighbours (``"similarity"``) the first one's.
        sem: standard error of the mean [layers], by projection; NaN for a single example.
        count: examples in the mean, by projection.
        dropped: examples left out because one of their layers is NaN, by projection.
    """

    def __init__(
        self, statistic: str, tag: str | None, reduction: Reduction, rows: Mapping[str, Tensor],
        layers: Mapping[str, tuple[int, ...]],
    ) -> None:  # fmt: skip
        self.statistic, self.tag, self.reduction = statistic, tag, reduction
        self.layers = dict(layers)
        self.sem: dict[str, Tensor] = {}
        self.count: dict[str, int] = {}
        self.dropped: dict[str, int] = {}
        self._mean: dict[str, Tensor] = {}
        for proj, each in rows.items():
            kept = each[~each.isnan().any(1)]
            self.count[proj], self.dropped[proj] = len(kept), len(each) - len(kept)
            self._mean[proj] = kept.mean(0) if len(kept) else each.new_full(each.shape[1:], torch.nan)
            spread = kept.std(0) / math.sqrt(len(kept)) if len(kept) > 1 else None
            self.sem[proj] = torch.full_like(self._mean[proj], torch.nan) if spread is None else spread

    def __getitem__(self, proj: str) -> Tensor:
        return self._mean[proj]

    def __iter__(self) -> Iterator[str]:
        return iter(self._mean)

    def __len__(self) -> int:
        return len(self._mean)

    def __repr__(self) -> str:
        what = ", ".join(f"{proj}: {n} examples" for proj, n in self.count.items())
        return f"Curves({self.statistic!r}, tag={self.tag!r}, reduction={self.reduction!r}, {what})"


def layer_curve(
    records: Iterable[Record], statistic: str = "nuclear", *, tag: str | None = None,
    layers: Mapping[str, Sequence[int]] | None = None,
) -> Curves:  # fmt: skip
    """Average one statistic over examples, layer by layer.

    An example in which some layer of a projection is NaN is left out of that projection's mean, and counted.

    Args:
        records: from `GradientSpectrum.records` or `GradientSpectrum.gather`.
        statistic: one that the records hold.
        tag: only the examples with this tag.
        layers: numbers of the layers by projection; None: 0, 1, 2, ...

    Returns:
        The curves by projection.

    Raises:
        TypeError: if something else than records is given.
        ValueError: if there is none, they lack the statistic, or single examples and batches are mixed.
    """
    everything = list(records)
    for each in everything:
        instance("records", each, Record)
    chosen = [each for each in everything if tag is None or each.tag == tag]
    if not chosen:
        tags = ", ".join(sorted({repr(each.tag) for each in everything})) or "none at all"
        raise ValueError(f"tag must be that of some records, got {tag!r}. There are {tags}.")
    if len({each.reduction for each in chosen}) > 1:
        raise ValueError(
            "records must be all of single examples or all of batches, got both: the gradient of a batch is no mean of "
            "spectra. Choose by tag."
        )
    for each in chosen:
        choice("statistic", statistic, tuple(each.values))
    rows: dict[str, Tensor] = {}
    for proj, first in chosen[0].values[statistic].items():
        lines = [each.values[statistic].get(proj) for each in chosen]
        if any(line is None or len(line) != len(first) for line in lines):
            raise ValueError(
                f"records must be of one model, got different layers of {proj!r}. Keep one probe per model."
            )
        rows[proj] = torch.tensor(lines, dtype=torch.float64)
    numbers = {
        proj: tuple((layers or {}).get(proj, range(each.shape[1])))[: each.shape[1]]
        for proj, each in rows.items()
    }
    return Curves(statistic, tag, chosen[0].reduction, rows, numbers)


@final
@dataclass(frozen=True)
class MeanAbsoluteDifference:
    """Unevenness of a curve c over N layers: mean of ``|c[i+1] - c[i]|``.

    Args:
        whole: over all layers, in the unit of the curve.
        early: within the first third; NaN where a part has fewer than two layers.
        middle: within the second third.
        late: within the last third.
        over_mean: ``whole`` over the mean of the curve's absolute values: unevenness whatever the size; 0 for a curve
            of zeros.
    """

    whole: float
    early: float
    middle: float
    late: float
    over_mean: float

    def __float__(self) -> float:
        return self.whole


def mean_absolute_difference(
    curve: Tensor | Sequence[float], *, bounds: tuple[int, int] | Literal["thirds", "official"] = "thirds"
) -> MeanAbsoluteDifference:
    """How unevenly layers are pulled: MAD(c) = 1/(N-1) sum ``|c[i+1] - c[i]|`` of an *averaged* curve.

    It is not the mean of the examples' own MADs, which noise would enlarge.

    Args:
        curve: one number per layer, at least two.
        bounds: where the middle and the late layers begin; ``"official"`` are the authors' for 26, 28, 32, 42 layers.

    Raises:
        TypeError: if the curve holds no numbers.
        ValueError: if it has fewer than two layers, or the bounds do not fit.

    Example:
        >>> mean_absolute_difference([0.0, 1.0, 0.0, 1.0]).whole
        1.0
    """
    c = _curve("curve", curve)
    n = len(c)
    if n < 2:
        raise ValueError(f"curve must have at least 2 layers, got {n}. There is no difference to take.")
    low, high = _bounds(bounds, n)
    whole = _steps(c)
    size = float(c.abs().mean())
    return MeanAbsoluteDifference(
        whole, _steps(c[:low]), _steps(c[low:high]), _steps(c[high:]), whole / size if size else whole
    )


def _steps(c: Tensor) -> float:
    return float(c.diff().abs().mean()) if len(c) > 1 else math.nan


def _bounds(bounds: object, n: int) -> tuple[int, int]:
    if isinstance(bounds, str):
        choice("bounds", bounds, ("thirds", "official"))
        if bounds == "thirds":
            return round(n / 3), round(2 * n / 3)
        if n not in OFFICIAL_BOUNDS:
            known = ", ".join(map(str, OFFICIAL_BOUNDS))
            raise ValueError(
                f"bounds='official' must meet a model of {known} layers, got {n}. Use 'thirds', or give two numbers."
            )
        return OFFICIAL_BOUNDS[n]
    if not isinstance(bounds, tuple) or len(bounds) != 2:
        raise TypeError(f"bounds must be 'thirds', 'official' or two numbers, got {shown(bounds)}.")
    low, high = (integer("bounds", each, minimum=0) for each in bounds)
    if not low <= high <= n:
        raise ValueError(f"bounds must satisfy 0 <= low <= high <= {n}, got {bounds}.")
    return low, high


@final
@dataclass(frozen=True)
class RelativeDifference:
    """How far a curve is from a reference, relative to the reference.

    Args:
        mean: mean over the layers.
        per_layer: of every layer, float64 [layers].
        largest: up to five pairs (position in the curve, difference), the largest first.
    """

    mean: float
    per_layer: Tensor
    largest: tuple[tuple[int, float], ...]

    def __float__(self) -> float:
        return self.mean


def relative_difference(
    reference: Tensor | Sequence[float], other: Tensor | Sequence[float]
) -> RelativeDifference:
    """``|a[i] - b[i]| / |a[i]|`` for a reference a and another curve b; not symmetric.

    A reference of exactly 0 counts as 1e-10, as in the authors' script.

    Args:
        reference: one number per layer, for example of correct answers.
        other: as many, for example of irrelevant answers.

    Raises:
        TypeError: if a curve holds no numbers.
        ValueError: if they are empty or differ in length.

    Example:
        >>> relative_difference([1.0, 2.0], [2.0, 4.0]).mean
        1.0
    """
    a, b = _curve("reference", reference), _curve("other", other)
    if not len(a) or len(a) != len(b):
        raise ValueError(f"other must have the layers of reference, got {len(b)} against {len(a)}.")
    per_layer = (a - b).abs() / torch.where(a == 0, _ZERO, a.abs())
    order = (
        per_layer.nan_to_num(-1.0, posinf=math.inf).argsort(descending=True, stable=True)[:_LARGEST].tolist()
    )
    return RelativeDifference(
        float(per_layer.mean()), per_layer, tuple((i, float(per_layer[i])) for i in order)
    )


def _curve(name: str, given: object) -> Tensor:
    try:
        curve = torch.as_tensor(given).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must hold one number per layer, got {shown(given)}.") from error
    if curve.dim() != 1:
        raise ValueError(
            f"{name} must have one dimension, got the shape {tuple(curve.shape)}. Pass curves['q']."
        )
    return curve
