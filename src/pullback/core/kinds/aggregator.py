"""Aggregators: one update direction out of several gradients (needs the extra ``torchjd``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

try:
    from torchjd.aggregation import Aggregator as _TorchJDAggregator
    from torchjd.aggregation import GramianWeightedAggregator as _GramianWeighted
    from torchjd.aggregation import Weighting
except ImportError as error:
    raise ImportError(
        'Aggregators need torchjd. Install it with: pip install "pullback[torchjd]".', name="torchjd"
    ) from error


class Aggregator(_TorchJDAggregator):
    """Base of aggregators: a Jacobian ``[tasks, parameters]`` in, a vector ``[parameters]`` out.

    Being a TorchJD aggregator, a member is driven by ``torchjd.autojac`` and compares with every aggregator
    there.
    """

    kind: ClassVar[str] = "aggregator"
    refuses: ClassVar[Mapping[str, str]] = {}


class GramianAggregator(Aggregator, _GramianWeighted):
    """Base of aggregators whose direction is a combination of rows with weights that the Gramian decides.

    TorchJD then also aggregates without building the Jacobian (``optimize_gramian_computation``, autogram). A member
    hands a `Weighting` of the Gramian to ``super().__init__``.
    """


__all__ = ["Aggregator", "GramianAggregator", "Weighting"]
