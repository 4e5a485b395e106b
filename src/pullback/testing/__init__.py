"""The contract of every kind of component, as checks that anyone can run on a component of their own.

Hand over an instance, a class or a factory; the report tells how every check ended. A `Case` adds what the
checks cannot guess, such as the neutral setting or the shape of the inputs.

Example:
    >>> import torch
    >>> from pullback.core.kinds import Transform
    >>> class Halve(Transform):
    ...     '''Halves every gradient.'''
    ...
    ...     def pre_step_(self, batch):
    ...         torch._foreach_mul_(batch.grads, 0.5)
    >>> report = check_component(Halve())
    >>> report.count("failed")
    0
    >>> report.status("scaler_fused")
    'passed'
    >>> report.status("neutral_transform")
    'not applicable'
    >>> check_component(Halve(), neutral=lambda: Halve())  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    pullback.testing.check.ContractError: Halve breaks 1 of ... checks:
    - neutral_transform: The neutral setting changes 10 steps of SGD (largest difference ...).

In a test suite, every check becomes a test of its own::

    @parametrize_with_checks([Case(name="Halve", kind="transform", build=Halve)])
    def test_contract(case, check):
        check(case)

What a component cannot do, it says in ``refuses`` (check id -> reason): the check then sees to it that it
really refuses with a clear message, and the report lists the reason.
"""

from pullback.testing.case import KINDS, Case, Kind
from pullback.testing.check import Check, ContractError, ContractReport, Outcome
from pullback.testing.contract import check_component, checks_for, parametrize_with_checks, run_check
from pullback.testing.ranks import run_ranks

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
    "run_ranks",
]
