"""Equal budgets: who tries what, who wins, and how it is written down."""

import tomllib
from itertools import pairwise

import numpy as np
import pytest

from pullback.lab import Arms, Choice, LogUniform, Metric, Trial, Tune, Uniform, load_trial, tune_trial
from pullback.lab.engine import TrialError
from pullback.lab.tuning import (
    edges,
    points_of,
    ranked,
    read_tuned,
    settings_of,
    trace_hash,
    value_at,
    write_tuned,
)

SELECT = Metric("val")
TUNE = Tune(
    trials=16,
    select=SELECT,
    shared={"lr": LogUniform(1e-4, 1.0), "wd": Uniform(-1.0, 3.0)},
    only={"b": {"k": Choice((1, 2, 4, 8))}, "c": {"q": Uniform(0.0, 1.0)}},
)


def test_shared_values_are_the_same_in_all_arms():
    a, b, c = (points_of(TUNE, arm) for arm in "abc")
    assert (
        [(p["lr"], p["wd"]) for p in a] == [(p["lr"], p["wd"]) for p in b] == [(p["lr"], p["wd"]) for p in c]
    )
    assert len(a) == len(b) == len(c) == 16
    assert points_of(TUNE, "b") == b


def test_points_fill_their_domain_evenly():
    lr = np.sort(np.log10([p["lr"] for p in points_of(TUNE, "a")]))
    assert (lr >= -4).all()
    assert (lr <= 0).all()
    assert max(b - a for a, b in pairwise([-4, *lr, 0])) < 4 * 3 / 16
    assert all(-1 <= p["wd"] <= 3 for p in points_of(TUNE, "a"))


def test_each_choice_is_tried_equally_often():
    tried = [p["k"] for p in points_of(TUNE, "b")]
    assert {k: tried.count(k) for k in (1, 2, 4, 8)} == {1: 4, 2: 4, 4: 4, 8: 4}


def test_every_choice_meets_the_whole_range_of_a_shared_value():
    tune = Tune(
        trials=24, select=SELECT, shared={"x": Uniform(0.0, 1.0)}, only={"b": {"k": Choice((1, 2, 3, 4))}}
    )
    points = points_of(tune, "b")
    for k in (1, 2, 3, 4):
        met = [p["x"] for p in points if p["k"] == k]
        assert min(met) < 0.35
        assert max(met) > 0.65


def test_few_choices_are_enumerated():
    tune = Tune(
        trials=9, select=SELECT, shared={"x": Choice((1, 2))}, only={"b": {"y": Choice(("u", "v", "w"))}}
    )
    assert points_of(tune, "a") == [{"x": 1}, {"x": 2}]
    assert points_of(tune, "b") == [{"x": x, "y": y} for x in (1, 2) for y in "uvw"]


def test_an_arm_without_domains_is_not_tuned():
    assert points_of(Tune(trials=3, select=SELECT, only={"b": {"x": Choice((1,))}}), "a") == []


def test_values_at_the_ends():
    assert value_at(LogUniform(0.01, 1.0), 0.5) == pytest.approx(0.1)
    assert value_at(Uniform(2.0, 4.0), 0.25) == 2.5
    assert value_at(Choice(("a", "b")), 1.0) == "b"


@pytest.mark.parametrize(
    "domain", [LogUniform(0.0, 1.0), LogUniform(2.0, 1.0), Uniform(1.0, 1.0), Choice(())]
)
def test_empty_domains_are_refused(domain):
    with pytest.raises(TrialError, match="the domain of 'x'"):
        points_of(Tune(trials=2, select=SELECT, shared={"x": domain}), "a")


def test_edges():
    domains = {"lr": LogUniform(1e-3, 1.0), "k": Choice((1, 2, 3)), "two": Choice((0, 1))}
    tried = [{"hp": {"lr": v, "k": 1, "two": 0}} for v in (0.01, 0.1, 0.5)]
    assert edges(domains, {"lr": 0.1, "k": 2, "two": 0}, tried) == ()
    assert edges(domains, {"lr": 0.5, "k": 1, "two": 1}, tried) == ("lr", "k")
    assert edges({"lr": domains["lr"]}, {"lr": 0.0011}, [*tried, {"hp": {"lr": 0.00105}}]) == ("lr",)


def test_equal_scores_choose_a_point_inside():
    domains = {"lr": Choice((1, 2, 3, 4))}
    tried = [{"hp": {"lr": v}, "score": s} for v, s in ((1, 0.5), (2, 0.5), (3, 0.5), (4, 0.4))]
    assert [p["hp"]["lr"] for p in ranked(domains, tried, [0] * 4, 1.0)] == [2, 3, 1, 4]
    assert [p["hp"]["lr"] for p in ranked(domains, tried, [0] * 4, -1.0)] == [4, 2, 3, 1]
    assert [p["hp"]["lr"] for p in ranked(domains, tried, [0, 1, 1, 0], 1.0)] == [1, 2, 3, 4]


# --- tuned.toml ---------------------------------------------------------------------------------------------------


def test_tuned_values_are_exact_sorted_and_beside_others(tmp_path):
    path = tmp_path / "tuned.toml"
    write_tuned(path, "second", {"x": {"lr": 1e-17, "on": True}}, "h2")
    write_tuned(path, "main", {'sgd+"noise"': {"lr": 0.1 + 0.2, "k": 3, "name": 'a"\\é'}, "a": {}}, "h1")
    document = tomllib.loads(path.read_text())
    assert document["main"] == {
        "trace_sha256": "h1",
        'sgd+"noise"': {"lr": 0.1 + 0.2, "k": 3, "name": 'a"\\é'},
        "a": {},
    }
    assert document["second"] == {"trace_sha256": "h2", "x": {"lr": 1e-17, "on": True}}
    before = path.read_text()
    write_tuned(path, "second", {"x": {"on": True, "lr": 1e-17}}, "h2")
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["tuned.toml"]


