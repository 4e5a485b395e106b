"""Aggregators: one update direction out of several gradients (needs the extra ``torchjd``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

try:
    from torchjd.aggregation import Aggregator as _TorchJDAggregator
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
