"""The second call is the first one again: autocast, modes, buffers, weights, hooks; what cannot be is refused."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from reversible_parts import branch, chain, compare, draw, learned, pair, plain, relative, total, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

from pullback.core.reversible import CouplingStep, ReversibleSequence


def two(first, second=None):
    """One block whose first function is ``first``."""
    torch.manual_seed(0)
    return ReversibleSequence(
        [CouplingStep(0, [1], first), CouplingStep(1, [0], second or branch())]
    ).double()


# --- autocast --------------------------------------------------------------------------------------------------------


def under_autocast(seq, state, *, inside, cache=True):
    """Outputs and gradients; the backward pass inside the autocast region or behind it."""
    params = [*state, *seq.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
        out = seq(state)
        loss = total(out)
        if inside:
            return out, torch.autograd.grad(loss, params)
    return out, torch.autograd.grad(loss, params)


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_is_replayed_and_the_state_stays_in_float32(inside):
    seq, state = chain(3, norm="batch", scale=learned).float(), pair(dtype=torch.float32)
    kinds = []
    seq.steps[2].fn[0].register_forward_hook(lambda *given: kinds.append(given[2].dtype))
    out, ours = under_autocast(seq, state, inside=inside)
    assert {each.dtype for each in out} == {torch.float32}
    assert kinds == [torch.bfloat16] * 2
    for step in seq.steps:
        step.fn[1].reset_running_stats()
    same, theirs = under_autocast(plain(seq), state, inside=inside)
    assert all(map(torch.equal, out, same))
    assert relative(ours, theirs) < 2e-2
    exact = copy.deepcopy(plain(seq)).double()
    _, reference = trained(exact, [each.double() for each in state])[:2]
    exact = [each.float() for each in reference[2:]]
    off = [relative([a], [b]) for a, b in zip(ours[2:], exact, strict=True)]
    other = [relative([a], [b]) for a, b in zip(theirs[2:], exact, strict=True)]
    assert sum(off) < 1.3 * sum(other)  # no further from the truth than plain autocast is


def test_a_weight_keeps_its_gradient_when_forward_and_backward_share_an_autocast_region():
    seq, state = chain(2).float(), pair(dtype=torch.float32)
    _, ours = under_autocast(seq, state, inside=True)
    assert all(float(each.abs().max()) > 0 for each in ours if each.dim() == 4)


def test_a_weight_that_is_used_again_in_the_same_region_keeps_its_gradient():
    seq, state = chain(1).float(), pair(dtype=torch.float32)
    fn = seq.steps[0].fn
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seq(state)
        loss = fn(state[0]).square().sum()
    assert all(float(p.abs().max()) > 0 for p in torch.autograd.grad(loss, list(fn.parameters())))


def test_backward_inside_autocast_does_not_lower_a_forward_outside():
    seq, state = chain(2).float(), pair(dtype=torch.float32)
    params = list(seq.parameters())
    loss = total(seq(state))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = torch.autograd.grad(loss, params)
    assert all(map(torch.equal, ours, torch.autograd.grad(total(seq(state)), params)))


def test_half_precision_slots_are_raised_under_autocast_and_empty_ones_filled_in_float32():
    x = draw(4, 3, dtype=torch.bfloat16).requires_grad_()
    seq = ReversibleSequence(
        [CouplingStep(0, [], nn.Linear(3, 3), context=[0]), CouplingStep(1, [0], nn.Linear(3, 3))]
    )
    for each in (seq, plain(seq)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = each((None, x), (x,))
        assert {one.dtype for one in out} == {torch.float32}
    total(out).backward()
    assert x.grad.dtype == torch.bfloat16


def test_a_state_in_half_precision_warns_once():
    seq = chain(1).bfloat16()
    state = tuple(each.detach().bfloat16().requires_grad_() for each in pair())
    with pytest.warns(UserWarning, match=r"The state is torch.bfloat16.*float32 and run under autocast"):
        seq(state)
    seq(state)


# --- modes, buffers, weights -----------------------------------------------------------------------------------------


def test_modes_at_the_time_of_the_forward_pass_hold():
    seq, state = chain(2, norm="batch", drop=0.5), pair()
    torch.manual_seed(3)
    loss = total(seq(state))
    seq.eval()
    ours = torch.autograd.grad(loss, list(seq.parameters()))
    assert not any(module.training for module in seq.modules())
    torch.manual_seed(3)
    twin = plain(seq).train()
    assert relative(ours, torch.autograd.grad(total(twin(state)), list(twin.parameters()))) < 1e-10


def test_weights_and_buffers_that_a_function_was_called_with_hold():
    seq, state = chain(2, norm="batch").eval(), pair()
    g = torch.Generator().manual_seed(5)
    values = {
        name: (0.2 + 0.1 * torch.rand(each.shape, generator=g, dtype=torch.float64)).requires_grad_()
        for name, each in (*seq.named_parameters(), *seq.named_buffers())
        if each.is_floating_point()
    }
    for name, _ in seq.named_buffers():
        if name in values:
            values[name] = values[name].detach()
    wanted = [each for each in values.values() if each.requires_grad]
    ours, theirs = (
        torch.autograd.grad(total(torch.func.functional_call(each, values, (state,))), wanted)
        for each in (seq, plain(seq))
    )
    assert relative(ours, theirs) < 1e-10


def test_editing_weights_or_outputs_before_the_backward_pass_is_noticed():
    seq, state = chain(2), pair()
    loss = total(seq(state))
    with torch.no_grad():
        seq.steps[0].fn[0].weight.mul_(1.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    out = seq(state)
    loss = total(out)
    with torch.no_grad():
        out[1].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    tapped = ReversibleSequence(
        [CouplingStep(n % 2, [1 - n % 2], branch(), tap=True) for n in range(4)]
    ).double()
    out = tapped(state)
    loss = total(out)
    out[5].detach().zero_()  # what was tapped last is the state itself
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_hooks_on_weights_run_once():
    seq, state = chain(1), pair()
    weight, calls = seq.steps[0].fn[0].weight, []
    plainly = torch.autograd.grad(total(seq(state)), weight)[0]
    weight.register_hook(lambda grad: calls.append(1) or 2 * grad)
    total(seq(state)).backward()
    assert len(calls) == 1
    torch.testing.assert_close(weight.grad, 2 * plainly)


def test_nothing_is_left_changed_also_after_an_error():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.good = branch(norm="batch", drop=0.1), True

        def forward(self, x):
            if not self.good and torch.is_grad_enabled():
                raise ArithmeticError("planned")
            return self.inner(x)

    seq = two(Breaks())
    loss = total(seq(pair()))
    seq.eval()
    seq.steps[0].fn.good = False
    before, state = torch.get_rng_state(), copy.deepcopy(seq.state_dict())
    own = [id(p) for p in seq.parameters()]
    with pytest.raises(ArithmeticError):
        loss.backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert [id(p) for p in seq.parameters()] == own
    assert not any(module.training for module in seq.modules())
    assert seq.steps[0].fn.inner[1].track_running_stats
    assert all(torch.equal(value, state[key]) for key, value in seq.state_dict().items())


def test_without_replay_random_numbers_differ():
    seq = chain(2, drop=0.5, preserve_rng_state=False)
    with pytest.raises(AssertionError):
        compare(seq, pair())


def test_functions_that_checkpoint_or_rebuild_inside():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = branch(drop=0.3)

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    compare(two(Checkpointed()), pair())

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = chain(1, width=1, drop=0.3)
            self.last = nn.Conv2d(2, 3, 1)

        def forward(self, x):
            return self.last(torch.cat(self.inner((x[:, :1], x[:, 1:2])), 1))

    compare(two(Nested()), pair())


# --- what cannot be called again -------------------------------------------------------------------------------------


class Moving(nn.Module):
    """Divides by a moving average of its input."""

    def __init__(self, *, replaces=False):
        super().__init__()
        self.register_buffer("average", torch.ones(()))
        self.replaces = replaces

    def forward(self, x):
        new = 0.9 * self.average + 0.1 * x.detach().abs().mean()
        if self.training and self.replaces:
            self.average = new
        elif self.training:
            self.average.copy_(new)
        return x / self.average


@pytest.mark.parametrize(
    ("fn", "where"),
    [
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 1)), r"parametrizations.weight.0._u"),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), Moving()), r"1.average' \(Moving\)"),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), Moving(replaces=True)), r"1.average' \(Moving\)"),
        (lambda: Moving(), r"Moving.average' \(Moving\)"),
    ],
)  # fmt: skip
def test_functions_that_change_from_call_to_call_are_refused_by_name(fn, where):
    seq = two(fn())
    with pytest.raises(
        RuntimeError, match=rf"must not change its buffers.*{where}.*set_reversible\(net, False\)"
    ):
        seq(pair())
    with torch.no_grad():
        seq(pair())
    plain(seq)(pair())
    compare(seq.eval(), pair())


def test_a_cache_that_is_made_at_the_first_call_is_no_change():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", None, persistent=False)

        def forward(self, x):
            if self.table is None:
                self.table = torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype)
            return x * self.table

    compare(two(Cached()), pair())


def test_weights_that_a_function_only_refers_to_are_refused():
    hidden = nn.Conv2d(3, 3, 1).double()
    seq = two(lambda x: hidden(x))
    with pytest.raises(
        RuntimeError, match=r"own it as a parameter, got one of shape \((3,|3, 3, 1, 1)\) that it only"
    ):
        total(seq(pair())).backward()
    hidden.requires_grad_(False)
    compare(seq, pair())


def test_weights_without_a_shape_are_refused():
    with pytest.raises(RuntimeError, match=r"must have a shape, got a lazy one.*Call the module once"):
        two(nn.LazyConv2d(3, 1))(pair())


def test_recurrent_layers_find_their_weights():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.last = nn.GRU(3, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x):
            return self.last(self.cell(x)[0])

    seq = ReversibleSequence([CouplingStep(n % 2, [1 - n % 2], Recurrent()) for n in range(2)]).double()
    compare(seq, (draw(2, 4, 3).requires_grad_(), draw(2, 4, 3, seed=1).requires_grad_()))


def test_python_numbers_are_not_replayed_and_the_page_says_so():
    assert "NumPy's or Python's" in ReversibleSequence.__doc__
    random.seed(0)
    seq = two(lambda x: x * random.random())
    state = pair()
    ours = torch.autograd.grad(total(seq(state)), state)
    random.seed(0)
    assert relative(ours, torch.autograd.grad(total(plain(seq)(state)), state)) > 1e-3
