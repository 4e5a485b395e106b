"""Searches: attacks, samplers and solvers that iterate to a result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

_V = TypeVar("_V")

SearchStatus: TypeAlias = Literal["converged", "max_steps", "diverged"]
"""How a search ended; only ``"diverged"`` means that its value is not to be used."""


@dataclass(frozen=True)
class SearchResult(Generic[_V]):
    """How a search ended: failure is a value here, not an exception.

    Args:
        value: the best that was found.
        status: how the search ended.
        steps: how many iterations it took.
        message: for a reader: what happened, and what to try when it diverged.
    """

    value: _V
    status: SearchStatus
    steps: int
    message: str = ""


class Search(ABC):
    """Base of seeded iterations that report a status instead of raising when they do not converge."""

    kind: ClassVar[str] = "search"
    refuses: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def run(self, *args: Any, **kwargs: Any) -> SearchResult[Any]:
        """Search and return value, status and number of steps."""
