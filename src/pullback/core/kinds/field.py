"""Fields: learned or exact maps that are followed in space or time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor


class Field(ABC):
    """Base of scores, velocities, proximal maps and search directions.

    A learned member derives from ``Field`` and ``nn.Module``.
    """

    kind: ClassVar[str] = "field"
    refuses: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The field's value at the given points (and times)."""
