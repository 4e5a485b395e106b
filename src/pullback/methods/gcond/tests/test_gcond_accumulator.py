"""Accumulation per task."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torchjd.aggregation import PCGrad

from pullback.methods.gcond import MomentumWriter, TaskAccumulator


def model(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def batches(count, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, 4, generator=g, dtype=torch.float64).to(dtype)


def fit(net, x):
    return (net(x) - 1).square().mean()


def size(net, x):
    return net(x).abs().mean()


LOSSES = {"fit": fit, "size": size}


def written(p):
    assert p.grad is not None
    return p.grad


def flat(net):
    return torch.cat([written(p).flatten() for p in net.parameters()])


def gradient(net, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


# --- accumulation --------------------------------------------------------------------------------------------------


def test_rows_are_weighted_means_over_each_tasks_own_micro_batches():
    net, x = model(), batches(5)
    tasks = TaskAccumulator(net, {"fit": 0.85, "size": 0.15})
    for k, name in enumerate(("fit", "fit", "size", "fit", "size")):
        with tasks.accumulate(name):
            LOSSES[name](net, x[k]).backward()
    assert tasks.counts == {"fit": 3, "size": 2}
    wanted = torch.stack(
        [
            0.85 * sum(gradient(net, fit(net, x[k])) for k in (0, 1, 3)) / 3,
            0.15 * sum(gradient(net, size(net, x[k])) for k in (2, 4)) / 2,
        ]
    )
    torch.testing.assert_close(tasks.jacobian(), wanted, rtol=1e-13, atol=1e-15)
    assert all(p.grad is None for p in net.parameters())


def test_equal_micro_batches_are_one_batch():
    net, x = model(), batches(1)[0]
    tasks = TaskAccumulator(net, ("fit",))
    for _ in range(4):
        with tasks.accumulate("fit"):
            fit(net, x).backward()
    torch.testing.assert_close(tasks.jacobian()[0], gradient(net, fit(net, x)), rtol=1e-14, atol=1e-16)


def test_variance_falls_with_the_number_of_micro_batches():
    """200 independent accumulations of K noisy gradients: K times their variance is chi-square about its own size."""
    weight = nn.Parameter(torch.zeros(10, dtype=torch.float64))
    g = torch.Generator().manual_seed(3)
    for k in (1, 4, 16):
        found = []
        tasks = TaskAccumulator([weight], ("a",))
        for _ in range(200):
            for _ in range(k):
                with tasks.accumulate("a"):
                    (weight @ torch.randn(10, generator=g, dtype=torch.float64)).backward()
            found.append(tasks.jacobian()[0])
            tasks.advance()
        sum_of_squares = float(torch.stack(found).square().sum()) * k
        assert abs(sum_of_squares - 2000) < 5 * math.sqrt(2 * 2000)


def test_the_users_gradients_are_given_back_and_a_failed_block_leaves_nothing():
    net, x = model(), batches(2)
    net(x[0]).sum().backward()
    own = [p.grad for p in net.parameters()]
    kept = [g.clone() for g in own]
    tasks = TaskAccumulator(net, ("fit", "size"))
    with tasks.accumulate("fit"):
        fit(net, x[0]).backward()
    before = tasks.sums[0].clone()

    def interrupted():
        with tasks.accumulate("fit"):
            fit(net, x[1]).backward()
            raise MemoryError

    with pytest.raises(MemoryError):
        interrupted()
    assert tasks.counts["fit"] == 1
    assert torch.equal(tasks.sums[0], before)
    for p, mine, value in zip(net.parameters(), own, kept, strict=True):
        assert p.grad is mine
        assert torch.equal(mine, value)
    with tasks.accumulate("size"):  # not left open by the failure
        size(net, x[0]).backward()


def test_several_backward_calls_in_a_block_add_up():
    net, x = model(), batches(2)
    tasks = TaskAccumulator(net, ("fit",))
    with tasks.accumulate("fit"):
        fit(net, x[0]).backward()
        fit(net, x[1]).backward()
    torch.testing.assert_close(
        tasks.jacobian()[0], gradient(net, fit(net, x[0])) + gradient(net, fit(net, x[1]))
    )


@pytest.mark.parametrize("keep", [False, True])
def test_missing_gradients_are_zero_also_where_an_earlier_step_had_some(keep):
    net, x = model(), batches(1)[0]
    tasks = TaskAccumulator(net, ("a", "b"), keep_previous=keep)
    for step in range(6):
        whole, head = ("a", "b") if step in {0, 1, 4} else ("b", "a")
        with tasks.accumulate(whole):
            fit(net, x).backward()
        with tasks.accumulate(head):
            net[2].weight.square().sum().backward()
        assert int(tasks.jacobian()[tasks.tasks.index(head)].count_nonzero()) == 10
        tasks.advance()


def test_an_empty_block_is_refused_or_counts_as_zero():
    net, x = model(), batches(1)[0]
    tasks = TaskAccumulator(net, ("fit",))
    with (
        pytest.raises(RuntimeError, match="must compute a gradient, got none in 4 parameters"),
        tasks.accumulate("fit"),
    ):
        fit(net, x)
    assert tasks.counts["fit"] == 0
    with tasks.accumulate("fit", allow_empty=True):
        pass
    with tasks.accumulate("fit"):
        fit(net, x).backward()
    torch.testing.assert_close(tasks.jacobian()[0], gradient(net, fit(net, x)) / 2)


def test_sums_of_half_precision_are_kept_in_float32():
    """In bfloat16 one plus 1/512 is one: 64 such micro-batches would be lost (trap 3)."""
    weight = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    tasks = TaskAccumulator([weight], ("a",))
    for k in range(65):
        with tasks.accumulate("a"):
            (weight.sum() * (1.0 if k == 0 else 1 / 512)).backward()
    assert tasks.sums[0].dtype == torch.float32
    assert tasks.sums[0].tolist() == [[1.125] * 3]


def test_frozen_tied_and_plain_parameters_and_other_memory_formats():
    conv = nn.Conv2d(3, 4, 3, dtype=torch.float64)
    assert conv.bias is not None
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    tasks = TaskAccumulator([conv.weight, conv.bias, conv.weight, *frozen.parameters()], ("a",))
    assert tasks.layout.size == conv.weight.numel() + 4
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    with tasks.accumulate("a"):
        conv(x).square().sum().backward()
    writer = MomentumWriter(tasks.layout, beta=0.0)
    writer.write_(tasks.jacobian()[0])
    expected = torch.autograd.grad(conv(x).square().sum(), [conv.weight, conv.bias])
    assert written(conv.weight).stride() == conv.weight.stride()
    torch.testing.assert_close([written(conv.weight), written(conv.bias)], list(expected))


def test_sparse_gradients_of_an_embedding():
    table = nn.Embedding(6, 2, sparse=True)
    tasks = TaskAccumulator(table, ("a",))
    for rows in ([0, 1], [1, 1]):
        with tasks.accumulate("a"):
            table(torch.tensor(rows)).sum().backward()
    assert tasks.sums[0].view(6, 2)[:, 0].tolist() == [1.0, 3.0, 0.0, 0.0, 0.0, 0.0]


def test_several_dtypes_make_several_rows():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3, dtype=torch.float64))
    tasks = TaskAccumulator([a, b], ("x",))
    with tasks.accumulate("x"):
        (a.sum().double() * b.sum()).backward()
    assert [rows.shape for rows in tasks.sums] == [(1, 2), (1, 3)]
    with pytest.raises(ValueError, match="must share one device and dtype for a Jacobian, got 2 kinds"):
        tasks.jacobian()
    MomentumWriter(tasks.layout, 0.0).combine_(tasks.sums, [2.0])
    assert (written(a).tolist(), written(b).tolist()) == ([6.0, 6.0], [4.0, 4.0, 4.0])


def test_parts_recombine_with_torchjd():
    net, x = model(), batches(2)
    tasks, writer = TaskAccumulator(net, ("fit", "size")), MomentumWriter(net, beta=0.5)
    momentum = 0.0
    for step in range(1, 4):
        for name, loss in LOSSES.items():
            with tasks.accumulate(name):
                loss(net, x[0]).backward()
        rows = torch.stack([gradient(net, loss(net, x[0])) for loss in LOSSES.values()])
        torch.manual_seed(step)
        writer.write_(PCGrad()(tasks.jacobian()))
        torch.manual_seed(step)
        momentum = 0.5 * momentum + 0.5 * PCGrad()(rows)
        torch.testing.assert_close(flat(net), momentum / (1 - 0.5**step))
        tasks.reset()
        with torch.no_grad():
            for p in net.parameters():
                p.sub_(0.1 * written(p))


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        ((), ValueError, "tasks must be names"),
        ("fit", ValueError, "tasks must be names, or names with weights, got 'fit'"),
        (("a", "a"), ValueError, "tasks must have distinct names"),
        ((1, 2), TypeError, "tasks must be named by strings, got 1"),
        ({"a": 0.0}, ValueError, r"tasks\['a'\] must be > 0, got 0.*Leave the task out"),
        ({"a": "1"}, TypeError, r"tasks\['a'\] must be a number"),
    ],
)
def test_bad_tasks_are_named(tasks, error, message):
    with pytest.raises(error, match=message):
        TaskAccumulator(model(), tasks)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (lambda net: net.requires_grad_(False), ValueError, "must include a trainable one, got 4 frozen"),
        (lambda net: [], ValueError, "parameters must not be empty"),
        (lambda net: 3, TypeError, "parameters must be a module"),
        (
            lambda net: [torch.zeros(1, dtype=torch.complex64).requires_grad_()],
            TypeError,
            "must be real, got",
        ),
    ],
)
def test_bad_parameters_are_named(params, error, message):
    for part in (lambda p: TaskAccumulator(p, ("a",)), MomentumWriter):
        with pytest.raises(error, match=message):
            part(params(model()))


def test_misuse_of_blocks_is_refused():
    net, x = model(), batches(1)[0]
    tasks = TaskAccumulator(net, ("fit", "size"))
    with (
        pytest.raises(ValueError, match="task must be one of fit, size, got 'siez'"),
        tasks.accumulate("siez"),
    ):
        pass
    nested = pytest.raises(RuntimeError, match=r"accumulate\('size'\) must not be nested")
    with nested, tasks.accumulate("fit"), tasks.accumulate("size"):
        pass
    with tasks.accumulate("fit"):
        fit(net, x).backward()
    with pytest.raises(RuntimeError, match="got no micro-batch of size"):
        tasks.jacobian()
    with tasks.accumulate("size"):
        size(net, x).backward()
    tasks.jacobian()
    with pytest.raises(RuntimeError, match="must come before reduce_"), tasks.accumulate("fit"):
        fit(net, x).backward()
    tasks.reset()
    assert set(tasks.counts.values()) == {0}
