"""Training of a network that segments tissue of the template brain, and what it predicts in unseen blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from pullback.core.streams import generator
from pullback.lab.data.volumes import Tissue, another_scanner, brain_tissue, coronal_slices, cubes

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class Segmentation:
    """One network with Adam and half a cosine, on random cubes that are the same for all arms of a seed.

    Args:
        net: the network, images [n, 1, x, y, z] to scores [n, 3, x, y, z] of neither, grey and white matter.
        loss: of scores and masks, a mean over examples.
        lr: first learning rate.
        steps: length of the schedule.
        side: voxels along an edge of a cube.
        batch: cubes of a step.
        noise: deviation of the noise on intensities, whose deviation is 1.
        seed: of the streams.
        parts: in how many parts a batch is taken; gradients add up to those of the whole.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Loss,
        *,
        lr: float,
        steps: int,
        side: int = 16,
        batch: int = 2,
        noise: float = 0.15,
        seed: int = 0,
        parts: int = 1,
    ) -> None:
        self.net, self.loss = net, loss
        self.side, self.batch, self.noise, self.seed, self.parts = side, batch, noise, seed, parts
        self.optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * min(step, steps) / steps)
        )

    def step(self, number: int) -> float:
        """One update; the loss before it."""
        x, y = cubes(self.batch, self.side, self.noise, generator("cubes", self.seed, number))
        self.optimizer.zero_grad()
        total = 0.0
        for images, masks in zip(x.chunk(self.parts), y.chunk(self.parts), strict=True):
            loss = self.loss(self.net(images), masks) / self.parts
            loss.backward()
            total += float(loss.detach())
        self.optimizer.step()
        self.schedule.step()
        return total

    @torch.no_grad()
    def predict(self, block: Tissue, number: int = 0) -> tuple[Tensor, Tensor]:
        """A block as one more scanner sees it, and the network's scores; the same scanner for all arms of a seed."""
        x = another_scanner(block.image[None], self.noise, generator("scanner", self.seed, number))
        return x, self.net(x)

    def mean_score(self, block: Tissue, score: Loss, scanners: int = 4) -> Tensor:
        """Mean [2] over scanners of ``score(masks predicted, masks)`` [1, 2] for grey and white matter."""
        found = []
        for number in range(scanners):
            labels = self.predict(block, number)[1].argmax(1, keepdim=True)
            predicted = torch.cat([labels == 1, labels == 2], dim=1)
            found.append(score(predicted, block.masks[None, 1:])[0])
        return torch.stack(found).mean(0)

    def overlaps(self, score: Loss) -> dict[str, float]:
        """Scores in the test block (``dice``, its two parts, the loss in float64), and where rates are chosen."""
        parts = brain_tissue()
        grey, white = self.mean_score(parts.test, score).tolist()
        chosen_by = float(self.mean_score(parts.validation, score).mean())
        return {
            "dice": (grey + white) / 2,
            "grey_dice": grey,
            "white_dice": white,
            "validation_dice": chosen_by,
            "test_loss": float(self.loss(self.predict(parts.test)[1].double(), parts.test.masks[None])),
        }

    def slices(self, rows: Sequence[int] = (2, 8, 14)) -> dict[str, np.ndarray]:
        """Coronal slices of the test block as uint8: what is seen, the truth, and what is predicted (0, 1, 2)."""
        test = brain_tissue().test
        x, scores = self.predict(test)
        low, high = torch.quantile(x, torch.tensor([0.005, 0.995]))
        volumes = {
            "input": (255 * (x[0, 0] - low) / (high - low)).round().clamp(0, 255),
            "truth": test.masks.float().argmax(0),
            "predicted": scores[0].argmax(0),
        }
        return {name: coronal_slices(each, rows).to(torch.uint8).numpy() for name, each in volumes.items()}
