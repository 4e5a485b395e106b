"""Small networks with a trunk, a label head and a domain head, for studies of domain adaptation."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TwoHeads(nn.Module):
    """Trunk and two heads; called with inputs it predicts labels.

    Args:
        trunk: inputs to features [n, d].
        label: features to label logits.
        domain: features to one domain logit.
    """

    def __init__(self, trunk: nn.Module, label: nn.Module, domain: nn.Module) -> None:
        super().__init__()
        self.trunk, self.label, self.domain = trunk, label, domain

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Features in evaluation mode, in slices of 500."""
        training = self.training
        self.eval()
        found = torch.cat([self.trunk(part) for part in x.split(500)])
        self.train(training)
        return found

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Predicted labels [n] in evaluation mode."""
        features = self.features(x)
        training = self.training
        self.eval()
        found = self.label(features).argmax(1)
        self.train(training)
        return found


def colour_digits() -> TwoHeads:
    """For [n, 3, 28, 28]: fig. 4a of Ganin et al. (2016) with batch norm and dropout; 768 features."""
    first = (nn.Conv2d(3, 32, 5), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.ReLU())
    second = (nn.Conv2d(32, 48, 5), nn.MaxPool2d(2), nn.BatchNorm2d(48), nn.Dropout2d(0.5), nn.ReLU())
    hidden = (nn.Linear(768, 100), nn.BatchNorm1d(100), nn.ReLU(), nn.Dropout(0.5))
    deeper = (nn.Linear(100, 100), nn.BatchNorm1d(100), nn.ReLU(), nn.Linear(100, 10))
    watch = (nn.Linear(768, 100), nn.BatchNorm1d(100), nn.ReLU(), nn.Linear(100, 1))
    net = TwoHeads(
        nn.Sequential(*first, *second, nn.Flatten()), nn.Sequential(*hidden, *deeper), nn.Sequential(*watch)
    )
    for layer in net.trunk.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    return net


def small_digits_net(dropout: float) -> TwoHeads:
    """For [n, 1, 8, 8]: two convolutions and 64 features."""
    conv = (
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
    last = (nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Dropout(dropout))
    domain = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    return TwoHeads(nn.Sequential(*conv, *last), nn.Linear(64, 10), domain)


def word_counts_net(words: int, dropout: float) -> TwoHeads:
    """For counts [n, words]: one hidden layer of 50 sigmoids, linear heads, two labels."""
    trunk = nn.Sequential(nn.Linear(words, 50), nn.Sigmoid(), nn.Dropout(dropout))
    return TwoHeads(trunk, nn.Linear(50, 2), nn.Linear(50, 1))
