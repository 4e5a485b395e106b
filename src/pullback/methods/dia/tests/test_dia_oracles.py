"""The attack against its equations: reference by hand, derivatives, limiting cases, closed forms."""

from typing import Any

import pytest
import torch
from torch import nn

from pullback.core.inversion import GradientInversion
from pullback.methods.dia import (
    DropoutInversion,
    attack,
    first_layer_leak,
    mask_accuracy,
    match,
    psnr,
    record_masks,
)
from pullback.methods.dia.attack import mask_share
from pullback.methods.dia.tests import reference
from pullback.methods.dia.tests.cases import LOSS, client, perceptron, picture
from pullback.testing.tools import same

FIXED: dict[str, Any] = {"tolerance": 0.0, "stop_patience": None}


def inversion(model, masks="search", **settings: Any):
    given: dict[str, Any] = {"max_iters": 30, "bounds": (0.0, 1.0), **FIXED, **settings}
    return DropoutInversion(model, LOSS, masks=masks, **given)


def solved(model, x, y, masks="search", seed=0, **settings):
    gradients, truth = client(model, x, y)
    found = inversion(model, truth if masks == "truth" else masks, **settings)
    return found.reconstruct(gradients, labels=y, input_shape=x.shape, seed=seed), truth


@pytest.fixture(name="case")
def _case():
    x, y = picture(4, 2), torch.tensor([1, 4])
    return perceptron(0.3), x, y


def test_every_iteration_is_that_of_the_reference(case):
    model, x, y = case
    gradients, _ = client(model, x, y)
    settings = {"lr": 0.05, "tv": 1e-3, "mask_reg": 1e-2}
    start = inversion(model, max_iters=1, **settings).reconstruct(gradients, labels=y, input_shape=x.shape)
    result = inversion(model, max_iters=25, **settings).reconstruct(gradients, labels=y, input_shape=x.shape)
    weights = [p.detach() for p in model.parameters()]
    masks, rates = list(start.masks.values()), [0.3, 0.3]
    for epsilon, tolerance in ((0.0, 1e-9), (1e-8, 1e-5)):  # the paper's epsilon is far below what it adds to
        losses, _ = reference.attack(
            weights,
            gradients,
            start.images,
            masks,
            rates,
            y,
            25,
            bounds=(0.0, 1.0),
            epsilon=epsilon,
            **settings,
        )
        assert result.trace["loss"].tolist() == pytest.approx(losses, rel=tolerance)


def test_starts_are_normal_images_and_bernoulli_masks():
    model, x, y = perceptron(0.3, width=3000), picture(4), torch.tensor([1])
    result, truth = solved(model, x, y, max_iters=1)
    for mask in result.masks.values():
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert mask.mean().item() == pytest.approx(0.7, abs=5 * (0.21 / 3000) ** 0.5)
    assert list(result.masks) == list(truth) == ["3#0", "6#0"]
    one, other = result.masks.values()
    assert not torch.equal(one, other)


def test_without_dropout_it_is_the_plain_inversion_bit_for_bit(case):
    _, x, y = case
    model = perceptron(0.0)
    gradients, truth = client(model, x, y)
    assert truth == {}
    plain = GradientInversion(model, LOSS, max_iters=30, bounds=(0.0, 1.0), **FIXED)
    expected = plain.reconstruct(gradients, labels=y, input_shape=x.shape)
    result = inversion(model).reconstruct(gradients, labels=y, input_shape=x.shape)
    assert same(result.trace, expected.trace)
    assert torch.equal(result.images, expected.images)
    assert result.masks == {}


def test_no_masks_is_the_plain_inversion_of_the_whole_network(case):
    model, x, y = case
    gradients, _ = client(model, x, y)
    plain = GradientInversion(model, LOSS, max_iters=30, bounds=(0.0, 1.0), **FIXED)
    expected = plain.reconstruct(gradients, labels=y, input_shape=x.shape)
    assert same(
        inversion(model, None).reconstruct(gradients, labels=y, input_shape=x.shape).trace, expected.trace
    )


def hold(monkeypatch, truth):
    """Search with masks that start at the truth and are put back to it after every step."""
    flat = torch.cat([mask.reshape(-1) for mask in truth.values()])

    class Held(attack._DropoutProblem):
        def start(self, restart):
            return {**super().start(restart), "masks": flat.clone()}

        def project_(self, leaves):
            super().project_(leaves)
            if "masks" in leaves:
                leaves["masks"].detach().copy_(flat)

    monkeypatch.setattr(attack, "_DropoutProblem", Held)


def test_with_masks_held_at_the_truth_it_is_the_well_informed_attack_bit_for_bit(case, monkeypatch):
    model, x, y = case
    informed, truth = solved(model, x, y, "truth")
    hold(monkeypatch, truth)
    held, _ = solved(model, x, y, mask_reg=0.0)
    assert same(held.trace, informed.trace)
    assert torch.equal(held.images, informed.images)
    assert same(held.masks, informed.masks)


