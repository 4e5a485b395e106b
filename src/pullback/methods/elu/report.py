"""What the bias-shift probe reports: one row per layer, medians over units, as plain numbers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from pullback.core.checks import instance

_COLUMNS = (
    ("mean ratio", "mean_ratio"),
    ("|mean|", "median_abs_mean"),
    ("shift", "shift_fraction"),
    ("natural", "shift_fraction_natural"),
    ("cos", "cos_natural"),
    ("k", "k"),
    ("dead", "dead_fraction"),
)


@dataclass(frozen=True)
class LayerShift:
    """One layer. "Incoming" are the activations that its units see; medians are over solved units, but where it is said.

    Args:
        mean_activation: mean of all incoming activations.
        median_activation: median over incoming activations of their mean over the rows (appendix C of the paper).
        median_abs_mean: median over them of the absolute value of that mean.
        mean_ratio: ``||E a|| / sqrt(E ||a||^2)``, in [0, 1]; 0 for centred activations.
        shift_fraction: (E dz)^2 / E dz^2 of the plain gradient step, in [0, 1], over all units that get a gradient: the
            part of the change of a pre-activation that is the same for all inputs.
        shift_fraction_natural: the same of the unit natural gradient.
        cos_natural: cosine between the gradient and the unit natural gradient over (w, w0).
        k: multiplier of theorem 2: the natural gradient subtracts k E_q[a] from the mean of the incoming activations; 1
            where delta^2 is independent of a. NaN for a layer without bias.
        s: 1 / (c - b^T A^-1 b) of theorem 1, in the unit of z squared. NaN for a layer without bias.
        dead_fraction: share of units with E[delta^2] < 1e-12; they are in no median but this.
        units: number of units.
        solved: number of live units for which a linear system was solved; medians of natural quantities are over them.
        rows: number of rows (examples, times positions of a convolution) that were used.
        iterations: of conjugate gradients; 0 for a direct solve.
        residual: largest relative residual of conjugate gradients, 0 for a direct solve.
        per_unit: tensors by name, where asked for: ``unit`` [solved] (their numbers), ``shift_fraction`` [units],
            ``c`` [units], and ``shift_fraction_natural``, ``cos_natural``, ``k``, ``s`` [solved].
    """

    mean_activation: float
    median_activation: float
    median_abs_mean: float
    mean_ratio: float
    shift_fraction: float
    shift_fraction_natural: float
    cos_natural: float
    k: float
    s: float
    dead_fraction: float
    units: int
    solved: int
    rows: int
    iterations: int = 0
    residual: float = 0.0
    per_unit: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class BiasShiftReport:
    """One measurement of `BiasShiftProbe`.

    Args:
        fisher: ``"model"`` or ``"empirical"``.
        damping: that was used.
        loss: mean loss on the batch.
        layers: results by layer name, in the order of the model; ``report["fc3"]`` is ``report.layers["fc3"]``.
    """

    fisher: str
    damping: float
    loss: float
    layers: Mapping[str, LayerShift]

    def __getitem__(self, layer: str) -> LayerShift:
        """The result of one layer.

        Raises:
            KeyError: if there is no such layer; the message lists those there are.
        """
        if layer not in self.layers:
            raise KeyError(
                f"there is no layer {layer!r} in this report. Its layers are {', '.join(self.layers)}."
            )
        return self.layers[layer]

    def table(self) -> str:
        """A table of plain text, one line per layer, medians over units."""
        head = ("layer", *(title for title, _ in _COLUMNS), "solved")
        lines = [
            (name, *(f"{getattr(each, key):.3g}" for _, key in _COLUMNS), f"{each.solved}/{each.units}")
            for name, each in self.layers.items()
        ]
        widths = [max(len(line[column]) for line in (head, *lines)) for column in range(len(head))]
        return "\n".join(
            "  ".join(
                text.rjust(width) if column else text.ljust(width)
                for column, (text, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in (head, *lines)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings by layer, ready for JSON; tensors of ``per_unit`` become lists."""
        return {
            "fisher": self.fisher,
            "damping": self.damping,
            "loss": self.loss,
            "layers": {name: _plain(each) for name, each in self.layers.items()},
        }


def _plain(layer: LayerShift) -> dict[str, Any]:
    units = layer.per_unit
    row = {key: value for key, value in asdict(layer).items() if key != "per_unit"}
    if units is not None:
        row["per_unit"] = {name: tensor.tolist() for name, tensor in units.items()}
    return row


def median_variance(reports: Iterable[BiasShiftReport]) -> dict[str, float]:
    """Variance over training of the median incoming activation, by layer (appendix C of the paper).

    Args:
        reports: measurements of one model at several steps, at least two.

    Returns:
        Population variances by the name of every layer that all reports hold.

    Raises:
        ValueError: if there are fewer than two reports.
    """
    seen = [instance("reports", each, BiasShiftReport) for each in reports]
    if len(seen) < 2:
        raise ValueError(
            f"reports must hold at least 2 measurements, got {len(seen)}. Measure at several steps."
        )
    return {
        name: statistics.pvariance([each.layers[name].median_activation for each in seen])
        for name in seen[0].layers
        if all(name in each.layers for each in seen)
    }
