"""The oracles of Normalize-and-Project: the reference, equivalent rates, norm law, invariances."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from pullback.core.attachment import attach
from pullback.methods.nap import Project, insert_norms
from pullback.methods.nap.tests import reference

STEPS = 200


def network(eps=0.0, affine=False, activation=nn.ReLU):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 12), activation(), nn.Linear(12, 9), activation(), nn.Linear(9, 4))
    return insert_norms(plain.double(), eps=eps, affine=affine)


def batches(count=STEPS):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(count, 16, 5, generator=g).double()
    return list(zip(x, torch.randint(4, (count, 16), generator=g), strict=True))


def train(net, steps, rate=0.5, optimizer=None, before=None):
    optimizer = torch.optim.SGD(net.parameters(), lr=rate) if optimizer is None else optimizer
    seen = []
    for x, y in steps:
        out = net(x)
        seen.append(out.detach())
        optimizer.zero_grad()
        functional.cross_entropy(out, y).backward()
        if before is not None:
            before()
        optimizer.step()
    return seen


def parts(net):
    layers = [m for m in net.modules() if isinstance(m, nn.Linear)]
    return [layer.weight for layer in layers], layers[-1].bias


def projected(net, rate=0.5, **settings):
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    nap = Project(net, **settings)
    attach(optimizer, nap)
    return nap, optimizer


def largest(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def test_projected_training_is_the_references():
    net = network()
    weights, bias = parts(net)
    start = [w.detach().clone() for w in weights], bias.detach().clone()
    steps = batches()
    wanted = reference.train(*start, steps, 0.5, "project")
    _, optimizer = projected(net)
    assert largest(train(net, steps, optimizer=optimizer), wanted) < 1e-10


def test_projection_is_a_learning_rate_of_norm_squared_in_every_layer():
    """Oracle 1: an unprojected network with layer rates (||theta|| / rho)^2 computes the same function."""
    steps, net = batches(), network()
    twin = copy.deepcopy(net)
    _, optimizer = projected(net)
    wanted = train(net, steps, optimizer=optimizer)
    weights, bias = parts(twin)
    rho = [w.norm().item() for w in weights]
    layered = torch.optim.SGD([{"params": [p]} for p in (*weights, bias)], lr=0.5)

    def multiply():
        for group, weight, first in zip(layered.param_groups[:2], weights[:2], rho[:2], strict=True):
            group["lr"] = 0.5 * (weight.norm().item() / first) ** 2

    assert largest(train(twin, steps, optimizer=layered, before=multiply), wanted) < 1e-10
    assert weights[0].norm().item() / rho[0] > 1.2  # so that the rates really differ
    start = [w.detach() for w in parts(network())[0]], parts(network())[1].detach()
    assert largest(reference.train(*start, steps, 0.5, "multiply"), wanted) < 1e-10


def test_a_projection_that_never_comes_is_the_network_with_norms():
    steps = batches(40)
    net, twin = network(), network()
    _, optimizer = projected(net, every=None)
    assert largest(train(net, steps, optimizer=optimizer), train(twin, steps)) == 0.0
    third = network()
    _, optimizer = projected(third, every=41)  # later than the run
    assert largest(train(third, steps, optimizer=optimizer), train(network(), steps)) == 0.0


def test_gradients_are_orthogonal_and_shrink_with_the_norm():
    """Oracle 2, to 1e-12 with eps = 0."""
    net = network()
    x, y = batches(1)[0]
    found = Project(net).check_invariance(
        (x, y), lambda model, b: functional.cross_entropy(model(b[0]), b[1])
    )
    assert set(found) == {"0", "2"}
    assert max(found.values()) < 1e-12


def test_norms_are_those_of_the_start_and_the_function_is_unchanged():
    """Oracle 3 in float32."""
    net = network(eps=1e-6).float()
    nap, optimizer = projected(net)
    steps = [(x.float(), y) for x, y in batches(20)]
    train(net, steps, optimizer=optimizer)
    for growth in nap.growth().values():
        assert growth.item() == pytest.approx(1.0, rel=1e-6)
    attachmentless = Project(network(eps=1e-6).float())
    net = attachmentless.model
    with torch.no_grad():
        for weight in parts(net)[0][:-1]:
            weight.mul_(1.05)
        before = net(steps[0][0])
        attachmentless.project_()
        assert (net(steps[0][0]) - before).abs().max() < 2e-6
        for growth in attachmentless.growth().values():
            assert growth.item() == pytest.approx(1.0, rel=1e-6)


def test_the_norm_grows_by_the_squared_step():
    """Oracle 5: ||theta'||^2 - ||theta||^2 = eta^2 ||g||^2 for plain SGD."""
    net = network()
    weights, _ = parts(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.7)
    for x, y in batches(5):
        optimizer.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        before = [w.norm().item() ** 2 for w in weights[:2]]
        wanted = [0.49 * w.grad.norm().item() ** 2 for w in weights[:2]]
        optimizer.step()
        for weight, old, step in zip(weights, before, wanted, strict=False):
            assert weight.norm().item() ** 2 - old == pytest.approx(step, rel=1e-9)


