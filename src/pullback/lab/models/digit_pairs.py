"""A small network for three tasks on overlaid digits, and the multi-task score against single-task networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback.lab.data.overlaid import Pairs


class DigitPairs(nn.Module):
    """A shared perceptron and three linear heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(324, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        self.heads = nn.ModuleList([nn.Linear(64, size) for size in (10, 10, 196)])

    def losses(self, pairs: Pairs, tasks: Sequence[int] = (0, 1, 2)) -> list[Tensor]:
        """Mean loss of each of ``tasks``."""
        features, wanted = self.trunk(pairs.x), (pairs.first, pairs.second, pairs.image)
        return [
            (F.mse_loss if k == 2 else F.cross_entropy)(self.heads[k](features), wanted[k]) for k in tasks
        ]

    @torch.no_grad()
    def scores(self, pairs: Pairs) -> tuple[float, float, float]:
        """Both accuracies and the mean squared error."""
        features = self.trunk(pairs.x)
        first, second, image = (head(features) for head in self.heads)
        right = [
            (logits.argmax(1) == y).float().mean()
            for logits, y in ((first, pairs.first), (second, pairs.second))
        ]
        return float(right[0]), float(right[1]), float(F.mse_loss(image, pairs.image))


def delta_m(scores: Sequence[float], single: Sequence[float]) -> tuple[float, float]:
    """Mean relative loss against single-task networks in per cent: over all tasks, and over the two accuracies."""
    worse = [(s - m) / s for m, s in zip(scores[:2], single[:2], strict=True)]
    error = (scores[2] - single[2]) / single[2]
    return 100 * (sum(worse) + error) / 3, 100 * sum(worse) / 2


def compared(net: DigitPairs, alone: Sequence[DigitPairs], pairs: Pairs) -> dict[str, float]:
    """Scores of a network for all tasks, of single-task networks in the order of the tasks, and Delta-m."""
    names = ("first_accuracy", "second_accuracy", "drawing_error")
    scores = net.scores(pairs)
    single = [each.scores(pairs)[k] for k, each in enumerate(alone)]
    every, named = delta_m(scores, single)
    found = {"delta_m": every, "delta_m_accuracy": named, **dict(zip(names, scores, strict=True))}
    return found | {f"{name}_alone": value for name, value in zip(names, single, strict=True)}
