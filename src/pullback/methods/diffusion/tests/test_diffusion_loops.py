"""In a user's loop: optimizers, accumulation, resuming, half precision, compilation, two processes."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pullback.core.streams import generator
from pullback.methods.diffusion import (
    ConsistencyMap,
    Denoiser,
    GaussianMixture,
    GaussianPath,
    MeanFlow,
    cfg,
    sample,
)
from pullback.methods.diffusion.tests.cases import Toy
from pullback.testing import run_ranks

MIXTURE = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.2)


class Image(nn.Module):
    """A convolution over images [batch, 1, 6, 6] that knows the time."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(2, 1, 3, padding=1)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))

    def forward(self, x, t):
        return self.conv(torch.cat([x, t.view(-1, 1, 1, 1).expand_as(x)], 1))


def perceptron():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 2)
            )

        def forward(self, x, t):
            return self.layers(torch.cat([x, t[:, None]], 1))

    torch.manual_seed(0)
    return Net()


def test_a_plain_loop_learns_the_mixture():
    model = Denoiser(perceptron(), GaussianPath.linear(), "v")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 400)
    for step in range(400):
        draws = generator("train", 0, step)
        optimizer.zero_grad()
        model.loss(MIXTURE.sample(256, generator=draws), generator=draws).backward()
        optimizer.step()
        schedule.step()
    found = sample(model, (500, 2), steps=30)
    assert float((found[:, 0].abs() - 1.0).abs().mean()) < 0.35
    assert 0.35 < float((found[:, 0] > 0).float().mean()) < 0.65


def losses():
    return {
        "denoiser": (lambda: Denoiser(Toy(2), GaussianPath.cosine(), "v"), {}),
        "edm": (lambda: Denoiser(Toy(2), GaussianPath.ve(), "edm"), {"weight": "edm"}),
        "meanflow": (lambda: MeanFlow(Toy(2, times=2), GaussianPath.linear()), {"same": 0.5}),
        "consistency": (lambda: ConsistencyMap(Toy(2), GaussianPath.cosine()), {}),
    }


def trained(make, options, steps, model=None, optimizer=None, first=0):
    model = make() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2) if optimizer is None else optimizer
    for step in range(first, steps):
        draws = generator("train", 0, step)
        optimizer.zero_grad()
        model.loss(MIXTURE.sample(16, generator=draws), generator=draws, **options).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("which", losses())
def test_training_resumes_bit_by_bit(which):
    make, options = losses()[which]
    whole, _ = trained(make, options, 6)
    half, optimizer = trained(make, options, 3)
    file = io.BytesIO()
    torch.save({"model": half.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = make()
    fresh.load_state_dict(state["model"])
    again = torch.optim.AdamW(fresh.parameters(), lr=1e-2)
    again.load_state_dict(state["optimizer"])
    trained(make, options, 6, fresh, again, first=3)
    for one, other in zip(whole.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)


def test_accumulated_halves_are_the_whole_batch():
    x0, eps = torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.1, 0.9, 8)
    one, two = (Denoiser(Toy(2), GaussianPath.cosine(), "eps") for _ in range(2))
    one.loss(x0, t, eps=eps).backward()
    for part in (slice(0, 4), slice(4, 8)):
        (0.5 * two.loss(x0[part], t[part], eps=eps[part])).backward()
    for p, q in zip(one.net.first.parameters(), two.net.first.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("which", losses())
def test_under_autocast_states_and_losses_stay_in_single_precision(which):
    make, options = losses()[which]
    model = make()
    x0 = MIXTURE.sample(16, generator=torch.Generator().manual_seed(0))
    plain = model.loss(x0, generator=torch.Generator().manual_seed(1), **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(x0, generator=torch.Generator().manual_seed(1), **options)
        states = (
            sample(model, (4, 2), steps=3) if isinstance(model, Denoiser) else model.sample((4, 2), steps=2)
        )
    assert loss.dtype == states.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), plain.detach(), rtol=0.05, atol=0.02)
    torch.amp.GradScaler("cpu", enabled=False).scale(loss).backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_network_in_half_precision_gets_and_gives_what_the_state_needs():
    model = Denoiser(Toy(2), GaussianPath.cosine(), "v").bfloat16()
    found = sample(model, (4, 2), steps=5)
    assert found.dtype == torch.float32
    exact = sample(copy.deepcopy(model).float(), (4, 2), steps=5)
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.1)
    assert model.loss(torch.zeros(4, 2), generator=torch.Generator().manual_seed(0)).dtype == torch.float32


