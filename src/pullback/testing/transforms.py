"""Checks of transforms in an ordinary loop: neutral, in effect, detached, composed, with groups and odd shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core.attachment import Attachment, attach
from pullback.core.clip import ClipGradNorm
from pullback.core.kinds import StepBatch, Transform
from pullback.testing.case import Case
from pullback.testing.check import BrokenContract, NotApplicable, check
from pullback.testing.exercise import built, case_loss, train
from pullback.testing.tools import clone, expect_finite, expect_same, user_model, values

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
}


class Loop:
    """The user's model, optimizer and, unless it is a plain run, the attached component."""

    def __init__(
        self,
        case: Case,
        make: Callable[[Any], torch.optim.Optimizer] = OPTIMIZERS["SGD"],
        *,
        component: Any = None,
        dtype: torch.dtype | None = None,
        nonfinite: Any = "raise",
    ) -> None:
        self.case = case
        self.model = user_model(case)
        if dtype is not None:
            self.model.to(dtype)
        self.optimizer = make(self.model.parameters())
        self.component = built(case) if component is None else component
        self.attachment: Attachment = attach(
            self.optimizer, self.component, nonfinite=nonfinite, names=self.model
        )

    def train(self, steps: Any) -> Loop:
        """Ordinary steps on the batches of these numbers."""
        train(self.case, self.model, self.optimizer, steps)
        return self

    def values(self) -> dict[str, Tensor]:
        """Parameters and buffers as they are."""
        return values(self.model)


def plain(case: Case, make: Callable[[Any], torch.optim.Optimizer], steps: Any) -> dict[str, Tensor]:
    """What the same training gives without the component."""
    model = user_model(case)
    train(case, model, make(model.parameters()), steps)
    return values(model)


@check("transform")
def neutral_transform(case: Case) -> None:
    """The neutral setting leaves 10 steps of SGD and AdamW bitwise as they are."""
    if case.neutral is None:
        raise NotApplicable("the case has no neutral setting")
    for name, make in OPTIMIZERS.items():
        got = Loop(case, make, component=case.neutral()).train(range(10)).values()
        expect_same(got, plain(case, make, range(10)), f"The neutral setting changes 10 steps of {name}")


@check("transform")
def takes_effect(case: Case) -> None:
    """The setting under test changes the parameters within 10 steps of SGD or AdamW."""
    for make in OPTIMIZERS.values():
        got, unchanged = Loop(case, make).train(range(10)).values(), plain(case, make, range(10))
        if any(not torch.equal(got[name], unchanged[name]) for name in got):
            return
    raise BrokenContract("Ten steps are the same with and without it.", fix="Build it with an effect.")


@check("transform")
def missing_gradients(case: Case) -> None:
    """Parameters without gradient are skipped, and a step without any gradient counts for nothing."""
    loop = Loop(case).train(range(1))
    params = [p for p in loop.model.parameters() if p.requires_grad]
    before = params[0].detach().clone()
    loop.optimizer.zero_grad()
    case_loss(case, loop.model, 1).backward()
    params[0].grad = None
    loop.optimizer.step()
    expect_same(params[0].detach(), before, "A parameter without gradient moved")
    if params[0].grad is not None:
        raise BrokenContract("A gradient was made for a parameter that had none.")
    loop.optimizer.zero_grad()
    state, held = clone(loop.component.state_dict()), loop.values()
    loop.optimizer.step()
    expect_same(loop.values(), held, "A step without any gradient moved parameters")
    expect_same(loop.component.state_dict(), state, "A step without any gradient was counted")


@check("transform")
def zero_gradients(case: Case) -> None:
    """Gradients of exact zeros give finite parameters, also in float32."""
    for dtype in (torch.float32, torch.float64):
        loop = Loop(case, dtype=dtype)
        for _ in range(2):
            for p in loop.model.parameters():
                p.grad = torch.zeros_like(p)
            loop.optimizer.step()
        expect_finite(loop.values(), f"After steps with zero gradients in {dtype}, a parameter")


@check("transform")
def transform_scales(case: Case) -> None:
    """Gradients times 1e-30 ... 1e30 leave every gradient and parameter finite (float64)."""
    for scale in (1e-30, 1e-10, 1.0, 1e10, 1e30):
        loop = Loop(case, dtype=torch.float64)
        case_loss(case, loop.model, 0).backward()
        for p in loop.model.parameters():
            if p.grad is not None:
                p.grad.mul_(scale)
        loop.optimizer.step()
        expect_finite(loop.values(), f"Gradients times {scale:g}: a parameter")


@check("transform", refusable="raises")
def transform_bf16(case: Case) -> None:
    """bfloat16 parameters work, keep their dtype, stay finite, and end near the float32 run."""
    loop = Loop(case, dtype=torch.bfloat16).train(range(3))
    for name, value in loop.values().items():
        if value.is_floating_point() and value.dtype != torch.bfloat16:
            raise BrokenContract(f"{name} became {value.dtype}.")
    expect_finite(loop.values(), "After 3 steps in bfloat16, a parameter")
    for p in loop.model.parameters():
        if p.grad is not None and p.grad.dtype != p.dtype:
            raise BrokenContract(f"A gradient became {p.grad.dtype}.")


