"""What the contracts need to know of this room's components."""

from __future__ import annotations

from typing import Any

import torch

from pullback.core.reversible import CouplingStep, ReversibleSequence
from pullback.methods.revcol import RevCol
from pullback.testing import Case

_untyped: Any = RevCol


def _net(**how: Any) -> RevCol:
    torch.manual_seed(0)
    return RevCol(2, (3, 4), (1, 1), 3, layer_scale=0.5, **how)


def _images(generator: torch.Generator, dtype: torch.dtype) -> tuple[torch.Tensor]:
    return (torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype),)


def _sequence() -> ReversibleSequence:
    return ReversibleSequence([CouplingStep(0, [], torch.nn.Identity(), context=[0])])


def _through(sequence: ReversibleSequence, model: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """The user's model as the function of one step that fills an empty slot: a checkpoint, bitwise."""
    step = CouplingStep(0, [], model, context=range(len(inputs)))
    made = ReversibleSequence(
        [step], sequence.anchor_every, sequence.preserve_rng_state, sequence.drift_check
    )
    return made([None], inputs)[0]


CASES: tuple[Case, ...] = (
    Case(
        name="RevCol",
        kind="layer",
        build=_net,
        inputs=_images,
        shape=lambda shape: (shape[0], 3),
        bad=(
            lambda: RevCol(0),
            lambda: RevCol(channels=(4, 8), blocks=(1,)),
            lambda: _untyped(channels="wide"),
            lambda: RevCol(kernel=4),
            lambda: RevCol(drop_path=1.0),
            lambda: RevCol(6, intermediate_supervision=True),
            lambda: _untyped(recompute="always"),
            lambda: RevCol(anchor_every=-1),
            lambda: RevCol(layer_scale=0.0),
        ),
    ),
    Case(
        name="ReversibleSequence",
        kind="recompute",
        build=_sequence,
        run=_through,
        memory=0.5,
        bad=(
            lambda: ReversibleSequence([]),
            lambda: ReversibleSequence(list(_sequence().steps), anchor_every=-1),  # ty: ignore[invalid-argument-type],
        ),
    ),
)