def test_images_of_any_shape_and_an_empty_batch():
    model = Denoiser(Image(), GaussianPath.cosine(), "v")
    assert sample(model, (2, 1, 6, 6), steps=3, solver="unipc").shape == (2, 1, 6, 6)
    assert sample(model, (0, 1, 6, 6), steps=3).shape == (0, 1, 6, 6)
    x0 = torch.zeros(3, 1, 6, 6)
    assert model.loss(x0, generator=torch.Generator().manual_seed(0), reduction="none").shape == (3,)


def test_the_model_stays_in_its_mode_and_conditions_arrive():
    model = Denoiser(Toy(2), GaussianPath.cosine(), "v", null={"y": 3})
    model.train()
    labels = torch.tensor([0, 1, 2])
    one = sample(model, (3, 2), steps=3, cond={"y": labels})
    assert model.training
    assert torch.equal(one, sample(cfg(model, 1.0, {"y": labels}), (3, 2), steps=3))
    assert not torch.equal(one, sample(model, (3, 2), steps=3, cond={"y": labels.flip(0)}))


@pytest.mark.parametrize("predicts", ["eps", "v", "edm"])
def test_prediction_and_loss_compile_in_one_graph(predicts):
    model = Denoiser(Toy(2), GaussianPath.cosine(), predicts)
    x0, eps = torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.1, 0.9, 8)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, t, e: model.loss(x, t, eps=e), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x0, t, eps), model.loss(x0, t, eps=eps))
    net: Any = torch.compile(Toy(2), backend="aot_eager", fullgraph=True)
    found = sample(Denoiser(net, GaussianPath.cosine(), predicts), (4, 2), steps=4)
    torch.testing.assert_close(found, sample(model, (4, 2), steps=4))
    torch._dynamo.reset()


# --- two processes ----------------------------------------------------------------------------------------------------


def found_on(rank):
    """Parameters after three steps; every rank has half of the batch and, in the second run, its own random numbers."""
    world, found = dist.get_world_size(), {}
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    x0, eps = torch.randn(2, 3, 8, 2, generator=torch.Generator().manual_seed(0))
    times = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    net = Toy(2)
    del net.labels  # never used: DDP would wait for its gradient
    inner = DistributedDataParallel(net) if world > 1 else net
    model = Denoiser(inner, GaussianPath.cosine(), "v")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        model.loss(x0[step, share], times[step, share], eps=eps[step, share], weight="eps").backward()
        optimizer.step()
    found["given"] = torch.cat([p.detach().flatten() for p in net.parameters()])
    for name, made in (("meanflow", MeanFlow), ("consistency", ConsistencyMap)):
        net = Toy(2, times=2 if made is MeanFlow else 1)
        del net.labels
        model = made(DistributedDataParallel(net) if world > 1 else net, GaussianPath.linear())
        draws = torch.Generator().manual_seed(rank)
        model.loss(x0[0, share], generator=draws).backward()
        found[name] = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        found[f"{name} drawn"] = torch.rand(1, generator=draws)
    return found


@pytest.mark.slow
def test_two_processes_train_as_one_on_the_whole_batch():
    (alone,), (first, second) = run_ranks(found_on, ranks=1), run_ranks(found_on)
    for name in ("given", "meanflow", "consistency"):
        assert torch.equal(first[name], second[name]), name
    torch.testing.assert_close(first["given"], alone["given"])
    assert not torch.equal(first["meanflow drawn"], second["meanflow drawn"])
