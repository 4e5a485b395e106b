"""The improved architecture (arXiv:2001.04536), its weight matrices, and a look at their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from pullback.core.checks import choice, integer, positive, shown
from pullback.core.kinds import Layer, Probe
from pullback.core.parameters import ParameterSource, named_parameters
from pullback.core.streams import generator
from pullback.methods.pinn_annealing.losses import check_losses, per_loss, reached

Chosen: TypeAlias = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | Iterable[Tensor]
"""Parameters chosen by hand: by name, as pairs, or as a plain list."""

# --- the architecture ----------------------------------------------------------------------------------------------


@torch.no_grad()
def glorot_normal_(module: nn.Module, *, seed: int = 0) -> None:
    r"""Draw every linear layer's weight from a Glorot normal law and set its bias to 0, as the paper does.

    Weights are :math:`N(0, 2 / (n_{in} + n_{out}))`. Layer k draws from stream ``("glorot", seed, k)``, so that the
    same seed gives the same weights on every device.

    Args:
        module: a module with ``nn.Linear`` layers, changed in place.
        seed: stream of the weights; the global generators stay where they are.

    Raises:
        ValueError: if there is no linear layer.
    """
    layers = [each for each in module.modules() if isinstance(each, nn.Linear)]
    if not layers:
        raise ValueError(
            f"module must hold nn.Linear layers, got none in {type(module).__name__}. Initialise it yourself."
        )
    for index, layer in enumerate(layers):
        std = (2.0 / (layer.in_features + layer.out_features)) ** 0.5
        _fill(layer.weight, std, seed, index)
        if layer.bias is not None:
            layer.bias.zero_()


def _fill(tensor: Tensor, std: float, seed: int, index: int) -> None:
    drawn = torch.randn(tensor.shape, generator=generator("glorot", seed, index), dtype=torch.float64)
    tensor.copy_(drawn * std)


@final
class ModifiedMLP(Layer):
    r"""Perceptron whose hidden layers are gated by two encoders of the input (SIAM section 2.6).

    With :math:`U = \phi(X W_u + b_u)` and :math:`V = \phi(X W_v + b_v)`, hidden layer k computes
    :math:`Z = \phi(H W_k + b_k)` and passes on

    - ``variant="official"``: :math:`Z \odot U + (1 - Z) \odot V` in every hidden layer, beginning with
      :math:`H = X` (the published code);
    - ``variant="paper"``: :math:`Z` itself in the first and :math:`(1 - Z) \odot U + Z \odot V` in all later ones
      (the equations as printed).

    Weights are Glorot normal, hidden and output biases 0. Encoder biases are drawn with standard deviation
    :math:`\sqrt{2 / (1 + hidden)}` as in the code. It has :math:`2 (d + 1) \cdot hidden` parameters more than the
    plain perceptron of the same depth.

    Args:
        in_features: number d of inputs.
        hidden: units of every hidden layer.
        out_features: number of outputs.
        depth: hidden layers, at least 1 (``"official"``) or 2 (``"paper"``).
        variant: see above.
        activation: the function :math:`\phi`, elementwise.
        seed: stream of the initial weights; equal seeds give equal networks.
        device: where the parameters live.
        dtype: their dtype; None: torch's default.

    Shape:
        ``[..., in_features]`` in, ``[..., out_features]`` out.

    Raises:
        TypeError: if a size is no integer or ``activation`` is not callable.
        ValueError: if a size is too small or ``variant`` is unknown.

    Example:
        >>> net = ModifiedMLP(2, 50, 1, depth=3)
        >>> net(torch.zeros(7, 2)).shape
        torch.Size([7, 1])
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int,
        *,
        depth: int = 3,
        variant: Literal["official", "paper"] = "official",
        activation: Callable[[Tensor], Tensor] = torch.tanh,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inside, width = integer("in_features", in_features, minimum=1), integer("hidden", hidden, minimum=1)
        outside = integer("out_features", out_features, minimum=1)
        self.variant = choice("variant", variant, ("official", "paper"))
        fewest, why = (1, "") if self.variant == "official" else (2, "The first layer has no gate.")
        layers = integer("depth", depth, minimum=fewest, fix=why)
        if not callable(activation):
            raise TypeError(
                f"activation must be a function of a tensor, got {activation!r}. Pass torch.tanh."
            )
        self.activation = activation

        def linear(a: int, b: int) -> nn.Linear:
            return nn.utils.skip_init(nn.Linear, a, b, device=device, dtype=dtype)

        self.hidden = nn.ModuleList([linear(inside if k == 0 else width, width) for k in range(layers)])
        self.output = linear(width, outside)
        self.encoder_u, self.encoder_v = linear(inside, width), linear(inside, width)
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int = 0) -> None:
        """Draw all weights anew; hidden and output weights are those of `glorot_normal_` on a plain perceptron."""
        glorot_normal_(self, seed=seed)
        for index, encoder in enumerate((self.encoder_u, self.encoder_v)):
            _fill(encoder.bias, (2.0 / (1 + encoder.out_features)) ** 0.5, seed, -1 - index)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [..., out_features] for inputs [..., in_features]."""
        u, v = self.activation(self.encoder_u(x)), self.activation(self.encoder_v(x))
        closed, step = (v, u - v) if self.variant == "official" else (u, v - u)
        h = x
        for number, layer in enumerate(self.hidden):
            z = self.activation(layer(h))
            h = z if number == 0 and self.variant == "paper" else closed + z * step
        return self.output(h)

    def extra_repr(self) -> str:
        """The variant."""
        return f"variant={self.variant!r}"


# --- the choice of parameters --------------------------------------------------------------------------------------


def weight_matrices(source: ParameterSource, *, exclude: str | Iterable[str] = ()) -> dict[str, Tensor]:
    """The parameters over which the paper's code takes its statistics: weights of hidden and output layers.

    Args:
        source: a model, a mapping of names, or (name, tensor) pairs.
        exclude: patterns of names to leave out as well, for example ``"head.*"``.

    Returns:
        Trainable parameters with two or more dimensions by name, in order: no biases, no scales of normalisation
        layers, and of a `ModifiedMLP` no encoder weights. A tied weight appears once.

    Raises:
        TypeError: if ``source`` is none of these.
        ValueError: if nothing is left.
    """
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    encoders = {
        id(parameter)
        for each in (source.modules() if isinstance(source, nn.Module) else ())
        if isinstance(each, ModifiedMLP)
        for encoder in (each.encoder_u, each.encoder_v)
        for parameter in encoder.parameters()
    }
    found = {
        name: parameter
        for name, parameter in named_parameters(source).items()
        if parameter.dim() >= 2 and parameter.requires_grad and id(parameter) not in encoders
        if not any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    if not found:
        raise ValueError(
            f"source must hold a trainable weight matrix, got none outside exclude={patterns}. "
            "Choose the parameters by hand: dict(model.named_parameters())."
        )
    return found


def chosen_parameters(params: Chosen) -> dict[str, Tensor]:
    """Names and tensors of parameters that somebody chose; plain tensors are named by position.

    Raises:
        TypeError: if ``params`` is a module or one tensor, or an entry is sharded or of another type.
        ValueError: if there is none, one is empty, or none can be trained.
    """
    if isinstance(params, nn.Module | Tensor):
        raise TypeError(
            f"params must be chosen by name, got {shown(params)}. Pass weight_matrices(model), or "
            "dict(model.named_parameters()) if biases shall count too."
        )
    rows: list[Any] = list(params.items() if isinstance(params, Mapping) else params)
    found = named_parameters([(f"param{i}", r) if isinstance(r, Tensor) else r for i, r in enumerate(rows)])
    for name, parameter in found.items():
        if not parameter.is_leaf or not parameter.is_floating_point() or not parameter.numel():
            raise ValueError(
                f"params must be floating leaves with entries, got {name!r}: {shown(parameter)}."
            )
        if hasattr(parameter, "full_tensor"):
            raise TypeError(
                f"params must be whole tensors, got the sharded {name!r}. Gradients of single losses are not reduced "
                "by FSDP: use DistributedDataParallel, or fixed weights."
            )
    if not any(parameter.requires_grad for parameter in found.values()):
        raise ValueError(
            f"params must hold a trainable parameter, got {len(found)} frozen ones. Choose others."
        )
    return found


# --- a look at the gradients ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientTable:
    """What several losses send back to the same parameters; tensors are detached.

    Args:
        losses: names of the K losses.
        layers: names of the P parameters.
        maximum: largest absolute entry [K, P].
        mean: mean absolute entry [K, P].
        norm: Euclidean norm [K, P].
        edges: borders of the bins of each layer [P, bins + 1], symmetric about 0.
        counts: entries in each bin [K, P, bins], int64; entries outside, NaN and Inf are in none.
    """

    losses: tuple[str, ...]
    layers: tuple[str, ...]
    maximum: Tensor
    mean: Tensor
    norm: Tensor
    edges: Tensor
    counts: Tensor

    def density(self) -> Tensor:
        """Counts over number of entries and width of the bin [K, P, bins]; integrates to at most 1."""
        width = self.edges[:, 1:] - self.edges[:, :-1]
        total = self.counts.sum(-1, keepdim=True).clamp_min(1)
        return self.counts / total / width


@dataclass(frozen=True)
class AnnealingStatistics:
    """Sizes of the gradients at the last update, per chosen parameter; NaN before the first one.

    Args:
        layers: names of the P parameters.
        reference: by reference loss: the largest absolute entry [P] (``"norm"``: the Euclidean norm).
        terms: by term: the mean absolute entry [P] of the unweighted gradient (``"norm"``: the norm).
    """

    layers: tuple[str, ...]
    reference: Mapping[str, Tensor]
    terms: Mapping[str, Tensor]


@final
class GradientHistograms(Probe):
    """Per-layer histograms of the gradient of each loss (the diagnosis of SIAM figures 2 and 7).

    Costs one backward pass per loss, leaves graphs, ``.grad``, flags and hooks as they are, and can be called
    between the forward pass and ``backward()``.

    Args:
        bins: bins of each histogram.
        span: every layer's histogram covers [-span, span]; None: each layer the range of all its gradients.

    Raises:
        TypeError: if an argument is no number.
        ValueError: if ``bins`` is below 1 or ``span`` is not > 0.

    Example:
        >>> net = torch.nn.Linear(3, 1)
        >>> out = net(torch.ones(5, 3))
        >>> losses = {"large": 100 * out.mean(), "small": out.square().mean()}
        >>> table = GradientHistograms(bins=20)(losses, {"weight": net.weight})
        >>> table.maximum[0] > table.maximum[1]
        tensor([True])
    """

    def __init__(self, bins: int = 50, *, span: float | None = None) -> None:
        self.bins = integer("bins", bins, minimum=1)
        self.span = None if span is None else positive("span", span)

    def __call__(
        self,
        losses: Mapping[str, Tensor],
        params: ParameterSource,
        *,
        weights: Mapping[str, Tensor | float] | None = None,
    ) -> GradientTable:
        """Measure the gradients of ``losses`` for ``params``.

        Args:
            losses: scalars by name, with their graphs.
            params: a model, a mapping or (name, tensor) pairs; frozen parameters are left out.
            weights: factors on the gradients by the names of losses, for example ``balance.weights``; None: 1.

        Returns:
            The table.

        Raises:
            TypeError: if a loss is no floating tensor or a gradient is sparse.
            ValueError: if a loss is no scalar, or a parameter is not reached by every loss.
        """
        named = {name: p for name, p in named_parameters(params).items() if p.requires_grad}
        layers = tuple(named)
        if not layers:
            raise ValueError("params must hold a trainable parameter, got frozen ones only. Choose others.")
        rows: list[list[Tensor]] = []
        check_losses(losses)
        found = per_loss(losses, list(named.values()), keep_graph=True)
        for (name, _), grads in zip(losses.items(), found, strict=True):
            if grads is None:
                raise ValueError(f"losses[{name!r}] must depend on params, got a constant. Leave it out.")
            factor = 1.0 if weights is None else weights[name]
            rows.append([_wide(grad) * factor for grad in reached(name, grads, layers)])
        with torch.no_grad():
            return self._table(tuple(losses), layers, rows)

    def _table(
        self, losses: tuple[str, ...], layers: tuple[str, ...], rows: list[list[Tensor]]
    ) -> GradientTable:
        tables = [torch.stack([torch.stack(torch._foreach_norm(r, order)) for r in rows]) for order in (1, 2)]
        sizes = torch.tensor([grad.numel() for grad in rows[0]], device=tables[0].device)
        maximum = torch.stack([torch.stack([grad.abs().max() for grad in row]) for row in rows])
        edges, counts = [], []
        for layer in zip(*rows, strict=True):
            span = self._span(layer)
            edges.append(torch.linspace(-span, span, self.bins + 1, dtype=layer[0].dtype))
            counts.append(
                [torch.histc(grad[grad.isfinite()].cpu(), self.bins, -span, span) for grad in layer]
            )
        stacked = torch.stack([torch.stack(each) for each in counts], dim=1).long()
        return GradientTable(
            losses, layers, maximum, tables[0] / sizes, tables[1], torch.stack(edges), stacked
        )

    def _span(self, layer: Sequence[Tensor]) -> float:
        """Half the width of a layer's histogram; 1 when all gradients are 0."""
        if self.span is not None:
            return self.span
        tops = [float(torch.where(grad.isfinite(), grad, 0.0).abs().max()) for grad in layer]
        return max(tops) or 1.0

    def __repr__(self) -> str:
        return f"GradientHistograms(bins={self.bins}, span={self.span})"


def _wide(grad: Tensor) -> Tensor:
    return grad.detach().to(torch.promote_types(grad.dtype, torch.float32))