def test_broken_tuned_values_are_named(tmp_path):
    path = tmp_path / "tuned.toml"
    path.write_text("a = = 1")
    with pytest.raises(TrialError, match=r"tuned\.toml cannot be read"):
        read_tuned(path)
    path.write_text("a = 1")
    with pytest.raises(TrialError, match=r"tuned\.toml must hold one table per study"):
        read_tuned(path)
    with pytest.raises(TrialError, match="cannot be written"):
        write_tuned(tmp_path / "none" / "tuned.toml", "main", {}, "")


def test_defaults_are_used_and_said_so():
    trial = Trial(
        title="t",
        run=print,
        arms=Arms("a", "b"),
        primary=SELECT,
        tune=TUNE,
        hp={"*": {"lr": 1}, "b": {"k": 2}},
    )
    settings = settings_of(trial)
    assert settings.hp == {"a": {"lr": 1}, "b": {"lr": 1, "k": 2}}
    assert not settings.tuned
    assert "as declared" in settings.note


# --- the run ------------------------------------------------------------------------------------------------------

TOY = """
def run(cfg, arm, hp, seed, log):
    if seed < 100:
        raise AssertionError("a test seed was used for tuning")
    if hp["lr"] > 0.5:
        raise RuntimeError("too high")
    return {"val": -abs(hp["lr"] - 0.1) + 0.001 * seed, "test": hp["lr"]}

trial = Trial(title="t", run=run, arms=Arms("a", "b"), primary=Metric("test"), sizes={"full": 0}, hp={"b": {"z": 1}},
    tune=Tune(trials=8, select=Metric("val", worst=-99.0), shared={"lr": LogUniform(1e-3, 1.0)}))
"""


def test_the_best_mean_wins_and_failures_count_as_worst(write, store, serial, tmp_path):
    ref = load_trial(write(TOY))
    tuned = tune_trial(ref, store=store, executor=serial, folder=tmp_path)
    trace = tuned.traces["a"]
    assert len(trace) == 8
    assert {t.cell.seed for t in serial.ran} == {100, 101}
    assert len(serial.ran) == 32
    best = min((p["hp"]["lr"] for p in trace), key=lambda lr: abs(lr - 0.1))
    assert trace[0]["hp"]["lr"] == best
    assert trace[0]["score"] == pytest.approx(-abs(best - 0.1) + 0.1005)
    assert trace[-1]["score"] == -99.0
    assert trace[-1]["hp"]["lr"] > 0.5
    assert tuned.hp["b"] == {"z": 1, "lr": best}
    assert tomllib.loads(tuned.path.read_text())["main"] == {
        "trace_sha256": tuned.trace_sha256,
        "a": {"lr": best},
        "b": {"lr": best},
    }
    assert store.tuning(ref.label, tuned.trace_sha256)["traces"]["a"] == trace
    again = tune_trial(ref, store=store, executor=serial)
    assert len(serial.ran) == 32
    assert again.path is None
    assert again.trace_sha256 == tuned.trace_sha256 == trace_hash(tuned.traces)


def test_a_trial_without_tuning_says_so(write, store, serial):
    with pytest.raises(TrialError, match=r"toy\.py:main declares no tuning"):
        tune_trial(load_trial(write()), store=store, executor=serial)


DIVERGING = """
def run(cfg, arm, hp, seed, log):
    return {"accuracy": 1.0, "val": float("nan") if arm == "method" else hp["lr"]}

trial = Trial(title="toy", run=run, arms=Arms("base", "method"), primary=Metric("accuracy"), seeds=Seeds(tune=(100,)),
              tune=Tune(trials=4, select=Metric("val"), shared={"lr": Uniform(0.0, 1.0)}))
"""


def test_a_choice_among_diverged_runs_is_called_none(write, serial, store):
    tuned = tune_trial(load_trial(write(DIVERGING)), store=store, executor=serial)
    assert any(warning.startswith("method: no run ended well") for warning in tuned.warnings)
    assert not any(warning.startswith("base: no run ended well") for warning in tuned.warnings)


def test_points_that_diverge_are_never_better_than_points_that_do_not(write, serial, store):
    body = DIVERGING.replace(
        'float("nan") if arm == "method" else hp["lr"]', 'float("nan") if hp["lr"] > 0.5 else -9'
    )
    tuned = tune_trial(load_trial(write(body)), store=store, executor=serial)
    assert all(
        values["lr"] <= 0.5 for values in tuned.hp.values()
    )  # although Metric.worst is 0 and -9 is below it


def test_tuning_needs_seeds_and_domains(write, serial, store):
    with pytest.raises(TrialError, match=r"tuning needs seeds of its own, got none"):
        tune_trial(load_trial(write(DIVERGING.replace("(100,)", "()"))), store=store, executor=serial)
    with pytest.raises(TypeError, match="the domain of 'lr' must be of type LogUniform or Uniform or Choice"):
        Tune(trials=4, select=SELECT, shared={"lr": (0.1, 1.0)})
    with pytest.raises(TypeError, match=r"Tune\.trials must be of type int, got 4\.5"):
        Tune(trials=4.5, select=SELECT)
