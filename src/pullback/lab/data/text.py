"""Sentences from two domains with the mean sentiment that people gave them (embedded)."""

from __future__ import annotations

import csv
import gzip
import io
from collections import Counter
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pullback.lab.data.card import DatasetCard
from pullback.lab.data.order import fixed_permutation
from pullback.lab.data.source import embedded


@dataclass(frozen=True)
class Sentiment:
    """Sentences with a mean human rating.

    Args:
        texts: n sentences.
        domains: ``"movie"`` or ``"amazon"`` for each sentence.
        valence: float32 [n], mean rating in [-4, 4].
        card: where they come from.
    """

    texts: tuple[str, ...]
    domains: tuple[str, ...]
    valence: Tensor
    card: DatasetCard

    def domain(self, name: str, *, threshold: float = 0.5) -> tuple[list[str], Tensor]:
        """Clearly rated sentences of one domain.

        Args:
            name: ``"movie"`` or ``"amazon"``.
            threshold: a sentence is kept when the absolute value of its rating reaches this.

        Returns:
            The sentences, and int64 labels [m]: 1 positive, 0 negative.

        Raises:
            ValueError: if there is no such domain.
        """
        if name not in self.domains:
            raise ValueError(
                f"domain must be one of {sorted(set(self.domains))}, got {name!r}. Name one of them."
            )
        kept = [
            (text, rating > 0)
            for text, domain, rating in zip(self.texts, self.domains, self.valence.tolist(), strict=True)
            if domain == name and abs(rating) >= threshold
        ]
        return [text for text, _ in kept], torch.tensor([int(positive) for _, positive in kept])


@cache
def sentiment() -> Sentiment:
    """14,313 sentences in a fixed shuffled order: 10,605 of movie reviews, 3,708 of product reviews.

    Raises:
        DataError: if the embedded file is missing or damaged.
    """
    table = gzip.decompress(embedded("sentiment.tsv.gz")).decode("utf-8")
    rows = list(csv.DictReader(io.StringIO(table, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = [rows[index] for index in fixed_permutation(len(rows), "sentiment").tolist()]
    domains = tuple(row["domain"] for row in rows)
    card = DatasetCard(
        name="sentiment",
        source="source archive of vaderSentiment 3.3.2",
        licence="MIT",
        citation="C. J. Hutto, E. Gilbert, ICWSM 2014; B. Pang, L. Lee, ACL 2004; M. Hu, B. Liu, KDD 2004.",
        examples=len(rows),
        counts=dict(sorted(Counter(domains).items())),
    )
    valence = torch.tensor([float(row["valence"]) for row in rows])
    return Sentiment(tuple(row["text"] for row in rows), domains, valence, card)
