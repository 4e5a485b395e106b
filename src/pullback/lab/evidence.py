"""Evidence: the outcome of a room's studies as one JSON file that is committed, read again and drawn from."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pullback.lab.declare import Metric, PaperResult
from pullback.lab.engine.codec import EvidenceError, decode, encode
from pullback.lab.result import CellResult, TrialResult

if TYPE_CHECKING:
    from pullback.lab.store import Store

__all__ = ["SCHEMA", "EvidenceError", "export_room", "from_json", "read_evidence", "to_json"]

SCHEMA = 1
MAX_POINTS = 100
MAX_ARRAY_BYTES = 256_000
MAX_FILE_BYTES = 64_000_000

_T = TypeVar("_T", int, float)

_DECLARED: Mapping[str, Any] = {
    "primary": Metric,
    "metrics": dict[str, Metric],
    "paper": PaperResult | None,
    "claim": dict[str, Any] | None,
    "also": list[dict[str, Any]] | None,
    "seeds": dict[str, list[int]] | None,
    "tuning": dict[str, Any] | None,
    "figures": list[dict[str, Any]] | None,
}


def to_json(results: Sequence[TrialResult]) -> str:
    """One room's (or one user file's) results as JSON with sorted keys, equal for equal results.

    Curves are thinned to 100 points; an array is kept for the first seed of each arm that has it.

    Raises:
        EvidenceError: if an array is larger than 256 kB or the results are of several rooms.
    """
    rooms = {r.room for r in results}
    if len(rooms) > 1:
        raise EvidenceError(
            f"one file holds one room, got {sorted(map(str, rooms))}. Export each room by itself."
        )
    studies = [encode(_thin(r)) for r in results]
    document = {"schema": SCHEMA, "room": next(iter(rooms), None), "studies": studies}
    return json.dumps(document, sort_keys=True, indent=1, allow_nan=False) + "\n"


def from_json(text: str, where: str = "evidence") -> list[TrialResult]:
    """Read what `to_json` wrote, checking every field's presence and type.

    Args:
        text: the JSON document.
        where: its name, for messages.

    Raises:
        EvidenceError: naming the place, what was found and what was expected.
    """
    if len(text) > MAX_FILE_BYTES:
        raise EvidenceError(
            f"{where} has {len(text)} characters, at most {MAX_FILE_BYTES} are read. Export it again."
        )
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EvidenceError(f"{where} is no valid JSON: {error}. Export it again.") from error
    if not isinstance(document, dict) or set(document) != {"schema", "room", "studies"}:
        raise EvidenceError(f"{where} must have exactly the fields schema, room, studies. Export it again.")
    schema = document["schema"]
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise EvidenceError(
            f"{where}.schema must be a positive whole number, got {schema!r}. Export it again."
        )
    if schema > SCHEMA:
        raise EvidenceError(
            f"{where} has format {schema}, this version reads up to {SCHEMA}. Update pullback."
        )
    results: list[TrialResult] = decode(list[TrialResult], document["studies"], f"{where}.studies")
    for index, result in enumerate(results):
        _check(result, document["room"], f"{where}.studies[{index}]")
    return results


def _check(result: TrialResult, room: Any, where: str) -> None:
    """What types cannot say: names that must refer to each other."""
    if result.room != room:
        raise EvidenceError(f"{where}.room must be {room!r}, got {result.room!r}. Export the room again.")
    _check_declaration(result.declaration, f"{where}.declaration")
    primary = result.declaration["primary"]
    for c in result.comparisons:
        if c.wins < 0 or c.wins > 1:
            raise EvidenceError(
                f"{where}.comparisons must have wins from 0 to 1, got {c.wins}. Export it again."
            )
    for arm in result.arms:
        for index, point in enumerate(arm.tuning):
            decode(dict[str, Any], point.get("hp"), f"{where}.arms.{arm.name}.tuning[{index}].hp")
            decode(float, point.get("score"), f"{where}.arms.{arm.name}.tuning[{index}].score")
    arms = {arm.name for arm in result.arms}
    for cell in result.cells:
        if cell.arm not in arms:
            raise EvidenceError(
                f"{where}.cells names the arm {cell.arm!r}, which is not listed. Export it again."
            )
        if cell.status == "done" and primary["name"] not in cell.metrics:
            raise EvidenceError(f"{where}.cells lacks {primary['name']!r} of {cell.arm!r}, seed {cell.seed}.")
        for name, (steps, values) in cell.curves.items():
            if len(steps) != len(values):
                raise EvidenceError(
                    f"{where}.cells: curve {name!r} has {len(steps)} steps, {len(values)} values."
                )


def _check_declaration(told: Mapping[str, Any], where: str) -> None:
    """The parts of a declaration that pages are made of; a result keeps it as plain values."""
    for name, expected in _DECLARED.items():
        decode(expected, told.get(name), f"{where}.{name}")
    primary, metrics = told["primary"], told["metrics"]
    if primary["name"] not in metrics:
        raise EvidenceError(f"{where} must describe its primary metric. Export it again.")
    claims = [claim for claim in (told.get("claim"), *(told.get("also") or ())) if claim is not None]
    for claim in claims:
        for name in ("arm", "than", "metric"):
            decode(str, claim.get(name), f"{where}.claim.{name}")
    for index, figure in enumerate(told.get("figures") or ()):
        decode(list[str] | None, figure.get("arms"), f"{where}.figures[{index}].arms")
        decode(str | None, figure.get("metric"), f"{where}.figures[{index}].metric")


# --- thinning ------------------------------------------------------------------------------------------------------


def _thin(result: TrialResult) -> TrialResult:
    shown: set[tuple[str, str]] = set()
    cells = []
    for cell in result.cells:
        arrays = {n: _small(a, n) for n, a in cell.arrays.items() if (cell.arm, n) not in shown}
        shown |= {(cell.arm, name) for name in arrays}
        curves = {name: (_every(s), _every(v)) for name, (s, v) in cell.curves.items()}
        cells.append(dataclasses.replace(cell, curves=curves, arrays=arrays))
    return dataclasses.replace(result, cells=_ordered(cells, result))


def _ordered(cells: list[CellResult], result: TrialResult) -> list[CellResult]:
    order = {arm.name: index for index, arm in enumerate(result.arms)}
    return sorted(cells, key=lambda c: (order.get(c.arm, len(order)), c.seed))


def _every(values: Sequence[_T]) -> list[_T]:
    """At most 100 values, evenly spread, with the first and the last."""
    if len(values) <= MAX_POINTS:
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, MAX_POINTS).round().astype(int)]


def _small(array: np.ndarray, name: str) -> np.ndarray:
    kept = array.astype(np.float32) if array.dtype == np.float64 else array
    if kept.nbytes > MAX_ARRAY_BYTES:
        fix = "Log fewer values or uint8."
        raise EvidenceError(
            f"array {name!r} has {kept.nbytes} bytes, evidence takes {MAX_ARRAY_BYTES}. {fix}"
        )
    return kept


# --- files ---------------------------------------------------------------------------------------------------------


def export_room(
    store: Store, room: str, folder: str | Path = "evidence", *, order: Sequence[str] = ()
) -> Path:
    """Write ``<folder>/<room>.json`` with the room's latest results at full size, in one step.

    Studies that the file holds already and the store does not, because they ran elsewhere, stay in it.

    Args:
        store: where the results are.
        room: the room's name.
        folder: where the file goes.
        order: names of the room's studies as they are declared; readers take the first result for the main one.
            Studies of an older file that are not among them are dropped; when empty, none is.

    Raises:
        EvidenceError: if the store has no full-size result of the room, or the file there cannot be read.
    """
    results = [r for r in store.results(room) if r.size == "full"]
    if not results:
        raise EvidenceError(
            f"{store.path} has no full-size result of {room!r}. Run `pullback study {room}` first."
        )
    path = Path(folder) / f"{room}.json"
    new = {r.name for r in results}
    older = [r for r in _read(path) if r.name not in new] if path.is_file() else []
    results += [r for r in older if not order or r.name in order]
    place = {name: index for index, name in enumerate(order)}
    ordered = sorted(results, key=lambda r: (place.get(r.name, len(place)), r.name != "main", r.name))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(to_json(ordered))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_evidence(folder: str | Path) -> dict[str, list[TrialResult]]:
    """Every ``<room>.json`` of a folder, by room.

    Raises:
        EvidenceError: if a file cannot be read, naming it.
    """
    return {path.stem: _read(path) for path in sorted(Path(folder).glob("*.json"))}


def _read(path: Path) -> list[TrialResult]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvidenceError(f"{path} cannot be read: {error}. Export it again.") from error
    results = from_json(text, str(path))
    for result in results:
        if result.room != path.stem:
            raise EvidenceError(
                f"{path} must hold the room {path.stem!r}, got {result.room!r}. Give the file its room's name."
            )
    return results
