"""ELU, matched initialisation and the bias-shift probe (Clevert, Unterthiner, Hochreiter 2016, arXiv:1511.07289)."""

from __future__ import annotations

from pullback.methods.elu.activations import LReLU, SReLU
from pullback.methods.elu.gains import activation_gain, activation_moments, init_gain_
from pullback.methods.elu.probe import BiasShiftProbe
from pullback.methods.elu.report import BiasShiftReport, LayerShift, median_variance
from pullback.methods.elu.swap import functional_calls, swap_activations

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
