"""What a trial and a study declare before they run: arms, metric, claim, tuning and seeds.

Everything here is a frozen dataclass of plain values, so that a declaration can be hashed, printed and compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np

Scalar: TypeAlias = float | int | str | bool
"""A hyperparameter's value."""

Hyperparameters: TypeAlias = Mapping[str, Scalar]


@runtime_checkable
class Log(Protocol):
    """Where one training run writes what it wants to keep besides its final metrics."""

    def value(self, name: str, value: float, step: int) -> None:
        """Keep one point of the curve ``name`` at ``step``."""

    def array(self, name: str, array: np.ndarray) -> None:
        """Keep a small array (at most 1 MB) for a figure; the last one of a name wins."""


Run: TypeAlias = Callable[[Any, str, Hyperparameters, int, Log], Mapping[str, float]]
"""``run(cfg, arm, hp, seed, log) -> metrics``: one training run, with no globals."""


# --- checks --------------------------------------------------------------------------------------------------------


def _of(where: str, value: object, types: type | tuple[type, ...], fix: str) -> None:
    """Refuse a field of another type, in the file that declares it and before anything has run."""
    wanted = types if isinstance(types, tuple) else (types,)
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        names = " or ".join(each.__name__ for each in wanted)
        raise TypeError(f"{where} must be of type {names}, got {value!r:.80}. {fix}")


def _word(where: str, value: object) -> None:
    """Refuse a name that is empty, or that no file and no database can hold."""
    _of(where, value, str, "Give it a short text.")
    text = str(value)
    if not text.strip() or any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"{where} must be a text of ordinary characters, got {value!r:.80}. Rename it.")


# --- arms ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arms:
    """The arms of a trial and the part each one plays.

    Args:
        baseline: what the user has today.
        method: what is claimed to be better.
        rivals: trivial alternatives that must be beaten as well; a method that is not better than a rival is
            reported as 'supported, but reduces to <rival>'.
        ceiling: the arm that bounds what is possible (for example: trained on the target's labels), if any.
        others: arms that are shown and that secondary claims may name.
    """

    baseline: str
    method: str
    rivals: tuple[str, ...] = ()
    ceiling: str | None = None
    others: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field_name in ("rivals", "others"):
            _of(
                f"Arms.{field_name}", getattr(self, field_name), (tuple, list), "Write ('name',) for one arm."
            )
        names = self.names()
        for name in names:
            _word("the name of an arm", name)
        if len(set(names)) != len(names):
            raise ValueError(f"arms must have distinct names, got {list(names)}. Rename the repeated one.")

    def names(self) -> tuple[str, ...]:
        """All arms in the order in which they are shown."""
        ceiling = () if self.ceiling is None else (self.ceiling,)
        return (self.baseline, *self.rivals, *self.others, self.method, *ceiling)

    def role(self, arm: str) -> str:
        """``baseline``, ``method``, ``rival``, ``ceiling`` or ``other``."""
        fixed = {self.baseline: "baseline", self.method: "method", self.ceiling: "ceiling"}
        return fixed.get(arm) or ("rival" if arm in self.rivals else "other")


# --- what is measured and claimed ----------------------------------------------------------------------------------


_NOT_GIVEN = math.nan  # known by its identity


@dataclass(frozen=True)
class Metric:
    """One number that a run returns.

    Args:
        name: key in the mapping that ``run`` returns.
        better: ``"higher"`` or ``"lower"``.
        unit: how the number is shown, for example ``"fraction"`` (printed as per cent) or ``"nats"``.
        worst: the score that a failed, diverged or timed-out run is given: 0 where higher is better, unless you say
            otherwise; where lower is better 0 would be the best one, so that you must give it.
    """

    name: str
    better: Literal["higher", "lower"] = "higher"
    unit: str = ""
    worst: float = _NOT_GIVEN

    def __post_init__(self) -> None:
        _word("Metric.name", self.name)
        if self.worst is _NOT_GIVEN:
            if self.better == "lower":
                raise ValueError(
                    f"Metric.worst must be given where lower is better, got nothing for {self.name!r:.80}. "
                    "Give the score that a run which failed deserves, for example that of guessing."
                )
            object.__setattr__(self, "worst", 0.0)
        if self.better not in ("higher", "lower"):
            raise ValueError(
                f"Metric.better must be 'higher' or 'lower', got {self.better!r:.80}. Choose one."
            )
        _of("Metric.worst", self.worst, (int, float), "Give the score of a run that failed.")


