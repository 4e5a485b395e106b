"""Every benchmark can be run by `make bench`: it imports and offers its rows."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (CHECKOUT / "benchmarks").glob("bench_*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_offers_its_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(CHECKOUT))
    module = importlib.import_module(f"benchmarks.{name}")
    assert not inspect.signature(module.ratios).parameters
    assert module.__doc__


def test_a_failing_benchmark_is_told_and_the_table_still_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(CHECKOUT))
    run = importlib.import_module("benchmarks.run")
    harness = importlib.import_module("benchmarks.harness")

    class Broken:
        @staticmethod
        def ratios() -> list[object]:
            raise RuntimeError("no such peer")

    class Slow:
        @staticmethod
        def ratios() -> list[object]:
            return [harness.Row("this", "that", ratio=2.0, bound=1.5)]

    monkeypatch.setitem(sys.modules, "benchmarks.bench_import", Broken)
    monkeypatch.setitem(sys.modules, "benchmarks.bench_engine", Slow)
    assert run.main(["import", "engine"]) == 1
    printed = capsys.readouterr().out
    assert "no such peer" in printed
    assert "| over" in printed
    assert run.main(["nothing"]) == 2
