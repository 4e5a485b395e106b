"""Reversible sequences against plain automatic differentiation, in float64, and everything that drives autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reversible_parts import branch, chain, compare, draw, learned, pair, plain, relative, total, trained
from torch import nn

from pullback.core.reversible import CouplingStep, ReversibleSequence, away_from_zero_, set_reversible

untyped: Any = CouplingStep


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"norm": "batch", "drop": 0.3},
        {"norm": "slow"},
        {"norm": "instance"},
        {"scale": learned},
        {"scale": 0.7, "anchor_every": 2},
        {"scale": learned, "anchor_every": 1, "drop": 0.2},
        {"scale": learned, "anchor_every": 3, "drift_check": True},
    ],
    ids=lambda options: ",".join(f"{k}={getattr(v, '__name__', v)}" for k, v in options.items()) or "default",
)
def test_gradients_outputs_buffers_and_random_numbers_are_the_plain_ones(how):
    seq = chain(3, **how)
    compare(seq, pair())
    compare(seq.eval(), pair())


class Mixer(nn.Module):
    """A function of two slots of different widths and of the context, that keeps the shape of a third."""

    def __init__(self, inputs, width):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(each, width) for each in inputs])
        self.last = nn.Linear(width, width)

    def forward(self, *given):
        return self.last(torch.tanh(sum(layer(x) for layer, x in zip(self.layers, given, strict=True))))


def columns(count=2, *, seed=0, **how):
    """Columns over slots of widths 2, 3 and 4 that begin empty; a context of width 5; the middle slot is tapped."""
    torch.manual_seed(seed)
    widths, steps = (2, 3, 4), []
    for column in range(count):
        for level, width in enumerate(widths):
            below = [5] if level == 0 else [widths[level - 1]]
            above = [widths[level + 1]] if level < 2 and column else []
            reads = [level - 1] if level else []
            reads += [level + 1] if above else []
            order = [*above, *below] if level == 0 else [*below, *above]
            scale = nn.Parameter(0.5 + 0.1 * torch.randn(width))
            context = [0] if level == 0 else []
            steps.append(
                CouplingStep(level, reads, Mixer(order, width), scale, context=context, tap=level == 1)
            )
    return ReversibleSequence(steps, **how).double()


@pytest.mark.parametrize("every", [0, 1, 3, 4])
def test_columns_with_context_taps_and_empty_slots(every):
    seq, x = columns(3, anchor_every=every), draw(6, 5).requires_grad_()
    compare(seq, (None, None, None), (x,), tolerance=1e-9)
    assert len(seq((None, None, None), (x,))) == 6
    state = tuple(draw(6, w, seed=w).requires_grad_() for w in (2, 3, 4))
    compare(seq, state, (x,), tolerance=1e-9)


def test_gradient_of_a_factor_in_front_of_an_empty_slot_is_exactly_zero():
    seq, x = columns(2), draw(6, 5)
    total(seq((None,) * 3, (x,))).backward()
    assert all(torch.equal(step.scale.grad, torch.zeros_like(step.scale)) for step in seq.steps[:3])
    assert all(step.scale.grad.abs().min() > 0 for step in seq.steps[3:])


def test_gradcheck_with_factors_and_context():
    seq = columns(2)
    params = [p for p in seq.parameters() if p.dim() == 1]
    state = tuple(draw(2, w, seed=w).requires_grad_() for w in (2, 3, 4))
    x = draw(2, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda *_: seq(state, (x,)), (*state, x, *params))


def test_a_tap_alone_gives_what_lies_in_front_of_it_its_gradient():
    seq, x = columns(3), draw(6, 5).requires_grad_()
    params = list(seq.parameters())
    ours = torch.autograd.grad(total([seq((None,) * 3, (x,))[4]]), [x, *params], allow_unused=True)
    theirs = torch.autograd.grad(total([plain(seq)((None,) * 3, (x,))[4]]), x)
    assert relative(ours[:1], theirs) < 1e-10
    seen = {id(p) for step in seq.steps[:5] for p in step.parameters()}
    for p, grad in zip(params, ours[1:], strict=True):
        assert (grad is not None) == (id(p) in seen)


def test_without_functions_and_with_factor_one_it_is_the_identity():
    zero = lambda x: torch.zeros_like(x)  # noqa: E731
    seq = ReversibleSequence([CouplingStep(0, [1], zero), CouplingStep(1, [0], zero)])
    state = pair()
    assert all(map(torch.equal, seq(state), state))
    ours = torch.autograd.grad(total(seq(state)), state)
    assert all(map(torch.equal, ours, torch.autograd.grad(total(state), state)))


def test_inverse_gives_the_state_back():
    state, x = tuple(draw(6, w, seed=w) for w in (2, 3, 4)), draw(6, 5)
    seq = columns(3)
    with torch.no_grad():
        back = seq.inverse(seq(state, (x,))[:3], (x,))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in zip(back, state, strict=True))
    normed = chain(3, norm="batch", scale=learned)
    with torch.no_grad():
        out = normed(pair())
        before = copy.deepcopy(normed.state_dict())
        back = normed.inverse(out)
    assert relative(back, pair()) < 1e-10
    assert all(torch.equal(value, before[key]) for key, value in normed.state_dict().items())
    with pytest.raises(RuntimeError, match=r"must not draw random numbers.*eval"):
        chain(1, drop=0.5).inverse(pair())
    wide = chain(1).inverse(pair())
    assert torch.autograd.grad(total(wide), next(chain(1).parameters()), allow_unused=True) == (None,)


def test_forward_alone_is_plain_and_draws_the_same_numbers():
    seq, state = chain(2, drop=0.4), pair()
    with torch.no_grad():
        torch.manual_seed(4)
        quiet = seq(state)
    torch.manual_seed(4)
    assert all(map(torch.equal, quiet, seq(state)))
    assert not any(each.requires_grad for each in quiet)
    with torch.inference_mode():
        torch.manual_seed(4)
        assert all(map(torch.equal, quiet, seq(state)))


def test_frozen_parts_get_nothing_and_cost_nothing():
    seq = chain(3)
    calls = []
    for step in seq.steps:
        step.fn.register_forward_hook(lambda *_: calls.append(1))
    for step in list(seq.steps)[:4]:
        step.requires_grad_(False)
    frozen = tuple(each.detach() for each in pair())
    compare(seq, frozen)
    out = seq(frozen)
    del calls[:]
    total(out).backward()
    assert len(calls) == 2  # nothing in front of the first step that learns is computed again
    seq.requires_grad_(False)
    compare(seq, pair())
    assert not any(each.requires_grad for each in seq(frozen))
    late = chain(2)
    late.steps[3].requires_grad_(True)
    for step in list(late.steps)[:3]:
        step.requires_grad_(False)
    ours = late(frozen)
    assert [each.requires_grad for each in ours] == [each.requires_grad for each in plain(late)(frozen)]


def test_gradients_that_nobody_needs_are_not_computed():
    asked = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            return x * y

        @staticmethod
        def backward(ctx, grad):
            asked.append(ctx.needs_input_grad)
            return grad, grad

    last = nn.Linear(3, 3).double()
    fn = nn.Sequential(last)
    fn.forward = lambda *given: Noted.apply(last(given[0]), given[1])
    seq = ReversibleSequence([CouplingStep(0, [1], fn, context=[0])])
    seq((draw(2, 3), draw(2, 3)), [draw(2, 3)])[0].sum().backward()
    seq((draw(2, 3), draw(2, 3)), [draw(2, 3).requires_grad_()])[0].sum().backward()
    assert asked == [(True, False), (True, True)]


def test_untouched_slots_pass_through():
    seq = ReversibleSequence([CouplingStep(0, [1], nn.Linear(3, 3).double())])
    state = (draw(2, 3).requires_grad_(), draw(2, 3, seed=1).requires_grad_(), draw(4))
    compare(seq, state)
    out = seq(state)
    assert torch.equal(out[2], state[2])
    assert not out[2].requires_grad
    again = (draw(2, 3), draw(2, 3, seed=1), draw(4).requires_grad_())
    compare(seq, again)


def test_shared_modules_and_tied_weights_are_summed():
    torch.manual_seed(0)
    shared, tied = branch(), branch()
    tied[4].weight = tied[0].weight
    steps = [CouplingStep(n % 2, [1 - n % 2], fn) for n, fn in enumerate((shared, tied, shared, shared))]
    seq = ReversibleSequence(steps).double()
    compare(seq, pair())
    assert sum(1 for _ in seq.parameters()) == 11


def test_gradients_accumulate_and_graphs_can_be_kept():
    seq, state = chain(2, drop=0.2), pair()
    params = list(seq.parameters())
    first, second = seq(state), seq(tuple(2 * each for each in state))
    (total(first) + total(second)).backward(retain_graph=True)
    once = [p.grad.clone() for p in params]
    (total(first) + total(second)).backward()
    assert all(torch.equal(p.grad, 2 * grad) for p, grad in zip(params, once, strict=True))


def test_the_graph_is_released_after_the_backward_pass():
    seq = chain(1)
    loss = total(seq(pair()))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_second_derivative_is_refused_and_has_a_way_out():
    seq, state = chain(1), pair()
    grads = torch.autograd.grad(seq(state)[1].sum(), state, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"differentiated once, got a second derivative.*set_reversible\(net, False\)"
    ):
        sum(each.square().sum() for each in grads).backward()
    first, weight = seq.steps[0].fn[0].weight, seq.steps[1].fn[0].weight
    outer = torch.ones_like(state[0], requires_grad=True)
    (grad,) = torch.autograd.grad(seq(state)[1], first, outer, create_graph=True)
    for wanted in (*state, weight, outer):
        with pytest.raises(RuntimeError, match="got a second derivative"):
            torch.autograd.grad(grad.sum(), wanted, allow_unused=True, retain_graph=True)
    assert set_reversible(seq, False) == 1
    grads = torch.autograd.grad(total(seq(state)), state, create_graph=True)
    sum(each.square().sum() for each in grads).backward()


def test_gradients_of_samples_by_function_transforms():
    seq = ReversibleSequence([CouplingStep(n % 2, [1 - n % 2], nn.Linear(3, 3).double()) for n in range(2)])
    params = {name: p.detach() for name, p in seq.named_parameters()}
    state = (draw(5, 3), draw(5, 3, seed=1))

    def loss(params, *one):
        return sum(each.square().sum() for each in torch.func.functional_call(seq, params, (one,)))

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, *state)
    summed = torch.autograd.grad(sum(y.square().sum() for y in seq(state)), list(seq.parameters()))
    assert relative([each[name].sum(0) for name in params], summed) < 1e-10


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # both are the compiler's own
def test_compiled_functions_inside_and_a_compiled_model_around():
    torch._dynamo.reset()
    seq = ReversibleSequence([CouplingStep(n % 2, [1 - n % 2], nn.Linear(3, 3).double()) for n in range(2)])
    state = (draw(5, 3).requires_grad_(), draw(5, 3, seed=1).requires_grad_())
    wanted = trained(seq, state)
    around = torch.compile(lambda a, b: total(seq((a * 1, b))), backend="aot_eager")
    loss, nodes, names = around(*state), [], []
    nodes.append(loss.grad_fn)
    while nodes:
        node = nodes.pop()
        names.append(type(node).__name__)
        nodes += [each for each, _ in node.next_functions if each is not None]
    assert any("Reversible" in name for name in names)
    grads = torch.autograd.grad(loss, [*state, *seq.parameters()])
    assert relative(grads, wanted[1]) < 1e-12
    for step in seq.steps:
        step.fn = torch.compile(step.fn, backend="aot_eager")
    assert relative(torch.autograd.grad(total(seq(state)), [*state, *seq.parameters()]), wanted[1]) < 1e-12
    torch._dynamo.reset()


def test_factors_are_kept_away_from_zero():
    scale = torch.tensor([0.0, -0.0, 1e-5, -1e-5, 0.5, -2.0])
    kept, other = nn.Parameter(scale.clone()), nn.Parameter(scale.double().view(2, 3))
    away_from_zero_([kept, other])
    assert torch.equal(other.data.float().view(6), kept.data)
    away_from_zero_(kept)
    assert torch.equal(kept.data, torch.tensor([1e-3, 1e-3, 1e-3, -1e-3, 0.5, -2.0]))
    seq, state = chain(1, scale=learned), pair()
    first = seq(state)
    for step in seq.steps:
        away_from_zero_(step.scale)
    (total(first) + total(seq(state))).backward()


def test_a_copy_and_the_state_dict_behave():
    seq = chain(2, scale=learned, anchor_every=1)
    twin = copy.deepcopy(seq)
    assert all(
        torch.equal(a, b) for a, b in zip(trained(seq, pair())[1], trained(twin, pair())[1], strict=True)
    )
    assert not any("drift" in key or "_seen" in key for key in seq.state_dict())
    assert "scale" in "".join(seq.state_dict())
    assert "anchor_every=1" in repr(seq)
    assert "slot=0, reads=[1]" in repr(seq)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: CouplingStep(0, [0, 1], torch.sin), ValueError, r"reads must leave out.*slot=0.*split the tensor"),
        (lambda: untyped(0, [1], 3), TypeError, r"fn must be a module or a function, got 3"),
        (lambda: CouplingStep(-1, [1], torch.sin), ValueError, r"slot must be >= 0, got -1"),
        (lambda: untyped(0, [0.5], torch.sin), TypeError, r"reads must be an integer, got 0.5"),
        (lambda: CouplingStep(0, [1], torch.sin, 0.0), ValueError, r"scale must be finite and not 0, got 0.0"),
        (lambda: untyped(0, [1], torch.sin, "a"), TypeError, r"scale must be None, a number or a tensor"),
        (lambda: ReversibleSequence([]), ValueError, r"steps must hold at least one"),
        (lambda: ReversibleSequence([nn.Linear(2, 2)]), TypeError, r"steps must be of type CouplingStep, got Linear"),
        (lambda: chain(1, anchor_every=-1), ValueError, r"anchor_every must be >= 0, got -1. Use 0"),
        (lambda: set_reversible(nn.Linear(2, 2)), ValueError, r"module must hold a ReversibleSequence, got Linear"),
        (lambda: chain(1)(draw(2, 3, 4, 4)), TypeError, r"state must be a sequence.*Pass \(x1, x2\)"),
        (lambda: chain(1)((draw(2),)), ValueError, r"state must have 2 slots, got 1"),
        (lambda: chain(1)(("x", draw(2))), TypeError, r"state and context must hold tensors, got 'x'"),
        (lambda: chain(1)((torch.ones(2).long(), draw(2))), TypeError, r"state must hold floating tensors"),
        (lambda: columns(1)((None,) * 3), ValueError, r"context must have 1 tensors, got 0"),
        (lambda: chain(1)((draw(2, 3, 4, 4), None)), ValueError, r"one is empty \(None\).*zeros"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize(
    ("fn", "error", "text"),
    [
        (
            nn.Conv2d(3, 3, 3, stride=2, padding=1),
            ValueError,
            r"fn must keep the shape \(4, 3, 5, 5\).*stride 1",
        ),
        (nn.Conv2d(3, 4, 1), ValueError, r"got \(4, 4, 5, 5\)\. Use stride 1 and as many channels"),
        (nn.ReLU(inplace=True), RuntimeError, r"must not overwrite its input.*ReLU\(inplace=False\)"),
        (lambda x: (x, x), TypeError, r"fn must return one tensor, got "),
        (lambda x: x.to(torch.complex128), ValueError, r"must keep its shape and dtype.*complex128"),
    ],
)
def test_functions_that_cannot_be_coupled_are_refused_at_first_use(fn, error, text, reversible):
    fn = fn.double() if isinstance(fn, nn.Module) else fn
    seq = ReversibleSequence([CouplingStep(0, [1], fn), CouplingStep(1, [0], branch().double())])
    seq.reversible = reversible
    state = tuple(each * 1 for each in pair())
    with pytest.raises(error, match=text):
        seq(state)
