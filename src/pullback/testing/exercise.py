"""Use a component of any kind once, the ordinary way: what the checks shared by all kinds build upon."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core.attachment import attach
from pullback.testing.case import Case
from pullback.testing.check import NotApplicable
from pullback.testing.tools import (
    FEATURES,
    batch_for,
    cast,
    clone,
    differentiable,
    draw,
    keeping_rng,
    leaves,
    rng,
    toy_loss,
    user_model,
)

MODULE_KINDS = ("signal", "layer", "objective")
OWN_STATE = ("transform", "learner", "probe", "search", "recompute", "field")


def built(case: Case, params: Any = None) -> Any:
    """A fresh component, equal every time; an optimizer gets parameters of its own unless some are given."""
    with keeping_rng():
        torch.manual_seed(0)
        if case.kind == "optimizer":
            return case.build(list(user_model(case).parameters()) if params is None else params)
        component = case.build()
    return cast(component, torch.float64) if case.kind in MODULE_KINDS else component


def use(case: Case, component: Any, seed: int = 0, inputs: tuple[Any, ...] | None = None) -> Any:
    """Use the component once and return everything that came out; seeds of inputs are the check's own."""
    return _USES[case.kind](case, component, seed, inputs)


def _module(case: Case, component: nn.Module, seed: int, inputs: tuple[Any, ...] | None) -> Any:
    arguments = leaves(draw(case, torch.float64, seed)) if inputs is None else inputs
    return backward_through(component, arguments)


def backward_through(component: nn.Module, arguments: tuple[Any, ...]) -> Any:
    """Outputs, and gradients of inputs and parameters for a fixed linear loss; ``.grad`` is left alone."""
    out = component(*arguments)
    wanted = [*differentiable(arguments), *(p for p in component.parameters() if p.requires_grad)]
    wanted = [each for each in wanted if each.requires_grad]
    outs = [each for each in _flat(out) if each.requires_grad]
    if not wanted or not outs:
        return out, []
    probes = [torch.randn(each.shape, generator=rng(77), dtype=torch.float64).to(each.dtype) for each in outs]
    grads = torch.autograd.grad(outs, wanted, probes, allow_unused=True)
    return _detached(out), list(grads)


