"""Words and numbers of a report: hostile text made visible, numbers with units, safe file names."""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from typing import Any, Final

NAME: Final = 80
"""Longest name that is shown in full, in characters."""
DASH: Final = "–"  # noqa: RUF001 (an en dash is meant)
"""Stands for a value that does not exist."""
PROSE: Final = 4_000
"""Longest text that is shown in full, in characters."""

_HIDDEN: Final = frozenset(
    {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
)  # controls, bidi marks, surrogates, separators
_MARKDOWN: Final = re.compile(r"([\\`*_{}\[\]<>|~$&^]|:(?=//)|(?<=www)\.)")
_AT_START: Final = re.compile(r"^(\d{1,9}(?=[.)]\s)|(?=[#+=:-]))([#+=:.)-])")
_DEVICES: Final = frozenset(
    {"con", "prn", "aux", "nul", *(f"com{i}" for i in range(10)), *(f"lpt{i}" for i in range(10))}
)


def clean(value: object, limit: int = NAME) -> str:
    r"""One line of plain text: whatever is invisible or reorders text becomes a visible escape.

    Args:
        value: any text, also from a stranger.
        limit: characters after which the text is cut with an ellipsis.

    Returns:
        Text without control characters, direction marks and line breaks (ANSI's escape becomes ``\x1b``).
    """
    return _visible(" ".join(str(value)[: 4 * limit].split()), limit)


def clean_block(value: object, limit: int = PROSE) -> str:
    """As `clean`, with line breaks kept: for prose and tracebacks.

    Args:
        value: any text.
        limit: characters after which the text is cut with an ellipsis.

    Returns:
        Plain text.
    """
    lines = str(value)[: 4 * limit].replace("\r\n", "\n").replace("\t", "    ").split("\n")
    return _cut("\n".join(_visible(line, limit) for line in lines).strip("\n"), limit)


def _visible(text: str, limit: int) -> str:
    shown = "".join(_escape(c) if unicodedata.category(c) in _HIDDEN else c for c in text)
    return _cut(shown, limit)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def number(value: object, unit: str = "", *, signed: bool = False) -> str:
    """A value with its unit: fractions as per cent, everything else with four significant digits.

    Args:
        value: the number; anything that is none is shown as a dash.
        unit: unit of the metric.
        signed: whether a plus sign is written, for differences.

    Returns:
        For example ``89.6 %``, ``0.0314 nats`` or a dash.
    """
    body = bare_number(value, unit, signed=signed)
    if body in (DASH, "not finite"):
        return body
    return f"{body} %" if unit == "fraction" else f"{body} {clean(unit, 20)}".strip()


def bare_number(value: object, unit: str = "", *, signed: bool = False) -> str:
    """As `number`, without the unit: for table cells whose heading names it.

    Args:
        value: the number.
        unit: unit of the metric; fractions are multiplied by 100.
        signed: whether a plus sign is written.

    Returns:
        The digits, with a proper minus sign.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return DASH
    if not math.isfinite(value):
        return "not finite"
    sign = "+" if signed else ""
    digits = 3 if signed else 4  # of a difference no more is known
    text = f"{100 * value:{sign}.1f}" if unit == "fraction" else f"{value:{sign}.{digits}g}"
    return text.replace("-", "\N{MINUS SIGN}")


def difference(value: object, unit: str) -> str:
    """A difference of two values with its unit: fractions as points (hundredths).

    Args:
        value: the difference.
        unit: unit of the metric.

    Returns:
        For example ``+38.1 points``.
    """
    body = bare_number(value, unit, signed=True)
    if body in (DASH, "not finite"):
        return body
    return f"{body} points" if unit == "fraction" else f"{body} {clean(unit, 20)}".strip()


def interval(low: object, high: object, unit: str) -> str:
    """A 95 % interval in the metric's unit.

    Args:
        low: lower bound.
        high: upper bound.
        unit: unit of the metric.

    Returns:
        For example ``[+36.0, +40.2]``.
    """
    return f"[{bare_number(low, unit, signed=True)}, {bare_number(high, unit, signed=True)}]"


def p_value(value: object) -> str:
    """A p value in three digits, never as 0.

    Args:
        value: the p value.

    Returns:
        For example ``0.0039``, ``< 0.0001`` or a dash.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return DASH
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def scalar(value: Any) -> str:
    """A hyperparameter's value.

    Args:
        value: number, text or truth value.

    Returns:
        Short text.
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    return clean(value, 60)


def markdown(value: object, limit: int = NAME) -> str:
    """Text that Markdown shows literally: no markup, no links, no HTML, no table break.

    Args:
        value: any text.
        limit: characters after which the text is cut.

    Returns:
        One line with every character of markup escaped.
    """
    return _AT_START.sub(r"\1\\\2", _MARKDOWN.sub(r"\\\1", clean(value, limit)))


def file_stem(name: str) -> str:
    """A file name without extension for ``name``, safe on every system and different for different names.

    Args:
        name: any text.

    Returns:
        ``name`` itself where it is plain, else its plain part with a short hash.
    """
    plain = re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name) and name not in _DEVICES
    if plain and name != "index":
        return name
    kept = re.sub(r"[^a-z0-9]+", "-", name.lower()[:200]).strip("-")[:32].strip("-") or "trial"
    return f"{kept}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
