"""Correct small components that run something: recompute, probe, search, learner, field."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pullback.core.checks import finite, positive
from pullback.core.kinds import Field, Learner, Probe, Recompute, Search, SearchResult
from pullback.core.state import check_state
from pullback.core.streams import generator
from pullback.testing import Case
from pullback.testing.tools import keeping_rng, perceptron


class GoodRecompute(Recompute):
    """Stores the inputs only and puts buffers back after the second pass."""

    keep_rng, keep_buffers = True, True

    def __call__(self, model, *arguments):
        return checkpoint(
            model,
            *arguments,
            use_reentrant=False,
            preserve_rng_state=self.keep_rng,
            context_fn=lambda: (nullcontext(), self.buffers_of(model)),
        )

    @contextmanager
    def buffers_of(self, model):
        kept = [(buffer, buffer.clone()) for buffer in model.buffers()] if self.keep_buffers else []
        try:
            yield
        finally:
            for buffer, value in kept:
                buffer.copy_(value)


@dataclass(frozen=True)
class Norms:
    """Gradient norms by parameter, and the mean output of every child."""

    norms: dict
    means: dict


class GoodProbe(Probe):
    """Measures gradient norms and mean outputs in eval mode under noise of its own."""

    def __call__(self, model, *batch):
        means, modes = {}, [(module, module.training) for module in model.modules()]

        def keep(name):
            return lambda module, args, out: means.__setitem__(name, out.detach().mean().clone())

        handles = [child.register_forward_hook(keep(name)) for name, child in model.named_children()]
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.manual_seed(0)
                model.eval()
                grads = torch.autograd.grad(
                    (model(*batch) ** 2).sum(), list(named.values()), allow_unused=True
                )
        finally:
            for handle in handles:
                handle.remove()
            for module, training in modes:
                module.training = training
        return Norms({n: None if g is None else g.norm() for n, g in zip(named, grads, strict=True)}, means)


class GoodSearch(Search):
    """Gradient descent with a seeded start."""

    def __init__(self, rate: float = 0.2, budget=200):
        self.rate, self.budget = positive("rate", rate), budget
        with keeping_rng():
            self.model = perceptron()

    def start(self, seed):
        return torch.randn(2, generator=generator("search", seed), dtype=torch.float64)

    def run(self, gradient, budget=None, seed=0):
        x = self.start(seed)
        for step in range(self.budget if budget is None else budget):
            slope = gradient(x)
            if not bool(slope.isfinite().all()):
                return SearchResult(x, "diverged", step, "the slope is not finite: lower rate")
            if float(slope.norm()) < 1e-6:
                return SearchResult(x, "converged", step)
            x = x - self.rate * slope
        return SearchResult(x, "max_steps", step + 1)


SOLUTION = torch.tensor([1.0, -2.0], dtype=torch.float64)


class GoodLearner(Learner):
    """Logistic regression by its closed-form gradient with momentum."""

    def __init__(self, rate: float = 0.1):
        self.rate = positive("rate", rate)
        self.weight, self.velocity = torch.zeros(9), torch.zeros(9)

    def scores(self, x):
        return functional.pad(x, (0, 1), value=1.0) @ self.weight

    def admit(self, x):
        if not len(x) or not bool(x.isfinite().all()):
            raise ValueError(f"x must be finite and not empty, got {len(x)} rows. Leave such a batch out.")

    def step(self, batch):
        x, y = batch
        self.admit(x)
        score, target = self.scores(x), y.float()
        slope = functional.pad(x, (0, 1), value=1.0).t() @ (score.sigmoid() - target) / len(x)
        self.velocity.mul_(0.5).add_(slope)
        self.weight.sub_(self.rate * self.velocity)
        return {"loss": functional.binary_cross_entropy_with_logits(score, target).item()}

    def predict(self, x):
        return (self.scores(x) > 0).long()

    def state_dict(self):
        return {"format_version": 1, "weight": self.weight.clone(), "velocity": self.velocity.clone()}

    def load_state_dict(self, state):
        check_state("GoodLearner", state, self.state_dict(), version=1)
        self.weight, self.velocity = state["weight"].clone(), state["velocity"].clone()


class GoodField(Field):
    """The linear field ``-rate * x``."""

    def __init__(self, rate: float = 1.0):
        self.rate = finite("rate", rate)

    def __call__(self, x):
        return -self.rate * x

    def __repr__(self):
        return f"{type(self).__name__}(rate={self.rate})"


class LearnedField(nn.Module, Field):
    """A linear field with a weight, whose value is a dataclass."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(-1.0))

    def forward(self, x, t):
        t = t.reshape(-1, 1) if isinstance(t, torch.Tensor) else t
        return Slope(self.weight.to(x.dtype) * x / (1.0 + t))


@dataclass(frozen=True)
class Slope:
    """The value of `LearnedField`."""

    value: torch.Tensor


def timed(generator, dtype):
    rows = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    return rows.to(dtype), torch.rand(4, generator=generator, dtype=torch.float64).to(dtype)


@torch.no_grad()
def follow(field, steps):
    x, h = torch.ones(2, 1, dtype=torch.float64), 1.0 / steps
    for step in range(steps):
        x = x + h * field(x, step * h).value
    return x


def midpoint(field, steps):
    x, h = torch.ones(2, 1, dtype=torch.float64), 1.0 / steps
    for _ in range(steps):
        x = x + h * field(x + 0.5 * h * field(x))
    return x


for plain in (GoodRecompute, GoodProbe, GoodSearch, GoodLearner):
    plain.__repr__ = lambda self: f"{type(self).__name__}()"

RECOMPUTE = Case(name="GoodRecompute", kind="recompute", build=GoodRecompute, memory=0.5)
PROBE = Case(name="GoodProbe", kind="probe", build=GoodProbe)
SEARCH = Case(
    name="GoodSearch",
    kind="search",
    build=GoodSearch,
    run=lambda search, budget, seed: search.run(lambda x: x - SOLUTION, budget, seed),
    solution=SOLUTION,
    hopeless=lambda search: search.run(lambda x: x * float("nan")),
)
LEARNER = Case(name="GoodLearner", kind="learner", build=GoodLearner, graph_bytes=0)
FIELD = Case(
    name="GoodField",
    kind="field",
    build=GoodField,
    solve=midpoint,
    solution=torch.full((2, 1), -1.0, dtype=torch.float64).exp(),
    order=2,
    evaluations=lambda steps: 2 * steps,
    conversions=lambda field, x: [(x, field(x) / -field.rate)],
)
LEARNED_FIELD = Case(
    name="LearnedField",
    kind="field",
    build=LearnedField,
    inputs=timed,
    time=1,
    solve=follow,
    evaluations=lambda steps: steps,
)
