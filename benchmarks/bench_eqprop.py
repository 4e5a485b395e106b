"""A training step against its relaxation steps, and the asynchronous minimiser against Euler at equal gradient error.

With feedback of spectral norm r Euler's error falls by 1 - eps (1 - r) a step, that of exact layer minimisers by r^2 a
sweep: at eps = 0.5 the quotient of steps is 4 for r near 1, 5 at r = 0.4, 8 at r = 0.1.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.harness import Row, seconds
from torch import Tensor

from pullback.core.implicit import implicit_gradient
from pullback.methods.eqprop import EquilibriumProp, HopfieldMLP, relax
from pullback.methods.eqprop.energies import Nudge, settle

BATCH = 64
FREE, NUDGED = 20, 4
ERROR = 1e-4  # relative error of the gradient that both minimisers have to reach


def network(sizes: tuple[int, ...], gain: float = 0.5) -> HopfieldMLP:
    torch.manual_seed(0)
    net = HopfieldMLP(list(sizes), gain=gain)
    for layer in net.connections:
        layer.bias.data += 0.1  # most units are free to move, as after some training
    return net


def batch(inputs: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(BATCH, inputs), torch.randint(10, (BATCH,))


def least(what: Callable[[], object], against: Callable[[], object], *, repeats: int = 25) -> float:
    """Ratio of the lower quartiles of processor time: whatever else runs only adds to them."""
    taken = seconds({"what": what, "against": against}, repeats=repeats, clock=time.process_time)
    low = {name: statistics.quantiles(values, n=4)[0] for name, values in taken.items()}
    return low["what"] / low["against"]


def step_ratio(sizes: tuple[int, ...], estimator: str, *, cached: bool = True) -> float:
    """One training step over its (n_free + n_nudged) relaxation steps of the same batches."""
    net, (x, y) = network(sizes), batch(sizes[0])
    ep = EquilibriumProp(net, estimator=estimator, free_steps=FREE, nudge_steps=NUDGED, unsettled="ignore")
    times = 2 if estimator == "centered" else 1
    with torch.no_grad():
        held, states = net.hold(x), relax(net, x).states
        again, doubled = net.repeat(held, times), [s.repeat(times, 1) for s in states]
        strength = torch.full((times * BATCH, 1), 0.5)
        nudge = Nudge(ep.cost, ep.cost.target(y.repeat(times), doubled[-1]), strength)

    @torch.no_grad()
    def sweeps() -> None:
        if cached:
            settle(net, held, states, None, FREE, "async", 0.5)
            settle(net, again, doubled, nudge, NUDGED, "async", 0.5)
            return
        for _ in range(FREE):  # as written: the input's product in every step
            settle(net, net.hold(x), states, None, 1, "async", 0.5)
        for _ in range(NUDGED):
            settle(net, net.repeat(net.hold(x), times), doubled, nudge, 1, "async", 0.5)

    def training() -> None:
        for p in net.parameters():
            p.grad = None
        ep.backward(x, y)

    return least(training, sweeps)


def enough(net: HopfieldMLP, x: Tensor, y: Tensor, exact: Tensor, minimizer: str) -> tuple[int, int]:
    """Steps (free, nudged) whose centred gradient has the wanted error: first the nudged phase, then the free one."""

    def error(free: int, nudged: int) -> float:
        net.zero_grad()
        settings = {"beta": 1e-4, "free_steps": free, "nudge_steps": nudged, "unsettled": "ignore"}
        EquilibriumProp(net, minimizer=minimizer, **settings).backward(x, y)
        found = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        return float((found - exact).norm() / exact.norm())

    def first(good: Callable[[int], bool]) -> int:
        """Fewest steps for which it is good, by bisection: errors fall with the steps."""
        low, high = 0, 1
        while not good(high) and high < 1000:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if good(middle) else (middle, high)
        return high

    nudged = first(lambda n: error(150, n) < 0.7 * ERROR)
    return first(lambda n: error(n, nudged) < ERROR), nudged


def minimizers(sizes: tuple[int, ...], gain: float) -> tuple[float, float, str]:
    """Async over Euler, with as few steps as reach the error: processor time of both phases, and of a training step."""
    net, (x, y) = network(sizes, gain).double(), batch(sizes[0])
    x = x.double()
    states = relax(net, x, steps=300).states
    goal = torch.nn.functional.one_hot(y, 10).double()
    found = implicit_gradient(
        lambda s: net.energy(x, s),
        lambda s: 0.5 * (s[-1] - goal).square().sum(1),
        states,
        list(net.parameters()),
        free=net.movable(states),
        dense_units=0,
    )
    exact = torch.cat([g.flatten() for g in found.grads if g is not None])
    steps = {how: enough(net, x, y, exact, how) for how in ("euler", "async")}
    single, x = net.float(), x.float()
    calls, whole = {}, {}
    for how, (free, nudged) in steps.items():
        ep = EquilibriumProp(single, free_steps=free, nudge_steps=nudged, minimizer=how, unsettled="ignore")
        with torch.no_grad():
            begin, held = single.initial(x), single.hold(x)
            again, doubled = held.repeat(2, 1), [s.repeat(2, 1) for s in relax(single, x).states]
        strength = torch.cat([torch.full((BATCH, 1), 0.1), torch.full((BATCH, 1), -0.1)])
        nudge = Nudge(ep.cost, goal.float().repeat(2, 1), strength)
        first = (single, held, begin, None, free, how, 0.5)
        second = (single, again, doubled, nudge, nudged, how, 0.5)

        @torch.no_grad()
        def phases(first: tuple[Any, ...] = first, second: tuple[Any, ...] = second) -> None:
            settle(*first)
            settle(*second)

        def step(ep: EquilibriumProp = ep) -> None:
            single.zero_grad()
            ep.backward(x, y)

        calls[how], whole[how] = phases, step
    note = ", ".join(f"{how} {free}+{nudged} steps" for how, (free, nudged) in steps.items())
    both = (least(each["async"], each["euler"], repeats=15) for each in (calls, whole))
    return (*both, note)


def ratios() -> list[Row]:
    """All rows of this benchmark."""
    wide, small = (784, 512, 512, 10), (784, 256, 10)
    rows = []
    for sizes in (wide, small):
        name = "-".join(map(str, sizes))
        for estimator in ("random_sign", "centered"):
            what = f"training step {name}, {estimator}"
            rows += [
                Row(what, "its 20 + 4 steps, input product kept", step_ratio(sizes, estimator)),
                Row(what, "its 20 + 4 steps as written", step_ratio(sizes, estimator, cached=False), 1.2),
            ]
    for sizes, gain, bound in ((small, 0.25, 0.2), (small, 0.5, 0.2), ((784, 256, 256, 10), 0.5, None)):
        phases, step, note = minimizers(sizes, gain)
        name = f"{'-'.join(map(str, sizes))}, gain {gain:g}"
        rows += [
            Row(f"async phases {name}", f"Euler's at error {ERROR:g}", phases, bound, note=note),
            Row(f"training step {name}, async", f"Euler's at error {ERROR:g}", step),
        ]
    return rows
