"""What follows what in a model: layers, normalisations and nonlinearities in the graph that torch.fx traces.

Nothing is decided by a name. A module or call that is not known here ends every path.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pullback.core.checks import instance, shown

Kind: TypeAlias = Literal["features", "channels"]
"""Where a value keeps its width: in the last dimension, or in the second one with space behind it."""


class SpatialRMSNorm(nn.Module):
    """Divide each example [C, ...] by the root of its mean square over channels and space: RMSNorm for convolutions.

    Args:
        channels: C.
        eps: added to the mean square.
        affine: learn a gain for every channel.
    """

    def __init__(self, channels: int, eps: float = 1e-6, affine: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [N, C, ...]."""
        y = F.rms_norm(x, x.shape[1:], eps=self.eps)
        return y if self.weight is None else y * self.weight.view(-1, *[1] * (x.dim() - 2))


# --- what is known ------------------------------------------------------------------------------------------

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_LAYERS = (nn.Linear, *_CONVOLUTIONS)
_FUNCTIONAL_LAYERS: dict[Any, Kind] = {
    F.linear: "features",
    F.conv1d: "channels",
    F.conv2d: "channels",
    F.conv3d: "channels",
}

_PER_CHANNEL = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, SpatialRMSNorm, *_PER_CHANNEL)
_FUNCTIONAL_NORMS = {F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm, F.instance_norm, F.normalize,
                     torch.layer_norm, torch.rms_norm, torch.group_norm, torch.batch_norm}  # fmt: skip

_HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.PReLU)
_NONLINEAR = (
    *_HOMOGENEOUS, nn.ReLU6, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.Tanhshrink,
    nn.Hardshrink, nn.Softshrink, nn.Threshold, nn.GLU,
)  # fmt: skip
_HOMOGENEOUS_CALLS = {"relu", "relu_", "leaky_relu", "leaky_relu_", "prelu"}
_NONLINEAR_CALLS = _HOMOGENEOUS_CALLS | {
    "relu6", "rrelu", "rrelu_", "elu", "elu_", "celu", "celu_", "selu", "selu_", "gelu", "silu", "mish", "tanh",
    "tanh_", "sigmoid", "sigmoid_", "softplus", "softsign", "hardtanh", "hardtanh_", "hardswish", "hardsigmoid",
    "logsigmoid", "tanhshrink", "hardshrink", "softshrink", "threshold", "threshold_", "glu",
}  # fmt: skip

_ELEMENTWISE = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.Upsample,
)  # fmt: skip
_SHAPES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle)
_ELEMENTWISE_CALLS = {
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "clone",
    "contiguous",
    "float",
    "double",
}
_POOL_CALLS = {"max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
               "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "interpolate"}  # fmt: skip
_SHAPE_CALLS = {
    "flatten",
    "view",
    "reshape",
    "permute",
    "transpose",
    "squeeze",
    "unsqueeze",
    "movedim",
    "mean",
}
_SUMS = {operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub}
_CLOSED = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Transformer, nn.TransformerEncoderLayer,
           nn.TransformerDecoderLayer, nn.TransformerEncoder, nn.TransformerDecoder)  # fmt: skip
"""Modules of torch that hold nonlinearities of their own, which a trace does not show."""


@dataclass(frozen=True)
class Layer:
    """A linear map in the graph.

    Args:
        name: the module's path, or the node's name of a functional call.
        node: one call of it.
        weight: path of the weight.
        bias: path of the bias, or None.
        width: output features or channels.
        kind: where the output keeps its width.
        transposed: whether the weight's first dimension is the input's.
    """

    name: str
    node: fx.Node
    weight: str
    bias: str | None
    width: int
    kind: Kind
    transposed: bool = False


