"""Modules are replaced everywhere, counted, or nothing is touched."""

import pytest
from torch import nn

from pullback.core.swap import swap_modules


def swap(model, names, make=lambda old: nn.Identity()):
    return swap_modules(model, names, make, fits=lambda m: isinstance(m, nn.Linear), what="linear layer")


def model():
    shared = nn.Linear(2, 2)
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), shared)
    return nn.ModuleDict({"inner": inner, "again": shared, "act": nn.Tanh()})


def test_every_place_gets_the_one_new_module_in_the_old_mode():
    net = model()
    net.again.eval()
    assert swap(net, ["again"]) == 1
    assert net.again is net.inner[2]
    assert isinstance(net.again, nn.Identity)
    assert not net.again.training
    assert swap(net, lambda name, module: name.startswith("inner")) == 1
    assert net.inner.training
    assert isinstance(net.inner[0], nn.Identity)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("again", TypeError, "names must be a list of names or a function, got 'again'"),
        ([], ValueError, r"names must pick a linear layer, got \[\]"),
        (lambda n, m: n == "act", ValueError, "names must pick a linear layer"),
        (["inner.7"], ValueError, "names must be names of modules, got 'inner.7'"),
        (["again", "act"], TypeError, "names must be of linear layers, got 'act', a Tanh"),
    ],
)
def test_refusals(names, error, message):
    net = model()
    before = list(net.modules())
    with pytest.raises(error, match=message):
        swap(net, names)
    assert all(a is b for a, b in zip(before, net.modules(), strict=True))


def test_an_error_while_making_leaves_the_model_alone():
    net, made = model(), []

    def make(old):
        if made:
            raise ValueError("enough")
        made.append(old)
        return nn.Identity()

    before = list(net.modules())
    with pytest.raises(ValueError, match="enough"):
        swap(net, ["inner.0", "again"], make)
    assert all(a is b for a, b in zip(before, net.modules(), strict=True))
