"""What ``import pullback`` adds to ``import torch``: time in fresh processes, at most 50 ms."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.harness import Row

BOUND = 0.050
_CODE = "import torch, time; t = time.perf_counter(); import pullback; print(time.perf_counter() - t)"


def added_seconds(repeats: int = 5) -> float:
    """Smallest time of ``import pullback`` after ``import torch`` over fresh processes."""
    command = [sys.executable, "-c", _CODE]
    return min(float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(repeats))


def ratios() -> list[Row]:
    """One row: the time that is added, as a ratio to the 50 ms it may cost."""
    seconds = added_seconds()
    note = f"{1e3 * seconds:.2f} ms"
    return [Row(what="import pullback", against="50 ms", ratio=seconds / BOUND, bound=1.0, note=note)]
