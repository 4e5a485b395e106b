"""Correct small components at the step: a transform and an optimizer."""

import torch

from pullback.core.checks import finite, non_negative
from pullback.core.kinds import Transform
from pullback.core.state import check_state
from pullback.core.streams import generator
from pullback.testing import Case


class GoodTransform(Transform):
    """Adds counter-based noise and a running mean of the gradient's sum, both times ``strength``."""

    def __init__(self, strength: float = 0.01):
        self.strength = finite("strength", strength)
        self.seen = {}

    def pre_step_(self, batch):
        if self.strength == 0:
            return
        for name, index, grad in zip(batch.names, batch.indices, batch.grads, strict=True):
            if grad.is_sparse:
                raise TypeError(f"gradient of {name} must be dense, got a sparse one. Use grad.to_dense().")
            noise = torch.randn(grad.shape, generator=generator("good", 0, batch.step, index))
            mean = 0.9 * self.seen.get(name, torch.zeros((), dtype=torch.float64)) + 0.1 * grad.double().sum()
            self.seen[name] = mean
            grad.add_(self.strength * noise.to(grad.dtype)).add_(self.strength * mean.to(grad.dtype))

    def extra_state(self):
        return {name: mean.clone() for name, mean in self.seen.items()}

    def check_extra_state(self, state):
        check_state(self.name, state, dict.fromkeys(state, torch.zeros((), dtype=torch.float64)))

    def load_extra_state(self, state):
        self.seen = {name: mean.clone() for name, mean in state.items()}


class GoodOptimizer(torch.optim.Optimizer):
    """Gradient descent with momentum."""

    def __init__(self, params, lr: float = 0.05, *, momentum: float = 0.9, maximize=False, foreach=None):
        rate = lr if isinstance(lr, torch.Tensor) else non_negative("lr", lr)
        momentum = non_negative("momentum", momentum)
        super().__init__(params, {"lr": rate, "momentum": momentum, "maximize": maximize, "foreach": foreach})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.update(group, [p for p in group["params"] if p.grad is not None])
        return loss

    def update(self, group, params):
        for p in params:
            self.refuse(p)
            velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
            velocity.mul_(group["momentum"]).add_(-p.grad if group["maximize"] else p.grad)
        if group["foreach"]:
            torch._foreach_sub_(params, [self.state[p]["velocity"] * group["lr"] for p in params])
        else:
            for p in params:
                p.sub_(self.state[p]["velocity"] * group["lr"])

    def refuse(self, p):
        if p.grad.is_sparse:
            raise RuntimeError("GoodOptimizer needs dense gradients, got sparse ones. Use SparseAdam.")


TRANSFORM = Case(
    name="GoodTransform", kind="transform", build=GoodTransform, neutral=lambda: GoodTransform(0.0)
)
OPTIMIZER = Case(name="GoodOptimizer", kind="optimizer", build=GoodOptimizer)
