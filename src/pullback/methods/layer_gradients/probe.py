"""Spectra of the gradients of a model's layers, example by example or live (Li, Li and Zhou 2025, arXiv:2410.23743)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from pullback.core.checks import NonFiniteError, choice, instance, integer, positive, shown
from pullback.core.gathering import gather_json
from pullback.core.gradient_factors import FactorCapture
from pullback.core.kinds import Probe
from pullback.core.layer_rows import unwrapped
from pullback.core.line_log import LineLog
from pullback.core.matrices import Source, Splitter, find_sources
from pullback.core.spectra import Route
from pullback.core.step_reader import StepReader
from pullback.methods.layer_gradients.curves import Curves, layer_curve
from pullback.methods.layer_gradients.spectrum import (
    STATISTICS,
    Record,
    Reduction,
    Signal,
    captured,
    layout_of,
    losses_of,
    one_each,
    read,
    records_of,
    statistics,
)

FORMAT = "pullback.layer_gradients"
VERSION = 1


@final
@dataclass(frozen=True)
class Measurement:
    """What one call of the probe found.

    Args:
        records: one per example, or one for the batch.
    """

    records: tuple[Record, ...]


@final
class Sample:
    """The block of one measurement; see `GradientSpectrum.sample`.

    Attributes:
        loss: set it (a number, or one per example) where a statistic is divided by the loss; `backward` does so itself.
        records: what was measured, after the block.
    """

    def __init__(self, probe: GradientSpectrum, tags: Any, keys: Any, loss: Any, scale: float) -> None:
        self.loss = loss
        self.records: tuple[Record, ...] = ()
        self._probe, self._tags, self._keys, self._scale = probe, tags, keys, scale
        self._capture: FactorCapture | None = None

    def backward(self, loss: Tensor) -> None:
        """Back-propagate one loss, or the sum of one loss per example, times the probe's ``loss_scale``; note it.

        Args:
            loss: 0-dim tensor, or [examples].

        Raises:
            RuntimeError: outside the block, or if the loss has no graph.
            TypeError: if it is no tensor.
        """
        if self._capture is None:
            raise RuntimeError(
                "backward must be called inside the sample's with block, got a call outside it."
            )
        instance("loss", loss, Tensor)
        if not loss.requires_grad:
            raise RuntimeError(
                f"loss must depend on the watched weights with gradients switched on, got {shown(loss)} without a graph"
                ". Compute it inside the block, without no_grad and detach."
            )
        self.loss = loss.detach()
        (loss * self._scale).sum().backward()

    def __enter__(self) -> Sample:
        self._capture = self._probe._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        capture, self._capture = self._capture, None
        self._probe._open = False
        if capture is None:
            return
        capture.__exit__(kind, error, trace)
        if kind is None:
            self.records = self._probe._finish(capture, self._tags, self._keys, self.loss, self._scale)


@final
class GradientSpectrum(Probe):
    """Singular-value statistics of the gradients of attention projections (or any matrices), layer by layer.

    No optimizer is involved. In a `sample` block run your own forward and backward pass; on leaving it, the statistics
    of every watched matrix are in `records`, and the model is as it was: parameters, ``.grad``, ``requires_grad``,
    buffers, hooks, modes, random generators, also after an exception. Inside the block all parameters are frozen and
    gradients of weights are not computed: hooks on the linear layers keep inputs A and errors B, whose product B^T A
    the gradient is, and its spectrum comes from a core as small as the number of tokens with errors.

    Several calls of a layer and several backward passes add up within one block, as ``.grad`` does.

    Args:
        model: any module; wrappers (DistributedDataParallel, a compiled module) are looked through. The attribute may
            be set to another model later.
        match: a preset (``"llama"``, ``"bert"``, ``"gpt2"``, ``"torch"``), a regular expression with the groups
            ``layer`` and ``proj`` for names of weights, or None for the only preset that fits.
        stats: names from `STATISTICS`. ``"nuclear_per_loss"`` needs the loss of each sample, ``"similarity"`` is the
            cosine between the gradients of neighbouring layers (NaN for unequal shapes).
        reduction: ``"per_sample"``: the batch holds independent examples and each gets a record (hand over the *sum* of
            their losses: `Sample.backward` does); ``"batch"``: one record of the gradient of the whole batch, whose
            nuclear norm is at most the examples' sum.
        splitter: see `pullback.core.matrices.find_sources`.
        route: ``"auto"``; ``"dense"`` takes ordinary gradients of the weights (one example or batch per sample), also
            where a weight is used without a call of its layer; ``"low_rank"`` never forms a gradient.
        batch_dim: axis of the examples in the inputs of the model and its layers.
        loss_scale: what the loss is multiplied by against underflow in half precision, a power of two; all statistics
            are divided by it. `Sample.backward` multiplies, with ``loss.backward()`` of your own you do.
        training: mode inside the block; the paper's is evaluation (False), None leaves modes alone.
        nonfinite: ``"record"`` gives NaN for a matrix whose gradient is not finite, counts it and goes on; ``"raise"``
            stops.
        seed: of random layers inside the block.

    Attributes:
        records: what was measured, in order.

    Raises:
        TypeError: if an argument has a wrong type, or a weight is sharded or quantised.
        ValueError: if a value makes no sense, or no matrix or no unique one is found.
    """

    def __init__(
        self,
        model: nn.Module,
        match: str | None = None,
        *,
        stats: Sequence[str] = ("nuclear", "sigma1_ratio", "effective_rank", "frobenius"),
        reduction: Reduction = "per_sample",
        splitter: Splitter | None = None,
        route: Route = "auto",
        batch_dim: int = 0,
        loss_scale: float = 1.0,
        training: bool | None = False,
        nonfinite: Literal["record", "raise"] = "record",
        seed: int = 0,
    ) -> None:
        self.model = instance("model", model, nn.Module)
        self.match, self.splitter = match, splitter
        if isinstance(stats, str):
            raise TypeError(
                f"stats must be names of statistics, got the string {stats!r}. Write ({stats!r},)."
            )
        self.stats = tuple(dict.fromkeys(choice("stats", each, STATISTICS) for each in stats))
        if not self.stats:
            raise ValueError(
                f"stats must name at least one statistic, got none. Known are {', '.join(STATISTICS)}."
            )
        self.reduction: Reduction = choice("reduction", reduction, ("per_sample", "batch"))
        self.route: Route = choice("route", route, ("auto", "dense", "low_rank"))
        self.batch_dim = integer("batch_dim", batch_dim, minimum=0)
        self.loss_scale = positive("loss_scale", loss_scale)
        if math.frexp(self.loss_scale)[0] != 0.5:
            raise ValueError(
                f"loss_scale must be a power of two, got {loss_scale}. Others round: use 2.0**10."
            )
        self.training = None if training is None else instance("training", training, bool)
        self.nonfinite = choice("nonfinite", nonfinite, ("record", "raise"))
        self.seed = integer("seed", seed)
        self.records: list[Record] = []
        self.log: LineLog | None = None
        self._open = False
        self.layers  # noqa: B018 - refuses a model without matching matrices at once

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """Numbers of the watched layers, by projection."""
        return {proj: tuple(layer for layer, _ in rows) for proj, rows in layout_of(self._sources()).items()}

    def __repr__(self) -> str:
        what = ", ".join(f"{proj}: {len(rows)} layers" for proj, rows in self.layers.items())
        return (
            f"GradientSpectrum({type(self.model).__name__}, {what}, reduction={self.reduction!r}, "
            f"route={self.route!r}, records={len(self.records)})"
        )

    def _sources(self) -> list[Source]:
        sources = find_sources(unwrapped(self.model), self.match, self.splitter)
        hidden = [each.name for each in sources if not each.callable]
        if self.route == "low_rank" and hidden:
            raise ValueError(
                f"route='low_rank' must meet linear layers that are called, got {shown(hidden[0])}, whose weight is "
                "used without that. Use route='auto'."
            )
        return sources

    # --- one measurement --------------------------------------------------------------------------------------------

    def sample(
        self, tag: str | Sequence[str] = "", key: str | Sequence[str] = "", *, loss: Any = None
    ) -> Sample:
        """A ``with`` block around one forward and backward pass of your own.

        Args:
            tag: the group of the example, such as ``"none_cot"``; one per example of a batch, or one for all.
            key: the example's own name, for `seen` after a resumption; likewise.
            loss: the loss, or one per example, where it is known before; else set ``sample.loss`` or use
                ``sample.backward(loss)``.

        An exception inside the block records nothing and passes on.

        Raises:
            RuntimeError: on leaving the block, if no backward pass reached the watched weights, a watched layer was not
                called, or the axis of the examples cannot be told; on entering it, inside another sample of this probe.
        """
        return Sample(self, tag, key, loss, self.loss_scale)

    def measure(
        self, closure: Callable[[], Tensor], tag: str | Sequence[str] = "", key: str | Sequence[str] = ""
    ) -> Measurement:
        """Measure with a function that runs the model and returns the loss, or one loss per example.

        Raises:
            RuntimeError: as `sample`.
            TypeError: if it returns no tensor.
        """
        with self.sample(tag, key) as sample:
            sample.backward(closure())
        return Measurement(sample.records)

    def __call__(
        self, closure: Callable[[], Tensor], tag: str | Sequence[str] = "", key: str | Sequence[str] = ""
    ) -> Measurement:
        """The same as `measure`."""
        return self.measure(closure, tag, key)

    def _begin(self) -> FactorCapture:
        if self._open:
            raise RuntimeError(
                "samples of one probe must not be nested, got a second one inside the first. Leave it first, or make "
                "a second probe."
            )
        capture = FactorCapture(
            self.model, self._sources(), dense=self.route == "dense", training=self.training,
            batch_dim=self.batch_dim, seed=self.seed,
        )  # fmt: skip
        capture.__enter__()
        self._open = True
        return capture

    def _finish(
        self, capture: FactorCapture, tags: Any, keys: Any, loss: Any, scale: float
    ) -> tuple[Record, ...]:
        capture.check()
        samples = capture.samples(split=self.reduction == "per_sample")
        with torch.no_grad(), torch.autocast(capture.device.type, enabled=False):
            signals = captured(capture, samples)
            losses = losses_of(loss, samples, self.reduction, required="nuclear_per_loss" in self.stats)
            tags, keys = one_each("tag", tags, samples), one_each("key", keys, samples)
            return self._record(capture.sources, signals, tags, keys, losses, scale, self.reduction)

    def _record(
        self, sources: Sequence[Source], signals: list[Signal], tags: list[str], keys: list[str],
        losses: list[float], scale: Any, reduction: Reduction,
    ) -> tuple[Record, ...]:  # fmt: skip
        layout = layout_of(sources)
        found = statistics(signals, layout, self.stats, route=self.route, losses=losses, scale=scale)
        records = records_of(
            found, layout, self.stats, tags=tags, keys=keys, losses=losses, reduction=reduction
        )
        bad = sum(each.nonfinite for each in records)
        if bad and self.nonfinite == "raise":
            raise NonFiniteError(
                f"gradients must be finite, got NaN or Inf in {bad} of {len(signals) * len(records)} matrices. Pass "
                "nonfinite='record' to go on, or a loss_scale where half precision overflows."
            )
        self.records += records
        if self.log is not None:
            self.log.append([each.to_dict() for each in records])
        return tuple(records)

    # --- the user's own training loop -------------------------------------------------------------------------------

    def watch(
        self, optimizer: torch.optim.Optimizer, *, every: int = 100, tag: str = "watch", first: int = 0
    ) -> StepReader:
        """Record the gradients that training makes anyway, in every n-th step, between backward and update.

        Nothing is computed twice: ``.grad`` is read as it is, after accumulation, averaging over ranks and clipping,
        and with a ``GradScaler`` divided by its scale. Records are labelled ``"batch"``; their key is the step's
        number. A weight without a gradient in that step has NaN, and counts as not finite.

        Args:
            optimizer: trains (part of) the model.
            every: distance of the steps that are measured.
            tag: of the records.
            first: number of the next step, for a resumed run.

        Returns:
            The handle; ``remove()`` ends it.

        Raises:
            TypeError: if the optimizer is none of torch's, or is LBFGS.
            ValueError: if it trains none of the watched weights, or ``nuclear_per_loss`` is among the statistics.
        """
        if "nuclear_per_loss" in self.stats:
            raise ValueError(
                "stats must do without the loss in a watch, got 'nuclear_per_loss'. Make a probe without it."
            )
        trained = {id(each) for group in getattr(optimizer, "param_groups", ()) for each in group["params"]}
        sources = self._sources()
        reader = StepReader(
            optimizer, lambda step, scale: self._read(step, scale, tag), every=every, first=first
        )
        if not any(id(each.weight) in trained for each in sources):
            reader.remove()
            raise ValueError(
                f"optimizer must train one of the watched weights, got {len(trained)} others. Pass the model's own."
            )
        return reader

    def _read(self, step: int, scale: Any, tag: str) -> None:
        sources = self._sources()
        signals = read(sources, step)
        with torch.autocast(signals[0].errors.device.type, enabled=False):
            self._record(sources, signals, [tag], [str(step)], [math.nan], scale, "batch")

    # --- what was found ---------------------------------------------------------------------------------------------

    def curve(self, statistic: str = "nuclear", *, tag: str | None = None) -> Curves:
        """Mean of a statistic over the examples, layer by layer; see `layer_curve`.

        Raises:
            ValueError: if there is no record with the tag, or the statistic was not asked for.
        """
        return layer_curve(self.records, statistic, tag=tag, layers=self.layers)

    def seen(self, key: str, tag: str | None = None) -> bool:
        """Whether an example was measured already, also before a resumption."""
        return any(each.key == key and tag in {None, each.tag} for each in self.records)

    def to_jsonl(self, path: str | os.PathLike[str], *, resume: bool = False) -> LineLog:
        """Write all records, present and future ones, into a file of JSON lines as they come.

        Args:
            path: a new file, or with ``resume`` one that this method wrote for the same matrices, statistics and
                reduction; its records come first in `records`. Give every rank a file of its own.
            resume: go on with a file that is there. A half-written last line is dropped with a warning.

        Returns:
            The log: ``close()`` ends it. When a write fails, records wait in memory (`LineLog`).

        Raises:
            FileExistsError: if the file is there and ``resume`` is false.
            RuntimeError: if a log is open already.
            ValueError: if the file is another one's, or of other settings.
        """
        if self.log is not None and not self.log.closed:
            raise RuntimeError(
                f"a probe must have one log, got a second beside {str(self.log.path)!r}. Close that first."
            )
        layers = {proj: list(rows) for proj, rows in self.layers.items()}
        header = {
            "format": FORMAT, "version": VERSION, "model": type(unwrapped(self.model)).__name__, "layers": layers,
            "stats": list(self.stats), "reduction": self.reduction,
        }  # fmt: skip
        log = LineLog(path, header, resume=resume)
        past = [Record.from_dict(each) for each in log.records]
        own = [each.to_dict() for each in self.records]
        self.records[:0] = past
        self.log = log
        log.append(own)
        return log

    def gather(self) -> tuple[Record, ...]:
        """The records of all ranks, rank by rank, on every rank; all must call. Without a group: the own ones."""
        ranks = gather_json([each.to_dict() for each in self.records])
        return tuple(Record.from_dict(each) for rank in ranks for each in rank)
