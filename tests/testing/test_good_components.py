"""A correct component of every kind passes its whole contract."""

import pytest
from good_modules import AGGREGATOR, LAYER, OBJECTIVE, SIGNAL
from good_runs import FIELD, LEARNER, PROBE, RECOMPUTE, SEARCH
from good_steps import OPTIMIZER, TRANSFORM

from pullback.testing import KINDS, check_component

GOOD = (
    SIGNAL, AGGREGATOR, TRANSFORM, OPTIMIZER, OBJECTIVE, RECOMPUTE, PROBE, SEARCH, LAYER, LEARNER, FIELD,
)  # fmt: skip


def test_every_kind_has_a_good_component():
    assert {case.kind for case in GOOD} == set(KINDS)


@pytest.mark.parametrize("case", GOOD, ids=lambda case: case.name)
def test_a_correct_component_passes(case):
    report = check_component(case)
    assert not report.failed
    assert report.count("passed") >= 10


@pytest.mark.slow
def test_a_correct_transform_passes_on_two_processes():
    assert check_component(TRANSFORM, slow=True).status("two_processes") == "passed"
