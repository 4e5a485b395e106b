"""Gradient inversion: search for the inputs whose gradient is the one that was shared.

The engine of every attack that audits what one shared gradient gives away. With its defaults it is *Inverting
Gradients* (Geiping et al. 2020, arXiv:2003.14053), with other settings *Deep Leakage from Gradients* (Zhu et al. 2019,
arXiv:1906.08935). It works on gradients that are handed over in memory, of models in memory, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pullback.core.checks import choice, instance, integer, non_negative
from pullback.core.inversion_descent import Descent, OptimizerName, Plan, Schedule, Trial, best_of
from pullback.core.inversion_journal import Journal
from pullback.core.inversion_problem import (
    Bounds,
    PixelProblem,
    Start,
    checked_bounds,
    checked_labels,
    checked_shape,
    dry_pass,
)
from pullback.core.inversion_result import Callback, Progress, Reconstruction
from pullback.core.inversion_terms import GradientMatching, MatchingKind
from pullback.core.inversion_victim import LossFunction, SharedGradients, Victim
from pullback.core.kinds.search import Search
from pullback.core.state import check_state


class GradientInversion(Search):
    """Search for the inputs of one shared gradient; with the defaults, Inverting Gradients.

    It makes distance(gradient of the guess, shared gradient) + tv * TV(images) small. The model is used in evaluation
    mode (batch normalisation by its running statistics, no dropout) and left as it was. Per iteration it costs one
    forward pass, one backward pass with a graph and one through that graph.

    - *Inverting Gradients*: the defaults. ``schedule="milestones"`` is its official schedule.
    - *Deep Leakage*: ``matching="euclidean", optimizer="lbfgs", lr=1.0, tv=0.0`` and ``labels=None``, which searches
      for soft labels too; ``loss_fn`` must then take class probabilities, as ``cross_entropy`` does.

    Args:
        model: the model at the parameters where the gradient was taken. Wrappers (``torch.compile``, data parallel) are
            looked through. Float32 or float64.
        loss_fn: ``loss_fn(model(x), labels) -> 0-dim tensor``, with the client's reduction.
        matching: ``"cosine"``, ``"euclidean"``, or a `GradientMatching` with weights, layers or a transform.
        tv: weight of total variation; None: 1e-5 for images and signals, 0 for vectors [B, D].
        optimizer: ``"signed"`` (Adam on the sign of the image gradient; other unknowns keep theirs), ``"adam"``, or
            ``"lbfgs"``, which takes no ``bounds`` and no schedule.
        lr: step size.
        schedule: ``"plateau"`` (times 0.1 after ``patience`` iterations without improvement), ``"milestones"`` (times
            0.1 at 3/8, 5/8 and 7/8 of ``max_iters``), ``"constant"``, or ``schedule(step, max_iters) -> factor``.
        patience: see ``schedule``.
        max_iters: budget of every start in evaluations of the loss.
        stop_patience: iterations without a better loss after which a start ends; None: never.
        tolerance: a start ends with ``"converged"`` when the whole loss, priors included, is at most this; 0: never.
            Compare attacks at ``tolerance=0, stop_patience=None`` only: easy problems stop early and look worse.
        bounds: box of the pixels; every image that is evaluated lies in it, the first included.
        restarts: independent starts, one after the other; the smallest loss wins.
        init: first images: ``"normal"``, ``"uniform"`` (in the box, or in [0, 1]), ``"zeros"``, or a tensor of
            ``input_shape`` or [restarts, ``input_shape``].
        check_every: iterations between two looks of the host at the loss: stop rules, trace, callback.

    Raises:
        TypeError, ValueError: if a setting makes no sense.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        *,
        matching: MatchingKind | GradientMatching = "cosine",
        tv: float | None = None,
        optimizer: OptimizerName = "signed",
        lr: float = 0.1,
        schedule: Schedule = "plateau",
        patience: int = 800,
        max_iters: int = 20_000,
        stop_patience: int | None = 4_000,
        tolerance: float = 1e-5,
        bounds: Bounds | None = None,
        restarts: int = 1,
        init: Start = "normal",
        check_every: int = 20,
    ) -> None:
        self.model = instance("model", model, nn.Module)
        self.loss_fn = loss_fn
        self.matching = matching if isinstance(matching, GradientMatching) else GradientMatching(matching)
        self.tv = None if tv is None else non_negative("tv", tv)
        self.plan = Plan(max_iters, optimizer, lr, schedule, patience, stop_patience, tolerance, check_every)
        self.bounds = None if bounds is None else checked_bounds(bounds)
        if optimizer == "lbfgs" and bounds is not None:
            raise ValueError(
                "bounds must be None with optimizer='lbfgs', got a box: clipping would break its line search. Use "
                "optimizer='adam', or clip the result."
            )
        self.restarts = integer("restarts", restarts, minimum=1)
        self.init = init if isinstance(init, Tensor) else choice("init", init, ("normal", "uniform", "zeros"))

    def __repr__(self) -> str:
        inside = f"{type(self.model).__name__}, matching={self.matching!r}, optimizer={self.plan.optimizer!r}"
        return f"{type(self).__name__}({inside}, lr={self.plan.lr}, max_iters={self.plan.max_iters})"

    def reconstruct(
        self,
        gradients: SharedGradients,
        *,
        labels: Tensor | None,
        input_shape: Sequence[int],
        seed: int = 0,
        callback: Callback | None = None,
        resume: Mapping[str, Any] | None = None,
    ) -> Reconstruction:
        """Search for the inputs behind ``gradients``.

        Args:
            gradients: of one mini-batch: a list in the order of the parameters that require gradients, a mapping from
                names (which may lack some), or a model whose ``.grad`` are taken.
            labels: what ``loss_fn`` takes, batch first; None: search for soft labels too.
            input_shape: shape of the batch, batch first.
            seed: stream of the starts; no global generator is read or moved.
            callback: called with a `Progress` every ``check_every`` iterations; True ends the attack.
            resume: a state that `Progress.state_dict` gave; the attack then goes on as if it had not stopped.

        Returns:
            A `Reconstruction`; that nothing was found is a status and no exception.

        Raises:
            TypeError, ValueError, NonFiniteError: if an argument does not fit.
            RuntimeError: if the model has an operation without second derivative.
            StateError: if ``resume`` belongs to another attack.
        """
        shape = checked_shape(input_shape)
        victim = Victim(self.model, self.loss_fn, gradients, self.matching)
        with victim.attacked():
            known = checked_labels(labels, shape, victim)
            classes = dry_pass(victim, known, shape)
            self._check_init(shape)
            problem = self._problem(victim, known, shape, classes, integer("seed", seed))
            with problem.installed():
                return self._search(problem, callback, resume)

    def run(self, *args: Any, **kwargs: Any) -> Reconstruction:
        """The same as `reconstruct`, under the name that all searches have."""
        return self.reconstruct(*args, **kwargs)

    def _problem(
        self, victim: Victim, labels: Tensor | None, shape: tuple[int, ...], classes: int, seed: int
    ) -> PixelProblem:
        return PixelProblem(victim, labels, shape, classes, seed, **self._pixels())

    def _pixels(self) -> dict[str, Any]:
        signed = self.plan.optimizer == "signed"
        return {"tv": self.tv, "signed": signed, "bounds": self.bounds, "init": self.init}

    def _check_init(self, shape: tuple[int, ...]) -> None:
        allowed = (shape, (self.restarts, *shape))
        if isinstance(self.init, Tensor) and tuple(self.init.shape) not in allowed:
            raise ValueError(
                f"init must have the shape {shape} or {allowed[1]}, got {tuple(self.init.shape)}. Give whole batches."
            )

    def _settings(self) -> dict[str, Any]:
        """What makes another attack of this one; the budget does not, unless the schedule depends on it."""
        plan = {name: value for name, value in vars(self.plan).items() if name != "max_iters"}
        if self.plan.schedule not in {"plateau", "constant"}:
            plan |= {
                "max_iters": self.plan.max_iters,
                "schedule": getattr(self.plan.schedule, "__qualname__", ""),
            }
        return {"class": type(self).__name__, "matching": repr(self.matching), "tv": self.tv} | plan

    def _search(
        self, problem: PixelProblem, callback: Callback | None, resume: Mapping[str, Any] | None
    ) -> Reconstruction:
        journal = Journal(self._settings(), problem)
        trials, begun = ([], None) if resume is None else journal.read(resume)
        for restart in range(len(trials), self.restarts):
            descent = Descent(problem, self.plan, restart)
            if begun is not None:
                check_state("resume.descent", begun, descent.state(), open_keys=("mover", "tally"))
                descent.load(begun)
                begun = None
            trial, stopped = _driven(descent, restart, journal, trials, callback)
            trials.append(trial)
            if stopped:
                break
        return self._result(problem, trials)

    def _result(self, problem: PixelProblem, trials: Sequence[Trial]) -> Reconstruction:
        best = best_of(trials)
        trial = trials[best]
        labels = trial.leaves["labels"].softmax(-1) if problem.labels is None else problem.labels
        names = [*problem.terms, "lr"]
        return Reconstruction(
            trial.leaves["images"],
            trial.status,
            sum(each.steps for each in trials),
            trial.message,
            loss=trial.loss,
            labels=labels,
            masks=problem.masks(trial.leaves),
            trace={name: trial.trace[:, column].clone() for column, name in enumerate(names)},
            restart=best,
            restart_losses=tuple(each.loss for each in trials),
            notes=tuple(problem.notes()),
        )


