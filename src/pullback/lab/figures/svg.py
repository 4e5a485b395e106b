"""A matplotlib figure as inline SVG: sanitised, deterministic, and coloured by the page's variables."""

from __future__ import annotations

import io
import re
import warnings
from typing import TYPE_CHECKING, Final
from xml.etree import ElementTree as ET

from pullback.lab.figures.style import (
    BASELINE,
    CEILING,
    CLASSES,
    GRID,
    INK,
    METHOD,
    MUTED,
    PAPER,
    SERIES,
    UNIT,
    style,
)
from pullback.lab.figures.ticks import write_powers_plainly

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG: Final = "http://www.w3.org/2000/svg"
_XLINK_HREF: Final = "{http://www.w3.org/1999/xlink}href"
_ELEMENTS: Final = frozenset({
    "svg", "g", "path", "text", "tspan", "use", "rect", "circle", "ellipse", "line", "polyline", "polygon",
    "image", "defs", "clipPath", "title", "desc", "linearGradient", "radialGradient", "stop", "pattern",
})  # fmt: skip
_ATTRIBUTES: Final = frozenset({
    "d", "x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "r", "rx", "ry", "points", "width", "height",
    "viewBox", "transform", "id", "style", "clip-path", "fill", "stroke", "opacity", "preserveAspectRatio",
    "offset", "gradientUnits", "gradientTransform", "patternUnits", "dx", "dy",
})  # fmt: skip
_PROPERTIES: Final = frozenset({
    "fill", "fill-opacity", "fill-rule", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray",
    "stroke-dashoffset", "stroke-linecap", "stroke-linejoin", "stroke-miterlimit", "opacity", "text-anchor",
    "font-size", "font-weight", "font-style", "clip-path", "image-rendering", "dominant-baseline",
})  # fmt: skip
_URL: Final = re.compile(r"url\(#([A-Za-z0-9_.-]+)\)")
_PNG: Final = re.compile(r"data:image/(?:png|jpeg);base64,[A-Za-z0-9+/=\s]+")

VARIABLES: Final[dict[str, str]] = {
    INK: "--fig-ink",
    MUTED: "--fig-muted",
    GRID: "--fig-grid",
    PAPER: "--fig-paper",
    METHOD: "--fig-method",
    BASELINE: "--fig-baseline",
    CEILING: "--fig-ceiling",
    **{colour: f"--fig-s{index}" for index, colour in enumerate(SERIES)},
    **{colour: f"--fig-c{index}" for index, colour in enumerate(CLASSES)},
}
"""Palette colours that become variables of the page, so that one drawing is right in light and in dark."""


class FigureError(ValueError):
    """A study's drawing returned something that cannot be shown."""


def to_svg(figure: Figure, *, prefix: str, label: str) -> str:
    """Write a figure as an SVG element for a page.

    Only drawing elements and attributes survive; links, scripts, events and anything fetched from elsewhere do not.
    The same figure gives the same text: no date, no random identifiers.

    Args:
        figure: the figure; its size in inches sets the largest size at which it is shown.
        prefix: starts every ``id`` in it, unique in the page (letters, digits and dashes).
        label: alternative text.

    Returns:
        One ``<svg>`` element.

    Raises:
        FigureError: if ``figure`` is no matplotlib figure or comes out as no SVG.
    """
    if not callable(getattr(figure, "savefig", None)):
        raise FigureError(
            f"a drawing must return a matplotlib Figure, got {type(figure).__name__}. Return the figure."
        )
    buffer = io.StringIO()
    with style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+")  # shown in the page's own font
        warnings.filterwarnings("ignore", message=r"Matplotlib currently does not support")
        write_powers_plainly(figure)
        if figure.get_layout_engine() is not None:  # lay out once; saving alone would do it several times
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    try:
        root = ET.fromstring(_xml_safe(buffer.getvalue()))
    except ET.ParseError as error:
        raise FigureError(f"the figure is no well-formed SVG: {error}. Check its texts.") from error
    clean = _clean(root, prefix)
    if clean is None:
        raise FigureError("the figure has no svg element. Return a matplotlib Figure.")
    width = float(figure.get_figwidth()) * 72 * UNIT
    clean.attrib.pop("width", None)
    clean.attrib.pop("height", None)
    clean.attrib.update({"role": "img", "aria-label": label, "style": f"max-width:{width:.0f}px"})
    return ET.tostring(clean, encoding="unicode", short_empty_elements=True)


def _xml_safe(text: str) -> str:
    """Drop the document type and the characters that XML cannot hold."""
    text = re.sub(r"<!DOCTYPE[^>]*>", "", text, count=1)
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def _clean(element: ET.Element, prefix: str) -> ET.Element | None:
    namespace, _, name = str(element.tag).rpartition("}")
    if namespace == "{" + _SVG and name == "a":
        name, element.attrib = "g", {}  # a link's content stays, the link does not
    if namespace != "{" + _SVG or name not in _ELEMENTS:
        return None
    out = ET.Element(name)
    for key, value in element.attrib.items():
        if key in ("href", _XLINK_HREF):
            _keep_reference(out, value, prefix)
        elif key in _ATTRIBUTES:
            out.set(key, _value(key, value, prefix))
    if name in ("text", "tspan", "title", "desc"):
        out.text = element.text
    for child in element:
        kept = _clean(child, prefix)
        if kept is not None:
            kept.tail = child.tail if name in ("text", "tspan") else None
            out.append(kept)
    return out if len(out) or out.attrib or out.text else None


def _keep_reference(out: ET.Element, value: str, prefix: str) -> None:
    """Keep references into the same drawing and embedded pictures; drop every other link."""
    if value.startswith("#"):
        out.set("href", f"#{prefix}-{value[1:]}")
    elif out.tag == "image" and _PNG.fullmatch(value):
        out.set("href", re.sub(r"\s+", "", value))


def _value(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return f"{prefix}-{value}"
    if key == "style":
        return _style(value, prefix)
    if key == "d":
        return " ".join(value.split())
    return _local(value, prefix) if "(" not in value or _safe(value) else ""


def _style(text: str, prefix: str) -> str:
    """Keep known properties, name the page's colours, and leave the font family to the page."""
    kept = []
    for declaration in text.split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font":
            size = re.search(r"([\d.]+)px", value)
            weight = re.search(r"\b(bold|[5-9]00)\b", value)
            kept += [f"font-size:{size[1]}px"] if size else []
            kept += ["font-weight:600"] if weight else []
        elif name in _PROPERTIES and ("(" not in value or _safe(value)):
            kept.append(f"{name}:{_local(value, prefix)}")
    return ";".join(kept)


def _safe(value: str) -> bool:
    """Whether every function in an attribute is a reference into the drawing or a plain transformation."""
    rest = _URL.sub("", value)
    return not re.sub(r"\b(?:translate|scale|rotate|matrix|skewX|skewY)\([-+\d.,eE\s]*\)", "", rest).count(
        "("
    )


def _local(value: str, prefix: str) -> str:
    """References with the drawing's prefix and palette colours as variables."""
    value = _URL.sub(rf"url(#{prefix}-\1)", value)
    return re.sub(
        r"#[0-9a-fA-F]{6}\b",
        lambda m: f"var({VARIABLES[m[0].lower()]},{m[0]})" if m[0].lower() in VARIABLES else m[0],
        value,
    )
