"""Methods compose: noise, TrAct, LANTON and Normalize-and-Project on one transformer, against the order by hand."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pullback import LANTON, GradientNoise, Project, attach, insert_norms, lmo_groups, tract

STEPS, MICRO = 6, 2
LAM, ETA, GAMMA = 0.1, 1e-4, 0.55


class Transformer(nn.Module):
    """One block before a head: [n, t, 12] to [n, 5]."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Linear(12, 16)
        self.norms1, self.norms2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.mix = nn.Linear(16, 48, bias=False), nn.Linear(16, 16, bias=False)
        self.up, self.act, self.down = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        h = self.patch(x)
        q, k, v = self.qkv(self.norms1(h)).chunk(3, -1)
        h = h + self.mix(F.scaled_dot_product_attention(q, k, v))
        h = h + self.down(self.act(self.up(self.norms2(h))))
        return self.head(h.mean(1))


def normalised():
    torch.manual_seed(0)
    return insert_norms(Transformer())


def batches(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(MICRO, 24, 3, 12, generator=generator) * torch.linspace(0.2, 2.0, 12)
    return list(zip(x, torch.randint(5, (MICRO, 24), generator=generator), strict=True))


def loss_of(model, x, y):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    return F.cross_entropy(out.float(), y) / MICRO


def optimizer_of(model):
    settings = {"lr": 0.02, "alpha": 0.5, "noise_every": 2, "ns_dtype": "float32"}
    optimizer = LANTON(lmo_groups(model, head=model.head), **settings)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


class Composed:
    """The four methods by their own calls."""

    def __init__(self):
        self.model = normalised()
        tract(self.model.patch, lam=LAM)
        self.optimizer, self.scheduler = optimizer_of(self.model)
        self.attachment = attach(
            self.optimizer, GradientNoise(ETA, gamma=GAMMA, seed=3), Project(self.model), names=self.model
        )

    def train(self, steps):
        for step in steps:
            self.optimizer.zero_grad()
            for x, y in batches(step):
                loss_of(self.model, x, y).backward()
            self.optimizer.step()
            self.scheduler.step()
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def parts(self):
        return self.model, self.optimizer, self.scheduler, self.attachment


def by_hand(steps):
    """The documented order, written out: edit per micro-batch, sum, noise, step, projection, schedule."""
    model = normalised()
    optimizer, scheduler = optimizer_of(model)
    rows = [p for group in optimizer.param_groups for p in group["params"]]
    noise = GradientNoise(ETA, gamma=GAMMA, seed=3)
    rho = model.up.weight.detach().norm()
    for step in steps:
        optimizer.zero_grad()
        for x, y in batches(step):
            grads = dict(zip(rows, torch.autograd.grad(loss_of(model, x, y), rows), strict=True))
            inputs = x.reshape(-1, 12).double()
            damped = inputs.T @ inputs / len(inputs) + LAM * torch.eye(12, dtype=torch.float64)
            plain = grads[model.patch.weight].double()
            grads[model.patch.weight] = torch.linalg.solve(damped, plain, left=False).float()
            for p in rows:
                p.grad = grads[p] if p.grad is None else p.grad + grads[p]
        noise.update_(rows)
        optimizer.step()
        with torch.no_grad():
            model.up.weight.mul_(rho / model.up.weight.norm())
        scheduler.step()
    return model.state_dict()


def test_four_methods_give_the_trajectory_of_the_documented_order():
    composed, wanted = Composed(), by_hand(range(STEPS))
    found = composed.train(range(STEPS))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-5, msg=name)
    start = normalised().state_dict()
    assert all(not torch.equal(found[name], start[name]) for name in start)  # everything was trained


@pytest.mark.parametrize("without", ["tract", "noise", "projection"])
def test_each_of_them_matters(without):
    other = Composed()
    if without == "tract":
        other.model.patch.tract.remove()
    else:
        kept = [t for t in other.attachment.transforms if (t.name == "Project") == (without == "noise")]
        other.attachment.remove()
        attach(other.optimizer, *kept, names=other.model)
    found, wanted = other.train(range(STEPS)), by_hand(range(STEPS))
    assert any((found[name] - wanted[name]).abs().max() > 1e-3 for name in wanted)


def test_the_order_is_printed():
    composed = Composed()
    lines = repr(composed.attachment).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:4]] == [
        "1. before the step",
        "2. before the step",
        "3. the step",
    ]
    assert "GradientNoise" in lines[1]
    assert "LANTON (3 groups" in lines[3]
    assert lines[4].strip().startswith("4. after the step: Project(1 layers")


def test_the_projection_knows_a_decay_that_is_apart_from_the_gradient():
    composed = Composed()
    for group in composed.optimizer.param_groups:
        group["weight_decay"] = 0.01
    with pytest.warns(UserWarning, match="of LANTON; the projection cancels it"):
        composed.train(range(1))


def test_a_resumed_run_is_bitwise_the_uninterrupted_one():
    whole = Composed().train(range(STEPS))
    first = Composed()
    first.train(range(3))
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in first.parts()], buffer)
    buffer.seek(0)
    second = Composed()
    for part, state in zip(second.parts(), torch.load(buffer, weights_only=True), strict=True):
        part.load_state_dict(copy.deepcopy(state))
    resumed = second.train(range(3, STEPS))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
