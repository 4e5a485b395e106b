"""Which modules are transformer blocks, and where their residual sub-layers are, told by structure.

No library of models is imported.
A module of any room may describe itself: ``residual_block(name) -> Block``. A module whose norms were moved
says so in ``norm_placement``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

SubLayers: TypeAlias = Callable[
    [nn.Module], Sequence[tuple[nn.Module | None, nn.Module, nn.Module | None]] | None
]
"""``sublayers(module)``: None if it is no block, else (input norm, branch, dropout) of each sub-layer, in order."""


@dataclass(frozen=True)
class Branch:
    """One sub-layer of a block, by names within it.

    Args:
        norm: the norm before (after, in a post-LN layer) the branch; empty if there is none.
        modules: what the branch is made of.
    """

    norm: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """A transformer block that was recognised.

    Args:
        name: path in the model; empty for the model itself.
        module: the block.
        kind: ``own``, ``torch`` (branches are methods of the layer) or ``branches`` (each branch is one
            module).
        placement: where its norms stand now.
        branches: its sub-layers.
    """

    name: str
    module: nn.Module
    kind: Literal["own", "torch", "branches"]
    placement: str
    branches: tuple[Branch, ...]

    def weights(self, branch: Branch) -> list[tuple[str, nn.Parameter]]:
        """Trainable weights with at least two axes of one sub-layer, by their names within the block."""
        return [
            (f"{name}.{key}".lstrip("."), weight)
            for name in branch.modules
            for key, weight in self.module.get_submodule(name).named_parameters()
            if weight.dim() >= 2 and "bias" not in key
        ]


Found: TypeAlias = "Block | tuple[str, str]"
"""A block, or (path, why it is none that can be worked on)."""

_TORCH: dict[type[nn.Module], tuple[Branch, ...]] = {
    nn.TransformerEncoderLayer: (
        Branch("norm1", ("self_attn",)),
        Branch("norm2", ("linear1", "linear2")),
    ),
    nn.TransformerDecoderLayer: (
        Branch("norm1", ("self_attn",)),
        Branch("norm2", ("multihead_attn",)),
        Branch("norm3", ("linear1", "linear2")),
    ),
}
_METHODS = ("forward", "_sa_block", "_mha_block", "_ff_block")


def find_blocks(
    model: nn.Module,
    match: type[nn.Module] | tuple[type[nn.Module], ...] | None = None,
    sublayers: SubLayers | None = None,
) -> Iterator[Found]:
    """All blocks of a model in order, and what looks like one but is not known; nothing inside a block is searched."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(not path or name.startswith(f"{path}.") for path in inside):
            continue
        if match is not None and not isinstance(module, match):
            continue
        found = recognise(name, module) if sublayers is None else _from_user(name, module, sublayers(module))
        if found is None and match is not None and sublayers is None:
            found = (name, f"the structure of {type(module).__name__} is not known. Give sublayers=")
        if found is not None:
            inside.append(name)
            yield found


def recognise(name: str, module: nn.Module) -> Found | None:
    """A block, the reason why it cannot be worked on, or None for any other module."""
    describe = getattr(module, "residual_block", None)
    if callable(describe):
        return describe(name)
    done = getattr(module, "norm_placement", None)
    for kind, branches in _TORCH.items():
        if isinstance(module, kind):
            if done is None and not _plain(module, kind):
                return name, f"{type(module).__name__} has a forward of its own. Give sublayers="
            return Block(
                name, module, "torch", done or ("pre" if _flag(module, "norm_first") else "post"), branches
            )
    return _by_children(name, module, done)


def _flag(module: nn.Module, name: str) -> bool:
    return bool(getattr(module, name))


def _plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a torch layer computes what torch's does."""
    same = all(getattr(type(module), each, None) is getattr(kind, each, None) for each in _METHODS)
    return same and "forward" not in vars(module)


