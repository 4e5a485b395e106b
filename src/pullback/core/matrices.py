"""Which weight matrices of a model are looked at: projections by name, fused ones split, tied ones once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pullback.core.checks import shown

Outputs: TypeAlias = slice | tuple[int, ...] | None
"""Some of the outputs of a linear map: a range, a list, or all of them (None)."""

Splitter: TypeAlias = Callable[[str, Tensor], Mapping[str, slice | Sequence[int]] | None]
"""``splitter(name, weight)`` names parts of a fused weight by their outputs; None: the weight is not fused."""

PRESETS: Mapping[str, str] = {
    "llama": r"(?:^|\.)layers\.(?P<layer>\d+)\.self_attn\.(?P<proj>q_proj|k_proj|v_proj|o_proj|qkv_proj)\.weight$",
    "bert": r"(?:^|\.)layer\.(?P<layer>\d+)\.attention\.(?:self\.(?P<proj>query|key|value)|output\.(?P<out>dense))"
    r"\.weight$",
    "gpt2": r"(?:^|\.)h\.(?P<layer>\d+)\.attn\.(?P<proj>c_attn|c_proj)\.weight$",
    "torch": "every nn.MultiheadAttention, numbered in the order of the model",
}
"""Names of attention projections: Hugging Face's families, and torch's own module."""

_SHORT = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "query": "q", "key": "k", "value": "v", "dense": "o",
    "c_proj": "o", "q_proj_weight": "q", "k_proj_weight": "k", "v_proj_weight": "v",
}  # fmt: skip
_FUSED = frozenset({"c_attn", "qkv_proj", "in_proj_weight"})
_MOST_NAMES = 12


@dataclass(frozen=True)
class Part:
    """One matrix: a weight, or the part of a fused one that makes ``outputs``."""

    layer: int
    proj: str
    outputs: Outputs

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        """This part of a tensor whose axis ``dim`` counts the outputs."""
        if self.outputs is None:
            return tensor
        if isinstance(self.outputs, slice):
            start, stop, _ = self.outputs.indices(tensor.shape[dim])
            return tensor.narrow(dim, start, stop - start)
        return tensor.index_select(dim, torch.tensor(self.outputs, device=tensor.device))

    def width(self, total: int) -> int:
        """Number of outputs, ``total`` being those of the whole weight."""
        if self.outputs is None:
            return total
        return len(range(*self.outputs.indices(total)) if isinstance(self.outputs, slice) else self.outputs)


@dataclass(frozen=True)
class Source:
    """One weight tensor with all places where it is registered.

    Args:
        name: name of the weight in the model, the first one of a shared weight.
        owners: modules that hold it, with the name that it has there.
        callable: whether every owner computes ``x @ weight`` (+ bias) when called, so that hooks see all uses.
        transposed: whether it is stored [inputs, outputs], as Hugging Face's Conv1D does.
        parts: the matrices that it holds.
    """

    name: str
    owners: tuple[tuple[nn.Module, str], ...]
    callable: bool
    transposed: bool
    parts: tuple[Part, ...]

    @property
    def weight(self) -> Tensor:
        """The weight as it is now; of a parametrised layer the one that is computed."""
        module, attribute = self.owners[0]
        return getattr(module, attribute)

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs) of the whole weight."""
        rows, columns = self.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is Hugging Face's Conv1D: a linear layer whose weight is stored transposed."""
    return any(each.__name__ == "Conv1D" for each in type(module).__mro__) and not isinstance(
        module, nn.Conv1d
    )


def find_sources(
    model: nn.Module, match: str | None = None, splitter: Splitter | None = None
) -> list[Source]:
    """The weights that ``match`` names, in the order of the model.

    Args:
        model: any module.
        match: a key of `PRESETS`, a regular expression with the groups ``layer`` (digits) and ``proj`` that is
            searched in names such as ``"model.layers.3.self_attn.q_proj.weight"``, or None for the only preset that
            fits.
        splitter: tells how fused weights are divided; the known ones (GPT-2's ``c_attn``, ``qkv_proj``,
            ``in_proj_weight``) are divided without it. With it the group ``proj`` may be missing.

    Returns:
        At least one source; a weight that several modules share appears once.

    Raises:
        TypeError: if an argument has a wrong type, or a weight is sharded, quantised or complex.
        ValueError: if nothing fits, several presets fit, two matrices have one name, a part is empty, or a weight is
            lazy or on the meta device.
    """
    if match is not None and not isinstance(match, str):
        raise TypeError(f"match must be a string, got {shown(match)}. Pass a regular expression or a preset.")
    if splitter is not None and not callable(splitter):
        raise TypeError(f"splitter must be a function of name and weight, got {shown(splitter)}.")
    weights = list(_weights(model))
    if match is None or match in PRESETS:
        found = _by_preset(model, weights, match)
    else:
        found = _by_pattern(weights, match, named=splitter is None)
    if not found:
        raise ValueError(_nothing(model, weights, match))
    sources = _collected(model, weights, found, splitter)
    _check_names(sources)
    return sources


