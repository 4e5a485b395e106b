"""Sign-flipped learning rules, or curl descent (Ninou, Kadmon, Cayco-Gajic 2025, arXiv:2510.02765)."""

from pullback.methods.curl_descent.flip import FlipHandle, RuleFlip
from pullback.methods.curl_descent.theory import (
    chaos_order,
    conserved_quantities,
    curl_fraction,
    flip_threshold,
    solution_stability,
    stability_operator,
)

__all__ = [
    "FlipHandle",
    "RuleFlip",
    "chaos_order",
    "conserved_quantities",
    "curl_fraction",
    "flip_threshold",
    "solution_stability",
    "stability_operator",
]
