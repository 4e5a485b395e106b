"""Real data for trials, with no network: embedded files and what scikit-learn and scikit-image carry.

Every loader returns plain tensors in a frozen dataclass with a `DatasetCard`; embedded files are checked against their
SHA-256 and shuffled by a fixed permutation; `split` parts examples by a hash of their content.
"""

from pullback.lab.data.card import DatasetCard
from pullback.lab.data.images import Digits, digits8x8, mnist
from pullback.lab.data.order import fixed_permutation, split
from pullback.lab.data.photographs import photographs
from pullback.lab.data.source import DataError
from pullback.lab.data.text import Sentiment, sentiment
from pullback.lab.data.topics import Topics, python_topics
from pullback.lab.data.volumes import Brain, Tissue, TissueParts, brain_tissue, mni152
from pullback.lab.data.words import Words, python_words

__all__ = [
    "Brain",
    "DataError",
    "DatasetCard",
    "Digits",
    "Sentiment",
    "Tissue",
    "TissueParts",
    "Topics",
    "Words",
    "brain_tissue",
    "digits8x8",
    "fixed_permutation",
    "mni152",
    "mnist",
    "photographs",
    "python_topics",
    "python_words",
    "sentiment",
    "split",
]
