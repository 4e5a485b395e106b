"""The audit: what it measures, its rivals, its closed form, and what defences cost."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from pullback.methods.dia import (
    Clip,
    Compose,
    GaussianNoise,
    Prune,
    audit,
    cosine_utility,
    one_step_utility,
    privacy_utility,
    psnr,
)
from pullback.methods.dia.tests.cases import LOSS, ViT, lenet, perceptron, picture, seeded
from pullback.testing.tools import flags, global_rng, gradients, hooks, same, values

QUICK: dict[str, Any] = {"max_iters": 120, "bounds": (0.0, 1.0)}


def rows(report):
    return {score.name: score for score in report.scores}


def test_a_client_with_dropout_is_attacked_with_masks():
    model, x, y = perceptron(0.25, side=8, width=64), picture(8, 2), torch.tensor([1, 3])
    report = audit(model, LOSS, x, y, reference=picture(8, 9)[2:], **QUICK)
    assert list(rows(report)) == ["attack", "one colour (mean)", "nearest reference"]
    assert (report.mask_accuracy or 0) > 0.9
    assert report.psnr == pytest.approx(psnr(report.images, x).mean().item())
    assert report.psnr > rows(report)["one colour (mean)"].psnr.mean() + 3
    assert report.labels_right is None
    assert list(report.result.masks) == ["3#0", "6#0"]
    assert report.ssim == pytest.approx(rows(report)["attack"].ssim.mean().item())


def test_a_client_without_dropout_is_attacked_without_masks():
    model, x, y = perceptron(0.25, side=8, width=64).eval(), picture(8), torch.tensor([1])
    report = audit(model, LOSS, x, y, **QUICK)
    assert report.mask_accuracy is None
    assert report.result.masks == {}


def test_the_rivals_are_the_best_of_their_kind():
    model, x, y = perceptron(0.0, side=8), picture(8, 2), torch.tensor([1, 3])
    reference = torch.cat([picture(8, 5)[2:], 0.9 * x.flip(0)])
    found = rows(audit(model, LOSS, x, y, reference=reference, max_iters=1, bounds=(0.0, 1.0)))
    best = [
        max(psnr(torch.full_like(one, c), one).item() for c in torch.linspace(0, 1, 201))
        for one in x.split(1)
    ]
    assert found["one colour (mean)"].psnr.tolist() == pytest.approx(best, abs=1e-3)
    assert torch.equal(found["nearest reference"].images, 0.9 * x)


def test_one_input_of_a_linear_layer_is_read_off():
    model, x, y = perceptron(0.5, side=8, bias=True), picture(8), torch.tensor([1])
    report = audit(model, LOSS, x, y, max_iters=1, bounds=(0.0, 1.0))
    assert torch.allclose(rows(report)["closed form"].images, x, atol=1e-9)
    assert rows(report)["closed form"].psnr.item() > 150
    assert "known exactly" in str(report)
    noisy = audit(model, LOSS, x, y, defence=GaussianNoise(0.01), max_iters=1, bounds=(0.0, 1.0))
    assert "closed form" not in rows(noisy)


def test_scores_do_not_depend_on_how_pixels_are_normalised():
    x, y = picture(8, 1), torch.tensor([1])
    mean, std = (
        torch.full((1, 1, 1), 0.4, dtype=torch.float64),
        torch.full((1, 1, 1), 0.2, dtype=torch.float64),
    )
    model = perceptron(0.0, side=8)
    bounds = ((0 - mean) / std, (1 - mean) / std)
    plain = rows(audit(model, LOSS, x, y, max_iters=1, bounds=(0.0, 1.0)))["one colour (mean)"]
    scaled = rows(audit(model, LOSS, (x - mean) / std, y, max_iters=1, bounds=bounds))["one colour (mean)"]
    assert scaled.psnr.item() == pytest.approx(plain.psnr.item(), abs=1e-9)
    assert scaled.ssim.item() == pytest.approx(plain.ssim.item(), abs=1e-9)
    free = rows(audit(model, LOSS, 7 * x, y, max_iters=1))["one colour (mean)"]
    span = (x.max() - x.min()).item()
    assert free.psnr.item() == pytest.approx(plain.psnr.item() + 20 * math.log10(span), abs=1e-9)


def test_reconstructions_are_put_into_the_order_of_the_originals():
    model, x, y = perceptron(0.25, side=8), picture(8, 3), torch.tensor([1, 1, 1])
    turned = x[[2, 0, 1]]
    report = audit(model, LOSS, x, y, max_iters=1, bounds=(0.0, 1.0), init=turned)
    assert torch.equal(report.result.images, turned)
    assert torch.equal(report.images, x)


def test_labels_can_be_inferred():
    model, x, y = perceptron(0.25, bias=True), picture(4), torch.tensor([4])
    report = audit(model, LOSS, x, y, infer_labels=True, max_iters=1)
    assert report.labels_right
    assert report.labels.tolist() == [4]
    assert "labels inferred: right" in str(report)


def test_the_report_prints_as_a_table():
    model, x, y = perceptron(0.25), picture(4), torch.tensor([4])
    text = str(audit(model, LOSS, x, y, max_iters=20, bounds=(0.0, 1.0)))
    lines = text.splitlines()
    assert lines[0].split() == ["PSNR", "dB", "best", "SSIM"]
    assert [line.split()[0] for line in lines[1:3]] == ["attack", "one"]
    assert "max_steps after 20 iterations" in text
    assert "dropout masks found: " in text


def test_the_model_is_left_as_it_was():
    model = seeded(
        nn.Sequential(*perceptron(0.25), nn.Unflatten(1, (5, 1)), nn.BatchNorm1d(5), nn.Flatten())
    ).double()
    model.train()
    x, y = picture(4, 2), torch.tensor([4, 1])
    before = [hooks(model), flags(model), gradients(model), values(model), global_rng()]
    report = audit(model, LOSS, x, y, max_iters=3)
    assert same(before, [hooks(model), flags(model), gradients(model), values(model), global_rng()])
    assert any("batch statistics" in note for note in report.notes)
    assert "note: the client normalised" in str(report)


def test_vectors_have_no_ssim():
    model = seeded(nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 4))).double()
    x = torch.rand(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    report = audit(model, LOSS, x, torch.tensor([1]), max_iters=3)
    assert report.ssim is None
    assert rows(report)["one colour (mean)"].images.unique().numel() == 1


def test_the_same_seed_gives_the_same_report():
    model, x, y = perceptron(0.25), picture(4), torch.tensor([4])
    one, again, other = (audit(model, LOSS, x, y, max_iters=5, seed=seed) for seed in (3, 3, 4))
    assert same(one.gradients, again.gradients)
    assert torch.equal(one.images, again.images)
    assert not same(one.gradients, other.gradients)


@pytest.mark.parametrize("make", [lenet, ViT], ids=["lenet", "vit"])
def test_other_architectures(make):
    report = audit(seeded(make()).train(), LOSS, picture(8, 1, torch.float32), torch.tensor([1]), max_iters=5)
    assert (report.mask_accuracy or 0) > 0.5
    assert not report.leak.exact


def test_dropout_without_a_name_is_refused():
    class Functional(nn.Module):
        def forward(self, x):
            return functional.dropout(x, 0.5, self.training)

    model = seeded(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), Functional(), nn.Linear(8, 5))).double()
    x, y = picture(4), torch.tensor([1])
    with pytest.raises(ValueError, match=r"got dropout\(\)"):
        audit(model.train(), LOSS, x, y, max_iters=2)
    assert audit(model.eval(), LOSS, x, y, max_iters=2).mask_accuracy is None
    assert audit(model.train(), LOSS, x, y, max_iters=2, masks=None).mask_accuracy is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 1, 4, 4, dtype=torch.long)}, "x must be a floating tensor"),
        ({"x": torch.ones(1, 1, 4, 4, dtype=torch.float64)}, "x must not be constant"),
        ({"reference": torch.ones(3, 1, 5, 5)}, r"reference must be of shape \(any, 1, 4, 4\)"),
        ({"reference": torch.ones(0, 1, 4, 4)}, "reference must hold images, got none"),
        ({"bounds": (1.0, 0.0)}, "bounds must be in order"),
        ({"max_iters": 0}, "max_iters must be >= 1"),
        ({"defence": lambda rows: [0 * row for row in rows]}, "gradients must not all be zero"),
    ],
    ids=["integers", "constant", "reference", "no-reference", "bounds", "budget", "silent"],
)
def test_what_makes_no_sense_is_refused(change, message):
    given: dict[str, Any] = {"x": picture(4), "y": torch.tensor([1]), "max_iters": 2, **change}
    x, y = given.pop("x"), given.pop("y")
    with pytest.raises((TypeError, ValueError), match=message):
        audit(perceptron(0.25), LOSS, x, y, **given)


def test_frozen_models_share_nothing():
    with pytest.raises(ValueError, match="model must have parameters that require gradients"):
        audit(perceptron().requires_grad_(False), LOSS, picture(4), torch.tensor([1]))


# --- defences -------------------------------------------------------------------------------------------------------


def test_defences_hide_and_cost():
    model, x, y = perceptron(0.0, side=8, width=64), picture(8), torch.tensor([1])
    defences = {
        "none": None,
        "clip": Clip(0.01),
        "noise": GaussianNoise(0.05),
        "both": Compose(Clip(1.0), Prune(0.99)),
    }
    table = {row.name: row for row in privacy_utility(model, LOSS, x, y, defences, dropout=(0.5,), **QUICK)}
    assert list(table) == [*defences, "dropout 0.5"]
    assert table["none"].utility == pytest.approx(1.0)
    assert table["clip"].utility == pytest.approx(1.0)
    assert table["none"].psnr > table["noise"].psnr + 5
    assert table["none"].psnr > table["both"].psnr + 5
    assert max(table[name].utility for name in ("noise", "both", "dropout 0.5")) < 0.95
    assert (table["dropout 0.5"].report.mask_accuracy or 0) > 0.9
    assert table["noise"].ssim == table["noise"].report.ssim
    assert model[3].p == 0.0


def test_utilities():
    a = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    b = [torch.tensor([0.0, 3.0]), torch.tensor([4.0])]
    assert cosine_utility(a, a) == pytest.approx(1.0)
    assert cosine_utility(a, b) == pytest.approx(16 / 25)
    assert cosine_utility([0 * row for row in a], b) == 0.0
    model, x, y = perceptron(0.25), picture(4, 4), torch.tensor([1, 2, 3, 0])
    before = values(model)
    true = torch.autograd.grad(LOSS(model.eval()(x), y), list(model.parameters()))
    model.train()
    utility = one_step_utility(model, LOSS, x, y, lr=0.01)
    slope = sum(float(g.square().sum()) for g in true)
    assert utility(true, true) == pytest.approx(0.01 * slope, rel=0.05)
    assert utility([-g for g in true], true) < 0
    assert same(values(model), before)
    assert model.training
