"""What a step costs: forward and backward passes, reads of the gradients, transfers to the host, memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pullback.methods.gcond import ConflictResolver, GradientConductor

N = 10_000  # entries of the one parameter: longer than everything that is not a gradient

VIEWS = ("view", "permute", "select", "strided", "detach", "slice", "unbind", "alias")


class Traffic(TorchDispatchMode):
    """Counts reads and writes of tensors of at least ``N`` entries, in multiples of N, and reads by the host."""

    def __init__(self):
        super().__init__()
        self.reads, self.writes, self.host = 0.0, 0.0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name()
        self.host += name == "aten::_local_scalar_dense"
        if not any(view in name for view in VIEWS):
            self.reads += sum(_long(each) for each in args)
            self.writes += _long(out)
        return out


def _long(value):
    if isinstance(value, torch.Tensor):
        return value.numel() / N if value.numel() >= N else 0.0
    return sum(map(_long, value)) if isinstance(value, list | tuple) else 0.0


def conductor_of(tasks, **options):
    weight = nn.Parameter(torch.randn(N, generator=torch.Generator().manual_seed(0)))
    names = [f"task{i}" for i in range(tasks)]
    return weight, GradientConductor([weight], names, accumulate=tasks, **options)


def fill(weight, conductor, seed):
    for i, task in enumerate(conductor.tasks):
        slope = torch.randn(N, generator=torch.Generator().manual_seed(seed + i))
        with conductor.accumulate(task):
            ((-1) ** i * (weight @ slope) + 0.5 * weight.square().sum() * (-1) ** i).backward()


@pytest.mark.parametrize(("tasks", "rounds"), [(2, 1), (4, 3), (6, 12)])
def test_a_step_reads_the_gradients_for_one_gram_matrix_and_one_combination(tasks, rounds):
    weight, conductor = conductor_of(tasks, max_iters=rounds)
    for seed in (0, 100):
        fill(weight, conductor, seed)
        with Traffic() as traffic:
            info = conductor.step()
    assert info.rounds >= 1
    # products of pairs read both factors (one matrix product: the matrix twice), those with the last step 2 N,
    # the combination N and the momentum, the written gradient the momentum; however many rounds there are
    pairs = tasks * (tasks + 1) if tasks < 4 else 2 * tasks
    assert traffic.reads == pairs + 2 * tasks + (tasks + 1) + 1
    assert traffic.writes == 2
    assert traffic.host == 0  # one tolist(), which is no scalar read


def test_the_number_of_rounds_costs_no_read():
    found = []
    for rounds in (1, 8):
        weight, conductor = conductor_of(4, max_iters=rounds)
        fill(weight, conductor, 0)
        with Traffic() as traffic:
            found.append((conductor.step().rounds, traffic))
    assert found[0][0] == 1 < found[1][0]
    assert found[0][1].reads == found[1][1].reads


def test_one_transfer_to_the_host_per_step(monkeypatch):
    read = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read.append(self.numel()) or original(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a scalar was read"))
    for options, numbers in (({}, [3 + 2]), ({"stability_reference": "resolved"}, [3 + 4])):
        weight, conductor = conductor_of(2, **options)
        for seed in (0, 100):
            fill(weight, conductor, seed)
            read.clear()
            conductor.step()
        assert read == numbers


def test_the_resolver_reads_a_matrix_for_its_products_and_once_more():
    for tasks in (2, 3, 8):
        jacobian = torch.randn(tasks, N, generator=torch.Generator().manual_seed(1))
        with Traffic() as traffic:
            ConflictResolver(max_iters=None)(jacobian)
        pairs = tasks * (tasks + 1) if tasks < 4 else 2 * tasks
        assert traffic.reads == pairs + tasks
        assert traffic.writes == 1


@pytest.mark.parametrize(("mode", "passes"), [("stochastic", 6), ("sequential", 12)])
def test_forward_and_backward_passes(mode, passes):
    forwards, backwards = [], []
    net = nn.Linear(3, 2)
    net.register_forward_hook(lambda *_: forwards.append(1))
    net.weight.register_hook(lambda _: backwards.append(1))
    conductor = GradientConductor(net, ("a", "b"), accumulate=6, mode=mode)
    for task, x in conductor.schedule(torch.randn(6, 4, 3)):
        with conductor.accumulate(task):
            net(x).sum().backward()
    conductor.step()
    assert (len(forwards), len(backwards)) == (passes, passes)


def test_a_shared_forward_pass_runs_once():
    forwards, backwards = [], []
    net = nn.Linear(3, 2)
    net.register_forward_hook(lambda *_: forwards.append(1))
    net.weight.register_hook(lambda _: backwards.append(1))
    conductor = GradientConductor(net, ("a", "b"), accumulate=3, mode="sequential")
    for x in torch.randn(3, 4, 3):
        out = net(x)
        conductor.backward({"a": out.sum(), "b": out.square().sum()})
    conductor.step()
    assert (len(forwards), len(backwards)) == (3, 6)


@pytest.mark.parametrize(
    ("tasks", "options", "buffers"),
    [
        (3, {}, 3 + 3 + 1 + 1),  # sums, those of the last step, momentum, written gradient
        (3, {"arbiter_weights": (0.0, 1.0)}, 3 + 1 + 1),  # nobody asks for the last step
        (3, {"momentum": 0.0, "arbiter_weights": (0.0, 1.0)}, 3 + 1),
        (1, {}, 1 + 1 + 1),
    ],
)
def test_memory_in_multiples_of_the_gradient(tasks, options, buffers):
    weight, conductor = conductor_of(tasks, **options)
    fill(weight, conductor, 0)
    conductor.step()
    kept = {}
    for rows in (*conductor.accumulator.sums, *conductor.accumulator.previous, *conductor.writer._momentum,
                 *conductor.writer._out):  # fmt: skip
        kept[rows.untyped_storage().data_ptr()] = rows.untyped_storage().nbytes()
    assert sum(kept.values()) == buffers * 4 * N
    assert weight.grad.untyped_storage().data_ptr() in kept


def test_fifty_steps_leave_no_tensor_behind():
    from pullback.testing.tools import tensors_left_by

    weight, conductor = conductor_of(2)

    def fifty():
        for seed in range(50):
            fill(weight, conductor, seed)
            conductor.step()

    fifty()
    assert tensors_left_by(fifty) <= 1
