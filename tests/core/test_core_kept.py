"""A kept value follows every change of what it was made of."""

import copy
import io

import pytest
import torch
from torch import nn

from pullback.core.kept import Kept


def counted(weight):
    calls = []

    def make():
        calls.append(1)
        return weight.detach() * 2

    return calls, make


def test_a_value_is_made_once_until_something_is_written():
    weight, kept = nn.Parameter(torch.ones(3)), Kept()
    calls, make = counted(weight)
    assert not kept.full
    first = kept.get([weight], make)
    assert kept.get([weight], make) is first
    assert kept.full
    with torch.no_grad():
        weight.add_(1)
    assert torch.equal(kept.get([weight], make), weight.detach() * 2)
    weight.data = torch.zeros(3)
    assert not bool(kept.get([weight], make).any())
    other = nn.Parameter(torch.zeros(3))
    kept.get([other], make)
    kept.get([other, weight], make)
    assert len(calls) == 5
    kept.clear()
    assert not kept.full


def test_another_tensor_at_the_same_place_is_another():
    both, kept = torch.arange(3.0), Kept()
    short, long = both[:2], both[:3]
    assert len(kept.get([short], short.clone)) == 2
    assert len(kept.get([long], long.clone)) == 3


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.1),
        lambda p: torch.optim.SGD(p, 0.1, fused=True),
        lambda p: torch.optim.Adam(p, 0.1, fused=True),
        lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
    ],
)
def test_every_optimizer_is_noticed(make_optimizer):
    """Fused ones do not count up the version of what they write to."""
    weight, kept = nn.Parameter(torch.ones(3)), Kept()
    calls, make = counted(weight)
    optimizer = make_optimizer([weight])
    kept.get([weight], make)
    weight.sum().backward()
    optimizer.step()
    assert torch.equal(kept.get([weight], make), weight.detach() * 2)
    assert len(calls) == 2


def test_steps_of_others_leave_a_frozen_value():
    frozen, other, kept = (
        nn.Parameter(torch.ones(3), requires_grad=False),
        nn.Parameter(torch.ones(3)),
        Kept(),
    )
    calls, make = counted(frozen)
    kept.get([frozen], make)
    other.sum().backward()
    torch.optim.Adam([other], fused=True).step()
    kept.get([frozen], make)
    assert len(calls) == 1


def test_autocast_and_inference_mode_have_values_of_their_own():
    weight, kept = nn.Parameter(torch.ones(3)), Kept()
    calls, make = counted(weight)
    kept.get([weight], make)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept.get([weight], make)
    kept.get([weight], make)
    with torch.inference_mode():
        kept.get([weight], make)
    assert not kept.get([weight], make).is_inference()
    assert len(calls) == 5
    with torch.inference_mode():
        unversioned = torch.ones(3)
    assert torch.equal(kept.get([unversioned], lambda: unversioned), unversioned)


def test_copies_and_files_are_empty():
    weight, kept = nn.Parameter(torch.ones(3)), Kept()
    kept.get([weight], lambda: weight.detach())
    assert not copy.deepcopy(kept).full
    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    assert not torch.load(file, weights_only=False).full
