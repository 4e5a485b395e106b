"""Runs and declarations at their worst: every fault stays with its run, is named, and ends nothing else."""

import math

import pytest

from pullback.lab import (
    Arms,
    Equivalent,
    Greater,
    Metric,
    PairedSeeds,
    Seeds,
    StudyRef,
    Trial,
    load_trial,
    run_trial,
)
from pullback.lab.engine import TrialError
from pullback.lab.engine.cells import Cell, check_trial
from pullback.lab.engine.code import _files_of, _parsed, code_hash
from pullback.lab.engine.executors import _end_of
from pullback.lab.engine.worker import CellLog, execute

RUN = """
class Mute(Exception):
    def __str__(self):
        raise ValueError("no text")

def run(cfg, arm, hp, seed, log):
    {}

trial = Trial(title="toy", run=run, arms=Arms("base", "method"), primary=Metric("accuracy"))
"""


@pytest.fixture
def outcome(write):
    """Execute one cell whose run has the given body."""

    def of(body):
        ref = load_trial(write(RUN.format(body)))
        return execute(Cell(ref, "full", "base", {}, 0, "k" * 64, 5.0, code_hash(ref), ("accuracy",)))

    return of


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise GeneratorExit", "run raised GeneratorExit (line 9 of toy.py)"),
        ("raise SystemExit(3)", "run raised SystemExit: 3 (line 9 of toy.py)"),
        ("raise Mute", "run raised Mute: (its text cannot be read: ValueError)"),
        (r"raise OSError('\ud800 in a file name')", r"run raised OSError: \ud800 in a file name"),
        ("raise RuntimeError('x' * 10**7)", "run raised RuntimeError: xxx"),
        ("return {'accuracy': 10**400}", "metric 'accuracy' must be a number, got 1000"),
        ("return {'other' * 1000: 1.0}", "run returned no metric 'accuracy', got 'otherother"),
        ("log.value('loss', 1.0, 2**63)", "takes a step below 2**63"),
        ("return len(3)", "TypeError: object of type 'int' has no len() (line 9 of toy.py)"),
    ],
)
def test_whatever_a_run_does_is_the_outcome_of_its_cell(body, message, outcome):
    found = outcome(body)
    assert found.status == "failed"
    assert message in found.error
    assert len(found.error) < 4000
    assert len(found.traceback_text) <= 100_000
    found.error.encode()
    found.traceback_text.encode()


def test_names_that_no_database_takes_are_written_as_escapes(outcome):
    found = outcome(r"log.value('\ud800', 1.0, 0); return {'accuracy': 1.0, 'a\ud800': 2.0}")
    assert found.metrics == {"accuracy": 1.0, "a\\ud800": 2.0}
    assert list(found.curves) == ["\\ud800"]


def test_half_a_point_is_never_kept():
    log = CellLog()
    for value, step in (("abc", 0), (1.0, "first"), (1.0, 2**63)):
        with pytest.raises(ValueError, match=r".+"):
            log.value("loss", value, step)
    log.value("loss", 0.5, 1)
    assert log.curves == {"loss": ([1], [0.5])}


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (-9, "lack of memory"),
        (-11, "SIGSEGV"),
        (-99, "signal 99"),
        (70, "os._exit"),
        (3, "exit code 3"),
        (None, "None"),
    ],
)
def test_the_end_of_a_worker_is_told_with_a_cure(code, told):
    assert told in _end_of(code)
    assert _end_of(code).count(". ") == 1


# --- declarations ------------------------------------------------------------------------------------------------


def declared(**changes):
    kept = {"title": "t", "run": print, "arms": Arms("a", "b"), "primary": Metric("m")}
    return Trial(**{**kept, **changes})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Metric("m", better="up"), "better must be 'higher' or 'lower', got 'up'"),
        (
            lambda: Metric("loss", better="lower"),
            "worst must be given where lower is better, got nothing for 'loss'",
        ),
        (lambda: Metric("m", worst="bad"), "worst must be of type int or float"),
        (lambda: Metric(""), "Metric.name must be a text"),
        (lambda: Arms("a", None), "name of an arm must be of type str, got None"),
        (lambda: Arms("a", "b", rivals="cd"), "Arms.rivals must be of type tuple or list, got 'cd'"),
        (lambda: Arms("a", "\ud800"), "ordinary characters"),
        (lambda: Seeds(test=(0, 1.5)), "a seed must be of type int, got 1.5"),
        (lambda: Seeds(test=(2**70,)), "within 64 bits"),
        (lambda: Greater("a", "b", by="much"), "Greater.by must be"),
        (lambda: Equivalent("a", "b", 0.1, metric="m"), "Equivalent.metric must be of type Metric"),
        (lambda: declared(arms=("a", "b")), "Trial.arms must be of type Arms, got"),
        (lambda: declared(primary="m"), "Trial.primary must be of type Metric, got 'm'"),
        (lambda: declared(run=3), "Trial.run must be a function, got 3"),
        (lambda: declared(timeout="1 min"), "Trial.timeout must be"),
        (lambda: declared(figures=(3,)), "a figure must be of type PairedSeeds or Curves or Drawing, got 3"),
        (lambda: declared(hp={"a": 3}), "hp\\['a'\\] must be of type Mapping, got 3"),
        (lambda: declared(title=3), "Trial.title must be of type str, got 3"),
    ],
)
def test_a_declaration_of_the_wrong_kind_is_refused_where_it_stands(wrong, message):
    with pytest.raises((TypeError, ValueError), match=message):
        wrong()


