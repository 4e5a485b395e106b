"""Run every ``bench_*.py`` beside this file, print one table of ratios: ``benchmarks/run.py [NAME...]``.

Exit code 1 when a ratio is over its bound or a benchmark could not run; the others still run.
"""

from __future__ import annotations

import importlib
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.harness import Row  # noqa: E402  (the repository's root must be importable first)

HEADER = ("benchmark", "what", "against", "ratio", "bound", "verdict", "note")


def cells(name: str, row: Row) -> tuple[str, ...]:
    """The printed cells of one row."""
    number = "" if row.skipped else f"{row.ratio:.3g}"
    bound = "" if row.bound is None else f"<= {row.bound:g}"
    return (name, row.what, row.against, number, bound, row.verdict, row.skipped or row.note)


def table(lines: list[tuple[str, ...]]) -> str:
    """``lines`` under the header, as a Markdown table with aligned columns."""
    everything = [HEADER, *lines]
    widths = [max(len(line[column]) for line in everything) for column in range(len(HEADER))]
    printed = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |"
        for line in everything
    ]
    printed.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(printed)


def measure(name: str) -> tuple[list[Row], bool]:
    """The rows of one benchmark and whether it ran."""
    print(f"{name} ...", end=" ", flush=True)
    start = time.perf_counter()
    try:
        rows = importlib.import_module(f"benchmarks.bench_{name}").ratios()
    except Exception as error:
        traceback.print_exc()
        return [Row(what="(did not run)", against="", skipped=f"{type(error).__name__}: {error}")], False
    print(f"{time.perf_counter() - start:.1f} s", flush=True)
    return rows, True


def main(wanted: list[str]) -> int:
    """Run the benchmarks named in ``wanted`` (none: all) and print the table."""
    known = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        print(f"benchmark must be one of {', '.join(known)}, got {', '.join(unknown)}.", file=sys.stderr)
        return 2
    lines: list[tuple[str, ...]] = []
    good = True
    for name in wanted or known:
        rows, ran = measure(name)
        good &= ran and all(row.verdict != "over" for row in rows)
        lines += [cells(name, row) for row in rows]
    print(
        "\nratio = median time of 'what' over median time of 'against', repetitions interleaved in this run\n"
    )
    print(table(lines))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
