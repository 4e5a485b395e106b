"""Checks shared by all kinds: documentation, copies, state, traces, refusals."""

from __future__ import annotations

import inspect
import io
import math
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pullback.testing.case import Case
from pullback.testing.check import BrokenContract, NotApplicable, check
from pullback.testing.exercise import (
    MODULE_KINDS,
    OWN_STATE,
    arguments_of,
    built,
    is_estimator,
    state_of,
    takes_keywords,
    use,
)
from pullback.testing.tools import clone, expect_same, global_rng, hooks, tensors

_STATE_ERRORS = (TypeError, ValueError, KeyError, RuntimeError)
_DRAWING = ("layer", "learner", "field", "objective")  # may initialise weights as torch's own modules do


@check(refusable="no")
def docstring(case: Case) -> None:
    """The class has a docstring of its own of at least one sentence."""
    component = built(case)
    if not inspect.isclass(type(component)) or type(component).__module__.startswith("torch."):
        raise NotApplicable("a class of torch")
    text = type(component).__dict__.get("__doc__") or ""
    if len(text.split()) < 2:
        raise BrokenContract(
            f"{type(component).__name__}.__doc__ is {text!r}.",
            fix="Write what it does; a string after another statement is no docstring.",
        )


@check(refusable="no")
def readable_repr(case: Case) -> None:
    """The repr names the class and shows no memory address."""
    component = built(case)
    text = repr(component)
    name = getattr(component, "name", None)
    names = {type(component).__name__, *([name] if isinstance(name, str) else [])}
    if not any(each in text for each in names):
        raise BrokenContract(f"repr is {text[:80]!r}.", fix="Begin it with the class name.")
    if re.search(r"\bat 0x[0-9a-f]+", text):
        raise BrokenContract(f"repr shows a memory address: {text[:80]!r}.", fix="Write __repr__.")


@check()
def independent_instances(case: Case) -> None:
    """Two instances do not interact: using one leaves what the other gives unchanged."""
    expected = use(case, built(case), 3)
    first, second = built(case), built(case)
    use(case, first, 0)
    expect_same(
        use(case, second, 3),
        expected,
        "An instance gives other results after another one was used",
        fix="Keep state in the instance, not in the class or the module.",
    )
    third = built(case)
    expect_same(
        use(case, third, 0),
        use(case, built(case), 0),
        "The same use of two fresh instances gave different results",
    )


@check()
def deep_copy(case: Case) -> None:
    """A deep copy works alike and shares nothing with the original."""
    component = built(case)
    use(case, component, 0)
    twin, witness = clone(component), clone(component)
    expected = use(case, witness, 1)
    expect_same(use(case, twin, 1), expected, "The copy gives other results than its original would")
    expect_same(use(case, component, 1), expected, "Using the copy changed the original")


@check()
def global_generators(case: Case) -> None:
    """Neither use nor construction touches the global generators of torch, NumPy and Python."""
    component = built(case)
    if case.kind not in _DRAWING and case.kind != "optimizer":
        before = global_rng()
        case.build()
        expect_same(before, global_rng(), "Construction moved a global generator")
    before = global_rng()
    results = use(case, component)
    expect_same(
        before,
        global_rng(),
        "Use moved a global generator",
        fix="Draw from pullback.core.streams.generator(name, seed, step, index).",
    )
    torch.manual_seed(987)
    np.random.seed(987)  # noqa: NPY002
    random.seed(987)
    expect_same(results, use(case, built(case)), "Results depend on the global generators")


@check(refusable="no")
def inputs_left_alone(case: Case) -> None:
    """What the user passes in is bitwise the same afterwards, and its ``.grad`` untouched."""
    component, inputs = built(case), arguments_of(case)
    before = clone(_plain(inputs))
    use(case, component, 0, inputs)
    expect_same(_plain(inputs), before, "An input was edited in place")
    if any(each.grad is not None for _, each in tensors(inputs) if each.is_leaf):
        raise BrokenContract("An input's .grad was filled.", fix="Use torch.autograd.grad.")


def _plain(inputs: Any) -> Any:
    return [each.detach().clone() for _, each in tensors(inputs)]


@check("signal", "layer", "objective", "aggregator", "field", "learner", refusable="no")
def modes_and_hooks(case: Case) -> None:
    """Use leaves train/eval, ``requires_grad`` and hooks of the component as they are."""
    component = built(case)
    if not isinstance(component, nn.Module):
        raise NotApplicable("no nn.Module")
    component.eval()
    before, modes = hooks(component), _modes(component)
    use(case, component)
    if before != hooks(component):
        raise BrokenContract("Use left hooks on the component.", fix="Remove them in a finally block.")
    if modes != _modes(component):
        raise BrokenContract("Use changed train/eval or requires_grad.", fix="Restore what was found.")


def _modes(module: nn.Module) -> list[bool]:
    return [*(m.training for m in module.modules()), *(p.requires_grad for p in module.parameters())]


@check("signal", "layer", "objective", "aggregator", "field", "learner")
def tensors_in_state(case: Case) -> None:
    """Every tensor of a module is a parameter or buffer, so that it is moved and saved."""
    component = built(case)
    if not isinstance(component, nn.Module):
        raise NotApplicable("no nn.Module")
    for name, module in component.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                raise BrokenContract(
                    f"{name + '.' if name else ''}{key} is a plain tensor.",
                    fix=f'Use register_buffer("{key}", ...).',
                )


@check(*MODULE_KINDS, "aggregator", "learner", "field", "probe")
def no_graph_kept(case: Case) -> None:
    """After use the component holds no tensor that is part of an autograd graph."""
    component = built(case)
    use(case, component)
    for owner in component.modules() if isinstance(component, nn.Module) else [component]:
        for where, each in tensors(dict(getattr(owner, "__dict__", {}))):
            if each.grad_fn is not None:
                raise BrokenContract(
                    f"{type(owner).__name__}{where} keeps an autograd graph alive.", fix="detach() it."
                )


