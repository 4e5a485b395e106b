"""Recomputation: calls that trade stored activations for a second computation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar


class Recompute(ABC):
    """Base of wrappers around a module or a function that store less and compute again when going back.

    Outputs, gradients, random numbers and buffers are bitwise those of the wrapped call. A member that is a
    module as well derives from ``Recompute`` and ``nn.Module``.
    """

    kind: ClassVar[str] = "recompute"
    refuses: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped computation."""
