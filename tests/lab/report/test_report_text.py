"""Numbers, hostile text and file names."""

from __future__ import annotations

import math
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback.lab.report.text import (
    clean,
    clean_block,
    difference,
    file_stem,
    interval,
    markdown,
    number,
    p_value,
)

any_text = st.text(st.characters(codec=None), max_size=200)


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [(0.896, "fraction", "89.6 %"), (0.0314159, "nats", "0.03142 nats"), (-2.0, "", "\N{MINUS SIGN}2"),
     (None, "fraction", "\N{EN DASH}"), (True, "", "\N{EN DASH}"), (math.nan, "fraction", "not finite")],
)  # fmt: skip
def test_numbers_carry_their_unit(value, unit, shown):
    assert number(value, unit) == shown


def test_differences_of_fractions_are_points():
    assert difference(0.381, "fraction") == "+38.1 points"
    assert interval(-0.01, 0.02, "fraction") == "[\N{MINUS SIGN}1.0, +2.0]"


@pytest.mark.parametrize(
    ("p", "shown"), [(0.00390625, "0.0039"), (1e-9, "< 0.0001"), (math.nan, "\N{EN DASH}")]
)
def test_a_p_value_is_never_zero(p, shown):
    assert p_value(p) == shown


def test_what_is_invisible_becomes_an_escape():
    assert clean("\x1b[31mred\u202e") == "\\x1b[31mred\\u202e"
    assert clean("a\nb\tc") == "a b c"
    assert clean_block("a\nb\x00") == "a\nb\\x00"
    assert len(clean("A" * 10_000)) == 80


@given(any_text)
def test_clean_text_has_no_control_or_direction_character(text):
    assert not [c for c in clean(text) if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}]


@given(any_text)
def test_markdown_leaves_no_markup_unescaped(text):
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_\[\]<>|~$&]", markdown(text))


@pytest.mark.parametrize("text", ["# a", "- a", "1. a", "+ a", "=== a"])
def test_markdown_starts_no_block(text):
    assert "\\" in markdown(text)


def test_markdown_leaves_plain_numbers_alone():
    assert markdown("52.2 %") == "52.2 %"


@given(any_text)
def test_file_names_are_plain_and_no_device(text):
    stem = file_stem(text)
    assert re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", stem)
    assert stem not in {"con", "nul", "aux", "prn", "index"}


def test_file_names_differ_for_different_names():
    names = ["dann", "Dann", "d/ann", "index", "../dann", "con", "x" * 99, "x" * 100]
    assert file_stem("dann") == "dann"
    assert len({file_stem(name).casefold() for name in names}) == len(names)