@check()
def state_resumes(case: Case) -> None:
    """A fresh component with the saved state goes on exactly as the old one."""
    component = built(case)
    use(case, component, 0)
    state, fresh = state_of(component), built(case)
    fresh.load_state_dict(state)
    if case.kind == "optimizer":  # the parameters are the user's: carry them over
        _carry(component, fresh)
    expect_same(
        use(case, fresh, 1),
        use(case, component, 1),
        "The resumed component goes on differently",
        fix="Put all that changes in use into state_dict.",
    )


@torch.no_grad()
def _carry(old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> None:
    for one, other in zip(old.param_groups, new.param_groups, strict=True):
        for p, q in zip(one["params"], other["params"], strict=True):
            q.copy_(p)


@check(refusable="no")
def state_weights_only(case: Case) -> None:
    """The state survives ``torch.save`` and ``torch.load(weights_only=True)``."""
    component = built(case)
    use(case, component)
    state, file = state_of(component), io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    try:
        loaded = torch.load(file, weights_only=True)
    except Exception as error:
        raise BrokenContract(
            f"state_dict cannot be loaded with weights_only=True ({str(error).splitlines()[0][:80]}).",
            fix="Keep tensors and plain Python values only.",
        ) from error
    expect_same(loaded, state, "The state changed on its way through a file")


@check(refusable="no")
def state_foreign(case: Case) -> None:
    """A foreign or incomplete state is refused and changes nothing."""
    component = built(case)
    use(case, component)
    before = state_of(component)
    if not before:
        raise NotApplicable("an empty state")
    partial_state = clone(before)
    partial_state.pop(next(reversed(partial_state)))
    for what, state in (("foreign", {"nonsense": torch.zeros(2)}), ("incomplete", partial_state)):
        _expect_refusal(component, state, before, f"A {what} state")


@check(*OWN_STATE, refusable="no")
def state_newer(case: Case) -> None:
    """The state carries ``format_version``; a newer one is refused and changes nothing."""
    component = built(case)
    before = state_of(component)
    if isinstance(component, nn.Module) or type(component).__module__.startswith("sklearn"):
        raise NotApplicable("state in torch's own form")
    if not isinstance(before.get("format_version"), int):
        raise BrokenContract("state_dict has no format_version.", fix="Add format_version=1.")
    newer = {**clone(before), "format_version": before["format_version"] + 1}
    _expect_refusal(component, newer, before, "A state of a newer version")


def _expect_refusal(component: Any, state: Any, before: Any, what: str) -> None:
    try:
        component.load_state_dict(state)
    except _STATE_ERRORS:
        expect_same(state_of(component), before, f"{what} was refused, but only after changing something")
        return
    raise BrokenContract(f"{what} was loaded without an error.", fix="Check keys and version first.")


@check(*OWN_STATE, refusable="no")
def state_is_a_snapshot(case: Case) -> None:
    """A state that was saved does not change when the component goes on."""
    component = built(case)
    use(case, component, 0)
    getter = getattr(component, "state_dict", None)
    if getter is None or isinstance(component, nn.Module):
        raise NotApplicable("no state_dict of its own: nothing to save")
    state = getter()
    before = clone(state)
    use(case, component, 1)
    expect_same(state, before, "The saved state changed with further use", fix="Clone tensors in state_dict.")


@check()
def bad_arguments(case: Case) -> None:
    """Constructor arguments that make no sense are refused by ValueError or TypeError."""
    for what, make, _ in _bad(case):
        try:
            make()
        except (TypeError, ValueError):
            continue
        except Exception as error:
            raise BrokenContract(
                f"{what} raised {type(error).__name__}: {error}", fix="Raise ValueError."
            ) from error
        raise BrokenContract(f"{what} was accepted.", fix="Check it with pullback.core.checks.")


@check()
def error_messages(case: Case) -> None:
    """A refused argument's error names the argument and the value."""
    for what, make, words in _bad(case):
        try:
            make()
        except (TypeError, ValueError) as error:
            missing = [word for word in words if word not in str(error)]
            if missing:
                raise BrokenContract(
                    f"{what}: the message {str(error)!r} does not name {missing}.",
                    fix="Write '<argument> must be ..., got <value>.'",
                ) from error
        except Exception:
            continue


def _bad(case: Case) -> Iterator[tuple[str, Callable[[], Any], tuple[str, ...]]]:
    """Bad constructions: the case's own, and NaN or a string for every float argument of the class."""
    for position, make in enumerate(case.bad):
        yield f"bad[{position}]", make, ("got",)
    component = built(case)
    cls, found = type(component), bool(case.bad)
    keywords = {} if is_estimator(component) else takes_keywords(cls)  # estimators check in fit
    given: dict[str, Any] = {}
    if case.kind == "optimizer":
        given["params"] = [nn.Parameter(torch.zeros(2))]
    for name, parameter in keywords.items():
        if parameter.default is inspect.Parameter.empty and name not in given:
            if not hasattr(component, name):
                keywords = {}
                break
            given[name] = getattr(component, name)
    if cls.__module__.startswith("torch."):
        keywords = {}
    for name, parameter in keywords.items():
        if parameter.annotation in {float, "float"}:
            found = True
            for value in (math.nan, "nonsense"):
                arguments = {**given, name: value}
                yield f"{name}={value!r}", lambda a=arguments: cls(**a), (name, str(value))
    if not found:
        raise NotApplicable("no float argument in the constructor and no bad=(...) in the case")
