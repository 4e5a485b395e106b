"""Rows of every kind of layer: convolutions with groups, strides and padding, sequences, shared and frozen layers."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pullback.methods.elu import BiasShiftProbe
from pullback.methods.elu.tests import reference

SHAPES: dict[str, Any] = {
    "1d": (nn.Conv1d(4, 6, 3, padding=1), (9,)),
    "stride, dilation": (nn.Conv1d(4, 6, 3, stride=2, dilation=2, padding=2), (11,)),
    "2d": (nn.Conv2d(4, 6, (2, 3)), (5, 6)),
    "same": (nn.Conv2d(4, 6, (4, 3), padding="same"), (5, 4)),
    "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (4, 4)),
    "groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (4, 5)),
    "3d": (nn.Conv3d(4, 6, 2), (3, 3, 4)),
}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def conv_problem(layer, spatial, *, bias=True):
    layer = copy.deepcopy(layer).double()
    if not bias:
        layer.bias = None
    x = torch.randn(7, 4, *spatial, generator=rng(), dtype=torch.float64) + 0.4
    head = nn.Linear(layer(x)[0].numel(), 3).double()
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), head), x, torch.randint(3, (7,), generator=rng(1))


def patches(layer, x, group):
    """What one output position sees, one position at a time, from the layer's own response to single inputs."""
    n = layer.weight[0].numel()
    twin = copy.deepcopy(layer)
    per_group = layer.out_channels // layer.groups
    twin.bias = None
    columns = []
    for entry in range(n):  # a kernel that picks one entry of the patch
        with torch.no_grad():
            twin.weight.zero_()
            twin.weight[group * per_group].view(-1)[entry] = 1.0
        columns.append(twin(x).detach().movedim(1, -1).reshape(-1, layer.out_channels)[:, group * per_group])
    return torch.stack(columns, 1)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("kind", SHAPES)
def test_positions_of_a_convolution_are_rows(kind):
    model, x, y = conv_problem(*SHAPES[kind])
    layer = model[0]
    z = layer(x)
    loss = functional.cross_entropy(nn.Sequential(*list(model)[1:])(z), y, reduction="sum")
    delta, g, g0 = torch.autograd.grad(loss, [z, layer.weight, layer.bias])
    delta = delta.movedim(1, -1).reshape(-1, layer.out_channels)
    step = BiasShiftProbe(model, ("0",), fisher="empirical").unit_natural_gradient(x, y)
    report = BiasShiftProbe(model, ("0",), fisher="empirical", max_units=None).measure(x, y, per_unit=True)[
        "0"
    ]
    assert report.rows == len(delta)
    per_group = layer.out_channels // layer.groups
    for i in range(layer.out_channels):
        a = patches(layer, x, i // per_group)
        # F of one example: positions are independent contributions, hence a sum over them.
        matrix = reference.damped(reference.unit_fisher(a, delta[:, i]) * len(delta) / len(x), 1e-3)
        gradient = torch.cat([g[i].flatten(), g0[i, None]]) / len(x)
        wanted = torch.linalg.solve(matrix, gradient)
        found = torch.cat([step["0.weight"][i].flatten(), step["0.bias"][i, None]])
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8 * float(wanted.abs().max()))
        assert report.per_unit is not None
        shift = reference.shift_fraction(a, g[i].flatten(), g0[i])
        assert float(report.per_unit["shift_fraction"][i]) == pytest.approx(shift, rel=1e-8)
    every = torch.stack([patches(layer, x, group) for group in range(layer.groups)])
    ratio = every.mean(1).square().sum() / every.square().sum(2).mean(1).sum()
    assert report.mean_ratio == pytest.approx(float(ratio.sqrt()), rel=1e-9)


def test_an_image_without_batch_dimension_is_a_batch_of_one():
    conv = nn.Conv2d(2, 3, 3).double()
    model = nn.Sequential(conv, nn.Flatten(0), nn.Linear(12, 3).double())
    x = torch.randn(2, 4, 4, generator=rng(), dtype=torch.float64)
    single = BiasShiftProbe(model, ("0",)).measure(x, torch.tensor(1))["0"]
    assert single.rows == 4
    assert 0 <= single.shift_fraction <= 1


