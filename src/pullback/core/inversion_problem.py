"""What a gradient inversion searches for: images in a box, perhaps with soft labels, judged by their gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from pullback.core.checks import finite, instance, integer, shown
from pullback.core.inversion_terms import total_variation
from pullback.core.inversion_victim import Victim
from pullback.core.streams import generator

Bounds: TypeAlias = tuple[int | float | Tensor, int | float | Tensor]
"""Smallest and largest value of a pixel: numbers, or tensors that broadcast to one input, such as [C, 1, 1]."""
Start: TypeAlias = Literal["normal", "uniform", "zeros"] | Tensor


def box_of(bounds: Bounds | None, shape: tuple[int, ...], victim: Victim) -> Any:
    """Bounds as ``clamp_`` takes them: two numbers, or two tensors that have the shape of one input.

    Raises:
        ValueError: if they do not fit one input.
    """
    if bounds is None:
        return None
    if not any(isinstance(each, Tensor) and each.dim() for each in bounds):
        return tuple(map(float, bounds))
    low, high = (torch.as_tensor(each, dtype=victim.dtype, device=victim.device) for each in bounds)
    try:
        return tuple(each.detach().expand(shape[1:]).contiguous() for each in (low, high))
    except RuntimeError as error:
        raise ValueError(
            f"bounds must broadcast to one input {shape[1:]}, got {shown(low)}. Shape them [C, 1, 1]."
        ) from error


def checked_bounds(bounds: Any) -> Bounds:
    """Bounds, if they are two finite numbers or tensors of which the first is smaller.

    Raises:
        TypeError, ValueError: if they are not.
    """
    fix = "Pass (lowest, highest), for normalised pixels ((0 - mean) / std, (1 - mean) / std)."
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(f"bounds must be a pair, got {shown(bounds)}. {fix}")
    for side in bounds:
        if isinstance(side, Tensor) and side.dim():
            if not bool(side.isfinite().all()):
                raise ValueError(f"bounds must be finite, got {shown(side)} with NaN or Inf. {fix}")
        else:
            finite("bounds", side, fix=fix)
    low, high = bounds
    if not bool((torch.as_tensor(low) < torch.as_tensor(high)).all()):
        raise ValueError(f"bounds must be in order everywhere, got {shown(low)} and {shown(high)}. {fix}")
    return low, high


def checked_shape(input_shape: Any) -> tuple[int, ...]:
    """Shape of a batch of inputs.

    Raises:
        TypeError, ValueError: if it has no batch axis or an empty one.
    """
    if isinstance(input_shape, int) or not isinstance(input_shape, Sequence):
        raise TypeError(
            f"input_shape must be a sequence of sizes, batch first, got {shown(input_shape)}. Pass x.shape."
        )
    shape = tuple(integer("input_shape", size, minimum=1) for size in input_shape)
    if len(shape) < 2:
        raise ValueError(f"input_shape must begin with the batch, got {shape}. For one input write (1, ...).")
    return shape


def checked_labels(labels: Any, shape: tuple[int, ...], victim: Victim) -> Tensor | None:
    """Labels on the victim's device, never an inference tensor.

    Raises:
        TypeError, ValueError: if they are no tensor, or not one row for each input.
    """
    if labels is None:
        return None
    fix = "Pass the client's labels, recover_labels(gradients, batch), or None to search for soft ones."
    instance("labels", labels, Tensor, fix=fix)
    if labels.dim() == 0 or len(labels) != shape[0]:
        raise ValueError(
            f"labels must have one row for each of the {shape[0]} inputs, got {tuple(labels.shape)}. {fix}"
        )
    return labels.detach().to(victim.device).clone()


def dry_pass(victim: Victim, labels: Tensor | None, shape: tuple[int, ...]) -> int:
    """One forward pass on zeros: everything fits, and how wide the output is.

    Raises:
        ValueError: if the model does not take such inputs, or the loss such labels, or it is no number.
        RuntimeError: if a function in the model has no second derivative.
    """
    try:
        output = victim.model(torch.zeros(shape, device=victim.device, dtype=victim.dtype))
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        raise ValueError(_unfit(victim, shape, error)) from error
    if labels is None:
        if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[0] != shape[0]:
            raise ValueError(
                f"labels must be given unless the output is [batch, classes], got {shown(output)}. Pass labels."
            )
        labels = output.new_full(output.shape, 1.0 / output.shape[1]).detach()
    try:
        loss = victim.loss_fn(output, labels)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        raise ValueError(
            f"labels must fit loss_fn and the output {shown(output)}, got {shown(labels)}: {error} Pass the client's "
            "own, with a row for each input."
        ) from error
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise ValueError(
            f"loss_fn must return a 0-dim tensor, got {shown(loss)}. Take the client's mean or sum."
        )
    if not loss.requires_grad:
        raise ValueError(
            "loss_fn must depend on the parameters, got a loss without graph. Was the output detached?"
        )
    _refuse_once(loss)
    return output.shape[-1] if isinstance(output, Tensor) and output.dim() else 0


def _refuse_once(loss: Tensor) -> None:
    """Refuse functions marked ``once_differentiable``: their second derivative is no error but silently missing."""
    todo: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(node, "_forward_cls", None)
        code = getattr(getattr(function, "backward", None), "__code__", None)
        if getattr(code, "co_qualname", "").startswith("once_differentiable."):
            name = getattr(function, "__name__", "a function")
            raise RuntimeError(
                f"model must be differentiable twice, got {name}, which is marked once_differentiable. Put plain torch "
                "operations in its place for the attack."
            )
        todo += [following for following, _ in node.next_functions]


def _unfit(victim: Victim, shape: tuple[int, ...], error: Exception) -> str:
    text = f"input_shape must fit the model, got {shape}: {str(error).splitlines()[0]}"
    if any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module in victim.model.modules()):
        return (
            f"{text}. The model embeds whole numbers, which cannot be searched by gradients: attack a module that "
            "begins behind the embedding."
        )
    return f"{text}. Pass the shape of the client's batch."


class PixelProblem:
    """Images, and perhaps soft labels, whose gradient is to match; what subclasses extend by further unknowns.

    Args:
        victim: model and shared gradient.
        labels: known labels, or None to search for soft ones.
        shape: shape of the images, batch first.
        classes: width of the model's output, used when ``labels`` is None.
        seed: stream of the starts.
        tv: weight of total variation; None: 1e-5, and 0 for vectors.
        signed: whether the images move by the sign of their gradient.
        bounds: box of the images.
        init: first images.
    """

    signed: frozenset[str]

    def __init__(
        self,
        victim: Victim,
        labels: Tensor | None,
        shape: tuple[int, ...],
        classes: int,
        seed: int,
        *,
        tv: float | None,
        signed: bool,
        bounds: Bounds | None,
        init: Start,
    ) -> None:
        self.victim, self.labels = victim, labels
        self.shape, self.classes, self.seed = shape, classes, seed
        self.tv = tv if tv is not None else (1e-5 if len(shape) > 2 else 0.0)
        self.terms: list[str] = ["loss", "match", *(["tv"] if self.tv else [])]
        self.signed = frozenset({"images"} if signed else ())
        self.box, self.init = box_of(bounds, shape, victim), init

    @property
    def unknowns(self) -> int:
        """How many numbers are searched for."""
        return math.prod(self.shape) + (self.shape[0] * self.classes if self.labels is None else 0)

    def draw(self, what: str, shape: Sequence[int], restart: int, *counters: int) -> Tensor:
        """Standard normal numbers of a stream, drawn on the CPU so that all devices start alike."""
        stream = generator(f"inversion.{what}", self.seed, restart, *counters)
        return torch.randn(tuple(shape), generator=stream, dtype=torch.float64).to(
            self.victim.device, self.victim.dtype
        )

    def start(self, restart: int) -> dict[str, Tensor]:
        """First images and first label scores."""
        leaves = {"images": self._first_images(restart)}
        if self.labels is None:
            leaves["labels"] = self.draw("labels", (self.shape[0], self.classes), restart)
        self.project_(leaves)
        return leaves

    def _first_images(self, restart: int) -> Tensor:
        init = self.init
        if isinstance(init, Tensor):
            rows = init if init.dim() == len(self.shape) else init[restart]
            return rows.detach().to(self.victim.device, self.victim.dtype).clone()
        if init == "zeros":
            return torch.zeros(self.shape, device=self.victim.device, dtype=self.victim.dtype)
        normal = self.draw("images", self.shape, restart)
        if init == "normal":
            return normal
        low, high = self.box if self.box is not None else (0.0, 1.0)
        return low + (high - low) * torch.special.ndtr(normal)  # uniform

    def installed(self) -> AbstractContextManager[object]:
        """What must be in place in the model during the whole search."""
        return nullcontext()

    def prepare(self, leaves: Mapping[str, Tensor]) -> None:
        """Called before every forward pass of the model."""

    def evaluate(self, leaves: Mapping[str, Tensor]) -> list[Tensor]:
        """Loss, distance of the gradients, and the priors: what Descent asks for."""
        images = leaves["images"]
        labels = functional.softmax(leaves["labels"], -1) if self.labels is None else self.labels
        self.prepare(leaves)
        match = self.victim.distance_at(images, labels)
        loss, parts = match, [match]
        if self.tv:
            parts.append(total_variation(images))
            loss = loss + self.tv * parts[-1]
        extra = self.penalties(leaves)
        for weight, value in extra:
            loss = loss + weight * value
        return [loss, *parts, *(value for _, value in extra)]

    def penalties(self, leaves: Mapping[str, Tensor]) -> list[tuple[float, Tensor]]:
        """Further terms with their weights, in the order of ``terms``."""
        del leaves
        return []

    @torch.no_grad()
    def project_(self, leaves: Mapping[str, Tensor]) -> None:
        """Clip the images to the box."""
        if self.box is not None:
            leaves["images"].clamp_(*self.box)

    def masks(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks by call, where there are some."""
        del leaves
        return {}

    def fixed(self) -> list[Tensor]:
        """Tensors beside labels that are given and make another attack of this one."""
        first = [self.init] if isinstance(self.init, Tensor) else []
        box = self.box if self.box is not None else ()
        return [*first, *(torch.as_tensor(each, dtype=torch.float64) for each in box)]

    def notes(self) -> list[str]:
        """What a reader of the result should know."""
        equations = self.victim.equations
        if self.unknowns <= equations:
            return []
        return [
            f"{self.unknowns} unknowns but only {equations} shared numbers: different inputs can have this "
            "gradient, and a small loss does not mean that the images are right."
        ]
