"""Do annealed loss weights and gated layers solve differential equations that plain networks get wrong?

A network is trained on the equation's residual and its boundary values, on fresh random points in every step. Beside
the paper's four models run the strongest cheap rival, one constant weight that was tuned, and the formula of the first
preprint. Derivatives go through the network in one forward pass (Taylor mode).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from pullback.core.streams import generator
from pullback.lab import (
    Arms,
    Choice,
    Curves,
    Drawing,
    Greater,
    Hyperparameters,
    Log,
    Metric,
    PairedSeeds,
    PaperResult,
    Seeds,
    Study,
    TrialResult,
    Tune,
)
from pullback.lab.models.pde import Evaluate, Helmholtz, KleinGordon, Points, Poisson, Problem, relative_l2
from pullback.lab.models.taylor import Derivatives, derivatives
from pullback.methods.pinn_annealing.annealing import GradientAnnealing
from pullback.methods.pinn_annealing.networks import (
    GradientHistograms,
    ModifiedMLP,
    glorot_normal_,
    weight_matrices,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHUNK = 100  # steps whose points are drawn at once
GATED = ("architecture", "both")


@dataclass(frozen=True)
class Config:
    """One size of one experiment.

    Args:
        problem: the equation.
        steps: optimizer steps.
        width: units of each hidden layer.
        depth: hidden layers.
        batch: points inside, and on every face, in each step.
        dtype: precision of everything in training.
        wave: wave number of the Poisson equation's solution.
    """

    problem: Literal["helmholtz", "klein-gordon", "poisson"]
    steps: int
    width: int = 50
    depth: int = 3
    batch: int = 128
    dtype: Literal["float32", "float64"] = "float32"
    wave: float = 4.0


# --- the parts of a run --------------------------------------------------------------------------------


def problem_of(cfg: Config) -> Problem:
    """The equation."""
    if cfg.problem == "poisson":
        return Poisson(cfg.wave)
    return Helmholtz() if cfg.problem == "helmholtz" else KleinGordon()


def network(cfg: Config, arm: str, inputs: int, seed: int) -> nn.Module:
    """The arm's network; hidden and output weights of a seed are the same in both architectures."""
    if arm in GATED:
        return ModifiedMLP(inputs, cfg.width, 1, depth=cfg.depth, seed=seed).to(getattr(torch, cfg.dtype))
    layers: list[nn.Module] = []
    for k in range(cfg.depth):
        layers += [nn.utils.skip_init(nn.Linear, inputs if k == 0 else cfg.width, cfg.width), nn.Tanh()]
    plain = nn.Sequential(*layers, nn.utils.skip_init(nn.Linear, cfg.width, 1))
    glorot_normal_(plain, seed=seed)
    return plain.to(getattr(torch, cfg.dtype))


def balance_of(arm: str, hp: Hyperparameters, problem: Problem, model: nn.Module) -> GradientAnnealing:
    """The arm's weights of the losses; alpha 0 keeps them as they begin."""
    settings: dict[str, Any] = {
        "annealing": {"alpha": 0.1},
        "both": {"alpha": 0.1},
        "arxiv-v1": {"alpha": 0.9, "variant": "arxiv-v1"},
        "constant": {"alpha": 0.0, "initial": float(hp.get("weight", 1.0))},
    }.get(arm, {"alpha": 0.0})
    return GradientAnnealing(problem.terms, params=weight_matrices(model), **settings)


def evaluator(model: nn.Module, problem: Problem, dtype: torch.dtype) -> Evaluate:
    """Derivatives of the network, by the equation's coordinates, at standardised points."""
    rates = 1 / problem.moments(dtype)[1]

    def evaluate(x: Tensor, order: Literal[0, 1, 2]) -> Derivatives:
        if order == 0:
            u = model(x)
            return Derivatives(u, u.new_zeros(0), None)
        return derivatives(model, x, order=order, slopes=rates)

    return evaluate


def at(points: Points, step: int) -> Points:
    """One step's points out of a chunk."""
    return {name: (x[step], data[step]) for name, (x, data) in points.items()}


# --- one run -------------------------------------------------------------------------------------------


