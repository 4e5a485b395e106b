"""Samplers beside the schedulers of diffusers: time per step, agreement and error; cost of the losses."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.harness import Row, seconds
from torch import Tensor, nn

from pullback.core.integrators import integrate
from pullback.methods.diffusion import Denoiser, GaussianMixture, GaussianPath, MeanFlow, sample

STEPS = 20
PEER = "diffusers scheduler"
MEANS = torch.tensor([[-1.2, 0.4], [1.0, -0.6]], dtype=torch.float64)


def _median(what: Callable[[], object], against: Callable[[], object], repeats: int = 9) -> float:
    """In processor time: other processes do not count."""
    taken = seconds({"what": what, "against": against}, repeats=repeats, clock=time.process_time)
    pairs = sorted(a / b for a, b in zip(taken["what"], taken["against"], strict=True))
    return pairs[len(pairs) // 2]


class Still(nn.Module):
    """A network that costs nothing: it answers with a tensor that is there already."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The stored answer."""
        return self.answer


def scheduler(solver: str, path: GaussianPath, times: list[float]) -> Any:
    """A scheduler of diffusers on our path and grid."""
    import diffusers

    options: dict[str, Any] = {"prediction_type": "sample", "solver_order": 2}
    if solver == "dpmpp_2m":
        found = diffusers.DPMSolverMultistepScheduler(
            **options, lower_order_final=False, final_sigmas_type="sigma_min"
        )
    else:
        found = diffusers.UniPCMultistepScheduler(**options, solver_type="bh2")
    found.set_timesteps(len(times) - 1)
    at = [path(t) for t in times]
    found.sigmas = torch.tensor([c.sigma / c.alpha for c in at], dtype=torch.float64)
    found.timesteps = torch.arange(len(times) - 1)
    found.num_inference_steps = len(times) - 1
    return found


def followed(
    solver: str, path: GaussianPath, times: list[float], x: Tensor, model: Callable[[Tensor, float], Tensor]
) -> Tensor:
    """Samples by the scheduler, as a pipeline drives it."""
    with torch.no_grad():
        peer = scheduler(solver, path, times)
        for i, t in enumerate(times[:-1]):
            x = peer.step(model(x, t), peer.timesteps[i], x, return_dict=False)[0]
    return x


def peer_rows() -> list[Row]:
    """Time per step and agreement with diffusers, on the cosine path."""
    try:
        import diffusers  # noqa: F401
    except ImportError:
        return [Row("20 steps", PEER, skipped="diffusers is not installed: pip install diffusers")]
    path = GaussianPath.cosine()
    times = path.grid(STEPS, "logsnr", start=0.98, stop=0.02)
    exact = GaussianMixture(MEANS, 0.4).denoiser(path)
    x = torch.randn(256, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = []
    for solver in ("dpmpp_2m", "unipc"):
        ours = sample(exact, x=x, solver=solver, grid=times)  # ty: ignore[invalid-argument-type]
        theirs = followed(solver, path, times, x, lambda state, t: exact(state.double(), t).x0)
        gap = float((ours - theirs).abs().max() / theirs.abs().max())
        note = (
            "float64; their DPM-Solver++ rounds its state to float32" if solver == "dpmpp_2m" else "float64"
        )
        rows.append(
            Row(
                f"{solver}, largest difference of samples",
                "1e-6 of the largest entry",
                gap / 1e-6,
                bound=1.0,
                note=note,
            )
        )
        for shape in ((16, 3, 8, 8), (16, 3, 64, 64)):
            answer = torch.randn(shape)
            model = Denoiser(Still(answer), path, "x0")
            start = torch.randn(shape)
            ratio = _median(
                lambda model=model, start=start, solver=solver: sample(
                    model, x=start, solver=solver, grid=times
                ),
                lambda answer=answer, start=start, solver=solver: followed(
                    solver, path, times, start, lambda *_: answer
                ),
            )
            size = "x".join(map(str, shape))
            rows.append(Row(f"{solver}, {STEPS} steps on {size}, network free", PEER, ratio, bound=1.0))
    return rows


def error_rows() -> list[Row]:
    """Error at 16 calls on an exact mixture: multistep solvers over DDIM."""
    mixture = GaussianMixture(MEANS, torch.tensor([0.3, 0.5], dtype=torch.float64))
    noise = torch.randn(256, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = []
    for name, path, start in (
        ("cosine", GaussianPath.cosine(), 0.98),
        ("linear", GaussianPath.linear(), 0.98),
        ("ve", GaussianPath.ve(end=4.0), 4.0),
    ):
        model, x = mixture.denoiser(path), noise * path(start).sigma
        fine = path.grid(300, "logsnr", start=start, stop=0.02)
        (end,) = integrate(lambda state, t, model=model: [model(state[0], t).velocity], [x], fine, "rk4")
        errors = {}
        for solver in ("ddim", "dpmpp_2m", "unipc"):
            found = sample(model, x=x, solver=solver, steps=16, start=start, stop=0.02)
            errors[solver] = float((found - end).norm(dim=1).mean())
        for solver in ("dpmpp_2m", "unipc"):
            note = f"error {errors[solver]:.2g}, DDIM {errors['ddim']:.2g}"
            rows.append(
                Row(
                    f"{solver}, error at 16 calls, {name} path",
                    "DDIM",
                    errors[solver] / errors["ddim"],
                    bound=0.25,
                    note=note,
                )
            )
    return rows


class Wide(nn.Module):
    """A perceptron of width 256 on 64 entries and two times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64 + times, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 64)
        )

    def forward(self, x: Tensor, *times: Tensor) -> Tensor:
        """Outputs of the states' shape."""
        return self.layers(torch.cat([x, *(time[:, None] for time in times)], 1))


def training_rows() -> list[Row]:
    """Forward and backward of losses beside the bare network, batch 256."""
    x0, path = torch.randn(256, 64), GaussianPath.linear()
    draws = torch.Generator().manual_seed(0)
    net, pair = Wide(1), Wide(2)
    plain, flow = Denoiser(net, path, "v"), MeanFlow(pair, path)
    t = torch.rand(256)

    def bare() -> None:
        torch.autograd.grad((net(x0, t) - x0).square().mean(), list(net.parameters()))

    def loss(model: Any, **options: Any) -> Callable[[], object]:
        params = list(model.parameters())
        return lambda: torch.autograd.grad(model.loss(x0, generator=draws, **options), params)

    base = loss(plain)
    return [
        Row("loss of a Denoiser, batch 256", "bare network", _median(base, bare)),
        *(
            Row(
                f"loss of MeanFlow, {how}, {same:.0%} plain",
                "loss of a Denoiser",
                _median(loss(flow, derivative=how, same=same), base),
            )
            for how in ("forward", "difference")
            for same in (0.5, 0.75)
        ),
    ]


def ratios() -> list[Row]:
    """All rows of this benchmark."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peer's own
        rows = [*peer_rows(), *error_rows(), *training_rows()]
    return [row for row in rows if row.skipped or math.isfinite(row.ratio)]
