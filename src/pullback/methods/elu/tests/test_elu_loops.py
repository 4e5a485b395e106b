"""The probe inside a user's own loop: no trace, mixed precision, compilation, natural steps, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from pullback.core.checks import NonFiniteError
from pullback.methods.elu import BiasShiftProbe, BiasShiftReport, init_gain_, median_variance
from pullback.testing.tools import flags, global_rng, gradients, hooks, same, values


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(rows=60, seed=0):
    x = torch.randn(rows, 8, generator=rng(seed))
    return x, (x[:, :3] + 0.3 * torch.randn(rows, 3, generator=rng(seed + 1))).argmax(1)


def net(activation=nn.ELU, seed=0, *, norm=False):
    norms = [nn.BatchNorm1d(16), nn.BatchNorm1d(16)] if norm else [nn.Identity(), nn.Identity()]
    layers = [
        nn.Linear(8, 16),
        norms[0],
        activation(),
        nn.Linear(16, 16),
        norms[1],
        activation(),
        nn.Linear(16, 3),
    ]
    model = nn.Sequential(*layers)
    init_gain_(model, activation(), seed=seed)
    return model


class Failing(nn.Module):
    """Raises where it is told to: in the forward or in the backward pass."""

    def __init__(self, model, where):
        super().__init__()
        self.model, self.where = model, where

    def forward(self, x):
        out = self.model(x)
        if self.where == "forward":
            raise ArithmeticError("planned")
        out.register_hook(self._fail)
        return out

    def _fail(self, grad):
        raise ArithmeticError("planned")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("training", [None, True, False])
def test_nothing_is_left_behind_also_after_an_exception(where, training):
    inner: Any = nn.Sequential(net(norm=True), nn.Dropout(0.5))
    inner[0][1].eval()
    model = Failing(inner, where)
    x, y = batch()
    inner(x).sum().backward()

    def look():
        return values(model), gradients(model), flags(model), hooks(model), global_rng()

    before = look()
    with pytest.raises(ArithmeticError, match="planned"):
        BiasShiftProbe(model, training=training).measure(x, y)
    assert same(look(), before)
    buffers = [id(buffer) for buffer in inner.buffers()]
    BiasShiftProbe(inner, training=training).measure(x, y)
    BiasShiftProbe(inner, training=training).unit_natural_gradient(x, y)
    assert same(look(), before)
    assert buffers == [id(buffer) for buffer in inner.buffers()]
    assert not torch.is_inference_mode_enabled()


def test_a_rebound_buffer_is_put_back():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(8, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, input):
            self.calls = self.calls + 1
            return super().forward(input)

    model = Counting()
    BiasShiftProbe(model).measure(*batch())
    assert float(model.calls) == 0.0


def test_dropout_draws_the_same_numbers_every_time_and_modes_matter():
    model = nn.Sequential(net(), nn.Dropout(0.5)).train()
    x, y = batch()
    first, second = BiasShiftProbe(model).measure(x, y), BiasShiftProbe(model).measure(x, y)
    assert first == second
    quiet = BiasShiftProbe(model, training=False).measure(x, y)
    assert quiet != first
    assert quiet == BiasShiftProbe(model.eval()).measure(x, y)
    assert BiasShiftProbe(model, training=True).measure(x, y) == first


def test_batch_norm_is_measured_in_its_mode():
    model, (x, y) = net(nn.ReLU, norm=True), batch()
    trained, evaluated = (BiasShiftProbe(model, training=mode).measure(x, y) for mode in (True, False))
    # Batch statistics take the mean out of the derivatives: the bias of a normalised layer has no gradient.
    z = model[0](x)
    (delta,) = torch.autograd.grad(functional.cross_entropy(nn.Sequential(*list(model)[1:])(z), y), [z])
    assert delta.sum(0).abs().max() < 1e-6
    assert trained["0"].shift_fraction != evaluated["0"].shift_fraction


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(mode):
    model, (x, y) = net(), batch()
    wanted = BiasShiftProbe(model).measure(x, y)
    with mode():
        assert BiasShiftProbe(model).measure(x.clone(), y.clone()) == wanted


def test_autocast_is_switched_off_and_half_precision_is_solved_in_full():
    model, (x, y) = net(), batch()
    wanted = BiasShiftProbe(model).measure(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert BiasShiftProbe(model).measure(x, y) == wanted
        assert torch.is_autocast_enabled("cpu")
    model.bfloat16()
    low = BiasShiftProbe(model).measure(x.bfloat16(), y)
    for name, each in low.layers.items():
        assert each.mean_ratio == pytest.approx(wanted[name].mean_ratio, abs=0.02)
        assert each.shift_fraction == pytest.approx(wanted[name].shift_fraction, abs=0.1)
    step = BiasShiftProbe(model).unit_natural_gradient(x.bfloat16(), y)
    assert {each.dtype for each in step.values()} == {torch.bfloat16}


def test_float32_agrees_with_float64():
    model, (x, y) = net(nn.ReLU), batch(400)
    single = BiasShiftProbe(model, fisher="empirical").measure(x, y)
    double = BiasShiftProbe(model.double(), fisher="empirical").measure(x.double(), y)
    for name, each in double.layers.items():
        for key in ("shift_fraction", "shift_fraction_natural", "cos_natural", "k", "s", "mean_ratio"):
            assert getattr(single[name], key) == pytest.approx(getattr(each, key), rel=1e-3), (name, key)


@pytest.mark.slow
def test_compiled_models_are_measured_as_plain_ones():
    model, (x, y) = net(), batch()
    wanted = BiasShiftProbe(model).measure(x, y)
    compiled: Any = torch.compile(model, backend="eager")
    compiled(x)
    assert BiasShiftProbe(compiled).measure(x, y) == wanted
    model.compile(backend="eager")
    model(x)
    assert BiasShiftProbe(model, ("3",)).measure(x, y)["3"] == wanted["3"]


# --- natural steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_the_natural_gradient_trains_in_a_plain_loop(make):
    model, (x, y) = net(), batch(200)
    probe = BiasShiftProbe(model, damping=0.1)
    optimizer = make(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        direction = probe.unit_natural_gradient(x, y)
        for name, p in model.named_parameters():
            p.grad = direction[name]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 20.0)
        optimizer.step()
        scheduler.step()
        losses.append(functional.cross_entropy(model(x), y).item())
    assert losses[-1] < 0.8 * losses[0]


def test_it_stands_beside_an_accumulated_backward_pass_and_its_graph():
    model, (x, y) = net(norm=True), batch()
    loss = functional.cross_entropy(model(x), y)
    twin = net(norm=True)
    twin.load_state_dict(model.state_dict())
    wanted = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    BiasShiftProbe(model).measure(x, y)  # between the forward and the backward pass
    loss.backward()
    for p, grad in zip(model.parameters(), wanted, strict=True):
        assert torch.equal(p.grad, grad)


# --- the report -----------------------------------------------------------------------------------------------------


def test_table_dictionary_and_variance_over_training():
    model, (x, y) = net(nn.ReLU), batch()
    probe = BiasShiftProbe(model, ("0", "3"), max_units=4)
    first = probe.measure(x, y, per_unit=True)
    lines = first.table().splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "0", "3"]
    assert lines[1].split()[-1] == "4/16"
    told = first.to_dict()
    assert told["layers"]["3"]["shift_fraction"] == first["3"].shift_fraction
    assert len(told["layers"]["3"]["per_unit"]["k"]) == 4
    with pytest.raises(KeyError, match=r"there is no layer '5' in this report\. Its layers are 0, 3"):
        first["5"]
    assert median_variance([first, first]) == {"0": 0.0, "3": 0.0}
    with torch.no_grad():
        model[3].bias += 1.0
        model[0].bias += 1.0
    second = probe.measure(x, y)
    gap = first["3"].median_activation - second["3"].median_activation
    assert median_variance([first, second])["3"] == pytest.approx(gap**2 / 4)
    with pytest.raises(ValueError, match="reports must hold at least 2 measurements, got 1"):
        median_variance([first])


def test_a_model_with_an_output_of_its_own_and_named_arguments():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, ids, *, scale):
            return Output(self.net(ids * scale))

    model, (x, y) = Named(), batch()
    report = BiasShiftProbe(model).measure({"ids": x, "scale": 1.0}, y)
    assert list(report.layers) == ["net.0", "net.3", "net.6"]
    assert report["net.3"] == BiasShiftProbe(model.net).measure((x,), y)["3"]


# --- trouble --------------------------------------------------------------------------------------------------------


def with_nan():
    model = net(nn.ReLU)
    with torch.no_grad():
        model[6].weight[0, 0] = math.nan
    return model


def test_the_policies_about_nan():
    x, y = batch()
    with pytest.raises(NonFiniteError, match="the loss must be finite, got NaN or Inf"):
        BiasShiftProbe(with_nan()).measure(x, y)
    report = BiasShiftProbe(with_nan(), nonfinite="skip").measure(x, y)
    assert isinstance(report, BiasShiftReport)
    assert math.isnan(report.loss)
    assert math.isnan(report["0"].shift_fraction)
    assert math.isnan(report["0"].mean_ratio)
    assert (report["0"].units, report["0"].solved, report["0"].rows) == (16, 0, 0)
    assert BiasShiftProbe(with_nan(), nonfinite="skip").unit_natural_gradient(x, y) == {}
    with pytest.warns(RuntimeWarning, match="the loss must be finite.*The layer '6' is left out"):
        BiasShiftProbe(with_nan(), ("6",), nonfinite="warn").measure(x, y)
    model = net(nn.ReLU)
    with torch.no_grad():  # one layer alone: its input overflows, the loss does not
        model[3].weight[:, 0] = 0.0
    x = x.clone()
    model[2].register_forward_hook(lambda _m, _i, out: torch.cat([out[:, :1] * 0 + math.inf, out[:, 1:]], 1))
    model[3].register_forward_hook(lambda _m, _i, out: torch.where(out.isnan(), 0.1, out))
    with pytest.raises(NonFiniteError, match="its activations or derivatives of layer '3' must be finite"):
        BiasShiftProbe(model).measure(x, y)
    report = BiasShiftProbe(model, nonfinite="skip").measure(x, y)
    assert math.isnan(report["3"].k)
    assert math.isfinite(report["6"].k)


def shared():
    one, two = nn.Linear(8, 8), nn.Linear(8, 8)
    two.weight = one.weight
    return nn.Sequential(one, nn.Tanh(), two)


class Overwriting(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x):
        h = 2.0 * x
        out = self.fc(h)
        return out + h.relu_()


class Silent(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        return self.used(x)


X, Y = batch()
CASES: dict[str, tuple[Any, type[Exception], str]] = {
    "singular": (
        lambda: BiasShiftProbe(net(), damping=0.0).measure(X[:2], Y[:2]),
        RuntimeError,
        r"damping must make every unit's Fisher matrix regular, got 0\.0: in layer '0'",
    ),
    "shared": (
        lambda: BiasShiftProbe(shared()).unit_natural_gradient(X, Y),
        ValueError,
        "weights must belong to one module, got one shared by 0, 2",
    ),
    "overwritten": (
        lambda: BiasShiftProbe(Overwriting()).measure(X, Y),
        RuntimeError,
        "the input of layer 'fc' must not be overwritten after its call",
    ),
    "silent": (
        lambda: BiasShiftProbe(Silent(), ("unused",)).measure(X, Y),
        ValueError,
        "layers must run in the forward pass, got unused, which did not",
    ),
    "lazy": (
        lambda: BiasShiftProbe(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))).measure(X, Y),
        ValueError,
        "model must be initialised, got the lazy parameter '0.weight'",
    ),
    "class": (
        lambda: BiasShiftProbe(net()).measure(X, Y + 1),
        ValueError,
        r"y must hold classes from 0 to 2 \(or -100\), got 3",
    ),
    "shape": (
        lambda: BiasShiftProbe(net()).measure(X, Y[:5]),
        ValueError,
        r"y must hold one class for each vector of logits, got shape \(5,\) for an output of shape \(60, 3\)",
    ),
    "targets": (
        lambda: BiasShiftProbe(net()).measure(X, Y.float()),
        ValueError,
        r"y must have the shape of the model's output for a gaussian likelihood, got \(60,\) and \(60, 3\)",
    ),
    "dtype": (
        lambda: BiasShiftProbe(net(), likelihood="categorical").measure(X, Y.float()),
        TypeError,
        "y must hold classes of an integer dtype, got torch.float32",
    ),
    "empty": (
        lambda: BiasShiftProbe(net()).measure(X[:0], Y[:0]),
        ValueError,
        "y must hold at least one label, got",
    ),
    "ignored": (
        lambda: BiasShiftProbe(net()).measure(X, torch.full_like(Y, -100)),
        ValueError,
        "y must hold at least one label",
    ),
    "output": (
        lambda: BiasShiftProbe(nn.LSTM(8, 3)).measure(X, Y),
        ValueError,
        "model must hold a Linear, Conv1d",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_makes_no_sense_is_named(name):
    make, error, message = CASES[name]
    with pytest.raises(error, match=message):
        make()


def test_layers_of_a_fused_path_are_left_out_unless_they_are_named():
    report = BiasShiftProbe(Silent()).measure(X, Y)
    assert list(report.layers) == ["used"]


def test_a_batch_of_one_and_one_unit():
    report = BiasShiftProbe(nn.Linear(8, 3)).measure(X[:1], Y[:1])
    assert report[""].shift_fraction == pytest.approx(1.0)
    one = BiasShiftProbe(nn.Linear(8, 1), fisher="empirical").measure(X, X[:, :1])
    assert one[""].units == 1


def test_iterations_that_do_not_suffice_are_told():
    with pytest.warns(
        RuntimeWarning, match=r"conjugate gradients in layer '3' stopped after max_iterations=2"
    ):
        report = BiasShiftProbe(net(nn.ReLU), ("3",), solver="cg", max_iterations=2).measure(X, Y)
    assert report["3"].residual > 1e-4
