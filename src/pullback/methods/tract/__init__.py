"""TrAct: training the pre-activations of the first layer (Petersen et al. 2024, arXiv:2410.23970)."""

from __future__ import annotations

from pullback.methods.tract.layers import TrActHandle, tract
from pullback.methods.tract.signal import TrAct, precondition_input

__all__ = ["TrAct", "TrActHandle", "precondition_input", "tract"]
