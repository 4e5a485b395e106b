"""Similarity-aware momentum gradient surgery, SAM-GS (Borsani et al. 2025, arXiv:2506.06130)."""

from pullback.methods.sam_gs.aggregator import SAMGS, SAMGSReport
from pullback.methods.sam_gs.loop import BackwardReport, multitask_backward

__all__ = ["SAMGS", "BackwardReport", "SAMGSReport", "multitask_backward"]
