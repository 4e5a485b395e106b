"""The store: what goes in comes out bit for bit, or the damage is named and nothing is deleted."""

import json
import math
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pullback.lab import Store, StudyRef
from pullback.lab.engine.cells import Cell
from pullback.lab.engine.worker import Outcome
from pullback.lab.store import SCHEMA_VERSION, StoreError
from pullback.lab.tuning import trace_hash

REF = StudyRef(file="/toy.py")


def cell(key="k", seed=0, arm="a"):
    return Cell(REF, "full", arm, {"lr": 0.1, "name": "x"}, seed, key, 5.0, "code")


def outcome(**changes):
    kept = {
        "metrics": {"m": 0.1 + 0.2, "other": math.nan, "big": math.inf},
        "seconds": 1.25,
        "curves": {"loss": ([0, 5, 5], [1.0, math.nan, -3.5])},
        "arrays": {"p": np.arange(6, dtype=np.uint8).reshape(2, 3), "empty": np.zeros((0, 2))},
    }
    return Outcome("done", **{**kept, **changes})


def test_round_trip_is_exact(store):
    store.add(cell(), outcome())
    kept = store.get("k")
    assert (kept.arm, kept.seed, kept.status, kept.seconds) == ("a", 0, "done", 1.25)
    assert kept.hp == {"lr": 0.1, "name": "x"}
    assert kept.metrics["m"] == 0.1 + 0.2
    assert math.isnan(kept.metrics["other"])
    assert kept.metrics["big"] == math.inf
    assert kept.curves["loss"][0] == [0, 5, 5]
    np.testing.assert_equal(kept.curves["loss"][1], [1.0, math.nan, -3.5])
    assert kept.arrays["p"].dtype == np.uint8
    np.testing.assert_array_equal(kept.arrays["p"], [[0, 1, 2], [3, 4, 5]])
    assert kept.arrays["empty"].shape == (0, 2)
    assert store.get("unknown") is None


@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=64), min_size=1, max_size=5))
def test_any_number_survives(tmp_path_factory, values):
    values = [v + 0.0 for v in values]  # as the worker does: SQLite has no -0.0
    with Store(tmp_path_factory.mktemp("s") / "s.sqlite") as store:
        store.add(cell(), outcome(metrics={str(i): v for i, v in enumerate(values)}))
        np.testing.assert_array_equal([store.get("k").metrics[str(i)] for i in range(len(values))], values)


def test_a_second_outcome_replaces_all_of_the_first(store):
    store.add(cell(), outcome())
    store.add(cell(), Outcome("failed", error="why", traceback_text="tb", contract=True))
    kept = store.get("k")
    assert (kept.status, kept.error, kept.metrics, kept.curves, kept.arrays) == ("failed", "why", {}, {}, {})
    assert store.trouble("k") == (True, "tb")


def test_an_interrupted_write_leaves_nothing(store):
    with pytest.raises(StoreError):
        store.add(cell(), outcome(metrics={"m": 10**40}))
    assert store.get("k") is None
    store.add(cell(), outcome())
    assert store.get("k").status == "done"


def test_newer_format_is_refused(tmp_path):
    path = tmp_path / "s.sqlite"
    Store(path).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()
    with pytest.raises(
        StoreError, match=r"s\.sqlite has format 2, this version reads up to 1\. Update pullback"
    ):
        Store(path)


def test_foreign_files_are_refused_and_kept(tmp_path):
    text = tmp_path / "text.sqlite"
    text.write_bytes(b"these are notes, not a database. " * 200)
    with pytest.raises(StoreError, match=r"text\.sqlite is damaged .*Nothing was deleted"):
        Store(text)
    assert text.read_bytes().startswith(b"these are notes")
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    with pytest.raises(StoreError, match="database of another program"):
        Store(other)


def test_missing_store_is_not_made_for_reading(tmp_path):
    with pytest.raises(StoreError, match="there is no store"):
        Store(tmp_path / "none.sqlite", read_only=True)
    assert not list(tmp_path.iterdir())


def test_reading_needs_no_lock_and_refuses_to_write(tmp_path):
    with Store(tmp_path / "s.sqlite") as writer:
        writer.add(cell(), outcome())
        with Store(tmp_path / "s.sqlite", read_only=True) as reader:
            assert reader.get("k").seconds == 1.25
            with pytest.raises(StoreError, match="is in use by process"):
                reader.add(cell("other"), outcome())


def test_a_store_in_a_read_only_folder_can_be_read(tmp_path, monkeypatch):
    folder = tmp_path / "archive"
    with Store(folder / "s.sqlite") as writer:
        writer.add(cell(), outcome())
    assert not (folder / "s.sqlite-wal").exists()
    monkeypatch.setattr("os.access", lambda _path, _mode: False)  # the superuser may write into any folder
    with Store(folder / "s.sqlite", read_only=True) as reader:
        assert reader.get("k").seconds == 1.25
        assert not (folder / "s.sqlite-shm").exists()  # which could not be made there


def damaged_copy(path, data):
    path.write_bytes(bytes(data))
    try:
        with Store(path) as store:
            return {key: store.get(key) for key in ("k0", "k1", "k2")}
    except StoreError as error:
        return str(error)


