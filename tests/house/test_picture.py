"""The picture of the README is drawn from the evidence that is committed beside it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def picture() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_picture", CHECKOUT / "docs" / "picture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_not_older_than_its_evidence(picture: ModuleType) -> None:
    drawn = picture.PICTURE.read_text(encoding="utf-8")
    assert picture.source() in drawn, "redraw it: python docs/picture.py"


def test_other_evidence_is_noticed(
    picture: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(picture, "EVIDENCE", tmp_path / "other.json")
    assert picture.source() not in picture.PICTURE.read_text(encoding="utf-8")
