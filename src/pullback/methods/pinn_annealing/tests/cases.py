"""The components of the room, as their contracts need them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pullback.methods.pinn_annealing import (
    GradientAnnealing,
    GradientHistograms,
    ModifiedMLP,
    weight_matrices,
)
from pullback.testing import Case

_annealing: Any = GradientAnnealing  # with arguments of wrong types, which must be refused
_network: Any = ModifiedMLP


class Composite(nn.Module):
    """Two losses of one small network, summed by a balance: how a user holds the component."""

    refuses = GradientAnnealing.refuses

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))
        self.balance = GradientAnnealing("data", params=weight_matrices(self.net), **settings)

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        """Sums over the batch, so that an empty one is a loss of 0."""
        out = self.net(x)
        return {"residual": 3 * out[:, 0].square().sum(), "data": (out[:, 1] - 1).square().sum()}

    def forward(self, x: Tensor) -> Tensor:
        return self.balance(self.losses(x))

    def begun(self) -> Composite:
        """After a first step, so that the weights are no longer 1 and the next update is one step away."""
        self(torch.linspace(-1.0, 1.0, 16).reshape(2, 8))
        return self


class Frozen(Composite):
    """The same with weights that stay as they are, inside `frozen`."""

    refuses = {}  # noqa: RUF012 - as declared by the base class

    def forward(self, x: Tensor) -> Tensor:
        with self.balance.frozen():
            return self.balance(self.losses(x))


def plain(x: Tensor) -> Tensor:
    """What a weight of 1 must equal: the sum of the same network's losses."""
    composite: Any = seeded(Composite)().double()
    total = torch.stack(list(composite.losses(x).values()))
    return total[0] + total[1]


def seeded(build: Callable[..., nn.Module], **settings: Any) -> Callable[[], nn.Module]:
    """A builder whose networks are equal whatever the global generator holds."""

    def make() -> nn.Module:
        with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(3)
            made = build(**settings)
            return made.begun() if isinstance(made, Composite) else made

    return make


def _measured(probe: GradientHistograms, model: nn.Module, batch: tuple[Tensor, ...]) -> Any:
    with torch.enable_grad():
        out = model(*batch)
        losses = {"first": out.square().mean(), "second": (out - 1).abs().sum()}
    return probe(losses, weight_matrices(model))


# --- what the tests train -------------------------------------------------------------------------------------------

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(12, 2)


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """A small network, equal for equal seeds."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


def losses_of(net: Any, x: Tensor = X, step: int = 0) -> dict[str, Tensor]:
    """Three losses that share the network, on points that change with the step."""
    out = net(x.roll(step, 0) + 0.01 * step)
    return {
        "residual": (4 * out[:, 0] - 1).square().mean(),
        "data": (out[:, 1] - 0.3).square().mean(),
        "prior": out.abs().mean(),
    }


def balanced(net: Any, **settings: Any) -> GradientAnnealing:
    """A balance of these losses."""
    return GradientAnnealing(["data", "prior"], params=weight_matrices(net), **settings)


CASES = (
    Case(
        name="GradientAnnealing",
        kind="objective",
        build=seeded(Composite, update_every=2),
        neutral=seeded(Composite, alpha=0.0),
        baseline=plain,
        bad=(
            lambda: GradientAnnealing("data", params=_weights(), alpha=1.5),
            lambda: GradientAnnealing("data", params=_weights(), update_every=0),
            lambda: GradientAnnealing("data", params=_weights(), lam_min=0.0),
            lambda: GradientAnnealing("data", params=_weights(), lam_min=2.0, lam_max=1.0),
            lambda: GradientAnnealing("data", params=_weights(), initial=1e9),
            lambda: GradientAnnealing("data", params=_weights(), initial={"nobody": 2.0}),
            lambda: GradientAnnealing("data", "data", params=_weights()),
            lambda: GradientAnnealing((), params=_weights()),
            lambda: GradientAnnealing("data", params={}),
            lambda: _annealing("data", params=nn.Linear(2, 2)),
            lambda: _annealing("data", params=torch.ones(2)),
            lambda: _annealing(3 * [0], params=_weights()),
            lambda: _annealing("data", params=_weights(), variant="siam-v2"),
            lambda: _annealing("data", params=_weights(), statistics="median"),
            lambda: _annealing("data", params=_weights(), apply="later"),
            lambda: _annealing("data", params=_weights(), nonfinite="ignore"),
        ),
    ),
    Case(
        name="GradientAnnealing[norm]",
        kind="objective",
        build=seeded(Composite, update_every=2, statistics="norm", alpha=0.5),
        neutral=seeded(Composite, statistics="norm", alpha=0.0),
        baseline=plain,
    ),
    Case(
        name="GradientAnnealing[frozen]",
        kind="objective",
        build=seeded(Frozen, initial=7.5),
        neutral=seeded(Frozen),
        baseline=plain,
    ),
    Case(
        name="ModifiedMLP",
        kind="layer",
        build=lambda: ModifiedMLP(8, 5, 3, depth=2),
        shape=lambda shape: (*shape[:-1], 3),
        bad=(
            lambda: ModifiedMLP(8, 5, 3, depth=0),
            lambda: ModifiedMLP(8, 0, 3),
            lambda: ModifiedMLP(8, 5, 3, depth=1, variant="paper"),
            lambda: _network(8, 5, 3, variant="code"),
            lambda: _network(8, 5.0, 3),
            lambda: _network(8, 5, 3, activation="tanh"),
        ),
    ),
    Case(
        name="ModifiedMLP[paper]",
        kind="layer",
        build=lambda: ModifiedMLP(8, 5, 3, variant="paper"),
        shape=lambda shape: (*shape[:-1], 3),
    ),
    Case(
        name="GradientHistograms",
        kind="probe",
        build=lambda: GradientHistograms(bins=10),
        run=_measured,
        bad=(lambda: GradientHistograms(0), lambda: GradientHistograms(span=-1.0)),
    ),
)


def _weights() -> dict[str, Tensor]:
    return {"weight": nn.Parameter(torch.ones(2, 2))}
