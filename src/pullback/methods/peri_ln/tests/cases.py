"""What the contracts need to know of this room's components."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pullback.methods.peri_ln import PeriNorm, PeriNormBlock, ResidualStreamProbe
from pullback.testing import Case

_norm: Any = PeriNorm  # with arguments of wrong types, which must be refused
_block: Any = PeriNormBlock
_probe: Any = ResidualStreamProbe


def _tokens(generator, dtype):
    return (torch.randn(3, 4, 8, generator=generator, dtype=torch.float64).to(dtype),)


def _branch():
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8, bias=False))


def _zero():
    branch = _branch()
    nn.init.zeros_(branch[2].weight)
    return branch


class Stack(nn.Module):
    """Two blocks with a batch norm between them, so that a measurement could leave traces."""

    def __init__(self):
        super().__init__()
        self.first, self.second = PeriNormBlock(8, 2), PeriNormBlock(8, 2)
        self.mixed = nn.BatchNorm1d(4)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.second(self.mixed(self.first(x))))


def _model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Stack()


def _loss(model, x):
    return model(x).square().mean()


CASES = (
    *(
        Case(
            name=f"PeriNorm[{norm}]",
            kind="layer",
            build=lambda norm=norm: PeriNorm(_branch(), 8, norm=norm, gain_init=0.7),
            shape=tuple,
            bad=(
                lambda: PeriNorm(_zero(), 8),
                lambda: PeriNorm(_branch(), 0),
                lambda: PeriNorm(_branch(), 8, gain_init=0.0),
                lambda: PeriNorm(_branch(), 8, gain_init=0.5, placement="pre"),
                lambda: PeriNorm(_branch(), 8, eps=-1e-6),
                lambda: PeriNorm(_branch(), 8, dropout=1.5),
                lambda: _norm(_branch(), 8, norm="batch"),
                lambda: _norm(_branch(), 8, placement="middle"),
                lambda: _norm(torch.tanh, 8),
            ),
        )
        for norm in ("rms", "layer")
    ),
    *(
        Case(
            name=f"PeriNormBlock[{placement}]",
            kind="layer",
            build=lambda placement=placement: PeriNormBlock(
                8,
                2,
                placement=placement,
                gain_init=1.0 if placement == "post" else 0.5,
                causal=True,
                fused=False,  # with the fused kernel torch has no second derivative on a CPU
            ),
            inputs=_tokens,
            shape=tuple,
            bad=(
                lambda: PeriNormBlock(8, 3),
                lambda: PeriNormBlock(8, 2, hidden=0),
                lambda: _block(8, 2, placement="none"),
                lambda: _block(8.0, 2),
            ),
        )
        for placement in ("peri", "post", "output")
    ),
    Case(
        name="ResidualStreamProbe",
        kind="probe",
        build=lambda: ResidualStreamProbe(_model()),
        model=_model,
        inputs=_tokens,
        run=lambda probe, model, batch: _watching(probe, model)(_loss, *batch),
        bad=(
            lambda: ResidualStreamProbe(nn.Linear(2, 2)),
            lambda: ResidualStreamProbe(_model(), window=0),
            lambda: ResidualStreamProbe(_model(), factor=0.0),
            lambda: ResidualStreamProbe(_model(), blocks=("third",)),
            lambda: _probe("model"),
        ),
    ),
)


def _watching(probe, model):
    """A probe with the settings and the history of ``probe`` for another model."""
    other = ResidualStreamProbe(model, window=probe.window, factor=probe.factor, blocks=("first",))
    other.load_state_dict(probe.state_dict())
    return other
