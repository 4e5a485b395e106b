"""What cannot be flipped is refused by argument, value and fix, and nothing is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pullback.core.checks import NonFiniteError
from pullback.methods.curl_descent import RuleFlip

Rule: Any = RuleFlip  # wrong types are the point


class Bare(nn.Module):
    """A module without weight."""


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Rule(fraction=-0.1), ValueError, r"fraction must be in \[0, 1\], got -0.1"),
        (lambda: Rule(fraction=1.01), ValueError, r"fraction must be in \[0, 1\], got 1.01"),
        (lambda: Rule(fraction=float("nan")), ValueError, "fraction must be"),
        (lambda: Rule(fraction="1"), TypeError, "fraction must be a number"),
        (lambda: Rule(), ValueError, "exactly one of fraction and mask, got neither"),
        (lambda: Rule(fraction=0.1, mask=torch.ones(3)), ValueError, "got both"),
        (lambda: Rule(fraction=0.1, side="columns"), ValueError, "side must be one of 'pre', 'post'"),
        (lambda: Rule(fraction=0.1, which="some"), ValueError, "which must be one of 'first', 'random'"),
        (lambda: Rule(fraction=0.1, seed=0.5), TypeError, "seed must be an integer"),
        (lambda: Rule([], fraction=0.1), ValueError, "layers must not be empty"),
        (lambda: Rule([nn.Linear(2, 2), "a"], fraction=0.1), TypeError, r"layers\[1\] must be a layer"),
        (lambda: Rule(Bare(), fraction=0.1), TypeError, r"layers\[0\] must have a weight parameter .* got Bare"),
        (lambda: Rule(nn.Sequential(nn.Linear(2, 2)), fraction=0.1), TypeError, "got Sequential without"),
        (lambda: Rule(nn.LayerNorm(3), fraction=0.1), TypeError, "got LayerNorm without"),
        (lambda: Rule(nn.Bilinear(2, 2, 2), fraction=0.1), TypeError, "got Bilinear without"),
        (lambda: Rule(nn.LazyLinear(2), fraction=0.1), TypeError, "a lazy LazyLinear. Run one batch"),
        (lambda: Rule(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), fraction=0.1), TypeError,
         "a parametrized weight is no parameter"),
        (lambda: Rule(nn.Linear(3, 2), mask=torch.ones(2)), ValueError, "each of the 3 neurons .* got 2"),
        (lambda: Rule(nn.Linear(3, 2), mask=torch.ones(3), side="post"), ValueError, "each of the 2 neurons"),
        (lambda: Rule(mask=torch.tensor([1.0, 0.0])), ValueError, r"mask must be one vector of \+1 and -1"),
        (lambda: Rule(mask=torch.tensor([1.0, float("nan")])), ValueError, "mask must be one vector"),
        (lambda: Rule(mask=torch.tensor([True, False])), ValueError, "From booleans: torch.where"),
        (lambda: Rule(mask=torch.ones(2, 2)), ValueError, "mask must be one vector"),
        (lambda: Rule(mask=[1, -1]), TypeError, r"mask must be a tensor, got \[1, -1\]"),
    ],
)  # fmt: skip
def test_bad_settings(make, error, text):
    with pytest.raises(error, match=text):
        make()


def stepped(params, rule, **kwargs):
    optimizer = torch.optim.SGD(params, lr=0.1)
    rule.attach(optimizer, **kwargs)
    optimizer.step()


def with_grads(module, value=1.0):
    for p in module.parameters():
        p.grad = torch.full_like(p, value)
    return module


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("form", ["layer", "name"])
def test_sparse_gradients_are_refused_before_anything_is_flipped(form):
    model = with_grads(nn.ModuleList([nn.Linear(3, 4), nn.Embedding(4, 3)]))
    model[1].weight.grad = torch.eye(4, 3).to_sparse()
    rule = RuleFlip(list(model) if form == "layer" else "*", fraction=0.5)
    with pytest.raises(TypeError, match=r"must be dense, got the sparse layout .* sparse=False"):
        stepped(model.parameters(), rule)
    assert bool((model[0].weight.grad == 1).all())
    zero = RuleFlip(list(model), fraction=0.0)
    stepped(model.parameters(), zero)  # nothing to flip, nothing to refuse
    embedding = nn.Embedding(4, 3, sparse=True)
    with RuleFlip(embedding, fraction=0.5).hook(), pytest.raises(TypeError, match="must be dense"):
        embedding(torch.tensor([0])).sum().backward()


def test_non_finite_gradients_follow_the_policy():
    layer = with_grads(nn.Linear(3, 2))
    layer.weight.grad[0, 0] = float("nan")
    before = layer.weight.detach().clone()
    with pytest.raises(NonFiniteError, match="holds NaN in 1 of 6 entries"):
        stepped(layer.parameters(), RuleFlip(layer, fraction=0.5))
    rule = RuleFlip(layer, fraction=0.5)
    stepped(layer.parameters(), rule, nonfinite="skip")
    assert torch.equal(layer.weight, before)
    assert rule.steps == 0
    with pytest.warns(RuntimeWarning, match="nonfinite='warn'"):
        stepped(layer.parameters(), RuleFlip(layer, fraction=0.5), nonfinite="warn")
    with pytest.raises(NonFiniteError):
        RuleFlip(layer, fraction=0.5).update_(layer)


def test_an_optimizer_of_other_parameters_is_refused():
    one, other = with_grads(nn.Linear(3, 2)), with_grads(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"must hold the weights of all layers, got none of layers\[0\]"):
        stepped(other.parameters(), RuleFlip(one, fraction=0.5))
    with pytest.raises(ValueError, match=r"got none of layers\[1\]"):
        stepped(one.parameters(), RuleFlip([one, other], fraction=0.5))
    with pytest.raises(ValueError, match=r"got \['head.\*'\] for the names \['group0.0', 'group0.1'\]"):
        stepped(one.parameters(), RuleFlip("head.*", fraction=0.5))
    with pytest.raises(ValueError, match="layers must match a parameter of two or more dimensions"):
        stepped([one.bias], RuleFlip(fraction=0.5))
    with pytest.raises(ValueError, match="none of 2 parameters has a gradient"):
        RuleFlip(fraction=0.5).update_(nn.Linear(3, 2))


def test_a_layer_without_gradient_is_skipped():
    model = with_grads(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)))
    model[1].weight.grad = None
    stepped(model.parameters(), RuleFlip(list(model), fraction=1.0))
    assert bool((model[0].weight.grad == -1).all())
    assert model[1].weight.grad is None


def test_a_mask_that_fits_no_named_weight_is_refused_in_the_step():
    model = with_grads(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"each of the 3 neurons of group0\.0, got 2"):
        stepped(model.parameters(), RuleFlip(mask=torch.tensor([1, -1])))
    assert bool((model.weight.grad == 1).all())


def test_hooks_need_something_to_hold():
    layer = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"hook: params must hold .* \['x'\], got 2 parameters"):
        RuleFlip("x", fraction=0.5).hook(layer)
    with pytest.raises(ValueError, match=r"got 0 parameters\. Pass the model"):
        RuleFlip("*", fraction=0.5).hook()
    layer.requires_grad_(False)
    with pytest.raises(ValueError, match="must require a gradient, got requires_grad=False"):
        RuleFlip(layer, fraction=0.5).hook()


@pytest.mark.parametrize("params", [[], {}, nn.Identity()])
def test_no_parameters_are_refused(params):
    with pytest.raises(ValueError, match="parameters must not be empty"):
        RuleFlip(fraction=0.5).signs(params)


def test_a_line_search_is_refused():
    with pytest.raises(TypeError, match="got LBFGS"):
        RuleFlip(fraction=0.5).attach(torch.optim.LBFGS(nn.Linear(2, 2).parameters()))
