"""Which layers qualify, and what insert_norms does to a graph, refuses and leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pullback.core.attachment import attach
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


# --- which layers Project takes ---------------------------------------------------------------------------


def normed(*, bias=False):
    return nn.Sequential(nn.Linear(4, 8, bias=bias), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(),
                         nn.Linear(8, 2))  # fmt: skip


def test_names_decide_nothing():
    """In a Sequential the gain of a norm is called '1.weight'; neither it nor the output layer is taken."""
    nap = Project(normed())
    assert nap.names == ["0.weight"]
    assert set(nap.left_out) == {"3", "5"}


def test_an_explicit_layer_must_be_followed_by_a_norm_and_exist():
    assert list(Project(normed(), layers="0").layers) == ["0"]
    with pytest.raises(
        ValueError, match=r"followed by a normalisation, got '3': its output reaches 5 \(Linear\)"
    ):
        Project(normed(), layers=["0", "3"])
    with pytest.raises(ValueError, match=r"layers must name linear .*, got 'fc'. Known: \['0', '3', '5'\]"):
        Project(normed(), layers=["fc"])
    with pytest.raises(ValueError, match=r"must have a layer that a normalisation follows.*insert_norms"):
        Project(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))


def test_homogeneous_activations_and_pools_pass_the_scale_on_and_others_do_not():
    def between(*middle):
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False), *middle, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2)
        )

    assert list(Project(between(nn.ReLU(), nn.AvgPool2d(1), nn.Dropout())).layers) == ["0"]
    with pytest.raises(ValueError, match=r"reaches 1 \(Tanh\) before"):
        Project(between(nn.Tanh()))
    biased = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    assert Project(biased)._blocks == [(0, 1)]  # behind ReLU the bias does not fall out


def test_frozen_tied_parametrized_and_zero_weights():
    net = normed()
    net[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="its weight is frozen"):
        Project(net)
    twice = nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 4, bias=False),
                          nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2))  # fmt: skip
    twice[3].weight = twice[0].weight
    assert Project(twice).names == ["0.weight"]
    twice[6] = nn.Linear(4, 4, bias=False)
    twice[6].weight = twice[0].weight
    with pytest.raises(ValueError, match=r"shared with 6\.weight"):
        Project(twice)
    weighted = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.LayerNorm(4), nn.ReLU(),
                             nn.Linear(4, 2))  # fmt: skip
    with pytest.raises(ValueError, match="computed by a parametrization"):
        Project(weighted)
    net = normed()
    nn.init.zeros_(net[0].weight)
    with pytest.raises(ValueError, match=r"0.weight must have a finite norm > 0, got 0"):
        Project(net)


def test_rows_of_transposed_convolutions_are_refused():
    net = nn.Sequential(
        nn.ConvTranspose1d(2, 3, 2, bias=False), nn.BatchNorm1d(3), nn.ReLU(), nn.Conv1d(3, 1, 1)
    )
    assert list(Project(net).layers) == ["0"]
    with pytest.raises(
        ValueError, match=r"per must be 'tensor' for transposed convolutions, got 'row' for '0'"
    ):
        Project(net, per="row")


def test_a_norm_of_ones_own_class_counts_when_it_is_named():
    class Mine(nn.Module):
        def forward(self, x):
            return x / x.norm(dim=-1, keepdim=True)

    net = nn.Sequential(nn.Linear(4, 4, bias=False), Mine(), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="must have a layer that a normalisation follows"):
        Project(net)
    nap = Project(net, norms=[Mine])
    assert list(nap.layers) == ["0"]
    assert nap.check_invariance(torch.randn(5, 4), lambda model, x: model(x).square().sum())["0"] < 1e-3


def test_homogeneous_gains_need_a_homogeneous_activation():
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))
    with pytest.raises(
        ValueError, match=r"activation is not homogeneous, got 'homogeneous' for 1, which reaches 2 \(Tanh"
    ):
        Project(net, affine="homogeneous")
    with pytest.raises(ValueError, match="with per='row', got 'homogeneous'"):
        Project(net, affine="homogeneous", per="row")


# --- safety check -----------------------------------------------------------------------------------------


def test_the_safety_check_names_layers_that_are_not_scale_invariant():
    class Fixed(nn.Module):
        """Calls itself a norm, but divides by a constant."""

        def forward(self, x):
            return x / 2

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 6), Fixed(), nn.Tanh(),
                        nn.Linear(6, 2))  # fmt: skip
    nap = Project(net, norms=[Fixed])
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"must be scale invariant, got deviations for 3 \("):
        nap.check_invariance(torch.randn(9, 4), lambda model, x: model(x).square().mean())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_safety_check_leaves_buffers_gradients_and_generators_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))
    nap = Project(net)
    x = torch.randn(32, 4)
    state, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    assert nap.check_invariance(x, lambda model, b: model(b).square().mean())["0"] < 1e-3
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(RuntimeError, match="gradient of layer 0 must be finite and not zero, got norm 0"):
        nap.check_invariance(x, lambda _, b: net[4](net[2](b.repeat(1, 2))).sum())
    with pytest.raises(ValueError, match="tolerance must be > 0"):
        nap.check_invariance(x, lambda model, b: model(b).square().mean(), tolerance=0.0)


# --- weight decay -----------------------------------------------------------------------------------------


def test_weight_decay_on_projected_tensors_is_refused_or_warned_of_before_anything_moves():
    for make, warns in ((torch.optim.AdamW, True), (torch.optim.Adam, False), (torch.optim.SGD, False)):
        net = normed()
        optimizer = make(net.parameters(), lr=0.1, weight_decay=0.01)
        attach(optimizer, Project(net))
        before = copy.deepcopy(net.state_dict())
        net(torch.ones(2, 4)).sum().backward()
        if warns:
            with pytest.warns(UserWarning, match=r"got 0.01 in group 0 of AdamW; the projection cancels it"):
                optimizer.step()
            continue
        with pytest.raises(
            ValueError, match=r"weight_decay must be 0 for projected tensors, got 0.01 in group 0"
        ):
            optimizer.step()
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_weight_decay_on_other_tensors_or_allowed_is_fine():
    net = normed()
    groups = [{"params": [net[0].weight], "weight_decay": 0.0}, {"params": [*net[3:].parameters()]}]
    optimizer = torch.optim.Adam(groups, lr=0.1, weight_decay=0.01)
    attach(optimizer, Project(net))
    other = normed()
    allowed = torch.optim.Adam(other.parameters(), lr=0.1, weight_decay=0.01)
    attach(allowed, Project(other, weight_decay="allow"))
    for model, each in ((net, optimizer), (other, allowed)):
        model(torch.ones(2, 4)).sum().backward()
        each.step()
