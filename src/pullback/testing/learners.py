"""Checks of learners: they learn, they predict without labels, they leave no graph, bad batches leave no trace."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pullback.core.saved_bytes import SavedBytes
from pullback.testing.case import Case
from pullback.testing.check import BrokenContract, NotApplicable, check
from pullback.testing.exercise import built, is_estimator, state_of, toy
from pullback.testing.tools import expect_same, tensors


def _stepping(case: Case) -> Any:
    """A fresh learner that has ``step``."""
    component = built(case)
    if is_estimator(component):
        raise NotApplicable("a scikit-learn estimator: see scikit_learn")
    return component


def _trained(case: Case) -> tuple[Any, list[dict[str, float]]]:
    component, batch = _stepping(case), toy(case)
    return component, [dict(component.step(batch)) for _ in range(case.steps)]


@check("learner", refusable="no")
def losses_form(case: Case) -> None:
    """``step`` returns a mapping of names to finite floats."""
    losses = _stepping(case).step(toy(case))
    if not isinstance(losses, Mapping) or not losses:
        raise BrokenContract(f"step returned {type(losses).__name__}.", fix="Return {'loss': float}.")
    for name, value in losses.items():
        if not isinstance(value, float) or not math.isfinite(value):
            raise BrokenContract(f"step returned {name}={value!r}.", fix="Return finite Python floats.")


@check("learner", refusable="no")
def loss_falls(case: Case) -> None:
    """The first loss falls on a separable toy."""
    _, losses = _trained(case)
    name = next(iter(losses[0]))
    first, last = float(losses[0][name]), float(losses[-1][name])
    if not last < first:
        raise BrokenContract(f"{name} went from {first:.4g} to {last:.4g} in {case.steps} steps.")


@check("learner")
def separates(case: Case) -> None:
    """``predict`` gets the stated share of the toy right after training."""
    if case.accuracy is None:
        raise NotApplicable("no classifier")
    x, y = toy(case)
    component = built(case)
    component = component.fit(x, y) if is_estimator(component) else _trained(case)[0]
    answer = torch.as_tensor(component.predict(x))
    labels = answer.argmax(1) if answer.dim() == 2 and answer.shape[1] > 1 else answer.reshape(-1)
    share = (labels == torch.as_tensor(y)).double().mean().item()
    if share < case.accuracy:
        raise BrokenContract(f"predict gets {share:.2f} right, {case.accuracy:g} is promised.")


@check("learner", refusable="no")
def predict_takes_no_labels(case: Case) -> None:
    """``predict`` takes inputs alone."""
    names = set(inspect.signature(built(case).predict).parameters)
    found = names & {"y", "label", "labels", "target", "targets"}
    if found:
        raise BrokenContract(f"predict takes {', '.join(sorted(found))}.")


@check("learner", refusable="no")
def predict_is_pure(case: Case) -> None:
    """``predict`` changes nothing: not the next prediction, not what is learned afterwards."""
    component, twin = _stepping(case), _stepping(case)
    batch = toy(case)
    component.step(batch)
    twin.step(batch)
    first = component.predict(batch[0])
    expect_same(component.predict(batch[0]), first, "Two predictions in a row differ")
    expect_same(
        dict(component.step(batch)), dict(twin.step(batch)), "A prediction changed what is learned afterwards"
    )


@check("learner")
def one_example(case: Case) -> None:
    """One example is predicted as it is in a batch."""
    component, _ = _trained(case)
    x, _ = toy(case)
    alone, among = torch.as_tensor(component.predict(x[:1])), torch.as_tensor(component.predict(x))[:1]
    if alone.shape != among.shape or not torch.allclose(alone.double(), among.double(), atol=1e-4):
        raise BrokenContract("One example alone is predicted differently from the same one in a batch.")


@check("learner", refusable="no")
def predictions_without_graph(case: Case) -> None:
    """Predictions carry no autograd graph."""
    component = _stepping(case)
    x, _ = toy(case)
    component.step(toy(case))
    answer = component.predict(x)
    if isinstance(answer, torch.Tensor) and answer.requires_grad:
        raise BrokenContract("The prediction requires a gradient.", fix="Predict under torch.no_grad().")


@check("learner")
def graph_bounded(case: Case) -> None:
    """A step keeps at most ``graph_bytes`` for backward passes at a time."""
    if case.graph_bytes is None:
        raise NotApplicable("the case states no graph_bytes")
    component, batch = _stepping(case), toy(case)
    modules = [each for each in (component, *vars(component).values()) if isinstance(each, nn.Module)]
    own = [each for _, each in tensors([list(batch), vars(component)])]
    with SavedBytes(*own, *modules) as meter:
        component.step(batch)
    if meter.peak > case.graph_bytes:
        raise BrokenContract(
            f"A step keeps {meter.peak} bytes for backward, {case.graph_bytes} are promised.",
            fix="Work under torch.no_grad(), or free one block's graph before the next one's.",
        )


@check("learner")
def one_example_step(case: Case) -> None:
    """A batch of one example is learned from."""
    component = _stepping(case)
    x, y = toy(case)
    losses = component.step((x[:1], y[:1]))
    if not all(math.isfinite(value) for value in losses.values()):
        raise BrokenContract(
            f"A batch of one example gives {dict(losses)}.", fix="Use no statistic that needs two."
        )


@check("learner", refusable="no")
def no_examples(case: Case) -> None:
    """A batch without examples is refused by an error of one sentence or more, and changes nothing."""
    component = _stepping(case)
    x, y = toy(case)
    component.step((x, y))
    before = state_of(component)
    try:
        component.step((x[:0], y[:0]))
    except (TypeError, ValueError) as error:
        if len(str(error)) < 15:
            raise BrokenContract(
                f"The message says only {str(error)!r}.", fix="Name argument, value, fix."
            ) from error
        expect_same(
            state_of(component), before, "An empty batch was refused, but only after changing something"
        )
        return
    raise BrokenContract("An empty batch was accepted.", fix="Raise ValueError before anything is changed.")


@check("learner", refusable="no")
def nonfinite_batch(case: Case) -> None:
    """A batch with NaN leaves the learner as it was, whether it is refused or skipped."""
    component = _stepping(case)
    x, y = toy(case)
    component.step((x, y))
    before = state_of(component)
    bad = x.clone()
    bad[0] = math.nan
    try:
        component.step((bad, y))
    except (TypeError, ValueError, RuntimeError):
        expect_same(
            state_of(component), before, "A batch with NaN was refused, but only after changing something"
        )
        return
    expect_same(
        state_of(component), before, "A batch with NaN changed the learner", fix="Raise, or skip the step."
    )


@check("learner", slow=True)
def scikit_learn(case: Case) -> None:
    """A learner in scikit-learn's form passes scikit-learn's own ``check_estimator``."""
    component = built(case)
    if not is_estimator(component):
        raise NotApplicable("no scikit-learn estimator")
    from sklearn.utils.estimator_checks import check_estimator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it provokes warnings on purpose
        results = check_estimator(component, on_fail=None)
    failed = [each for each in results if each["status"] == "failed"]
    if failed:
        names = ", ".join(each["check_name"] for each in failed)
        raise BrokenContract(f"check_estimator fails in {names}: {failed[0]['exception']}")
