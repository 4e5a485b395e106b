"""The contract of every kind of component, as checks that anyone can run on a component of their own."""

from pullback.testing.case import KINDS, Case, Kind
from pullback.testing.check import Check, ContractError, ContractReport, Outcome
from pullback.testing.contract import check_component, checks_for, parametrize_with_checks, run_check

__all__ = [
    "KINDS",
    "Case",
    "Check",
    "ContractError",
    "ContractReport",
    "Kind",
    "Outcome",
    "check_component",
    "checks_for",
    "parametrize_with_checks",
    "run_check",
]
