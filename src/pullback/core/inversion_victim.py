"""The model that is attacked and the gradient it shared: checked, put into the attack's state, and put back."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy

from pullback.core.checks import NonFiniteError, instance, shown
from pullback.core.inversion_terms import GradientMatching
from pullback.core.replay import Generators

SharedGradients: TypeAlias = Sequence[Tensor | None] | Mapping[str, Tensor | None] | nn.Module
"""Gradients in the order of the trainable parameters, by name, or a model whose ``.grad`` are taken."""
LossFunction: TypeAlias = Callable[[Any, Tensor], Tensor]
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside wrappers of torch: compiled, data parallel.

    Raises:
        TypeError: if ``model`` is no module, or a TorchScript one.
    """
    instance("model", model, nn.Module)
    while True:
        inner = getattr(model, "_orig_mod", None)
        parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
        inner = model.module if isinstance(model, parallel) else inner
        if not isinstance(inner, nn.Module):
            break
        model = inner
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model must be an ordinary nn.Module, got a TorchScript module. Pass the one it was made of."
        )
    return model


def named_gradients(model: nn.Module, gradients: SharedGradients) -> dict[str, Tensor]:
    """Shared gradients by name of parameter, in the order of the model, on the parameters' device and in their dtype.

    Entries that are None count as zero, as they come from ``torch.autograd.grad(..., allow_unused=True)``.

    Args:
        model: the model they were taken of.
        gradients: a list in the order of the parameters that require gradients (or of all parameters), a mapping from
            names, or a model whose parameters' ``.grad`` are taken.

    Raises:
        TypeError: if an entry is no real floating tensor.
        ValueError: if the number, a name or a shape does not fit the model, or all entries are zero.
        NonFiniteError: if an entry holds NaN or Inf.
    """
    parameters = dict(unwrapped(model).named_parameters())
    given = _by_name(parameters, gradients)
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if name in given:
            found[name] = _fitting(name, given[name], parameter)
    if not any(bool(gradient.count_nonzero()) for gradient in found.values()):
        raise ValueError(
            "gradients must not all be zero, got zeros only: nothing leaks from them. Was the loss cut off from "
            "the model?"
        )
    return found


def _by_name(parameters: Mapping[str, Tensor], gradients: SharedGradients) -> Mapping[str, Tensor | None]:
    if isinstance(gradients, nn.Module):
        found = {n: p.grad for n, p in unwrapped(gradients).named_parameters() if p.grad is not None}
        if not found:
            raise ValueError(
                "gradients must be a model after backward(), got one without .grad. Call backward()."
            )
        return _known(parameters, found)
    if isinstance(gradients, Mapping):
        return _known(parameters, gradients)
    if isinstance(gradients, Tensor) or not isinstance(gradients, Sequence):
        raise TypeError(
            f"gradients must be a list of tensors or a mapping from names, got {shown(gradients)}. Pass "
            "torch.autograd.grad(loss, list(model.parameters()))."
        )
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    names = trained if len(gradients) == len(trained) else list(parameters)
    if len(gradients) != len(names):
        raise ValueError(
            f"gradients must have one entry for each of the {len(trained)} parameters that require gradients, got "
            f"{len(gradients)}. Pass a mapping from names if you have some only."
        )
    return dict(zip(names, gradients, strict=True))


def _known(
    parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]
) -> Mapping[str, Tensor | None]:
    unknown = [name for name in gradients if name not in parameters]
    if unknown:
        raise ValueError(
            f"gradients must be named as the model's parameters, got {shown(unknown[0])}. See model.named_parameters()."
        )
    if not gradients:
        raise ValueError("gradients must not be empty, got {}. Pass at least one parameter's gradient.")
    return gradients


