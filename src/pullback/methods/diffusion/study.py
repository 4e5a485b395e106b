"""Do solvers keep their order, do four predictions train alike, does a flow map sample in one call, what is guidance?

Four trials: solvers on exact mixtures, without any training; one small network trained as noise, data, score or
velocity with matched and with uniform weights; flow matching against flow maps; digits with labels and guidance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pullback.core.gaussian_mixture import GaussianMixture
from pullback.core.gaussian_path import GaussianPath
from pullback.core.integrators import integrate
from pullback.core.streams import generator
from pullback.lab import (
    Arms,
    Choice,
    Drawing,
    Equivalent,
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
from pullback.lab.models import flows
from pullback.methods.diffusion.denoiser import Denoiser, cfg
from pullback.methods.diffusion.flowmap import ConsistencyMap, MeanFlow
from pullback.methods.diffusion.sampling import sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEST_SEEDS = tuple(range(300, 308))  # seed 200 was looked at while the studies were made
PAPER = PaperResult("the monograph", "theory and survey, no benchmark of its own")


# --- solvers ----------------------------------------------------------------------------------------------------------

PATHS = ("cosine", "linear", "ve")
CALLS = (8, 16, 32, 64, 128)
AT = CALLS.index(16)


@dataclass(frozen=True)
class SolverConfig:
    """``points`` samples are followed; ``reference`` steps of RK4 stand for the exact end."""

    points: int = 256
    reference: int = 400


def path_of(name: str) -> tuple[GaussianPath, float, float]:
    """A path with the first and last time of the trial."""
    if name == "ve":
        return GaussianPath.ve(end=4.0), 4.0, 0.02
    return (GaussianPath.cosine() if name == "cosine" else GaussianPath.linear()), 0.98, 0.02


def run_solvers(cfg: SolverConfig, arm: str, hp: Hyperparameters, seed: int, log: Log) -> Mapping[str, float]:
    """Error of one solver on all paths; arms of a seed share the mixture and the noise."""
    del hp
    draws = generator("diffusion.study.mixture", seed)
    means = 1.2 * torch.randn(2, 2, generator=draws, dtype=torch.float64)
    stds = 0.3 + 0.3 * torch.rand(2, generator=draws, dtype=torch.float64)
    mixture = GaussianMixture(means, stds)
    noise = torch.randn(cfg.points, 2, generator=draws, dtype=torch.float64)
    parts: Any = arm.partition("-")
    solver, _, kind = parts
    errors = []
    for name in PATHS:
        path, start, stop = path_of(name)
        model, x = mixture.denoiser(path), noise * path(start).sigma
        times = path.grid(cfg.reference, "logsnr", start=start, stop=stop)
        (exact,) = integrate(lambda state, t, model=model: [model(state[0], t).velocity], [x], times, "rk4")
        row = []
        for calls in CALLS:
            steps = calls // (2 if solver == "heun" else 1)
            times = path.grid(steps, kind or "logsnr", start=start, stop=stop)
            row.append(float((sample(model, x=x, solver=solver, grid=times) - exact).norm(dim=1).mean()))
        errors.append(row)
    log.array("errors", np.asarray(errors))
    if seed == TEST_SEEDS[0] and arm == "dpmpp_2m":
        model = mixture.denoiser(GaussianPath.linear())
        states = sample(model, x=noise[:24], steps=40, start=0.98, stop=0.02, trajectory=True)
        log.array("trajectory", states.numpy())
    digits = -np.log10(np.maximum(errors, 1e-15))
    slopes = [np.polyfit(np.log(CALLS), -np.log(np.maximum(row, 1e-15)), 1)[0] for row in errors]
    found = {f"digits_{name}": float(row[AT]) for name, row in zip(PATHS, digits, strict=True)}
    return {"digits": float(digits[:, AT].mean()), "order": float(np.median(slopes)), **found}


# --- predictions ------------------------------------------------------------------------------------------------------


TRAIN = "diffusion.study.train"  # the stream of data, times and noise of training


def judged(samples: Tensor, seed: int) -> dict[str, float]:
    """Closeness to fresh points of the ring, for the test and for tuning."""
    parts = {"closeness": "test", "select": "validation"}
    return {
        name: flows.closeness(
            samples, flows.ring().sample(len(samples), generator=generator(f"ring.{part}", seed))
        )
        for name, part in parts.items()
    }


@dataclass(frozen=True)
class RingConfig:
    """Networks of ``width`` learn the ring in ``steps`` steps and are judged by ``samples`` samples."""

    steps: int
    width: int = 128
    samples: int = 2000


def run_predictions(
    cfg: RingConfig, arm: str, hp: Hyperparameters, seed: int, log: Log
) -> Mapping[str, float]:
    """Train one form; arms of a seed share weights, data, times and noise of training, and the noise of samples."""
    parts: Any = arm.partition("-")
    kind, _, uniform = parts
    path, draws = GaussianPath.cosine().within(0.02, 0.98), generator(TRAIN, seed)
    model = Denoiser(flows.Perceptron(2, cfg.width, seed=seed), path, kind)
    flows.train(
        model, flows.ring_batch, cfg.steps, float(hp["lr"]), draws, weight="uniform" if uniform else "eps"
    )
    found = sample(model, (cfg.samples, 2), steps=30, seed=seed)
    if seed == TEST_SEEDS[0]:
        log.array("samples", found[:1000].numpy())
    return judged(found, seed)


# --- few calls --------------------------------------------------------------------------------------------------------


def run_few(cfg: RingConfig, arm: str, hp: Hyperparameters, seed: int, log: Log) -> Mapping[str, float]:
    """Train flow matching or a flow map; arms of a seed share weights and data of training."""
    path, lr, shape = GaussianPath.linear(), float(hp["lr"]), (cfg.samples, 2)
    draws = generator(TRAIN, seed)
    name, _, calls = arm.partition("-")
    net = flows.Perceptron(2, cfg.width, times=2 if name == "meanflow" else 1, seed=seed)
    if name == "fm":
        model: Any = Denoiser(net, path, "v")
        flows.train(model, flows.ring_batch, cfg.steps, lr, draws)
        steps = int(calls or 1)
        found = sample(model, shape, solver="euler", grid="uniform", start=1.0, steps=steps, seed=seed)
    else:
        flow_map: Any = MeanFlow if name == "meanflow" else ConsistencyMap
        model = flow_map(net, path) if name == "meanflow" else flow_map(net, path, sigma_data=1.07)
        options: dict[str, Any] = {"same": 0.75, "derivative": "difference"} if name == "meanflow" else {}
        flows.train(model, flows.ring_batch, cfg.steps, lr, draws, **options)
        found = model.sample(shape, steps=int(calls or 1), seed=seed)
    if seed == TEST_SEEDS[0]:
        log.array("samples", found[:1000].numpy())
    return judged(found, seed)


# --- guidance ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DigitConfig:
    """A network of ``width`` learns 1,000 digits in ``steps`` steps; ``samples`` of each label are judged."""

    steps: int
    width: int = 192
    samples: int = 40


def run_guidance(
    cfg_: DigitConfig, arm: str, hp: Hyperparameters, seed: int, log: Log
) -> Mapping[str, float]:
    """Train with dropped labels and sample with guidance; arms of a seed share the training and the noise."""
    net, draws = flows.Perceptron(64, cfg_.width, labels=True, seed=seed), generator(TRAIN, seed)
    model = Denoiser(net, GaussianPath.cosine(), "v", null={"y": flows.NONE})
    flows.train(model, flows.digit_batch, cfg_.steps, float(hp["lr"]), draws, batch=128, dropout=0.1)
    labels = torch.arange(10).repeat(cfg_.samples)
    strength = 1.0 if arm == "cold" else float(arm.removeprefix("w"))
    noise = torch.randn(len(labels), 64, generator=generator("diffusion.study.noise", seed))
    noise = noise * (float(hp["temperature"]) if arm == "cold" else 1.0)
    found = sample(cfg(model, strength, {"y": labels}), x=noise, solver="unipc", steps=15).clamp(-1, 1)
    if seed == TEST_SEEDS[0]:
        images = ((found[:50] + 1) * 127.5).round().to(torch.uint8)
        log.array("images", images.view(5, 10, 8, 8).numpy())
    return {
        "accuracy": flows.judged(found, labels),
        "diversity": flows.diversity(found, labels),
        "select": flows.closeness(found, flows.small_digits()[1].x),
    }


# --- figures ----------------------------------------------------------------------------------------------------------


def draw_orders(result: TrialResult) -> Figure:
    """Error against calls."""
    from pullback.lab.figures.flows import solver_errors  # workers need no matplotlib

    return solver_errors(result, CALLS, PATHS)


def draw_trajectories(result: TrialResult) -> Figure:
    """The flow of a straight path."""
    from pullback.lab.figures.flows import trajectories

    return trajectories(result, "dpmpp_2m")


def draw_samples(result: TrialResult) -> Figure:
    """Samples of every arm."""
    from pullback.lab.figures.flows import planar_samples

    return planar_samples(result)


def draw_trade_off(result: TrialResult) -> Figure:
    """Diversity against accuracy."""
    from pullback.lab.figures.flows import trade_off

    return trade_off(result, "diversity", "accuracy")


def draw_digits(result: TrialResult) -> Figure:
    """Digits of every arm."""
    from pullback.lab.figures.flows import image_rows

    return image_rows(result)


# --- declarations -----------------------------------------------------------------------------------------------------

DIGITS = Metric("digits", unit="decimal digits")
ORDER = Metric("order")
BY_PATH = tuple(Metric(f"digits_{name}", unit="decimal digits") for name in PATHS)
CLOSE = Metric("closeness", unit="log10")  # minus log10 of the energy distance: 1 is a factor of ten
ACCURACY = Metric("accuracy", unit="fraction")
DIVERSITY = Metric("diversity")
SELECT = Metric("select")
FOUR = math.log10(4.0)
SEEDS = Seeds(TEST_SEEDS, tune=(100,))
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128, 0.256, 0.512)
SAMPLES = Drawing("samples", draw_samples, "1,000 samples of every arm, one seed.")

SOLVERS = Study(
    room="diffusion",
    name="solvers",
    title="Solvers on exact mixtures: error at 16 calls and order",
    run=run_solvers,
    arms=Arms("ddim", "dpmpp_2m", rivals=("heun",), others=("unipc", "ddim-uniform", "dpmpp_2m-uniform")),
    primary=DIGITS,
    sizes={"smoke": SolverConfig(points=16, reference=40), "full": SolverConfig()},
    seeds=SEEDS,
    claim=Greater("dpmpp_2m", than="ddim", by=FOUR),
    also=(
        *(Greater("dpmpp_2m", than="ddim", by=FOUR, metric=metric) for metric in BY_PATH),
        Greater("dpmpp_2m", than="ddim", by=0.6, metric=ORDER),
        Greater("unipc", than="dpmpp_2m"),
        Greater("dpmpp_2m", than="dpmpp_2m-uniform"),
    ),
    figures=(
        Drawing(
            "orders",
            draw_orders,
            "Mean over seeds; dashed: steps equal in time instead of log(alpha / sigma).",
        ),
        Drawing(
            "trajectories",
            draw_trajectories,
            "The flow of a mixture on the linear path, beside straight lines (dotted): noisy pairs move straight, the "
            "flow of all does not.",
        ),
        PairedSeeds(),
    ),
    paper=PAPER,
    refuted_if="the error of DPM-Solver++(2M) at 16 calls is not below a quarter of DDIM's, on average or on a path",
    cannot_test="networks and images: the field here is exact, so that nothing but the solver errs",
    deviations="Times .98 to .02, sigma 4 to .02 on the VE path; mixtures of two components drawn for every seed; "
    "Heun takes half the steps. Nothing is tuned, because no arm has anything to tune.",
)

PREDICTIONS = Study(
    room="diffusion",
    name="predictions",
    title="Noise, data, score or velocity: one network, matched and uniform weights",
    run=run_predictions,
    arms=Arms("eps", "v", rivals=("v-uniform",), others=("x0", "score", "x0-uniform", "score-uniform")),
    primary=CLOSE,
    sizes={"smoke": RingConfig(4, 16, 64), "full": RingConfig(1000)},
    hp={"*": {"lr": 4e-3}},
    tune=Tune(trials=9, select=SELECT, shared={"lr": Choice(RATES[:9])}),
    seeds=SEEDS,
    timeout=300.0,
    claim=Equivalent("v", than="eps", within=math.log10(1.5)),
    also=(
        Equivalent("x0", than="eps", within=math.log10(1.5)),
        Equivalent("score", than="eps", within=math.log10(1.5)),
        Greater("eps", than="x0-uniform"),
        Greater("eps", than="score-uniform"),
        Greater("v", than="v-uniform"),
    ),
    figures=(PairedSeeds(), SAMPLES),
    paper=PAPER,
    refuted_if="the energy distances of velocity and noise differ by a factor of 1.5 or more",
    cannot_test="images, and whether large networks depend less on the form",
    deviations="Closeness is -log10 of the energy distance. "
    "Ring of eight Gaussians, 1,000 steps of batch 256, times .02 to .98 on the cosine path. Matched weights "
    "are those of uniform noise prediction, so that noise has no arm of its own with uniform weights.",
)

FEW = Study(
    room="diffusion",
    name="few-calls",
    title="One call: MeanFlow against flow matching on a ring of Gaussians",
    run=run_few,
    arms=Arms("fm", "meanflow", rivals=("fm-4", "consistency"), others=("fm-50",)),
    primary=CLOSE,
    sizes={"smoke": RingConfig(4, 16, 64), "full": RingConfig(1500)},
    hp={"*": {"lr": 4e-3}},
    tune=Tune(trials=9, select=SELECT, shared={"lr": Choice(RATES[3:])}),
    seeds=SEEDS,
    timeout=300.0,
    claim=Greater("meanflow", than="fm", by=math.log10(20.0)),
    also=(
        Greater("meanflow", than="fm-4"),
        Greater("fm-50", than="meanflow"),
        Greater("meanflow", than="consistency"),
    ),
    figures=(PairedSeeds(), SAMPLES),
    paper=PAPER,
    refuted_if="MeanFlow's energy distance in one call is above a twentieth of flow matching's in one, or above that "
    "of flow matching in four",
    cannot_test="images, where one call is still worse than many",
    deviations="Closeness is -log10 of the energy distance. "
    "1,500 steps of batch 256 for every arm, where a step of MeanFlow takes about 1.4 times as long (its "
    "derivative by central differences, which gave the same distances as forward mode on the tuning seed); three "
    "quarters of a batch are plain flow matching. fm-N takes N Euler steps from the same training.",
)

GUIDANCE = Study(
    room="diffusion",
    name="guidance",
    title="Digits with labels: accuracy and diversity under classifier-free guidance",
    run=run_guidance,
    arms=Arms("w1", "w2", rivals=("cold",), others=("w0", "w4")),
    primary=ACCURACY,
    sizes={"smoke": DigitConfig(4, 16, 5), "full": DigitConfig(1200)},
    hp={"*": {"lr": 2e-3, "temperature": 0.8}},
    tune=Tune(trials=7, select=SELECT, shared={"lr": Choice(RATES[:7])}),
    seeds=SEEDS,
    timeout=300.0,
    also=(
        Greater("w1", than="w0"),
        Greater("w4", than="w1"),
        Greater("w1", than="w2", metric=DIVERSITY),
        Greater("w2", than="w4", metric=DIVERSITY),
    ),
    figures=(
        Drawing(
            "digits",
            draw_digits,
            "One seed, columns ask for 0 to 9; w0 ignores the label: unconditional digits.",
        ),
        Drawing(
            "trade_off", draw_trade_off, "Mean distance of samples of one label, and share judged as asked."
        ),
        PairedSeeds(),
    ),
    paper=PAPER,
    refuted_if="guidance of strength 2 does not raise the accuracy of a separate classifier above that of strength 1",
    cannot_test="FID and images of ordinary size",
    deviations="Digits of 8 x 8 pixels, a perceptron, 1,200 steps; no average of weights, because the rate falls to "
    "zero. The rival cold samples with strength 1 from noise of temperature 0.8, not tuned; rates are tuned by "
    "the energy distance to digits of another part.",
)

STUDIES: tuple[Study, ...] = (SOLVERS, PREDICTIONS, FEW, GUIDANCE)
"""All studies of this room; the first is the main one."""