def test_scale_of_gain_and_offset_passes_into_the_next_weight():
    """Oracle 6, and the joint norm is kept by the homogeneous option."""
    net = network(affine=True)
    x = batches(1)[0][0]
    first = net.norms._1
    with torch.no_grad():
        first.weight.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(3))
        first.bias.uniform_(-1.0, 1.0, generator=torch.Generator().manual_seed(4))
        before = net(x)
        first.weight.mul_(2.5)
        first.bias.mul_(2.5)
        getattr(net, "2").weight.div_(2.5)
        assert (net(x) - before).abs().max() < 1e-12
    net = network(affine=True)
    nap, optimizer = projected(net, affine="homogeneous")
    train(net, batches(10), optimizer=optimizer)
    pair = torch.cat([net.norms._1.weight, net.norms._1.bias])
    assert pair.square().sum().item() == pytest.approx(12.0, rel=1e-12)  # its value at gain 1 and offset 0
    assert nap.names == ["0.weight", "2.weight", "norms._1.weight", "norms._3.weight"]
    assert net.norms._1.bias.abs().max() > 0.01


def test_a_bias_that_stays_is_projected_jointly():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 4)).double()
    net = insert_norms(plain, bias="keep", eps=0.0)
    nap = Project(net)
    layer = getattr(net, "0")
    x, y = batches(1)[0]

    def loss(model, b):
        return functional.cross_entropy(model(b[0]), b[1])

    assert nap.check_invariance((x, y), loss)["0"] < 1e-12
    with torch.no_grad():
        before = net(x)
        layer.weight.mul_(3.0)
        layer.bias.mul_(3.0)
        nap.project_()
        assert (net(x) - before).abs().max() < 1e-12
    both = torch.cat([layer.weight.reshape(-1), layer.bias])
    assert both.norm().item() == pytest.approx(nap.norms()["0.weight"].item(), rel=1e-12)
    with torch.no_grad():  # the weight alone is not free in scale
        layer.weight.mul_(3.0)
        assert (net(x) - before).abs().max() > 1e-2


def convolutions(norm):
    torch.manual_seed(2)
    layers = [nn.Conv2d(2, 6, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3)]
    return nn.Sequential(*layers).double()


def test_channels_are_free_one_by_one_under_batch_norm_and_only_together_under_layer_norm():
    """Oracle 7."""
    x = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(5)).double()
    for norm, free in (
        (nn.BatchNorm2d(6, eps=1e-15), True),
        (nn.GroupNorm(1, 6, eps=0.0, affine=False), False),
    ):
        net = convolutions(norm)
        if not free:
            net[0].register_parameter("bias", None)
        for per in ("row", "tensor"):
            nap = Project(net, per=per)
            with torch.no_grad():
                before = net(x)
                net[0].weight[1].mul_(1.7)
                moved = float((net(x) - before).abs().max())
                assert (moved < 1e-12) is free
                net[0].weight[1].div_(1.7)
                net[0].weight.mul_(1.4)
                nap.project_()
                assert (net(x) - before).abs().max() < 1e-12
                assert torch.allclose(nap.growth()["0.weight"], torch.ones(()).double(), rtol=1e-14)
        rows = Project(net, per="row").norms()["0.weight"]
        assert rows.tolist() == pytest.approx([reference.norm(row) for row in net[0].weight.detach()])


def test_per_channel_norms_take_the_bias_out():
    net = convolutions(nn.BatchNorm2d(6))
    assert Project(net).names == ["0.weight"]
    net = convolutions(nn.GroupNorm(2, 6))
    assert Project(net)._blocks[0] == (0, 1)
    net = convolutions(nn.GroupNorm(6, 6))
    assert Project(net)._blocks[0] == (0,)


# --- effective rates --------------------------------------------------------------------------------------


def test_effective_rates_are_those_of_the_update():
    net = network()
    nap = Project(net)
    weight = parts(net)[0][0]
    norm = reference.norm(weight.detach())
    sgd, adam = torch.optim.SGD(net.parameters(), lr=0.3), torch.optim.Adam(net.parameters(), lr=0.3)
    assert nap.effective_lr(sgd)["0"] == pytest.approx(0.3 / norm**2)
    assert nap.effective_lr(adam)["0"] == pytest.approx(0.3 / norm)
    assert nap.effective_lr(adam, power=2)["0"] == pytest.approx(0.3 / norm**2)
    with torch.no_grad():
        weight.mul_(2)
    assert nap.effective_lr(sgd)["0"] == pytest.approx(0.3 / norm**2 / 4)
    assert list(nap.effective_lr(torch.optim.SGD([weight], lr=torch.tensor(0.1)))) == ["0"]

    class Other(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

    with pytest.raises(ValueError, match="power must be given for Other"):
        nap.effective_lr(Other(net.parameters()))
    with pytest.raises(ValueError, match="must hold a projected layer, got SGD with none"):
        nap.effective_lr(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))


def test_soft_affine_decay_pulls_gain_to_one_and_offset_to_zero():
    net = network(affine=True)
    nap, optimizer = projected(net, rate=0.0, affine="decay", affine_decay=0.25)
    with torch.no_grad():
        net.norms._1.weight.fill_(3.0)
        net.norms._1.bias.fill_(2.0)
    train(net, batches(2), optimizer=optimizer)
    assert net.norms._1.weight.tolist() == pytest.approx([1 + 2 * 0.75**2] * 12)
    assert net.norms._1.bias.tolist() == pytest.approx([2 * 0.75**2] * 12)
    assert nap.names == ["0.weight", "2.weight"]


def test_half_precision_training_stays_near_its_norm():
    net = network(eps=1e-6).to(torch.bfloat16)
    nap, optimizer = projected(net)
    train(net, [(x.bfloat16(), y) for x, y in batches(30)], optimizer=optimizer)
    for growth in nap.growth().values():
        assert abs(growth.item() - 1) < 2**-8
