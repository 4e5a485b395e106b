"""Evidence: equal results give equal text, and damaged text is refused with the place named."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pullback.lab import load_trial, run_trial
from pullback.lab.evidence import EvidenceError, export_room, from_json, read_evidence, to_json

TOY = """
import numpy as np

def run(cfg, arm, hp, seed, log):
    for step in range(1000):
        log.value("loss", step / 7, step)
    log.array("picture", np.full((4, 4), seed, np.uint8))
    log.array("wide", np.linspace(0, 1, 5))
    return {"accuracy": 0.5 + seed / 100 * (1 if arm == "base" else 2), "odd": float("nan")}

trial = Trial(title="</script><b>", run=run, arms=Arms("base", "method"), primary=Metric("accuracy"))
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    from pullback.lab import Store
    from pullback.lab.engine.worker import execute

    class Serial:
        workers = 1

        def run(self, source, stop):
            while not stop() and (task := source()) is not None:
                yield task, execute(task.cell, used=task.used)

        def close(self):
            pass

    folder = tmp_path_factory.mktemp("evidence")
    path = folder / "toy.py"
    path.write_text("from pullback.lab import Arms, Metric, Trial\n" + TOY)
    with Store(folder / "s.sqlite") as store:
        return run_trial(load_trial(path), store=store, executor=Serial())


def test_round_trip_and_stable_text(result):
    text = to_json([result])
    (back,) = from_json(text)
    assert to_json([back]) == text
    assert back.verdict == result.verdict
    assert back.comparisons == result.comparisons
    assert back.scores("method") == result.scores("method")
    assert math.isnan(back.cells[0].metrics["odd"])
    shuffled = replace(result, cells=list(reversed(result.cells)))
    assert to_json([shuffled]).count("\n") == text.count("\n")
    assert "NaN" not in text
    assert text.endswith("}\n")


def test_curves_are_thinned_and_arrays_kept_once_for_each_arm(result):
    (back,) = from_json(to_json([result]))
    steps, values = back.curve("method", "loss")[3]
    assert len(steps) == 100
    assert (steps[0], steps[-1]) == (0, 999)
    assert values == [s / 7 for s in steps]
    assert [c.seed for c in back.cells if "picture" in c.arrays] == [0, 0]
    np.testing.assert_array_equal(back.array("method", "picture"), np.zeros((4, 4), np.uint8))
    assert back.array("method", "wide").dtype == np.float32


def test_large_arrays_are_refused(result):
    cell = replace(result.cells[0], arrays={"huge": np.zeros(300_000, np.uint8)})
    with pytest.raises(EvidenceError, match="array 'huge' has 300000 bytes"):
        to_json([replace(result, cells=[cell])])


def test_a_file_is_written_in_one_step_and_read_by_room(result, tmp_path):
    class Kept:
        path = tmp_path / "s.sqlite"

        def results(self, room):
            return [replace(result, room=room, name=n) for n in ("zeta", "main")] + [
                replace(result, room=room, size="smoke")
            ]

    path = export_room(Kept(), "toy", tmp_path / "evidence")
    assert [p.name for p in path.parent.iterdir()] == ["toy.json"]
    assert [r.name for r in read_evidence(path.parent)["toy"]] == ["main", "zeta"]
    export_room(Kept(), "toy", tmp_path / "evidence", order=["zeta", "main"])
    assert [r.name for r in read_evidence(path.parent)["toy"]] == ["zeta", "main"]
    assert read_evidence(tmp_path / "nothing") == {}


def test_studies_that_ran_elsewhere_stay_in_the_file(result, tmp_path):
    class Kept:
        path = tmp_path / "s.sqlite"

        def __init__(self, names, title):
            self.names, self.title = names, title

        def results(self, room):
            return [replace(result, room=room, name=name, title=self.title) for name in self.names]

    declared = ["main", "extra"]
    export_room(Kept(["main", "dropped"], "old"), "toy", tmp_path, order=["main", "dropped"])
    path = export_room(Kept(["extra"], "new"), "toy", tmp_path, order=declared)
    assert [(r.name, r.title) for r in read_evidence(tmp_path)["toy"]] == [("main", "old"), ("extra", "new")]
    export_room(Kept(["main"], "new"), "toy", tmp_path, order=declared)
    assert [(r.name, r.title) for r in read_evidence(tmp_path)["toy"]] == [("main", "new"), ("extra", "new")]
    path.write_text("{")
    with pytest.raises(EvidenceError, match=r"toy\.json is no valid JSON"):
        export_room(Kept(["main"], "new"), "toy", tmp_path, order=declared)
    assert path.read_text() == "{"


