"""Gradients of chosen weights as two factors, inputs and output errors, in the user's own forward and backward pass."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeAlias, final

import torch
from torch import Tensor, nn

from pullback.core.checks import shown
from pullback.core.layer_rows import unwrapped
from pullback.core.layer_signals import no_trace
from pullback.core.matrices import Source

Factors: TypeAlias = tuple[Tensor, Tensor]
"""Inputs [samples, rows, inputs] and errors [samples, rows, outputs]; the gradient is ``errors^T inputs``."""


@dataclass
class _Call:
    """One call of a linear layer: what went in, and what came back."""

    inputs: Tensor
    version: int | None  # None: the inputs are a copy
    shape: torch.Size
    errors: Tensor | None = None


@final
class FactorCapture:
    """While entered, every backward pass leaves the gradients of ``sources`` here and nowhere else.

    All parameters are frozen meanwhile, so that autograd computes no gradient of a weight at all. Hooks on linear
    layers keep what goes in and the derivative of what comes out; a weight that is used otherwise (torch's attention,
    a tied embedding) is replaced by a leaf that shares its memory. ``.grad``, ``requires_grad``, hooks on weights,
    buffers, modes and random generators are afterwards what they were, also after an exception.

    Args:
        model: the user's model; wrappers (DistributedDataParallel, a compiled module) are looked through.
        sources: from `pullback.core.matrices.find_sources`.
        dense: use leaves for all sources.
        training: mode meanwhile; None leaves modes alone.
        batch_dim: axis of the samples in the inputs of the model and of its layers.
        seed: of random layers.
    """

    def __init__(
        self, model: nn.Module, sources: Sequence[Source], *, dense: bool = False, training: bool | None = None,
        batch_dim: int = 0, seed: int = 0,
    ) -> None:  # fmt: skip
        self.model = model
        self.sources = tuple(sources)
        self._hooked = [each for each in self.sources if each.callable and not dense]
        self._leaves = {each.name: each for each in self.sources if not (each.callable and not dense)}
        self._training, self._batch_dim, self._seed = training, batch_dim, seed
        self._calls: dict[str, list[_Call]] = {each.name: [] for each in self._hooked}
        self._grads: dict[str, Tensor | None] = {}
        self._inputs: dict[tuple[Any, ...], Tensor] = {}
        self._shaped: dict[tuple[int, ...], Tensor] = {}
        self._batches: list[int] = []
        self._stack = contextlib.ExitStack()
        self.device = self.sources[0].weight.device

    def is_hooked(self, source: Source) -> bool:
        """Whether this source's gradient is known by its factors."""
        return source.name not in self._leaves

    # --- in and out -------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        inner = unwrapped(self.model)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(_eager())
            stack.enter_context(_alone(self.model))
            stack.enter_context(no_trace(inner, training=self._training, seed=self._seed))
            stack.enter_context(_frozen(inner))
            stack.enter_context(self._with_leaves())
            handle = inner.register_forward_pre_hook(self._see_batch, with_kwargs=True)
            stack.callback(handle.remove)
            for source in self._hooked:
                for module, _ in source.owners:
                    hook = self._hook(source)
                    added = module.register_forward_hook(hook, with_kwargs=True, prepend=True)
                    stack.callback(added.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @contextlib.contextmanager
    def _with_leaves(self) -> Generator[None]:
        """Leaves in the place of weights that hooks cannot follow."""
        before, leaves = [], {}
        try:
            for name, source in self._leaves.items():
                leaf = nn.Parameter(source.weight.detach(), requires_grad=True)
                leaves[name] = leaf
                for module, attribute in source.owners:
                    if attribute not in module._parameters:
                        raise ValueError(
                            f"route must be 'auto' or 'low_rank' for the parametrised weight {name!r}, got 'dense'. "
                            "It is computed anew in every call."
                        )
                    before.append((module, attribute, module._parameters[attribute]))
                    module._parameters[attribute] = leaf
            yield
        finally:
            for module, attribute, parameter in reversed(before):
                module._parameters[attribute] = parameter
            self._grads = {name: None if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}

    def _see_batch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        for each in (*args, *kwargs.values()):
            if isinstance(each, Tensor) and each.dim() > self._batch_dim:
                self._batches.append(each.shape[self._batch_dim])
                return

    def _hook(self, source: Source) -> Any:
        calls, name = self._calls[source.name], source.name

        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
        ) -> Tensor | None:
            del module
            if not torch.is_grad_enabled():
                raise RuntimeError(
                    f"the layer of {name!r} must run with gradients, got a call under no_grad or inference_mode inside "
                    "the sample. A reentrant checkpoint does that too: use use_reentrant=False."
                )
            seen = args[0] if args else next(iter(kwargs.values()))
            # The first watched layer starts the graph, as everything is frozen; a view is copied, because an operation
            # in place on it would take its place in the graph.
            fresh = None
            if not out.requires_grad:
                fresh = out.detach().requires_grad_().clone()
            elif out._is_view():
                fresh = out.clone()
            version = seen._version if seen.dtype == out.dtype else None
            call = _Call(self._kept(seen, out.dtype), version, out.shape)
            calls.append(call)

            def back(grad: Tensor) -> None:
                grad = grad.detach()
                call.errors = (
                    grad if call.errors is None else call.errors + grad
                )  # a second backward pass adds up

            (out if fresh is None else fresh).register_hook(back)
            return fresh

        return hook

    def _kept(self, seen: Tensor, dtype: torch.dtype) -> Tensor:
        """The input in the precision that the layer computed in; one object for layers that share it."""
        key = (seen.data_ptr(), seen.shape, seen.stride(), seen.dtype, seen.device, seen._version, dtype)
        if key not in self._inputs:
            self._inputs[key] = seen.detach() if seen.dtype == dtype else seen.detach().to(dtype)
        return self._inputs[key]

    # --- afterwards -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse a block in which there was nothing to see.

        Raises:
            RuntimeError: if no backward pass reached a source, a watched layer was not called, or an input was
                overwritten.
        """
        missed = [name for name, calls in self._calls.items() if not calls]
        if missed and len(missed) == len(self._hooked) and not self._leaves:
            raise RuntimeError(
                f"a sample must run the model, got a block in which {shown(missed[0])} was never called. Call the "
                "model that the probe was made for, forwards and backwards, inside the block."
            )
        arrived = any(call.errors is not None for calls in self._calls.values() for call in calls)
        if not arrived and all(grad is None for grad in self._grads.values()):
            raise RuntimeError(
                "a sample must run a backward pass through the watched weights, got none. Call loss.backward() inside "
                "the block, on a loss that depends on the model's output (labels given, no detach, no no_grad)."
            )
        if missed:
            raise RuntimeError(
                f"every watched layer must be called, got no call of {shown(', '.join(missed))}. Narrow match; where a "
                "weight is used without calling its layer, pass route='dense'."
            )
        for name, calls in self._calls.items():
            for call in calls:
                if call.version is not None and call.inputs._version != call.version:
                    raise RuntimeError(
                        f"the input of {name!r} must not be overwritten after its call, got a tensor changed in place. "
                        "Use the operation that is not in place in the model, or route='dense'."
                    )

    def samples(self, *, split: bool) -> int:
        """Number of independent samples along the batch axis; 1 without ``split``.

        Raises:
            RuntimeError: if it cannot be told.
        """
        if not split:
            return 1
        sizes = set(self._batches)
        if not sizes:
            calls = [call for each in self._calls.values() for call in each]
            sizes = {call.shape[self._batch_dim] for call in calls if len(call.shape) > self._batch_dim + 2}
            if self._leaves or any(len(call.shape) <= self._batch_dim + 2 for call in calls):
                sizes = set()
        if len(sizes) != 1 or 0 in sizes:
            raise RuntimeError(
                f"the samples must lie along one axis (batch_dim={self._batch_dim}) of the inputs of the model, got "
                f"sizes {sorted(sizes) or 'unknown'}. Call the model as a whole, with equal batches in every call, or "
                "pass reduction='batch'."
            )
        (count,) = sizes
        if count > 1 and self._leaves:
            raise RuntimeError(
                f"per-sample gradients of {next(iter(self._leaves))!r} need one example per sample, got {count}: the "
                "weight is not used by calling a linear layer of its own. Loop over the examples, or pass "
                "reduction='batch'."
            )
        return count

    def factors(self, source: Source, samples: int) -> Factors:
        """Inputs and errors of a hooked source, all its calls one after the other.

        Raises:
            RuntimeError: if the batch axis of the layer is not that of the model.
        """
        calls = self._calls[source.name]
        errors = [
            self._by_sample(
                call.inputs.new_zeros(call.shape) if call.errors is None else call.errors, source, samples
            )
            for call in calls
        ]
        key = tuple(id(call.inputs) for call in calls)
        if key not in self._shaped:
            inputs = [self._by_sample(call.inputs, source, samples) for call in calls]
            self._shaped[key] = inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1)
        return self._shaped[key], errors[0] if len(errors) == 1 else torch.cat(errors, 1)

    def _by_sample(self, tensor: Tensor, source: Source, samples: int) -> Tensor:
        width, axis = tensor.shape[-1], self._batch_dim
        if samples == 1:
            return tensor.reshape(1, -1, width)
        if axis >= tensor.dim() - 1 or tensor.shape[axis] != samples:
            raise RuntimeError(
                f"the inputs of {source.name!r} must have the {samples} samples along axis {axis}, got the shape "
                f"{tuple(tensor.shape)}. Set batch_dim, give one example per sample, or pass reduction='batch'."
            )
        return tensor.movedim(axis, 0).reshape(samples, -1, width)

    def gradient(self, source: Source) -> Tensor:
        """Gradient [outputs, inputs] of a source that is no linear layer of its own; zeros if nothing reached it."""
        grad = self._grads[source.name]
        grad = torch.zeros_like(source.weight) if grad is None else grad.detach()
        return grad.mT if source.transposed else grad


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Generator[None]:
    """No parameter asks for a gradient meanwhile."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _eager() -> Any:
    """No compiled code, which would not run our hooks."""
    if "torch._dynamo" in sys.modules:  # importing it takes seconds, and without it nothing is compiled
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


@contextlib.contextmanager
def _alone(model: nn.Module) -> Generator[None]:
    """A DistributedDataParallel wrapper talks to no other rank meanwhile, and goes on afterwards as before.

    Its reducer would wait for gradients that never come, and its buffers for ranks that measure nothing. ``no_sync``
    alone leaves a mark: after it the next forward pass of this rank broadcasts no buffers, while the others wait.
    """
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        yield
        return
    wrapper: Any = model
    kept = wrapper.require_forward_param_sync
    try:
        with wrapper.no_sync():
            wrapper.require_forward_param_sync = False
            yield
    finally:
        wrapper.require_forward_param_sync = kept
