"""State of a learner: what it keeps itself, and the model and the optimizer that were given to it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pullback.core.checks import shown
from pullback.core.state import StateError, check_counts, check_state


def learner_state(
    version: int, own: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> dict[str, Any]:
    """A snapshot of a learner's state.

    Args:
        version: of the format.
        own: what the learner keeps itself, as copies.
        model: what it trains.
        optimizer: what it trains with; None: model and optimizer belong to the user, and are not saved here.
    """
    mine = optimizer is not None
    return {
        "format_version": version,
        **own,
        "model": {k: v.detach().clone() for k, v in model.state_dict().items()} if mine else {},
        "optimizer": copy.deepcopy(optimizer.state_dict()) if optimizer is not None else {},
    }


def check_learner_state(
    owner: str,
    state: Mapping[str, Any],
    version: int,
    own: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    *,
    open_keys: Sequence[str] = (),
) -> None:
    """Check a saved state of `learner_state`; nothing is changed.

    Args:
        owner: who loads, for the message.
        state: what was saved.
        version: newest format that is understood.
        own: a state of the same form; whole numbers in it are counters.
        model: what will be loaded.
        optimizer: what will be loaded, or None.
        open_keys: keys of ``own`` that the caller checks.

    Raises:
        StateError: if a part does not fit.
    """
    reference = {"format_version": version, **own, "model": {}, "optimizer": {}}
    check_state(owner, state, reference, version=version, open_keys=("model", "optimizer", *open_keys))
    check_counts(owner, state, *(key for key, value in own.items() if isinstance(value, int)))
    check_state(f"{owner}.model", state["model"], {} if optimizer is None else model.state_dict())
    wanted = [] if optimizer is None else [len(group["params"]) for group in optimizer.param_groups]
    groups = state["optimizer"].get("param_groups", [])
    if optimizer is not None and not {"state", "param_groups"} <= set(state["optimizer"]):
        groups = None
    if not isinstance(groups, list) or [len(group.get("params", ())) for group in groups] != wanted:
        raise StateError(
            f"{owner}.optimizer must hold groups of {wanted} parameters, got {shown(groups)}. Build the optimizer as "
            "it was when the state was saved."
        )


def load_learner_state(
    owner: str, state: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> None:
    """Take over model and optimizer of a checked state.

    Raises:
        StateError: if the optimizer refuses; it does so before anything is changed.
    """
    if optimizer is None:
        return
    try:
        optimizer.load_state_dict(copy.deepcopy(dict(state["optimizer"])))
    except (ValueError, KeyError) as error:
        raise StateError(
            f"{owner}.optimizer must fit the optimizer, got: {error} Build it as it was."
        ) from error
    model.load_state_dict(dict(state["model"]))
