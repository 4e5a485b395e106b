"""Checks of probes: a measurement leaves no trace, also when the model raises in the middle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import nn

from pullback.testing.case import Case
from pullback.testing.check import BrokenContract, check
from pullback.testing.exercise import built, probe
from pullback.testing.tools import (
    batch_for,
    expect_same,
    flags,
    global_rng,
    gradients,
    hooks,
    tensors,
    user_model,
    values,
)


def _measured_model(case: Case) -> nn.Module:
    """The user's model in mixed modes, with one gradient, one frozen parameter and a hook of its own."""
    model = user_model(case)
    first, *_, last = list(model.parameters())
    first.grad = torch.ones_like(first)
    last.requires_grad_(False)
    next(iter(model.children()), model).eval()
    model.register_forward_hook(_users_hook)
    return model


def _users_hook(*_: Any) -> None:
    """A hook that the user has on the model and that must survive."""


def _watch(case: Case, look: Callable[[nn.Module], Any], what: str) -> None:
    """Compare ``look(model)`` before and after a measurement, and after one that fails half-way."""
    model = _measured_model(case)
    batch = batch_for(model, case)
    before = look(model)
    probe(case, built(case), model, batch)
    expect_same(look(model), before, f"A measurement changed {what}", fix="Restore it in a finally block.")
    model = _failing(_measured_model(case))
    before = look(model)
    try:
        probe(case, built(case), model, batch)
    except ArithmeticError:
        expect_same(
            look(model), before, f"After an exception in the model {what} stay changed",
            fix="Restore them in a finally block.",
        )  # fmt: skip


def _objects(model: nn.Module) -> dict[str, int]:
    """Identity of every parameter and buffer."""
    rows = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: id(tensor) for name, tensor in rows}


class _Bomb(nn.Module):
    """Raises in the middle of the forward pass."""

    def forward(self, *args: Any) -> Any:
        del args
        raise ArithmeticError("planned")


def _failing(model: nn.Module) -> nn.Module:
    """The model with its last child replaced by one that raises."""
    children = list(model.named_children())
    if children:
        setattr(model, children[-1][0], _Bomb())
    return model


@check("probe", refusable="no")
def model_values(case: Case) -> None:
    """Parameters and buffers are bitwise unchanged, also after an exception."""
    _watch(case, values, "parameters or buffers")


@check("probe", refusable="no")
def model_gradients(case: Case) -> None:
    """``.grad`` of every parameter is unchanged, None included, also after an exception."""
    _watch(case, gradients, "gradients")


@check("probe", refusable="no")
def model_modes(case: Case) -> None:
    """train/eval of every module and ``requires_grad`` of every parameter are unchanged."""
    _watch(case, flags, "train/eval or requires_grad flags")


@check("probe", refusable="no")
def model_hooks(case: Case) -> None:
    """No hook is left and the user's own stay, also after an exception."""
    _watch(case, hooks, "hooks")


@check("probe", refusable="no")
def model_objects(case: Case) -> None:
    """Parameters and buffers are the same objects, which optimizers hold, also after an exception."""
    _watch(case, _objects, "the tensors themselves (their copies stand in the model)")


@check("probe", refusable="no")
def waiting_graph(case: Case) -> None:
    """A graph of the user's that waits for its backward pass still works: nothing was written into its tensors."""
    model = user_model(case)
    scale = torch.ones((), requires_grad=True)
    held = [each for _, each in tensors((list(model.parameters()), list(model.buffers())))]
    loss = torch.stack([(scale * each).sum().float() for each in held if each.is_floating_point()]).sum()
    probe(case, built(case), model, batch_for(model, case))
    try:
        loss.backward()
    except RuntimeError as error:
        raise BrokenContract(
            f"A measurement breaks a graph that waits for its backward pass: {str(error).splitlines()[0]}",
            fix="Do not write into parameters or buffers, not even to put their values back.",
        ) from error


@check("probe", refusable="no")
def random_state(case: Case) -> None:
    """The global generators are where they were, also with dropout in the model and after an exception."""
    _watch(case, lambda _: global_rng(), "global generators")


@check("probe", refusable="no")
def frozen_result(case: Case) -> None:
    """The result is a frozen dataclass whose tensors carry no graph."""
    model = user_model(case)
    result = probe(case, built(case), model, batch_for(model, case))
    if not is_dataclass(result) or isinstance(result, type):
        raise BrokenContract(f"The result is a {type(result).__name__}.", fix="Return a frozen dataclass.")
    if not type(result).__dataclass_params__.frozen:
        raise BrokenContract(f"{type(result).__name__} is not frozen.", fix="@dataclass(frozen=True)")
    for where, each in tensors(result):
        if each.requires_grad:
            raise BrokenContract(f"result{where} keeps an autograd graph alive.", fix="detach() it.")


@check("probe")
def grad_mode_off(case: Case) -> None:
    """A measurement under ``torch.no_grad`` gives the same result."""
    model = user_model(case)
    batch = batch_for(model, case)
    wanted = probe(case, built(case), model, batch)
    with torch.no_grad():
        got = probe(case, built(case), model, batch)
        enabled = torch.is_grad_enabled()
    if enabled:
        raise BrokenContract(
            "Autograd was switched on for the user.", fix="Use torch.enable_grad() as a with."
        )
    expect_same(got, wanted, "The result under no_grad differs")