def run(cfg: Config, arm: str, hp: Hyperparameters, seed: int, log: Log) -> Mapping[str, float]:
    """Train one network; arms of a seed share all points and the weights that both architectures have."""
    dtype, problem = getattr(torch, cfg.dtype), problem_of(cfg)
    model = network(cfg, arm, len(problem.low), seed)
    evaluate, balance = evaluator(model, problem, dtype), balance_of(arm, hp, problem, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=float(hp["lr"]), fused=True)
    stream, every = generator("points", seed), max(cfg.steps // 40, 1)
    points: Points = {}
    for step in range(cfg.steps):
        if step % CHUNK == 0:
            points = problem.standardised(problem.draw(cfg.batch, CHUNK, stream, dtype))
        if step % every == 0:
            record(log, balance, error(model, problem, problem.grid(100, dtype)), step)
        optimizer.param_groups[0]["lr"] = float(hp["lr"]) * 0.9 ** (step / 1000)
        optimizer.zero_grad()
        balance.backward(problem.losses(at(points, step % CHUNK), evaluate))
        optimizer.step()
    reached = error(model, problem, problem.grid(100, dtype))
    record(log, balance, reached, cfg.steps)
    unseen = problem.draw(1000, 1, generator("validation", seed), dtype)["residual"][0][0]
    last = problem.standardised(problem.draw(cfg.batch, 1, generator("diagnosis", seed), dtype))
    return {
        "log_error": math.log10(reached),
        "log_validation_error": math.log10(error(model, problem, unseen)),
        "imbalance": diagnose(log, model, balance, problem.losses(at(last, 0), evaluate)),
        "log_stiffness": math.log10(stiffness(model, problem, at(last, 0), seed)),
        "log_lam": float(balance.weights[problem.terms[0]].log10()),
    }


@torch.no_grad()
def error(model: nn.Module, problem: Problem, x: Tensor) -> float:
    """Relative L2 error on the points x."""
    shift, scale = problem.moments(x.dtype)
    return relative_l2(model((x - shift) / scale)[:, 0], problem.exact(x))


def record(log: Log, balance: GradientAnnealing, reached: float, step: int) -> None:
    """Log the curves of the figures."""
    log.value("log_error", math.log10(reached), step)
    for name in balance.terms:
        log.value(f"log_lam_{name}", float(balance.weights[name].log10()), step)


def diagnose(log: Log, model: nn.Module, balance: GradientAnnealing, losses: dict[str, Tensor]) -> float:
    """Keep per-layer histograms of all weighted gradients, and how far apart their mean sizes are.

    Returns:
        Largest |log10| of the ratio of mean entries, residual to any other term; 0 is balance.
    """
    table = GradientHistograms(40)(losses, weight_matrices(model), weights=balance.weights)
    log.array("edges", table.edges.numpy())
    log.array("density", table.density().float().numpy())
    sizes = table.mean.mean(1)
    return float((sizes[0] / sizes[1:].clamp_min(1e-30)).log10().abs().max())


def stiffness(model: nn.Module, problem: Problem, points: Points, seed: int) -> float:
    """Largest eigenvalue of the Hessian of the unweighted sum of losses: 25 steps of Lanczos in float64.

    Products with the Hessian are central differences of the gradient.
    """
    twin = copy.deepcopy(model).double()
    params = list(twin.parameters())
    evaluate = evaluator(twin, problem, torch.float64)
    wide = {name: (x.double(), data.double()) for name, (x, data) in points.items()}
    here = nn.utils.parameters_to_vector(params).detach()

    def gradient(vector: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(vector, params)
        total = torch.stack(list(problem.losses(wide, evaluate).values())).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, params)])

    start = torch.randn(len(here), generator=generator("lanczos", seed), dtype=torch.float64)
    basis, small = (start / start.norm())[None], torch.zeros(25, 25, dtype=torch.float64)
    for k in range(25):
        product = (gradient(here + 1e-4 * basis[k]) - gradient(here - 1e-4 * basis[k])) / 2e-4
        small[k] = torch.nn.functional.pad(basis @ product, (0, 24 - k))
        for _ in range(2):  # twice is enough
            product = product - basis.T @ (basis @ product)
        basis = torch.cat([basis, (product / product.norm().clamp_min(1e-300))[None]])
    return float(torch.linalg.eigvalsh(small)[-1].clamp_min(1e-30))  # of the lower triangle


# --- figures -------------------------------------------------------------------------------------------


