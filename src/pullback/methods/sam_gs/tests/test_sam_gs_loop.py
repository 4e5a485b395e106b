"""The plain loop: what `multitask_backward` writes, on its own and beside TorchJD, a scaler, an optimizer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torchjd.aggregation import Sum
from torchjd.autojac import backward, jac_to_grad, mtl_backward

from pullback.methods import sam_gs

SAMGS: Any = sam_gs.SAMGS
multitask_backward: Any = sam_gs.multitask_backward  # also with arguments that must be refused


class Model(nn.Module):
    """A trunk with one frozen layer and three heads of different scales."""

    trunk: Any
    heads: Any

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5))
        self.heads = nn.ModuleList([nn.Linear(5, 1) for _ in range(3)])
        g = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype)
        self.trunk[2].weight.requires_grad_(False)
        self.to(dtype)

    def losses(self, x):
        z = self.trunk(x)
        return [
            scale * head(z).square().mean() for scale, head in zip((1.0, 0.03, 30.0), self.heads, strict=True)
        ]


def batch(seed=0, n=8, dtype=torch.float64):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_hand(model, x, aggregator):
    """Gradients by name as the definition says."""
    trunk = {n: p for n, p in model.named_parameters() if n.startswith("trunk") and p.requires_grad}
    heads = {n: p for n, p in model.named_parameters() if n.startswith("heads")}
    rows = []
    for loss in model.losses(x):
        grads = torch.autograd.grad(loss, list(trunk.values()), retain_graph=True)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    parts = aggregator(torch.stack(rows)).split([p.numel() for p in trunk.values()])
    found = {n: part.view(p.shape) for (n, p), part in zip(trunk.items(), parts, strict=True)}
    return found | dict(
        zip(heads, torch.autograd.grad(sum(model.losses(x)), list(heads.values())), strict=True)
    )


def grads(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **(tolerance or {"rtol": 1e-12, "atol": 1e-14}))


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [SAMGS, lambda: SAMGS(gamma=0.0), lambda: SAMGS(variant="paper"), Sum])
@pytest.mark.parametrize("explicit", [False, True])
def test_trunk_is_aggregated_and_heads_are_plain(make, explicit):
    model, ours, theirs = Model(), make(), make()
    for step in range(3):
        model.zero_grad()
        wanted = by_hand(model, batch(step), theirs)
        heads = model.heads if explicit else None
        multitask_backward(model.losses(batch(step)), shared=model.trunk, aggregator=ours, heads=heads)
        same(grads(model), wanted)


def test_torchjd_drives_it_to_the_same_gradients():
    wanted = by_hand(Model(), batch(), SAMGS())
    for drive in ("backward", "mtl_backward"):
        model = Model()
        trunk = [p for p in model.trunk.parameters() if p.requires_grad]
        if drive == "backward":
            backward(model.losses(batch()), inputs=trunk)
        else:
            z = model.trunk(batch())
            scales = zip((1.0, 0.03, 30.0), model.heads, strict=True)
            mtl_backward([s * head(z).square().mean() for s, head in scales], features=z)
            same(
                {n: g for n, g in grads(model).items() if "heads" in n},
                {n: wanted[n] for n in wanted if "heads" in n},
            )
        jac_to_grad(trunk, SAMGS())
        same(
            {n: g for n, g in grads(model).items() if "trunk" in n},
            {n: wanted[n] for n in wanted if "trunk" in n},
        )


def test_report_names_tasks_and_measures_them():
    model, aggregator = Model(), SAMGS(gamma=0.9)
    losses = dict(zip(("depth", "normals", "labels"), model.losses(batch()), strict=True))
    report = multitask_backward(losses, shared=model.trunk, aggregator=aggregator)
    trunk = [p for p in model.trunk.parameters() if p.requires_grad]
    rows = torch.stack(
        [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, trunk, retain_graph=True)])
            for loss in model.losses(batch())
        ]
    )
    assert report.names == ("depth", "normals", "labels")
    assert report.branch == "equalise"
    torch.testing.assert_close(report.norms, rows.norm(dim=1))
    units = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(report.cosines, units @ units.T)
    off = aggregator.similarity_matrix(rows)[[0, 0, 1], [1, 2, 2]].mean()
    torch.testing.assert_close(report.similarity, off)
    other = multitask_backward(model.losses(batch()), shared=model.trunk, aggregator=Sum())
    assert other.branch == "Sum"
    torch.testing.assert_close(other.similarity, off)
    with pytest.raises(AttributeError):
        report.branch = "momentum"


def test_gradients_are_added_to_what_is_there():
    model, aggregator = Model(), SAMGS()
    multitask_backward(model.losses(batch()), shared=model.trunk, aggregator=aggregator)
    once = grads(model)
    aggregator.reset()
    multitask_backward(model.losses(batch()), shared=model.trunk, aggregator=aggregator)
    same(grads(model), {n: 2 * g for n, g in once.items()})


def test_a_task_without_gradient_to_the_trunk_and_a_head_of_two_tasks():
    model, aggregator = Model(), SAMGS(gamma=0.5, max_norm=math.inf)
    z, lone = model.trunk(batch()), model.heads[2]
    losses = [
        model.heads[0](z).square().mean(),
        model.heads[0](z).abs().mean(),
        lone(torch.ones(2, 5, dtype=torch.float64)).sum(),
    ]
    total = torch.autograd.grad(losses[0] + losses[1], list(model.heads[0].parameters()), retain_graph=True)
    report = multitask_backward(losses, shared=model.trunk, aggregator=aggregator)
    assert report.norms[2] == 0
    assert report.cosines[2].tolist() == [0, 0, 0]
    assert lone.weight.grad.tolist() == [[2.0] * 5]
    torch.testing.assert_close(model.heads[0].weight.grad, total[0])
    assert model.heads[1].weight.grad is None
    assert bool(model.trunk[0].weight.grad.isfinite().all())


def test_shapes_layouts_and_dtypes_of_shared_parameters():
    scalar: Any = nn.Parameter(torch.tensor(0.5))
    image: Any = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    low: Any = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    shared = [scalar, image, low, image]
    losses = [scalar * image.square().sum(), (low * scalar).sum(), image.sum()]
    multitask_backward(losses, shared=shared, aggregator=SAMGS(gamma=0.0))
    assert scalar.grad.shape == ()
    assert image.grad.is_contiguous(memory_format=torch.channels_last)
    assert low.grad.dtype == torch.bfloat16
    fixed = image.detach().contiguous()
    rows = torch.stack(
        [
            torch.cat([fixed.square().sum().view(1), fixed.reshape(-1), torch.zeros(3)]),  # d(0.5 x^2) = x
            torch.cat([torch.tensor([3.0]), torch.zeros(96), torch.full((3,), 0.5)]),
            torch.cat([torch.zeros(1), torch.ones(96), torch.zeros(3)]),
        ]
    )
    wanted = SAMGS(gamma=0.0)(rows)
    torch.testing.assert_close(scalar.grad, wanted[0])
    torch.testing.assert_close(image.grad, wanted[1:97].view(2, 3, 4, 4))
    torch.testing.assert_close(low.grad, wanted[97:].bfloat16())


# --- trouble ---------------------------------------------------------------------------------------------------------


def test_nan_in_one_task_is_named_or_left_out_whole():
    model = Model()
    multitask_backward(model.losses(batch(1)), shared=model.trunk, aggregator=SAMGS())
    before = grads(model)
    for policy in ("raise", "skip"):
        losses = dict(zip("abc", model.losses(batch()), strict=True))
        losses["b"] = losses["b"] * math.nan
        aggregator = SAMGS(nonfinite=policy)
        if policy == "raise":
            with pytest.raises(ValueError, match=r"'task 1' holds NaN.*The tasks are a, b, c\."):
                multitask_backward(losses, shared=model.trunk, aggregator=aggregator)
        else:
            report = multitask_backward(losses, shared=model.trunk, aggregator=aggregator)
            assert report.branch == "skip"
        assert aggregator.steps == 0
        same(grads(model), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("losses", "shared", "error", "message"),
    [
        (lambda m: [], None, ValueError, "losses must hold at least one loss, got none"),
        (lambda m: torch.stack(m.losses(batch())), None, TypeError, "losses must be a list or a mapping"),
        (
            lambda m: [m.trunk(batch())],
            None,
            ValueError,
            r"losses\[0\] must be a scalar tensor, got a tensor of shape",
        ),
        (lambda m: {"a": torch.tensor(1.0)}, None, ValueError, r"losses\[a\] must depend on parameters"),
        (
            lambda m: m.losses(batch()),
            lambda m: iter(()),
            ValueError,
            "must hold at least one trainable parameter",
        ),
        (
            lambda m: m.losses(batch()),
            lambda m: [m.trunk[2].weight],
            ValueError,
            "at least one trainable parameter",
        ),
        (
            lambda m: m.losses(batch()),
            lambda m: m.trunk[0].weight,
            TypeError,
            "a module or an iterable of parameters",
        ),
        (
            lambda m: m.losses(batch()),
            lambda m: ["w"],
            TypeError,
            r"shared\[0\] must be of type Tensor, got str",
        ),
    ],
)
def test_arguments_that_make_no_sense(losses, shared, error, message):
    model = Model()
    with pytest.raises(error, match=message):
        multitask_backward(losses(model), shared=shared(model) if shared else model.trunk, aggregator=SAMGS())


def test_other_refusals():
    model = Model()
    with pytest.raises(TypeError, match="aggregator must be of type Aggregator, got function"):
        multitask_backward(model.losses(batch()), shared=model.trunk, aggregator=smallest)
    with pytest.raises(ValueError, match="process_group must be one of 'auto', got 'all'"):
        multitask_backward(model.losses(batch()), shared=model.trunk, aggregator=Sum(), process_group="all")
    table = nn.Embedding(5, 3, sparse=True)
    with pytest.raises(TypeError, match=r"must be dense, got torch\.sparse_coo.*sparse=False"):
        multitask_backward([table(torch.tensor([1])).sum()], shared=table, aggregator=Sum())
    elsewhere = nn.Parameter(torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match="shared must lie on one device, got"):
        multitask_backward(model.losses(batch()), shared=[model.trunk[0].weight, elsewhere], aggregator=Sum())


def smallest(rows):
    return rows.min(0).values


def test_one_loss_is_an_ordinary_backward():
    model, twin = Model(), Model()
    twin.losses(batch())[0].backward()
    with pytest.warns(RuntimeWarning, match="a single row"):
        report = multitask_backward(model.losses(batch())[:1], shared=model.trunk, aggregator=SAMGS())
    assert report.branch == "single"
    same(grads(model), grads(twin))