def test_no_flipped_bit_changes_a_number_silently(tmp_path):
    path = tmp_path / "s.sqlite"
    with Store(path) as store:
        for i in range(3):
            store.add(cell(f"k{i}", i), outcome(metrics={"m": float(i) + 0.123}))
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    caught = 0
    for position in rng.integers(100, len(good), 150):
        data = bytearray(good)
        data[position] ^= 1 << int(rng.integers(8))
        kept = damaged_copy(tmp_path / f"f{position}.sqlite", data)
        if isinstance(kept, str):
            caught += 1
            assert f"f{position}.sqlite" in kept
            assert any(word in kept for word in ("damaged", "another program", "has format")), kept
            continue
        for i in range(3):
            if kept[f"k{i}"] is not None:
                assert kept[f"k{i}"].metrics == {"m": float(i) + 0.123}
    assert caught > 5


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncation_is_named(tmp_path, share):
    path = tmp_path / "s.sqlite"
    with Store(path) as store:
        for i in range(3):
            store.add(cell(f"k{i}", i), outcome())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(StoreError, match=r"s\.sqlite is damaged"), Store(path) as store:
        store.get("k0")
    assert path.exists()


def test_a_damaged_page_is_named_when_the_store_is_opened(tmp_path):
    path = tmp_path / "s.sqlite"
    with Store(path) as store:
        store.add(cell(), outcome())
    data = bytearray(path.read_bytes())
    data[4096 * 2 + 20 : 4096 * 2 + 120] = b"\xff" * 100
    data[4096 * 2 : 4096 * 2 + 8] = b"\x0a\xff\xff\xff\xff\xff\xff\xff"
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"s\.sqlite is damaged"):
        Store(path)


def test_a_changed_value_does_not_match_its_hash(tmp_path):
    path = tmp_path / "s.sqlite"
    with Store(path) as store:
        store.add(cell(), outcome())
    with sqlite3.connect(path) as db:
        db.execute("UPDATE metrics SET value = 0.99 WHERE name = 'm'")
    db.close()
    with Store(path) as store, pytest.raises(StoreError, match="arm 'a', seed 0 does not match its SHA-256"):
        store.get("k")


HOLD = """
import sys, time
from pullback.lab.store import Store
store = Store(sys.argv[1]); store.acquire(); print("held", flush=True); time.sleep(60)
"""


def test_a_second_driver_is_refused_until_the_first_is_gone(tmp_path):
    path = tmp_path / "s.sqlite"
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    with first:
        assert first.stdout.readline() == "held\n"
        with Store(path) as store:
            with pytest.raises(StoreError, match=rf"s\.sqlite is in use by process {first.pid} since"):
                store.acquire()
            first.kill()
            first.wait()
            store.acquire()
            assert json.loads(path.with_name("s.sqlite.lock").read_text())["pid"] != first.pid


def test_an_unusable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot be opened: .*Check free space and permissions"):
        Store(tmp_path / "file" / "s.sqlite")


FULL = """
import resource, signal, sys
import numpy as np
from pullback.lab.engine.cells import Cell
from pullback.lab.engine.reference import StudyRef
from pullback.lab.engine.worker import Outcome
from pullback.lab.store import Store, StoreError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cell = lambda key: Cell(StudyRef(file="/t.py"), "full", "a", {}, 0, key, 5.0, "code")
store = Store(sys.argv[1])
store.add(cell("first"), Outcome("done", metrics={"m": 1.0}))
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    store.add(cell("large"), Outcome("done", arrays={"x": np.zeros(900_000, np.uint8)}))
except StoreError as error:
    print(error)
"""


def test_a_full_disk_loses_nothing(tmp_path):
    path = tmp_path / "s.sqlite"
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True)
    assert "s.sqlite cannot be written" in done.stdout
    assert "Check free space" in done.stdout
    with Store(path) as store:
        assert store.get("first").metrics == {"m": 1.0}
        assert store.get("large") is None


def test_no_flipped_bit_escapes_any_reader(tmp_path):
    traces = {"a": [{"hp": {"lr": 0.1, "name": "x"}, "score": math.inf, "seconds": 1.0}] * 3}
    sha256 = trace_hash(traces)
    path = tmp_path / "s.sqlite"
    with Store(path) as store:
        store.add(cell(), Outcome("failed", error="why", traceback_text="tb"))
        store.save_check("v", "it leaks")
        store.save_tuning("toy/main", sha256, {"traces": traces, "at_edge": {}})
        kept = store.tuning("toy/main", sha256)
    assert float(kept["traces"]["a"][0]["score"]) == math.inf
    good = path.read_bytes()
    rng = np.random.default_rng(1)
    refused = []
    for number, position in enumerate(rng.integers(16, len(good), 300)):
        data = bytearray(good)
        data[position] ^= 1 << int(rng.integers(8))
        copy = tmp_path / f"f{number}.sqlite"
        copy.write_bytes(data)
        try:
            with Store(copy, read_only=True) as store:
                store.check("v")
                store.trouble("k")
                store.seconds_by_arm("toy.py:main", "full")
                store.results()
                found = store.tuning("toy/main", sha256)
            # The hash covers points and scores, not durations.
            assert found is None or trace_hash(found["traces"]) == sha256
        except StoreError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert all("Nothing was deleted" in text or "another" in text or "Update" in text for text in refused)
