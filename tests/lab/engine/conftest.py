"""Trials in files, and an executor that needs no other process."""

import textwrap

import pytest

from pullback.lab import LocalExecutor, Store
from pullback.lab.engine.worker import execute

HEAD = """
from pullback.lab import (Arms, Choice, Equivalent, Greater, LogUniform, Metric, Seeds, Trial, Tune, Uniform)
"""
BODY = """
def run(cfg, arm, hp, seed, log):
    import random
    draw = random.Random(f"{seed}").gauss(0, 0.01) + random.Random(f"{arm}{seed}").gauss(0, 0.01)
    return {"accuracy": 0.5 + draw + (0.1 if arm == "method" else 0.0)}

trial = Trial(title="toy", run=run, arms=Arms("base", "method"), primary=Metric("accuracy", unit="fraction"),
              sizes={"smoke": 1, "full": 2})
"""


class SerialExecutor:
    """Runs each task at once in this process; remembers what it ran."""

    workers = 1

    def __init__(self):
        self.ran = []

    def run(self, source, stop):
        while not stop() and (task := source()) is not None:
            self.ran.append(task)
            yield task, execute(task.cell, used=task.used)

    def close(self):
        pass


@pytest.fixture
def serial():
    return SerialExecutor()


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store.sqlite") as opened:
        yield opened


@pytest.fixture
def write(tmp_path):
    """Write a trial's file and return its path."""

    def write_file(body=BODY, name="toy.py"):
        path = tmp_path / name
        path.write_text(HEAD + textwrap.dedent(body), encoding="utf-8")
        return path

    return write_file


@pytest.fixture(scope="module")
def local():
    with LocalExecutor(2) as executor:
        yield executor
