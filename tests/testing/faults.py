"""What a planted fault is: a component that breaks one check, and what else it cannot help breaking."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pullback.testing import Case


@dataclass(frozen=True)
class Fault:
    """``case`` breaks ``check`` and, of its kind's other checks, exactly those in ``also``."""

    check: str
    case: Case
    also: frozenset[str] = frozenset()


def fault(check: str, good: Case, build: Callable[..., Any] | None = None, also: str = "", **changed: Any):
    """The good case with another component or other promises."""
    fields = {**changed, **({} if build is None else {"build": build})}
    return Fault(check, replace(good, name=f"{check}@{good.kind}", **fields), frozenset(also.split()))
