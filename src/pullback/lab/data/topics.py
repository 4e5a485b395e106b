"""Technical English: the topics of Python's own documentation as characters (embedded)."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pullback.lab.data.card import DatasetCard
from pullback.lab.data.source import embedded

_BREAK = "\n\n"  # between two paragraphs; sections are parted by one more


@dataclass(frozen=True)
class Topics:
    """A text in three parts that share no paragraph.

    Args:
        text: all of it: the training part, then validation, then test.
        vocabulary: its distinct characters in code order; the id of a character is its place here.
        train: int64 [n], character ids of the first 90 %.
        validation: int64 [m], the next 5 %, for choosing.
        test: int64 [k], the last 5 %, for reporting.
        card: where it comes from.
    """

    text: str
    vocabulary: str
    train: Tensor
    validation: Tensor
    test: Tensor
    card: DatasetCard

    def encode(self, text: str) -> Tensor:
        """Character ids, int64 [len(text)].

        Raises:
            ValueError: if a character is not in the vocabulary.
        """
        unknown = sorted(set(text) - set(self.vocabulary))
        if unknown:
            raise ValueError(
                f"text must use the {len(self.vocabulary)} characters of vocabulary, got {unknown}. Replace them."
            )
        places = {character: place for place, character in enumerate(self.vocabulary)}
        return torch.tensor([places[character] for character in text], dtype=torch.int64)

    def decode(self, ids: Tensor) -> str:
        """The text of character ids [n]."""
        return "".join(self.vocabulary[place] for place in ids.tolist())


@cache
def python_topics() -> Topics:
    """374,649 characters about the Python language: 173 sections in a fixed shuffled order, 94 symbols.

    The topics repeat one another; every paragraph of at least 40 characters was kept once, so that nothing
    in the held out tenth has been read in training. Typographic quotes and dashes were written in ASCII.

    Raises:
        DataError: if the embedded file is missing or damaged.
    """
    text = gzip.decompress(embedded("topics.txt.gz")).decode("ascii")
    vocabulary = "".join(sorted(set(text)))
    cuts = [text.index(_BREAK, int(share * len(text))) + len(_BREAK) for share in (0.9, 0.95)]
    card = DatasetCard(
        name="python_topics",
        source="pydoc_data.topics of CPython 3.11.7",
        licence="PSF-2.0",
        citation="The Python Software Foundation: The Python Language Reference and Library Reference, 2023.",
        examples=len(text),
        counts={
            "train": cuts[0],
            "validation": cuts[1] - cuts[0],
            "test": len(text) - cuts[1],
            "sections": text.count("\n\n\n") + 1,
        },
    )
    table = torch.full((128,), -1, dtype=torch.int64)
    table[torch.tensor([ord(character) for character in vocabulary])] = torch.arange(len(vocabulary))
    ids = table[torch.frombuffer(bytearray(text.encode("ascii")), dtype=torch.uint8).long()]
    return Topics(text, vocabulary, ids[: cuts[0]], ids[cuts[0] : cuts[1]], ids[cuts[1] :], card)