def draw_gradients(result: TrialResult) -> Figure:
    """Per-layer histograms of the gradients of residual and boundary, without and with annealing."""
    from pullback.lab.figures import BASELINE, METHOD, panels  # workers need no matplotlib

    arms = [arm for arm in ("plain", "annealing") if result.array(arm, "density") is not None]
    kept = {arm: (result.array(arm, "edges"), result.array(arm, "density")) for arm in arms}
    layers = max((len(edges) for edges, _ in kept.values() if edges is not None), default=1)
    figure, axes = panels(max(len(arms), 1) * layers, columns=layers, height=1.9 * max(len(arms), 1))
    for row, (arm, (edges, density)) in enumerate(kept.items()):
        if edges is None or density is None:
            continue
        for layer in range(len(edges)):
            ax, middle = axes[row * layers + layer], (edges[layer][1:] + edges[layer][:-1]) / 2
            for loss, colour, name in ((0, BASELINE, "residual"), (1, METHOD, "boundary, weighted")):
                label = name if row == layer == 0 else None
                ax.step(
                    middle,
                    density[loss, layer] + 1e-12,
                    where="mid",
                    color=colour,
                    linewidth=1.0,
                    label=label,
                )
            top = float(density[:, layer].max())
            ax.set(yscale="log", ylim=(1e-4 * top, 2 * top), yticks=[])
            ax.set_title(f"{arm}, matrix {layer + 1}")
            ax.tick_params(axis="y", which="both", length=0)
            ax.locator_params(axis="x", nbins=3)
    if arms:
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_factors(result: TrialResult) -> Figure:
    """Factors by which each arm lowers the error, the paper's as crosses."""
    from pullback.lab.figures.factors import error_factors

    return error_factors(result, PRINTED.get(result.name, {}))


# --- declarations --------------------------------------------------------------------------------------

ERROR = Metric("log_error", better="lower", unit="log10", worst=3.0)
SELECT = Metric("log_validation_error", better="lower", unit="log10", worst=3.0)
IMBALANCE = Metric("imbalance", better="lower", unit="log10", worst=10.0)
STIFFNESS = Metric("log_stiffness", better="lower", unit="log10", worst=10.0)
RATES = Choice((7e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2))
WEIGHTS = Choice((10.0, 100.0, 1000.0))  # 1 is the baseline
GRADIENTS = Drawing(
    "gradients",
    draw_gradients,
    "Gradients at the end of the first seed's run, weight matrix by weight matrix, on a logarithmic scale. A narrow "
    "boundary histogram inside a wide one is the paper's diagnosis; weights shall make both alike.",
)
WEIGHT_CURVES = Curves(
    "log_lam_boundary",
    arms=("annealing", "arxiv-v1", "both"),
    caption="log10 of the boundary's weight: the first preprint's formula beside the published code's.",
)
PRINTED = {
    "helmholtz": {"annealing": 0.194 / 0.0144, "architecture": 0.194 / 0.0212, "both": 0.194 / 0.0033},
    "klein-gordon": {"annealing": 0.179 / 0.0106, "architecture": 0.179 / 0.0197, "both": 0.179 / 0.00281},
}
"""The paper's factors after 40,000 steps, by study and arm."""
FACTORS = Drawing(
    "factors",
    draw_factors,
    "The plain network's relative L2 error over each arm's: every seed, and the geometric mean. Crosses: the paper, "
    "after 40,000 steps.",
)
CURVES = Curves("log_error", caption="log10 of the relative L2 error during training: -1 is 10 %, -2 is 1 %.")
REFUTED = (
    "the paired 95 % interval of log error, annealing against plain, includes 0; against the tuned constant weight, "
    "annealing loses by more than its interval: then it is only a way of finding one number"
)
CANNOT = (
    "The converged errors of 40,000 steps, the lid-driven cavity (third derivatives, reference data), k = 4, "
    "and the Hessian's spectrum beyond its largest eigenvalue."
)
DEVIATIONS = (
    "The first steps of the paper's 40,000, on its schedule (0.9 per 1,000 steps), the same number for all arms; the "
    "learning rate is tuned for every arm where the paper has 1e-3. Three hidden layers of 50. Arms are compared at "
    "equal steps; a gated network takes nearly twice the time per step. Tuning selects by the error against the exact "
    "solution at 1,000 random points, on one tuning seed and three quarters of the steps. Inputs are standardised with "
    "the exact moments of uniform points. Statistics come from the step's own gradients, where the code takes them "
    "again after the step. Derivatives by Taylor mode. The first preprint's arm has alpha 0.9; weights end at 1e6."
)
FACTOR = Greater("annealing", than="plain", by=math.log10(5.0))  # at 40,000 steps the paper prints 13 to 17
BALANCE = Greater("annealing", than="plain", metric=IMBALANCE)
LAYERS = (
    Greater("architecture", than="plain"),
    Greater("both", than="annealing"),
    Greater("both", than="architecture"),
    Greater("architecture", than="plain", metric=STIFFNESS),
)


