"""A slow, literal transcription of the paper's equations: the oracle of the tests."""

from __future__ import annotations


def edited(gradient: list[float]) -> list[float]:
    """Equation 1 of the paper, element by element.

    It returns nothing like a gradient until it is written from the paper, so that the test of the maths fails.
    """
    return [float("nan") for _ in gradient]
