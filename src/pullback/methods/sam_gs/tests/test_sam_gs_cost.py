"""Counted costs: passes through the trunk, graphs that stay alive, bytes of state and of scratch."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pullback.methods.sam_gs import SAMGS, multitask_backward, surgery


class Counted(torch.autograd.Function):
    """Identity that counts its passes."""

    forwards = backwards = 0

    @staticmethod
    def forward(ctx, x):
        Counted.forwards += 1
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads):
        Counted.backwards += 1
        return grads[0]


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 8)

    def forward(self, x):
        return self.second(Counted.apply(torch.tanh(self.first(x))))


@pytest.mark.parametrize("tasks", [2, 5])
@pytest.mark.parametrize("heads", [None, "given"])
def test_one_forward_and_one_backward_pass_per_task(tasks, heads):
    trunk, outs = Trunk(), nn.ModuleList([nn.Linear(8, 1) for _ in range(tasks)])
    Counted.forwards = Counted.backwards = 0
    z = trunk(torch.randn(4, 6))
    losses = [out(z).square().mean() for out in outs]
    multitask_backward(losses, shared=trunk, aggregator=SAMGS(), heads=outs if heads else None)
    assert (Counted.forwards, Counted.backwards) == (1, tasks)


def test_the_last_pass_frees_the_graph():
    trunk, outs = Trunk(), nn.ModuleList([nn.Linear(8, 1) for _ in range(3)])

    def once(**keep):
        hidden = trunk.first(torch.randn(4, 6)).tanh()
        losses = [out(trunk.second(hidden)).square().mean() for out in outs]
        multitask_backward(losses, shared=trunk, aggregator=SAMGS(), **keep)
        return losses

    with pytest.raises(RuntimeError, match="second time"):
        once()[-1].backward()
    once(retain_graph=True)[-1].backward()


def test_no_gradient_outlives_the_call():
    trunk, out = nn.Linear(3, 2), nn.Linear(2, 1)
    aggregator = SAMGS()
    alive = []
    trunk.weight.register_hook(lambda grad: alive.append(weakref.ref(grad)))
    z = trunk(torch.randn(4, 3))
    multitask_backward([out(z).mean(), z.square().mean()], shared=trunk, aggregator=aggregator)
    assert len(alive) == 2
    assert not any(ref() is not None for ref in alive)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_state_is_one_copy_of_the_gradients(dtype):
    aggregator = SAMGS()
    aggregator(torch.randn(3, 1000).to(dtype))
    size = sum(each.numel() * each.element_size() for each in aggregator.state_dict().values())
    assert size == 3 * 1000 * max(4, dtype.itemsize) + 4 * 8  # momentum, and four numbers


class Made(TorchDispatchMode):
    """Elements of every storage that an operation made."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            given = [each for each in (*args, *(kwargs or {}).values()) if isinstance(each, torch.Tensor)]
            known = {each.untyped_storage().data_ptr() for each in given}
            if out.untyped_storage().data_ptr() not in known:
                self.sizes.append(out.untyped_storage().nbytes() // out.element_size())
        return out


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("tasks", [2, 4, 8])
def test_a_step_makes_its_result_and_small_scratch(monkeypatch, tasks, gamma):
    monkeypatch.setattr(surgery, "CPU_BLOCK", 1000)
    n = 50_000
    aggregator, rows = SAMGS(gamma=gamma), torch.randn(tasks, n)
    aggregator(rows)
    with Made() as made:
        aggregator(rows)
    sizes = sorted(made.sizes)
    assert sizes[-1] == n  # the result
    assert sizes[-2] <= surgery.FEW_TASKS * 1000  # one block


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_the_host_reads_once(monkeypatch, gamma):
    aggregator, rows = SAMGS(gamma=gamma), torch.randn(3, 50)
    aggregator(rows)
    reads = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *a, _n=name, _p=plain, **k: (reads.append(_n), _p(self, *a, **k))[1],
        )
    aggregator(rows)
    assert reads == ["tolist"]
