"""What the contracts need to know of this room's components."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn

from pullback.core.prediction import KINDS
from pullback.methods.diffusion import (
    ConsistencyMap,
    Denoiser,
    GaussianMixture,
    GaussianPath,
    MeanFlow,
    Prediction,
    cfg,
    classifier_guidance,
    posterior_sampling,
    sample,
)
from pullback.testing import Case

_wrong: Any = "nonsense"  # an argument of a wrong type, which must be refused
PATHS = {
    "cosine": GaussianPath.cosine,
    "linear": GaussianPath.linear,
    "vp": GaussianPath.vp,
    "ve": lambda: GaussianPath.ve(end=4.0),
}
MEAN, STD = torch.tensor([[0.7, -0.4]], dtype=torch.float64), 0.6
START = torch.tensor([[0.3, -1.1], [1.4, 0.8], [-0.2, 0.1]], dtype=torch.float64)


class Toy(nn.Module):
    """A smooth network of state, times and label, with weights of its own."""

    def __init__(self, size: int = 3, times: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Linear(size + times, 6)
        self.second = nn.Linear(6, size)
        self.labels = nn.Embedding(4, 6)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.5 * torch.randn(p.shape, generator=generator))

    def forward(self, x, *times, y=None):
        rows = [x.flatten(1), *(time.unsqueeze(1) for time in times)]
        hidden = torch.tanh(self.first(torch.cat(rows, 1)))
        if y is not None:
            hidden = hidden + self.labels(y)
        return self.second(hidden).view_as(x)


def _states(generator, dtype):
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    t = 0.05 + 0.9 * torch.rand(4, generator=generator, dtype=torch.float64)
    return x.to(dtype), t.to(dtype)


def _planar(generator, dtype):
    x, t = _states(generator, dtype)
    return x[:, :2].contiguous(), t


def _two_times(generator, dtype):
    x, t = _states(generator, dtype)
    return x, t, 0.5 * t


def _there_and_back(model, x, t):
    """The value in every reading, and each reading turned back into the one that was predicted."""
    found = model(x, t)
    return [
        (found.value, Prediction(x, found.reading(kind), kind, found.at).reading(found.kind))
        for kind in KINDS
    ]


# --- exact models with every solver -----------------------------------------------------------------------------------

ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "rk4": 4, "edm": 2, "dpmpp_2m": 2, "unipc": 2}
CALLS = {"heun": lambda n: 2 * n, "edm": lambda n: 2 * n, "rk4": lambda n: 4 * n}
TOLERANCES = {1: 0.05, 2: 2e-3, 4: 1e-6}


def exact(path):
    return GaussianMixture(MEAN, STD).denoiser(PATHS[path]())


def ends(path):
    return (0.98, 0.02) if path != "ve" else (4.0, 0.05)


def _solve(solver, path):
    def solve(model, steps):
        start, stop = ends(path)
        return sample(model, x=START, solver=solver, steps=steps, start=start, stop=stop)

    return solve


def _solution(path):
    start, stop = ends(path)
    return GaussianMixture(MEAN, STD).flow(PATHS[path](), START, start, stop)


SOLVED = tuple(
    Case(
        name=f"GaussianPath[{path}, {solver}]",
        kind="field",
        build=lambda path=path: exact(path),
        inputs=_planar,
        time=1,
        solve=_solve(solver, path),
        solution=_solution(path),
        order=ORDERS[solver],
        coarse=40,
        evaluations=CALLS.get(solver, lambda n: n),
        tolerance=TOLERANCES[ORDERS[solver]],
        conversions=_there_and_back,
    )
    for path, solver in [
        ("cosine", "ddim"),
        ("linear", "euler"),
        ("vp", "heun"),
        ("cosine", "rk4"),
        ("ve", "edm"),
        ("cosine", "dpmpp_2m"),
        ("cosine", "unipc"),
    ]
)

TERMINAL = Case(  # the last step goes to sigma = 0, where Heun and RK4 take one call
    name="sample[rk4 to sigma 0]",
    kind="field",
    build=lambda: exact("cosine"),
    inputs=_planar,
    time=1,
    solve=lambda model, n: sample(model, x=START, solver="rk4", steps=n, grid="uniform"),
    evaluations=lambda n: 4 * n - 3,
    conversions=_there_and_back,
)
STOCHASTIC = Case(
    name="sample[sde]",
    kind="field",
    build=lambda: exact("cosine"),
    inputs=_planar,
    time=1,
    solve=lambda model, n: sample(model, (3, 2), solver="sde", steps=n, dtype=torch.float64),
    evaluations=lambda n: n,
)


# --- networks ---------------------------------------------------------------------------------------------------------


def _denoiser(predicts):
    return lambda: Denoiser(Toy(), GaussianPath.cosine(), predicts, null={"y": 3})


def _double(model):
    return model.double() if isinstance(model, nn.Module) else model


NETWORKS = tuple(
    Case(
        name=f"Denoiser[{predicts}]",
        kind="field",
        build=_denoiser(predicts),
        inputs=_states,
        time=1,
        solve=lambda model, n: sample(model, (5, 3), steps=n, seed=1),
        evaluations=lambda n: n,
        conversions=lambda model, x, t: _there_and_back(_double(model), x, t),
        bad=(
            lambda: Denoiser(_wrong, GaussianPath.cosine()),
            lambda: Denoiser(Toy(), _wrong),
            lambda: Denoiser(Toy(), GaussianPath.cosine(), _wrong),
            lambda: Denoiser(Toy(), GaussianPath.cosine(), sigma_data=0.0),
            lambda: GaussianPath.vp(b0=-1.0),
            lambda: GaussianPath.vp(b1=float("nan")),
            lambda: GaussianPath.ve(end=0.0),
            lambda: GaussianPath(lambda t: t, lambda t: 1 - t),
            lambda: GaussianPath(lambda t: 1 - t, lambda t: t, first=2.0),
            lambda: GaussianMixture(MEAN, -1.0),
            lambda: GaussianMixture(MEAN, covariances=-torch.eye(2, dtype=torch.float64)[None]),
            lambda: GaussianMixture(MEAN),
        ),
    )
    for predicts in ("eps", "v", "edm")
)

_labels = torch.tensor([0, 1, 2, 1])


def _guided():
    return cfg(_denoiser("v")(), 2.0, {"y": _labels})


GUIDED = (
    Case(
        name="Guided[cfg]",
        kind="field",
        build=_guided,
        inputs=_states,
        time=1,
        solve=lambda model, n: sample(model, (4, 3), steps=n),
        evaluations=lambda n: n,
        bad=(
            lambda: cfg(_denoiser("v")(), float("nan"), {"y": _labels}),
            lambda: cfg(_denoiser("v")(), 1.0, {}),
            lambda: cfg(_denoiser("v")(), 1.0, {"z": _labels}),
            lambda: cfg(Denoiser(Toy(), GaussianPath.cosine()), 1.0, {"y": _labels}),
        ),
        refuses={
            "rows_apart": "the conditions belong to the rows of a whole batch",
            "batch_of_one": "the conditions belong to the rows of a whole batch",
        },
    ),
    Case(
        name="Guided[classifier]",
        kind="field",
        build=lambda: classifier_guidance(exact("cosine"), lambda x, t: -0.5 * x.square().sum(1), 0.5),
        inputs=_planar,
        time=1,
        solve=lambda model, n: sample(model, (4, 2), steps=n),
        evaluations=lambda n: n,
    ),
    Case(
        name="Guided[posterior]",
        kind="field",
        build=lambda: posterior_sampling(
            exact("cosine"), lambda x: x[:, :1], torch.zeros(1, dtype=torch.float64)
        ),
        inputs=_planar,
        time=1,
        solve=lambda model, n: sample(model, (4, 2), steps=n, dtype=torch.float64),
        evaluations=lambda n: n,
        bad=(
            lambda: posterior_sampling(exact("cosine"), lambda x: x, _wrong),
            lambda: posterior_sampling(exact("cosine"), lambda x: x, torch.zeros(2), variance=0.0),
        ),
    ),
)

MAPS = (
    Case(
        name="MeanFlow",
        kind="field",
        build=lambda: MeanFlow(Toy(times=2), GaussianPath.linear()),
        inputs=_two_times,
        time=1,
        solve=lambda flow, n: _jumps(flow, [1 - i / n for i in range(n + 1)]),
        evaluations=lambda n: n,
        bad=(lambda: MeanFlow(_wrong, GaussianPath.linear()), lambda: MeanFlow(Toy(), _wrong)),
    ),
    Case(
        name="ConsistencyMap",
        kind="field",
        build=lambda: ConsistencyMap(Toy(), GaussianPath.cosine()),
        inputs=_states,
        time=1,
        solve=lambda flow, n: flow.sample((4, 3), steps=n),
        evaluations=lambda n: n,
        bad=(lambda: ConsistencyMap(Toy(), GaussianPath.cosine(), levels=1),),
    ),
)


def _jumps(flow, times):
    """As `MeanFlow.sample`, from a fixed state."""
    x = START[:, [0, 1, 0]].float()
    with torch.no_grad():
        for s, t in pairwise(times):
            x = flow(x, s, t)
    return x


CASES = (*SOLVED, TERMINAL, STOCHASTIC, *NETWORKS, *GUIDED, *MAPS)
