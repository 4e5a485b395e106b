"""Rescale parameters back to the norm they had at the beginning, after every step or every few steps.

What is scaled together is a *block*: one tensor, or several whose joint norm is kept. All blocks are treated by two
fused calls, one for the norms and one for the multiplication; between them lie a handful of operations on one vector.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pullback.core.checks import NON_FINITE_POLICIES, NonFinite, NonFiniteError, choice, integer, shown
from pullback.core.kinds.transform import Parameters, StepBatch, Transform
from pullback.core.rescaling import Bucket, Per, buckets, norms_of, projectable
from pullback.core.state import StateError, check_state

_NAMED = 3  # how many names a message lists


class FrobeniusProjector(Transform):
    r"""Keep the Frobenius norm of given parameters at its value of the beginning: theta <- rho * theta / ||theta||.

    Norms rho are recorded when the projector is made, in float32 (float64 for float64 tensors). A step projects the
    tensors that it moved (with ``every`` > 1 a tensor without gradient at that step waits for its next one); a frozen
    one never moves. Nothing is read by the host, unless
    ``nonfinite`` asks for it. Ranks of a data-parallel run need no communication, shards (DTensor) one reduction of
    one number per tensor.

    A half-precision tensor is rescaled in float32 and rounded once; it is left alone while its norm is within 2^-9 of
    rho, as rounding at every step would make it walk at random. A tensor whose norm is zero or not finite is left as
    it is, and counted: see :meth:`left`.

    Moved to an optimizer that has none of its tensors (see `Attachment.reattach`), it goes on with those that have the
    same names or places, and the same shapes.

    Args:
        params: what to project: a module (all of its parameters), a mapping, (name, tensor) pairs or tensors. A tied
            tensor counts once.
        per: ``"tensor"``: one norm per tensor; ``"row"``: one norm per index of the first dimension, for tensors of at
            least two dimensions.
        every: project after every so many steps; None never does (recorded norms and `growth` remain useful).
        joint: names of tensors that are scaled together and keep their joint norm, for example
            ``[("weight", "bias")]``; per row they must have equally many rows, and a vector has one entry in each.
        nonfinite: what to do about a norm that is zero or not finite: ``"skip"`` leaves the tensor and counts it on the
            device; ``"warn"`` says so and ``"raise"`` stops before any tensor is rescaled, for one read by the host
            per projection.

    Raises:
        TypeError: if a tensor is complex or of an integer type.
        ValueError: if there is no tensor, or one is zero, not finite, sparse, on the meta device, or shares its memory
            with another; if a name in ``joint`` is unknown; if ``every`` is below 1.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> projector = FrobeniusProjector([weight])
        >>> attachment = projector.attach(optimizer)
        >>> (2 * weight).sum().backward()
        >>> optimizer.step()
        >>> weight.norm()
        tensor(5., grad_fn=<LinalgVectorNormBackward0>)
    """

    when: ClassVar[Literal["pre", "post", "both"]] = "post"

    def __init__(
        self,
        params: Parameters,
        *,
        per: Per = "tensor",
        every: int | None = 1,
        joint: Sequence[Sequence[str]] = (),
        nonfinite: NonFinite = "skip",
    ) -> None:
        self.per: Per = choice("per", per, ("tensor", "row"))
        fix = "Use 1 to project after every step, None to never project."
        self.every = None if every is None else integer("every", every, minimum=1, fix=fix)
        self.nonfinite: NonFinite = choice("nonfinite", nonfinite, NON_FINITE_POLICIES)
        named = projectable(params, self.per, joint)
        self._names, self._tensors = list(named), list(named.values())
        self._blocks = _blocks(self._names, joint)
        self._rho = norms_of(self._tensors, self._blocks, self.per)
        self._check_norms()
        self._places: dict[int, int] = {}  # where an optimizer holds our tensors, by position
        self._moved: set[int] = set()  # stepped since their last projection
        self._due: set[int] = set()  # those of them for which it is time
        self._left = [torch.zeros((), dtype=torch.int64, device=rho.device) for rho in self._rho]
        self._index()

    def _index(self) -> None:
        """Everything that follows from the tensors; nothing of it is saved or copied."""
        self._where = {tensor: i for i, tensor in enumerate(self._tensors)}
        self._block_of = {i: b for b, block in enumerate(self._blocks) for i in block}
        self._plan: tuple[Any, list[Bucket]] | None = None
        self._met: weakref.ref[torch.optim.Optimizer] | None = None
        self._strange = False

    def _check_norms(self) -> None:
        for name, rho in zip(self.names, self._rho, strict=True):
            bad = ~(torch.isfinite(rho) & (rho > 0))
            if not bool(bad.any()):
                continue
            row = "" if self.per == "tensor" else f" in row {int(bad.flatten().nonzero()[0])}"
            value = rho[bad].flatten()[0].item()
            raise ValueError(
                f"{name} must have a finite norm > 0, got {value:g}{row}. Project after the weights are initialised, "
                "and leave out those that start at zero."
            )

    # --- what it works on -----------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The name of every block: that of its first tensor."""
        return [self._names[block[0]] for block in self._blocks]

    def _stepped(self, batch: StepBatch) -> list[int]:
        """Positions of the tensors that this step has moved."""
        if batch.optimizer is None or self._met is None or self._met() is not batch.optimizer:
            self._meet(batch)
        if self._strange:
            self._adopt(batch)
        return [i for i in map(self._where.get, batch.params) if i is not None]

    def _meet(self, batch: StepBatch) -> None:
        """See whether an optimizer holds our tensors, and where."""
        groups = batch.groups[:1] if batch.optimizer is None else batch.optimizer.param_groups
        rows = [param for group in groups for param in group["params"]]
        places = {self._where[param]: index for index, param in enumerate(rows) if param in self._where}
        self._met = None if batch.optimizer is None else weakref.ref(batch.optimizer)
        self._strange = not places
        if places:
            self._places = places
        elif not self._adopt(batch):
            kind = (
                "" if all(g.layout is torch.strided for g in batch.grads) else " (one has a sparse gradient)"
            )
            raise ValueError(
                f"{self.name}: the optimizer must hold one of {len(self._names)} projected tensors "
                f"({_listed(self._names)}), got others: {_listed(batch.names)}{kind}. Make the projector from the "
                "model that this optimizer trains."
            )

    def _adopt(self, batch: StepBatch) -> int:
        """Take over tensors of the same name or place, and shape, from an optimizer that holds none of ours."""
        names = {name: i for i, name in enumerate(self._names)}
        places = {index: i for i, index in self._places.items()}
        found = 0
        for param, name, index in zip(batch.params, batch.names, batch.indices, strict=True):
            i = names.get(name, places.get(index))
            if param in self._where or i is None or self._tensors[i].shape != param.shape:
                continue
            del self._where[self._tensors[i]]
            self._tensors[i], self._where[param] = param, i
            self._plan, found = None, found + 1
        return found

    # --- the projection -------------------------------------------------------------------------------------

    def post_step_(self, batch: StepBatch) -> None:
        """Project what was stepped since the last projection, if it is time."""
        if self.every is None:
            return
        stepped = {self._block_of[i] for i in self._stepped(batch)}
        self._moved |= stepped
        if (batch.step + 1) % self.every == 0:
            self._due |= self._moved
        ready = self._due & stepped  # what is due but has no gradient now waits for a step that moves it
        if ready:
            self._project(sorted(ready))
            self._moved -= ready
            self._due -= ready

    def project_(self) -> None:
        """Project all tensors now, whether stepped or not; counts no step."""
        self._project(range(len(self._blocks)))
        self._moved.clear()
        self._due.clear()

    @torch.no_grad()
    def _project(self, blocks: Sequence[int]) -> None:
        plan = self._planned(blocks)
        for bucket in plan:
            bucket.measure()
        if self.nonfinite != "skip":
            self._report(plan)
        for bucket in plan:
            bucket.rescale_()

    def _planned(self, blocks: Sequence[int]) -> list[Bucket]:
        """The buckets of these blocks, kept until another set, device or dtype is asked for."""
        tensors = self._tensors
        # Cheap to compare, as this is asked for in every step: a moved or converted model needs another plan.
        parts = [tensors[i].requires_grad for block in self._blocks if len(block) > 1 for i in block]
        key = ([*blocks], [t.dtype for t in tensors], [t.get_device() for t in tensors], parts)
        if self._plan is None or self._plan[0] != key:
            self._count()
            rows = [(b, [tensors[i] for i in self._blocks[b]]) for b in blocks]
            # A joint block of which a part is frozen cannot be scaled as a whole.
            free = [row for row in rows if len({tensor.requires_grad for tensor in row[1]}) == 1]
            self._plan = key, buckets(free, self._rho, self.per)
        return self._plan[1]

    def _report(self, plan: list[Bucket]) -> None:
        names = self.names
        bad = [names[b] for bucket in plan for b in bucket.troubled()]
        if not bad:
            return
        text = f"{self.name}, step {self.steps}: the norm of {_listed(bad)} is zero or not finite."
        if self.nonfinite == "raise":
            raise NonFiniteError(
                f"{text} Lower the learning rate; nonfinite='skip' leaves such tensors alone."
            )
        warnings.warn(f"{text} It is left as it is because nonfinite='warn'.", RuntimeWarning, stacklevel=3)

    # --- what can be asked ----------------------------------------------------------------------------------

    def _count(self) -> None:
        """Move the counts of the present plan, which lie on the device, to those that last."""
        for bucket in self._plan[1] if self._plan else ():
            for b, count in zip(bucket.blocks, bucket.left.unbind(), strict=True):
                self._left[b] = self._left[b].to(count.device) + count
            bucket.left.zero_()

    def left(self) -> dict[str, int]:
        """How often each tensor (or row of it) was left alone because its norm was zero or not finite."""
        self._count()
        return {name: int(count) for name, count in zip(self.names, self._left, strict=True)}

    def norms(self) -> dict[str, Tensor]:
        """The recorded norm of every block: 0-dim, or one per row."""
        return {name: rho.detach().clone() for name, rho in zip(self.names, self._rho, strict=True)}

    @torch.no_grad()
    def growth(self) -> dict[str, Tensor]:
        """Present norm over recorded norm of every block, on the device: 0-dim, or one per row."""
        now = norms_of(self._tensors, self._blocks, self.per)
        return {n: new / rho.to(new.device) for n, new, rho in zip(self.names, now, self._rho, strict=True)}

    # --- state ----------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """Recorded norms, counts, and which blocks wait for a projection: 1 for the next, 2 for an overdue one."""
        waiting = {name: (b in self._moved) + (b in self._due) for b, name in enumerate(self.names)}
        return {"norms": self.norms(), "left": self.left(), "waiting": waiting}

    def check_extra_state(self, state: Mapping[str, Any]) -> None:
        """Check a saved state; norms must be finite and positive."""
        check_state(f"{self.name}.state", state, self.extra_state())
        for name, rho in state["norms"].items():
            if not bool((torch.isfinite(rho) & (rho > 0)).all()):
                raise StateError(
                    f"{self.name}.state.norms[{name!r}] must be finite and > 0, got {shown(rho)}."
                )

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over recorded norms and counts."""
        self._plan = None
        self._rho = [
            state["norms"][n].to(rho.device).clone() for n, rho in zip(self.names, self._rho, strict=True)
        ]
        self._left = [
            torch.full_like(was, state["left"][n]) for n, was in zip(self.names, self._left, strict=True)
        ]
        self._moved = {b for b, name in enumerate(self.names) if state["waiting"][name] >= 1}
        self._due = {b for b, name in enumerate(self.names) if state["waiting"][name] == 2}

    def __repr__(self) -> str:
        return f"{self.name}({len(self._blocks)} norms, per={self.per!r}, every={self.every})"

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles keep tensors, norms and counts."""
        self._count()
        dropped = {"_where", "_block_of", "_plan", "_met", "_strange"}
        return {key: value for key, value in super().__getstate__().items() if key not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._index()


def _blocks(names: Sequence[str], joint: Sequence[Sequence[str]]) -> list[tuple[int, ...]]:
    """Positions of the tensors of every block: the joint ones as given, every other tensor by itself."""
    place = {name: i for i, name in enumerate(names)}
    together = {place[group[0]]: tuple(place[name] for name in group) for group in joint}
    inner = {i for block in together.values() for i in block}
    return [together.get(i, (i,)) for i in range(len(names)) if i in together or i not in inner]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
