"""Domain-adversarial training with a gradient reversal layer (Ganin et al. 2016, arXiv:1505.07818)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pullback.methods.dann.adversary import (
    DomainAdversarialLoss,
    ReverseValidation,
    proxy_a_distance,
    reverse_validation,
)
from pullback.methods.dann.reversal import GradientReversal, reverse_gradient

if TYPE_CHECKING:
    from pullback.methods.dann.shallow import ShallowDANN

__all__ = [
    "DomainAdversarialLoss",
    "GradientReversal",
    "ReverseValidation",
    "ShallowDANN",
    "proxy_a_distance",
    "reverse_gradient",
    "reverse_validation",
]


def __getattr__(name: str) -> Any:
    if name == "ShallowDANN":  # the only name that needs scikit-learn as soon as it is touched
        from pullback.methods.dann.shallow import ShallowDANN

        return ShallowDANN
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
