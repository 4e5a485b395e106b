"""The identity whose backward edits the gradient: per use, at the leaf, and under everything that drives autograd."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pullback.core.edit import edit_arriving, edit_gradient

KEEP = torch.tensor([1.0, -1.0, 1.0])


def triple(grad):
    return 3.0 * grad


def scaled(grad, factor, *, power=1):
    return grad * factor**power


def outer(grad, x):
    """A nonlinear edit that depends on its context."""
    return grad * x.square().sum()


def cost(x):
    return (x.sin() * torch.arange(1, x.numel() + 1, dtype=x.dtype).reshape(x.shape)).sum()


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (4,), (0, 2), (2, 3)])
def test_values_pass_and_the_gradient_is_edited(shape, dtype):
    x = draw(*shape).to(dtype).requires_grad_()
    y = edit_gradient(x, triple)
    assert y is not x
    assert y.data_ptr() == x.data_ptr()
    assert torch.equal(y, x)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad, torch.full(shape, 3.0, dtype=dtype))


def test_a_wider_context_does_not_widen_the_gradient():
    x = torch.ones((), dtype=torch.bfloat16, requires_grad=True)
    edit_gradient(x, scaled, torch.tensor(0.5, dtype=torch.float64)).backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    leaf = torch.ones((), dtype=torch.bfloat16, requires_grad=True)
    edit_arriving(leaf, scaled, torch.tensor(0.5, dtype=torch.float64))
    (leaf * 1).backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16


def test_on_a_weight_only_that_weight_sees_the_edit():
    layer, x = nn.Linear(3, 2).double(), draw(5, 3).requires_grad_()
    plain = torch.autograd.grad(layer(x).square().sum(), (layer.weight, layer.bias, x))
    edited = torch.autograd.grad(
        F.linear(x, edit_gradient(layer.weight, outer, x), layer.bias).square().sum(),
        (layer.weight, layer.bias, x),
    )
    torch.testing.assert_close(edited[0], plain[0] * x.square().sum())
    assert torch.equal(edited[1], plain[1])
    assert torch.equal(edited[2], plain[2])


def test_every_use_is_edited_by_itself():
    weight, a, b = draw(3).requires_grad_(), draw(3, seed=1), draw(3, seed=2)
    loss = sum((edit_gradient(weight, outer, x) * x).sum() for x in (a, b))
    (grad,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(grad, a * a.square().sum() + b * b.square().sum())


def test_second_derivatives_go_through_the_edit_and_its_context():
    x, context = draw(3).requires_grad_(), draw(3, seed=1).requires_grad_()
    (first,) = torch.autograd.grad(cost(edit_gradient(x, outer, context)), x, create_graph=True)
    wanted = x.cos() * torch.arange(1, 4) * context.square().sum()
    torch.testing.assert_close(first, wanted)
    got = torch.autograd.grad(first.sum(), (x, context), retain_graph=True)
    # the slope of cost is taken at the edited x: differentiating it goes through the edit once more
    plain = -x.sin() * torch.arange(1, 4) * context.square().sum() ** 2
    torch.testing.assert_close(got[0], plain)
    torch.testing.assert_close(got[1], 2 * context * (x.cos() * torch.arange(1, 4)).sum())


def test_functional_transforms_and_batched_gradients():
    x = draw(5, 3)
    factor = torch.tensor(0.5, dtype=torch.float64)
    one = torch.func.grad(lambda v: cost(edit_gradient(v, partial(scaled, power=2), factor)))
    torch.testing.assert_close(
        torch.func.vmap(one)(x), 0.25 * torch.stack([torch.func.grad(cost)(row) for row in x])
    )
    leaf = draw(3).requires_grad_()
    y = edit_gradient(leaf, outer, leaf.detach())
    (rows,) = torch.autograd.grad(y, leaf, torch.eye(3, dtype=torch.float64), is_grads_batched=True)
    torch.testing.assert_close(rows, torch.eye(3, dtype=torch.float64) * leaf.detach().square().sum())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_as_one_graph_and_follows_the_context():
    factor = torch.full((4,), 2.0, dtype=torch.float64)  # wider than x

    def loss(v):
        return cost(edit_gradient(v, partial(scaled, power=2), factor) * 2.0)

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    x = draw(4).float().requires_grad_()
    for value in (2.0, -0.5):
        factor.fill_(value)
        torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], torch.autograd.grad(loss(x), x)[0])


def test_only_the_context_is_kept_and_nothing_without_a_graph():
    x, context = draw(100).requires_grad_(), draw(7)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        edit_gradient(x, outer, context)
        assert [t.numel() for t in kept] == [7]
        with torch.no_grad():
            edit_gradient(x, outer, context)
    assert len(kept) == 1


def test_a_context_that_was_overwritten_is_noticed():
    x, context = draw(3).requires_grad_(), draw(3)
    y = edit_gradient(x, outer, context).sum()
    context.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# --- at the leaf -----------------------------------------------------------------------------------------------------


def test_what_arrives_at_a_leaf_is_edited_before_it_is_accumulated():
    weight, x = draw(3).requires_grad_(), draw(3, seed=1)
    handle = edit_arriving(weight, scaled, KEEP)
    for _ in range(2):
        (weight * x).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, 2 * x * KEEP)
    assert torch.equal(torch.autograd.grad((weight * x).sum(), weight)[0], x * KEEP)
    handle.remove()
    assert torch.equal(torch.autograd.grad((weight * x).sum(), weight)[0], x)


def test_a_fixed_mask_agrees_with_the_edit_of_every_use():
    weight, leaf, x = draw(3).requires_grad_(), draw(3).requires_grad_(), draw(3, seed=1)
    edit_arriving(leaf, scaled, KEEP)
    ((leaf * x).sum() + leaf.square().sum()).backward()
    uses = [edit_gradient(weight, scaled, KEEP) for _ in range(2)]
    ((uses[0] * x).sum() + uses[1].square().sum()).backward()
    assert torch.equal(weight.grad, leaf.grad)


@pytest.mark.parametrize(
    ("leaf", "error", "message"),
    [
        ([1.0], TypeError, "leaf must be of type Tensor, got list"),
        (torch.ones(2), ValueError, "leaf must require a gradient, got requires_grad=False"),
        (
            torch.ones(2, requires_grad=True) * 2,
            ValueError,
            "leaf must be a leaf.*got the result of MulBackward",
        ),
    ],
)
def test_what_no_gradient_arrives_at_is_refused(leaf, error, message):
    with pytest.raises(error, match=message):
        edit_arriving(leaf, triple)
