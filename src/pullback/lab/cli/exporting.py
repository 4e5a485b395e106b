"""Export from the store: evidence as JSON, or one row per measured value as Parquet."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pullback.lab.cli import places
from pullback.lab.cli.running import UsageError
from pullback.lab.cli.terminal import say
from pullback.lab.engine.reference import nearest
from pullback.lab.evidence import export_room
from pullback.lab.result import TrialResult
from pullback.lab.store import Store


def export(rooms: Sequence[str], *, form: str, to: Path, out: Path) -> int:
    """Write one file per room.

    Raises:
        UsageError: if there is no store, a room is not in it, or an extra is missing.
    """
    if not places.store_path(out).is_file():
        raise UsageError(
            f"there is no store in {str(out)!r}. Run `pullback study ROOM` first, or name --out."
        )
    if form == "parquet" and find_spec("pyarrow") is None:
        raise UsageError('--format parquet needs pyarrow. Install it with: pip install "pullback[parquet]"')
    results = places.stored(out)
    known = [room for room in results if room is not None]
    for room in rooms:
        if room not in known:
            raise UsageError(f"the store holds no result of {room!r}. {nearest(room, known)}")
    if form == "parquet":
        say(_parquet([r for room, of in results.items() if not rooms or room in rooms for r in of], to))
        return 0
    if not known:
        raise UsageError(
            "the store holds trials of your own only; evidence is for rooms. Use --format parquet."
        )
    with Store(places.store_path(out), read_only=True) as store:
        for room in rooms or known:
            say(export_room(store, room, to, order=places.declared_names(room)))
    return 0


def _parquet(results: Sequence[TrialResult], to: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ("room", "trial", "size", "arm", "seed", "status", "key", "metric", "step", "value")
    rows = [row for result in results for row in _rows(result)]
    columns = {name: [row[index] for row in rows] for index, name in enumerate(names)}
    types = {"seed": pa.int64(), "step": pa.int64(), "value": pa.float64()}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in names])
    to.mkdir(parents=True, exist_ok=True)
    path = to / "measurements.parquet"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(pa.table(columns, schema=schema), temporary)
        os.replace(temporary, path)  # an older file stays whole until the new one is
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _rows(result: TrialResult) -> Iterator[tuple[Any, ...]]:
    """One row per final metric (step is null) and per point of a curve."""
    for cell in result.cells:
        head = (result.room, result.name, result.size, cell.arm, cell.seed, cell.status, cell.key)
        for name, value in cell.metrics.items():
            yield (*head, name, None, value)
        for name, (steps, values) in cell.curves.items():
            for step, value in zip(steps, values, strict=True):
                yield (*head, name, step, value)
