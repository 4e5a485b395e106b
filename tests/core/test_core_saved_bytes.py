"""The meter of saved bytes: storages once, parameters never, released memory not at all."""

import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pullback.core.saved_bytes import SavedBytes, saved_bytes


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def test_each_storage_counts_once():
    x = leaf(10, 7)
    assert saved_bytes(lambda: x * x) == x.nbytes
    assert saved_bytes(lambda: x * x.T.contiguous().T) == 2 * x.nbytes
    assert saved_bytes(lambda: (x * x) + (x.T * x.T).T) == x.nbytes


def test_a_view_counts_with_all_that_it_keeps_alive():
    x = leaf(2, 1000)
    assert saved_bytes(lambda: x[0, :3].detach() * leaf(3)) == x.nbytes


def test_parameters_buffers_and_inputs_are_left_out():
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4)).eval()
    x = torch.randn(5, 8)
    hidden = 5 * 16 * 4
    assert saved_bytes(lambda: net(x), net, x) == 2 * hidden  # input of the norm, output of tanh
    assert saved_bytes(lambda: net(x), net) == 2 * hidden + x.nbytes
    own = sum(p.nbytes for p in net[::3].parameters() if p.dim() == 2) - net[0].weight.nbytes
    assert saved_bytes(lambda: net(x), x) >= 2 * hidden + own


def test_the_count_falls_when_the_graph_goes():
    x = leaf(100)
    with SavedBytes() as meter:
        y = x.sin().cos()
        assert meter.bytes == 800
        y.sum().backward()
        assert (meter.bytes, meter.peak) == (0, 800)
        y = x.sin()
    assert meter.sizes == (400,)
    del y
    gc.collect()
    assert (meter.bytes, meter.peak, meter.sizes) == (0, 800, ())


def test_an_address_that_is_used_again_counts_again():
    x = leaf(1 << 16)
    with SavedBytes(x) as meter:
        first = (x * 2).sin()
        del first
        second = (x * 2).sin()
    assert meter.bytes == x.nbytes
    del second


def test_saved_outputs_are_released_without_the_collector():
    gc.disable()
    try:
        with SavedBytes() as meter:
            y = leaf(50).exp()
            assert meter.bytes == 200
            del y
        assert meter.bytes == 0
    finally:
        gc.enable()


def test_gradients_are_those_without_a_meter():
    net, x = nn.Sequential(nn.Linear(4, 6), nn.Softmax(1), nn.Linear(6, 2)), leaf(3, 4)
    wanted = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
    with SavedBytes(net):
        loss = net(x).square().sum()
    got = torch.autograd.grad(loss, [x, *net.parameters()])
    assert all(map(torch.equal, got, wanted))


def test_double_backward_is_counted_and_right():
    x = leaf(6)
    with SavedBytes(x) as meter:
        (g,) = torch.autograd.grad(x.exp().sum(), x, create_graph=True)
        assert meter.bytes > 0
        (h,) = torch.autograd.grad(g.sum(), x)
    torch.testing.assert_close(h, x.exp())


def test_a_checkpoint_counts_with_its_input():
    block = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8))
    x = leaf(10, 8)
    assert saved_bytes(lambda: checkpoint(block, x * 1, use_reentrant=False), block, x) == x.nbytes
    assert saved_bytes(lambda: block(x * 1), block, x) == x.nbytes + 10 * 64 * 4


def test_without_a_graph_nothing_is_kept():
    net = nn.Linear(3, 3)
    with torch.no_grad():
        assert saved_bytes(lambda: net(torch.ones(2, 3))) == 0


def test_sparse_and_memoryless_tensors_have_bytes():
    sparse = torch.eye(4).to_sparse()
    assert saved_bytes(lambda: torch.sparse.mm(sparse, leaf(4, 2))) >= sparse._values().nbytes
    with torch.device("meta"):
        x = torch.empty(9, requires_grad=True)
        assert saved_bytes(lambda: x.sin() + x.cos()) == 36


def test_a_meter_can_be_entered_again_and_survives_errors():
    meter = SavedBytes()
    with pytest.raises(ZeroDivisionError), meter:
        raise ZeroDivisionError
    with meter:
        y = leaf(4).sin()
    assert meter.bytes == 16
    z = y.sin()  # outside
    assert meter.bytes == 16
    del z


def test_what_cannot_be_left_out_is_refused():
    with pytest.raises(TypeError, match=r"exclude must be modules and tensors, got 3.*Pass net"):
        SavedBytes(3)
