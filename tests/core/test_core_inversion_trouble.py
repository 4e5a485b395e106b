"""Gradient inversion: arguments that make no sense, and modes of the caller."""

import math

import pytest
import torch
from inversion_parts import batch, perceptron, seeded, shared
from torch import nn
from torch.nn import functional

from pullback.core.checks import NonFiniteError
from pullback.core.inversion import GradientInversion
from pullback.core.inversion_victim import named_gradients
from pullback.testing.tools import same, values

LOSS = functional.cross_entropy


def attack(model, loss_fn=LOSS, **settings):
    return GradientInversion(model, loss_fn, **{"max_iters": 12, "tolerance": 0.0, **settings})


def attacked(model, x, y, loss_fn=LOSS, **settings):
    rows = shared(model, x, y, loss_fn)
    return attack(model, loss_fn, **settings).reconstruct(rows, labels=y, input_shape=x.shape)


def works(result):
    return (
        result.status == "max_steps"
        and bool(result.images.isfinite().all())
        and result.loss < result.trace["loss"][0]
    )


# --- arguments ------------------------------------------------------------------------------------------------------


def _spoiled(rows, value):
    return [rows[0].clone().index_fill_(0, torch.tensor([0]), value), *rows[1:]]


BAD_GRADIENTS = {
    "zeros": (
        lambda rows: [torch.zeros_like(r) for r in rows],
        "gradients must not all be zero, got zeros only",
    ),
    "nan": (lambda rows: _spoiled(rows, math.nan), r"gradients\['0.weight'\] must be finite, got NaN or Inf"),
    "inf": (lambda rows: _spoiled(rows, math.inf), r"gradients\['0.weight'\] must be finite"),
    "few": (lambda rows: rows[:3], "one entry for each of the 4 parameters that require gradients, got 3"),
    "shape": (
        lambda rows: [rows[0].mT, *rows[1:]],
        r"gradients\['0.weight'\] must have the parameter's shape \(12, 6\)",
    ),
    "order": (lambda rows: list(rows)[::-1], r"gradients\['0.weight'\] must have the parameter's shape"),
    "name": (lambda rows: {"3.weight": rows[0]}, "named as the model's parameters, got '3.weight'"),
    "empty": (lambda rows: {}, "gradients must not be empty"),
    "integers": (
        lambda rows: [rows[0].long(), *rows[1:]],
        r"gradients\['0.weight'\] must be a floating tensor",
    ),
    "tensor": (lambda rows: rows[0], "gradients must be a list of tensors or a mapping"),
    "no-grad": (lambda rows: nn.Linear(2, 2), "a model after backward"),
}


@pytest.mark.parametrize("case", BAD_GRADIENTS)
def test_gradients_that_do_not_fit_are_refused(case):
    change, message = BAD_GRADIENTS[case]
    model = perceptron()
    x, y = batch()
    rows = change(shared(model, x, y))
    with pytest.raises((TypeError, ValueError), match=message):
        attack(model).reconstruct(rows, labels=y, input_shape=x.shape)
    if case == "nan":
        with pytest.raises(NonFiniteError):
            named_gradients(model, rows)


def test_none_counts_as_zero():
    model = perceptron()
    rows = shared(model, *batch())
    assert torch.equal(named_gradients(model, [None, *rows[1:]])["0.weight"], torch.zeros_like(rows[0]))