def _fitting(name: str, gradient: Tensor | None, parameter: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(parameter, requires_grad=False)
    if not isinstance(gradient, Tensor) or not gradient.dtype.is_floating_point:
        raise TypeError(f"gradients[{name!r}] must be a floating tensor, got {shown(gradient)}.")
    if gradient.shape != parameter.shape:
        raise ValueError(
            f"gradients[{name!r}] must have the parameter's shape {tuple(parameter.shape)}, got "
            f"{tuple(gradient.shape)}. Is it another model, or another order?"
        )
    if not bool(gradient.isfinite().all()):
        raise NonFiniteError(
            f"gradients[{name!r}] must be finite, got NaN or Inf. Leave it out by a mapping from names to gradients."
        )
    plain = gradient.detach().to_dense() if gradient.layout != torch.strided else gradient.detach()
    return plain.to(
        parameter.device, parameter.dtype
    ).clone()  # never an inference tensor, never the caller's


class Victim:
    """A model with the gradient that it shared, as an attacker sees them.

    Args:
        model: the model at the parameters where the gradient was taken.
        loss_fn: ``loss_fn(model(x), labels) -> 0-dim tensor``, with the client's reduction.
        gradients: see `named_gradients`.
        matching: what is compared.

    Raises:
        TypeError, ValueError: if the gradients do not fit, or the model cannot be attacked as it is.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFunction, gradients: SharedGradients, matching: GradientMatching
    ) -> None:
        self.model, self.loss_fn = unwrapped(model), loss_fn
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function of output and labels, got {shown(loss_fn)}.")
        _check_parameters(self.model)
        with torch.inference_mode(False), torch.no_grad():
            shared = named_gradients(self.model, gradients)
            names = list(shared)
            names = [names[position] for position in matching.select(names)]
            if not names:
                raise ValueError(f"layers must name shared parameters, got {matching.layers}.")
            self.gradients = {name: shared[name] for name in names}
            self.distance = matching.bind(list(self.gradients.values()), names)
        found = dict(self.model.named_parameters())
        self.parameters = [found[name] for name in names]
        self.device, self.dtype = self.parameters[0].device, self.parameters[0].dtype

    @property
    def equations(self) -> int:
        """Number of shared numbers."""
        return sum(gradient.numel() for gradient in self.gradients.values())

    @contextmanager
    def attacked(self) -> Generator[None]:
        """Evaluation mode, gradients on, full precision, and kernels that can be differentiated twice.

        Modes, flags, buffers, compiled calls and random states are afterwards what they were, also after an error.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            if torch.amp.is_autocast_available(self.device.type):
                stack.enter_context(torch.autocast(self.device.type, enabled=False))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # fused attention has no second derivative
            if any(isinstance(module, nn.RNNBase) for module in self.model.modules()):
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            stack.enter_context(left_alone(self.model, self.device))
            _eager(stack, self.model)
            for parameter in self.parameters:
                parameter.requires_grad_()
            self.model.eval()
            yield

    def distance_at(self, images: Tensor, labels: Tensor) -> Tensor:
        """Distance of the guess's gradient from the shared one: a forward pass and a backward pass with a graph."""
        loss = self.loss_fn(self.model(images.clone()), labels)  # in-place layers may write to what they get
        gradients = torch.autograd.grad(
            loss, self.parameters, create_graph=True, allow_unused=True, materialize_grads=True
        )
        return self.distance(gradients)


def _check_parameters(model: nn.Module) -> None:
    rows = list(model.named_parameters())
    if not rows:
        raise ValueError("model must have parameters, got none: there is no gradient to share.")
    for name, parameter in rows:
        if is_lazy(parameter):
            raise ValueError(
                f"model must be initialised, got {name!r} without a shape. Run one batch through it."
            )
        if hasattr(parameter, "full_tensor"):
            raise ValueError(
                f"model must be whole, got {name!r} sharded over ranks. Gather it into one process."
            )
        if parameter.dtype not in {torch.float32, torch.float64}:
            raise TypeError(
                f"model must be in float32 or float64, got {name!r} in {parameter.dtype}: second derivatives drown in "
                "rounding. Attack copy.deepcopy(model).float()."
            )
        if parameter.is_inference():
            raise ValueError(
                f"model must not hold inference tensors, got {name!r}. Make or load it outside torch.inference_mode()."
            )
    places = {(parameter.device, parameter.dtype) for _, parameter in rows}
    if len(places) > 1:
        raise ValueError(f"model must lie on one device in one dtype, got {shown(sorted(map(str, places)))}.")


@contextmanager
def left_alone(model: nn.Module, device: torch.device) -> Generator[None]:
    """Put modes, ``requires_grad``, buffers and random states back as they were found, also after an error."""
    generators = Generators([device])
    random = generators.read()
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [
        (module._buffers, key, buffer, buffer.clone())
        for module in model.modules()
        for key, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_inference()
    ]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for home, key, buffer, value in buffers:
                home[key] = buffer
                if not torch.equal(buffer, value):  # batch normalisation writes without counting a version
                    buffer.copy_(value)
        generators.write(random)


def _eager(stack: ExitStack, model: nn.Module) -> None:
    """Compiled parts run uncompiled: their backward passes cannot be differentiated."""
    compiled = any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )
    if compiled:
        stack.enter_context(torch.compiler.set_stance("force_eager"))


@contextmanager
def training_but_norms(model: nn.Module) -> Generator[None]:
    """Train mode everywhere but in batch normalisations, whose statistics a trial pass must not move."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module in model.modules():
            module.training = not isinstance(module, _BATCH_NORMS)
        yield
    finally:
        for module, training in modes:
            module.training = training
