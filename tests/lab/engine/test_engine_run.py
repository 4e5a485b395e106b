"""A trial from declaration to verdict, in this process."""

import subprocess
import sys
from dataclasses import replace

import pytest

from pullback.lab import Store, load_trial, run_trial
from pullback.lab.engine import CellFinished, Finished, LeakChecked, Started, TrialError, make_executor
from pullback.lab.engine.reference import load_study, studies_of

ARMS = (
    'primary=Metric("accuracy", unit="fraction", worst=0.0), arms=Arms("base", "method"), sizes={"full": 2}'
)


def trial_with(body):
    return f"def run(cfg, arm, hp, seed, log):\n    {body}\n\ntrial = Trial(title='t', run=run, {ARMS})\n"


def test_a_difference_is_found_and_told(write, store, serial):
    result = run_trial(load_trial(write()), store=store, executor=serial)
    assert result.verdict.word == "supported"
    assert "percentage points higher" in result.verdict.sentence
    assert (result.room, result.name, result.size, len(result.cells)) == (None, "main", "full", 16)
    assert sorted(result.scores("method")) == list(range(8))
    assert result.declaration["file"] == "toy.py"
    assert result.provenance["cells_run"] == 16
    assert result.provenance["packages"]["torch"]
    assert result.declaration["claim"] == {
        "kind": "greater", "arm": "method", "than": "base", "margin": 0.0, "metric": "accuracy",
    }  # fmt: skip


def test_smoke_gives_no_verdict(write, store, serial):
    assert (
        run_trial(load_trial(write()), size="smoke", store=store, executor=serial).verdict.word
        == "not tested"
    )


def test_a_finished_cell_never_runs_twice(write, store, serial):
    ref = load_trial(write())
    run_trial(ref, store=store, executor=serial, seeds=5)
    assert len(serial.ran) == 10 + 1  # the leak check
    first = run_trial(ref, store=store, executor=serial)
    assert len(serial.ran) == 16 + 1
    again = run_trial(ref, store=store, executor=serial)
    assert len(serial.ran) == 16 + 1
    assert again == first
    assert store.results() == [first]


def test_seeds_complete_early(write, store, serial):
    run_trial(load_trial(write()), store=store, executor=serial, check_leaks=False)
    assert [t.cell.seed for t in serial.ran] == [s for s in range(8) for _ in range(2)]


def test_the_longer_arm_goes_first(write, store, serial):
    class Measured:
        workers = 1

        def run(self, source, stop):
            for task, outcome in serial.run(source, stop):
                yield task, replace(outcome, seconds=9.0 if task.cell.arm == "method" else 1.0)

        def close(self):
            pass

    run_trial(load_trial(write()), store=store, executor=Measured(), check_leaks=False)
    assert [t.cell.arm for t in serial.ran][2:] == ["method", "base"] * 7


def test_an_edited_run_is_run_again_and_a_comment_is_not(write, store, serial):
    body = trial_with('return {"accuracy": seed * 0.1 + len(arm)}')
    run_trial(load_trial(write(body)), store=store, executor=serial)
    count = len(serial.ran)
    run_trial(load_trial(write(body + "# nothing new\n")), store=store, executor=serial)
    assert len(serial.ran) == count
    changed = load_trial(write(body.replace("0.1", "0.2")))
    run_trial(changed, store=store, executor=serial)
    assert len(serial.ran) == 2 * count


def test_code_that_changes_under_way_is_refused(write, store, serial):
    ref = load_trial(write(trial_with('return {"accuracy": seed}')))
    edit = trial_with('return {"accuracy": seed + 1}')
    with pytest.raises(TrialError, match=r"toy\.py: the code was edited after the trial had started"):
        run_trial(
            ref, store=store, executor=serial, on_event=lambda e: isinstance(e, Started) and write(edit)
        )
    assert store.results() == []


def test_events(write, store, serial):
    events = []
    run_trial(load_trial(write()), store=store, executor=serial, on_event=events.append)
    started, finished = events[0], events[-1]
    assert (started.total, started.cached, started.size, started.phase) == (16, 0, "full", "run")
    cells = [e for e in events if isinstance(e, CellFinished)]
    assert [e.done for e in cells] == list(range(1, 17))
    assert cells[-1].remaining == 0
    assert set(cells[-1].scores) == {"base", "method"}
    assert sum(isinstance(e, LeakChecked) for e in events) == 1
    assert isinstance(finished, Finished)
    assert finished.ran == 16


