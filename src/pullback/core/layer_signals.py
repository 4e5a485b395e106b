"""One forward and two backward passes that leave no trace: activations and derivatives of the probed layers as rows."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core.buffers import buffers_apart
from pullback.core.layer_rows import (
    Call,
    Recorder,
    check_unchanged,
    count_rows,
    input_rows,
    output_rows,
    weight_gradient,
)
from pullback.core.likelihood import Kind, Likelihood
from pullback.core.rng import rng_state, set_rng_state
from pullback.core.streams import generator, stream_seed


@dataclass(frozen=True)
class Signal:
    """What is known of one layer.

    Args:
        rows: incoming activations of the rows used, [groups, R, n].
        delta: derivatives for the Fisher matrix, of the same rows, [R, m].
        g: mean over *all* rows of (derivative of the summed loss with the real labels) times a, [m, n].
        g0: mean over all rows of that derivative, [m].
    """

    rows: Tensor
    delta: Tensor
    g: Tensor
    g0: Tensor


@dataclass(frozen=True)
class Passes:
    """What one measurement's passes left behind.

    Args:
        loss: mean loss over the terms of the likelihood; not finite where nothing else was computed.
        calls: calls of every layer.
        fisher: derivatives of the summed loss with the labels of the Fisher matrix, by layer and call.
        real: the same with the real labels.
    """

    loss: float
    calls: Mapping[str, Sequence[Call]]
    fisher: Mapping[str, Sequence[Tensor]]
    real: Mapping[str, Sequence[Tensor]]


@contextlib.contextmanager
def full_precision(model: nn.Module) -> Generator[None]:
    """Outside autocast and inference mode, on the device of the model."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    with torch.inference_mode(False), torch.autocast(device, enabled=False):
        yield


@contextlib.contextmanager
def no_trace(model: nn.Module, *, training: bool | None, seed: int) -> Generator[None]:
    """Run with gradients and private random numbers; put back all that a pass may change, also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    states = rng_state()
    try:
        torch.manual_seed(stream_seed("signals", seed))
        if training is not None:
            model.train(training)
        with buffers_apart(model), torch.enable_grad(), _eager(model):
            yield
    finally:
        set_rng_state(states)
        for module, mode in modes:
            module.training = mode


def _eager(model: nn.Module) -> Any:
    """No compiled code while we measure: it would not run hooks that came after compilation."""
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def passes(
    model: nn.Module, layers: dict[str, Any], x: Any, y: Tensor, *, fisher: str, likelihood: Kind, seed: int
) -> Passes:
    """Forward once, backward for the labels of the Fisher matrix and for the real ones; nothing reaches a ``.grad``.

    Args:
        model: to be called inside `no_trace`.
        layers: what is recorded.
        x: input, a tuple of positional or a mapping of named arguments.
        y: real labels.
        fisher: ``"model"`` samples labels from the model, ``"empirical"`` takes the real ones.
        likelihood: see `Likelihood`.
        seed: of the sampled labels.
    """
    with Recorder(layers) as recorder:
        out = _call(model, x)
    calls = recorder.calls
    term = Likelihood(getattr(out, "logits", out), _usable(y), likelihood)
    loss = term.negative_log()
    mean = float(loss.detach()) / term.terms
    if not torch.isfinite(loss):
        return Passes(mean, calls, {}, {})
    edges = [call.edge for each in calls.values() for call in each]
    sampled: Sequence[Tensor | None] = ()
    if fisher == "model" and edges:
        labels = term.sample(generator("signals.labels", seed, device=term.out.device))
        sampled = torch.autograd.grad(term.negative_log(labels), edges, retain_graph=True, allow_unused=True)
    real = torch.autograd.grad(loss, edges, allow_unused=True) if edges else ()
    by_layer = _sorted(calls, real)
    return Passes(mean, calls, _sorted(calls, sampled) if sampled else by_layer, by_layer)


def _call(model: nn.Module, x: Any) -> Any:
    if isinstance(x, Mapping):
        return model(**{name: _usable(each) for name, each in x.items()})
    arguments = x if isinstance(x, tuple) else (x,)
    return model(*(_usable(each) for each in arguments))


def _usable(value: Any) -> Any:
    """A tensor of inference mode cannot be part of a graph: its copy can."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _sorted(calls: Mapping[str, Sequence[Call]], grads: Sequence[Tensor | None]) -> dict[str, list[Tensor]]:
    """Gradients by layer and call; zeros where the loss does not depend on the layer."""
    todo = iter(grads)
    found: dict[str, list[Tensor]] = {}
    for name, each in calls.items():
        pairs = [(call, next(todo)) for call in each]
        found[name] = [call.input.new_zeros(call.shape) if grad is None else grad for call, grad in pairs]
    return found


def signal_of(name: str, layer: Any, seen: Passes, *, max_rows: int | None, seed: int) -> Signal:
    """Rows of one layer, at most ``max_rows`` drawn evenly, in float32 (float64 where the layer computes in it)."""
    calls, fisher, real = seen.calls[name], seen.fisher[name], seen.real[name]
    counts = [count_rows(layer, call) for call in calls]
    total = sum(counts)
    picked = _picked(total, max_rows, generator("signals.rows", seed))
    wide = torch.float64 if calls[0].input.dtype == torch.float64 else torch.float32
    rows, delta = [], []
    g: Any = 0.0
    g0: Any = 0.0
    start = 0
    for call, count, first, second in zip(calls, counts, fisher, real, strict=True):
        check_unchanged(name, call)
        some = None
        if picked is not None:
            inside = picked[(picked >= start) & (picked < start + count)] - start
            some = inside.to(call.input.device)
        start += count
        x = call.input.to(wide)
        rows.append(input_rows(layer, x, some))
        delta.append(output_rows(layer, first, some).to(wide))
        g = g + weight_gradient(layer, x, second.to(wide)) / total
        g0 = g0 + output_rows(layer, second, None).sum(0, dtype=wide) / total
    one = len(calls) == 1
    return Signal(rows[0] if one else torch.cat(rows, 1), delta[0] if one else torch.cat(delta), g, g0)


def _picked(total: int, most: int | None, stream: torch.Generator) -> Tensor | None:
    if most is None or total <= most:
        return None
    return torch.randperm(total, generator=stream)[:most].sort().values
