"""Which layers Project takes, and what it says of others, of gains and of weight decay."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pullback.core.attachment import attach
from pullback.methods.nap import Project


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
        before = [p.detach().clone() for p in model.parameters()]
        model(torch.ones(2, 4)).sum().backward()
        each.step()  # a warning would be an error here
        assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        assert torch.allclose(model[0].weight.norm(), before[0].norm())
