"""Synthetic results: no number here was measured."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from pullback.lab.result import ArmResult, CellResult, Comparison, TrialResult, Verdict

MEANS = {"source only": 0.52, "shuffled": 0.55, "dann": 0.88, "train on target": 0.96}
ROLES = {"source only": "baseline", "shuffled": "rival", "dann": "method", "train on target": "ceiling"}


def synthetic(
    room: str | None = "dann",
    name: str = "main",
    *,
    word: str = "supported",
    size: str = "full",
    means: dict[str, float] = MEANS,
    fail: tuple[str, int] | None = ("dann", 5),
    p: float = 0.0039,
    text: str = "",
    **changes: object,
) -> TrialResult:
    """A trial of four arms and eight seeds; ``text`` replaces every free text and every name."""

    def said(default):
        return text or default

    renamed = {arm: f"{text}{i}" if text else arm for i, arm in enumerate(means)}
    rng = np.random.default_rng(len(name) + len(str(room)))
    noise = rng.normal(0, 0.012, 8)
    cells, arms = [], []
    for arm, mean in means.items():
        role = ROLES.get(arm, "other")
        points = [
            {"hp": {"lr": 10 ** rng.uniform(-3, -0.5), said("lam"): float(rng.uniform(0, 2))},
             "score": float(mean - rng.exponential(0.05)), "seconds": 4.0}
            for _ in range(9)
        ]  # fmt: skip
        points.sort(key=lambda point: -point["score"])
        edge = (said("lam"),) if role == "rival" else ()
        arms.append(ArmResult(renamed[arm], role, points[0]["hp"], points, edge))
        for seed in range(8):
            failed = fail == (arm, seed)
            steps = list(range(0, 200, 10))
            value = float(mean + noise[seed] + rng.normal(0, 0.008))
            curve = [float(0.1 + (value - 0.1) * (1 - math.exp(-s / 40))) for s in steps]
            cells.append(
                CellResult(
                    arm=renamed[arm], seed=seed, hp=points[0]["hp"], status="diverged" if failed else "done",
                    metrics={} if failed else {"target_accuracy": value, "source_accuracy": 0.99}, seconds=41.0,
                    key=f"{arm}{seed}", error=said("loss became NaN at step 120") if failed else "",
                    curves={} if failed else {"target_accuracy": (steps, curve)},
                    arrays={"image": rng.random((8, 8))} if seed == 0 else {},
                )
            )  # fmt: skip
    metric = {"name": "target_accuracy", "better": "higher", "unit": "fraction", "worst": 0.1}
    other = {"name": "source_accuracy", "better": "higher", "unit": "fraction", "worst": 0.1}
    base, rival, method, _ = renamed.values()

    def compare(role, than, difference, found, **more):
        fields = {
            "kind": "greater", "role": role, "arm": method, "than": than, "metric": "target_accuracy", "margin": 0.0,
            "n": 8, "difference": difference, "low": difference - 0.05, "high": difference + 0.05, "p": p,
            "effect": difference / 0.06, "wins": 0.875, "word": found,
        }  # fmt: skip
        return Comparison(**{**fields, **more})

    comparisons = [
        compare("claim", base, means["dann"] - means["source only"], word),
        compare("rival", rival, means["dann"] - means["shuffled"], word),
        compare("also", base, -0.004, "supported", kind="equivalent", metric="source_accuracy", margin=0.02, low=-0.011,
                high=0.003),
    ]  # fmt: skip
    declaration = {
        "primary": metric,
        "metrics": {m["name"]: m for m in (metric, other)},
        "claim": {"kind": "greater", "arm": method, "than": base, "margin": 0.05, "metric": "target_accuracy"},
        "also": [],
        "paper": {"where": said("Table 2, first row"), "setting": said("MNIST to MNIST-M"), "baseline": 0.5225,
                  "method": 0.7666, "ceiling": 0.9596, "note": said("One run.")} if room else None,
        "refuted_if": said("the 95 % interval of the paired difference lies below 5 points"),
        "cannot_test": said("The street view data sets of the paper do not ship with the library."),
        "deviations": said("Adam instead of SGD; the photographs come from another collection."),
        "seeds": {"test": list(range(8)), "tune": [100, 101]},
        "tuning": None, "tuned": True, "note": "", "file": None if room else said("mine.py"),
        "figures": [{"type": "PairedSeeds", "metric": None, "caption": text},
                    {"type": "Curves", "y": "target_accuracy", "x": said("step"), "arms": (), "caption": text}],
    }  # fmt: skip
    fields = {
        "room": room, "name": name, "title": said("Digits on photographs from plain digits"), "size": size,
        "claim_hash": "c0ffee" * 10, "code_hash": "beef" * 16, "declaration": declaration, "arms": arms, "cells": cells,
        "comparisons": comparisons,
        "verdict": Verdict(word, said(
            "Target accuracy of dann is 36.00 percentage points higher than that of source only "
            "(95 % interval 31.00 to 41.00 percentage points, 8 paired seeds, p = 0.0039, better in 8 of 8): "
            "dann is better by more than 5."
        )),
        "provenance": {"packages": {"torch": "2.13.0", "numpy": "2.2.0"}, "python": "3.11.9", "cpu": said("synthetic"),
                       "command": said("pullback study dann")},
    }  # fmt: skip
    return TrialResult(**{**fields, **changes})


def several() -> dict[str | None, list[TrialResult]]:
    """Rooms with different verdicts and one trial of a user's own."""
    low = {**MEANS, "dann": 0.49}
    same = {**MEANS, "dann": 0.54}
    return {
        "dann": [synthetic(), synthetic(name="digits8x8", word="inconclusive", means=same, fail=None)],
        "gradient_noise": [synthetic("gradient_noise", word="refuted", means=low, fail=None, p=0.9)],
        "weak_method": [synthetic("weak_method", means=same, p=0.03)],
        None: [synthetic(None, "my_rates", size="smoke", word="not tested")],
    }


HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    "\"><svg onload=alert(3)>",
    "javascript:alert(4)",
    "\x1b[31mred\x1b[0m\x07",
    "\u202egnp.exe\u2066\u200f",
    "A" * 10_000,
    "{{ 7 * 7 }}{% raw %}",
    "$\\frac{1}{0}$ & <b>",
    "| [x](http://evil.example/) ![y](http://evil.example/y.png)",
    "../../etc/passwd",
    "\x00\ud800\uffff漢字",
)  # fmt: skip


def hostile() -> dict[str | None, list[TrialResult]]:
    """One trial per hostile text, which stands in every free field, in the arms' names and in the trial's name."""
    own = [filled_with(text) for text in HOSTILE]
    whole = synthetic("<b>room</b>", text=HOSTILE[1])  # tuning and its figure as well
    return {"<b>room</b>": [whole], None: own}


def light(room: str | None = "dann", name: str = "main", **changes: object) -> TrialResult:
    """A trial that is drawn fast: one figure, one comparison, no tuning."""
    result = synthetic(room, name, **changes)
    figures = result.declaration["figures"][:1]
    return replace(
        result,
        declaration={**result.declaration, "figures": figures},
        comparisons=result.comparisons[:1],
        arms=[replace(arm, tuning=[]) for arm in result.arms],
    )


def filled_with(text: str) -> TrialResult:
    """A trial without tuning that says ``text`` wherever a stranger can say anything."""
    result = synthetic(None, text, text=text, fail=("dann", 2))
    declaration = {**result.declaration, "figures": result.declaration["figures"][:1]}
    return replace(result, declaration=declaration, arms=[replace(arm, tuning=[]) for arm in result.arms])