# --- runs that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return {'loss': 1.0}", r"run returned no metric 'accuracy', got 'loss'\. Add it"),
        ("return {}", r"run returned no metric 'accuracy', got none"),
        (
            "return 0.5",
            r"run must return a mapping of metrics, got float\. Return a mapping such as \{'acc",
        ),
        ("return None", r"run must return a mapping of metrics, got NoneType"),
        (
            "return {'accuracy': 'high'}",
            r"metric 'accuracy' must be a number, got 'high'\. Return float\(value\)",
        ),
        ("return {'accuracy': True}", r"metric 'accuracy' must be a number, got True"),
        ("return {'accuracy': [1, 2]}", r"metric 'accuracy' must be a number, got \[1, 2\]"),
    ],
)
def test_a_broken_contract_ends_the_trial_at_once(write, store, serial, body, message):
    ref = load_trial(write(trial_with(body)))
    pattern = rf"toy\.py: arm 'base', seed 0: {message}"
    with pytest.raises(TrialError, match=pattern):
        run_trial(ref, store=store, executor=serial)
    assert len(serial.ran) == 1
    with pytest.raises(TrialError, match=pattern):
        run_trial(ref, store=store, executor=serial)
    assert len(serial.ran) == 1


def test_numbers_of_numpy_and_torch_are_numbers(write, store, serial):
    body = "import numpy, torch; return {'accuracy': torch.tensor([0.5]), 'b': numpy.float32(2), 'c': torch.tensor(3)}"
    result = run_trial(load_trial(write(trial_with(body))), store=store, executor=serial)
    assert result.cells[0].metrics == {"accuracy": 0.5, "b": 2.0, "c": 3.0}


def test_an_exception_everywhere_ends_early_with_its_traceback(write, store, serial):
    ref = load_trial(write(trial_with("raise KeyError('width')")))
    with pytest.raises(
        TrialError, match=r"toy\.py: arm '.*', seed 1: run raised KeyError: 'width' \(line 4 of toy\.py\)"
    ) as e:
        run_trial(ref, store=store, executor=serial)
    assert "All of the first 3 runs failed" in str(e.value)
    assert "Traceback (most recent call last)" in e.value.traceback_text
    assert "\n" not in str(e.value)
    assert len(serial.ran) == 3


def test_single_failures_count_as_worst_and_stay(write, store, serial):
    unlucky = "if seed == 2 and arm == 'method': raise RuntimeError('unlucky')"
    body = f"{unlucky}\n    return {{'accuracy': 0.5 + seed % 3 / 10}}"
    ref = load_trial(write(trial_with(body)))
    result = run_trial(ref, store=store, executor=serial)
    assert result.scores("method")[2] == 0.0
    bad = [c for c in result.cells if c.status == "failed"]
    assert [(c.arm, c.seed) for c in bad] == [("method", 2)]
    assert "RuntimeError: unlucky" in bad[0].error
    assert "1 of method" in result.verdict.sentence
    count = len(serial.ran)
    run_trial(ref, store=store, executor=serial)
    assert len(serial.ran) == count
    run_trial(ref, store=store, executor=serial, retry_failed=True)
    assert [(t.cell.arm, t.cell.seed) for t in serial.ran[count:]] == [("method", 2)]


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')"])
def test_divergence_counts_as_worst(write, store, serial, value):
    body = f"return {{'accuracy': {value} if arm == 'method' else 0.5 + seed % 2 / 10}}"
    result = run_trial(load_trial(write(trial_with(body))), store=store, executor=serial)
    assert {c.status for c in result.cells if c.arm == "method"} == {"diverged"}
    assert set(result.scores("method").values()) == {0.0}
    assert result.verdict.word == "refuted"
    assert "8 of method" in result.verdict.sentence


@pytest.mark.parametrize("leave", ["raise SystemExit(0)", "raise KeyboardInterrupt"])
def test_leaving_is_failing(write, store, serial, leave):
    body = f"if seed == 1: {leave}\n    return {{'accuracy': seed}}"
    result = run_trial(load_trial(write(trial_with(body))), store=store, executor=serial)
    assert {c.seed for c in result.cells if c.status == "failed"} == {1}


LEAK = """
cache = []

def run(cfg, arm, hp, seed, log):
    cache.append(seed)
    return {"accuracy": 0.5 + len(cache) / 100, "seconds": 1.0}

trial = Trial(title="leaky", run=run, arms=Arms("base", "method"), primary=Metric("accuracy"))
"""