def test_a_run_of_another_signature_is_refused_before_anything_runs():
    with pytest.raises(TrialError, match=r"run must take \(cfg, arm, hp, seed, log\), got \(cfg, seed\)"):
        check_trial(declared(run=lambda cfg, seed: {}), StudyRef(file="/x.py"))


def test_zero_is_the_worst_only_where_higher_is_better():
    assert Metric("m").worst == 0.0
    assert Metric("m", better="lower", worst=0.0).worst == 0.0
    assert math.isinf(Metric("m", better="lower", worst=math.inf).worst)


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from . import helper\n", "write `import helper`"),
        ("raise SystemExit(3)\n", r"SystemExit: 3 \(line \d+\)\. Keep what ends the process"),
        ("Metric('m', better='up')\n", r"got 'up'\. Choose one \(line \d+\)\. Correct it there\.$"),
        ("def f(:\n", r"SyntaxError: .*line \d+\)\. Run it"),
    ],
)
def test_a_file_that_cannot_be_imported_says_where_and_what_to_do(text, message, write):
    with pytest.raises(TrialError, match=message):
        load_trial(write(text))


@pytest.mark.parametrize(
    "head", [b"\xef\xbb\xbf", b"# -*- coding: latin-1 -*-\n# \xe9\n"], ids=["byte-order mark", "latin-1"]
)
def test_a_file_in_any_encoding_that_python_reads(head, write, serial, store):
    path = write()
    path.write_bytes(head + path.read_bytes())
    assert run_trial(load_trial(path), store=store, executor=serial).verdict.word == "supported"


def test_code_hash_follows_relative_imports_of_helpers(write, tmp_path):
    package = tmp_path / "relative_helpers"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("from .two import rate\nfrom . import three\n")
    for name in ("two", "three"):
        (package / f"{name}.py").write_text("rate = 1\n")
    ref = StudyRef(file=str(write("from relative_helpers.one import rate\n")))
    for name in ("two", "three"):
        before = code_hash(ref)
        (package / f"{name}.py").write_text("rate = 2222\n")
        assert code_hash(ref) != before


@pytest.mark.parametrize(
    "text",
    [
        "from pullback import GradientNoise\n",
        "import pullback as pb\nnoise = pb.GradientNoise\n",
        "import pullback\nnoise = pullback.GradientNoise\n",
    ],
)
def test_code_hash_follows_public_names_to_their_room(text, write):
    path = write(text)
    _, imported = _parsed(path, 0)
    followed = {file for name in imported for file in _files_of(name, path, path.parent)}
    assert any(file.parent.name == "gradient_noise" for file in followed)


# --- scores --------------------------------------------------------------------------------------------------------

SOME_FAIL = """
def run(cfg, arm, hp, seed, log):
    if arm == "method" and seed % 2:
        raise RuntimeError("out of luck")
    return {{"score": {} + seed / 100}}

trial = Trial(title="toy", run=run, arms=Arms("base", "method"), primary={})
"""


@pytest.mark.parametrize(
    ("metric", "value", "worst"),
    [
        ('Metric("score")', "-5", -5.0),  # a declared worst of 0 would be the best score of all
        ('Metric("score", better="lower", worst=1.0)', "3", 3.07),
        ('Metric("score", worst=-9.0)', "-5", -9.0),
        ('Metric("score")', "5", 0.0),
    ],
)
def test_a_failed_run_never_counts_better_than_a_finished_one(metric, value, worst, write, serial, store):
    result = run_trial(load_trial(write(SOME_FAIL.format(value, metric))), store=store, executor=serial)
    assert result.scores("method")[1] == pytest.approx(worst)
    assert result.verdict.word != "supported"
    told = "better than some that finished" in result.declaration["note"]
    assert told is (worst not in {0.0, -9.0})
    assert store.results()[0].scores("method")[1] == pytest.approx(worst)


def test_a_metric_that_some_runs_did_not_return_has_no_score(write, serial, store):
    body = """
    def run(cfg, arm, hp, seed, log):
        extra = {"extra": 1.0} if arm == "method" else {}
        return {"accuracy": seed / 10 + len(arm) * (1 + seed / 7), **extra}

    figures = (PairedSeeds("extra"), PairedSeeds("nothing"))
    trial = Trial(title="toy", run=run, arms=Arms("base", "method"), primary=Metric("accuracy"), figures=figures)
    """
    path = write("from pullback.lab import PairedSeeds\n" + body.replace("\n    ", "\n"))
    result = run_trial(load_trial(path), store=store, executor=serial)
    assert all(map(math.isnan, result.scores("base", "extra").values()))
    assert set(result.scores("method", "extra").values()) == {1.0}
    assert all(map(math.isnan, result.scores("method", "nothing").values()))
    assert PairedSeeds("nothing").metric == "nothing"
