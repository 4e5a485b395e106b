"""Normalize-and-Project (Lyle et al. 2024, arXiv:2407.01800)."""

from pullback.methods.nap.insertion import insert_norms
from pullback.methods.nap.projection import Project

__all__ = ["Project", "insert_norms"]
