"""Federated training of a small classifier in which every client shares the defended gradient of one image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pullback.core.streams import generator, stream_seed
from pullback.lab.models.inverted import held_images, reference


class Defends(Protocol):
    """What a client does to its gradients before it shares them, such as those of `pullback.core.gradient_defences`."""

    def __call__(self, gradients: Sequence[Tensor], *, step: int = 0) -> list[Tensor]:
        """New gradients; ``step`` tells the draws of different calls apart."""
        ...


def client_gradients(net: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The gradient of one client's batch, in the order of the parameters, in the mode the network is in."""
    return list(torch.autograd.grad(cross_entropy(net(x), y), list(net.parameters())))


def federated_accuracy(
    net: nn.Module, defence: Defends, *, rounds: int, clients: int, lr: float, seed: int
) -> float:
    """Train ``net`` in place by rounds of clients with one image each, and score it on the 1,000 held-out digits.

    The server averages what it gets and steps by Adam. Images and dropout depend on the seed alone.

    Args:
        net: classifier of [n, 1, 28, 28]; clients use it in training mode.
        defence: applied to every client's gradients by itself.
        rounds: steps of the server.
        clients: in a round.
        lr: of Adam.
        seed: of the order of images.

    Returns:
        Fraction of held-out digits that get their label, without dropout.
    """
    x, y = reference()
    order = torch.randperm(len(y), generator=generator("federated", seed))[: rounds * clients]
    parameters = list(net.parameters())
    optimizer = torch.optim.Adam(parameters, lr=lr)
    net.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed("federated-dropout", seed))
        for step, row in enumerate(order.tolist()):
            shared = defence(client_gradients(net, x[row : row + 1], y[row : row + 1]), step=step)
            for p, gradient in zip(parameters, shared, strict=True):
                mine = gradient / clients
                p.grad = mine if p.grad is None else p.grad.add_(mine)
            if (step + 1) % clients == 0:
                optimizer.step()
                optimizer.zero_grad()
    net.eval()
    held, labels = held_images()
    with torch.no_grad():
        return float((net(held).argmax(1) == labels).float().mean())
