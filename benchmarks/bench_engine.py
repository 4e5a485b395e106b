"""The engine's overhead: wall time of 16 equal cells against the ideal, and of a rerun that finds all of them."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.harness import Row

from pullback.lab import LocalExecutor, Store, load_trial, run_trial

SECONDS, CELLS, WORKERS = 5.0, 16, 2
RERUN = 3.0  # seconds that a rerun of a finished trial may take

TRIAL = f"""
import time
from pullback.lab import Arms, Metric, Seeds, Trial

def run(cfg, arm, hp, seed, log):
    time.sleep(cfg)
    return {{"score": float(seed)}}

trial = Trial(title="sleep", run=run, arms=Arms("a", "b"), primary=Metric("score"),
              sizes={{"full": {SECONDS}}}, seeds=Seeds(test=range({CELLS // 2})))
"""


def wall_seconds(folder: Path) -> float:
    """Wall time of one whole call: workers started and ended, store written, verdict made."""
    start = time.perf_counter()
    with Store(folder / "store.sqlite") as store, LocalExecutor(WORKERS) as executor:
        # The leak check would add a cell, which is not the overhead in question.
        run_trial(load_trial(folder / "trial.py"), store=store, executor=executor, check_leaks=False)
    return time.perf_counter() - start


def ratios() -> list[Row]:
    """Two rows: a first run against the ideal, a rerun against what it may take."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "trial.py").write_text(TRIAL, encoding="utf-8")
        wall, again = wall_seconds(Path(name)), wall_seconds(Path(name))
    ideal = SECONDS * -(-CELLS // WORKERS)
    what = f"{CELLS} cells of {SECONDS:g} s, {WORKERS} workers"
    return [
        Row(what, "ideal", ratio=wall / ideal, bound=1.08, note=f"{wall:.2f} s of {ideal:.0f} s"),
        Row(
            "rerun of it", f"{RERUN:g} s", ratio=again / RERUN, bound=1.0, note=f"{again:.2f} s, no cell run"
        ),
    ]
