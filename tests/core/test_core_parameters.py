"""Named parameters of modules, mappings, pairs and optimizers."""

import pytest
import torch
from torch import nn

from pullback.core.parameters import named_parameters


def net():
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))


def test_every_source_gives_the_same_tensors():
    model = net()
    expected = dict(model.named_parameters())
    sources = [model, expected, model.named_parameters(), torch.optim.SGD(model.named_parameters(), lr=1.0)]
    for source in sources:
        found = named_parameters(source)
        assert list(found) == list(expected)
        assert all(found[name] is expected[name] for name in expected)


def test_unnamed_optimizer_groups():
    model = net()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[1].parameters()}], lr=1.0
    )
    assert list(named_parameters(optimizer)) == ["group0.0", "group0.1", "group1.0", "group1.1"]


def test_tied_parameters_once():
    weight = nn.Parameter(torch.ones(2))
    assert list(named_parameters([("a", weight), ("b", nn.Parameter(torch.ones(2))), ("c", weight)])) == [
        "a",
        "b",
    ]


@pytest.mark.parametrize("empty", [nn.ReLU(), {}, []])
def test_empty_is_refused(empty):
    with pytest.raises(ValueError, match="must not be empty"):
        named_parameters(empty)


def test_wrong_sources():
    model = net()
    for wrong in (3, torch.ones(2), model.parameters(), [("a", 1)], {1: torch.ones(2)}):
        with pytest.raises(TypeError, match="parameters must be"):
            named_parameters(wrong)
    with pytest.raises(ValueError, match="'a' twice"):
        named_parameters([("a", torch.ones(2)), ("a", torch.ones(2))])
