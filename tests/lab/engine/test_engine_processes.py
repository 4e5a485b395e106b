"""Real worker processes and real signals: nothing that is finished is lost, nobody is left behind."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pullback.lab import LocalExecutor, Store, load_trial, run_trial
from pullback.lab.engine import Interrupted, TrialError
from pullback.lab.engine.stop import polite_stop

FATES = """
import os, signal, time
import torch

def run(cfg, arm, hp, seed, log):
    fate = {1: lambda: os._exit(0), 2: lambda: os._exit(3), 3: lambda: os.kill(os.getpid(), signal.SIGKILL),
            4: lambda: time.sleep(60), 5: lambda: 1 / 0}.get(seed if arm == "method" else 0, lambda: None)
    fate()
    settings = {"threads": torch.get_num_threads(), "deterministic": torch.are_deterministic_algorithms_enabled(),
                "denormal": float(torch.tensor(1e-310, dtype=torch.float64) * 1.0)}
    return {"accuracy": torch.rand(()).item(), **{k: float(v) for k, v in settings.items()}}

trial = Trial(title="fates", run=run, arms=Arms("base", "method"), primary=Metric("accuracy"), timeout=2.0)
"""


def test_every_fate_of_a_worker_is_a_row(write, store):
    ref = load_trial(write(FATES))
    with LocalExecutor(1) as executor:
        result = run_trial(ref, store=store, executor=executor)
    fates = {c.seed: c for c in result.cells if c.arm == "method"}
    assert {s: c.status for s, c in fates.items()} == {
        0: "done", 1: "failed", 2: "failed", 3: "failed", 4: "timeout", 5: "failed", 6: "done", 7: "done",
    }  # fmt: skip
    assert all(c.status == "done" for c in result.cells if c.arm == "base")
    assert "ended with exit code 3" in fates[2].error
    assert "most often for lack of memory" in fates[3].error
    assert "ran longer than its time limit" in fates[4].error
    assert "ZeroDivisionError" in fates[5].error
    assert all("toy.py: arm 'method', seed" in fates[s].error for s in range(1, 6))
    done = fates[0].metrics
    assert (done["threads"], done["deterministic"], done["denormal"]) == (1.0, 1.0, 0.0)
    # The safety net: the global generator starts from the cell's seed, whatever ran before in the worker.
    assert result.scores("base")[0] == fates[0].metrics["accuracy"]
    assert len({c.metrics["accuracy"] for c in result.cells if c.arm == "base"}) == 8


SLOW = """
import time

def run(cfg, arm, hp, seed, log):
    time.sleep({seconds})
    log.value("loss", seed * 1.5, seed)
    return {{"accuracy": seed + len(arm) / 10}}

trial = Trial(title="slow", run=run, arms=Arms("base", "method"), primary=Metric("accuracy"))
"""
DRIVER = """
import sys
from pullback.lab import LocalExecutor, Store, load_trial, run_trial
from pullback.lab.engine import CellFinished, Interrupted, Started

def tell(event):
    if isinstance(event, Started):
        print("started", event.cached, flush=True)
    if isinstance(event, CellFinished):
        print("cell", event.done, event.cell.key, flush=True)

if __name__ == "__main__":
    try:
        with Store(sys.argv[2]) as store, LocalExecutor(int(sys.argv[3])) as executor:
            run_trial(load_trial(sys.argv[1]), store=store, executor=executor, check_leaks=False, on_event=tell)
    except Interrupted as stopped:
        print("stopped", stopped, flush=True)
        sys.exit(stopped.exit_code)
    print("finished", flush=True)
