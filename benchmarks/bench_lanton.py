"""LANTON's step beside torch's Muon on the matrices of transformers, and its estimate of the nuclear norm."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from benchmarks.harness import Row, ratio, seconds
from torch import nn

from pullback.methods.lanton import LANTON, LayerNoise
from pullback.methods.lanton.geometry import nuclear_norms

REPEATS = 21


def matrices(width: int, blocks: int) -> list[nn.Parameter]:
    """Query, key, value, output and both perceptron matrices of every block, with gradients."""
    stream = torch.Generator().manual_seed(0)
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    params = [nn.Parameter(torch.zeros(shape)) for _ in range(blocks) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=stream)
    return params


def steps(optimizer: torch.optim.Optimizer, count: int) -> Callable[[], None]:
    """``count`` steps, so that one measurement holds whole cycles of measuring."""

    def run() -> None:
        for _ in range(count):
            optimizer.step()

    return run


def beside_muon(width: int, blocks: int, repeats: int) -> list[Row]:
    """Time of a step over that of torch's Muon, by interval of measuring."""
    muon = torch.optim.Muon(matrices(width, blocks), nesterov=False, weight_decay=0.0)
    what = f"LANTON step, {6 * blocks} matrices, width {width}"
    rows = []
    for every, bound in ((None, 1.15), (4, 1.25), (1, 1.6)):
        mine = LANTON(matrices(width, blocks), noise_every=every, alpha=0.1)
        pair = steps(mine, 4), steps(muon, 4)
        note = (
            "no noise" if every is None else f"noise every {every} steps" if every > 1 else "noise every step"
        )
        rows.append(Row(what, "torch Muon", cpu_ratio(*pair, repeats=repeats), bound, note=note))
    return rows


def cpu_ratio(what: Callable[[], object], against: Callable[[], object], *, repeats: int) -> float:
    """As `ratio`, in processor time: other processes on the machine do not count."""
    taken = seconds({"what": what, "against": against}, repeats=repeats, clock=time.process_time)
    pairs = sorted(a / b for a, b in zip(taken["what"], taken["against"], strict=True))
    return pairs[len(pairs) // 2]


def probed() -> Row:
    """AdamW with every layer's noise measured in every step."""
    plain, watched = (torch.optim.AdamW(matrices(64, 3), foreach=True) for _ in range(2))
    LayerNoise().attach(watched)
    return Row(
        "AdamW with LayerNoise, 18 matrices, width 64",
        "AdamW",
        cpu_ratio(steps(watched, 4), steps(plain, 4), repeats=REPEATS),
        note="includes the attachment's test for NaN",
    )


def ratios() -> list[Row]:
    """All rows of this benchmark."""
    batch = torch.randn(4, 256, 1024, generator=torch.Generator().manual_seed(0))
    estimate = ratio(
        lambda: nuclear_norms(batch, dtype=torch.bfloat16),
        lambda: nuclear_norms(batch, exact=True),
        repeats=5,
    )
    return [
        *beside_muon(64, 3, REPEATS),
        *beside_muon(256, 2, 7),
        Row("nuclear norms of [4, 256, 1024], estimate", "torch.linalg.svdvals", estimate, 1.0),
        probed(),
    ]
