"""The command as a user starts it: what ends it early leaves one line, the right status and nothing else."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from pullback.lab import Store
from pullback.lab.cli import main, run

COMMAND = (sys.executable, "-m", "pullback.lab.cli")
TRIAL = """
from pullback.lab import Arms, Metric, Trial

def run(cfg, arm, hp, seed, log):
    {body}

trial = Trial(title="two constants", run=run, arms=Arms("a", "b"), primary=Metric("score"), sizes={{"smoke": None}})
"""
GOOD = 'return {"score": seed + len(arm)}'


@pytest.fixture
def trial_file(tmp_path):
    def write(body=GOOD, name="mine.py"):
        path = tmp_path / name
        path.write_text(TRIAL.format(body=body))
        return str(path)

    return write


def start(*words, **options):
    words = (*COMMAND, *map(str, words))
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, **options)


def test_a_trial_that_is_refused_early_leaves_one_line(trial_file, tmp_path):
    words = ("trial", trial_file('return {"other": 1.0}'), "--size", "smoke", "--workers", "1")
    done = start(*words, "--out", tmp_path / "runs")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, (
        done.stderr
    )  # no traceback of a thread that the end of the process surprised
    assert "run returned no metric 'score'" in done.stderr


def test_what_runs_print_is_kept_out_of_the_results(trial_file, tmp_path):
    body = f'import os; print("chatter"); os.write(1, b"raw\\n"); {GOOD}'
    words = (
        "trial",
        trial_file(body),
        "--size",
        "smoke",
        "--quiet",
        "--workers",
        "1",
        "--out",
        tmp_path / "runs",
    )
    done = start(*words)
    assert done.returncode == 0
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["mine.py", "report"]
    assert "chatter" in done.stderr
    assert "raw" in done.stderr


def to_nobody(*words):
    """The exit status and the errors of a command whose output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*COMMAND, *map(str, words)],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        os.close(writer)
    return done.returncode, done.stderr


@pytest.mark.parametrize("words", ["list", "show dann", "--help", "study --help"])
def test_reading_into_a_closed_pipe_is_no_fault(words):
    assert to_nobody(*words.split()) == (0, "")


def test_runs_into_a_closed_pipe_are_not_called_done(trial_file, tmp_path):
    status, told = to_nobody(
        "trial", trial_file(), "--size", "smoke", "--workers", "1", "--out", tmp_path / "runs"
    )
    assert status == 1
    assert told.count("\n") == 1
    assert "nobody reads the output" in told


def test_a_file_that_ends_the_process_is_named(tmp_path, capsys):
    path = tmp_path / "leaves.py"
    path.write_text("import sys\nsys.exit(3)\n")
    assert run(["trial", str(path), "--out", str(tmp_path)]) == 1
    assert "SystemExit: 3 (line 2)" in capsys.readouterr().err


def test_an_interrupt_while_a_file_is_imported_is_told(tmp_path, capsys):
    path = tmp_path / "slow.py"
    path.write_text("raise KeyboardInterrupt\n")
    assert run(["trial", str(path), "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "pullback: interrupted. What is finished is kept.\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("study dann --seeds 1.5", "a whole number is needed, got '1.5'"),
        ("study dann --seeds 1e1", "a whole number is needed"),
        ("study dann --workers 0x2", "a whole number is needed"),
        ("serve --port 80.5", "a whole number is needed"),
        ("serve --port 99999", "port must be 0 to 65535, got 99999"),
        ("serve --host example.com", "host must be an IP address or localhost"),
    ],
)
def test_numbers_and_hosts_that_are_none_are_bad_usage(words, message, capsys, tmp_path):
    out = [] if words.startswith("study") else ["--out", str(tmp_path)]
    assert run([*words.split(), *out]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert ".." not in told


def test_a_report_that_cannot_be_written_is_said_once(tmp_path, capsys):
    (tmp_path / "report").write_text("a file in the place of the folder")
    assert run(["report", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert told.count("Choose another folder") == 1
    assert "report" in told
    assert ".." not in told


def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.py"
    with open(path, "w", encoding="utf-8") as file:
        file.write(TRIAL.format(body=GOOD))
    words = [*COMMAND, "trial", path, "--size", "smoke", "--workers", "1", "--out", tmp_path / "runs"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, capture_output=True, timeout=120, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"caf\\udce9.py" in done.stdout


def test_an_interrupt_while_the_command_loads_leaves_one_line(monkeypatch, capsys):
    def interrupted(_name):
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.util.find_spec", interrupted)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 130
    assert capsys.readouterr().err == "pullback: interrupted. Nothing has been started.\n"


def test_a_file_that_is_edited_or_gone_at_the_end_does_not_cost_the_report(trial_file, tmp_path):
    body = 'import os; os.path.exists(__file__) and os.remove(__file__); return {"score": seed + len(arm)}'
    words = (
        "trial",
        trial_file(body),
        "--size",
        "smoke",
        "--seeds",
        "1",
        "--workers",
        "1",
        "--out",
        tmp_path / "runs",
    )
    done = start(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "runs" / "report" / "index.html").is_file()


def test_results_of_a_room_that_is_gone_stay_readable(trial_file, tmp_path, capsys):
    out = str(tmp_path / "runs")
    assert run(["trial", trial_file(), "--size", "smoke", "--workers", "1", "--out", out]) == 0
    with Store(tmp_path / "runs" / "store.sqlite") as store:
        (kept,) = store.results()
        store.save_result(replace(kept, room="gone"))
    capsys.readouterr()
    assert run(["report", "--out", out]) == 0
    assert (tmp_path / "runs" / "report" / "gone.html").is_file()
    assert run(["export", "gone", "--out", out, "--to", str(tmp_path / "evidence")]) == 1
    assert "no full-size result of 'gone'" in capsys.readouterr().err


def test_a_torch_that_is_too_old_is_one_line_with_the_cure(trial_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pullback.lab.doctor.installed", lambda _package: "2.5.1")
    for words in (["trial", trial_file()], ["study", "dann", "--size", "smoke"], ["tune", "dann"]):
        assert run([*words, "--out", str(tmp_path / "runs")]) == 1
        told = capsys.readouterr().err
        assert told == 'pullback: torch: 2.5.1, older than 2.9. Install it with: pip install "torch>=2.9"\n'
    assert not (tmp_path / "runs").exists()


def test_workers_that_cannot_start_leave_no_failed_runs(trial_file, tmp_path):
    broken = tmp_path / "broken" / "torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise OSError('libtorch.so cannot be opened')\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(broken.parent), *sys.path])}
    words = ("trial", trial_file(), "--size", "smoke", "--workers", "1", "--out", tmp_path / "runs")
    done = start(*words, env=environment)
    assert done.returncode == 1
    assert "no worker process could be started" in done.stderr.splitlines()[-1]
    assert "a worker cannot import torch: OSError: libtorch.so cannot be opened" in done.stderr
    assert "Traceback" not in done.stderr
    with Store(tmp_path / "runs" / "store.sqlite", read_only=True) as store:
        assert store.seconds_by_arm("mine.py:main", "smoke") == {}
        assert store._db.execute("SELECT count(*) FROM cells").fetchone() == (0,)
