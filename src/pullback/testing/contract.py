"""Run the contract of a kind on one component."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from pullback.testing import (
    aggregators,
    fields,
    generic,
    layers,
    learners,
    objectives,
    optimizers,
    optimizers_torch,
    probes,
    recomputes,
    searches,
    shapes,
    signals,
    transforms,
    transforms_amp,
    transforms_state,
    transforms_trouble,
)
from pullback.testing.case import KINDS, Case
from pullback.testing.check import (
    BrokenContract,
    Check,
    ContractError,
    ContractReport,
    NotApplicable,
    Outcome,
    registered,
)
from pullback.testing.tools import keeping_rng

__all__ = ["check_component", "checks_for", "parametrize_with_checks", "run_check"]

_MODULES = (
    generic, shapes, signals, layers, objectives, aggregators, transforms, transforms_state, transforms_amp,
    transforms_trouble, optimizers, optimizers_torch, recomputes, probes, searches, learners, fields,
)  # fmt: skip
_REFUSALS = (TypeError, ValueError, RuntimeError, NotImplementedError)


def checks_for(kind: str) -> list[Check]:
    """The checks that every component of ``kind`` must pass.

    Args:
        kind: one of `KINDS`.

    Returns:
        The checks in the order in which they run.

    Raises:
        ValueError: if there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    return [each for each in registered() if kind in each.kinds]


def as_case(component: Any, kind: str | None = None, **about: Any) -> Case:
    """Describe a case, class, factory or instance by a `Case`.

    Args:
        component: a `Case`; or a class or function that makes the component (an optimizer's takes the
            parameters); or an instance, which is copied for every check.
        kind: one of `KINDS`; default: the component's own ``kind``.
        **about: further fields of `Case`.

    Returns:
        The case.

    Raises:
        ValueError: if the kind is neither given nor known to the component.
        TypeError: if a field is unknown.
    """
    if isinstance(component, Case):
        return replace(component, **about, **({} if kind is None else {"kind": kind}))
    build: Callable[..., Any]
    if isinstance(component, torch.optim.Optimizer):
        build = partial(_rebuilt, type(component), dict(component.defaults))
        found, name = "optimizer", type(component).__name__
    elif isinstance(component, type):
        build, found, name = component, getattr(component, "kind", None), component.__name__
        found = found or ("optimizer" if issubclass(component, torch.optim.Optimizer) else None)
    elif inspect.isroutine(component) or isinstance(component, partial):
        build = component
        made = component() if kind is None and not inspect.signature(component).parameters else None
        found = getattr(made, "kind", None)
        name = getattr(component, "__name__", "component") if made is None else type(made).__name__
    else:
        build, found = partial(copy.deepcopy, component), getattr(component, "kind", None)
        name = type(component).__name__
    chosen = kind or found
    if chosen is None:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got None. Pass kind=... for {name}.")
    fields_: dict[str, Any] = {"name": name, "kind": chosen, "build": build, **about}
    return Case(**fields_)


def _rebuilt(cls: type[torch.optim.Optimizer], defaults: dict[str, Any], params: Any) -> Any:
    accepted = inspect.signature(cls).parameters
    return cls(params, **{key: value for key, value in defaults.items() if key in accepted})


def refusals(case: Case) -> dict[str, str]:
    """Check id -> reason: what the component's class declares, then what the case adds."""
    made = case.build
    cls = made if isinstance(made, type) else None
    declared = getattr(cls, "refuses", None)
    if declared is None:
        with keeping_rng():
            declared = getattr(generic.built(case), "refuses", {})
    return {**dict(declared or {}), **dict(case.refuses)}


