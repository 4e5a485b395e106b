"""Every command's good path and every failure: one line, the right exit status, nothing lost."""

import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from pullback.lab.cli import run
from pullback.lab.cli.progress import duration
from pullback.lab.cli.terminal import clean
from pullback.lab.doctor import torch_finding

TRIAL = """
import time
from pullback.lab import Arms, Metric, Trial

def run(cfg, arm, hp, seed, log):
    {body}

trial = Trial(
    title="two constants", run=run, arms=Arms(baseline="a", method="b"),
    primary=Metric("score", better="higher", worst=0.0),
    sizes={{"smoke": None, "full": None}},
)
"""
GOOD = 'return {"score": seed * 0.01 + (0.5 + 0.001 * seed if arm == "b" else 0.1)}'


@pytest.fixture
def trial_file(tmp_path):
    def write(body=GOOD, name="mine.py"):
        path = tmp_path / name
        path.write_text(TRIAL.format(body=body))
        return str(path)

    return write


def one_line(capsys):
    err = capsys.readouterr().err
    assert err.startswith("pullback: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("bogus", "bogus"),
        ("study", "name one or more rooms"),
        ("study gradient_nose", "Did you mean 'gradient_noise'?"),
        ("study gradient_noise --all", "and not both"),
        ("study gradient_noise --size tiny", "has no size 'tiny'"),
        ("study gradient_noise --seeds 0", "--seeds must be 1 to"),
        ("study gradient_noise --seeds 99", "--seeds must be 1 to"),
        ("study gradient_noise --seeds x", "--seeds"),
        ("study gradient_noise --workers 0", "--workers must be >= 1, got 0"),
        ("study gradient_noise --executor ray", "ray"),
        ("study gradient_noise --only nothing", "unknown study 'nothing'"),
        ("show nope", "nope"),
        ("cite nope", "nope"),
        ("trial nofile.py", "there is no file"),
        ("export nope --out nowhere", "there is no store"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(words.split()) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "runs" / "report").exists()


def test_a_hostile_room_name_cannot_write_to_the_terminal(capsys):
    assert run(["study", "\x1b[31mred\x1b]0;title\x07" + "x" * 10_000]) == 2
    err = one_line(capsys)
    assert "\x1b" not in err
    assert len(err) < 3000


def test_list_show_cite_doctor(capsys, tmp_path):
    assert run(["list"]) == 0
    assert "gradient_noise" in capsys.readouterr().out
    assert run(["show", "gradient_noise"]) == 0
    shown = capsys.readouterr().out
    assert "claim:" in shown
    assert "@article" in shown or "@misc" in shown
    assert run(["cite", "dann", "gradient_noise"]) == 0
    assert capsys.readouterr().out.count("@") >= 2
    assert run(["doctor", "--out", str(tmp_path)]) == 0
    assert "torch" in capsys.readouterr().out


def test_trial_runs_once_then_rests_and_writes_the_report(trial_file, tmp_path, capsys):
    words = ["trial", trial_file(), "--out", str(tmp_path / "runs"), "--workers", "2"]
    assert run(words) == 0
    first = capsys.readouterr().out
    assert "mine.py:main: supported" in first
    assert "8 paired seeds" in first
    assert (tmp_path / "runs" / "report" / "index.html").is_file()
    assert run(words) == 0
    second = capsys.readouterr().out
    assert "0 cells run" in second
    assert "mine.py:main: supported" in second


@pytest.mark.parametrize("words", ["--quiet list", "list --debug", "doctor --debug --quiet"])
def test_every_command_takes_the_common_flags(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(words.split()) == 0
    capsys.readouterr()


def test_quiet_prints_results_only(trial_file, tmp_path, capsys):
    assert run(["trial", trial_file(), "--size", "smoke", "--quiet", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out] == ["mine.py", "report"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('return {"other": 1.0}', "score"),
        ("return 3", "mapping"),
        ('raise RuntimeError("no such layer")', "no such layer"),
        ('return {"score": float("nan")}', "nan"),
    ],
)
def test_a_run_at_fault_is_named_and_exits_1(body, message, trial_file, tmp_path, capsys):
    words = ["trial", trial_file(body), "--size", "smoke", "--seeds", "2", "--workers", "1"]
    assert run([*words, "--out", str(tmp_path / "runs")]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert "mine.py" in err
    assert "Traceback" not in err


def test_a_broken_file_is_exit_1_and_shows_its_traceback_on_request(tmp_path, capsys):
    path = tmp_path / "broken.py"
    path.write_text("import no_such_package\n")
    assert run(["trial", str(path), "--out", str(tmp_path)]) == 1
    assert "no_such_package" in one_line(capsys)
    assert run(["trial", str(path), "--out", str(tmp_path), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_damaged_store_is_named_and_kept(trial_file, tmp_path, capsys):
    store = tmp_path / "store.sqlite"
    store.write_bytes(b"this is no database, but somebody may want it" * 50)
    kept = store.read_bytes()
    assert run(["trial", trial_file(), "--out", str(tmp_path)]) == 1
    assert "store.sqlite" in one_line(capsys)
    assert store.read_bytes() == kept


def test_a_newer_store_is_refused(trial_file, tmp_path, capsys):
    words = ["trial", trial_file(), "--size", "smoke", "--seeds", "1", "--out", str(tmp_path / "runs")]
    assert run(words) == 0
    with sqlite3.connect(tmp_path / "runs" / "store.sqlite") as db:
        db.execute("PRAGMA user_version = 9999")
    db.close()
    capsys.readouterr()
    assert run(words) == 1
    assert "newer" in one_line(capsys)


def test_an_output_folder_that_is_a_file(trial_file, tmp_path, capsys):
    (tmp_path / "taken").write_text("x")
    assert run(["trial", trial_file(), "--out", str(tmp_path / "taken")]) == 1
    assert "taken" in one_line(capsys)


def test_export_parquet_has_one_row_per_value(trial_file, tmp_path, capsys):
    pq = pytest.importorskip("pyarrow.parquet")
    body = f'log.value("loss", 1.0, 0); log.value("loss", 0.5, 1); {GOOD}'
    out = str(tmp_path / "runs")
    assert run(["trial", trial_file(body), "--size", "smoke", "--seeds", "2", "--out", out]) == 0
    assert run(["export", "--format", "parquet", "--to", str(tmp_path), "--out", out]) == 0
    table = pq.read_table(tmp_path / "measurements.parquet").to_pylist()
    assert len([row for row in table if row["metric"] == "score"]) == 4
    assert len([row for row in table if row["metric"] == "loss"]) == 8
    capsys.readouterr()


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_is_finished(signum, status, trial_file, tmp_path):
    path = trial_file(f"time.sleep(0.0 if seed == 0 else 60); {GOOD}")
    words = [sys.executable, "-m", "pullback.lab.cli", "trial", path, "--out", str(tmp_path / "runs")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finished = 0
    for line in process.stdout:
        finished += "seed 0" in line
        if finished == 2:
            break
    os.kill(process.pid, signum)
    started = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert time.monotonic() - started < 30
    assert "goes on" in err
    with sqlite3.connect(tmp_path / "runs" / "store.sqlite") as db:
        (count,) = db.execute("SELECT COUNT(*) FROM cells WHERE status = 'done'").fetchone()
    db.close()
    assert count == 2


def test_the_list_needs_no_torch():
    code = "import sys; from pullback.lab.cli import run; run(['list']); print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr.strip().endswith("False")


@pytest.mark.parametrize(
    ("version", "fatal"), [(None, True), ("2.8.1", True), ("2.9.0", False), ("2.13.0+cpu", False)]
)
def test_doctor_judges_torch(version, fatal):
    finding = torch_finding(version)
    assert finding.fatal is fatal
    assert ("pip install" in finding.fix) is fatal


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "unknown"), (8.2, "8 s"), (185, "3 min 05 s"), (3720, "1 h 02 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_clean_removes_what_moves_the_cursor_or_reorders():
    assert clean("a\x1b[2Jb\x1b]8;;http://x\x07c\u202ed\x07e") == "abcde"
