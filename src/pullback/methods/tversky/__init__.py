"""Tversky neural networks (Doumbouya et al. 2026, arXiv:2506.11035)."""

from pullback.methods.tversky.features import (
    Diagnostics,
    EncodedRows,
    Explanation,
    FeatureBank,
    Nearest,
    SemanticField,
    nearest_inputs,
    semantic_field,
)
from pullback.methods.tversky.forms import Form
from pullback.methods.tversky.layers import TverskyProjection, TverskySimilarity, replace_linear

__all__ = [
    "Diagnostics",
    "EncodedRows",
    "Explanation",
    "FeatureBank",
    "Form",
    "Nearest",
    "SemanticField",
    "TverskyProjection",
    "TverskySimilarity",
    "nearest_inputs",
    "replace_linear",
    "semantic_field",
]
