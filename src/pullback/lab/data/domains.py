"""Pairs of domains for adaptation: digits on photographs, small digits, turned moons, reviews of two kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pullback.core.streams import numpy_generator
from pullback.lab.data.images import digits8x8, mnist
from pullback.lab.data.photographs import photographs
from pullback.lab.data.text import sentiment

SEEN = ("china", "astronaut", "coffee", "retina")
"""Photographs behind target digits of training."""
UNSEEN = ("flower", "chelsea")
"""Photographs behind target digits of the test."""
WORDS = 5000
"""Words and pairs of words that reviews are counted in."""


@dataclass(frozen=True)
class Part:
    """Inputs [n, ...] and labels [n]."""

    x: Tensor
    y: Tensor

    def take(self, rows: Any) -> Part:
        """Some of the rows."""
        return Part(self.x[rows], self.y[rows])


@dataclass(frozen=True)
class Domains:
    """A source and a target.

    Args:
        source: labelled training examples.
        held: held-out labelled source.
        target: target examples for training; their labels are for an upper bound only.
        test: target examples that are in no training.
        others: further tests by name.
    """

    source: Part
    held: Part
    target: Part
    test: Part
    others: Mapping[str, Part] = field(default_factory=dict)


# --- digits on photographs -------------------------------------------------------------------------------------


def mnist_m(images: Tensor, photos: Sequence[str], rng: np.random.Generator) -> Tensor:
    """Blend every digit with a random patch, ``|patch - digit|`` in each colour (Ganin et al. 2016, section 5.2.4).

    Args:
        images: uint8 digits [n, height, width].
        photos: names among `photographs`; each digit takes one at random.
        rng: chooses photographs and places.

    Returns:
        uint8 tensor [n, height, width, 3].

    Raises:
        ValueError: if a photograph's name is unknown or there is none.
    """
    known = photographs()
    unknown = sorted(set(photos) - set(known))
    if unknown or not photos:
        raise ValueError(
            f"photos must be names among {sorted(known)}, got {unknown or 'none'}. Name at least one."
        )
    digits = images.numpy().astype(np.int16)[..., None]
    blended = np.empty((*digits.shape[:3], 3), dtype=np.uint8)
    chosen = rng.integers(len(photos), size=len(digits))
    for index, name in enumerate(photos):
        rows = np.flatnonzero(chosen == index)
        patches = np.lib.stride_tricks.sliding_window_view(
            known[name].numpy(), digits.shape[1:3], axis=(0, 1)
        )
        top, left = (rng.integers(size, size=len(rows)) for size in patches.shape[:2])
        patch = patches[top, left].transpose(0, 2, 3, 1).astype(np.int16)
        blended[rows] = np.abs(patch - digits[rows])
    return torch.from_numpy(blended)


def _colour(images: Tensor) -> Tensor:
    """uint8 [n, h, w, 3] to floats [n, 3, h, w] in [-1, 1], channels last in memory (faster convolutions)."""
    return (images.float() / 127.5 - 1.0).permute(0, 3, 1, 2)


def digits_on_photographs(examples: int, test: int, seed: int) -> Domains:
    """MNIST as grey images and MNIST-M on four photographs, disjoint digits; the test lies on two other photographs.

    Args:
        examples: digits of each domain; a tenth of the source is held out.
        test: test digits; half of them come again on the photographs of training (``seen_photographs``).
        seed: stream of patches.

    Returns:
        Images [n, 3, 28, 28] in [-1, 1], channels last in memory.

    Raises:
        ValueError: if there are not enough digits.
    """
    digits = mnist()
    if 2 * examples + test > len(digits.labels):
        raise ValueError(
            f"examples and test must fit into {len(digits.labels)} digits, got {examples} and {test}."
        )
    rng = numpy_generator("mnist-m", seed)
    held, end = examples // 10, 2 * examples
    grey = digits.images[:examples, ..., None].expand(-1, -1, -1, 3)
    source = Part(_colour(grey), digits.labels[:examples])
    target = Part(_colour(mnist_m(digits.images[examples:end], SEEN, rng)), digits.labels[examples:end])
    images, labels = digits.images[end : end + test], digits.labels[end : end + test]
    unseen, seen = (Part(_colour(mnist_m(images, photos, rng)), labels) for photos in (UNSEEN, SEEN))
    others = {"seen_photographs": seen.take(slice(0, test // 2))}
    return Domains(source.take(slice(held, None)), source.take(slice(0, held)), target, unseen, others)


# --- small digits and reviews ----------------------------------------------------------------------------------


def small_digits(name: str, examples: int, test: int, seed: int) -> Domains:
    """``"mnist-digits"``: MNIST, cropped to its central 20x20 and pooled to 8x8, to scikit-learn's digits; or back.

    Each image has maximum 1, and the mean of all training images is subtracted. Images are [n, 1, 8, 8].
    """
    large, small = mnist(), digits8x8()
    pooled = F.adaptive_avg_pool2d(large.images[:, None, 4:24, 4:24].float(), 8)
    images = (pooled, small.images[:, None].float())
    scaled = [x / x.amax((1, 2, 3), keepdim=True).clamp_min(1e-6) for x in images]
    both = [Part(x, digits.labels) for x, digits in zip(scaled, (large, small), strict=True)]
    source, target = both if name == "mnist-digits" else both[::-1]
    found = _halves(source, target, examples, test, numpy_generator(name, seed))
    mean = torch.cat([found.source.x, found.target.x]).mean(0)
    return _mapped(found, lambda x: x - mean)


def reviews(name: str, examples: int, test: int, seed: int) -> Domains:
    """``"movie-amazon"`` or ``"amazon-movie"``: counts [n, 5000] of words and pairs of words, labels 0 and 1.

    The words are chosen on training texts of both domains.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    texts: list[str] = []
    parts = []
    for domain in name.split("-"):
        found, labels = sentiment().domain(domain)
        parts.append(Part(torch.arange(len(texts), len(texts) + len(found)), labels))
        texts += found
    pair = _halves(parts[0], parts[1], examples, test, numpy_generator(name, seed))
    words = CountVectorizer(ngram_range=(1, 2), max_features=WORDS)
    words.fit([texts[i] for part in (pair.source, pair.target) for i in part.x.tolist()])

    def counted(x: Tensor) -> Tensor:
        counts = torch.from_numpy(
            words.transform([texts[i] for i in x.tolist()]).toarray().astype(np.float32)
        )
        return F.pad(counts, (0, WORDS - counts.shape[1]))  # few texts may hold fewer words

    return _mapped(pair, counted)


