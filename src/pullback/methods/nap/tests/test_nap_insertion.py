"""What insert_norms does to a graph, refuses and leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pullback.methods.nap import Project, insert_norms
from pullback.methods.nap.graph import SpatialRMSNorm


class Mixed(nn.Module):
    """Calls and modules, a functional layer, a residual sum, one activation module used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU()
        self.w = nn.Parameter(torch.randn(10, 4))
        self.b = nn.Parameter(torch.zeros(10))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        h = self.act(self.first(x))
        h = self.act(self.second(h) + h)
        h = F.max_pool2d(h, 2).mean((2, 3))
        h = F.linear(h, self.w, self.b)
        return torch.sigmoid(self.head(self.dropout(h.tanh())))


def inserted(net):
    return {name: module for name, module in net.named_modules() if name.startswith("norms.")}


def test_every_hidden_nonlinearity_gets_a_norm_and_the_output_none():
    torch.manual_seed(0)
    plain = Mixed()
    before = copy.deepcopy(plain.state_dict())
    net = insert_norms(plain)
    kinds = {name: type(module).__name__ for name, module in inserted(net).items()}
    assert kinds == {"norms.act": "GroupNorm", "norms.act_1": "GroupNorm", "norms.tanh": "LayerNorm"}
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert plain.first.bias is not None  # the user's own model is as it was
    names = set(dict(net.named_parameters()))
    assert "first.bias" not in names
    assert "second.bias" in names  # it goes into a sum, where it is not redundant
    assert "b" not in names
    assert "head.bias" in names
    assert type(net).__name__ == "Mixed"
    nap = Project(net)
    assert nap.layers == {"first": "first.weight", "linear": "w"}
    assert nap.left_out == {
        "second": "its output reaches add (add) before a normalisation",
        "head": "its output reaches sigmoid (sigmoid) before a normalisation",
    }


def test_the_norm_stands_directly_before_the_nonlinearity():
    torch.manual_seed(0)
    net = insert_norms(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.0), nn.Tanh(), nn.Linear(8, 2)), eps=0.0)
    x = torch.randn(6, 4)
    h = x @ getattr(net, "0").weight.T
    wanted = getattr(net, "3")(torch.tanh(F.layer_norm(h, (8,), eps=0.0)))
    torch.testing.assert_close(net(x), wanted)


def test_root_mean_square_norms_and_gains():
    plain = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.GELU(), nn.Linear(5, 2)
    )
    net = insert_norms(plain, "rms", affine=True)
    found = inserted(net)
    assert [type(m) for m in found.values()] == [SpatialRMSNorm, nn.RMSNorm]
    x = torch.randn(4, 3, 5, 5)
    y = found["norms._1"](x)
    torch.testing.assert_close(y.square().mean((1, 2, 3)), torch.ones(4), rtol=1e-4, atol=0)
    assert found["norms._1"].weight.shape == (3,)
    assert net(torch.randn(2, 2, 4, 4)).shape == (2, 2)


def test_a_norm_of_ones_own_by_width_and_kind():
    seen = []

    def make(width, kind):
        seen.append((width, kind))
        return nn.BatchNorm1d(width)

    insert_norms(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), make)
    assert seen == [(8, "features")]


def test_what_is_normalised_already_is_left_alone():
    plain = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)
    )
    net = insert_norms(plain)
    assert list(inserted(net)) == ["norms._4"]
    assert getattr(net, "0").bias is not None


def test_one_value_into_two_nonlinearities_gets_one_norm():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            h = self.up(x)
            return self.down(torch.tanh(h) * torch.sigmoid(h))

    net = insert_norms(Gated())
    assert len(inserted(net)) == 1
    assert "up.bias" not in dict(net.named_parameters())
    assert list(Project(net).layers) == ["up"]


def test_a_value_that_goes_elsewhere_too_is_normalised_for_the_nonlinearity_alone():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            h = self.a(x)
            return self.b(torch.relu(h) + h)

    torch.manual_seed(0)
    plain = Residual()
    net = insert_norms(plain, eps=0.0)
    x = torch.randn(6, 4)
    h = plain.a(x)
    torch.testing.assert_close(net(x), plain.b(torch.relu(F.layer_norm(h, (8,), eps=0.0)) + h))
    assert "a.bias" in dict(net.named_parameters())


def test_training_mode_dtype_and_state_names_are_kept():
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double().eval()
    net = insert_norms(plain, affine=True)
    assert not net.training
    assert inserted(net)["norms._1"].weight.dtype == torch.float64
    assert {"0.weight", "2.weight", "2.bias"} <= set(net.state_dict())
    assert torch.compile(net, backend="eager")(torch.ones(3, 4).double()).shape == (3, 2)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        if x.sum() > 0:
            return self.b(self.a(x).relu())
        return self.b(x)


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(F.dropout(self.a(x).relu(), training=self.training))


class Overwriting(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.a(x)
        self.act(h)
        return self.b(h)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.lstm, self.b = nn.Linear(4, 4), nn.LSTM(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.lstm(self.a(x).relu())[0])


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(torch.cat([self.a(x), x], 1).relu())


def hooked():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (Branches, "torch.fx can trace, got Branches: symbolically traced variables.*Take the branch out"),
        (Dropped, "one graph for training and evaluation, got two from Dropped.*nn.Dropout"),
        (Overwriting, r"must use what its nonlinearities return, got act \(ReLU\).*inplace=False"),
        (Recurrent, r"got LSTM at 'lstm', which hides them.*leave=\['lstm'\]"),
        (Wide, r"how wide the input of relu \(relu\) is, got cat \(cat\).*leave=\['relu'\]"),
        (hooked, "no forward hooks of its own, got some on Sequential"),
        (lambda: nn.Linear(4, 2), "a nonlinearity with a layer behind it, got Linear"),
        (lambda: nn.Sequential(nn.Linear(4, 2), nn.Sigmoid()), "got Sequential without"),
    ],
)
def test_what_cannot_be_seen_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        insert_norms(make())


def test_leaving_something_out_must_be_said_and_named_rightly():
    net = insert_norms(Recurrent(), leave=["lstm"])
    assert list(inserted(net)) == ["norms.relu"]
    assert inserted(insert_norms(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Wide()), leave="relu")).keys() == {
        "norms._1"
    }
    with pytest.raises(ValueError, match=r"leave must name modules or nodes of the graph, got \['lstn'\]"):
        insert_norms(Recurrent(), leave=["lstn"])


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"norm": "batch"}, ValueError, "norm must be one of 'layer', 'rms'"),
        ({"bias": "zero"}, ValueError, "bias must be one of"),
        ({"eps": -1.0}, ValueError, "eps must be >= 0"),
    ],
)
def test_bad_settings_are_refused(settings, error, match):
    with pytest.raises(error, match=match):
        insert_norms(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), **settings)


def test_a_model_that_is_none_is_refused():
    for call in (insert_norms, Project):
        with pytest.raises(TypeError, match="model must be of type Module, got int"):
            call(3)  # ty: ignore[invalid-argument-type]