# --- what there is --------------------------------------------------------------------------------------------------

_Weight: TypeAlias = tuple[str, nn.Module, str, Tensor]
_Found: TypeAlias = tuple[_Weight, int, str]


def _weights(model: nn.Module) -> Iterator[_Weight]:
    """Name, owner, attribute and tensor of every matrix, shared ones at each place."""
    for prefix, module in model.named_modules(remove_duplicate=True):
        names = [name for name, each in module._parameters.items() if each is not None]
        if isinstance(module, nn.Linear) and "weight" not in names:
            names.append("weight")  # parametrised: the weight is computed
        for attribute in names:
            tensor = getattr(module, attribute, None)
            if isinstance(tensor, Tensor) and (is_lazy(tensor) or tensor.dim() == 2):
                yield (f"{prefix}.{attribute}" if prefix else attribute), module, attribute, tensor


def _by_preset(model: nn.Module, weights: list[_Weight], wanted: str | None) -> list[_Found]:
    hits = {}
    for preset, pattern in PRESETS.items():
        if wanted in {None, preset}:
            hits[preset] = _of_torch(model, weights) if preset == "torch" else _by_pattern(weights, pattern)
    fitting = [preset for preset, found in hits.items() if found]
    if len(fitting) > 1:
        raise ValueError(
            f"match must say which projections are meant, got None where the presets {', '.join(fitting)} fit. Name "
            "one of them, or pass a regular expression."
        )
    if not fitting:
        return []
    return [(weight, layer, _SHORT.get(proj, proj)) for weight, layer, proj in hits[fitting[0]]]


def _of_torch(model: nn.Module, weights: list[_Weight]) -> list[_Found]:
    attentions = [each for each in model.modules() if isinstance(each, nn.MultiheadAttention)]
    number = {id(each): layer for layer, each in enumerate(attentions)}
    outward = {id(each.out_proj): layer for layer, each in enumerate(attentions)}
    found = []
    for weight in weights:
        _, module, attribute, _ = weight
        if id(module) in number:
            found.append((weight, number[id(module)], attribute))
        elif id(module) in outward:
            found.append((weight, outward[id(module)], "o"))
    return found


def _by_pattern(weights: list[_Weight], match: str, *, named: bool = True) -> list[_Found]:
    try:
        pattern = re.compile(match)
    except re.error as error:
        raise ValueError(
            f"match must be a preset ({', '.join(PRESETS)}) or a regular expression, got {shown(match)}: {error}."
        ) from error
    groups = {"layer", "proj"} if named else {"layer"}
    if not groups <= set(pattern.groupindex):
        raise ValueError(
            f"match must have the named groups {' and '.join(sorted(groups))}, got {shown(match)}. Write "
            r"'layers\.(?P<layer>\d+)\.self_attn\.(?P<proj>[qkvo])_proj'."
        )
    found = []
    for weight in weights:
        hit = pattern.search(weight[0])
        if hit is None:
            continue
        given = hit.groupdict()
        if not (given["layer"] or "").isdigit():
            raise ValueError(
                f"match must find a whole number as layer, got {given['layer']!r} in {weight[0]!r}. Use \\d+."
            )
        found.append((weight, int(given["layer"]), given.get("proj") or given.get("out") or "weight"))
    return found


# --- weights once, fused ones in parts ------------------------------------------------------------------------------


def _collected(
    model: nn.Module, weights: list[_Weight], found: list[_Found], splitter: Splitter | None
) -> list[Source]:
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for _, module, attribute, tensor in weights:
        places.setdefault(id(tensor), []).append((module, attribute))
    # torch's attention uses the weight of its output projection without calling it
    silent = {id(each.out_proj) for each in model.modules() if isinstance(each, nn.MultiheadAttention)}
    sources: list[Source] = []
    seen: set[int] = set()
    for (name, module, _, tensor), layer, proj in found:
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        _check_weight(name, tensor)
        owners = tuple(places[id(tensor)])
        transposed = is_conv1d(module)
        outputs = tensor.shape[1] if transposed else tensor.shape[0]
        parts = _parts(model, name, tensor, layer, proj, outputs, splitter)
        called = all(
            _called(each, key) and is_conv1d(each) == transposed and id(each) not in silent
            for each, key in owners
        )
        sources.append(Source(name, owners, called, transposed, parts))
    return sources


def _called(module: nn.Module, attribute: str) -> bool:
    return attribute == "weight" and (isinstance(module, nn.Linear) or is_conv1d(module))


