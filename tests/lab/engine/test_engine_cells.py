"""Keys: the same work has the same name everywhere, and any change of it has another."""

from dataclasses import dataclass, replace

import pytest

from pullback.lab import Arms, Greater, Metric, Seeds, StudyRef, Trial
from pullback.lab.engine import TrialError, cell_key
from pullback.lab.engine.cells import canonical, check_trial, claim_hash, digest
from pullback.lab.engine.code import code_hash, source_hash

PARTS = {
    "claim": "c",
    "code": "k",
    "size": "full",
    "config": {"x": 1.5},
    "arm": "a",
    "hp": {"lr": 0.1},
    "seed": 3,
}


@dataclass(frozen=True)
class Config:
    width: int = 4
    rate: float = 0.1


def trial(**changes):
    kept = {"title": "t", "run": print, "arms": Arms("a", "b"), "primary": Metric("m")}
    return Trial(**{**kept, **changes})


def test_key_is_the_same_on_every_machine():
    assert cell_key(**PARTS) == "07b124003902bfa75ee63241a8b5d17c51edfc1cddde43f85ef5aeef8889b83a"


@pytest.mark.parametrize(
    "change",
    [
        {"claim": "d"},
        {"code": "l"},
        {"size": "smoke"},
        {"config": {"x": 1.5000000000000002}},
        {"arm": "b"},
        {"hp": {"lr": 0.2}},
        {"hp": {"lr": 0.1, "k": 0}},
        {"seed": 4},
    ],
)
def test_every_part_changes_the_key(change):
    assert cell_key(**{**PARTS, **change}) != cell_key(**PARTS)


def test_order_of_hyperparameters_does_not_matter():
    one, two = {"a": 1, "b": 2}, {"b": 2, "a": 1}
    assert cell_key(**{**PARTS, "hp": one}) == cell_key(**{**PARTS, "hp": two})


@pytest.mark.parametrize(
    ("one", "two"),
    [(1, 1.0), (True, 1), ("1", 1), (0.0, -0.0), ((1,), {"a": 1}), (Config(), Config(width=5))],
)
def test_unequal_values_have_unequal_digests(one, two):
    assert digest(one) != digest(two)


def test_an_opaque_configuration_is_refused():
    with pytest.raises(TrialError, match=r"size 'full'\.fields must be made of plain values, got object"):
        canonical({"fields": object()}["fields"], "size 'full'.fields")


def test_claim_hash_holds_promises_only():
    kept = claim_hash(trial())
    assert claim_hash(trial(title="other", seeds=Seeds(test=(7, 8)), timeout=3.0)) == kept
    for change in (
        {"arms": Arms("a", "c")},
        {"primary": Metric("m", better="lower", worst=1.0)},
        {"primary": Metric("m", worst=-1.0)},
        {"claim": Greater("b", than="a", by=0.01)},
        {"also": (Greater("a", than="b"),)},
        {"name": "second"},
    ):
        assert claim_hash(trial(**change)) != kept, change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"claim": Greater("z", than="a")}, "a claim names arm 'z'"),
        ({"claim": Greater("b", than="a", by=-1.0)}, "margin of a claim must be positive, got -1.0"),
        ({"hp": {"z": {}}}, "hyperparameters for unknown arm 'z'"),
        ({"timeout": 0.0}, "timeout must be > 0 seconds, got 0.0"),
        ({"seeds": Seeds(test=(1, 1))}, "test seeds must be distinct"),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises(TrialError, match=message):
        check_trial(trial(**change), StudyRef(file="/x.py"))


def test_comments_docstrings_and_layout_leave_the_code_hash():
    assert source_hash('"""Doc."""\ndef f(x):\n    """Say."""\n    # why\n    return x\n') == source_hash(
        "def f( x ): return x"
    )
    assert source_hash("def f(x): return x") != source_hash("def f(x): return -x")
    assert source_hash('def f(): return "a"') != source_hash('def f(): return "b"')


def test_code_hash_follows_the_files_own_helpers(write, tmp_path):
    helper = tmp_path / "own_helper.py"
    helper.write_text("rate = 1\n")
    ref = StudyRef(file=str(write("from own_helper import rate\n")))
    before = code_hash(ref)
    helper.write_text("rate = 1  # the same\n")
    assert code_hash(ref) == before
    helper.write_text("rate = 2222\n")
    assert code_hash(ref) != before


def test_syntax_errors_name_the_file(write):
    path = write("def (:\n")
    with pytest.raises(TrialError, match=r"toy\.py cannot be read as Python"):
        code_hash(StudyRef(file=str(path)))


def test_replace_keeps_cells_comparable():
    assert replace(StudyRef(file="/a.py"), name="x") == StudyRef(file="/a.py", name="x")
    with pytest.raises(ValueError, match="needs a room or a file"):
        StudyRef()