def test_sequences_classes_last_and_ignored_labels():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)).double()
    x = torch.randn(6, 7, 5, generator=rng(), dtype=torch.float64)
    y = torch.randint(4, (6, 7), generator=rng(1))
    whole = BiasShiftProbe(model, fisher="empirical").measure(x, y)
    assert whole["0"].rows == 42
    flat = BiasShiftProbe(model, fisher="empirical").measure(x.flatten(0, 1), y.flatten())
    for name in ("0", "2"):
        assert vars(flat[name]) == pytest.approx(vars(whole[name]))
    y[3:] = -100
    step = BiasShiftProbe(model, fisher="empirical", damping=1e-2).unit_natural_gradient(x, y)
    kept = BiasShiftProbe(model, fisher="empirical", damping=1e-2).unit_natural_gradient(x[:3], y[:3])
    for name in step:  # rows without a loss add nothing to F or to the gradient
        torch.testing.assert_close(step[name], kept[name], rtol=1e-7, atol=1e-8)
    assert BiasShiftProbe(model).measure(x, y).loss == pytest.approx(
        BiasShiftProbe(model).measure(x[:3], y[:3]).loss
    )


def test_class_dimension_as_in_cross_entropy():
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Tanh(), nn.Conv1d(4, 5, 1)).double()
    x, y = (
        torch.randn(4, 3, 6, generator=rng(), dtype=torch.float64),
        torch.randint(5, (4, 6), generator=rng(1)),
    )
    report = BiasShiftProbe(model).measure(x, y)
    assert report.loss == pytest.approx(functional.cross_entropy(model(x), y).item())


@pytest.mark.parametrize("kind", ["gaussian", "bernoulli"])
def test_other_likelihoods(kind):
    model = nn.Sequential(nn.Linear(5, 300), nn.Tanh(), nn.Linear(300, 2)).double()
    x = torch.randn(400, 5, generator=rng(), dtype=torch.float64)
    y = torch.rand(400, 2, generator=rng(1), dtype=torch.float64).round()
    report = BiasShiftProbe(model, ("2",), likelihood=kind).measure(x, y, per_unit=True)
    out = model(x).detach()
    assert report["2"].per_unit is not None
    c = report["2"].per_unit["c"]
    if kind == "gaussian":
        assert report.loss == pytest.approx(float(0.5 * (out - y).square().sum(1).mean()))
        torch.testing.assert_close(c, torch.ones(2, dtype=torch.float64), rtol=0.3, atol=0.0)
    else:
        wanted = functional.binary_cross_entropy_with_logits(out, y, reduction="none").sum(1).mean()
        assert report.loss == pytest.approx(float(wanted))
        p = out.sigmoid()
        torch.testing.assert_close(c, (p * (1 - p)).mean(0), rtol=0.1, atol=0.0)


def test_auto_takes_floating_targets_for_a_regression():
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(20, 3, generator=rng()).double(), torch.randn(20, 2, generator=rng(1)).double()
    assert BiasShiftProbe(model).measure(x, y).loss == pytest.approx(
        (0.5 * (model(x) - y).square().sum(1).mean()).item()
    )


class Twice(nn.Module):
    """Uses one layer at two places, the second time by keyword."""

    def __init__(self):
        super().__init__()
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.shared(input=torch.tanh(self.shared(x)))))


