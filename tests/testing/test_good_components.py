"""A correct component of every kind passes its whole contract."""

import pytest
import torch
from good_modules import AGGREGATOR, LAYER, OBJECTIVE, SIGNAL
from good_runs import FIELD, LEARNED_FIELD, LEARNER, PROBE, RECOMPUTE, SEARCH
from good_steps import OPTIMIZER, TRANSFORM
from sklearn.naive_bayes import GaussianNB

from pullback.testing import KINDS, check_component

GOOD = (
    SIGNAL, AGGREGATOR, TRANSFORM, OPTIMIZER, OBJECTIVE, RECOMPUTE, PROBE, SEARCH, LAYER, LEARNER, FIELD,
    LEARNED_FIELD,
)  # fmt: skip


def blobs(generator):
    labels = torch.arange(60) % 2
    return (torch.randn(60, 4, generator=generator) + 6.0 * labels[:, None]).numpy(), labels.numpy()


def test_every_kind_has_a_good_component():
    assert {case.kind for case in GOOD} == set(KINDS)


@pytest.mark.parametrize("case", GOOD, ids=lambda case: case.name)
def test_a_correct_component_passes(case):
    report = check_component(case)
    assert not report.failed
    assert report.count("passed") >= 10


@pytest.mark.slow
def test_a_scikit_learn_estimator_passes():
    """One of scikit-learn's own, by its own checks."""
    about = {"kind": "learner", "data": blobs, "skip": {"global_generators": "uses numpy's global seed"}}
    report = check_component(GaussianNB, slow=True, **about)
    assert report.status("scikit_learn") == "passed"
    assert report.status("separates") == "passed"
    assert report.status("loss_falls") == "not applicable"


@pytest.mark.slow
def test_a_correct_transform_passes_on_two_processes():
    assert check_component(TRANSFORM, slow=True).status("two_processes") == "passed"