@dataclass(frozen=True)
class Greater:
    """Claim: ``arm`` is better than ``than`` by more than ``by`` (in the metric's unit, always >= 0)."""

    arm: str
    than: str
    by: float = 0.0
    metric: Metric | None = None  # None: the trial's primary metric

    def __post_init__(self) -> None:
        _of("Greater.by", self.by, (int, float), "Give the margin in the metric's unit.")
        _of(
            "Greater.metric", self.metric, (Metric, type(None)), "Give a Metric, or None for the primary one."
        )


@dataclass(frozen=True)
class Equivalent:
    """Claim: ``arm`` and ``than`` differ by less than ``within`` (two one-sided tests)."""

    arm: str
    than: str
    within: float
    metric: Metric | None = None

    def __post_init__(self) -> None:
        _of("Equivalent.within", self.within, (int, float), "Give the margin in the metric's unit.")
        _of(
            "Equivalent.metric",
            self.metric,
            (Metric, type(None)),
            "Give a Metric, or None for the primary one.",
        )


Claim: TypeAlias = Greater | Equivalent


@dataclass(frozen=True)
class PaperResult:
    """The paper's own numbers, shown beside ours and never merged with them."""

    where: str
    setting: str
    baseline: float | None = None
    method: float | None = None
    ceiling: float | None = None
    note: str = ""


# --- tuning and seeds ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogUniform:
    """Values between ``low`` and ``high``, uniform in the logarithm."""

    low: float
    high: float


@dataclass(frozen=True)
class Uniform:
    """Values between ``low`` and ``high``."""

    low: float
    high: float


@dataclass(frozen=True)
class Choice:
    """One of ``values``, in their natural order (so that an optimum at either end is noticed)."""

    values: tuple[Scalar, ...]


Domain: TypeAlias = LogUniform | Uniform | Choice


@dataclass(frozen=True)
class Tune:
    """An equal tuning budget for every arm.

    Args:
        trials: number of quasi-random points per arm, the same for all arms.
        select: the metric by which the best point is chosen; it must not use test data.
        shared: domains that every arm tunes (all arms get the same points).
        only: further domains of single arms, by arm.
        size: the size of the trial at which tuning runs.
    """

    trials: int
    select: Metric
    shared: Mapping[str, Domain] = field(default_factory=dict)
    only: Mapping[str, Mapping[str, Domain]] = field(default_factory=dict)
    size: str = "full"

    def __post_init__(self) -> None:
        _of("Tune.trials", self.trials, int, "Give the number of points of each arm.")
        _of("Tune.select", self.select, Metric, "Write Metric('name').")
        for name, domain in (*self.shared.items(), *(d for own in self.only.values() for d in own.items())):
            _of(
                f"the domain of {name!r}",
                domain,
                (LogUniform, Uniform, Choice),
                "Write Choice((1, 2)), for example.",
            )


@dataclass(frozen=True)
class Seeds:
    """Paired seeds of the test runs and the disjoint seeds of the tuning runs."""

    test: tuple[int, ...] = tuple(range(8))
    tune: tuple[int, ...] = (100, 101)

    def __post_init__(self) -> None:
        object.__setattr__(self, "test", tuple(self.test))
        object.__setattr__(self, "tune", tuple(self.tune))
        for seed in (*self.test, *self.tune):
            _of("a seed", seed, int, "Use whole numbers such as range(8).")
            if not -(2**63) <= seed < 2**63:
                raise ValueError(f"a seed must lie within 64 bits, got {seed}. Use numbers such as range(8).")
        both = sorted(set(self.test) & set(self.tune))
        if both:
            raise ValueError(
                f"tuning seeds and test seeds must be disjoint, got {both} in both. Change Seeds.tune."
            )


# --- figures -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairedSeeds:
    """Every seed of every arm as a point, the same seed joined by a line across arms."""

    metric: str | None = None  # None: the primary metric
    caption: str = ""