BAD_SETTINGS = {
    "reversed": ({"bounds": (1.0, 0.0)}, "bounds must be in order everywhere, got 1.0 and 0.0"),
    "equal": (
        {"bounds": (torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]))},
        "bounds must be in order everywhere",
    ),
    "one": ({"bounds": 1.0}, "bounds must be a pair, got 1.0"),
    "infinite": ({"bounds": (0.0, math.inf)}, "bounds must be finite, got inf"),
    "nan": ({"bounds": (torch.tensor([math.nan, 0.0]), 1.0)}, "bounds must be finite"),
    "tv": ({"tv": -1e-5}, "tv must be >= 0, got -1e-05"),
    "iterations": ({"max_iters": 0}, "max_iters must be >= 1, got 0"),
    "restarts": ({"restarts": 0}, "restarts must be >= 1, got 0"),
    "init": ({"init": "random"}, "init must be one of 'normal', 'uniform', 'zeros', got 'random'"),
    "boxed-lbfgs": (
        {"bounds": (0.0, 1.0), "optimizer": "lbfgs"},
        "bounds must be None with optimizer='lbfgs'",
    ),
    "matching": ({"matching": "l2"}, "kind must be one of"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_settings_that_make_no_sense_are_refused(case):
    settings, message = BAD_SETTINGS[case]
    with pytest.raises((TypeError, ValueError), match=message):
        attack(perceptron(), **settings)


BAD_CALLS = {
    "no-batch": ({"input_shape": (6,)}, r"input_shape must begin with the batch, got \(6,\)"),
    "width": ({"input_shape": (1, 5)}, r"input_shape must fit the model, got \(1, 5\)"),
    "empty": ({"input_shape": (0, 6)}, "input_shape must be >= 1, got 0"),
    "number": ({"input_shape": 6}, "input_shape must be a sequence of sizes, batch first, got 6"),
    "labels": (
        {"labels": torch.tensor([0, 1])},
        r"labels must have one row for each of the 1 inputs, got \(2,\)",
    ),
    "class": ({"labels": torch.tensor([9])}, "labels must fit loss_fn and the output .* out of bounds"),
    "list": ({"labels": [0]}, "labels must be of type Tensor, got list"),
    "seed": ({"seed": 0.5}, "seed must be an integer, got 0.5"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_calls_that_make_no_sense_are_refused(case):
    changed, message = BAD_CALLS[case]
    model = perceptron()
    x, y = batch()
    with pytest.raises((TypeError, ValueError), match=message):
        attack(model).reconstruct(shared(model, x, y), **{"labels": y, "input_shape": x.shape, **changed})


def test_bounds_and_starts_must_fit_the_input():
    model = perceptron()
    x, y = batch()
    with pytest.raises(ValueError, match="bounds must broadcast to one input"):
        attacked(model, x, y, bounds=(torch.zeros(3), torch.ones(3)))
    with pytest.raises(ValueError, match=r"init must have the shape \(1, 6\) or \(2, 1, 6\), got \(6,\)"):
        attacked(model, x, y, init=torch.zeros(6), restarts=2)


def test_losses_that_are_no_numbers_are_refused():
    model = perceptron()
    x, y = batch()
    rows = shared(model, x, y)
    for loss_fn, message in (
        (lambda out, labels: LOSS(out, labels, reduction="none"), "loss_fn must return a 0-dim tensor"),
        (lambda out, labels: LOSS(out.detach(), labels), "loss_fn must depend on the parameters"),
        (3, "loss_fn must be a function"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            attack(model, loss_fn).reconstruct(rows, labels=y, input_shape=x.shape)


def test_labels_are_needed_where_the_output_has_no_classes():
    model = seeded(nn.Sequential(nn.Linear(6, 5), nn.Unflatten(1, (5, 1)))).double()
    x, _ = batch()
    rows = shared(model, x, torch.zeros(1, 5, 1, dtype=torch.float64), functional.mse_loss)
    with pytest.raises(ValueError, match=r"labels must be given unless the output is \[batch, classes\]"):
        attack(model, functional.mse_loss).reconstruct(rows, labels=None, input_shape=x.shape)


def test_gradients_that_do_not_depend_on_the_input_are_refused():
    model = perceptron()
    x, y = batch()
    for power in (1, 2):  # a gradient without graph, and one whose graph does not reach the input
        with pytest.raises(RuntimeError, match="gradients must depend on the inputs"):
            attack(model, lambda out, labels, power=power: (model[2].bias ** power).sum()).reconstruct(
                {"2.bias": torch.ones(4, dtype=torch.float64)}, labels=y, input_shape=x.shape
            )


# --- modes of the caller --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_the_callers_grad_mode_does_not_matter(mode):
    model = perceptron()
    x, y = batch()
    rows = shared(model, x, y)
    plain = attack(model).reconstruct(rows, labels=y, input_shape=x.shape)
    with mode():
        rows, y = [row.clone() for row in rows], y.clone()  # inference tensors in the second case
        inside = attack(model, bounds=(-9.0, 9.0)).reconstruct(rows, labels=y, input_shape=x.shape)
    assert torch.equal(inside.trace["loss"], plain.trace["loss"])
    assert not inside.images.is_inference()


def test_autocast_does_not_reach_the_attack():
    model = perceptron(torch.float32)
    x, y = batch(torch.float32)
    rows = shared(model, x, y)
    plain = attack(model).reconstruct(rows, labels=y, input_shape=x.shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = attack(model).reconstruct(rows, labels=y, input_shape=x.shape)
    assert torch.equal(inside.trace["loss"], plain.trace["loss"])


def test_gradients_shared_in_half_precision_are_attacked_in_full():
    model = perceptron(torch.float32)
    x, y = batch(torch.float32)
    rows = [row.half() for row in shared(model, x, y)]
    result = attack(model).reconstruct(rows, labels=y, input_shape=x.shape)
    assert result.images.dtype == torch.float32
    assert works(result)


def test_an_error_in_the_model_leaves_nothing_behind():
    model = perceptron()
    x, y = batch()
    rows, before = shared(model, x, y), values(model)
    model.train()

    def fail(out, labels):
        raise ArithmeticError("no loss")

    with pytest.raises(ArithmeticError, match="no loss"):
        attack(model, fail).reconstruct(rows, labels=y, input_shape=x.shape)
    assert model.training
    assert torch.is_grad_enabled()
    assert same(values(model), before)


def test_hopeless_problems_end_in_a_status():
    model = seeded(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))).double()
    x, y = batch()
    rows = shared(model, x, y)
    calls = []

    def spoiled(out, labels):
        calls.append(1)
        return LOSS(out, labels) * (math.nan if len(calls) > 6 else 1.0)

    result = attack(model, spoiled).reconstruct(rows, labels=y, input_shape=x.shape)
    assert (result.status, result.steps) == ("diverged", 6)
    assert bool(result.images.isfinite().all())
    assert math.isfinite(result.loss)
