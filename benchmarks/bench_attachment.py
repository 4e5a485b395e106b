"""What an attachment costs a training step: hooks, the test for NaN and Inf, and a transform that does nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from benchmarks.harness import Row, ratio

import pullback


def training_step(attached: bool) -> Callable[[], None]:
    """One step of a transformer of 3.2 M parameters on 8 sequences of 64 tokens."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if attached:
        pullback.attach(optimizer, pullback.GradientNoise(eta=0.0))
    x = torch.randn(8, 64, 256)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def ratios() -> list[Row]:
    """One row: a step with a neutral transform attached against the bare step."""
    number = ratio(training_step(attached=True), training_step(attached=False), repeats=25)
    return [Row("step with a neutral attachment", "bare step", ratio=number, bound=1.05)]