def run_check(check: Check, case: Case, *, refusal: str | None = None) -> Outcome:
    """Run one check on one component and say how it ended.

    Args:
        check: the check.
        case: the component.
        refusal: the reason for which the component declares that it cannot meet this part, or None.

    Returns:
        The outcome; a refusal that is declared but does not happen is a failure.
    """
    if refusal is not None and check.refusable == "no":
        return Outcome(check.id, "failed", f"cannot be refused ({refusal}): {check.says}")
    if refusal is not None and check.refusable == "declared":
        return Outcome(check.id, "refused", refusal)
    try:
        with keeping_rng(), warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.manual_seed(0)
            check.run(case)
    except NotApplicable as reason:
        return Outcome(check.id, "not applicable", str(reason))
    except BrokenContract as finding:
        silent = "" if refusal is None else f"declared as refused ({refusal}), but not refused by an error: "
        return Outcome(check.id, "failed", silent + str(finding))
    except (Exception, SystemExit) as error:
        text = f"{type(error).__name__}: {error}"
        if refusal is None:
            return Outcome(check.id, "failed", f"raised {text} (rule: {check.says})")
        if isinstance(error, _REFUSALS) and len(str(error)) >= 15:
            return Outcome(check.id, "refused", f"{refusal} [{text.splitlines()[0]}]")
        return Outcome(check.id, "failed", f"refused without a clear message: {text}")
    if refusal is not None:
        return Outcome(
            check.id, "failed", f"declared as refused ({refusal}), yet it works. Take it out of refuses."
        )
    return Outcome(check.id, "passed")


def check_component(
    component: Any,
    *,
    kind: str | None = None,
    skip: Mapping[str, str] | None = None,
    slow: bool = False,
    **about: Any,
) -> ContractReport:
    """Run every check of a kind's contract on a component, ours or yours.

    Args:
        component: a `Case`; or a class or function that makes the component (an optimizer's takes the
            parameters); or an instance, which is copied for every check.
        kind: one of `KINDS`; default: the component's own ``kind``.
        skip: check id -> reason, for checks that shall not run.
        slow: also run the checks that take seconds or start processes.
        **about: further fields of `Case`, for example ``neutral=...`` or ``inputs=...``.

    Returns:
        The outcome of every check; none is left out.

    Raises:
        ContractError: if a check failed; it lists every one, and ``error.report`` is the whole report.
        ValueError: if the kind is unknown, or ``skip`` or ``refuses`` name a check that the kind does not have.

    Example:
        >>> import torch
        >>> report = check_component(torch.nn.Tanh(), kind="layer")
        >>> report.count("failed")
        0
    """
    case = as_case(component, kind, **about)
    checks = checks_for(case.kind)
    skipped, refused = dict(skip or {}), refusals(case)
    for label, given in (("skip", skipped), ("refuses", refused)):
        _known(label, given, case.kind)
    outcomes = []
    for each in checks:
        if each.id in skipped:
            outcomes.append(Outcome(each.id, "skipped", skipped[each.id]))
        elif each.slow and not slow and each.id not in refused:
            outcomes.append(Outcome(each.id, "skipped", "slow: pass slow=True"))
        else:
            outcomes.append(run_check(each, case, refusal=refused.get(each.id)))
    report = ContractReport(case.name, case.kind, tuple(outcomes))
    if report.failed:
        raise ContractError(report)
    return report


def _known(label: str, given: Mapping[str, str], kind: str) -> None:
    """Refuse ids that name no check of this kind, and reasons that are empty."""
    known = {each.id for each in checks_for(kind)}
    for name, reason in given.items():
        if name not in known:
            listed = ", ".join(sorted(known))
            raise ValueError(f"{label} must name checks of kind {kind!r}, got {name!r}. There are {listed}.")
        if not str(reason).strip():
            raise ValueError(f"{label}[{name!r}] must give a reason, got {reason!r}.")


def parametrize_with_checks(cases: Iterable[Case]) -> Callable[[Any], Any]:
    """Make a pytest test run once per component and check.

    The test takes ``case`` and ``check`` and calls ``check(case)``; refusals, skips and checks that do not
    apply become pytest skips with their reasons, slow checks carry the mark ``slow``.

    Args:
        cases: the components.

    Returns:
        A decorator for the test function.
    """
    import pytest

    rows = [
        pytest.param(
            case,
            partial(_as_test, each),
            id=f"{case.name}-{each.id}",
            marks=[pytest.mark.slow] if each.slow else [],
        )
        for case in cases
        for each in checks_for(case.kind)
    ]
    return pytest.mark.parametrize(("case", "check"), rows)


def _as_test(check: Check, case: Case) -> None:
    import pytest

    refused = refusals(case)
    _known("refuses", refused, case.kind)
    outcome = run_check(check, case, refusal=refused.get(check.id))
    if outcome.status == "failed":
        raise ContractError(ContractReport(case.name, case.kind, (outcome,)))
    if outcome.status in {"refused", "not applicable"}:
        pytest.skip(f"{outcome.status}: {outcome.message}")
