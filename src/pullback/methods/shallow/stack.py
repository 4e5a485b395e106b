"""Residual blocks wired one after the other or side by side, on the same parameters (arXiv:2309.08414)."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from pullback.core import branches as fused
from pullback.core import checks
from pullback.core.kinds import Layer
from pullback.core.wide import Weights, Wide

Mode: TypeAlias = Literal["sequential", "parallel"]
"""Blocks one after the other, or all on the input of the stack."""

Fuse: TypeAlias = Literal["auto", "wide", "vmap", "loop", "copy"]
"""How branches that read the same input are computed."""

Branch: TypeAlias = str | Callable[[nn.Module, Tensor], Tensor] | None
"""Where a block keeps its branch F: a dotted attribute, ``branch(block, x)``, or None where the block itself is F."""

INVERSE_ROOT = "1/sqrt(N)"
CACHE_BYTES = 1 << 21
"""Size of the widest tensor up to which branches are computed together on a CPU: larger ones leave its cache."""


def difference(block: nn.Module, x: Tensor) -> Tensor:
    """The branch of a block that hides it: F(x) = block(x) - x, exact for every block that keeps the shape."""
    return block(x) - x


class ResidualStack(Layer):
    r"""N residual blocks with branches F_1, ..., F_N, wired in sequence or in parallel on the same parameters.

    Sequential: ``z_0 = x``, ``z_k = z_(k-1) + s F_k(z_(k-1))``, the output is ``z_N``. Parallel (section 3
    of the paper, the expansion of the sequence in F):

    - order 1: ``x + s sum_k F_k(x)``; every block sees the input of the stack and the gradient at its output;
    - order 2 (ours): ``+ s^2 sum_j J_j(x) sum_(i<j) F_i(x)``, one forward-mode product for each block but the first.

    With F of size eps the first differs from the sequence by O(eps^2), the second by O(eps^3). ``mode``, ``order`` and
    ``branch_scale`` are attributes that may be set at any time; they are settings, not state.

    Args:
        blocks: modules that map a tensor to one of the same shape. Give them different random weights: equal ones get
            equal gradients in the parallel form and stay equal.
        mode: the wiring.
        order: 1 or 2; the sequential form has none.
        branch_scale: s, a positive number or ``"1/sqrt(N)"``.
        branch: where a block keeps F; None: the block is F, and the stack adds the identity.
        fuse: how parallel branches are computed. ``"wide"``: one wide product for all, for branches made of one or two
            linear or convolution layers with activations; ``"vmap"``: any branches of equal structure, stacked;
            ``"loop"``: one after the other; ``"auto"``: the first of these that is possible and pays (the second only
            off the CPU and where all code is torch's own). ``"copy"``: wide, with the gathered weights kept until a
            parameter changes; for inference, it gives the parameters no gradient.
        chunk: branches computed at a time; None: all, on a CPU as many as its cache holds.

    Shape:
        input and output [batch, ...], whatever the blocks take.

    Raises:
        TypeError: if ``blocks`` holds something else than modules.
        ValueError: if there is no block, a setting is out of range, or ``fuse`` asks for what the blocks do not allow.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        *,
        mode: Mode = "parallel",
        order: int = 1,
        branch_scale: float | str = 1.0,
        branch: Branch = None,
        fuse: Fuse = "auto",
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_modules(blocks))
        self.branch = _branch(branch)
        self.mode, self.order, self.branch_scale = mode, order, branch_scale
        self.fuse: Fuse = checks.choice("fuse", fuse, get_args(Fuse))
        self.chunk = None if chunk is None else checks.integer("chunk", chunk, minimum=1)
        self._seen: list[nn.Module] = []
        self._how: Wide | Literal["vmap", "loop"] = "loop"
        self._hooked = self._stackable = False
        self._copied: list[tuple[Tensor, int]] = []
        self._apart = False
        for name in _COPIES:
            self.register_buffer(name, None, persistent=False)
        self._plan()
        if self.mode == "parallel":
            warn_of_twins(self, stacklevel=3)

    # --- settings -----------------------------------------------------------------------------------------------

    @property
    def mode(self) -> Mode:
        """``"sequential"`` or ``"parallel"``."""
        return self._mode

    @mode.setter
    def mode(self, value: Mode) -> None:
        self._mode: Mode = checks.choice("mode", value, get_args(Mode))

    @property
    def order(self) -> int:
        """Order of the expansion in the parallel form, 1 or 2."""
        return self._order

    @order.setter
    def order(self, value: int) -> None:
        fix = "Higher orders need higher derivatives of the branches; the sequential form is the exact one."
        self._order = checks.choice("order", checks.integer("order", value, fix=fix), (1, 2), fix=fix)

    @property
    def branch_scale(self) -> float | str:
        """The factor of every branch, as it was set."""
        return self._branch_scale

    @branch_scale.setter
    def branch_scale(self, value: float | str) -> None:
        if isinstance(value, str):
            checks.choice("branch_scale", value, (INVERSE_ROOT,), fix=f"Give a number or {INVERSE_ROOT!r}.")
            self._branch_scale: float | str = value
        else:
            self._branch_scale = checks.positive("branch_scale", value)

    @property
    def scale(self) -> float:
        """The factor of every branch as a number."""
        value = self._branch_scale
        return len(self.blocks) ** -0.5 if isinstance(value, str) else value

    @property
    def plan(self) -> Literal["wide", "vmap", "loop"]:
        """How parallel branches are computed on a CPU now."""
        how = self._plan()
        return "wide" if isinstance(how, Wide) else how

    def extra_repr(self) -> str:
        """Settings, for the module's printed form."""
        settings = f"mode={self.mode!r}, order={self.order}, branch_scale={self.branch_scale}"
        return f"{settings}, branch={_name(self.branch)}, fuse={self.fuse!r}"

    # --- forms --------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """The stack in its present form; [batch, ...] to the same shape.

        Raises:
            TypeError: if a branch returns no tensor.
            ValueError: if a branch changes the shape.
            RuntimeError: if a branch edits its input in place, or ``fuse="copy"`` meets parameters that want a
                gradient.
        """
        return self.form(x, self._mode, self._order, self.scale)

    def form(self, x: Tensor, mode: Mode, order: int = 1, scale: float = 1.0) -> Tensor:
        """The stack in any form, whatever its settings: input and output as in `forward`."""
        if mode == "sequential":
            for k, branch in enumerate(self.branches()):
                x = torch.add(x, _checked(branch, x, k), alpha=scale)
            return x
        first, second = self._terms(x, order)
        out = torch.add(x, first, alpha=scale)
        return out if second is None else torch.add(out, second, alpha=scale * scale)

    def branches(self) -> list[Callable[[Tensor], Tensor]]:
        """F_1, ..., F_N as functions of a tensor."""
        if self.branch is None or isinstance(self.branch, str):
            return list(self._inner())
        return [partial(self.branch, block) for block in self.blocks]

    def _inner(self) -> list[nn.Module]:
        """The branches where they are modules."""
        if isinstance(self.branch, str):
            return [operator.attrgetter(self.branch)(block) for block in self.blocks]
        return list(self.blocks) if self.branch is None else []

    def _terms(self, x: Tensor, order: int) -> tuple[Tensor, Tensor | None]:
        """Sum of F_k(x), and with order 2 the sum of J_j(x) t_j."""
        count = len(self.blocks)
        order = order if count > 1 else 1
        shared = self._shared()
        steady = not (order == 2 or shared) or not any(map(fused.unsteady, self.blocks))
        if shared and steady:
            return self._one(x, order)
        how = self._plan()
        if how == "loop" and self.fuse == "auto" and x.device.type != "cpu" and self._stackable:
            how = "vmap"
        if how == "vmap" and fused.keeps_statistics(self._inner()[0]):
            how = "loop"  # running statistics are edited in place
        if how == "loop" or (order == 2 and not steady):
            return self._looped(x, order)
        first, second = self._wide(how, x, order) if isinstance(how, Wide) else self._stacked(x, order)
        return _same_shape(first, x, None), second

    def _shared(self) -> bool:
        """Whether one block is used at every place."""
        return len(self.blocks) > 1 and len(set(self.blocks)) == 1

    def _one(self, x: Tensor, order: int) -> tuple[Tensor, Tensor | None]:
        """One block N times: N F(x), and N (N - 1) / 2 J(x) F(x)."""
        count, branch = len(self.blocks), self.branches()[0]
        value = _checked(branch, x, 0)
        if order == 1:
            return value * count, None
        turned = fused.jvp(branch, x, value.to(x.dtype))[1]
        return value * count, turned * (count * (count - 1) / 2)

    def _looped(self, x: Tensor, order: int) -> tuple[Tensor, Tensor | None]:
        """One branch after the other; each forward-mode product gives F_j(x) as well, for the next one's tangent."""
        first, *rest = self.branches()
        total, second = _checked(first, x, 0), None
        for k, branch in enumerate(rest, start=1):
            if order == 1:
                total = total + _checked(branch, x, k)
                continue
            value, turned = self._product(branch, x, total.to(x.dtype), k)
            total, second = total + value, turned if second is None else second + turned
        return total, second

    def _product(
        self, branch: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """F_k(x) and J_k(x) t."""
        if not fused.keeps_statistics(self.blocks[k]):
            return fused.jvp(partial(_checked, branch, k=k), x, tangent)
        if not isinstance(branch, nn.Module):
            raise RuntimeError(
                f"branch must be a module for order 2 with running statistics in training, got {_name(self.branch)}. "
                "Name the block's child, or set the statistics to evaluation mode."
            )
        value, turned = fused.jvp_with_statistics(branch, x, tangent)
        return _same_shape(value, x, k), turned

    def _wide(self, how: Wide, x: Tensor, order: int) -> tuple[Tensor, Tensor | None]:
        branches, apart = self._inner(), order == 2
        count = len(branches)
        weights = self._weights(how, branches, apart=apart)
        size = count if how.collapses and not apart else self._together(how, branches[0], x)
        total: Tensor | None = None
        second: Tensor | None = None
        for start in range(0, count, size):
            stop = min(start + size, count)
            mine = weights if size >= count else how.part(weights, start, stop, count, apart=apart)
            first, turned = how.terms(branches[0], x, mine, stop - start, order, total)
            total = first if total is None else total + first
            second = turned if second is None or turned is None else second + turned
        return (x.new_zeros(x.shape) if total is None else total), second

    def _together(self, how: Wide, branch: nn.Module, x: Tensor) -> int:
        """How many branches are computed at a time."""
        if self.chunk is not None or x.device.type != "cpu":
            return self.chunk or len(self.blocks)
        return max(1, CACHE_BYTES // max(1, how.width(branch, x) * x.element_size()))

    def _stacked(self, x: Tensor, order: int) -> tuple[Tensor, Tensor | None]:
        branches = self._inner()
        state = fused.stacked_state(branches)
        each = fused.each_branch(branches[0], state, x, self.chunk)
        if order == 1:
            return each.sum(0), None
        earlier = (each.cumsum(0) - each).to(x.dtype)
        return each.sum(0), fused.each_product(branches[0], state, x, earlier, self.chunk).sum(0)

    # --- plans and copies ---------------------------------------------------------------------------------------

    def _plan(self) -> Wide | Literal["vmap", "loop"]:
        """How to compute, found again whenever a module was exchanged or got a hook."""
        if torch.compiler.is_compiling():
            return self._how
        found = [module for block in self.blocks for module in fused.tree(block)]
        known = len(found) == len(self._seen) and all(map(operator.is_, found, self._seen))
        hooked = any(map(fused.hooked, found))
        if not known or hooked is not self._hooked:
            self._how, self._seen, self._hooked = self._choose(), found, hooked
        return self._how

    def _choose(self) -> Wide | Literal["vmap", "loop"]:
        if self.fuse == "loop":
            return "loop"
        branches = self._inner()
        if not branches:
            how: Wide | str = "the branch is a function, not a module"
        else:
            how = fused.plain(branches) if self.fuse == "vmap" else Wide.plan(branches)
        if isinstance(how, str) and how and self.fuse != "auto":
            raise ValueError(
                f"fuse must suit the blocks, got {self.fuse!r}: {how}. Use fuse='auto' or 'loop'."
            )
        if self.fuse == "vmap":
            return "vmap"
        self._stackable = bool(branches) and fused.of_torch(branches[0]) and not fused.plain(branches)
        return how if isinstance(how, Wide) else "loop"

    def _weights(self, how: Wide, branches: list[nn.Module], *, apart: bool) -> Weights:
        if self.fuse != "copy" or torch.compiler.is_compiling():
            return how.gather(branches, apart=apart)
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            raise RuntimeError(
                "fuse='copy' must not be used while parameters want a gradient, got grad mode switched on. "
                "Call the stack under torch.no_grad(), or set fuse='auto' for training."
            )
        now: list[tuple[Tensor, int]] = [(p, p._version) for p in self.parameters()]
        known = len(now) == len(self._copied) and all(
            p is q and version == old for (p, version), (q, old) in zip(now, self._copied, strict=True)
        )
        if not known or self._apart is not apart:
            for name, value in zip(_COPIES, how.gather(branches, apart=apart), strict=True):
                setattr(self, name, None if value is None else value.detach())
            self._copied, self._apart = now, apart
        kept: Any = tuple(getattr(self, name) for name in _COPIES)
        return kept

    def train(self, mode: bool = True) -> ResidualStack:
        """As for any module; copies of ``fuse="copy"`` are made anew."""
        self._copied = []
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ResidualStack:
        self._copied = []
        return super()._apply(fn, recurse)


_COPIES = ("copy0", "copy1", "copy2", "copy3")


# --- checks ----------------------------------------------------------------------------------------------------


def _modules(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    if isinstance(blocks, nn.Module) and not isinstance(blocks, nn.ModuleList | nn.Sequential):
        raise TypeError(
            f"blocks must be a list of modules, got a {type(blocks).__name__}. Pass [block, ...]."
        )
    found = [checks.instance("a block", block, nn.Module) for block in blocks]
    if not found:
        raise ValueError(
            "blocks must hold at least one module, got none. An iterator that was read before is empty."
        )
    return found


def _branch(branch: Branch) -> Branch:
    if branch is not None and not isinstance(branch, str) and not callable(branch):
        raise TypeError(
            f"branch must be an attribute's name, a function branch(block, x) or None, got {checks.shown(branch)}."
        )
    return branch


def _name(branch: Branch) -> str:
    return (
        str(branch) if branch is None or isinstance(branch, str) else getattr(branch, "__name__", "function")
    )


def _checked(branch: Callable[[Tensor], Tensor], x: Tensor, k: int) -> Tensor:
    """F_k(x), refused when it is no tensor of the shape of x or when x was edited."""
    watched = not (torch.compiler.is_compiling() or x.is_inference())
    version = x._version if watched else 0
    out = branch(x)
    if watched and x._version != version:
        raise RuntimeError(
            f"branch {k} must not edit its input in place, got an edit. Give its first layer inplace=False."
        )
    return _same_shape(out, x, k)


def _same_shape(out: Tensor, x: Tensor, k: int | None) -> Tensor:
    which = "the branches" if k is None else f"branch {k}"
    if not isinstance(out, Tensor):
        raise TypeError(
            f"{which} must return a tensor, got {type(out).__name__}. Wrap it to return the tensor alone."
        )
    if out.shape != x.shape:
        raise ValueError(
            f"{which} must keep the input's shape {tuple(x.shape)}, got {tuple(out.shape)}. "
            "Put layers that change the shape between stacks."
        )
    return out


def warn_of_twins(stack: ResidualStack, *, stacklevel: int = 2) -> None:
    """Warn when two different blocks hold equal parameters: side by side they would stay equal for ever."""
    if twins := fused.equal_pair(list(stack.blocks)):
        warnings.warn(
            f"blocks {twins[0]} and {twins[1]} hold equal parameters: in the parallel form they get equal gradients "
            "and stay equal. Initialise every block by itself.",
            stacklevel=stacklevel,
        )