def _by_children(name: str, module: nn.Module, done: str | None) -> Found | None:
    """Blocks of the Llama and the GPT-2 form, and those that are known to be something else."""
    names = [key for key, child in module.named_children() if not isinstance(child, nn.Identity) or done]
    has = set(names).issuperset
    if has(("self_attn", "mlp", "post_attention_layernorm", "post_feedforward_layernorm")):
        peri = has(("input_layernorm", "pre_feedforward_layernorm"))  # Gemma 2; without them OLMo 2
        norms = ("input_layernorm", "pre_feedforward_layernorm") if peri else ("", "")
        rows = tuple(Branch(norm, (part,)) for norm, part in zip(norms, ("self_attn", "mlp"), strict=True))
        return Block(name, module, "branches", "peri" if peri else "output", rows)
    if has(("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")):
        pairs = (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))
    elif has(("ln_1", "attn", "ln_2", "mlp")):
        if names.index("ln_1") > names.index("attn"):
            return (
                name,
                "ln_1 is registered after attn, as in post-LN blocks (GPT). Give sublayers= if it is pre-LN",
            )
        cross = (("ln_cross_attn", "crossattention"),) if has(("ln_cross_attn", "crossattention")) else ()
        pairs = (("ln_1", "attn"), *cross, ("ln_2", "mlp"))
    elif has(("attention", "intermediate", "output")):
        return (
            name,
            "it is post-LN with the norms inside its output modules (BERT). Build it anew from PeriNorm",
        )
    elif has(("self_attn",)) and any("norm" in key for key in names):
        return name, f"the structure of {type(module).__name__} is not known. Give sublayers="
    else:
        return None
    branches = tuple(Branch(norm, (branch,)) for norm, branch in pairs)
    return Block(name, module, "branches", done or "pre", branches)


def _from_user(name: str, module: nn.Module, rows: Any) -> Found | None:
    """The block that the user's callback describes, its parts found by identity."""
    if rows is None:
        return None
    paths = {id(each): path for path, each in module.named_modules()}
    branches = []
    for row in rows:
        if not isinstance(row, tuple) or len(row) != 3:
            raise TypeError(
                f"sublayers({name!r}) must give (norm, module, dropout) triples, got {row!r:.80}. "
                "Use None for a missing norm or dropout."
            )
        norm, branch, _ = row
        if id(branch) not in paths or branch is module or (norm is not None and id(norm) not in paths):
            raise ValueError(
                f"sublayers({name!r}) must give modules inside that block, got {type(branch).__name__} "
                f"with norm {type(norm).__name__}. Return the block's own parts."
            )
        branches.append(Branch("" if norm is None else paths[id(norm)], (paths[id(branch)],)))
    done = getattr(module, "norm_placement", None)
    return Block(name, module, "branches", done or "pre", tuple(branches)) if branches else None


# --- weights ------------------------------------------------------------------------------------------------


def last_matrix(module: nn.Module) -> tuple[nn.Module, Tensor] | None:
    """The weight with at least two axes that is registered last (embeddings do not count), and its module."""
    found = [
        (each, weight)
        for each in module.modules()
        if not isinstance(each, nn.Embedding)
        for name, weight in each.named_parameters(recurse=False)
        if weight.dim() >= 2 and "bias" not in name
    ]
    return found[-1] if found else None


# --- tricks that an output norm cancels ---------------------------------------------------------------------

_SCALES = (
    "layer_scale", "layerscale", "layer_scale1", "layer_scale2", "ls1", "ls2", "gamma_1", "gamma_2", "lambda_1",
    "lambda_2", "resweight", "residual_scale", "residual_multiplier", "scale_depth",
)  # fmt: skip


def scaling_tricks(blocks: Iterable[Block]) -> list[str]:
    """What scales the residual branches of these blocks, in words; an output norm cancels or distorts it."""
    blocks = list(blocks)
    found = []
    for block in blocks:
        for path, module in block.module.named_modules():
            for key in _SCALES:
                value = getattr(module, key, None)
                neutral = isinstance(value, int | float) and value == 1
                if isinstance(value, nn.Identity) or value is None or neutral:
                    continue
                found.append(f"{'.'.join(filter(None, (block.name, path, key)))} scales a branch")
    depth = 1 / math.sqrt(2 * max(len(blocks), 1))
    if len(blocks) > 1:
        for block in blocks:
            ratio = _shrunk(block)
            if ratio is not None and abs(ratio / depth - 1) < 0.1:
                found.append(
                    f"the output weights of {block.name or 'the model'} are initialised {ratio:.2f} times smaller, "
                    f"as 1/sqrt(2 * {len(blocks)} blocks) is"
                )
    return found


def _shrunk(block: Block) -> float | None:
    """Spread of the last weight of the attention over that of its first one; None where fan-ins differ."""
    weights = [weight for _, weight in block.weights(block.branches[0])]
    if len(weights) < 2 or any(weight.is_meta for weight in weights):
        return None
    first, last = _spread(weights[0]), last_matrix(block.module.get_submodule(block.branches[0].modules[-1]))
    if last is None or last[1].shape[0] != last[1].shape[1] or last[1].shape[0] not in weights[0].shape:
        return None
    return _spread(last[1]) / first if first > 0 else None


def _spread(weight: Tensor) -> float:
    return float(weight.detach().float().std())