class Traced:
    """The graph of a model, with questions about it.

    Args:
        model: what is traced, without being changed.
        norms: further module classes that count as normalisations.
        opaque: paths of modules that are not looked into.
        both_modes: refuse a model that computes something else in training than in evaluation by its own code.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        norms: Iterable[type[nn.Module]] = (),
        opaque: Iterable[str] = (),
        both_modes: bool = False,
    ) -> None:
        instance("model", model, nn.Module, fix="Pass the network itself.")
        self.model = model
        self._norms = (*_NORMS, *norms)
        self._opaque = set(opaque)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.graph = self._traced()
        if both_modes:
            self._same_in_both_modes()
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        found = [layer for node in self.graph.nodes if (layer := self._layer(node)) is not None]
        self.layers: dict[str, list[Layer]] = {}
        for layer in found:
            self.layers.setdefault(layer.name, []).append(layer)
        self._by_node = {layer.node: layer for layer in found}

    def _traced(self) -> fx.Graph:
        known = (*_LAYERS, *self._norms, *_NONLINEAR)
        tracer = _Tracer(known, self._opaque)
        try:
            return tracer.trace(self.model)
        except Exception as error:  # whatever the model's own code raises when it meets a proxy
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
            raise ValueError(
                f"model must be a graph that torch.fx can trace, got {type(self.model).__name__}: {reason}. "
                "Take the branch out of forward, or project an explicit list with "
                "pullback.core.frobenius.FrobeniusProjector."
            ) from error

    def _same_in_both_modes(self) -> None:
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            texts = [str(self._in_mode(mode)) for mode in (True, False)]
        finally:
            for module, mode in modes:
                module.training = mode
        if texts[0] != texts[1]:
            raise ValueError(
                f"model must have one graph for training and evaluation, got two from {type(self.model).__name__}: its "
                "forward asks for self.training. Use modules such as nn.Dropout instead of functional.dropout."
            )

    def _in_mode(self, mode: bool) -> fx.Graph:
        self.model.train(mode)
        return self._traced()

    # --- what a node is ---------------------------------------------------------------------------------

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def _layer(self, node: fx.Node) -> Layer | None:
        module = self.module(node)
        if isinstance(module, _LAYERS) and str(node.target) not in self._opaque:
            name = str(node.target)
            linear = isinstance(module, nn.Linear)
            width = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            bias = None if module.bias is None else f"{name}.bias"
            kind: Kind = "features" if linear else "channels"
            return Layer(
                name, node, f"{name}.weight", bias, int(width), kind, isinstance(module, _TRANSPOSED)
            )
        if node.op == "call_function" and node.target in _FUNCTIONAL_LAYERS:
            args = [*node.args, *[None] * 3]
            weight, bias = (
                node.kwargs.get(key, arg) for key, arg in (("weight", args[1]), ("bias", args[2]))
            )
            if isinstance(weight, fx.Node) and weight.op == "get_attr" and weight.target in self._parameters:
                bias_name = str(bias.target) if isinstance(bias, fx.Node) and bias.op == "get_attr" else None
                found = _FUNCTIONAL_LAYERS[node.target]
                width = len(self._parameters[str(weight.target)])
                return Layer(node.name, node, str(weight.target), bias_name, width, found)
        return None

    def is_norm(self, node: fx.Node) -> bool:
        """Whether a node divides its input by a scale of that input."""
        module = self.module(node)
        return isinstance(module, self._norms) or (
            node.op == "call_function" and node.target in _FUNCTIONAL_NORMS
        )

    def per_channel(self, node: fx.Node) -> bool:
        """Whether a normalisation takes every channel by itself, so that a layer's bias falls out before it."""
        module = self.module(node)
        if isinstance(module, nn.GroupNorm):
            return module.num_groups == module.num_channels
        return isinstance(module, _PER_CHANNEL) or node.target in {
            F.batch_norm,
            F.instance_norm,
            torch.batch_norm,
        }

    def is_nonlinear(self, node: fx.Node) -> bool:
        """Whether a node is an activation function."""
        return isinstance(self.module(node), _NONLINEAR) or _call(node) in _NONLINEAR_CALLS

    def is_in_place(self, node: fx.Node) -> bool:
        """Whether a node overwrites its input."""
        inner = getattr(self.module(node), "inplace", False) or node.kwargs.get("inplace", False)
        return bool(inner) or (_call(node).endswith("_") and not _call(node).endswith("__"))

    def is_homogeneous(self, node: fx.Node) -> bool:
        """Whether it is one of which a positive factor can be taken out, as of ReLU."""
        return isinstance(self.module(node), _HOMOGENEOUS) or _call(node) in _HOMOGENEOUS_CALLS

    def is_elementwise(self, node: fx.Node) -> bool:
        """Whether a node keeps shape and scale: dropout and copies."""
        return isinstance(self.module(node), _ELEMENTWISE) or _call(node) in _ELEMENTWISE_CALLS

    def keeps_scale(self, node: fx.Node) -> bool:
        """Whether a positive factor of a node's only tensor input is one of its output."""
        module = self.module(node)
        if isinstance(module, (*_POOLS, *_SHAPES)) or self.is_elementwise(node) or self.is_homogeneous(node):
            return len(node.all_input_nodes) == 1 or _call(node) in _SHAPE_CALLS
        if node.op == "call_function" and node.target in {
            operator.mul,
            operator.truediv,
            torch.mul,
            torch.div,
        }:
            return len(node.all_input_nodes) == 1 and isinstance(node.args[0], fx.Node)
        return _call(node) in (_POOL_CALLS | _SHAPE_CALLS)

    def closed(self) -> list[str]:
        """Paths of called modules that hold nonlinearities which the trace does not show."""
        return [str(n.target) for n in self.graph.nodes if isinstance(self.module(n), _CLOSED)]

    # --- what follows what ------------------------------------------------------------------------------

    def norms_after(self, node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
        """The normalisations that every path from a node reaches first, and the nodes at which other paths end."""
        norms: list[fx.Node] = []
        ends: list[fx.Node] = []
        waiting, seen = list(node.users), {node}
        while waiting:
            user = waiting.pop()
            if user in seen:
                continue
            seen.add(user)
            if self.is_norm(user) and user.args[:1] and user.args[0] in seen:
                norms.append(user)
            elif _call(user) in {"size", "dim"} or user.target is getattr:  # reads the shape only
                continue
            elif self.keeps_scale(user):
                waiting += user.users
            else:
                ends.append(user)
        return norms, ends

    def before(self, node: fx.Node) -> Iterator[fx.Node]:
        """A node's input, and what lies before it through dropout and copies."""
        source = node.args[0] if node.args else node.kwargs.get("input")
        while isinstance(source, fx.Node):
            yield source
            if not self.is_elementwise(source) or not source.args:
                return
            source = source.args[0]

    def leads_to_layer(self, node: fx.Node) -> bool:
        """Whether any layer, or any module with parameters that is no activation, lies behind a node."""
        waiting, seen = list(node.users), set()
        while waiting:
            user = waiting.pop()
            if user in seen:
                continue
            seen.add(user)
            module = self.module(user)
            weighty = module is not None and any(True for _ in module.parameters())
            if user in self._by_node or (weighty and not self.is_norm(user) and not self.is_nonlinear(user)):
                return True
            if user.op == "call_function" and user.target in {torch.matmul, torch.bmm, operator.matmul}:
                return True
            waiting += user.users
        return False

    def width(self, node: fx.Node) -> tuple[Kind, int] | None:
        """Where and how wide a value is, or None where it cannot be seen."""
        layer = self._by_node.get(node)
        if layer is not None:
            return layer.kind, layer.width
        module = self.module(node)
        gated = isinstance(module, nn.GLU) or _call(node) == "glu"
        passes = self.is_elementwise(node) or self.is_norm(node) or (self.is_nonlinear(node) and not gated)
        pooled = isinstance(module, _POOLS) or _call(node) in _POOL_CALLS
        if (passes or pooled) and node.args and isinstance(node.args[0], fx.Node):
            return self.width(node.args[0])
        if node.op == "call_function" and node.target in _SUMS:
            found = {self.width(each) for each in node.all_input_nodes} - {None}
            return found.pop() if len(found) == 1 else None
        return None

    def describe(self, node: fx.Node) -> str:
        """A node in words."""
        if node.op == "output":
            return "the model's output"
        module = self.module(node)
        return (
            f"{node.target!s} ({type(module).__name__})"
            if module is not None
            else f"{node.name} ({_call(node)})"
        )


class _Tracer(fx.Tracer):
    """A tracer that stops at layers, normalisations and activations, whatever class they derive from."""

    def __init__(self, known: tuple[type[nn.Module], ...], opaque: set[str]) -> None:
        super().__init__()
        self._known, self._stop = known, opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a call of ``m`` stays one node."""
        leaf = isinstance(m, self._known) or module_qualified_name in self._stop
        return leaf or super().is_leaf_module(m, module_qualified_name)


def _call(node: fx.Node) -> str:
    """Name of the function or method that a node calls; empty for other nodes."""
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        target = cast(Callable[..., Any], node.target)
        return getattr(target, "__name__", "") or shown(target)
    return ""
