"""Every check finds the fault that is planted for it, and a fault breaks nothing but what it must."""

import faulty_aggregators
import faulty_generic
import faulty_modules
import faulty_optimizers
import faulty_runs
import faulty_transforms
import pytest

from pullback.testing import KINDS, checks_for, run_check

FAULTS = (
    *faulty_generic.FAULTS,
    *faulty_modules.FAULTS,
    *faulty_aggregators.FAULTS,
    *faulty_transforms.FAULTS,
    *faulty_optimizers.FAULTS,
    *faulty_runs.FAULTS,
)
CHECKS = {check.id: check for kind in KINDS for check in checks_for(kind)}
COSTLY = {"compiles", "optimizer_compiles", "two_processes", "scikit_learn"}


def _marks(planted):
    return [pytest.mark.slow] if CHECKS[planted.check].slow else []


PLANTED = [pytest.param(planted, id=planted.check, marks=_marks(planted)) for planted in FAULTS]


def test_every_check_has_a_planted_fault():
    assert set(CHECKS) == {planted.check for planted in FAULTS}


def test_there_are_well_over_forty_checks():
    assert len(CHECKS) >= 100
    assert min(len(checks_for(kind)) for kind in KINDS) >= 15


@pytest.mark.parametrize("planted", PLANTED)
def test_the_check_finds_its_fault(planted):
    outcome = run_check(CHECKS[planted.check], planted.case)
    assert outcome.status == "failed"
    assert outcome.message
    assert "NameError" not in outcome.message  # the fault itself must run


@pytest.mark.parametrize("planted", PLANTED)
def test_the_fault_breaks_nothing_else(planted):
    others = [c for c in checks_for(planted.case.kind) if c.id not in COSTLY | {planted.check}]
    outcomes = [run_check(check, planted.case) for check in others]
    report = "\n".join(f"{o.check}: {o.message[:200]}" for o in outcomes if o.status == "failed")
    assert {o.check for o in outcomes if o.status == "failed"} == planted.also, report
