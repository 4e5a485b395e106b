"""Small victims with dropout, what a client of theirs shares, and what the contracts need to know of the attack."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pullback.core.streams import generator
from pullback.methods.dia import DropoutInversion, record_masks
from pullback.testing import Case
from pullback.testing.tools import keeping_rng

LOSS = functional.cross_entropy


def seeded(model, seed=0):
    """Weights that do not depend on the global generator, at the size of torch's own initialisation."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            fan = parameter.shape[1:].numel() if parameter.dim() > 1 else parameter.numel()
            drawn = torch.randn(
                parameter.shape, generator=generator("victim", seed, index), dtype=torch.float64
            )
            parameter.copy_(drawn / fan**0.5)
    return model


def perceptron(p=0.25, width=24, side=4, bias=False, dtype=torch.float64, activation=nn.GELU):
    """Linear, activation, dropout twice, and a head: the victim of the closed forms."""
    layers: list[nn.Module] = [nn.Flatten()]
    size = side * side
    for _ in range(2):
        layers += [nn.Linear(size, width, bias=bias), activation(), nn.Dropout(p)]
        size = width
    return seeded(nn.Sequential(*layers, nn.Linear(size, 5, bias=bias))).to(dtype).train()


class Block(nn.Module):
    """Pre-norm transformer block with dropout on attention, projection and both layers of the perceptron."""

    def __init__(self, width, heads, p):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.on_attention, self.on_out, self.on_up, self.on_down = (nn.Dropout(p) for _ in range(4))

    def forward(self, x):
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        weights = self.on_attention((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))
        x = x + self.on_out(self.out((weights @ v).transpose(1, 2).flatten(2)))
        return x + self.on_down(self.down(self.on_up(functional.gelu(self.up(self.norm2(x))))))


class ViT(nn.Module):
    """Four patches and a class token."""

    def __init__(self, p=0.1, width=16):
        super().__init__()
        self.embed, self.place = nn.Linear(16, width), nn.Parameter(torch.zeros(1, 5, width))
        self.token, self.drop = nn.Parameter(torch.zeros(1, 1, width)), nn.Dropout(p)
        self.block, self.norm, self.head = Block(width, 2, p), nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x):
        patches = x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(1, 3).flatten(2)
        rows = torch.cat([self.token.expand(len(x), -1, -1), self.embed(patches)], 1) + self.place
        return self.head(self.norm(self.block(self.drop(rows))[:, 0]))


class Residual(nn.Module):
    """Two convolutions with batch normalisation and dropout of whole channels."""

    def __init__(self, p):
        super().__init__()
        self.one, self.norm, self.two = (
            nn.Conv2d(6, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.Conv2d(6, 6, 3, padding=1),
        )
        self.drop = nn.Dropout2d(p)

    def forward(self, x):
        return torch.relu(x + self.two(self.drop(torch.relu(self.norm(self.one(x))))))


def lenet(p=0.25):
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.GELU(), nn.Dropout(p), nn.Conv2d(6, 6, 3, stride=2), nn.GELU(), nn.Dropout(p),
        nn.Flatten(), nn.Linear(54, 5),
    )  # fmt: skip


def resnet(p=0.25):
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), Residual(p), nn.Dropout(p), nn.Flatten(), nn.Linear(384, 5)
    )


def picture(side=8, size=1, dtype=torch.float64):
    """Smooth images in [0, 1]."""
    grid = torch.linspace(0, 1, side, dtype=torch.float64)
    rows = [
        0.5 + 0.5 * torch.sin((3 + i) * grid[:, None] + i) * torch.cos((2 + i) * grid[None])
        for i in range(size)
    ]
    return torch.stack(rows)[:, None].to(dtype)


def client(model, x, y, seed=0):
    """Shared gradients and true masks of one step."""
    with record_masks(model, generator=generator("client", seed)) as masks:
        loss = LOSS(model(x), y)
    return torch.autograd.grad(loss, list(model.parameters())), masks


# --- contract ---

_X, _Y = picture(4), torch.tensor([2])


def _attack(**changed):
    settings: dict[str, Any] = {
        "bounds": (0.0, 1.0),
        "max_iters": 250,
        "schedule": "milestones",
        "tv": 0.0,
        "tolerance": 1e-9,
    }
    with keeping_rng():  # torch's layers draw first weights
        model = perceptron(0.25, width=32)
    return DropoutInversion(model, LOSS, **{**settings, **changed})


def _informed():
    """The attack that is told the masks finds the image to many digits."""
    _, masks = client(_attack().model, _X, _Y)
    return _attack(masks=masks, matching="euclidean", optimizer="lbfgs", lr=1.0, bounds=None, max_iters=120)


def _run(attack, budget, seed):
    gradients, _ = client(attack.model, _X, _Y)
    if budget is not None:
        attack = _attack(max_iters=budget)
    return attack.reconstruct(gradients, labels=_Y, input_shape=_X.shape, seed=seed)


def _run_informed(attack, budget, seed):
    gradients, masks = client(attack.model, _X, _Y)
    if budget is not None:
        attack = _attack(masks=masks, max_iters=budget)
    return attack.reconstruct(gradients, labels=_Y, input_shape=_X.shape, seed=seed)


def _hopeless(attack):
    """The attacker's loss is not finite anywhere."""
    gradients, _ = client(attack.model, _X, _Y)
    lost = DropoutInversion(
        attack.model, lambda out, labels: functional.cross_entropy(out, labels) * math.nan, max_iters=30
    )
    return lost.reconstruct(gradients, labels=_Y, input_shape=_X.shape)


_BAD = (
    lambda: _attack(lr=0.0),
    lambda: _attack(tv=-1.0),
    lambda: _attack(mask_reg=-1e-4),
    lambda: _attack(mask_init="ones"),
    lambda: _attack(masks="truth"),
    lambda: _attack(bounds=(1.0, 0.0)),
    lambda: _attack(max_iters=0),
)
CASES = (
    Case(
        name="DropoutInversion",
        kind="search",
        build=lambda: _attack(max_iters=60),
        run=_run,
        hopeless=_hopeless,
        bad=_BAD,
    ),
    Case(
        name="DropoutInversion[informed]",
        kind="search",
        build=_informed,
        run=_run_informed,
        solution=_X,
        tolerance=1e-4,
        hopeless=_hopeless,
        bad=_BAD,
    ),
)
