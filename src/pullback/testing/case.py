"""What a contract needs to know of one component: how to build it, what to feed it, what it promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

Kind: TypeAlias = Literal[
    "signal",
    "aggregator",
    "transform",
    "optimizer",
    "objective",
    "recompute",
    "probe",
    "search",
    "layer",
    "learner",
    "field",
]
KINDS: tuple[str, ...] = get_args(Kind)
"""Every kind of component that has a contract."""

Inputs: TypeAlias = Callable[[torch.Generator, torch.dtype], tuple[Any, ...]]
"""``inputs(generator, dtype)`` draws the arguments of one call; every tensor has the batch as its first axis."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One component with all that its contract needs. Only ``name``, ``kind`` and ``build`` are required.

    A check whose field is missing says so in the report ("not applicable"), it is never dropped silently.

    Args:
        name: shown in reports and test ids. For a public name of a room, begin with that name, for example
            ``"GradientNoise"`` or ``"GradientNoise[annealed]"``.
        kind: one of `KINDS`.
        build: makes a fresh component with settings that *do* something. Every call must give an equal one. Kind
            ``optimizer``: takes the parameters, ``build=lambda params: MyOptimizer(params, lr=0.1)``.
        neutral: makes the component that does nothing (kinds signal, transform, objective); an optimizer's takes the
            parameters and must leave them bitwise as they are.
        inputs: draws the arguments of one call (signal, layer, objective, field; recompute and probe: those of the
            model). Default: one tensor of shape [4, 8].
        forward: signal: the declared forward, ``forward(*inputs) -> Tensor``. Default: the first input.
        backward: signal: the declared backward, ``backward(grad_output, *inputs) -> tuple of input gradients``
            written with differentiable operations; None for an input without gradient.
        baseline: objective: what the neutral one must equal bitwise, ``baseline(*inputs) -> scalar Tensor``.
        shape: layer: output shape as a function of the shape of the first input.
        invariances: aggregator: which of ``"permutation"`` (order of tasks), ``"scale"`` (A(cJ) = cA(J), c > 0),
            ``"non_conflict"`` (J A(J) >= 0) and ``"row_space"`` (A(J) is a combination of rows) hold.
        model: transform, recompute, probe: makes the user's model. Default: a small perceptron on 8 features.
        run: how the component is driven, where the kind has more than one way. Recompute:
            ``run(component, model, *inputs) -> Tensor``. Probe: ``run(component, model, batch) -> dataclass``.
            Search: ``run(component, budget, seed) -> Result``; ``budget`` None means the component's own.
            Default: the base class's main method.
        memory: recompute: peak bytes saved for backward as a multiple of those of the plain model, at most.
        solution: search: the value that the closed-form problem of ``run`` has; field: see ``solve``.
        tolerance: largest absolute error against ``solution``.
        hopeless: search: ``hopeless(component) -> Result`` on a problem that cannot be solved (diverging, NaN).
        data: learner: ``data(generator) -> (x, y)``, a separable toy. Default: two Gaussian blobs in 8 dimensions.
        steps: learner: number of ``step`` calls after which the loss must have fallen.
        accuracy: learner: share of the toy that ``predict`` must get right after ``steps``; None: no classifier.
        graph_bytes: learner: most bytes that a step keeps for backward passes at a time, parameters and the batch not
            counted (0: no autograd graph; the size of one block's for a method that trains block by block); None: no
            promise.
        solve: field: ``solve(component, steps) -> Tensor``, the value reached with that many solver steps.
        order: field: order of accuracy of ``solve``.
        coarse: field: number of steps beside twice as many, between which ``order`` is measured.
        evaluations: field: ``evaluations(steps)``, how often ``solve`` calls the component for that many steps.
        time: field: position among ``inputs`` of the time, one for each row; one time for all rows must do as well.
        conversions: field: ``conversions(component, *inputs)`` gives pairs (original, there and back).
        bad: constructions that must be refused with a ValueError or TypeError that names argument and value.
        refuses: check id -> reason, added to the component's own ``refuses``.
    """

    name: str
    kind: Kind
    build: Callable[..., Any]
    neutral: Callable[..., Any] | None = None
    inputs: Inputs | None = None
    forward: Callable[..., Tensor] | None = None
    backward: Callable[..., tuple[Tensor | None, ...]] | None = None
    baseline: Callable[..., Tensor] | None = None
    shape: Callable[[torch.Size], tuple[int, ...]] | None = None
    invariances: frozenset[str] = frozenset({"permutation"})
    model: Callable[[], nn.Module] | None = None
    run: Callable[..., Any] | None = None
    memory: float | None = None
    solution: Any = None
    tolerance: float = 1e-3
    hopeless: Callable[[Any], Any] | None = None
    data: Callable[[torch.Generator], tuple[Any, Any]] | None = None
    steps: int = 50
    accuracy: float | None = 0.9
    graph_bytes: int | None = None
    solve: Callable[[Any, int], Tensor] | None = None
    order: float | None = None
    coarse: int = 8
    evaluations: Callable[[int], int] | None = None
    time: int | None = None
    conversions: Callable[..., Any] | None = None
    bad: tuple[Callable[[], Any], ...] = ()
    refuses: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}.")
        if not callable(self.build) or isinstance(self.build, nn.Module):
            raise TypeError(
                f"build must be a class or function that makes the component, got {self.build!r}. "
                "Pass lambda: ..., or give the instance to check_component itself."
            )
        unknown = set(self.invariances) - {"permutation", "scale", "non_conflict", "row_space"}
        if unknown:
            raise ValueError(
                f"invariances must be permutation, scale, non_conflict, row_space, got {sorted(unknown)}."
            )
