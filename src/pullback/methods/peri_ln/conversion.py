"""Give an existing transformer output norms: torch's layers, blocks of Hugging Face's form, or any by a callback."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from pullback.core.checks import choice, instance
from pullback.core.extension import extend
from pullback.core.norm_layers import twin_norm
from pullback.core.residual import Block, Branch, SubLayers, find_blocks, scaling_tricks
from pullback.methods.peri_ln.placement import OUTPUT_PLACEMENTS, checked_gain, refuse_zero

Target: TypeAlias = Literal["peri", "sandwich", "output"]
TARGETS: tuple[Target, ...] = ("peri", "sandwich", "output")


@dataclass(frozen=True)
class NormReport:
    """What a conversion did.

    Args:
        converted: number of blocks.
        sublayers: number of their sub-layers, each with a new output norm.
        skipped: (path, reason) of what looked like a block and was left alone.
        added: paths of the new norms.
        dropped: paths of the norms whose weights are gone: those of post-LN layers, and input norms under
            ``output``.
        notes: what else a reader should know.
    """

    converted: int
    sublayers: int
    skipped: tuple[tuple[str, str], ...]
    added: tuple[str, ...]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]


# --- extended classes ---------------------------------------------------------------------------------------


class _NormedOutput(nn.Module):
    """Normalises the (first) output of the class that it is mixed into."""

    norm_out: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the branch, normalised; further outputs are passed on."""
        out = super().forward(*args, **kwargs)
        if isinstance(out, Tensor):
            return self.norm_out(out)
        if isinstance(out, tuple | list) and out and isinstance(out[0], Tensor):
            return type(out)((self.norm_out(out[0]), *out[1:]))
        raise TypeError(
            f"the branch {type(self).__name__} must give a tensor or a tuple that begins with one, got "
            f"{type(out).__name__}. Convert another module by sublayers=."
        )


class _EncoderLayer(nn.TransformerEncoderLayer):
    """torch's encoder layer with output norms; no fast path, so that train and eval compute the same."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As torch's layer; see there."""
        attend = functools.partial(
            _attend, self.self_attn, mask=src_mask, padding=src_key_padding_mask, is_causal=is_causal
        )
        x = _add(self, 1, src, attend)
        return _add(self, 2, x, lambda y: _feed(self, y))


class _DecoderLayer(nn.TransformerDecoderLayer):
    """torch's decoder layer with output norms."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As torch's layer; see there."""
        attend = functools.partial(
            _attend, self.self_attn, mask=tgt_mask, padding=tgt_key_padding_mask, is_causal=tgt_is_causal
        )
        cross = functools.partial(
            _attend,
            self.multihead_attn,
            memory=memory,
            mask=memory_mask,
            padding=memory_key_padding_mask,
            is_causal=memory_is_causal,
        )
        x = _add(self, 2, _add(self, 1, tgt, attend), cross)
        return _add(self, 3, x, lambda y: _feed(self, y))


