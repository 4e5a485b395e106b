"""The store: one SQLite file with every measured value of every training run.

Only the driver writes, one transaction for each finished cell, so that a driver that is killed at any moment loses the
cells in flight and nothing else. Each cell carries a SHA-256 of its content that is checked when it is read.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
import time
from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pullback.lab.engine.cells import Cell, digest
from pullback.lab.engine.codec import EvidenceError, decode, encode, numeric_dtype
from pullback.lab.engine.lock import DriverLock, LockedError
from pullback.lab.engine.worker import Outcome, text_of
from pullback.lab.result import CellResult, TrialResult
from pullback.lab.tuning import trace_hash

SCHEMA_VERSION = 1
APPLICATION_ID = 0x70756C6C  # "pull"
_SCHEMA = """
CREATE TABLE cells (key TEXT PRIMARY KEY, label TEXT NOT NULL, size TEXT NOT NULL, arm TEXT NOT NULL, hp TEXT NOT NULL,
  seed INTEGER NOT NULL, status TEXT NOT NULL, seconds REAL NOT NULL, error TEXT NOT NULL, traceback TEXT NOT NULL,
  contract INTEGER NOT NULL, finished REAL NOT NULL, digest TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE metrics (key TEXT NOT NULL, name TEXT NOT NULL, value REAL, PRIMARY KEY (key, name)) WITHOUT ROWID;
CREATE TABLE curves (key TEXT NOT NULL, name TEXT NOT NULL, position INTEGER NOT NULL, step INTEGER NOT NULL,
  value REAL, PRIMARY KEY (key, name, position)) WITHOUT ROWID;
CREATE TABLE arrays (key TEXT NOT NULL, name TEXT NOT NULL, dtype TEXT NOT NULL, shape TEXT NOT NULL,
  data BLOB NOT NULL, PRIMARY KEY (key, name));
CREATE TABLE checks (version TEXT PRIMARY KEY, message TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE tunings (label TEXT NOT NULL, sha256 TEXT NOT NULL, trace TEXT NOT NULL, PRIMARY KEY (label, sha256));
CREATE TABLE results (source TEXT NOT NULL, name TEXT NOT NULL, size TEXT NOT NULL, room TEXT, head TEXT NOT NULL,
  keys TEXT NOT NULL, digest TEXT NOT NULL, finished REAL NOT NULL, PRIMARY KEY (source, name, size));
"""
_SIGNS_OF_DAMAGE = (
    "malformed",
    "not a database",
    "decode",
    "no such table",
    "no such column",
    "unsupported file",
)
_CONTENT = ("metrics", "curves", "arrays")


class StoreError(RuntimeError):
    """A store that cannot be used: the message names the file, what is wrong with it, and the fix."""


class Store:
    """Measured values on disk.

    Args:
        path: the SQLite file; it and its folder are made when missing.
        read_only: refuse to make or change anything.

    Raises:
        StoreError: if the file is damaged, of a newer version, no store at all, or cannot be opened.
    """

    def __init__(self, path: str | Path, *, read_only: bool = False) -> None:
        self.path = Path(path)
        self.read_only = read_only
        self._lock = DriverLock(self.path.with_name(self.path.name + ".lock"))
        self._db = self._open()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, _t: type[BaseException] | None, _e: BaseException | None, _b: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    def close(self) -> None:
        """Close the file and release the driver's lock."""
        self._db.close()
        self._lock.release()

    # --- opening ---------------------------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        with self._clear_errors("opened"):
            if self.read_only:
                if not self.path.is_file():
                    raise StoreError(
                        f"there is no store {self.path}. Run a study first, or give the right folder."
                    )
                address = f"{self.path.resolve().as_uri()}?mode=ro{self._immutable()}"
                database = sqlite3.connect(address, uri=True, isolation_level=None)
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                database = sqlite3.connect(self.path, timeout=30, isolation_level=None)
            try:
                self._prepare(database)
            except BaseException:
                database.close()
                raise
        return database

    def _immutable(self) -> str:
        """Read a store in a folder that nobody may write into without SQLite's helper files, when it needs none."""
        log = self.path.with_name(f"{self.path.name}-wal")
        settled = not log.is_file() or log.stat().st_size == 0
        return "&immutable=1" if settled and not os.access(self.path.parent, os.W_OK) else ""

    def _prepare(self, database: sqlite3.Connection) -> None:
        version = database.execute("PRAGMA user_version").fetchone()[0]
        tables = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{self.path} has format {version}, this version reads up to {SCHEMA_VERSION}. "
                "Update pullback, or choose another folder."
            )
        if tables and database.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise StoreError(f"{self.path} is a database of another program. Choose another folder.")
        found = database.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise self._damaged(found)
        if self.read_only:
            return
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        if not tables:
            mark = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};"
            database.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} {mark} COMMIT;")

    def _damaged(self, what: object) -> StoreError:
        return StoreError(
            f"{self.path} is damaged ({' '.join(str(what).split())}). Nothing was deleted: move it away to start "
            "afresh, or restore a copy."
        )

    @contextlib.contextmanager
    def _clear_errors(self, verb: str) -> Generator[None]:
        try:
            yield
        except LockedError as error:
            raise StoreError(str(error)) from error
        except UnicodeError as error:
            raise self._damaged(error) from error
        except sqlite3.DatabaseError as error:
            text = str(error)
            if any(sign in text for sign in _SIGNS_OF_DAMAGE):
                raise self._damaged(text) from error
            raise StoreError(
                f"{self.path} cannot be {verb}: {text}. Check free space and permissions."
            ) from error
        except OverflowError as error:
            raise StoreError(
                f"{self.path} cannot hold a whole number: {error}. Use values below 2**63."
            ) from error
        except OSError as error:
            reason = error.strerror or error
            raise StoreError(
                f"{self.path} cannot be {verb}: {reason}. Check free space and permissions."
            ) from error

    @contextlib.contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        with self._clear_errors("written"):
            self._lock.acquire()
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # the first error is the one to report
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def acquire(self) -> None:
        """Become the only driver of this store.

        Raises:
            StoreError: if another living process drives it.
        """
        with self._clear_errors("locked"):
            self._lock.acquire()

    def release(self) -> None:
        """Let another driver take over."""
        self._lock.release()

    # --- cells -----------------------------------------------------------------------------------------------------

    def add(self, cell: Cell, outcome: Outcome) -> CellResult:
        """Keep the outcome of a cell, all of it or nothing, and replace an older one.

        Raises:
            StoreError: if it cannot be written.
        """
        result = CellResult(
            cell.arm, cell.seed, dict(cell.hp), outcome.status, outcome.metrics, outcome.seconds, cell.key,
            outcome.error, outcome.curves, outcome.arrays,
        )  # fmt: skip
        points = [
            (cell.key, name, index, step, value)
            for name, (steps, values) in outcome.curves.items()
            for index, (step, value) in enumerate(zip(steps, values, strict=True))
        ]
        arrays = [
            (cell.key, name, a.dtype.str, json.dumps(list(a.shape)), np.ascontiguousarray(a).tobytes())
            for name, a in outcome.arrays.items()
        ]
        row = (
            cell.key, text_of(cell.ref.label), cell.size, cell.arm, json.dumps(dict(cell.hp), sort_keys=True),
            cell.seed, outcome.status, outcome.seconds, outcome.error, outcome.traceback_text,
            int(outcome.contract), time.time(), content_digest(result),
        )  # fmt: skip
        with self._transaction() as db:
            for table in _CONTENT:
                db.execute(f"DELETE FROM {table} WHERE key = ?", (cell.key,))
            db.execute(f"INSERT OR REPLACE INTO cells VALUES ({', '.join('?' * len(row))})", row)
            db.executemany(
                "INSERT INTO metrics VALUES (?, ?, ?)", [(cell.key, *m) for m in outcome.metrics.items()]
            )
            db.executemany("INSERT INTO curves VALUES (?, ?, ?, ?, ?)", points)
            db.executemany("INSERT INTO arrays VALUES (?, ?, ?, ?, ?)", arrays)
        return result

    def get(self, key: str) -> CellResult | None:
        """The cell of this key, or None.

        Raises:
            StoreError: if its content does not match its hash.
        """
        with self._clear_errors("read"):
            row = self._db.execute(
                "SELECT arm, seed, hp, status, seconds, error, digest FROM cells WHERE key = ?", (key,)
            ).fetchone()
            if row is None:
                return None
            metrics = self._db.execute(
                "SELECT name, value FROM metrics WHERE key = ? ORDER BY name", (key,)
            ).fetchall()
            curves, arrays = self._curves(key), self._arrays(key)
        arm, seed, text, status, seconds, error, kept = row
        try:
            hp = json.loads(text)
        except ValueError as fault:
            raise self._damaged(f"hyperparameters of cell {key[:12]}: {fault}") from fault
        scores = {name: _number(value) for name, value in metrics}
        result = CellResult(arm, seed, hp, status, scores, seconds, key, error, curves, arrays)
        if content_digest(result) != kept:
            raise self._damaged(f"cell {key[:12]} of arm {arm!r}, seed {seed} does not match its SHA-256")
        return result

    def _curves(self, key: str) -> dict[str, tuple[list[int], list[float]]]:
        curves: dict[str, tuple[list[int], list[float]]] = {}
        query = "SELECT name, step, value FROM curves WHERE key = ? ORDER BY name, position"
        for name, step, value in self._db.execute(query, (key,)):
            steps, values = curves.setdefault(name, ([], []))
            steps.append(step)
            values.append(_number(value))
        return curves

    def _arrays(self, key: str) -> dict[str, np.ndarray]:
        rows = self._db.execute(
            "SELECT name, dtype, shape, data FROM arrays WHERE key = ? ORDER BY name", (key,)
        )
        try:
            return {
                n: np.frombuffer(data, numeric_dtype(d)).reshape(json.loads(s)).copy()
                for n, d, s, data in rows
            }
        except (ValueError, TypeError) as error:
            raise self._damaged(f"an array of cell {key[:12]}: {error}") from error

    def trouble(self, key: str) -> tuple[bool, str]:
        """Whether ``run`` broke its contract in this cell, and the traceback that was kept."""
        row = self._row("SELECT contract, traceback FROM cells WHERE key = ?", key)
        return (False, "") if row is None else (bool(row[0]), row[1])

    def seconds_by_arm(self, label: str, size: str) -> dict[str, float]:
        """Mean duration of the finished cells of a trial, by arm."""
        query = "SELECT arm, avg(seconds) FROM cells WHERE label = ? AND size = ? AND status = 'done' GROUP BY arm"
        with self._clear_errors("read"):
            return dict(self._db.execute(query, (text_of(label), size)).fetchall())

    def _row(self, query: str, *values: str) -> tuple[Any, ...] | None:
        with self._clear_errors("read"):
            return self._db.execute(query, values).fetchone()

    # --- checks, tuning, results -----------------------------------------------------------------------------------

    def check(self, version: str) -> str | None:
        """Outcome of the leak check of a trial's version: None if it was not made, "" if it passed, else the fault."""
        row = self._row("SELECT message FROM checks WHERE version = ?", version)
        return None if row is None else row[0]

    def save_check(self, version: str, message: str) -> None:
        """Keep the outcome of a leak check."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO checks VALUES (?, ?)", (version, message))

    def tuning(self, label: str, sha256: str) -> dict[str, Any] | None:
        """The trace of the tuning with this hash, if this store has it.

        Raises:
            StoreError: if it is damaged.
        """
        row = self._row("SELECT trace FROM tunings WHERE label = ? AND sha256 = ?", text_of(label), sha256)
        if row is None:
            return None
        try:
            kept: dict[str, Any] = json.loads(row[0])
            if trace_hash(kept["traces"]) != sha256:
                raise ValueError("it does not match its SHA-256")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._damaged(f"the tuning of {label}: {error}") from error
        return kept

    def save_tuning(self, label: str, sha256: str, trace: Mapping[str, Any]) -> None:
        """Keep every point of a tuning."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO tunings VALUES (?, ?, ?)",
                (text_of(label), sha256, json.dumps(encode(trace))),
            )

    def save_result(self, result: TrialResult) -> None:
        """Keep the outcome of a trial at one size; the cells stay where they are and are named by key."""
        head = encode(result) | {"cells": []}
        text, keys = json.dumps(head, sort_keys=True), json.dumps([c.key for c in result.cells])
        row = (
            _source(result),
            result.name,
            result.size,
            result.room,
            text,
            keys,
            digest([text, keys]),
            time.time(),
        )
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    def result(self, like: TrialResult) -> TrialResult | None:
        """The kept outcome of the same trial and size, if there is one."""
        query = "SELECT name, head, keys, digest FROM results WHERE source = ? AND name = ? AND size = ?"
        row = self._row(query, _source(like), like.name, like.size)
        return None if row is None else self._result(*row)

    def results(self, room: str | None = None) -> list[TrialResult]:
        """The latest outcome of every trial and size, of all sources or of one room, oldest first.

        Raises:
            StoreError: if one of them is damaged.
        """
        query = "SELECT name, head, keys, digest, rowid FROM results WHERE ? IS NULL OR room = ? ORDER BY finished"
        with self._clear_errors("read"):
            rows = self._db.execute(query, (room, room)).fetchall()
        return [self._result(*row[:4]) for row in rows]

    def _result(self, name: str, head: str, keys: str, kept: str) -> TrialResult:
        if not (isinstance(head, str) and isinstance(keys, str)) or digest([head, keys]) != kept:
            raise self._damaged(f"the result {name!r} does not match its SHA-256")
        listed = json.loads(keys)
        cells = [cell for key in listed if (cell := self.get(key)) is not None]
        try:
            result: TrialResult = decode(TrialResult, json.loads(head), name)
        except EvidenceError as error:
            raise self._damaged(error) from error
        if len(cells) != len(listed):
            raise self._damaged(f"a cell of the result {name!r} is missing")
        return replace(result, cells=cells)


def _source(result: TrialResult) -> str:
    return result.room or text_of(result.declaration.get("file", ""))


def content_digest(result: CellResult) -> str:
    """SHA-256 of what a cell measured."""
    arrays = {
        n: [a.dtype.str, list(a.shape), np.ascontiguousarray(a).tobytes().hex()]
        for n, a in result.arrays.items()
    }
    content = [result.arm, result.seed, dict(result.hp), result.status, result.error, result.seconds]
    return digest([*content, dict(result.metrics), dict(result.curves), arrays])


def _number(value: float | None) -> float:
    return math.nan if value is None else value
