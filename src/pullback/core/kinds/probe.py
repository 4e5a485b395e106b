"""Probes: read-only measurements of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar


class Probe(ABC):
    """Base of measurements that leave no trace.

    Calling a probe returns a frozen dataclass. Parameters, buffers, gradients, hooks, train and eval modes
    and random states are afterwards what they were, also when the model raised.
    """

    kind: ClassVar[str] = "probe"
    refuses: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Measure and return a frozen dataclass."""