def _add(layer: nn.Module, number: int, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
    """Add dropout(N_out(branch(N_in(x)))) to x, by the names of the layer; N_in is an identity under ``output``."""
    norm_in, norm_out, dropout = (
        layer.get_submodule(f"{name}{number}{tail}")
        for name, tail in (("norm", ""), ("norm", "_out"), ("dropout", ""))
    )
    return x + dropout(norm_out(branch(norm_in(x))))


def _attend(
    attention: nn.MultiheadAttention,
    x: Tensor,
    *,
    mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
    memory: Tensor | None = None,
) -> Tensor:
    source = x if memory is None else memory
    return attention(
        x, source, source, attn_mask=mask, key_padding_mask=padding, need_weights=False, is_causal=is_causal
    )[0]


def _feed(layer: Any, x: Tensor) -> Tensor:
    return layer.linear2(layer.dropout(layer.activation(layer.linear1(x))))


# --- conversion ---------------------------------------------------------------------------------------------


def convert_norm_placement(
    model: nn.Module,
    placement: Target = "peri",
    *,
    match: type[nn.Module] | tuple[type[nn.Module], ...] | None = None,
    sublayers: SubLayers | None = None,
    embedding: str | None = None,
    final_norm: bool = True,
    gain_init: float = 1.0,
) -> NormReport:
    """Add output norms to the blocks of an existing model, in place.

    Known blocks: torch's ``TransformerEncoderLayer`` and ``TransformerDecoderLayer`` (pre-LN and post-LN),
    pre-LN blocks of Hugging Face's Llama form (``input_layernorm``, ``self_attn``,
    ``post_attention_layernorm``, ``mlp``) and GPT-2 form (``ln_1``, ``attn``, ``ln_2``, ``mlp``),
    `PeriNormBlock` and `PeriNorm`; any other pre-LN block by ``sublayers``.

    An existing input norm stays with its weights; the output norm is a fresh one of its class, eps and
    dtype. All names stay, so that a checkpoint of the model as it was loads with ``strict=False`` and
    misses the new norms only. The *function* changes: a trained model must be trained on. The norms of a
    post-LN layer are replaced by fresh ones, because theirs belong to the sum. Do this before the optimizer
    is made and before DDP, FSDP or ``torch.compile`` wraps the model.

    Args:
        model: any module; a block itself will do.
        placement: ``peri`` (with ``embedding`` the embedding is normalised, too), ``sandwich`` (the blocks
            alone) or ``output`` (the input norms are dropped).
        match: only modules of these classes are converted.
        sublayers: ``sublayers(module)`` returns None, or for a block that computes ``x +
            dropout(module(norm(x)))`` the (norm, module, dropout) of each sub-layer; norm and dropout may
            be None.
        embedding: path of the embedding whose output is to be normalised.
        final_norm: give a ``TransformerEncoder`` or ``TransformerDecoder`` that has none a norm at its end:
            post-LN models need none, these placements do.
        gain_init: gain of the output norms at the start.

    Returns:
        Counts, paths and reasons.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if no block is converted (the message gives the reasons), if a branch is initialised to
            zero, or if an
            argument does not fit. Nothing is changed then.

    Warns:
        UserWarning: if the branches are scaled (layer scale, residual multiplier, output weights
            initialised smaller with
            depth): the output norm cancels a scale before it and competes with one behind it.
    """
    instance("model", model, nn.Module)
    target: Target = choice("placement", placement, TARGETS)
    gain = checked_gain(gain_init, target)
    if embedding is not None and target == "sandwich":
        raise ValueError(
            f"embedding must be None with placement='sandwich', got {embedding!r}. Use placement='peri'."
        )
    blocks, skipped = _plan(model, match, sublayers)
    _refuse(blocks)
    work = [_Sublayers(block, target, gain) for block in blocks]  # makes the norms, so it may refuse
    table = None if embedding is None else _Embedding(model, embedding, work[0].norms[0])
    _warn_of_scales(blocks)
    added, dropped = [], []
    for each in work:
        new, old = each.apply()
        added += new
        dropped += old
    added += [] if table is None else table.apply()
    added += _end_stacks(model, work, final_norm)
    return NormReport(
        converted=len(blocks),
        sublayers=sum(len(block.branches) for block in blocks),
        skipped=tuple(skipped),
        added=tuple(added),
        dropped=tuple(dropped),
        notes=tuple(_notes(blocks)),
    )


def _plan(
    model: nn.Module, match: type[nn.Module] | tuple[type[nn.Module], ...] | None, sublayers: SubLayers | None
) -> tuple[list[Block], list[tuple[str, str]]]:
    """Blocks to convert, and what is left alone.

    Raises:
        ValueError: if there is no block to convert.
    """
    found = list(find_blocks(model, match, sublayers))
    skipped = [row for row in found if not isinstance(row, Block)]
    blocks = [row for row in found if isinstance(row, Block)]
    skipped += [
        (each.name, f"its placement is {each.placement!r} already")
        for each in blocks
        if each.placement in OUTPUT_PLACEMENTS
    ]
    blocks = [each for each in blocks if each.placement not in OUTPUT_PLACEMENTS]
    if not blocks:
        reasons = "; ".join(sorted({f"{name or 'model'}: {reason}" for name, reason in skipped})[:3])
        raise ValueError(
            f"model must hold a block to convert, got none in {type(model).__name__}"
            f"{f' ({reasons})' if reasons else ''}. Name its sub-layers by sublayers=lambda module: ..."
        )
    return blocks, skipped


def _refuse(blocks: list[Block]) -> None:
    """Refuse branches that are zero at the start, replaced forwards and shared parts, before anything is changed."""
    seen: dict[int, str] = {}
    for block in blocks:
        for branch in block.branches:
            part = block.module.get_submodule(branch.modules[-1])
            path = f"{block.name}.{branch.modules[-1]}".lstrip(".")
            refuse_zero(path, part)
            if block.kind == "branches" and ("forward" in vars(part) or hasattr(part, "norm_out")):
                raise ValueError(
                    f"{path} must be an ordinary module, got one whose forward was replaced or that has a norm_out. "
                    "Convert the model before other tools wrap it."
                )
            if seen.setdefault(id(part), path) != path:
                raise ValueError(
                    f"{path} must be a module of its own, got the one of {seen[id(part)]}. "
                    "Give each sub-layer its module; weights may be tied."
                )


def _warn_of_scales(blocks: list[Block]) -> None:
    tricks = scaling_tricks(blocks)
    if tricks:
        warnings.warn(
            f"{len(tricks)} residual scale(s) meet an output norm, which cancels or distorts them: {tricks[0]}. "
            "Remove the scale and set the gain by gain_init.",
            UserWarning,
            stacklevel=3,
        )


class _Sublayers:
    """The new norms of one block, and how they are put in."""

    def __init__(self, block: Block, target: Target, gain: float) -> None:
        self.block, self.target = block, target
        self.norms = [self._source(branch) for branch in block.branches]
        self.fresh = [twin_norm(norm, gain) for norm in self.norms]

    def _source(self, branch: Branch) -> nn.Module:
        """The norm whose class and width the new one takes."""
        if not branch.norm:
            raise ValueError(
                f"sublayers must name a norm for {branch.modules[0]} of {self.block.name!r}, got None. "
                "Its class and width are those of the new one."
            )
        return self.block.module.get_submodule(branch.norm)

    def apply(self) -> tuple[list[str], list[str]]:
        """Change the block; paths of new norms, and of norms whose weights are gone."""
        module: Any = self.block.module
        post = self.block.placement == "post"
        places, dropped = [], []
        for branch, source, fresh in zip(self.block.branches, self.norms, self.fresh, strict=True):
            before = twin_norm(source, 1.0) if post else source
            if post or self.target == "output":
                dropped.append(self._path(branch.norm))
            place = self._put(branch, nn.Identity() if self.target == "output" else before, fresh)
            fresh.train(module.training)
            places.append(self._path(place))
        if self.block.kind == "torch":
            module.norm_first = True  # torch's stacks then leave their nested-tensor path alone
            extend(module, _EncoderLayer if isinstance(module, nn.TransformerEncoderLayer) else _DecoderLayer)
        if self.block.kind != "own":
            module.norm_placement = self.target
        return places, dropped

    def _put(self, branch: Branch, before: nn.Module, after: nn.Module) -> str:
        """Set both norms of one sub-layer; the path of the output norm within the block."""
        module = self.block.module
        owner, _, name = branch.norm.rpartition(".")
        if self.block.kind == "own":
            part: Any = module.get_submodule(owner)
            part.norm_in = None if isinstance(before, nn.Identity) else before
            part.norm_out, part.norm_post, part.placement = after, None, self.target
            return f"{owner}.norm_out".lstrip(".")
        setattr(module.get_submodule(owner), name, before)
        if self.block.kind == "torch":
            module.add_module(f"{branch.norm}_out", after)
            return f"{branch.norm}_out"
        part = module.get_submodule(branch.modules[0])
        extend(part, _NormedOutput)
        part.norm_out = after
        return f"{branch.modules[0]}.norm_out"

    def _path(self, inner: str) -> str:
        return f"{self.block.name}.{inner}".lstrip(".")


class _Embedding:
    """The embedding that is to be normalised."""

    def __init__(self, model: nn.Module, path: str, norm: nn.Module) -> None:
        found = dict(model.named_modules()).get(path)
        if found is None or hasattr(found, "norm_out") or "forward" in vars(found):
            known = [name for name, each in model.named_modules() if isinstance(each, nn.Embedding)]
            raise ValueError(
                f"embedding must be the path of a module without a norm, got {path!r}. This model has {known}."
            )
        self.module, self.path, self.norm = found, path, twin_norm(norm, 1.0)

    def apply(self) -> list[str]:
        """Normalise what the embedding gives; the path of the new norm."""
        extend(self.module, _NormedOutput)
        self.module.norm_out = self.norm
        return [f"{self.path}.norm_out"]


def _end_stacks(model: nn.Module, work: list[_Sublayers], final_norm: bool) -> list[str]:
    """Keep torch's stacks of converted layers off nested tensors, and give those without a final norm one."""
    norms: Mapping[int, nn.Module] = {id(each.block.module): each.norms[0] for each in work}
    added = []
    for name, stack in model.named_modules():
        if not isinstance(stack, nn.TransformerEncoder | nn.TransformerDecoder):
            continue
        inside = [norms[id(layer)] for layer in stack.layers if id(layer) in norms]
        if inside and isinstance(stack, nn.TransformerEncoder):
            stack.enable_nested_tensor = stack.use_nested_tensor = (
                False  # decided for the layers as they were
            )
        if inside and stack.norm is None and final_norm:
            stack.norm = twin_norm(inside[-1], 1.0)
            added.append(f"{name}.norm".lstrip("."))
    return added


def _notes(blocks: list[Block]) -> list[str]:
    notes = []
    if any(block.placement == "post" for block in blocks):
        notes.append(
            "post-LN norms were replaced by fresh ones; use a learning rate and warm-up for the new placement"
        )
    active = any(
        isinstance(each, nn.Dropout) and each.p > 0
        for block in blocks
        if block.kind == "branches"
        for branch in block.branches
        for each in block.module.get_submodule(branch.modules[0]).modules()
    )
    if active:
        notes.append("dropout inside the branches stays before the output norms, which undo its scale")
    return notes