def test_evidence_of_another_room_is_not_taken_for_this_one(result, tmp_path):
    (tmp_path / "dann.json").write_text(to_json([replace(result, room="paced")]))
    with pytest.raises(EvidenceError, match=r"dann\.json must hold the room 'dann', got 'paced'"):
        read_evidence(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("declaration", "figures", 0), "<b>"),
        (("declaration", "figures"), 3),
        (("declaration", "figures", 0, "metric"), [1]),
        (("declaration", "seeds", "tune"), 3),
        (("declaration", "paper"), 3),
        (("declaration", "primary", "name"), [1]),
        (("declaration", "primary", "better"), "up"),
        (("declaration", "claim", "metric"), []),
        (("comparisons", 0, "high"), 10**400),
        (("comparisons", 0, "n"), 10**400),
        (("comparisons", 0, "wins"), 1e308),
        (("arms", 0, "tuning"), [{"hp": 3, "score": 1.0}]),
        (("arms", 0, "tuning"), [{"hp": {}, "score": []}]),
    ],
)
def test_what_pages_are_made_of_is_checked(result, path, value):
    with pytest.raises(EvidenceError, match="Export"):
        from_json(changed(result, "studies", 0, *path, value=value))


def test_nothing_to_export_is_told(store, tmp_path):
    with pytest.raises(EvidenceError, match="no full-size result of 'dann'"):
        export_room(store, "dann", tmp_path)


def test_rooms_are_not_mixed(result):
    with pytest.raises(EvidenceError, match="one file holds one room"):
        to_json([result, replace(result, room="dann")])


def changed(result, *path, value=None, delete=False):
    document = json.loads(to_json([result]))
    place = document
    for key in path[:-1]:
        place = place[key]
    if delete:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), 2, "has format 2, this version reads up to 1"),
        (("schema",), "1", "schema must be a positive whole number"),
        (("studies", 0, "title"), 3, r"studies\[0\]\.title must be a value of type str, got 3"),
        (
            ("studies", 0, "verdict", "word"),
            "proved",
            r"verdict\.word must be 'supported' or .*, got 'proved'",
        ),
        (("studies", 0, "cells", 2, "seed"), True, r"cells\[2\]\.seed must be a value of type int, got True"),
        (
            ("studies", 0, "cells", 2, "metrics", "accuracy"),
            None,
            r"metrics\.accuracy must be a number, got None",
        ),
        (("studies", 0, "cells", 2, "metrics"), {}, r"lacks 'accuracy' of"),
        (("studies", 0, "cells", 2, "arm"), "ghost", "names the arm 'ghost', which is not listed"),
        (("studies", 0, "cells", 2, "curves", "loss"), [[1]], "must be a list of 2"),
        (("studies", 0, "cells", 2, "curves", "loss"), [[1, 2], [0.5]], "curve 'loss' has 2 steps, 1 values"),
        (("studies", 0, "cells", 0, "arrays", "picture", "shape"), [3], "arrays.picture is no valid array"),
        (("studies", 0, "cells", 0, "arrays", "picture", "dtype"), "|O", "arrays.picture is no valid array"),
        (("studies", 0, "extra"), 1, "has an unknown field 'extra'"),
        (("studies", 0, "room"), "dann", "room must be None, got 'dann'"),
        (("studies", 0, "declaration", "primary"), {}, r"primary\.name must be present"),
    ],
)
def test_damage_is_named(result, path, value, message):
    with pytest.raises(EvidenceError, match=message):
        from_json(changed(result, *path, value=value))


def test_missing_fields_and_broken_json_are_named(result):
    with pytest.raises(EvidenceError, match=r"studies\[0\]\.verdict must be present, got nothing"):
        from_json(changed(result, "studies", 0, "verdict", delete=True))
    with pytest.raises(EvidenceError, match="is no valid JSON"):
        from_json(to_json([result])[:-10])
    with pytest.raises(EvidenceError, match="must have exactly the fields"):
        from_json("[]")
    with pytest.raises(EvidenceError, match="is no valid JSON"):
        from_json("[" * 100_000)


def places(document, path=()):
    yield path
    if isinstance(document, dict | list):
        for key, value in document.items() if isinstance(document, dict) else enumerate(document):
            yield from places(value, (*path, key))


@settings(max_examples=60, deadline=None)
@given(index=st.integers(0, 2**20), junk=st.sampled_from([None, [], {}, "x", -1, 1e300, True]))
def test_junk_anywhere_is_read_or_refused(result, index, junk):
    document = json.loads(to_json([replace(result, cells=result.cells[:2])]))
    paths = [path for path in places(document) if path]
    path = paths[index % len(paths)]
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = junk
    try:
        read = from_json(json.dumps(document))
    except EvidenceError:
        return
    to_json(read)