@dataclass(frozen=True)
class Curves:
    """A logged value against the step, faint per seed and bold in the mean, one colour per arm."""

    y: str
    x: str = "step"
    arms: tuple[str, ...] = ()  # empty: all arms
    caption: str = ""


@dataclass(frozen=True)
class Drawing:
    """A figure of the study's own: ``draw(result)`` gets the `TrialResult` and returns a matplotlib figure."""

    name: str
    draw: Callable[[Any], Any]
    caption: str = ""


Figure: TypeAlias = PairedSeeds | Curves | Drawing


# --- the declaration -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A paired comparison, declared before it runs.

    Args:
        title: one line that says what is compared.
        run: one training run (see `Run`).
        arms: the arms and their roles.
        primary: the metric on which the verdict rests.
        name: short identifier, used in file names and on the command line.
        sizes: the configuration that ``run`` gets as ``cfg``, by size; ``smoke`` gives no verdict.
        hp: default hyperparameters by arm; the key ``"*"`` holds for all arms.
        tune: how the arms are tuned, or None.
        seeds: test and tuning seeds.
        claim: the claim; None means that the method is better than the baseline.
        also: secondary claims, each with its own verdict.
        timeout: seconds after which one run is stopped and counted as failed.
        figures: figures of the page, in order.
    """

    title: str
    run: Run
    arms: Arms
    primary: Metric
    name: str = "main"
    sizes: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({"full": None}))
    hp: Mapping[str, Hyperparameters] = field(default_factory=dict)
    tune: Tune | None = None
    seeds: Seeds = field(default_factory=Seeds)
    claim: Claim | None = None
    also: tuple[Claim, ...] = ()
    timeout: float = 600.0
    figures: Sequence[Figure] = (PairedSeeds(),)

    def __post_init__(self) -> None:
        _word("Trial.title", self.title)
        _word("Trial.name", self.name)
        _of("Trial.arms", self.arms, Arms, "Write Arms(baseline=..., method=...).")
        _of("Trial.primary", self.primary, Metric, "Write Metric('name').")
        _of("Trial.seeds", self.seeds, Seeds, "Write Seeds(test=..., tune=...).")
        _of("Trial.timeout", self.timeout, (int, float), "Give seconds.")
        _of("Trial.tune", self.tune, (Tune, type(None)), "Write Tune(trials=..., select=...), or None.")
        _of(
            "Trial.claim",
            self.claim,
            (Greater, Equivalent, type(None)),
            "Write Greater(...) or Equivalent(...).",
        )
        for field_name in ("sizes", "hp"):
            _of(f"Trial.{field_name}", getattr(self, field_name), Mapping, "Write {name: value}.")
        for claim in self.also:
            _of(
                "a claim in Trial.also",
                claim,
                (Greater, Equivalent),
                "Write Greater(...) or Equivalent(...).",
            )
        for figure in self.figures:
            _of("a figure", figure, (PairedSeeds, Curves, Drawing), "Write PairedSeeds() or Curves('name').")
        for arm, values in self.hp.items():
            _of(f"Trial.hp[{arm!r}]", values, Mapping, "Write {arm: {name: value}}.")
        if not callable(self.run):
            raise TypeError(
                f"Trial.run must be a function, got {self.run!r:.80}. Pass it without calling it."
            )

    def main_claim(self) -> Claim:
        """The declared claim, or the default one: the method is better than the baseline."""
        return self.claim or Greater(self.arms.method, than=self.arms.baseline)

    def hyperparameters(self, arm: str) -> dict[str, Scalar]:
        """Default hyperparameters of ``arm``."""
        return {**self.hp.get("*", {}), **self.hp.get(arm, {})}


@dataclass(frozen=True, kw_only=True)
class Study(Trial):
    """A trial that ships with a room and carries a paper's claim.

    Args:
        room: the room's folder name.
        paper: the paper's own result.
        refuted_if: in words, what outcome would refute the claim.
        cannot_test: in words, what of the paper this study cannot reach.
        deviations: what differs from the paper's experiment, in words.
        extras: names of the package's extras without which the study cannot run; where one is missing, the commands
            leave the study out and say what to install.
    """

    room: str
    paper: PaperResult
    refuted_if: str
    cannot_test: str = ""
    deviations: str = ""
    extras: tuple[str, ...] = ()
