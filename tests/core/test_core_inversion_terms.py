"""Distances between gradients and total variation: closed forms, derivatives, a peer."""

import importlib
import importlib.util
import math
import os
import sys
import types

import pytest
import torch

from pullback.core.inversion_terms import GradientMatching, total_variation

SHAPES = ((3, 4), (3,), (2, 3, 2, 2))


def rows(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def flat(tensors, weights=None):
    weights = weights or [1.0] * len(tensors)
    return torch.cat([math.sqrt(w) * each.reshape(-1) for w, each in zip(weights, tensors, strict=True)])


def test_cosine_is_one_over_all_parameters_together():
    a, b = rows(0), rows(1)
    literal = 1 - flat(a) @ flat(b) / (flat(a).norm() * flat(b).norm())
    assert GradientMatching()(a, b).item() == pytest.approx(literal.item(), abs=1e-14)
    apart = sum(
        1 - torch.cosine_similarity(x.reshape(-1), y.reshape(-1), 0) for x, y in zip(a, b, strict=True)
    )
    assert abs(apart.item() / 3 - literal.item()) > 1e-3  # a mean of cosines would be something else


def test_cosine_of_itself_its_negative_and_any_scale():
    a, b = rows(0), rows(1)
    distance = GradientMatching()
    assert distance(a, a).item() == pytest.approx(0.0, abs=1e-14)
    assert distance(a, [-each for each in a]).item() == pytest.approx(2.0, abs=1e-14)
    for scale in (1e-12, 1e12):
        assert distance([scale * x for x in a], b).item() == pytest.approx(distance(a, b).item(), rel=1e-12)
        assert distance(a, [scale * x for x in b]).item() == pytest.approx(distance(a, b).item(), rel=1e-12)


def test_euclidean_is_the_sum_of_squares():
    a, b = rows(0), rows(1)
    literal = (flat(a) - flat(b)).square().sum()
    assert GradientMatching("euclidean")(a, b).item() == pytest.approx(literal.item(), rel=1e-14)


@pytest.mark.parametrize("kind", ["cosine", "euclidean"])
def test_weights_scale_products_and_squares(kind):
    a, b, weights = rows(0), rows(1), [0.5, 3.0, 1.0]
    names = ["one", "two", "three"]
    distance = GradientMatching(kind, weights={"one": 0.5, "two": 3.0}).bind(b, names)
    x, y = flat(a, weights), flat(b, weights)
    literal = 1 - x @ y / (x.norm() * y.norm()) if kind == "cosine" else (x - y).square().sum()
    assert distance(a).item() == pytest.approx(literal.item(), rel=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "euclidean"])
@pytest.mark.parametrize("weights", [None, {"a": 0.3}])
def test_slopes_are_those_of_finite_differences(kind, weights):
    distance = GradientMatching(kind, weights=weights).bind(rows(1), ["a", "b", "c"])
    inputs = tuple(each.requires_grad_() for each in rows(0))
    assert torch.autograd.gradcheck(lambda *given: distance(given), inputs)


def test_transform_is_part_of_the_slope():
    target = rows(1)
    matching = GradientMatching(transform=lambda grads: [2 * grads[0], 0 * grads[1], grads[2]])
    distance = matching.bind(target, ["a", "b", "c"])
    inputs = tuple(each.requires_grad_() for each in rows(0))
    assert torch.autograd.gradcheck(lambda *given: distance(given), inputs)
    assert torch.autograd.grad(distance(inputs), inputs[1])[0].abs().max() == 0


def test_a_guess_without_gradient_is_at_distance_one_and_has_no_slope():
    zeros = [torch.zeros_like(each).requires_grad_() for each in rows(0)]
    value = GradientMatching()(zeros, rows(1))
    assert value.item() == 1.0
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(value, zeros))


def test_layers_are_parameters_or_whole_modules():
    names = ["conv.weight", "conv.bias", "convolution.weight"]
    assert GradientMatching(layers=["conv"]).select(names) == [0, 1]
    assert GradientMatching(layers=["conv.bias"]).select(names) == [1]
    assert GradientMatching().select(names) == [0, 1, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientMatching("cosin"), "kind must be one of .*'cosine'"),
        (lambda: GradientMatching(weights={"a": -1.0}), r"weights\['a'\] must be >= 0, got -1"),
        (lambda: GradientMatching(layers="conv"), "layers must be a list of names, got 'conv'"),
        (lambda: GradientMatching(transform=3), "transform must be a function .* got 3"),
        (lambda: GradientMatching(layers=["x"]).select(["a.weight"]), "layers must name shared .* got 'x'"),
        (lambda: GradientMatching(weights={"x": 1.0}).select(["a"]), "weights must name shared .* got 'x'"),
        (lambda: GradientMatching(layers=["a"])(rows(0), rows(1)), "weights and layers must be None here"),
        (lambda: GradientMatching().bind([torch.zeros(2)], ["a"]), "gradients must not be zero"),
    ],
    ids=["kind", "weight", "string", "transform", "layer", "name", "call", "zero"],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_repr_tells_the_settings():
    text = repr(GradientMatching("euclidean", weights={"a": 2.0}, layers=["a"], transform=abs))
    assert (
        text
        == "GradientMatching('euclidean', weights={'a': 2.0}, layers=['a'], transform=<built-in function abs>)"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_cosine_equals_breaching(monkeypatch):
    found = importlib.util.find_spec("breaching")
    if found is None:
        pytest.skip("breaching is not installed")
    for name in (
        "breaching",
        "breaching.attacks",
        "breaching.attacks.auxiliaries",
    ):  # their __init__ needs torchvision
        package = types.ModuleType(name)
        package.__path__ = [os.path.join(found.submodule_search_locations[0], *name.split(".")[1:])]
        monkeypatch.setitem(sys.modules, name, package)
    peer = importlib.import_module("breaching.attacks.auxiliaries.objectives").CosineSimilarity()
    for seed in range(5):
        a, b = rows(seed, torch.float32), rows(seed + 10, torch.float32)
        assert GradientMatching()(a, b).item() == pytest.approx(
            float(peer.gradient_based_loss(a, b)), abs=2e-6
        )


def test_total_variation_by_loops():
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    across = [
        abs(x[b, c, i, j + 1] - x[b, c, i, j])
        for b in range(2)
        for c in range(3)
        for i in range(4)
        for j in range(4)
    ]
    down = [
        abs(x[b, c, i + 1, j] - x[b, c, i, j])
        for b in range(2)
        for c in range(3)
        for i in range(3)
        for j in range(5)
    ]
    literal = sum(across) / len(across) + sum(down) / len(down)
    assert total_variation(x).item() == pytest.approx(float(literal), rel=1e-13)
    assert total_variation(torch.ones(1, 1, 1, 1)).item() == 0.0
    signal = x[:, :, 0]
    assert total_variation(signal).item() == pytest.approx(
        (signal[..., 1:] - signal[..., :-1]).abs().mean().item()
    )
    assert torch.autograd.gradcheck(total_variation, x[:1, :1].clone().requires_grad_())
