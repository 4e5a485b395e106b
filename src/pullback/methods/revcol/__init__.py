"""Reversible column networks, and the coupling steps behind them (Cai et al. 2023, arXiv:2212.11696)."""

from __future__ import annotations

from pullback.core.reversible import CouplingStep, Drift, ReversibleSequence, away_from_zero_, set_reversible
from pullback.core.saved_bytes import SavedBytes, saved_bytes
from pullback.methods.revcol.configurations import CONFIGURATIONS, Configuration, revcol
from pullback.methods.revcol.layers import ConvNeXtBlock
from pullback.methods.revcol.memory import MemoryReport, memory_report
from pullback.methods.revcol.network import FeatureInfo, RevCol, RevColOutput
from pullback.methods.revcol.supervision import supervised_loss

__all__ = [
    "CONFIGURATIONS",
    "Configuration",
    "ConvNeXtBlock",
    "CouplingStep",
    "Drift",
    "FeatureInfo",
    "MemoryReport",
    "RevCol",
    "RevColOutput",
    "ReversibleSequence",
    "SavedBytes",
    "away_from_zero_",
    "memory_report",
    "revcol",
    "saved_bytes",
    "set_reversible",
    "supervised_loss",
]
