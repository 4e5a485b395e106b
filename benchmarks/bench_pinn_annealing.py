"""Cost of annealed loss weights, of gated layers, and of derivatives in Taylor mode, on the Helmholtz equation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from benchmarks.harness import Row, ratio
from torch import Tensor, nn

from pullback.core.streams import generator
from pullback.lab.models.pde import Evaluate, Helmholtz
from pullback.lab.models.taylor import Derivatives, derivatives
from pullback.methods.pinn_annealing import GradientAnnealing, ModifiedMLP, glorot_normal_, weight_matrices

STEPS = 10
Losses = Callable[[], dict[str, Tensor]]


def perceptron() -> nn.Module:
    """Three hidden layers of 50, as in the paper."""
    sizes = (nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh())
    net = nn.Sequential(*sizes, nn.Linear(50, 1))
    glorot_normal_(net)
    return net


def taylor(net: nn.Module) -> Evaluate:
    """Derivatives in one forward pass."""

    def evaluate(x: Tensor, order: Literal[0, 1, 2]) -> Derivatives:
        if order == 0:
            u = net(x)
            return Derivatives(u, u.new_zeros(0), None)
        return derivatives(net, x)

    return evaluate


def nested(net: nn.Module) -> Evaluate:
    """Derivatives as they are usually taken: autograd twice."""

    def evaluate(x: Tensor, order: Literal[0, 1, 2]) -> Derivatives:
        if order == 0:
            u = net(x)
            return Derivatives(u, u.new_zeros(0), None)
        x = x.detach().requires_grad_()
        u = net(x)
        (slopes,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        curves = [torch.autograd.grad(slopes[:, j].sum(), x, create_graph=True)[0][:, j] for j in range(2)]
        return Derivatives(u, slopes.T[..., None], torch.stack(curves)[..., None])

    return evaluate


def losses_of(evaluate: Evaluate) -> Losses:
    """Losses on fixed points: 128 inside and 128 on each side."""
    problem = Helmholtz()
    found = problem.draw(128, 1, generator("bench", 0), torch.float32)
    points = {name: (x[0], data[0]) for name, (x, data) in found.items()}
    return lambda: problem.losses(points, evaluate)


def plain(net: nn.Module, losses: Losses) -> Callable[[], None]:
    """Ten steps on the sum."""
    optimizer = torch.optim.Adam(net.parameters(), fused=True)

    def steps() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            one = losses()
            (one["residual"] + one["boundary"]).backward()
            optimizer.step()

    return steps


def annealed(net: nn.Module, losses: Losses, *, separate: bool) -> Callable[[], None]:
    """Ten steps with one update of the weights among them."""
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    balance = GradientAnnealing("boundary", params=weight_matrices(net), update_every=STEPS)

    def steps() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            if separate:
                balance.backward(losses())
            else:
                balance(losses()).backward()
            optimizer.step()

    return steps


def residual(net: nn.Module, losses: Losses) -> Callable[[], None]:
    """Forward and backward pass of the residual alone, ten times."""
    params = list(net.parameters())

    def passes() -> None:
        for _ in range(STEPS):
            torch.autograd.grad(losses()["residual"], params, allow_unused=True)

    return passes


def ratios() -> list[Row]:
    """All rows of this benchmark."""
    nets = [perceptron() for _ in range(5)]
    gated = ModifiedMLP(2, 50, 1)
    base = plain(nets[0], losses_of(taylor(nets[0])))
    quick, usual = (
        annealed(net, losses_of(taylor(net)), separate=separate)
        for net, separate in ((nets[1], True), (nets[2], False))
    )
    what = f"{STEPS} steps, annealing every {STEPS}"
    return [
        Row(f"{what}: balance.backward(losses)", "plain steps", ratio(quick, base), bound=1.1),
        Row(f"{what}: balance(losses).backward()", "plain steps", ratio(usual, base)),
        Row(
            f"{what}: balance.backward(losses), nested autograd",
            "plain steps, nested autograd",
            ratio(
                annealed(nets[3], losses_of(nested(nets[3])), separate=True),
                plain(nets[4], losses_of(nested(nets[4]))),
            ),
            bound=1.1,
        ),
        *(
            Row(
                f"losses and gradient of the residual, {name}, Taylor mode",
                "nested autograd",
                ratio(residual(net, losses_of(taylor(net))), residual(net, losses_of(nested(net)))),
                bound=1.0,
            )
            for name, net in (("perceptron", nets[0]), ("ModifiedMLP", gated))
        ),
        Row(
            "plain steps, ModifiedMLP",
            "perceptron of the same depth and width",
            ratio(plain(gated, losses_of(taylor(gated))), base),
            note="the paper prints 3.8 in time for both changes together",
        ),
    ]