def _parts(
    model: nn.Module,
    name: str,
    weight: Tensor,
    layer: int,
    proj: str,
    outputs: int,
    splitter: Splitter | None,
) -> tuple[Part, ...]:
    divided: Mapping[str, slice | Sequence[int]] | None = None
    if splitter is not None:
        divided = splitter(name, weight)
    elif proj in _FUSED:
        divided = split_outputs(**_sizes(model, name, outputs))
    if divided is None:
        return (Part(layer, proj, None),)
    parts = []
    for key, chosen in divided.items():
        part = Part(layer, key, chosen if isinstance(chosen, slice) else tuple(int(each) for each in chosen))
        ends = (chosen.start or 0, (chosen.stop or outputs) - 1) if isinstance(chosen, slice) else chosen
        inside = all(0 <= each < outputs for each in ends)
        if not inside or not part.width(outputs) or (isinstance(chosen, slice) and (chosen.step or 1) != 1):
            raise ValueError(
                f"splitter must name some of the {outputs} outputs of {name!r}, got {shown(chosen)} for {key!r}. Give "
                "a slice without a step, or a list of indices."
            )
        parts.append(part)
    return tuple(parts)


def split_outputs(**sizes: int) -> dict[str, slice]:
    """Parts that follow each other along the outputs of a fused weight: ``split_outputs(q=576, k=192, v=192)``."""
    parts, start = {}, 0
    for name, size in sizes.items():
        parts[name] = slice(start, start + size)
        start += size
    return parts


def split_heads(names: Sequence[str], *, heads: int, width: int) -> dict[str, tuple[int, ...]]:
    """Parts that alternate head by head, ``[heads, len(names), width]`` outputs in all, as GPT-NeoX and BLOOM do."""
    stride = len(names) * width
    return {
        name: tuple(head * stride + place * width + unit for head in range(heads) for unit in range(width))
        for place, name in enumerate(names)
    }


def _sizes(model: nn.Module, name: str, outputs: int) -> dict[str, int]:
    """Outputs of q, k and v: equal thirds, or by the heads of a configuration with grouped queries."""
    path = name.removesuffix(".weight").rpartition(".")[0]
    config: Any = getattr(model.get_submodule(path), "config", None)
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None)
    heads, groups = (heads, groups) if heads and groups else (1, 1)
    width, rest = divmod(outputs, heads + 2 * groups)
    if rest:
        raise ValueError(
            f"a fused weight must hold q, k and v, got {outputs} outputs in {name!r} for {heads} heads and {groups} "
            "key-value heads. Pass splitter=lambda name, weight: split_outputs(q=..., k=..., v=...)."
        )
    return {"q": heads * width, "k": groups * width, "v": groups * width}


# --- refusals -------------------------------------------------------------------------------------------------------


def _check_weight(name: str, weight: Tensor) -> None:
    if is_lazy(weight):
        raise ValueError(
            f"model must be initialised, got the lazy weight {name!r}. Run the model once before."
        )
    if weight.is_meta:
        raise ValueError(f"model must have its weights, got {name!r} on the meta device. Load them first.")
    if weight.is_inference():
        raise ValueError(
            f"weights must be able to have gradients, got {name!r} made in inference_mode. Build the model outside it."
        )
    if type(weight).__name__ == "DTensor":
        raise TypeError(f"weights must be whole, got a DTensor in {name!r}. Measure before fully_shard.")
    if not weight.is_floating_point():
        raise TypeError(
            f"weights must be real floating tensors, got {name!r} of dtype {weight.dtype}. Dequantise the model first."
        )


def _check_names(sources: list[Source]) -> None:
    owner: dict[tuple[int, str], str] = {}
    for source in sources:
        for part in source.parts:
            key = (part.layer, part.proj)
            if key in owner:
                raise ValueError(
                    f"match must give each matrix a name of its own, got layer {part.layer} proj {part.proj!r} for "
                    f"{owner[key]!r} and {source.name!r}. Narrow the expression, or let proj tell them apart."
                )
            owner[key] = source.name


def _nothing(model: nn.Module, weights: list[_Weight], match: str | None) -> str:
    if not weights:
        return f"model must hold weight matrices, got {type(model).__name__} without any. Pass the trained network."
    kinds = list(dict.fromkeys(re.sub(r"\d+", "N", name) for name, *_ in weights))
    listed = ", ".join(kinds[:_MOST_NAMES]) + (", ..." if len(kinds) > _MOST_NAMES else "")
    return (
        f"match must find weight matrices in {type(model).__name__}, got {match!r}, which finds none. Presets: "
        f"{', '.join(PRESETS)}. The model's matrices (N stands for a number): {listed}. Write a regular expression "
        "with the groups layer and proj for them."
    )
