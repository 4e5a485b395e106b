"""The network against its equations, plain automatic differentiation, and what its page promises."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from pullback.methods.revcol import (
    CONFIGURATIONS,
    ConvNeXtBlock,
    RevCol,
    RevColOutput,
    revcol,
    set_reversible,
    supervised_loss,
)
from pullback.methods.revcol.layers import StochasticDepth
from pullback.methods.revcol.tests import reference
from pullback.methods.revcol.tests.cases import (
    BLOCKS,
    begun,
    draw,
    gradients,
    images,
    net,
    off,
    relative,
    targets,
)

untyped: Any = RevCol


# --- equations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 3])
def test_features_of_every_column_are_those_of_the_equations(columns):
    model, x = net(columns), images()
    wanted = reference.columns(model.state_dict(), x, columns, BLOCKS)
    for column in range(columns):
        for ours, theirs in zip(model.column_features(x, column), wanted[column], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(model.forward_features(x), wanted[-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    scores = reference.head(model.state_dict(), "classifiers.0", wanted[-1][-1])
    torch.testing.assert_close(model(x), scores, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("columns", [4, 8])
def test_supervised_columns_heads_decoders_and_loss_are_those_of_the_equations(columns):
    model, x = net(columns, intermediate_supervision=True), images()
    p = model.state_dict()
    found = reference.columns(p, x, columns, BLOCKS)
    watched = [found[i][-1] for i in range(columns) if (i + 1) % (columns // 4) == 0]
    out = model(x)
    assert isinstance(out, RevColOutput)
    assert (len(out.logits), len(out.images)) == (4, 3)
    logits = [reference.head(p, f"classifiers.{i}", c) for i, c in enumerate(watched)]
    rebuilt = [reference.decoder(p, f"decoders.{i}", c) for i, c in enumerate(watched[:-1])]
    for ours, theirs in zip((*out.logits, *out.images), (*logits, *rebuilt), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for f, c in ((3.0, 0.7), (4.0, 0.8), (0.0, 0.0)):
        ours = model.loss(out, x, targets(), reconstruction=f, early=c)
        torch.testing.assert_close(
            ours, reference.loss(logits, rebuilt, x, targets(), f, c), rtol=1e-9, atol=1e-9
        )
    torch.testing.assert_close(model.eval()(x), logits[-1], rtol=1e-9, atol=1e-9)


def test_the_loss_in_closed_form():
    zeros, x, t = torch.zeros(4, 10), torch.full((4, 1, 8, 8), 0.3), torch.arange(4)
    half, ten = torch.log(torch.tensor(2.0)), torch.log(torch.tensor(10.0))
    total = supervised_loss([zeros] * 4, [torch.zeros_like(x)] * 3, x, t)
    torch.testing.assert_close(total, 3.0 * half * (1 + 2 / 3 + 1 / 3) + 0.7 * ten * (1 + 2 + 3) / 4 + ten)
    torch.testing.assert_close(supervised_loss([zeros], [], x, t), ten)
    dark = supervised_loss([zeros, zeros], [torch.full_like(x, -50.0)], torch.zeros_like(x), t, early=0.0)
    torch.testing.assert_close(dark, torch.tensor(3.0 * 0.01 * 50.0) + ten)  # black is cut to 0.01
    mixed = torch.full((4, 10), 0.1)
    torch.testing.assert_close(supervised_loss([zeros], [], x, mixed, label_smoothing=0.1), ten)


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [0, 1, 2, 4])
@pytest.mark.parametrize("supervised", [False, True])
def test_gradients_are_those_of_plain_autograd(every, supervised):
    model = net(4, anchor_every=every, intermediate_supervision=supervised, drop_path=0.3)
    x = images(4)
    out, ours = gradients(model, x)
    plainly, theirs = gradients(copy.deepcopy(model).set_reversible(False), x)
    assert all(map(torch.equal, *([o.logits if supervised else [o] for o in (out, plainly)])))
    assert relative(ours, theirs) < 1e-10
    checkpointed = copy.deepcopy(model)
    checkpointed.recompute = "checkpoint"
    assert relative(gradients(checkpointed, x)[1], theirs) < 1e-12


def test_gradients_in_float32_with_the_authors_factors():
    x = images(4, 64)
    assert off(begun(16, anchor_every=4), x) < 1e-4
    assert off(begun(16, anchor_every=1), x) < 2 * off(begun(16, recompute="none"), x)


def test_rounding_errors_grow_with_columns_for_the_authors_factors_and_not_for_one():
    x = images(2, 64)
    short, long = (off(begun(columns, anchor_every=0), x) for columns in (4, 12))
    assert long > 100 * short
    assert off(begun(12, 1.0, anchor_every=0), x) < 1e-4 < long


def test_black_pixels_at_the_start_need_an_anchor_in_front_of_every_column_or_standardisation():
    black = images(4, 64)
    black[:, :, :40] = 0.0
    assert off(begun(4, anchor_every=0), black) > 0.1  # a trap of the method, see the page
    assert off(begun(4, anchor_every=1), black) < 1e-4
    assert off(begun(4, anchor_every=0), (black - 0.4) / 0.3) < 1e-3


def test_factors_of_the_first_column_have_a_gradient_of_exactly_zero():
    for model in (net(4), net(4).set_reversible(False)):
        _, found = gradients(model, images())
        by_name = dict(zip((name for name, _ in model.named_parameters()), found, strict=True))
        first = [by_name[f"columns.steps.{k}.scale"] for k in range(4)]
        assert all(torch.equal(each, torch.zeros_like(each)) for each in first)
        assert all(by_name[f"columns.steps.{k}.scale"].abs().min() > 0 for k in range(4, 16))


def test_a_frozen_stem_keeps_no_column_from_learning():
    model = net(4)
    model.stem.requires_grad_(False)
    loss = model(images()).square().sum()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    assert all(float(g.abs().max()) > 0 for n, g in zip(names, found, strict=True) if not n.endswith("scale"))


def test_a_factor_of_zero_is_raised_and_the_caller_keeps_its_lists():
    channels, blocks = [3, 4], [1, 1]
    torch.manual_seed(0)
    model: Any = RevCol(4, channels, blocks, 5, intermediate_supervision=True, layer_scale=0.5)
    assert (channels, blocks) == ([3, 4], [1, 1])
    with torch.no_grad():
        for step in model.columns.steps:
            step.scale.zero_()
    x = draw(2, 3, 16, 16, dtype=torch.float32).sigmoid()
    loss = model.loss(model(x), x, targets())
    assert all(torch.equal(s.scale, torch.full_like(s.scale, 1e-3)) for s in model.columns.steps)
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert all(bool(each.isfinite().all()) for each in found)


def test_at_the_start_blocks_are_nearly_identities():
    torch.manual_seed(0)
    model: Any = RevCol(1, (4, 6), (1, 1), 3)
    assert all(torch.equal(s.scale, torch.full_like(s.scale, 0.5)) for s in model.columns.steps)
    block, x = model.columns.steps[0].fn.blocks[0], draw(2, 4, 5, 5, dtype=torch.float32)
    torch.testing.assert_close(block(x), x, rtol=0, atol=1e-6)
    assert not torch.equal(block(x), x)


def test_stochastic_depth_drops_examples_and_keeps_the_mean():
    torch.manual_seed(0)
    layer, x = StochasticDepth(0.25), torch.ones(4000, 2, 2)
    y = layer(x)
    kept = y[:, 0, 0] > 0
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / 0.75))
    assert torch.equal(y[~kept], torch.zeros_like(y[~kept]))
    assert abs(float(kept.double().mean()) - 0.75) < 0.03
    assert layer.eval()(x) is x
    model: Any = RevCol(2, (2, 2), (2, 3), 2, drop_path=0.4)
    rates = [b.drop_path.rate for s in model.columns.steps for b in s.fn.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4] * 2)


# --- names, features, refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "millions"), [("tiny", 30), ("small", 60), ("base", 138)])
def test_named_networks_have_the_papers_sizes(name, millions):
    with torch.device("meta"):
        model = revcol(name)
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6) == pytest.approx(millions, abs=1)
    assert len(model.columns.steps) == 4 * CONFIGURATIONS[name].columns
    with torch.device("meta"):
        assert sum(p.numel() for p in revcol("large", num_classes=10).parameters()) > 2e8


def test_it_is_a_backbone_of_a_pyramid():
    model = net(2).eval()
    with torch.no_grad():
        found = model.forward_features(images(2, 64))
    assert model.feature_info.channels() == [3, 4, 5, 6]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    sizes = [(c, 64 // r) for c, r in zip((3, 4, 5, 6), (4, 8, 16, 32), strict=True)]
    assert [each.shape for each in found] == [(2, c, s, s) for c, s in sizes]
    wide = model.forward_features(draw(1, 3, 32, 96))
    assert wide[-1].shape == (1, 6, 1, 3)
    torch.stack([each.sum() for each in wide]).sum().backward()


def test_the_switch_of_all_sequences_and_that_of_the_network_agree():
    model, x = net(4), images()
    wanted = gradients(model, x)[1]
    model.recompute = "none"
    assert relative(gradients(model, x)[1], wanted) < 1e-10
    assert not model.columns.reversible
    assert set_reversible(model) == 1
    assert "recompute='none'" in repr(model)
    block = ConvNeXtBlock(4, kernel=7)
    assert block(draw(1, 4, 8, 8, dtype=torch.float32)).shape == (1, 4, 8, 8)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: net(2)(draw(2, 3, 40, 32)), ValueError, r"images must have sides that 32 divides, got \(40, 32\)"),
        (lambda: net(2)(draw(2, 1, 32, 32)), ValueError, r"images must be of shape \(any, 3, any, any\)"),
        (lambda: net(2)(torch.ones(2, 3, 32, 32).byte()), TypeError, r"images must be a floating tensor"),
        (lambda: net(2).column_features(images(), 2), ValueError, r"column must be from 0 to 1, got 2"),
        (lambda: RevCol(6, intermediate_supervision=True), ValueError, r"multiple of 4 .*, got 6. Use 8"),
        (lambda: RevCol(channels=(1, 2), blocks=(1,)), ValueError, r"one entry for each level, got 2 and 1"),
        (lambda: untyped(channels=8), TypeError, r"channels must be of type list or tuple, got int"),
        (lambda: RevCol(kernel=2), ValueError, r"kernel must be odd, got 2"),
        (lambda: RevCol(drop_path=1), ValueError, r"drop_path must be below 1"),
        (lambda: untyped(recompute="some"), ValueError, r"recompute must be one of 'reversible'"),
        (lambda: revcol("tinny"), ValueError, r"name must be one of .*Did you mean 'tiny'"),
        (lambda: supervised_loss([draw(2, 3)] * 2, [], images(), targets()), ValueError, r"got 0 for 2 heads"),
        (
            lambda: supervised_loss([draw(2, 3)] * 2, [draw(2, 3, 4, 4)], images(), targets()),
            ValueError,
            r"images must have the shape \(2, 3, 4, 4\) of what was rebuilt, got \(2, 3, 32, 32\)",
        ),
        (lambda: supervised_loss([draw(2, 3)], [], images(), targets(), early=-1), ValueError, r"early must be >= 0"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()
