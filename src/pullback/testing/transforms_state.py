"""Checks of transforms over time: resume, copies, no growth, equal ranks."""

from __future__ import annotations

import io
import multiprocessing

import numpy as np
import torch
from torch import distributed
from torch.multiprocessing.spawn import ProcessException

from pullback.testing.case import Case
from pullback.testing.check import BrokenContract, NotApplicable, check
from pullback.testing.exercise import case_loss, train
from pullback.testing.ranks import run_ranks
from pullback.testing.tools import clone, expect_same, tensors_left_by
from pullback.testing.transforms import OPTIMIZERS, Loop

_GLOO_SECONDS = 60


@check("transform")
def resumes_midway(case: Case) -> None:
    """5 steps, a state through a file, 5 more steps: bitwise 10 steps (AdamW)."""
    whole = Loop(case, OPTIMIZERS["AdamW"]).train(range(10)).values()
    first = Loop(case, OPTIMIZERS["AdamW"]).train(range(5))
    file = io.BytesIO()
    parts = (first.model.state_dict(), first.optimizer.state_dict(), first.attachment.state_dict())
    torch.save(parts, file)
    file.seek(0)
    model, optimizer, attachment = torch.load(file, weights_only=True)
    second = Loop(case, OPTIMIZERS["AdamW"])
    second.model.load_state_dict(model)
    second.optimizer.load_state_dict(optimizer)
    second.attachment.load_state_dict(attachment)
    got = second.train(range(5, 10)).values()
    expect_same(got, whole, "A resumed run differs", fix="Put all that changes into extra_state.")


@check("transform")
def copy_and_reattach(case: Case) -> None:
    """A deep copy of model, optimizer and attachment goes on as the original would."""
    loop = Loop(case, OPTIMIZERS["AdamW"]).train(range(3))
    model, optimizer, attachment = clone((loop.model, loop.optimizer, loop.attachment))
    attachment.reattach(optimizer)
    train(case, model, optimizer, range(3, 6))
    expect_same(
        {name: p.detach() for name, p in model.named_parameters()},
        {name: p.detach() for name, p in loop.train(range(3, 6)).model.named_parameters()},
        "The copy goes on differently",
    )


@check("transform")
def no_growth(case: Case) -> None:
    """100 steps leave no tensor per step alive."""
    loop = Loop(case).train(range(10))
    left = tensors_left_by(lambda: loop.train(range(100)))
    if left > 60:
        raise BrokenContract(f"100 steps leave {left} tensors alive.", fix="Keep no list of tensors.")


@check("transform")
def ranks_agree(case: Case) -> None:
    """Two replicas with equal gradients stay bitwise equal whatever their global generators hold."""
    found = []
    for rank in range(2):
        torch.manual_seed(rank)
        np.random.seed(rank)  # noqa: NPY002 - another state on each rank is the point
        loop = Loop(case)
        for step in range(5):
            torch.manual_seed(100 * rank + step)
            loop.train([step])
        found.append(loop.values())
    expect_same(
        found[0], found[1], "Replicas drift apart", fix="Draw from streams keyed by seed, step and index."
    )


@check("transform", slow=True)
def two_processes(case: Case) -> None:
    """Two gloo processes with averaged gradients end with equal parameters."""
    if "fork" not in multiprocessing.get_all_start_methods():
        raise NotApplicable("this platform cannot fork")
    try:  # forked, because a case holds functions that cannot be pickled
        first, second = run_ranks(_averaged, case, timeout=_GLOO_SECONDS, start="fork")
    except (ProcessException, TimeoutError) as error:
        raise BrokenContract(f"Two processes do not end: {error}") from error
    expect_same(first, second, "Two processes end with different parameters")


def _averaged(rank: int, case: Case) -> dict[str, torch.Tensor]:
    """One process: own batches and generators, gradients averaged before the step."""
    torch.manual_seed(rank)
    loop = Loop(case)
    for step in range(3):
        loop.optimizer.zero_grad()
        case_loss(case, loop.model, 2 * step + rank).backward()
        for p in loop.model.parameters():
            if p.grad is not None:
                distributed.all_reduce(p.grad)
                p.grad.div_(2)
        torch.manual_seed(10 * step + rank)
        loop.optimizer.step()
    return loop.values()