def test_at_the_truth_only_the_priors_are_left(case, monkeypatch):
    model, x, y = case
    _, truth = client(model, x, y)
    hold(monkeypatch, truth)
    result, _ = solved(model, x, y, init=x, max_iters=1, tv=0.2, mask_reg=0.4)
    assert result.trace["match"].item() == pytest.approx(0.0, abs=1e-12)
    priors = 0.2 * reference.total_variation(x) + 0.4 * reference.mask_penalty(
        list(truth.values()), [0.3, 0.3]
    )
    assert result.trace["loss"].item() == pytest.approx(priors.item(), rel=1e-12)
    assert priors > 0.01


def test_slopes_are_those_of_finite_differences(monkeypatch):
    model, x, y = perceptron(0.3, width=5, side=2), picture(2, 2), torch.tensor([1, 3])
    gradients, _ = client(model, x, y)
    tried = inversion(model, tv=0.1, mask_reg=0.1)
    evaluated = []

    class Tried(attack._DropoutProblem):
        def evaluate(self, leaves):
            if not evaluated:
                evaluated.append(True)
                masks = torch.rand(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
                given = (x.clone().requires_grad_(), masks.requires_grad_())
                assert torch.autograd.gradcheck(lambda images, masks: super(Tried, self).evaluate(
                    {"images": images, "masks": masks})[0], given)  # fmt: skip
            return super().evaluate(leaves)

    before, attack._DropoutProblem = attack._DropoutProblem, Tried  # ty: ignore[invalid-assignment]
    try:
        tried.reconstruct(gradients, labels=y, input_shape=x.shape)
    finally:
        attack._DropoutProblem = before
    assert evaluated


def test_the_penalty_on_the_share_of_dropped_units():
    masks = [
        torch.rand(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (3, 7)
    ]
    rates = [0.3, 0.6]
    expected = reference.mask_penalty(masks, rates).item()
    assert mask_share(masks, rates).item() == pytest.approx(expected, rel=1e-14)
    inputs = tuple(mask.requires_grad_() for mask in masks)
    assert torch.autograd.gradcheck(lambda *given: mask_share(given, rates), inputs)


def test_columns_of_dropped_units_are_zero_and_the_attack_finds_the_masks():
    model, x, y = perceptron(0.4, width=64, side=8), picture(8), torch.tensor([2])
    gradients, truth = client(model, x, y)
    for weight, mask in zip(gradients[1:], truth.values(), strict=True):
        assert torch.equal((weight != 0).any(0), mask[0] != 0)
    result, _ = solved(model, x, y, max_iters=300)
    assert mask_accuracy(result.masks, truth) >= 0.99
    start, _ = solved(model, x, y, max_iters=1, mask_init="zero_columns")
    assert mask_accuracy(start.masks, truth) == 1.0


def test_zero_columns_of_a_batch_are_units_that_all_dropped():
    model, x, y = perceptron(0.6, width=60), picture(4, 2), torch.tensor([2, 3])
    _, truth = client(model, x, y)
    start, _ = solved(model, x, y, max_iters=1, mask_init="zero_columns")
    plain, _ = solved(model, x, y, max_iters=1)
    for name, true in truth.items():
        gone = (true == 0).all(0)
        assert gone.any()
        assert (start.masks[name][:, gone] == 0).all()
        assert torch.equal(start.masks[name][:, ~gone], plain.masks[name][:, ~gone])


def test_rows_of_the_first_layer_are_parallel_to_the_input_under_dropout():
    model, x, y = perceptron(0.5, bias=True), picture(4), torch.tensor([2])
    gradients, _ = client(model, x, y)
    leak = first_layer_leak(gradients)
    assert leak.alignment == pytest.approx(1.0, abs=1e-10)
    assert torch.allclose(leak.input, x.flatten(), atol=1e-10)  # ty: ignore[invalid-argument-type]


def test_dropout_stops_the_attack_that_ignores_it_and_not_the_one_that_searches():
    model, x, y = perceptron(0.5, width=96, side=8), picture(8), torch.tensor([2])
    budget = {"max_iters": 250, "schedule": "milestones"}
    scores = {name: psnr(solved(model, x, y, m, **budget)[0].images, x).item() for name, m in
              (("ignorant", None), ("search", "search"), ("informed", "truth"))}  # fmt: skip
    assert scores["search"] > scores["ignorant"] + 8
    assert scores["informed"] > scores["ignorant"] + 8


def test_a_batch_is_found_in_some_order_with_its_masks():
    model, x, y = perceptron(0.2, width=96, side=4), picture(4, 2), torch.tensor([3, 3])
    result, truth = solved(model, x, y, max_iters=400)
    order = match(result.images, x)
    assert psnr(result.images[order], x).min() > 15
    assert mask_accuracy(result.masks, truth, order=order) > 0.95


def test_recorded_masks_are_draws_and_not_zeros_of_the_output():
    model = perceptron(0.5, activation=nn.ReLU)
    with record_masks(model) as masks:
        model(picture(4, 8))
    share = torch.cat([mask.flatten() for mask in masks.values()]).mean().item()
    assert share == pytest.approx(
        0.5, abs=5 * 0.5 / (2 * 8 * 24) ** 0.5
    )  # half of the units are zero by ReLU alone
