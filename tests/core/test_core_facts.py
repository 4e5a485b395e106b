"""Facts of rooms and their citations."""

import subprocess
import sys

import pytest

from pullback.core import facts as module
from pullback.core.citation import cite
from pullback.core.facts import Facts, FactsError, UnknownRoomError, facts, read_facts, rooms

TEXT = """
title = "A"
authors = ["B. C."]
year = 2020
venue = "D"
kind = "transform"
capability = "step"
exports = ["Name"]
extras = []
summary = "one line"
claim = "it helps"
bibtex = "@article{a, title={A}}"
"""


def test_read():
    found = read_facts("some_room", TEXT)
    assert found.authors == ("B. C.",)
    assert found.arxiv == ""
    assert found.module == "pullback.methods.some_room"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "A"', "", r"missing \['title'\]"),
        ('title = "A"', 'titel = "A"', r"unknown \['titel'\]"),
        ("year = 2020", "year = 2020\nextra = 1", r"unknown \['extra'\]"),
        ("year = 2020", 'year = "2020"', "year must be an integer"),
        ("year = 2020", "year = true", "year must be an integer"),
        ('kind = "transform"', 'kind = "thing"', "kind must be one of .* got 'thing'"),
        ('capability = "step"', 'capability = "x"', "capability must be one of"),
        ('exports = ["Name"]', "exports = []", "1 to 4 names, got 0"),
        ('exports = ["Name"]', 'exports = ["a","b","c","d","e"]', "got 5"),
        ('exports = ["Name"]', "exports = [1]", "list of strings"),
        ("one line", "x" * 90, "under 90"),
        ("it helps", " ", "claim must not be empty"),
        ("year = 2020", "year = ", "must be TOML"),
    ],
)
def test_wrong_facts_are_named(old, new, message):
    assert old in TEXT
    with pytest.raises(FactsError, match=rf"methods/r/method\.toml.*{message}"):
        read_facts("r", TEXT.replace(old, new))


def folder(tmp_path, **texts):
    for room, text in texts.items():
        (tmp_path / room).mkdir()
        (tmp_path / room / "method.toml").write_text(text)
    (tmp_path / "no_room").mkdir()
    (tmp_path / "file.py").write_text("")
    return tmp_path


@pytest.fixture
def methods(tmp_path, monkeypatch):
    def use(**texts):
        place = folder(tmp_path, **texts)
        monkeypatch.setattr(module, "files", lambda _: place)
        rooms.cache_clear()

    yield use
    rooms.cache_clear()


def test_rooms_nearest_name_and_cite(methods):
    methods(b_room=TEXT.replace("Name", "Other").replace("{a,", "{b,"), a_room=TEXT)
    assert list(rooms()) == ["a_room", "b_room"]
    assert isinstance(facts("a-room"), Facts)
    with pytest.raises(UnknownRoomError) as caught:
        facts("a_rom")
    assert str(caught.value) == "room must be the name of a method, got 'a_rom'. Did you mean 'a_room'?"
    with pytest.raises(UnknownRoomError) as caught:
        facts("<script>" * 5000)
    assert len(str(caught.value)) < 200
    assert cite("b_room", "a-room", "b_room") == "@article{b, title={A}}\n\n@article{a, title={A}}"
    assert cite().startswith("@article{a,")


def test_exports_are_unique(methods):
    methods(a_room=TEXT, b_room=TEXT)
    with pytest.raises(FactsError, match="got 'Name' in a_room and b_room"):
        rooms()


def test_facts_need_the_standard_library_only():
    code = "import sys, pullback.core.citation; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