@check("transform", refusable="raises")
def odd_parameters(case: Case) -> None:
    """0-dim, empty, transposed and 4-dim channels-last parameters work beside matrices."""
    module = nn.Module()
    shapes = {"scalar": (), "empty": (0, 3), "vector": (5,), "matrix": (4, 3), "kernel": (2, 3, 3, 3)}
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.full(shape, 0.5)))
    module.register_parameter("turned", nn.Parameter(torch.full((3, 4), 0.5).t()))
    for p in module.parameters():
        p.grad = torch.full_like(p, 0.1)
    module.get_parameter("kernel").grad = torch.full((2, 3, 3, 3), 0.1).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    layouts = {name: p.stride() for name, p in module.named_parameters()}
    with attach(optimizer, built(case), names=module):
        optimizer.step()
        optimizer.step()
    expect_finite(values(module), "A parameter of an odd shape")
    if layouts != {name: p.stride() for name, p in module.named_parameters()}:
        raise BrokenContract("A parameter's memory layout changed.", fix="Edit in place.")


@check("transform", refusable="declared")
def frozen_and_groups(case: Case) -> None:
    """Two groups with rates of their own and a frozen parameter work; the frozen one and lr=0 do not move."""
    model = user_model(case)
    params = list(model.parameters())
    params[0].requires_grad_(False)
    groups = [{"params": params[:2], "lr": 0.05}, {"params": params[2:], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    before = params[0].detach().clone()
    with attach(optimizer, built(case), names=model):
        train(case, model, optimizer, range(3))
        if [group["lr"] for group in optimizer.param_groups] != [0.05, 0.1]:
            raise BrokenContract("A group's learning rate changed.")
    expect_same(params[0].detach(), before, "A frozen parameter moved")
    if params[0].grad is not None:
        raise BrokenContract("A frozen parameter was given a gradient.")


@check("transform", refusable="raises")
def added_group(case: Case) -> None:
    """``add_param_group`` in the middle of a run works, and the old parameters go on."""
    model, extra = user_model(case), nn.Parameter(torch.linspace(-1.0, 1.0, 12).reshape(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with attach(optimizer, built(case), names=model):
        train(case, model, optimizer, range(2))
        optimizer.add_param_group({"params": [extra], "lr": 0.1})
        before = extra.detach().clone()
        extra_loss = (extra**2).sum()
        optimizer.zero_grad()
        (case_loss(case, model, 2) + extra_loss).backward()
        optimizer.step()
    if torch.equal(extra, before):
        raise BrokenContract(
            "The parameter of the added group was not trained.",
            fix="Edit what the batch holds in each step; keep no list of parameters from the beginning.",
        )
    expect_finite(extra, "The parameter of the added group")


@check("transform", refusable="raises")
def transform_sparse(case: Case) -> None:
    """A sparse gradient is edited where it is stored and stays sparse, or is refused by an error that says so."""
    weight = nn.Parameter(torch.ones(4, 3))
    gradient = torch.zeros(4, 3)
    gradient[1] = torch.tensor([0.5, -0.2, 0.1])
    weight.grad = gradient.to_sparse(1)
    optimizer = torch.optim.SGD([weight], lr=0.05)
    with attach(optimizer, built(case)):
        try:
            optimizer.step()
        except (RuntimeError, ValueError, TypeError) as error:
            if "sparse" in str(error).lower() and "SparseCPU" not in str(error):
                return
            raise BrokenContract(
                f"A sparse gradient ends in {str(error)[:80]!r}.", fix="Refuse it with a message of your own."
            ) from error
    if weight.grad is None or not weight.grad.is_sparse:
        raise BrokenContract("A sparse gradient became dense.", fix="Edit grad._values() of a coalesced one.")
    expect_finite(weight, "The parameter with a sparse gradient")


@check("transform", refusable="no")
def detaches(case: Case) -> None:
    """After ``remove()`` the optimizer has no hook left and steps as before, also after an exception."""
    model = user_model(case)
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    counts = _hook_counts(optimizer)
    try:
        with attach(optimizer, built(case), names=model):
            train(case, model, optimizer, range(2))
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    if _hook_counts(optimizer) != counts:
        raise BrokenContract("Hooks stay in the optimizer after remove().")
    twin, twin_optimizer = clone((model, optimizer))  # a copy has no hooks
    train(case, model, optimizer, range(2, 5))
    train(case, twin, twin_optimizer, range(2, 5))
    expect_same(
        values(model),
        values(twin),
        "The optimizer is not the plain one after remove()",
        fix="Touch model and optimizer only inside pre_step_ and post_step_.",
    )


def _hook_counts(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    return len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)


@check("transform")
def schedulers_work(case: Case) -> None:
    """LambdaLR and OneCycleLR give the same rates as without it."""
    schedulers: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
        "LambdaLR": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.9**step),
        "OneCycleLR": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=8),
    }
    for name, make in schedulers.items():
        rates: list[list[float]] = []
        for with_component in (True, False):
            model = user_model(case)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            if with_component:
                attach(optimizer, built(case), names=model)
            scheduler, seen = make(optimizer), []
            for step in range(4):
                train(case, model, optimizer, [step])
                seen.append(float(optimizer.param_groups[0]["lr"]))
                scheduler.step()
                seen.append(float(optimizer.param_groups[0]["lr"]))
            rates.append(seen)
        if rates[0] != rates[1]:
            raise BrokenContract(f"{name} gives {rates[0]} instead of {rates[1]}.")


@check("transform")
def accumulation(case: Case) -> None:
    """With three backward passes per step it acts and counts once per step."""
    loop, reference = Loop(case), Loop(case)
    for step in range(2):
        loop.optimizer.zero_grad()
        for part in range(3):
            case_loss(case, loop.model, 3 * step + part).backward()
        loop.optimizer.step()
        reference.optimizer.zero_grad()
        losses = [case_loss(case, reference.model, 3 * step + part) for part in range(3)]
        torch.stack(losses).sum().backward()
        reference.optimizer.step()
    if loop.component.steps != 2:
        raise BrokenContract(f"Two steps of three backward passes count as {loop.component.steps}.")
    for name, value in loop.values().items():
        if not torch.allclose(value, reference.values()[name], rtol=1e-3, atol=1e-4):
            raise BrokenContract(f"Accumulated gradients give another {name} than the sum of losses.")


@check("transform", refusable="declared")
def clip_order(case: Case) -> None:
    """Clipping attached before it equals ``clip_grad_norm_`` by hand, and the printed order says so."""
    loop, norm = Loop(case), 0.05
    loop.attachment.remove()
    composed = attach(loop.optimizer, ClipGradNorm(norm), loop.component, names=loop.model)
    text = repr(composed)
    if not 0 <= text.find("ClipGradNorm") < text.rfind(repr(loop.component).splitlines()[0]):
        raise BrokenContract(f"The printed order does not show clipping first: {text}")
    by_hand = Loop(case)
    for step in range(3):
        train(case, loop.model, loop.optimizer, [step])
        by_hand.optimizer.zero_grad()
        case_loss(case, by_hand.model, step).backward()
        torch.nn.utils.clip_grad_norm_(by_hand.model.parameters(), norm)
        by_hand.optimizer.step()
    expect_same(loop.values(), by_hand.values(), "Clipping in the attachment differs from clipping by hand")


class _Next(Transform):
    """Whoever comes next in the same step: remembers whose gradient is no longer the one that it was handed."""

    torn: str = ""

    def pre_step_(self, batch: StepBatch) -> None:
        """Compare the gradients handed on with those that the optimizer is about to use."""
        for param, grad, name in zip(batch.params, batch.grads, batch.names, strict=True):
            if param.grad is not grad:
                self.torn = name


@check("transform", refusable="no")
def edits_in_place(case: Case) -> None:
    """Gradients are edited in place: what follows in the same step works on the edited ones."""
    loop, following = Loop(case), _Next()
    loop.attachment.remove()
    attach(loop.optimizer, loop.component, following, names=loop.model)
    loop.train(range(2))
    if following.torn:
        raise BrokenContract(
            f"The gradient of {following.torn} is another tensor after the edit, so what follows never sees it.",
            fix="Edit batch.grads in place.",
        )


@check("transform", refusable="declared")
def by_hand(case: Case) -> None:
    """``update_(model)`` between backward and step does what the attachment does."""
    if type(built(case)).when != "pre":
        raise NotApplicable("edits parameters after the step")
    attached, model, component = Loop(case).train(range(3)), user_model(case), built(case)
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    for step in range(3):
        optimizer.zero_grad()
        case_loss(case, model, step).backward()
        component.update_(model)
        optimizer.step()
    expect_same(values(model), attached.values(), "update_ by hand differs from the attachment")


@check("transform", refusable="no")
def optimizer_state_alone(case: Case) -> None:
    """The optimizer's own ``state_dict`` has the form it has without the component."""
    loop, model = Loop(case, OPTIMIZERS["AdamW"]).train(range(2)), user_model(case)
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    train(case, model, optimizer, range(2))
    differing = _form(loop.optimizer.state_dict()) ^ _form(optimizer.state_dict())
    if differing:
        raise BrokenContract(f"The optimizer's state_dict differs in {sorted(differing)[:3]}.")


def _form(state: Any, where: str = "") -> set[str]:
    if isinstance(state, dict):
        return {each for key, value in state.items() for each in _form(value, f"{where}/{key}")} | {where}
    return {where}