"""


def start(tmp_path, trial, workers):
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    command = [sys.executable, str(driver), str(trial), str(tmp_path / "s.sqlite"), str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def read_until(process, word):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(word):
            break
    return lines


def alive_in_session(session):
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(name))
    return found


def wait_for_no_one(session, seconds=8.0):
    end = time.monotonic() + seconds
    while alive_in_session(session) and time.monotonic() < end:
        time.sleep(0.1)
    return alive_in_session(session)


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc to see other processes")


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_is_finished(write, tmp_path, number):
    with start(tmp_path, write(SLOW.format(seconds=0.6)), 1) as process:
        read_until(process, "cell 2")
        process.send_signal(number)
        rest = process.stdout.read()
        assert process.wait(10) == 128 + number
    assert f"stopped {number.name}:" in rest
    assert "the same command goes on from there" in rest
    assert wait_for_no_one(process.pid) == []
    with Store(tmp_path / "s.sqlite") as store:
        kept = store._db.execute("SELECT count(*) FROM cells").fetchone()[0]
    assert 2 <= kept < 16


@needs_proc
def test_kill_at_any_moment_loses_only_cells_in_flight(write, tmp_path):
    rng, reported = random.Random(7), set()
    trial = write(SLOW.format(seconds=0.15))
    finished = False
    for kill in range(3):
        with start(tmp_path, trial, 2) as process:
            lines = read_until(process, "cell") if kill < 2 else []
            time.sleep(rng.uniform(0, 0.5))
            if kill < 2:
                process.kill()
            lines += process.stdout.readlines()
        assert wait_for_no_one(process.pid) == []
        reported |= {line.split()[2] for line in lines if line.startswith("cell")}
        finished = finished or lines[-1] == "finished\n"
        with Store(tmp_path / "s.sqlite") as store:
            assert all(store.get(key).status == "done" for key in reported)
            starts = [line for line in lines if line.startswith("started")]
            assert not starts or int(starts[0].split()[1]) >= 0
    assert finished
    database = sqlite3.connect(tmp_path / "s.sqlite")
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert database.execute("SELECT count(*), count(DISTINCT arm || seed) FROM cells").fetchone() == (16, 16)
    database.close()


def test_handlers_come_back_and_a_second_signal_ends_at_once():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with polite_stop() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    code = (
        "import os, signal\nfrom pullback.lab.engine.stop import polite_stop\n"
        "with polite_stop():\n    os.kill(os.getpid(), signal.SIGINT)\n    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (143, "")


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo terminal")
def test_a_second_signal_brings_the_cursor_back():
    code = (
        "import os, signal\nfrom pullback.lab.engine.stop import polite_stop\n"
        "with polite_stop():\n    os.kill(os.getpid(), signal.SIGINT)\n    os.kill(os.getpid(), signal.SIGINT)"
    )
    ours, theirs = os.openpty()
    done = subprocess.run([sys.executable, "-c", code], stdout=theirs, timeout=60, check=False)
    assert done.returncode == 130
    assert os.read(ours, 100).startswith(b"\x1b[?25h")
    os.close(ours)
    os.close(theirs)


def test_interrupted_reads_well():
    stopped = Interrupted(signal.SIGTERM, "3 of 16 runs are kept.")
    assert (stopped.exit_code, str(stopped)) == (143, "SIGTERM: 3 of 16 runs are kept.")


LEAK = """
seen = []

def run(cfg, arm, hp, seed, log):
    seen.append(1)
    return {"accuracy": float(len(seen))}

trial = Trial(title="leak", run=run, arms=Arms("base", "method"), primary=Metric("accuracy"))
"""


def test_a_leak_is_found_in_a_used_worker(write, store, local):
    with pytest.raises(
        TrialError, match=r"state leaks between runs: metric 'accuracy' was 1\.0 in a fresh process"
    ):
        run_trial(load_trial(write(LEAK)), store=store, executor=local)


def test_an_array_that_is_no_array_fails_its_cell(write, store, local):
    body = """
    import numpy as np
    BAD = {0: np.zeros(2_000_000, np.uint8), 1: np.array([object()])}

    def run(cfg, arm, hp, seed, log):
        if seed in BAD:
            log.array("bad", BAD[seed])
        return {"accuracy": float(seed)}

    trial = Trial(title="arrays", run=run, arms=Arms("base", "method"), primary=Metric("accuracy"))
    """
    result = run_trial(load_trial(write(body)), store=store, executor=local, seeds=[5, 6, 7, 0, 1])
    errors = {c.seed: c.error for c in result.cells if c.status == "failed"}
    assert "takes at most 1 MB, got 2000000 bytes" in errors[0]
    assert "needs numbers, got dtype object" in errors[1]