def test_every_call_of_a_shared_layer_gives_rows():
    model = Twice().double()
    x, y = torch.randn(10, 4, generator=rng()).double(), torch.randint(3, (10,), generator=rng(1))
    report = BiasShiftProbe(model, ("shared",), fisher="empirical", damping=0.1)
    assert report.measure(x, y)["shared"].rows == 20
    h = torch.tanh(model.shared(x)).detach()
    loss = functional.cross_entropy(model(x), y, reduction="sum")
    g, g0 = torch.autograd.grad(loss, [model.shared.weight, model.shared.bias])
    first = model.shared(x)
    second = model.shared(torch.tanh(first))
    deltas = torch.autograd.grad(
        functional.cross_entropy(model.head(torch.tanh(second)), y, reduction="sum"), [first, second]
    )
    a, delta = torch.cat([x, h]), torch.cat(deltas)
    step = report.unit_natural_gradient(x, y)
    for i in range(4):
        matrix = reference.damped(reference.unit_fisher(a, delta[:, i]), 0.1) * 2  # two calls per term
        wanted = torch.linalg.solve(matrix, torch.cat([g[i], g0[i, None]]) / 10)
        torch.testing.assert_close(
            torch.cat([step["shared.weight"][i], step["shared.bias"][i, None]]), wanted
        )


def model_of(activation, seed=0):
    net = nn.Sequential(nn.Linear(5, 6), activation, nn.Linear(6, 6), activation, nn.Linear(6, 3)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=rng(seed), dtype=torch.float64))
    return net


def batch(rows=40):
    return torch.randn(rows, 5, generator=rng(3), dtype=torch.float64), torch.randint(
        3, (rows,), generator=rng(4)
    )


@pytest.mark.parametrize("dims", [2, 3])
def test_activations_that_overwrite_their_input_change_nothing(dims):
    x, y = batch(42)
    if dims == 3:  # then the output of a linear layer is a view
        x, y = x.view(6, 7, 5), y.view(6, 7)
    plain = BiasShiftProbe(model_of(nn.ReLU())).measure(x, y)
    assert BiasShiftProbe(model_of(nn.ReLU(inplace=True))).measure(x, y) == plain
    assert plain["0"].shift_fraction > 0


def test_frozen_layers_are_measured_as_trainable_ones():
    x, y = batch()
    wanted = BiasShiftProbe(model_of(nn.ELU(inplace=True))).measure(x, y)
    for frozen in (range(5), (0,), (2,)):
        model = model_of(nn.ELU(inplace=True))
        for index in frozen:
            model[index].requires_grad_(False)
        found = BiasShiftProbe(model).measure(x, y)
        assert found.to_dict() == wanted.to_dict()


def test_parametrised_weights_are_measured_by_their_value():
    x, y = batch()
    wanted = BiasShiftProbe(model_of(nn.Tanh()), ("2",)).measure(x, y)
    model = model_of(nn.Tanh())
    nn.utils.parametrizations.weight_norm(model[2])
    probe = BiasShiftProbe(model, ("2",))
    assert probe.measure(x, y)["2"].shift_fraction == pytest.approx(wanted["2"].shift_fraction, rel=1e-9)
    with pytest.raises(ValueError, match="layers must have plain weights, got the parametrised '2'"):
        probe.unit_natural_gradient(x, y)


def test_layers_without_bias_have_no_k():
    model, x, y = conv_problem(*SHAPES["2d"], bias=False)
    probe = BiasShiftProbe(model, ("0",), fisher="empirical", max_units=None)
    report = probe.measure(x, y)["0"]
    assert math.isnan(report.k)
    assert math.isnan(report.s)
    assert 0 < report.shift_fraction <= 1
    assert 0 < report.cos_natural <= 1
    layer = model[0]
    z = layer(x)
    loss = functional.cross_entropy(nn.Sequential(*list(model)[1:])(z), y, reduction="sum")
    delta, g = torch.autograd.grad(loss, [z, layer.weight])
    delta = delta.movedim(1, -1).reshape(-1, layer.out_channels)
    step = probe.unit_natural_gradient(x, y)
    assert list(step) == ["0.weight"]
    a = patches(layer, x, 0)
    matrix = reference.unit_fisher(a, delta[:, 1])[:-1, :-1]
    wanted = torch.linalg.solve(reference.damped(matrix, 1e-3), g[1].flatten() / len(delta))
    torch.testing.assert_close(step["0.weight"][1].flatten(), wanted, rtol=1e-6, atol=1e-9)