def _halves(source: Part, target: Part, examples: int, test: int, rng: np.random.Generator) -> Domains:
    """Random parts: a tenth of the source held out, at most 70 % of the target for training."""
    s, t = rng.permutation(len(source.y))[:examples], rng.permutation(len(target.y))
    held, adapt = len(s) // 10, min(examples, int(0.7 * len(t)))
    return Domains(
        source.take(s[held:]),
        source.take(s[:held]),
        target.take(t[:adapt]),
        target.take(t[adapt : adapt + test]),
    )


def _mapped(found: Domains, change: Any) -> Domains:
    parts = (found.source, found.held, found.target, found.test)
    return Domains(*(Part(change(part.x), part.y) for part in parts), found.others)


# --- moons -----------------------------------------------------------------------------------------------------


def moons(n: int, rng: np.random.Generator, degrees: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Two interleaved half circles with noise 0.05, turned about their centre: points [n, 2] and labels [n]."""
    from sklearn.datasets import make_moons

    x, y = make_moons(n, noise=0.05, random_state=int(rng.integers(2**31)))
    turn = np.deg2rad(degrees)
    return (x - (0.5, 0.25)) @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]), y


def with_moments_of(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The source points [n, d], mapped linearly to the mean and covariance of the target (correlation alignment)."""

    def root(x: np.ndarray, power: float) -> np.ndarray:
        values, vectors = np.linalg.eigh(np.cov(x.T))
        return (vectors * values**power) @ vectors.T

    return (source - source.mean(0)) @ root(source, -0.5) @ root(target, 0.5) + target.mean(0)
