"""What the contracts need to know of this room's components."""

from __future__ import annotations

from typing import Any

import torch

from pullback.methods.tversky import FeatureBank, TverskyProjection, TverskySimilarity
from pullback.testing import Case

_projection: Any = TverskyProjection  # with arguments of wrong types, which must be refused

BAD = (
    lambda: TverskyProjection(8, 5),
    lambda: TverskyProjection(0, 5, 12),
    lambda: TverskyProjection(8, 0, 12),
    lambda: TverskyProjection(8, 5, 0),
    lambda: _projection(8, 5, 12, intersection="sum"),
    lambda: _projection(8, 5, 12, difference="plain"),
    lambda: _projection(8, 5, 12, model="index"),
    lambda: _projection(8, 5, 12, reduce="late"),
    lambda: _projection(8, 5, 12, gate="soft"),
    lambda: _projection(8, 5, 12, init="zeros"),
    lambda: _projection(8, 5, 12, normalize=1),
    lambda: TverskyProjection(8, 5, 12, sharpness=0.0),
    lambda: TverskyProjection(8, 5, 12, chunk=0),
    lambda: TverskyProjection(8, 5, 12, model="ratio", alpha=-0.1),
    lambda: TverskyProjection(8, 5, feature_bank=FeatureBank(7, 12)),
    lambda: TverskyProjection(8, 5, 11, feature_bank=FeatureBank(8, 12)),
    lambda: _projection(8, 5, feature_bank=torch.nn.Linear(8, 12)),
    lambda: TverskyProjection(8, 5, 12, prototypes=torch.nn.Parameter(torch.zeros(4, 8))),
)

FORMS: dict[str, dict[str, Any]] = {
    "product": {},
    "product-subtractmatch": {"difference": "substractmatch"},
    "ratio": {"model": "ratio"},
    "gmean-ratio": {"intersection": "gmean", "model": "ratio", "normalize": True},
    "softmin-subtractmatch": {"intersection": "softmin", "difference": "subtractmatch"},
    "tanh": {"gate": "tanh", "sharpness": 3.0},
    "feature-min": {"intersection": "min", "difference": "subtractmatch", "reduce": "feature", "chunk": 2},
    "feature-tanh": {"intersection": "softmin", "reduce": "feature", "gate": "tanh", "sharpness": 2.0},
}


def _pairs(generator, dtype):
    def draw(rows):
        return torch.randn(rows, 8, generator=generator, dtype=torch.float64).to(dtype)

    return draw(4), draw(4)


CASES = (
    *(
        Case(
            name=f"TverskyProjection[{name}]",
            kind="layer",
            build=lambda form=form: TverskyProjection(8, 5, 12, **form),
            shape=lambda size: (*size[:-1], 5),
            bad=BAD if name == "product" else (),
        )
        for name, form in FORMS.items()
    ),
    Case(
        name="TverskyProjection[cdist]",
        kind="layer",
        build=lambda: TverskyProjection(8, 5, 12, intersection="max", reduce="feature"),
        shape=lambda size: (*size[:-1], 5),
    ),
    Case(
        name="TverskySimilarity",
        kind="layer",
        build=lambda: TverskySimilarity(8, 12),
        inputs=_pairs,
        shape=lambda size: (size[0], size[0]),
        bad=(lambda: TverskySimilarity(8), lambda: TverskySimilarity(8, 12, alpha=float("inf"))),
    ),
    Case(
        name="FeatureBank",
        kind="layer",
        build=lambda: FeatureBank(8, 12),
        shape=lambda size: (*size[:-1], 12),
        bad=(lambda: FeatureBank(8, 0), lambda: FeatureBank(0, 12)),
    ),
)
