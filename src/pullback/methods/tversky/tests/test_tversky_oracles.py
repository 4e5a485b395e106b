"""Values and gradients against the paper's equations, closed forms, and the official code."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from tversky import differentiable_tversky_v2 as official
from tversky.nn import TverskyProjection as OfficialProjection
from tversky.nn import TverskySimilarity as OfficialSimilarity

from pullback.methods.tversky import FeatureBank, TverskyProjection, TverskySimilarity
from pullback.methods.tversky.tests import reference

REDUCTIONS = tuple(itertools.product(reference.INTERSECTIONS, reference.DIFFERENCES))
SPELLING = {"ignorematch": "ignorematch", "subtractmatch": "substractmatch"}


def points(n=5, m=4, d=6, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, d, generator=g, dtype=torch.float64).to(dtype) for rows in (n, m)]


def layer_with(bank, theta=1.3, alpha=0.7, beta=0.2, **form):
    layer = TverskySimilarity(
        bank.shape[1], len(bank), theta=theta, alpha=alpha, beta=beta, dtype=bank.dtype, **form
    )
    with torch.no_grad():
        layer.feature_bank.weight.copy_(bank)
    return layer


# --- the paper, literally --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["hard", "tanh"])
@pytest.mark.parametrize("reduce", ["aggregate", "feature"])
@pytest.mark.parametrize(("intersection", "difference"), REDUCTIONS)
def test_equals_the_literal_reference(intersection, difference, reduce, gate):
    (x, y), bank = points(), points(7, 1, seed=1)[0]
    for model, normalize in itertools.product(("contrast", "ratio"), (False, True)):
        if model == "ratio" and (gate == "tanh" or (intersection, reduce) == ("softmin", "feature")):
            continue  # denominators may fall below the floor, which has a test of its own
        form = {"intersection": intersection, "difference": difference, "model": model, "reduce": reduce}
        layer = layer_with(bank, **form, gate=gate, sharpness=2.5, normalize=normalize)
        wanted = reference.similarity(
            x.tolist(), y.tolist(), bank.tolist(), 1.3, 0.7, 0.2,
            intersection_kind=intersection, difference_kind=difference, model=model, reduce=reduce,
            sharpness=2.5 if gate == "tanh" else None, normalize=normalize,
        )  # fmt: skip
        wanted = torch.tensor(wanted, dtype=torch.float64)
        torch.testing.assert_close(layer(x, y), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("difference", reference.DIFFERENCES)
@pytest.mark.parametrize("intersection", ["min", "max", "softmin"])
@pytest.mark.parametrize("gate", ["hard", "tanh"])
def test_blocks_change_nothing(intersection, difference, gate):
    (x, y), bank = points(6, 7), points(9, 1, seed=1)[0]
    outcomes = []
    for chunk in (1, 3, 7, 100, None):
        layer = layer_with(
            bank, intersection=intersection, difference=difference, reduce="feature", gate=gate, chunk=chunk
        )
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_(), *layer.parameters()]
        out = layer(*leaves[:2])
        outcomes.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for outcome in outcomes[1:]:
        for one, other in zip(outcome, outcomes[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def positive(a, b):
    return (a > 0) & (b > 0)


def plain(layer, x, y):
    """The formula on all pairs times features, for autograd."""
    form, bank = layer.form, layer.feature_bank.weight
    s, t = (x @ bank.T)[:, None], (y @ bank.T)[None]
    gx, gy = (
        (e > 0).to(e.dtype) if form.gate == "hard" else (1 + torch.tanh(form.sharpness * e)) / 2
        for e in (s, t)
    )
    functions = {
        "product": lambda a, b: a * b,
        "min": torch.minimum,
        "max": torch.maximum,
        "mean": lambda a, b: (a + b) / 2,
        "gmean": lambda a, b: torch.where(positive(a, b), torch.where(positive(a, b), a * b, 1).sqrt(), 0),
        "softmin": lambda a, b: -torch.log(torch.exp(-a) + torch.exp(-b)),
    }
    psi, both = functions[form.intersection], gx * gy
    inside = (s * both).sum(-1), (t * both).sum(-1)
    early = form.reduce == "feature" or form.intersection == "product"
    common = (psi(s, t) * both).sum(-1) if early else psi(*inside)
    mine, theirs = (s * gx * (1 - gy)).sum(-1), (t * gy * (1 - gx)).sum(-1)
    if form.difference == "subtractmatch" and form.reduce == "feature":
        mine, theirs = mine + ((s - t).relu() * both).sum(-1), theirs + ((t - s).relu() * both).sum(-1)
    elif form.difference == "subtractmatch":
        mine, theirs = mine + (inside[0] - inside[1]).relu(), theirs + (inside[1] - inside[0]).relu()
    return layer.theta * common - layer.alpha * mine - layer.beta * theirs


@pytest.mark.parametrize("gate", ["hard", "tanh"])
@pytest.mark.parametrize("reduce", ["aggregate", "feature"])
@pytest.mark.parametrize(("intersection", "difference"), REDUCTIONS)
def test_gradients_equal_those_of_the_plain_formula(intersection, difference, reduce, gate):
    (x, y), bank = points(5, 4), points(7, 1, seed=1)[0]
    if gate == "tanh" and intersection == "gmean" and reduce == "aggregate":
        bank = bank.abs()  # all sums are positive, and the gates still soft
        x, y = x.abs() / 4, y.abs() / 4
    probe = points(5, 1, d=4, seed=3)[0]
    for chunk in (None, 3):
        layer = layer_with(
            bank, intersection=intersection, difference=difference, reduce=reduce, gate=gate, sharpness=1.5,
            chunk=chunk,
        )  # fmt: skip
        leaves = [x.requires_grad_(), y.requires_grad_(), *layer.parameters()]
        for one, other in zip(
            torch.autograd.grad(layer(x, y), leaves, probe),
            torch.autograd.grad(plain(layer, x, y), leaves, probe),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk", [None, 1])
def test_ties_are_halved_as_by_torch(chunk):
    bank = torch.eye(3, dtype=torch.float64)
    x = torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64).requires_grad_()
    y = x.detach().clone().requires_grad_()
    layer = layer_with(bank, 1.0, 0.0, 0.0, intersection="min", reduce="feature", chunk=chunk)
    for grad in torch.autograd.grad(layer(x, y).sum(), [x, y]):
        assert grad.tolist() == [[0.5, 0.5, 0.0]]


# --- the official code ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("model", ["contrast", "ratio"])
@pytest.mark.parametrize(("intersection", "difference"), REDUCTIONS)
def test_official_values_and_gradients(intersection, difference, model, normalize):
    (x, y), bank = points(9, 8, dtype=torch.float32), points(40, 1, seed=1, dtype=torch.float32)[0]
    layer = layer_with(
        bank, intersection=intersection, difference=difference, model=model, normalize=normalize
    )
    function = {
        "contrast": official.similarity_contrast_model,
        "ratio": official.similarity_ratio_model,
    }[model]
    leaves = [x.requires_grad_(), y.requires_grad_(), layer.feature_bank.weight]
    scalars = [layer.theta, layer.alpha, layer.beta] if model == "contrast" else [layer.alpha, layer.beta]
    theirs = function(
        x, y, layer.feature_bank.weight, 0.0, layer.alpha, layer.beta, layer.theta, normalize,
        intersection, SPELLING[difference],
    )  # fmt: skip
    ours = layer(x, y)
    probe = points(9, 1, d=8, seed=3, dtype=torch.float32)[0]
    for one, other in zip(
        (ours, *torch.autograd.grad(ours, [*leaves, *scalars], probe)),
        (theirs, *torch.autograd.grad(theirs, [*leaves, *scalars], probe)),
        strict=True,
    ):
        scale = float(other.detach().abs().max())
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * max(scale, 1.0))


def test_official_checkpoints_load():
    theirs = OfficialProjection(6, 4, 10, "contrast", False)
    ours = TverskyProjection(6, 4, 10)
    assert ours.load_state_dict(theirs.state_dict()) == ([], [])
    x = points(5, d=6, dtype=torch.float32)[0]
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-4)
    assert [n for n, _ in ours.named_parameters()] == [
        *("theta", "alpha", "beta"),
        *("feature_bank.weight", "prototypes.weight"),
    ]


def test_the_reductions_of_the_official_similarity_layer_are_the_asked_ones():
    """Versions before 0.2.1 of that layer took the default ones whatever was asked."""
    (x, y), bank = points(dtype=torch.float32), points(7, 1, seed=1, dtype=torch.float32)[0]
    peer = OfficialSimilarity(6, 7, "contrast", False, "min", "substractmatch")
    peer.feature_bank.weight.data.copy_(bank)
    ours = layer_with(bank, 1.0, 0.5, 0.5, intersection="min", difference="substractmatch")
    torch.testing.assert_close(ours(x, y), peer(x, y), rtol=1e-5, atol=1e-5)


# --- closed forms ----------------------------------------------------------------------------------------------------


def test_where_the_two_readings_differ():
    bank = torch.tensor([[1.0, 0], [0, 1], [-1, 1], [0.5, -0.5]], dtype=torch.float64)
    x, y = torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    for reduce, wanted in (("aggregate", 3.0), ("feature", 2.0)):
        layer = layer_with(bank, 1.0, 0.0, 0.0, intersection="min", reduce=reduce)
        assert layer(x, y).item() == pytest.approx(wanted)


def test_self_similarity_and_asymmetry():
    (x, y), bank = points(), points(7, 1, seed=1)[0]
    u = (x @ bank.T).relu()
    layer = layer_with(bank, theta=1.3, alpha=0.7, beta=0.2)
    torch.testing.assert_close(layer(x, x).diagonal(), 1.3 * u.square().sum(1))
    equal = layer_with(bank, theta=1.3, alpha=0.4, beta=0.4)
    torch.testing.assert_close(equal(x, y), equal(y, x).T)
    v = (y @ bank.T).relu()
    mine, theirs = u @ (v <= 0).double().T, (u <= 0).double() @ v.T
    torch.testing.assert_close(layer(x, y) - layer(y, x).T, (0.2 - 0.7) * (mine - theirs))


def test_all_active_is_a_linear_layer():
    (x, y), bank = ([each.abs() for each in points()], points(7, 1, seed=1)[0].abs())
    layer = layer_with(bank, theta=1.3, alpha=0.7, beta=0.2)
    torch.testing.assert_close(layer(x, y), 1.3 * x @ bank.T @ bank @ y.T)
    grads = torch.autograd.grad(layer(x, y).sum(), [layer.alpha, layer.beta])
    assert all(float(g) == 0.0 for g in grads)


def test_signed_orthonormal_bank():
    (x, y), bank = points(), torch.cat([torch.eye(6), -torch.eye(6)]).double()
    wanted = 1.3 * (x.relu() @ y.relu().T + (-x).relu() @ (-y).relu().T)
    torch.testing.assert_close(layer_with(bank, theta=1.3, alpha=0.0, beta=0.0)(x, y), wanted)


@pytest.mark.parametrize(("intersection", "difference"), REDUCTIONS)
@pytest.mark.parametrize("reduce", ["aggregate", "feature"])
def test_order_and_scale_of_features(intersection, difference, reduce):
    (x, y), bank = points(), points(7, 1, seed=1)[0]
    form = {"intersection": intersection, "difference": difference, "reduce": reduce}
    order = torch.tensor([3, 1, 0, 6, 5, 4, 2])
    torch.testing.assert_close(layer_with(bank, **form)(x, y), layer_with(bank[order], **form)(x, y))
    if intersection == "softmin":
        return  # not homogeneous
    power = 2 if intersection == "product" else 1
    for weights, scale in (((1.0, 0.0, 0.0), 3.0**power), ((0.0, 0.7, 0.2), 3.0)):
        plain, scaled = (layer_with(rows, *weights, **form)(x, y) for rows in (bank, 3.0 * bank))
        torch.testing.assert_close(scaled, scale * plain)


def test_an_empty_intersection():
    bank = torch.eye(2, dtype=torch.float64)
    x, y = bank[:1].clone().requires_grad_(), bank[1:].clone().requires_grad_()
    for intersection, wanted in (("softmin", -math.log(2)), ("gmean", 0.0), ("min", 0.0)):
        for model in ("contrast", "ratio"):
            layer = layer_with(bank, 1.0, 0.0, 0.0, intersection=intersection, model=model)
            out = layer(x, y)
            assert out.item() == pytest.approx(wanted if model == "contrast" else wanted / (1 + wanted))
            grads = torch.autograd.grad(out.sum(), [x, y, layer.feature_bank.weight, layer.alpha])
            assert all(bool(g.isfinite().all()) for g in grads)


def test_a_bank_is_one_map_for_all_its_layers():
    bank = FeatureBank(6, 9)
    layers = nn.ModuleList([TverskyProjection(6, m, feature_bank=bank) for m in (3, 6)])
    assert sum(p.numel() for p in layers.parameters()) == 6 * 9 + 6 * (3 + 6) + 2 * 3
    out = layers[0](layers[1](points(dtype=torch.float32)[0]))
    (grad,) = torch.autograd.grad(out.sum(), [bank.weight])
    assert bool((grad != 0).any())
