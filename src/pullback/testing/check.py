"""Checks, their outcomes, and the report of a component's contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pullback.testing.case import KINDS, Case

Status: TypeAlias = Literal["passed", "refused", "not applicable", "skipped", "failed"]


class BrokenContract(Exception):
    """A check's finding: the component did something else than its contract says."""

    def __init__(self, what: str, *, fix: str = "") -> None:
        super().__init__(f"{what} {fix}".strip())


class NotApplicable(Exception):
    """A check's finding: there is nothing to check here, and why."""


@dataclass(frozen=True)
class Check:
    """One part of a contract.

    Args:
        id: short name, used in ``refuses``, ``skip`` and reports.
        kinds: kinds of component that it holds for.
        run: raises `BrokenContract` (or lets the component's own error through) when the contract is broken.
        says: the rule, in one line.
        refusable: ``"raises"``: a component that refuses this part must raise, and the check sees to it;
            ``"declared"``: the declaration with its reason is all there can be; ``"no"``: cannot be refused.
        slow: takes seconds or starts processes; runs only when asked for.
    """

    id: str
    kinds: tuple[str, ...]
    run: Callable[[Case], None]
    says: str
    refusable: Literal["raises", "declared", "no"]
    slow: bool = False


@dataclass(frozen=True)
class Outcome:
    """How one check ended for one component, and why."""

    check: str
    status: Status
    message: str = ""


@dataclass(frozen=True)
class ContractReport:
    """The outcome of every check of a component's kind; printing it gives a table."""

    name: str
    kind: str
    outcomes: tuple[Outcome, ...]

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """The broken parts of the contract."""
        return tuple(outcome for outcome in self.outcomes if outcome.status == "failed")

    def status(self, check: str) -> Status:
        """Status of one check.

        Raises:
            KeyError: if this kind has no such check.
        """
        for outcome in self.outcomes:
            if outcome.check == check:
                return outcome.status
        raise KeyError(f"check must be one of kind {self.kind!r}, got {check!r}.")

    def count(self, status: Status) -> int:
        """Number of checks that ended with ``status``."""
        return sum(outcome.status == status for outcome in self.outcomes)

    def __str__(self) -> str:
        counts = ", ".join(
            f"{self.count(status)} {status}"
            for status in ("passed", "refused", "not applicable", "skipped", "failed")
            if self.count(status)
        )
        lines = [f"{self.name} ({self.kind}): {counts}"]
        lines += [
            f"  {outcome.status:<14} {outcome.check:<24} {outcome.message}".rstrip()
            for outcome in self.outcomes
        ]
        return "\n".join(lines)


class ContractError(AssertionError):
    """A component breaks its contract; ``report`` holds the outcome of every check."""

    def __init__(self, report: ContractReport) -> None:
        self.report = report
        lines = [f"{report.name} breaks {len(report.failed)} of {len(report.outcomes)} checks:"]
        lines += [f"- {outcome.check}: {outcome.message}" for outcome in report.failed]
        super().__init__("\n".join(lines))


_CHECKS: dict[str, Check] = {}


def check(
    *kinds: str,
    refusable: Literal["raises", "declared", "no"] = "declared",
    slow: bool = False,
) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Register a function as a check; its name is the id, its docstring's first line the rule.

    Args:
        *kinds: kinds of component it holds for; none: all.
        refusable: see `Check`.
        slow: whether it runs only when asked for.

    Returns:
        A decorator that leaves the function as it is.
    """

    def register(function: Callable[[Case], None]) -> Callable[[Case], None]:
        name = getattr(function, "__name__", repr(function))
        says = (function.__doc__ or "").strip().partition("\n")[0]
        _CHECKS[name] = Check(name, kinds or KINDS, function, says, refusable, slow)
        return function

    return register


def registered() -> tuple[Check, ...]:
    """All checks, in the order of their modules."""
    return tuple(_CHECKS.values())
