"""Each rule of rooms refuses what it should, and a generated room keeps all of them but its own maths."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pullback
from pullback.core.facts import rooms
from pullback.lab.rooms.__main__ import main
from pullback.lab.rooms.generate import new_room, room_name
from pullback.lab.rooms.rules import _evidence, _study, _tuned_fits, check_room
from pullback.lab.rooms.source import check_source
from pullback.lab.rooms.stub import stub_text
from pullback.lab.rooms.table import BEGIN, END, MarkersError, with_table

PACKAGE = Path(pullback.__file__).parent
CHECKOUT = PACKAGE.parent.parent


def problems(folder: Path) -> str:
    return "\n".join(map(str, check_room(folder, folder.parent / "evidence", load=False)))


@pytest.fixture
def room(tmp_path: Path) -> Path:
    return new_room("signal_scaler", tmp_path)


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_new_room_has_no_problem_on_paper(room: Path) -> None:
    assert problems(room) == ""


@pytest.mark.parametrize(
    "name",
    [
        "method.toml",
        "__init__.py",
        "study.py",
        "tuned.toml",
        "README.md",
        "tests/reference.py",
        "tests/cases.py",
    ],
)
def test_a_missing_file_is_named(room: Path, name: str) -> None:
    (room / name).unlink()
    assert f"signal_scaler/{name}: is missing." in problems(room)


def test_strangers_in_a_room_are_named(room: Path) -> None:
    (room / "weights.pt").touch()
    (room / "tests" / "data.npz").touch()
    for name in ("a.py", "b.py", "c.py"):
        (room / name).write_text('"""One."""\n')
    text = problems(room)
    assert "signal_scaler/weights.pt: does not belong in a room" in text
    assert "signal_scaler/tests/data.npz: does not belong here" in text
    assert "has 4 modules of maths, must be 1 to 3" in text


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("method.toml", 'kind = "transform"', 'kind = "trick"', "kind must be one of"),
        ("method.toml", "year = 2024\nvenue", 'year = "2024"\nvenue', "year must be an integer"),
        ("method.toml", "title =", "title", "must be TOML"),
        ("README.md", "## Traps", "## Notes", "whose heading says 'trap'"),
        ("README.md", "```python", "```text", "no ```python example"),
        ("README.md", "# Signal", "Signal", "must begin with a '# ' title"),
        ("tuned.toml", "#", "x = = #", "is not TOML"),
        ("signal_scaler.py", "import torch\n", "import torch\nimport pickle\n", "can run code on loading"),
        (
            "signal_scaler.py",
            "import torch\n",
            "import torch\nimport pullback.lab\n",
            "Only a room's study.py",
        ),
        (
            "signal_scaler.py",
            "import torch\n",
            "import torch\nfrom pullback import lab\n",
            "Only a room's study.py",
        ),
        ("signal_scaler.py", "import torch\n", "import torch\nfrom . import study\n", "relative import"),
        (
            "signal_scaler.py",
            "import torch\n",
            "import torch\nimport pullback.testing\n",
            "Only a room's tests",
        ),
        (
            "signal_scaler.py",
            "import torch\n",
            "import torch\nx = torch.load('a')\n",
            "torch.load can run code",
        ),
        ("signal_scaler.py", "import torch\n", "import torch\n(\n", "is not Python"),
        (
            "signal_scaler.py",
            "import torch\n",
            "import torch\n# TO" + "DO: more\n",
            "mark of unfinished work",
        ),
        ("README.md", "## Cost", "See /home/" + "someone/x.\n\n## Cost", "is a path of one machine"),
    ],
)
def test_a_broken_rule_is_told_with_its_file(room: Path, file: str, old: str, new: str, message: str) -> None:
    path = room / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    found = problems(room)
    assert message in found
    assert f"signal_scaler/{file}" in found


# --- source --------------------------------------------------------------------------------------------------------


def test_ceilings_count_lines_without_the_docstring() -> None:
    body = "    x = 1\n" * 58
    fits = f'def f():\n    """One\n    two\n    three."""\n{body}    return x\n'
    assert check_source("r/a.py", fits) == []
    assert "has 61 lines" in str(
        check_source("r/a.py", fits.replace("    return x\n", "    x = 2\n    return x\n"))[0]
    )
    assert check_source("r/a.py", "x = 1\n" * 400) == []
    assert "has 401 lines" in str(check_source("r/a.py", "x = 1\n" * 401)[0])


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "eval(text)",
        "exec(text)",
    ],
)
def test_unsafe_calls_are_refused(line: str) -> None:
    assert len(check_source("r/a.py", f"{line}\n")) == 1
    assert check_source("r/tests/a.py", f"{line}\n", test=True) == []


@pytest.mark.parametrize("line", ["torch.load(f, weights_only=True)", "np.load(f)", "model.eval()"])
def test_safe_calls_pass(line: str) -> None:
    assert check_source("r/a.py", f"{line}\n") == []


def product_files() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "tests" not in p.parts)


@pytest.mark.parametrize("path", product_files(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_every_file_of_the_package_keeps_the_rules_of_source(path: Path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    room = name.startswith("methods/") and name != "methods/__init__.py"
    found = check_source(name, path.read_text("utf-8"), room=room, study=path.name == "study.py")
    assert found == [], "\n".join(map(str, found))


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a",
        "A",
        "class",
        "con",
        "nul",
        "../x",
        "a/b",
        "a\\b",
        "a.b",
        "x\n",
        "é",
        "\x1b[31m",
        "1a",
        "a" * 25,
        "a" * 10_000,
    ],
)
def test_hostile_names_are_refused_in_one_short_printable_line(name: str, capsys, tmp_path: Path) -> None:
    assert main(["new", "--methods", str(tmp_path), "--", name]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.strip().isprintable()
    assert len(said) < 200
    assert list(tmp_path.iterdir()) == []


@given(st.text(max_size=40))
def test_an_accepted_name_is_an_identifier_without_separators(name: str) -> None:
    try:
        assert room_name(name) == name
    except ValueError:
        return
    assert name.isidentifier()
    assert name.isascii()


def test_an_existing_room_is_left_alone(room: Path, capsys) -> None:
    (room / "README.md").write_text("mine")
    assert main(["new", room.name, "--methods", str(room.parent)]) == 2
    assert "there is a room 'signal_scaler' already" in capsys.readouterr().err
    assert (room / "README.md").read_text() == "mine"
    assert main(["new", "other", "--methods", str(room.parent / "absent")]) == 2


def test_check_names_an_unknown_room(tmp_path: Path, capsys) -> None:
    assert main(["check", "absent", "--methods", str(tmp_path)]) == 1
    assert "absent: there is no such room" in capsys.readouterr().err


# --- studies, tuned values and evidence ----------------------------------------------------------------------------


def make_study(**changes):
    from dataclasses import replace

    from pullback.lab.declare import Arms, Metric, PaperResult, Study

    study = Study(
        title="t",
        run=lambda cfg, arm, hp, seed, log: {"m": 0.0},
        arms=Arms("a", "b", rivals=("c",)),
        primary=Metric("m"),
        sizes={"smoke": None, "full": None},
        room="r",
        paper=PaperResult("table 1", "theirs"),
        refuted_if="b is not better",
    )
    return replace(study, **changes)


def test_what_cannot_be_read_is_one_line(tmp_path: Path, capsys) -> None:
    (tmp_path / "dann.json").write_text("{")
    assert main(["table", "--check", "--evidence", str(tmp_path)]) == 1
    assert "dann.json is no valid JSON" in capsys.readouterr().err
    assert main(["check", "--methods", str(tmp_path / "absent")]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1


def test_a_study_must_declare_what_would_refute_it() -> None:
    from pullback.lab.declare import Arms, Seeds

    assert list(_study("f", "r", make_study())) == []
    for changes, message in [
        ({"refuted_if": " "}, "would refute it"),
        ({"room": "s"}, "must be 'r'"),
        ({"sizes": {"full": None}}, "no size 'smoke'"),
        ({"seeds": Seeds(test=(0, 1))}, "2 test seeds"),
        ({"arms": Arms("a", "b")}, "no rival arm"),
    ]:
        found = list(_study("f", "r", make_study(**changes)))
        assert len(found) == 1
        assert message in str(found[0])


def test_tuned_values_must_name_studies_and_arms_that_exist() -> None:
    studies = (make_study(),)
    assert list(_tuned_fits("r", {"main": {"b": {"lr": 1.0}}, "trace_sha256": "x"}, studies)) == []
    assert "no arm 'z'" in str(*_tuned_fits("r", {"main": {"z": {"lr": 1.0}}}, studies))
    assert "names the study 'other'" in str(*_tuned_fits("r", {"other": {}}, studies))


def test_evidence_of_another_declaration_is_stale(tmp_path: Path) -> None:
    from pullback.lab.engine.cells import claim_hash

    study, path = make_study(), tmp_path / "r.json"

    def entry(trial, trace: str = "") -> dict[str, object]:
        tuning = {"trace_sha256": trace} if trace else None
        return {"name": trial.name, "claim_hash": claim_hash(trial), "declaration": {"tuning": tuning}}

    path.write_text(json.dumps({"studies": [entry(study)]}))
    assert list(_evidence(path, (study,), {})) == []
    assert "declared anew" in str(*_evidence(path, (make_study(refuted_if="something else"),), {}))
    assert "no longer declared" in str(*_evidence(path, (make_study(name="new"),), {}))
    assert "tuned anew" in str(*_evidence(path, (study,), {"main": {"trace_sha256": "x"}}))
    path.write_text(json.dumps({"studies": [entry(study, "x")]}))
    assert list(_evidence(path, (study,), {"main": {"trace_sha256": "x"}})) == []
    other = make_study(name="another")
    path.write_text(json.dumps({"studies": [entry(other), entry(study)]}))
    assert "begin with the main study" in str(*_evidence(path, (study, other), {}))
    path.write_text("{")
    assert "is not evidence" in str(*_evidence(path, (study,), {}))


# --- generated files -----------------------------------------------------------------------------------------------


def test_the_stub_lists_what_dir_lists_and_is_fresh() -> None:
    text = (PACKAGE / "__init__.pyi").read_text("utf-8")
    assert text == stub_text(rooms()), "run `python -m pullback.lab.rooms stub`"
    for name in set(dir(pullback)) - {"__version__"}:
        assert f" as {name}\n" in text


def test_the_table_goes_between_its_markers_and_is_stable() -> None:
    page = f"a\n{BEGIN}\nold\n{END}\nz\n"
    once = with_table(page, "| t |\n")
    assert once == f"a\n{BEGIN}\n\n| t |\n\n{END}\nz\n"
    assert with_table(once, "| t |\n") == once
    for wrong in ("", BEGIN, f"{END} {BEGIN}", page * 2):
        with pytest.raises(MarkersError):
            with_table(wrong, "t")


# --- a new room in a copy of the package ---------------------------------------------------------------------------


def run(copy: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.mark.slow
def test_a_new_room_passes_every_check_except_its_own_maths(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "src" / "pullback", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "conftest.py"):
        shutil.copy(CHECKOUT / name, tmp_path)
    if (CHECKOUT / "tests" / "contracts").is_dir():
        shutil.copytree(CHECKOUT / "tests" / "contracts", tmp_path / "tests" / "contracts")
    made = run(tmp_path, "-m", "pullback.lab.rooms", "new", "signal_scaler")
    assert made.returncode == 0, made.stderr
    folder = "src/pullback/methods/signal_scaler"
    for command in (
        ("-m", "pullback.lab.rooms", "check", "signal_scaler"),
        ("-m", "ruff", "check", folder),
        ("-m", "ruff", "format", "--check", folder),
        ("-m", "ty", "check", "--extra-search-path", "src", folder),
    ):
        done = run(tmp_path, *command)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    arrows = run(tmp_path, "-c", "from importlinter.cli import lint_imports_command as c; c(['--no-cache'])")
    assert arrows.returncode == 0, arrows.stdout
    tests = run(
        tmp_path,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        folder,
        "tests/contracts",
        "-k",
        "signal_scaler or SignalScaler",
    )
    failed = [line for line in tests.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    assert len(failed) == 1, tests.stdout
    assert "test_the_edit_equals_the_reference" in failed[0]
    assert "README.md" not in failed[0]
    named = run(tmp_path, "-c", "import pullback; print(pullback.SignalScaler())")
    assert "SignalScaler(scale=0.5)" in named.stdout
