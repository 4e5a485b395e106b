"""Equilibrium propagation (Scellier and Bengio 2017, arXiv:1602.05179) and its better estimators."""

from pullback.methods.eqprop.energies import EnergyFunction, EnergyModel, Relaxed, relax
from pullback.methods.eqprop.layered import HopfieldConvNet, HopfieldMLP, LayeredEnergy
from pullback.methods.eqprop.propagation import EquilibriumProp, Outcome

__all__ = [
    "EnergyFunction",
    "EnergyModel",
    "EquilibriumProp",
    "HopfieldConvNet",
    "HopfieldMLP",
    "LayeredEnergy",
    "Outcome",
    "Relaxed",
    "relax",
]
