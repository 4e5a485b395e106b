"""Networks and comparisons for the tests of reversible sequences."""

from __future__ import annotations

import copy

import torch
from torch import nn

from pullback.core.reversible import CouplingStep, ReversibleSequence, set_reversible


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def branch(width=3, norm="group", drop=0.0):
    """A convolution, a norm, an activation, dropout, a convolution."""
    norms = {
        "group": lambda: nn.GroupNorm(1, width),
        "batch": lambda: nn.BatchNorm2d(width),
        "slow": lambda: nn.BatchNorm2d(width, momentum=None),
        "instance": lambda: nn.InstanceNorm2d(width, affine=True, track_running_stats=True),
    }
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1),
        norms[norm](),
        nn.SiLU(),
        nn.Dropout(drop),
        nn.Conv2d(width, width, 3, padding=1),
    )


def chain(blocks=3, *, scale=None, seed=0, **how):
    """RevNet blocks on two slots; keyword arguments of `branch` and of the sequence."""
    torch.manual_seed(seed)
    own = {key: how.pop(key) for key in ("width", "norm", "drop") if key in how}
    factors = [scale() if callable(scale) else scale for _ in range(2 * blocks)]
    steps = [CouplingStep(n % 2, [1 - n % 2], branch(**own), factors[n]) for n in range(2 * blocks)]
    return ReversibleSequence(steps, **how).double()


def learned(width=3):
    """A factor per channel, around 1 and of both signs."""
    return nn.Parameter(
        1.0 + 0.2 * torch.randn(1, width, 1, 1) * torch.tensor([1.0, -1.0, 1.0]).view(1, -1, 1, 1)
    )


def pair(width=3, side=5, batch=4, dtype=torch.float64):
    return tuple(draw(batch, width, side, side, seed=s, dtype=dtype).requires_grad_() for s in (1, 2))


def total(outputs):
    """A number that depends on every entry of every output in another way."""
    return sum(
        (each.double() * draw(*each.shape, seed=9 + n)).square().sum()
        for n, each in enumerate(outputs)
        if each is not None
    )


def trained(seq, state, context=(), seed=3):
    """Outputs, gradients of inputs and parameters, buffers, and the generator's state after one backward pass."""
    seq = copy.deepcopy(seq)
    torch.manual_seed(seed)
    out = seq(state, context)
    after = torch.get_rng_state()
    wanted = [*(s for s in (*state, *context) if s is not None and s.requires_grad)]
    wanted += [p for p in seq.parameters() if p.requires_grad]
    grads = torch.autograd.grad(total(out), wanted, allow_unused=True)
    assert torch.equal(torch.get_rng_state(), after)
    buffers = {name: each.clone() for name, each in seq.named_buffers()}
    return [o if o is None else o.detach() for o in out], grads, buffers, after


def plain(seq):
    twin = copy.deepcopy(seq)
    set_reversible(twin, False)
    return twin


def relative(ours, theirs):
    """Largest error of a list of gradients, each relative to its largest entry, or a thousandth of all."""
    ours, theirs = ([each if each is None else each.detach() for each in row] for row in (ours, theirs))
    least = 1e-3 * max(float(each.abs().max()) for each in theirs if each is not None)
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            worst = max(worst, float((one - other).abs().max() / other.abs().max().clamp_min(least)))
    return worst


def compare(seq, state, context=(), *, tolerance=1e-10):
    """Hold a sequence to plain autograd: outputs, buffers, generator bitwise, gradients to ``tolerance``."""
    ours, theirs = trained(seq, state, context), trained(plain(seq), state, context)
    for one, other in zip(ours[0], theirs[0], strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert relative(ours[1], theirs[1]) < tolerance
    assert ours[2].keys() == theirs[2].keys()
    for name, buffer in ours[2].items():
        assert torch.equal(buffer, theirs[2][name]), name
    assert torch.equal(ours[3], theirs[3])
