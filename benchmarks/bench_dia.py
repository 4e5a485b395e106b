"""Cost of one iteration of an attack: ours beside that of `breaching` without dropout, and what masks add to it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import statistics
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.harness import Row, seconds
from torch import Tensor, nn

from pullback.core.inversion import GradientInversion
from pullback.lab.models.victims import victim
from pullback.methods.dia import DropoutInversion

PEER = "breaching 0.1.2"
STEPS = 20
TV = 1e-5
AGREE = 2e-5
"""Allowed difference of the peer's objective from ours along the first steps, both in float32."""


# --- the peer ------------------------------------------------------------------------------------------------


class _Anything(type):
    """A class whose missing attributes are classes, so that a definition such as ``class A(models.x._Y)`` runs."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Anything(name, (), {})
        setattr(cls, name, made)
        return made


class _StandIn(types.ModuleType):
    """An empty module of any name."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_Anything(self.__name__, (), {}), name)


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """breaching's catalogue of models subclasses torchvision's when it is imported; its attacks do not use it.

    torchvision is compiled against one build of torch and cannot be imported beside the one used here, so that an empty
    module of its name takes its place, in this process only.
    """

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        """Answer for torchvision and everything below it."""
        del path, target
        if name.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        """An empty module."""
        made = _StandIn(spec.name)
        made.__path__ = []  # a package to the import system
        return made

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def _import_peer() -> Any:
    """breaching's attacker class and omegaconf, or an ImportError."""
    for needed in ("breaching", "omegaconf", "hydra"):
        if importlib.util.find_spec(needed) is None:
            raise ImportError(
                f"{needed} is not installed: pip install --no-deps breaching==0.1.2; pip install hydra-core"
            )
    finder = _StandIns()
    sys.meta_path.insert(0, finder)
    try:
        from breaching.attacks import OptimizationBasedAttacker
    finally:
        sys.meta_path.remove(finder)
    return OptimizationBasedAttacker


class Peer:
    """breaching's *Inverting Gradients* on a model and gradient of ours.

    Args:
        model: in evaluation mode.
        gradients: shared.
        x: whose shape and start are taken.
        labels: known to the attacker.
        tv: weight of its own total variation (which pads the image and needs three channels); 0 leaves it out.
        steps: iterations.
    """

    def __init__(
        self, model: nn.Module, gradients: Sequence[Tensor], x: Tensor, labels: Tensor, tv: float, steps: int
    ) -> None:
        attacker = _import_peer()
        import breaching
        from omegaconf import OmegaConf

        folder = Path(breaching.__file__).parent / "config" / "attack"
        settings = OmegaConf.load(folder / "_default_optimization_attack.yaml")
        settings.merge_with(OmegaConf.load(folder / "invertinggradients.yaml"))
        settings.regularization.total_variation.scale = tv
        settings.optim.update({"max_iterations": steps, "step_size_decay": None, "callback": 10**9})
        self.attack = attacker(
            model, nn.CrossEntropyLoss(), settings, {"dtype": torch.float, "device": x.device}
        )
        facts = types.SimpleNamespace(shape=list(x.shape[1:]), modality="vision")
        self.payload = [
            {
                "parameters": [p.detach() for p in model.parameters()],
                "buffers": list(model.buffers()),
                "metadata": facts,
            }
        ]
        local = {"num_data_points": len(x), "labels": labels, "local_hyperparams": None}
        self.shared = [{"gradients": list(gradients), "buffers": None, "metadata": local}]

    def __call__(self, start: Tensor) -> list[float]:
        """Objective at every iteration from ``start``."""
        stats = self.attack.reconstruct(self.payload, self.shared, {}, initial_data=start)[1]
        return stats["Trial_0_Val"]


# --- problems ------------------------------------------------------------------------------------------------


class Problem:
    """A victim, its gradient, and attacks on it from one start.

    Args:
        architecture: of the victim; it sees colour images through a 1 x 1 convolution, because the peer needs three
            channels.
        batch: images behind the gradient.
        p: dropout rate.
    """

    def __init__(self, architecture: str, batch: int, p: float = 0.0) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(3, 1, 1), victim(architecture, p, 0)).eval()
        self.x, self.y = torch.rand(batch, 3, 28, 28), torch.arange(batch) % 10
        loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        self.gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        self.start = torch.randn(self.x.shape).clamp(0, 1)

    def ours(
        self, attack: type[GradientInversion] = GradientInversion, *, tv: float = TV, steps: int = STEPS
    ) -> Any:
        """A call that runs our attack from the start, never stopping early."""
        search = attack(
            self.model,
            nn.functional.cross_entropy,
            tv=tv,
            schedule="constant",
            max_iters=steps,
            stop_patience=None,
            tolerance=0.0,
            bounds=(0.0, 1.0),
            init=self.start,
        )
        return lambda: search.reconstruct(self.gradients, labels=self.y, input_shape=self.x.shape)

    def peer(self, *, tv: float = TV, steps: int = STEPS) -> Callable[[], list[float]]:
        """A call that runs the peer's attack from the start."""
        attack = Peer(self.model, self.gradients, self.x, self.y, tv, steps)
        return lambda: attack(self.start)


def check_agreement(problem: Problem, steps: int = 5) -> float:
    """Largest difference between the peer's objective and ours along the first steps, without total variation.

    Raises:
        ValueError: if it is above `AGREE`: then the two do not do the same work, and their times say nothing.
    """
    ours = problem.ours(tv=0.0, steps=steps)().trace["loss"]
    theirs = torch.tensor(problem.peer(tv=0.0, steps=steps)())
    apart = float((ours - theirs).abs().max())
    if not apart <= AGREE:
        raise ValueError(f"objectives must agree to {AGREE}, got {ours.tolist()} and {theirs.tolist()}.")
    return apart


def _ratio(what: Callable[[], object], against: Callable[[], object], repeats: int) -> float:
    """In processor time: other processes do not count."""
    taken = seconds({"what": what, "against": against}, repeats=repeats, clock=time.process_time)
    return statistics.median(a / b for a, b in zip(taken["what"], taken["against"], strict=True))


def ratios() -> list[Row]:
    """All rows of this benchmark."""
    rows = list[Row]()
    for architecture in ("mlp", "cnn", "vit"):
        for batch in (1, 8):
            setting = f"{architecture}, batch {batch}"
            problem = Problem(architecture, batch)
            try:
                peer = problem.peer()
            except ImportError as error:
                rows.append(Row(f"inverting gradients, {setting}", PEER, skipped=str(error)))
            else:
                note = f"objectives agree to {check_agreement(problem):.0e}"
                taken = _ratio(problem.ours(), peer, 5)
                rows.append(Row(f"inverting gradients, {setting}", PEER, taken, bound=1.0, note=note))
            masked = Problem(architecture, batch, p=0.25)
            taken = _ratio(masked.ours(DropoutInversion), masked.ours(), 5)
            rows.append(Row(f"dropout inversion, {setting}", "the same without masks", taken))
    return rows
