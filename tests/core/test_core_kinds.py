"""Base classes of the kinds."""

import subprocess
import sys

import pytest
import torch
import torchjd
from torch import nn

from pullback.core import facts, kinds

NAMES = [name for name in kinds.__all__ if name not in {"StepBatch", "SearchResult"}]


def test_every_kind_has_a_base():
    assert sorted(getattr(kinds, name).kind for name in NAMES) == sorted(facts.KINDS)
    assert all(dict(getattr(kinds, name).refuses) == {} for name in NAMES)
    assert all(getattr(kinds, name).__doc__ for name in kinds.__all__)


def test_bases_are_what_the_field_expects():
    assert issubclass(kinds.Aggregator, torchjd.aggregation.Aggregator)
    assert issubclass(kinds.Optimizer, torch.optim.Optimizer)
    assert all(issubclass(each, nn.Module) for each in (kinds.Signal, kinds.Layer, kinds.Objective))


@pytest.mark.parametrize("name", ["Recompute", "Probe", "Search", "Learner", "Field"])
def test_abstract_bases_refuse_to_be_made(name):
    with pytest.raises(TypeError, match="abstract"):
        getattr(kinds, name)()


def test_wrong_when_is_refused_at_the_class():
    with pytest.raises(TypeError, match=r"Odd\.when must be"):
        type("Odd", (kinds.Transform,), {"when": "never"})


def test_aggregator_without_torchjd_names_the_extra():
    code = (
        "import sys; sys.modules['torchjd'] = None; sys.modules['torchjd.aggregation'] = None\n"
        "try:\n    from pullback.core.kinds import Aggregator\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == 'Aggregators need torchjd. Install it with: pip install "pullback[torchjd]".\n'


def test_importing_kinds_does_not_import_torchjd():
    code = "import sys, pullback.core.kinds; assert 'torchjd' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
