"""Synthetic results and pages written once for all tests of the report."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

_NAME = "synthetic_results"
if _NAME not in sys.modules:  # importlib mode puts no folder of tests on the path
    _spec = importlib.util.spec_from_file_location(_NAME, Path(__file__).with_name(f"{_NAME}.py"))
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules[_NAME] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_NAME])

from synthetic_results import HOSTILE, hostile, several  # noqa: E402

from pullback.core import facts  # noqa: E402
from pullback.lab.report import write_report  # noqa: E402


@pytest.fixture(scope="session")
def report_folder(tmp_path_factory) -> Path:
    known = {room: fact for room, fact in facts.rooms().items() if room in several()}
    with pytest.MonkeyPatch.context() as patch:  # the index lists every room there is; these tests count rows
        patch.setattr(facts, "rooms", lambda: known)
        return write_report(several(), tmp_path_factory.mktemp("report") / "pages").parent


@pytest.fixture(scope="session")
def hostile_folder(tmp_path_factory) -> Path:
    assert len(HOSTILE) >= 8
    return write_report(hostile(), tmp_path_factory.mktemp("hostile") / "pages").parent
