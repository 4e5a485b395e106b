"""Python's documentation as words: the topics of `python_topics`, for models with a vocabulary of a few thousand."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pullback.core.checks import integer
from pullback.lab.data.topics import python_topics

UNKNOWN = "<unknown>"
_WORD = re.compile(r"\n\n+|\w+|[^\w\s]")  # a break between paragraphs, a word, or one sign


@dataclass(frozen=True)
class Words:
    """A text as ids of words.

    Args:
        names: the words by id; id 0 stands for every other word.
        train: int64 [n].
        validation: int64 [m], for choosing.
        test: int64 [k], for reporting.
    """

    names: tuple[str, ...]
    train: Tensor
    validation: Tensor
    test: Tensor


@cache
def python_words(size: int = 2000) -> Words:
    """The topics as words in lower case, with the ``size - 1`` most frequent of the training part named.

    Raises:
        TypeError, ValueError: if ``size`` is no whole number >= 2.
    """
    integer("size", size, minimum=2)
    topics = python_topics()
    ends = [len(topics.train), len(topics.train) + len(topics.validation), len(topics.text)]
    starts = [0, *ends[:2]]
    parts = [_WORD.findall(topics.text[a:b].lower()) for a, b in zip(starts, ends, strict=True)]
    parts = [["\n\n" if word.startswith("\n\n") else word for word in part] for part in parts]
    counts = Counter(parts[0])
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[: size - 1]
    names = (UNKNOWN, *frequent)
    places = {name: place for place, name in enumerate(names)}
    return Words(names, *(torch.tensor([places.get(word, 0) for word in part]) for part in parts))
