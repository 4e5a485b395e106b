"""What a gradient gives away without any search: labels, and the input of a linear first layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from pullback.core.checks import choice, floating, instance, integer, shown

LabelMethod: TypeAlias = Literal["auto", "sign", "counts", "distinct"]
NamedGradients: TypeAlias = Sequence[Tensor | None] | Mapping[str, Tensor | None] | nn.Module
_PARALLEL = 1e-4


def _rows(gradients: NamedGradients) -> list[tuple[str, Tensor]]:
    """Gradients with names, or with their positions for names."""
    if isinstance(gradients, nn.Module):
        rows = [(name, parameter.grad) for name, parameter in gradients.named_parameters()]
    elif isinstance(gradients, Mapping):
        rows = list(gradients.items())
    else:
        rows = [(str(position), each) for position, each in enumerate(gradients)]
    return [(name, each.detach()) for name, each in rows if isinstance(each, Tensor)]


def _layer(gradients: NamedGradients, layer: str | None, *, last: bool) -> tuple[str, Tensor, Tensor | None]:
    """Name, weight gradient and bias gradient of the first or last layer that has a weight."""
    rows = _rows(gradients)
    places = [position for position, (_, each) in enumerate(rows) if each.dim() >= 2]
    if layer is not None:
        places = [at for at in places if rows[at][0] in {layer, f"{layer}.weight"}]
    if not places:
        raise ValueError(
            f"layer must name a weight among the gradients, got {layer!r} and {shown([name for name, _ in rows])}. "
            "Name a linear layer, or pass all gradients."
        )
    at = places[-1 if last else 0]
    name, weight = rows[at]
    following = rows[at + 1][1] if at + 1 < len(rows) else None
    bias = following if following is not None and following.shape == weight.shape[:1] else None
    return name.removesuffix(".weight"), weight.double(), None if bias is None else bias.double()


def recover_labels(
    gradients: NamedGradients,
    batch_size: int = 1,
    *,
    method: LabelMethod = "auto",
    layer: str | None = None,
    probabilities: Tensor | None = None,
) -> Tensor:
    """Labels of a batch from the gradient of the last linear layer, for cross-entropy with mean reduction.

    The gradient of the last bias is the mean over samples of (softmax - one-hot), and that of the last weight its
    product with the features.

    - ``"sign"`` (batch 1; Zhao et al. 2020, arXiv:2001.02610): the label is the only negative entry of the bias
      gradient. Without a bias it is the longest row of the weight gradient, since that entry's absolute value is the
      sum of all others; with two classes, where they tie, the row with a negative sum (for features >= 0).
    - ``"counts"``: class c occurs ``batch_size * (mean probability of c - bias gradient of c)`` times, rounded to whole
      counts with the right sum. Exact if ``probabilities`` are the batch's own; an estimate otherwise.
    - ``"distinct"``: the ``batch_size`` classes whose weight gradients have the smallest sums; for features >= 0 and
      labels that differ (Yin et al. 2021, arXiv:2104.07586).

    Args:
        gradients: list, mapping from names or model; the last entry with two axes is taken for the last weight.
        batch_size: number of samples.
        method: ``"auto"``: sign for one sample, else counts where there is a bias, else distinct.
        layer: name of the last linear layer, if it is not the last one.
        probabilities: [classes], what the model predicts on average, for ``"counts"``; None: uniform, as for a model
            that is not trained.

    Returns:
        [batch_size] integers in rising order: a gradient does not know the order of its batch.

    Raises:
        ValueError: if the gradients cannot be those of such a layer, or the method does not fit.
    """
    batch = integer("batch_size", batch_size, minimum=1)
    choice("method", method, ("auto", "sign", "counts", "distinct"))
    name, weight, bias = _layer(gradients, layer, last=True)
    if weight.dim() != 2:
        raise ValueError(
            f"layer must be linear, got {name!r} with a weight of shape {tuple(weight.shape)}. Name it."
        )
    if method == "auto":
        method = "sign" if batch == 1 else "counts" if bias is not None else "distinct"
    if method == "sign" and batch > 1:
        raise ValueError(
            f"method must be 'counts' or 'distinct' for batches, got 'sign' for {batch} samples."
        )
    if method == "sign":
        return _one_label(weight, bias)
    if method == "counts":
        return _counted(bias, batch, probabilities)
    if batch > len(weight):
        raise ValueError(
            f"batch_size must be at most the {len(weight)} classes for 'distinct', got {batch}. Use 'counts'."
        )
    return weight.sum(1).argsort(stable=True)[:batch].sort().values


def _one_label(weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        if int((bias < 0).sum()) != 1:
            raise ValueError(
                f"gradients must be those of one sample under cross-entropy, got {int((bias < 0).sum())} negative "
                "entries in the last bias. Give batch_size."
            )
        return bias.argmin()[None]
    if len(weight) == 2:
        return weight.sum(1).argmin()[None]
    return weight.norm(dim=1).argmax()[None]


def _counted(bias: Tensor | None, batch: int, probabilities: Tensor | None) -> Tensor:
    if bias is None:
        raise ValueError("method must be 'distinct' without a bias in the last layer, got 'counts'.")
    mean = torch.full_like(bias, 1 / len(bias))
    if probabilities is not None:
        mean = floating("probabilities", probabilities, shape=(len(bias),)).detach().to(bias)
    shares = (batch * (mean - bias)).clamp_min(0)
    shares = shares * (batch / shares.sum()) if float(shares.sum()) > 0 else mean * batch
    counts = shares.floor()
    rest = batch - int(counts.sum())
    counts[(shares - counts).argsort(descending=True, stable=True)[:rest]] += 1
    return torch.repeat_interleave(torch.arange(len(bias), device=bias.device), counts.long())


@dataclass(frozen=True)
class LayerLeak:
    """What the gradient of the first layer says about its input.

    Args:
        layer: name of the layer, or its position.
        alignment: smallest absolute cosine of a row of its weight gradient with the longest row; 1 for a single input,
            since row i is then (slope at output i) * input. 0 where the layer is not linear.
        input: [features], the input itself, if there is a single one and a bias; else None.
        direction: [features], the input up to its length and sign, if there is a single one; else None.
        verdict: in words.
    """

    layer: str
    alignment: float
    input: Tensor | None
    direction: Tensor | None
    verdict: str

    @property
    def exact(self) -> bool:
        """Whether the input is known, not only its direction."""
        return self.input is not None


def first_layer_leak(gradients: NamedGradients, *, layer: str | None = None) -> LayerLeak:
    """Whether the input of a linear first layer can be read off its gradient in closed form.

    For one sample the weight gradient is (slopes) (input)ᵀ and the bias gradient is the slopes: their quotient is the
    input, whatever follows, dropout included (Geiping et al. 2020, proposition 3.1). Without a bias the length and the
    sign stay unknown. For several samples rows are mixtures, and nothing is concluded.

    Args:
        gradients: list, mapping from names or model; the first entry with two or more axes is the first weight.
        layer: name of the layer, if it is another one.

    Returns:
        The finding; no leak is a finding too.

    Raises:
        ValueError: if there is no weight among the gradients.
    """
    name, weight, bias = _layer(gradients, layer, last=False)
    if weight.dim() != 2:
        return LayerLeak(name, 0.0, None, None, f"no closed form: layer {name!r} is not linear")
    lengths = weight.norm(dim=1)
    if not bool(lengths.isfinite().all()) or float(lengths.max()) == 0.0:
        return LayerLeak(
            name, 0.0, None, None, f"no closed form: the gradient of layer {name!r} is zero or not finite"
        )
    top = int(lengths.argmax())
    direction = weight[top] / lengths[top]
    live = lengths > 1e-6 * lengths[top]  # what is smaller is rounding
    alignment = float((weight[live] @ direction / lengths[live]).abs().min())
    if alignment < 1 - _PARALLEL:
        verdict = f"no closed form: layer {name!r} saw several inputs, or its gradient was altered"
        return LayerLeak(name, alignment, None, None, verdict)
    if bias is None or float(bias.abs().max()) == 0.0:
        return LayerLeak(
            name, alignment, None, direction, f"the input of layer {name!r} is known up to length and sign"
        )
    found = bias @ weight / bias.square().sum()  # least squares over all rows
    return LayerLeak(
        name, alignment, found, direction, f"the input of layer {name!r} is known exactly, without a search"
    )


def fits_input(leak: LayerLeak, shape: Sequence[int]) -> bool:
    """Whether the leak's input is a whole input of ``shape`` (batch first, one sample)."""
    instance("leak", leak, LayerLeak)
    return leak.input is not None and shape[0] == 1 and leak.input.numel() == math.prod(shape)
