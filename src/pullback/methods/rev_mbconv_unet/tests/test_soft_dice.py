"""Soft Dice against its formula, against MONAI, and at its ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.losses import DiceLoss
from monai.metrics import DiceMetric

from pullback.methods.rev_mbconv_unet import dice_score, soft_dice
from pullback.methods.rev_mbconv_unet.tests import reference


def example(dims=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (2, 3, *(4, 5, 6)[:dims])
    return torch.randn(shape, generator=g).double(), torch.rand(shape, generator=g).double() > 0.6


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_equals_the_formula(dims):
    scores, target = example(dims)
    wanted = reference.soft_dice_loss(reference.sigmoid(scores.numpy()), target.double().numpy())
    assert float(soft_dice(scores, target)) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "none"])
@pytest.mark.parametrize("batch", [False, True])
def test_equals_monai_with_gradient(activation, batch):
    scores, target = example()
    scores = scores.sigmoid() if activation == "none" else scores
    peer = DiceLoss(sigmoid=activation == "sigmoid", softmax=activation == "softmax", batch=batch)
    ours, theirs = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    loss, wanted = soft_dice(ours, target, activation=activation, batch=batch), peer(theirs, target.double())
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-12)
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


def test_perfect_disjoint_and_empty():
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., :2] = True
    assert float(soft_dice(mask.float(), mask, activation="none")) == pytest.approx(0.0, abs=1e-6)
    assert float(soft_dice((~mask).float(), mask, activation="none")) == pytest.approx(1.0, abs=1e-5)
    nothing = torch.zeros_like(mask)
    assert float(soft_dice(nothing.float(), nothing, activation="none")) == 0.0
    assert dice_score(mask, mask).item() == 1.0
    assert dice_score(~mask, mask).item() == 0.0
    assert dice_score(nothing, nothing).item() == 1.0


def test_score_equals_monai():
    scores, target = example()
    wanted: Any = DiceMetric(include_background=True, ignore_empty=False)(
        (scores > 0).float(), target.float()
    )
    torch.testing.assert_close(dice_score(scores > 0, target), wanted.double(), rtol=1e-6, atol=1e-6)


def test_half_precision_sums_do_not_overflow():
    scores = torch.full((1, 1, 512, 512), 10.0, dtype=torch.float16)
    assert float(soft_dice(scores, torch.ones_like(scores))) == pytest.approx(0.0, abs=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert soft_dice(scores, torch.ones_like(scores)).dtype == torch.float32


def test_what_makes_no_sense_is_refused():
    scores, target = example()
    with pytest.raises(ValueError, match=r"target must be .* got .*\(2, 3, 4, 5\)"):
        soft_dice(scores, target[..., 0])
    with pytest.raises(
        ValueError, match="activation must be one of 'sigmoid', 'softmax', 'none', got 'tanh'"
    ):
        soft_dice(scores, target, activation="tanh")  # ty: ignore[invalid-argument-type]
    with pytest.raises(ValueError, match=r"smooth must be >= 0, got -1"):
        soft_dice(scores, target, smooth=-1.0)
    with pytest.raises(TypeError, match="scores must be a floating tensor, got"):
        soft_dice(target, target)
    with pytest.raises(TypeError, match="prediction must be a bool tensor, got"):
        dice_score(scores, target)
    with pytest.raises(ValueError, match="target must be"):
        dice_score(target, target[:1])
