"""Ticks of logarithmic axes in plain text: the style reads no formulas, because names of arms come from users."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from matplotlib.ticker import Formatter, LogFormatterMathtext

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POWER: Final = re.compile(r"\$\\mathdefault\{(-?)(?:([\d.]+)\\times)?([\d.]+)\^\{(-?[\d.]+)\}\}\$")
_PLAIN: Final = re.compile(r"\$\\mathdefault\{(.*)\}\$")
_RAISED: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SHORT: Final = 3
"""Powers of ten up to this size are written out."""


class PlainPowers(Formatter):
    """The labels of another formatter as numbers (0.02, 100) or with a raised exponent (10⁻⁶).

    Args:
        inner: matplotlib's own formatter of a logarithmic axis; it still says which ticks have a label.
    """

    def __init__(self, inner: Formatter) -> None:
        self.inner = inner

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Label of the tick at ``x``; empty where there is none."""
        return plain_power(self.inner(x, pos))

    def set_axis(self, axis: Any) -> None:
        """Hand the axis on."""
        super().set_axis(axis)
        self.inner.set_axis(axis)

    def set_locs(self, locs: Any) -> None:
        """Hand the places of the ticks on."""
        super().set_locs(locs)
        self.inner.set_locs(locs)


def plain_power(text: str) -> str:
    """A label in matplotlib's formula language as plain text; anything else is returned as it is."""
    found = _POWER.fullmatch(text)
    if found is None:
        other = _PLAIN.fullmatch(text)
        return text if other is None else other.group(1)
    sign, factor, base, exponent = found.groups()
    if base == "10" and exponent.lstrip("-").isdigit() and abs(int(exponent)) <= _SHORT:
        return f"{sign}{float(factor or 1) * 10.0 ** int(exponent):g}"
    return f"{sign}{f'{factor}·' if factor else ''}{base}{exponent.translate(_RAISED)}"


def write_powers_plainly(figure: Figure) -> None:
    """Write the powers of matplotlib's own formatters plainly; formatters that a drawing set itself stay."""
    for axes in getattr(figure, "axes", ()):
        for axis in (axes.xaxis, axes.yaxis):
            major, minor = axis.get_major_formatter(), axis.get_minor_formatter()
            if isinstance(major, LogFormatterMathtext):
                axis.set_major_formatter(PlainPowers(major))
            if isinstance(minor, LogFormatterMathtext):
                axis.set_minor_formatter(PlainPowers(minor))
