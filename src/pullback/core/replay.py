"""Call a function a second time exactly as the first: random numbers, autocast, modes, statistics, the same weights.

What a recomputation in the backward pass has to know besides the arguments. A `Replay` is taken before the first call
and applied around the second; nothing of it is seen from outside, neither in the modules nor in the generators.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

RandomState: TypeAlias = tuple[Tensor, ...]

_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, *_INSTANCE_NORMS)
_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})


class Generators:
    """The global random generators that computations on some devices draw from.

    Args:
        devices: devices of the tensors that are computed with; the CPU's generator always belongs to it.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._others = tuple(dict.fromkeys(each for each in devices if each.type not in {"cpu", "meta"}))

    def read(self) -> RandomState:
        """Present states, the CPU's first."""
        others = (torch.get_device_module(each).get_rng_state(each) for each in self._others)
        return (torch.get_rng_state(), *others)

    def write(self, states: RandomState) -> None:
        """Put states back that :meth:`read` gave."""
        torch.set_rng_state(states[0])
        for device, state in zip(self._others, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)


def moved(before: RandomState, after: RandomState) -> bool:
    """Whether random numbers were drawn between two readings."""
    return any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


@dataclass(frozen=True)
class Autocast:
    """The autocast state of some device types."""

    settings: tuple[tuple[str, torch.dtype, bool], ...]

    @classmethod
    def read(cls, devices: Iterable[torch.device]) -> Autocast:
        """The state that holds now for the types of ``devices``."""
        kinds = [kind for kind in dict.fromkeys(each.type for each in devices) if _has_autocast(kind)]
        return cls(
            tuple((k, torch.get_autocast_dtype(k), torch.is_autocast_enabled(k)) for k in kinds),
        )

    @property
    def enabled(self) -> bool:
        """Whether autocast is on for one of the types."""
        return any(on for *_, on in self.settings)

    @contextmanager
    def applied(self) -> Generator[None]:
        """Hold this state whatever the surrounding one is.

        Casts of weights are not cached: one that was made without a graph would be found again by a call with one, in
        the same autocast region, and the weight would silently lose its gradient.
        """
        now = Autocast.read(torch.device(kind) for kind, *_ in self.settings)
        if now == self and not self.enabled:
            yield
            return
        with ExitStack() as stack:
            for kind, dtype, on in self.settings:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=on, cache_enabled=False))
            yield


def _has_autocast(kind: str) -> bool:
    return kind != "meta" and torch.amp.is_autocast_available(kind)


class Replay:
    """What modules hold at the time of a call: weights, buffers, train or eval mode, versions of buffers.

    Args:
        fn: what is called. Of a function that is no module nothing is known, and nothing can change.
        index: position of every tensor that requires a gradient, by ``id``, among those that `applied` is given.
        name: how an error calls ``fn``.

    Raises:
        RuntimeError: if parameters have no shape yet.
    """

    def __init__(self, fn: Any, index: dict[int, int], name: str) -> None:
        self.name = name
        self.trained: list[tuple[dict[str, Any], str, int]] = []
        self.fixed: list[tuple[dict[str, Any], str, Any]] = []
        self.norms: list[nn.Module] = []
        self._buffers: list[tuple[str, nn.Module, str, Tensor, int]] = []
        if isinstance(fn, nn.Module):
            for path, module in fn.named_modules():
                self._note(path, module, index)

    def _note(self, path: str, module: nn.Module, index: dict[int, int]) -> None:
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) in index:
                self.trained.append((module._parameters, key, index[id(parameter)]))
            else:
                self.fixed.append((module._parameters, key, parameter))
        tracking = isinstance(module, _NORMS) and module.training and module.track_running_stats
        if tracking:
            self.norms.append(module)
        for key, buffer in module._buffers.items():
            if buffer is None or (tracking and key in _STATISTICS):
                continue
            self.fixed.append((module._buffers, key, buffer))
            where = f"{path or type(module).__name__}.{key}"
            version = -1 if buffer.is_inference() else buffer._version
            self._buffers.append((where, module, key, buffer, version))
        self.fixed.append((vars(module), "training", module.training))

    def check_buffers(self) -> None:
        """Refuse a module whose call has changed a buffer, other than the running statistics of a norm.

        Raises:
            RuntimeError: the second call would not be the first one again.
        """
        for where, module, key, buffer, version in self._buffers:
            now = module._buffers.get(key)
            if now is not buffer or (version >= 0 and buffer._version != version):
                raise RuntimeError(
                    f"fn of {self.name} must not change its buffers from call to call, got a change of {where!r} "
                    f"({type(module).__name__}): computed again in the backward pass it would be another function. "
                    "Put it into eval mode, take it out of the coupling, or call set_reversible(net, False)."
                )

    @contextmanager
    def applied(self, leaves: Sequence[Tensor]) -> Generator[None]:
        """Hold everything as it was, with ``leaves`` in place of the trained tensors and statistics frozen.

        Batch statistics are still those of the batch; the running ones have been updated by the first call.
        """
        undo: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for table, key, value in self._wanted(leaves):
                if table.get(key) is not value:
                    undo.append((table, key, table.get(key)))
                    table[key] = value
            yield
        finally:
            for table, key, value in reversed(undo):
                table[key] = value

    def _wanted(self, leaves: Sequence[Tensor]) -> Iterator[tuple[dict[str, Any], str, Any]]:
        for table, key, position in self.trained:
            yield table, key, leaves[position]
        yield from self.fixed
        for norm in self.norms:
            yield vars(norm), "track_running_stats", False
            if isinstance(norm, _INSTANCE_NORMS):  # they update what they have, whatever the switch says
                yield norm._buffers, "running_mean", None
                yield norm._buffers, "running_var", None


def trained_tensors(parts: Iterable[Any]) -> list[Tensor]:
    """Parameters of modules, and tensors, that require a gradient; each once, in order.

    Raises:
        RuntimeError: if a parameter has no shape yet.
    """
    found: dict[int, Tensor] = {}
    for part in parts:
        rows = (
            part.parameters() if isinstance(part, nn.Module) else [part] if isinstance(part, Tensor) else ()
        )
        for tensor in rows:
            if is_lazy(tensor):
                raise RuntimeError(
                    "Parameters of a coupling must have a shape, got a lazy one. "
                    "Call the module once on an example before the reversible sequence."
                )
            if tensor.requires_grad:
                found[id(tensor)] = tensor
    return list(found.values())


def hidden_leaf(output: Tensor, known: Iterable[Tensor]) -> Tensor | None:
    """A leaf that ``output`` depends on and that is not among ``known``, or None.

    A function that closes over weights of its own would lose their gradient without a word.
    """
    allowed = {id(each) for each in known}
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and id(leaf) not in allowed:
            return leaf
        nodes += [following for following, _ in node.next_functions]
    return None
