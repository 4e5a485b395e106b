"""ELU, matched initialisation and the bias-shift probe (Clevert, Unterthiner, Hochreiter 2016, arXiv:1511.07289)."""

from __future__ import annotations

from pullback.core.activation_swap import functional_calls, swap_activations
from pullback.methods.elu.gains import LReLU, SReLU, activation_gain, activation_moments, init_gain_
from pullback.methods.elu.probe import BiasShiftProbe
from pullback.methods.elu.shift import BiasShiftReport, LayerShift, median_variance

__all__ = [
    "BiasShiftProbe",
    "BiasShiftReport",
    "LReLU",
    "LayerShift",
    "SReLU",
    "activation_gain",
    "activation_moments",
    "functional_calls",
    "init_gain_",
    "median_variance",
    "swap_activations",
]