def declare(name: str, title: str, cfg: Config, **fields: Any) -> Study:
    """A study of this room."""
    facts: dict[str, Any] = {
        "arms": Arms("plain", "annealing", ("constant",), others=("arxiv-v1", "architecture", "both")),
        "also": (FACTOR, BALANCE, *LAYERS),
        **fields,
    }
    smoke = Config("poisson", steps=100, width=16, batch=32, dtype=cfg.dtype)
    return Study(
        room="pinn_annealing",
        name=name,
        title=title,
        run=run,
        sizes={"smoke": smoke, "full": cfg, "tuning": replace(cfg, steps=cfg.steps * 3 // 4)},
        primary=ERROR,
        hp={"*": {"lr": 1.5e-3}, "constant": {"weight": 100.0}},
        tune=Tune(14, SELECT, shared={"lr": RATES}, only={"constant": {"weight": WEIGHTS}}, size="tuning"),
        timeout=300.0,
        figures=(FACTORS, CURVES, PairedSeeds(), GRADIENTS, WEIGHT_CURVES),
        refuted_if=REFUTED,
        cannot_test=CANNOT,
        deviations=DEVIATIONS,
        **facts,
    )


STUDIES: tuple[Study, ...] = (
    declare(
        "helmholtz",
        "Helmholtz equation, u = sin(pi x) sin(4 pi y): the paper's four models and a tuned constant weight",
        Config("helmholtz", steps=4000),
        seeds=Seeds(tuple(range(200, 205)), tune=(100,)),
        paper=PaperResult(
            "Helmholtz table, 3 hidden layers of 50", "40,000 steps, mean of 10 runs; log10 of the relative L2 error",
            baseline=math.log10(0.194), method=math.log10(0.0144),
            note="relative errors: plain 0.194, annealing 0.0144, architecture 0.0212, both 0.0033: factors 13, 9, 59",
        ),
    ),
    declare(
        "klein-gordon",
        "Klein-Gordon equation, u = x cos(5 pi t) + (x t)^3: the paper's four models and a tuned constant weight",
        Config("klein-gordon", steps=2000),
        seeds=Seeds(tuple(range(200, 205)), tune=(100,)),
        paper=PaperResult(
            "Klein-Gordon table, 5 hidden layers of 50", "40,000 steps; log10 of the relative L2 error",
            baseline=math.log10(0.179), method=math.log10(0.0106),
            note="relative errors: plain 0.179, annealing 0.0106, architecture 0.0197, both 0.00281: factors 17, 9, 64",
        ),
    ),
    declare(
        "helmholtz-float64",
        "Helmholtz equation in float64: is any of it a matter of precision?",
        Config("helmholtz", steps=1500, dtype="float64"),
        arms=Arms("plain", "annealing", ("constant",), others=("architecture", "both")),
        seeds=Seeds(tuple(range(200, 205)), tune=(100,)),
        paper=PaperResult(
            "Helmholtz table, 3 hidden layers of 50", "float32, 40,000 steps; log10 of the relative L2 error",
            baseline=math.log10(0.194), method=math.log10(0.0144), note="the paper has no run in float64",
        ),
    ),
    declare(
        "poisson",
        "Poisson equation in one dimension, u = sin(16 x): the wave number at which the paper's plain network fails",
        Config("poisson", steps=1000, wave=16.0),
        seeds=Seeds(tuple(range(200, 205)), tune=(100,)),
        paper=PaperResult(
            "section on the one-dimensional Poisson equation", "log10 of the plain network's relative L2 error",
            baseline=math.log10(9.4), note="plain network only: 1.3e-4 for sin(x), 9.4 for sin(16 x)",
        ),
    ),
)  # fmt: skip
"""All studies of this room; the first is the main one."""
