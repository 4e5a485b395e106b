"""Correct small modules, one per kind: signal, layer, objective, aggregator."""

import torch
from torch import nn
from torch.nn import functional
from torchjd.aggregation import Aggregator as TorchJDAggregator

from pullback.core.checks import choice, finite
from pullback.testing import Case


class Scaled(torch.autograd.Function):
    """Identity whose gradient is multiplied by a 0-dim tensor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, factor):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad):
        (factor,) = ctx.saved_tensors
        return grad * factor.to(grad.dtype), None


class GoodSignal(nn.Module):
    """Identity whose gradient comes back times ``factor``."""

    kind = "signal"

    def __init__(self, factor: float = -0.5):
        super().__init__()
        self.register_buffer("factor", torch.tensor(finite("factor", factor)))

    def forward(self, x):
        return Scaled.apply(x, self.factor)


class GoodLayer(nn.Module):
    """A linear map and tanh, times a constant ``gain``."""

    kind = "layer"

    def __init__(self, gain: float = 1.5):
        super().__init__()
        self.gain = finite("gain", gain)
        self.weight = nn.Parameter(0.3 * torch.randn(3, 8))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.gain * torch.tanh(functional.linear(x, self.weight, self.bias))


class GoodObjective(nn.Module):
    """Squared error plus ``weight`` times the squared prediction."""

    kind = "objective"

    def __init__(self, weight: float = 0.1, reduction="mean"):
        super().__init__()
        self.weight = finite("weight", weight)
        self.reduction = choice("reduction", reduction, ("mean", "sum", "none"))
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, x, y):
        if not len(x):
            raise ValueError("x must hold at least one row, got none. Leave empty batches out.")
        each = self.scale * ((x - y) ** 2 + self.weight * x**2)
        return {"mean": each.mean, "sum": each.sum, "none": lambda: each}[self.reduction]()


class GoodAggregator(TorchJDAggregator):
    """The mean of the gradients, or zero where it conflicts with one of them."""

    kind = "aggregator"

    def __init__(self, share: float = 1.0):
        super().__init__()
        self.register_buffer("share", torch.tensor(finite("share", share), dtype=torch.float64))

    def forward(self, jacobian, /):
        jacobian = jacobian.detach()
        if not bool(jacobian.isfinite().all()):
            raise ValueError("jacobian must be finite, got NaN or Inf. Look at the losses.")
        mean = jacobian.mean(0) * self.share.to(jacobian.dtype)
        agrees = (jacobian @ mean >= 0).all()
        return torch.where(agrees, mean, torch.zeros_like(mean))


def two_inputs(generator, dtype):
    return tuple(torch.randn(4, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


SIGNAL = Case(
    name="GoodSignal",
    kind="signal",
    build=GoodSignal,
    neutral=lambda: GoodSignal(1.0),
    backward=lambda grad, x: (-0.5 * grad,),
)
LAYER = Case(name="GoodLayer", kind="layer", build=GoodLayer, shape=lambda shape: (shape[0], 3))
OBJECTIVE = Case(
    name="GoodObjective",
    kind="objective",
    build=GoodObjective,
    neutral=lambda: GoodObjective(0.0),
    baseline=functional.mse_loss,
    inputs=two_inputs,
    bad=(lambda: GoodObjective(reduction="median"),),
)
AGGREGATOR = Case(
    name="GoodAggregator",
    kind="aggregator",
    build=GoodAggregator,
    invariances=frozenset({"permutation", "scale", "non_conflict", "row_space"}),
)