def _flat(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    rows = out.values() if isinstance(out, Mapping) else out if isinstance(out, list | tuple) else ()
    return [tensor for row in rows for tensor in _flat(row)]


def _detached(out: Any) -> Any:
    if isinstance(out, Tensor):
        return out.detach()
    if isinstance(out, Mapping):
        return {key: _detached(each) for key, each in out.items()}
    return type(out)(map(_detached, out)) if type(out) in {list, tuple} else out


def matrix(seed: int = 0, dtype: torch.dtype = torch.float64, shape: tuple[int, int] = (3, 6)) -> Tensor:
    """A Jacobian [tasks, parameters] with conflicts between its rows."""
    return torch.randn(shape, generator=rng(seed + 5), dtype=torch.float64).to(dtype)


def _aggregator(case: Case, component: Any, seed: int, inputs: tuple[Any, ...] | None) -> Any:
    del case
    return component(*(inputs or (matrix(seed),)))


def _transform(case: Case, component: Any, seed: int, inputs: tuple[Any, ...] | None) -> Any:
    del inputs
    model = user_model(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with attach(optimizer, component, names=model):
        train(case, model, optimizer, range(seed, seed + 2))
    return [p.detach().clone() for p in model.parameters()]


def train(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, steps: Any) -> list[float]:
    """One ordinary training step for each number; the number is the batch's seed."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = case_loss(case, model, step)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def case_loss(case: Case, model: nn.Module, seed: int) -> Tensor:
    """The toy loss on the case's own batches, if it has any."""
    return toy_loss(model, seed, None if case.inputs is None else batch_for(model, case, seed))


def _optimizer(case: Case, component: Any, seed: int, inputs: tuple[Any, ...] | None) -> Any:
    del case, inputs
    params = [p for group in component.param_groups for p in group["params"]]
    for step in range(2):
        for index, p in enumerate(params):
            drawn = torch.randn(p.shape, generator=rng(100 * seed + 10 * step + index), dtype=torch.float64)
            p.grad = drawn.to(p.dtype)
        component.step()
        component.zero_grad()
    return [p.detach().clone() for p in params]


def _recompute(case: Case, component: Any, seed: int, inputs: tuple[Any, ...] | None) -> Any:
    model = user_model(case)
    arguments = leaves(batch_for(model, case, seed)) if inputs is None else inputs
    out = recompute(case, component, model, arguments)
    out.sum().backward()
    return out.detach(), [parameter.grad for parameter in model.parameters()]


def recompute(case: Case, component: Any, model: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
    """Drive a recompute member: ``case.run``, or the member called on the model and its arguments."""
    return component(model, *arguments) if case.run is None else case.run(component, model, *arguments)


def _probe(case: Case, component: Any, seed: int, inputs: tuple[Any, ...] | None) -> Any:
    model = user_model(case)
    return probe(case, component, model, batch_for(model, case, seed) if inputs is None else inputs)


def probe(case: Case, component: Any, model: nn.Module, batch: tuple[Any, ...]) -> Any:
    """Drive a probe: ``case.run``, or the probe called on the model and the batch."""
    return component(model, *batch) if case.run is None else case.run(component, model, batch)


def _search(case: Case, component: Any, seed: int, inputs: tuple[Any, ...] | None) -> Any:
    del inputs
    return search(case, component, None, seed)


def search(case: Case, component: Any, budget: int | None, seed: int) -> Any:
    """Drive a search on the case's closed-form problem."""
    if case.run is None:
        raise NotApplicable("the case has no run(component, budget, seed)")
    return case.run(component, budget, seed)


def toy(case: Case, seed: int = 0) -> tuple[Any, Any]:
    """The learner's toy: the case's, or two Gaussian blobs that a line separates."""
    if case.data is not None:
        return case.data(rng(seed))
    labels = torch.arange(64) % 2
    noise = torch.randn(64, FEATURES, generator=rng(seed))
    return noise + 3.0 * (2.0 * labels[:, None] - 1.0), labels


def is_estimator(component: Any) -> bool:
    """Whether a learner has scikit-learn's form: ``fit`` and ``predict`` instead of ``step``."""
    return hasattr(component, "fit") and not hasattr(component, "step")


def _learner(case: Case, component: Any, seed: int, inputs: tuple[Any, ...] | None) -> Any:
    x, y = toy(case, seed) if inputs is None else inputs
    if is_estimator(component):
        return component.fit(x, y).predict(x)
    losses = [dict(component.step((x, y))) for _ in range(2)]
    return losses, component.predict(x)


def _field(case: Case, component: Any, seed: int, inputs: tuple[Any, ...] | None) -> Any:
    return component(*(draw(case, torch.float64, seed) if inputs is None else inputs))


def arguments_of(case: Case, seed: int = 0) -> tuple[Any, ...]:
    """What `use` can be given as ``inputs`` for this kind."""
    if case.kind in MODULE_KINDS:
        return leaves(draw(case, torch.float64, seed))
    if case.kind == "aggregator":
        return (matrix(seed),)
    if case.kind == "field":
        return draw(case, torch.float64, seed)
    if case.kind in {"recompute", "probe"}:
        return batch_for(user_model(case), case, seed)
    if case.kind == "learner":
        return toy(case, seed)
    raise NotApplicable(f"kind {case.kind!r} gets no tensors of the user besides parameters")


def state_of(component: Any) -> Any:
    """A deep copy of the component's state.

    Raises:
        NotApplicable: if it has none.
    """
    getter = getattr(component, "state_dict", None)
    if getter is None:
        raise NotApplicable("no state_dict: nothing to save")
    return clone(dict(getter()))


def takes_keywords(cls: type) -> dict[str, inspect.Parameter]:
    """Named parameters of a constructor; empty when it has none of its own or needs more than keywords."""
    try:
        signature = inspect.signature(cls)
    except (TypeError, ValueError):
        return {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: p for name, p in signature.parameters.items() if p.kind in named}


_USES = {
    "signal": _module,
    "layer": _module,
    "objective": _module,
    "aggregator": _aggregator,
    "transform": _transform,
    "optimizer": _optimizer,
    "recompute": _recompute,
    "probe": _probe,
    "search": _search,
    "learner": _learner,
    "field": _field,
}