def test_a_sample_of_rows_estimates_all_and_gradients_stay_whole():
    model, x, y = conv_problem(*SHAPES["1d"])
    x, y = x.repeat(40, 1, 1), y.repeat(40)  # 280 examples, 2,520 positions
    whole = BiasShiftProbe(model, ("0",), fisher="empirical", max_rows=None).measure(x, y)["0"]
    part = BiasShiftProbe(model, ("0",), fisher="empirical", max_rows=800).measure(x, y)["0"]
    assert (whole.rows, part.rows) == (2520, 800)
    for name in ("mean_ratio", "shift_fraction", "cos_natural"):
        assert getattr(part, name) == pytest.approx(getattr(whole, name), rel=0.15)
    # With a damping that outweighs F the natural gradient is the gradient, which no sampling of rows may change.
    steps = [
        BiasShiftProbe(model, ("0",), fisher="empirical", damping=1e9, max_rows=rows).unit_natural_gradient(
            x, y
        )["0.bias"]
        for rows in (None, 800)
    ]
    torch.testing.assert_close(*(step / step.norm() for step in steps), rtol=0.2, atol=0.0)
    other = BiasShiftProbe(model, ("0",), fisher="empirical", max_rows=800, seed=1).measure(x, y)["0"]
    assert other != part


def test_units_are_sampled_the_same_way_every_time():
    x, y = batch()
    model = model_of(nn.ELU())
    all_units = BiasShiftProbe(model, ("2",), max_units=None).measure(x, y, per_unit=True)["2"]
    some = BiasShiftProbe(model, ("2",), max_units=3).measure(x, y, per_unit=True)["2"]
    again = BiasShiftProbe(model, ("2",), max_units=3).measure(x + 1, y, per_unit=True)["2"]
    assert (some.solved, some.units, all_units.solved) == (3, 6, 6)
    assert some.per_unit is not None
    assert again.per_unit is not None
    assert all_units.per_unit is not None
    picked = some.per_unit["unit"]
    assert torch.equal(picked, again.per_unit["unit"])
    torch.testing.assert_close(some.per_unit["k"], all_units.per_unit["k"][picked])
    assert some.shift_fraction == all_units.shift_fraction  # needs no solve: of all units


def test_dead_units_are_counted_and_left_out():
    x, y = batch()
    model = model_of(nn.ReLU())
    with torch.no_grad():
        model[2].bias[:2] = -1e3
    probe = BiasShiftProbe(model, ("2",), max_units=None)
    report = probe.measure(x, y)["2"]
    assert report.dead_fraction == pytest.approx(2 / 6)
    assert report.solved == 4
    assert math.isfinite(report.k)
    step = probe.unit_natural_gradient(x, y)
    assert not step["2.weight"][:2].any()
    assert step["2.weight"][2:].abs().sum(1).min() > 0
    with torch.no_grad():
        model[2].bias.fill_(-1e3)
    report = probe.measure(x, y)["2"]
    assert (report.dead_fraction, report.solved) == (1.0, 0)
    assert math.isnan(report.shift_fraction)
    assert not probe.unit_natural_gradient(x, y)["2.weight"].any()


def test_checkpointed_blocks_are_recorded_once():
    class Block(nn.Module):
        def __init__(self, plain, reentrant):
            super().__init__()
            self.plain, self.reentrant = plain, reentrant

        def forward(self, x):
            return checkpoint(self.plain, x, use_reentrant=self.reentrant)

    x, y = batch()
    wanted = BiasShiftProbe(model_of(nn.Tanh())).measure(x, y)
    found = BiasShiftProbe(Block(model_of(nn.Tanh()), False)).measure(x, y)
    assert {f"plain.{name}": each for name, each in wanted.layers.items()} == found.layers
    with pytest.raises(RuntimeError, match=r"layer 'plain\.0' must run with gradients"):
        BiasShiftProbe(Block(model_of(nn.Tanh()), True)).measure(x.requires_grad_(), y)
