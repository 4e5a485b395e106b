"""Transforms, a model and a loop for the tests of attachment."""

import torch
from torch import nn

from pullback.core.kinds import StepBatch, Transform
from pullback.core.streams import generator


class Double(Transform):
    """Double every gradient: order and repetition show in the number."""

    def pre_step_(self, batch):
        for grad in batch.grads:
            grad.mul_(2)


class Neutral(Transform):
    """Do nothing."""


class Noise(Transform):
    """Counter-based noise: any slip of a counter or an index changes the weights."""

    def pre_step_(self, batch):
        for index, grad in zip(batch.indices, batch.grads, strict=True):
            stream = generator("test", 0, batch.step, index)
            grad.add_(torch.randn(grad.shape, generator=stream).to(grad.dtype))


class Mean(Transform):
    """Running mean of gradients, with state per parameter."""

    def __init__(self):
        self.mean = torch.zeros(())

    def pre_step_(self, batch):
        self.mean = 0.5 * self.mean + sum(grad.sum() for grad in batch.grads)

    def extra_state(self):
        return {"mean": self.mean}

    def load_extra_state(self, state):
        self.mean = state["mean"].clone()


class Recorder(Transform):
    """Keep what both hooks saw."""

    when = "both"

    def __init__(self):
        self.seen: list[StepBatch] = []
        self.grads: list[list[torch.Tensor]] = []
        self.after: list[list[torch.Tensor]] = []

    def pre_step_(self, batch):
        self.seen.append(batch)
        self.grads.append([grad.clone() for grad in batch.grads])

    def post_step_(self, batch):
        self.after.append([param.detach().clone() for param in batch.params])


class Halve(Transform):
    """Halve the parameters after the step."""

    when = "post"

    def post_step_(self, batch):
        for param in batch.params:
            param.mul_(0.5)


def model(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def backward(net, step=0, *, scale=1.0):
    with torch.random.fork_rng():
        torch.manual_seed(1000 + step)
        inputs, wanted = torch.randn(8, 4), torch.randn(8, 2)
    loss = (net(inputs) - wanted).square().mean() * scale
    loss.backward()
    return loss


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


def train(net, optimizer, steps, *, first=0, closure=False):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        if closure:

            def evaluate(step=step):
                optimizer.zero_grad()
                return backward(net, step)

            optimizer.step(evaluate)
        else:
            backward(net, step)
            optimizer.step()