def test_state_that_leaks_between_seeds_is_found(write, store, serial):
    ref = load_trial(write(LEAK))
    values = r"metric 'accuracy' was 0\.51 in a fresh process and 0\.52"
    pattern = rf"toy\.py: arm 'base', seed 0: state leaks between runs: {values}"
    with pytest.raises(TrialError, match=pattern) as error:
        run_trial(ref, store=store, executor=serial)
    assert "Usual causes" in str(error.value)
    count = len(serial.ran)
    with pytest.raises(TrialError, match=pattern):
        run_trial(ref, store=store, executor=serial)
    assert len(serial.ran) == count
    assert run_trial(ref, store=store, executor=serial, check_leaks=False).size == "full"


def test_an_interrupted_leak_check_is_made_up_for(write, store, serial):
    ref = load_trial(write(LEAK.replace("cache.append(seed)", "pass")))
    run_trial(ref, store=store, executor=serial, check_leaks=False)
    count = len(serial.ran)
    run_trial(ref, store=store, executor=serial)
    assert [t.used for t in serial.ran[count:]] == [True]


GOOD = trial_with("return {}")
SECOND = f"two = Trial(title='2', run=run, {ARMS})\n"


# --- finding trials -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "name", "message"),
    [
        ("x = 1\n", "", "declares no Trial"),
        ("import no_such_module_at_all\n", "", "cannot be imported: ModuleNotFoundError"),
        (trial_with("return {}"), ":other", "has no trial 'other'. There is: main"),
        (trial_with("return {}"), ":mian", "has no trial 'mian'. Did you mean 'main'"),
        (GOOD + SECOND.replace("run=run", "run=run, name='two'"), "", "several trials: main, two"),
        (GOOD + SECOND, "", "two trials are named 'main'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_told(write, body, name, message):
    with pytest.raises(TrialError) as error:
        load_trial(f"{write(body)}{name}")
    assert message in str(error.value)
    assert "toy.py" in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TrialError, match="there is no file"):
        load_trial(tmp_path / "none.py")


def test_a_trial_is_chosen_by_name(write):
    second = trial_with("return {}") + "two = Trial(title='2', run=run, name='two', " + ARMS + ")\n"
    assert load_trial(f"{write(second)}:two").name == "two"


def test_unknown_rooms_sizes_seeds_and_executors(write, store, serial):
    with pytest.raises(TrialError, match="unknown room 'no_such_room'"):
        studies_of("no_such_room")
    with pytest.raises(TrialError, match="unknown room"):
        load_study("../../etc")
    ref = load_trial(write())
    with pytest.raises(TrialError, match=r"has no size 'ful'\. Did you mean 'full'"):
        run_trial(ref, size="ful", store=store, executor=serial)
    for seeds in (0, 9, -1):
        with pytest.raises(TrialError, match=f"seeds must be 1 to 8, the declared number, got {seeds}"):
            run_trial(ref, store=store, executor=serial, seeds=seeds)
    with pytest.raises(TrialError, match="no tuning seeds"):
        run_trial(ref, store=store, executor=serial, seeds=[1, 100])
    with pytest.raises(TrialError, match=r"executor 'ray' needs the extra pullback\[ray\]"):
        make_executor("ray")
    with pytest.raises(TrialError, match="unknown executor 'slurm'"):
        make_executor("slurm")
    with pytest.raises(ValueError, match="workers must be >= 1, got 0"):
        make_executor("local", 0)


def test_a_declaration_costs_no_heavy_import():
    code = (
        "import sys, pullback.lab.declare, pullback.lab, pullback.lab.engine.run\n"
        "heavy = {'torch', 'scipy', 'matplotlib', 'statsmodels'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_public_name_can_be_had():
    import pullback.lab
    import pullback.lab.engine

    for module in (pullback.lab, pullback.lab.engine):
        assert all(getattr(module, name) is not None for name in module.__all__)
        assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pullback.lab.nothing


def test_results_can_be_read_without_the_file(write, store, serial):
    path = write()
    result = run_trial(load_trial(path), store=store, executor=serial)
    path.unlink()
    with Store(store.path, read_only=True) as reader:
        assert reader.results() == [result]


def test_a_negative_zero_reads_back_as_it_was_hashed(write, store, serial):
    body = "log.value('loss', -0.0, 0); return {'accuracy': -0.0 if seed else 1.0}"
    ref = load_trial(write(trial_with(body)))
    first = run_trial(ref, store=store, executor=serial)
    assert run_trial(ref, store=store, executor=serial) == first