def _driven(
    descent: Descent, restart: int, journal: Journal, trials: list[Trial], callback: Callback | None
) -> tuple[Trial, bool]:
    """One start from block to block; whether the callback ended the attack."""
    while True:
        try:
            trial = descent.advance()
        except RuntimeError as error:
            raise _explained(error) from error
        if trial is not None:
            return trial, False
        if callback is not None:
            tally = descent.tally
            progress = Progress(
                restart,
                tally.steps,
                float(tally.best),
                tally.kept["images"].clone(),
                lambda: journal.write(trials, descent),
            )
            if callback(progress) is True:
                return descent.ended(
                    "max_steps", f"the callback ended it after {tally.steps} iterations"
                ), True


def _explained(error: RuntimeError) -> RuntimeError:
    text = str(error).splitlines()[0]
    if "not have been used in the graph" in text or "does not require grad" in text:
        return RuntimeError(
            f"gradients must depend on the inputs, got some that do not ({text}). Compare weights, not only the last "
            "bias."
        )
    if "derivative" in text or "differentiat" in text:
        return RuntimeError(
            f"model must be differentiable twice, got an operation that is not ({text}). Put an equivalent of plain "
            "torch operations in its place for the attack."
        )
    return error


def reconstruct(
    model: nn.Module,
    loss_fn: LossFunction,
    gradients: SharedGradients,
    *,
    labels: Tensor | None,
    input_shape: Sequence[int],
    seed: int = 0,
    callback: Callback | None = None,
    resume: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Reconstruction:
    """Attack one shared gradient in one call: `GradientInversion` with ``settings``, then its ``reconstruct``.

    Example:
        >>> import torch
        >>> model = nn.Linear(4, 3)
        >>> x, y = torch.tensor([[0.5, -1.0, 0.25, 2.0]]), torch.tensor([1])
        >>> loss = nn.functional.cross_entropy(model(x), y)
        >>> shared = torch.autograd.grad(loss, list(model.parameters()))
        >>> found = reconstruct(model, nn.functional.cross_entropy, shared, labels=y, input_shape=(1, 4), max_iters=300)
        >>> bool((found.images - x).abs().max() < 0.05)
        True

    Raises:
        TypeError, ValueError, RuntimeError: as `GradientInversion` and its ``reconstruct``.
    """
    attack = GradientInversion(model, loss_fn, **settings)
    return attack.reconstruct(
        gradients, labels=labels, input_shape=input_shape, seed=seed, callback=callback, resume=resume
    )
