"""The engine's overhead: wall time of 16 equal cells against the ideal, and of a rerun that finds all of them.

Run: python benchmarks/bench_engine.py [--seconds 5] [--cells 16] [--workers 2]
"""

import argparse
import tempfile
import time
from pathlib import Path

from pullback.lab import LocalExecutor, Store, load_trial, run_trial

TRIAL = """
import time
from pullback.lab import Arms, Metric, Seeds, Trial

def run(cfg, arm, hp, seed, log):
    time.sleep(cfg)
    return {{"score": float(seed)}}

trial = Trial(title="sleep", run=run, arms=Arms("a", "b"), primary=Metric("score"),
              sizes={{"full": {seconds}}}, seeds=Seeds(test=range({seeds})))
"""


def timed(folder: Path, workers: int) -> float:
    """Wall seconds of one whole call: executor and workers, store and verdict."""
    start = time.perf_counter()
    with Store(folder / "store.sqlite") as store, LocalExecutor(workers) as executor:
        # The leak check would add a cell, which is not the overhead in question.
        run_trial(load_trial(folder / "trial.py"), store=store, executor=executor, check_leaks=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--cells", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = TRIAL.format(seconds=options.seconds, seeds=options.cells // 2)
        (folder / "trial.py").write_text(source, encoding="utf-8")
        wall = timed(folder, options.workers)
        again = timed(folder, options.workers)
    ideal = options.seconds * -(-options.cells // options.workers)
    print(f"{options.cells} cells of {options.seconds:g} s on {options.workers} workers")
    print(f"  wall {wall:.2f} s, ideal {ideal:.2f} s, ratio {wall / ideal:.3f} (at most 1.08)")
    print(f"  rerun of the finished trial {again:.2f} s (at most 3)")


if __name__ == "__main__":
    main()
