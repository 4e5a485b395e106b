"""The bias-shift probe: how much of an update only shifts the means of units, and the gradient that does not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeAlias, final

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from pullback.core.checks import (
    NON_FINITE_POLICIES,
    NonFinite,
    NonFiniteError,
    choice,
    instance,
    integer,
    non_negative,
    positive,
)
from pullback.core.finite import all_finite
from pullback.core.kinds import Probe
from pullback.core.layer_rows import named_layers, unwrapped
from pullback.core.layer_signals import Passes, Signal, full_precision, no_trace, passes, signal_of
from pullback.core.likelihood import KINDS, Kind
from pullback.core.streams import stream_seed
from pullback.core.weighted_gram import SingularError, Solved, WeightedGrams, conjugate_gradients
from pullback.methods.elu.shift import BiasShiftReport, LayerShift, live_units, measure, natural, unmeasured

FisherKind: TypeAlias = Literal["model", "empirical"]
Solver: TypeAlias = Literal["exact", "cg"]


@final
class BiasShiftProbe(Probe):
    """Measures the bias shift of updates layer by layer, and gives the unit natural gradient (Clevert et al. 2016).

    A weight update changes the mean of a unit's pre-activation as well as its response to single inputs. The probe says
    what part of the plain gradient step is such a common shift, what part of the natural gradient restricted to each
    unit is, how far the two directions differ, and how far incoming activations are from being centred.

    The model is run as it is, once forwards and twice backwards (once with ``fisher="empirical"``), outside autocast
    and compilation, with private random numbers. Parameters, gradients, buffers, modes, hooks and generators are
    afterwards what they were, also after an exception. Under DistributedDataParallel call it on one rank or on all:
    nothing is communicated, each rank reads its own batch.

    Args:
        model: module that maps inputs to logits or means. The attribute may be set to another model later.
        layers: names of Linear, Conv1d, Conv2d or Conv3d layers as in ``model.named_modules()`` (of the module inside a
            wrapper); None for all that take part in the forward pass.
        fisher: ``"model"`` draws the labels of the Fisher matrix from the model's own distribution (the true Fisher),
            ``"empirical"`` takes the real ones.
        damping: multiple of ``mean(diag F)`` added to the diagonal of every unit's Fisher matrix F.
        max_rows: rows (examples, or positions of a convolution) that are used, drawn evenly; None for all. Means and
            Fisher matrices then have a relative standard error of ``1 / sqrt(max_rows)`` or so; gradients are of all.
        max_units: live units per layer for which natural quantities are computed, drawn evenly and the same in every
            measurement; None for all. Medians over u of m units have a standard error of about 1.25 sd sqrt((1/u -
            1/m)): 4 keep a probe of narrow layers within five forward and backward passes, a single measurement that is
            to be exact deserves more. Quantities that need no solve are of all units, and so is
            `unit_natural_gradient`.
        solver: ``"exact"`` factorises every unit's matrix, ``"cg"`` iterates on all units at once (worth it for all
            units of layers of about 300 to 2,000 inputs).
        tolerance: relative residual at which ``"cg"`` stops.
        max_iterations: of ``"cg"``; a warning says when they did not suffice.
        likelihood: ``"categorical"``, ``"bernoulli"`` (logits), ``"gaussian"`` (variance 1), or ``"auto"``: categorical
            for labels of an integer dtype, else Gaussian.
        training: mode of the model while it is measured; None leaves all modes as they are.
        nonfinite: NaN or Inf in a layer: ``"raise"``; ``"skip"`` gives NaN for that layer and leaves it out of the
            natural gradient; ``"warn"`` does so with a warning.
        seed: of sampled labels, rows, units and of random layers such as dropout; equal seeds give equal results.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if a value or a name of a layer makes no sense.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str] | None = None,
        *,
        fisher: FisherKind = "model",
        damping: float = 1e-3,
        max_rows: int | None = 4096,
        max_units: int | None = 4,
        solver: Solver = "exact",
        tolerance: float = 1e-4,
        max_iterations: int = 300,
        likelihood: Kind = "auto",
        training: bool | None = None,
        nonfinite: NonFinite = "raise",
        seed: int = 0,
    ) -> None:
        self.model = instance("model", model, nn.Module)
        self.layers = layers if layers is None or isinstance(layers, str) else tuple(layers)
        self.fisher = choice("fisher", fisher, ("model", "empirical"))
        self.damping = non_negative("damping", damping)
        self.max_rows = None if max_rows is None else integer("max_rows", max_rows, minimum=1)
        self.max_units = None if max_units is None else integer("max_units", max_units, minimum=1)
        self.solver = choice("solver", solver, ("exact", "cg"))
        self.tolerance = positive("tolerance", tolerance)
        self.max_iterations = integer("max_iterations", max_iterations, minimum=1)
        self.likelihood: Kind = choice("likelihood", likelihood, KINDS)
        self.training = None if training is None else instance("training", training, bool)
        self.nonfinite: NonFinite = choice("nonfinite", nonfinite, NON_FINITE_POLICIES)
        self.seed = integer("seed", seed)
        named_layers(unwrapped(model), self.layers)

    def __repr__(self) -> str:
        return (
            f"BiasShiftProbe({type(self.model).__name__}, layers={self.layers}, fisher={self.fisher!r}, "
            f"damping={self.damping}, max_rows={self.max_rows}, max_units={self.max_units}, solver={self.solver!r})"
        )

    def __call__(self, x: Any, y: Tensor) -> BiasShiftReport:
        """The same as `measure`."""
        return self.measure(x, y)

    def measure(self, x: Any, y: Tensor, *, per_unit: bool = False) -> BiasShiftReport:
        """Measure on one batch.

        Args:
            x: input of the model; a tuple holds positional, a mapping named arguments.
            y: real labels: classes [B, ...] (-100 carries no loss), or targets of the shape of the output.
            per_unit: keep tensors by unit in the report.

        Returns:
            A frozen report: ``report["fc3"].shift_fraction``, ``report.table()``, ``report.to_dict()``.

        Raises:
            NonFiniteError: if loss, activations or derivatives hold NaN or Inf and the policy is ``"raise"``.
            RuntimeError: if a unit's Fisher matrix is singular at this damping, if a layer runs without gradients, or
                if its input is overwritten afterwards.
            ValueError: if labels do not fit the output, or a named layer did not run.
        """
        found, loss = {}, math.nan
        with full_precision(self.model):
            for name, layer, seen, signal in self._signals(x, y):
                loss = seen.loss
                if signal is None:
                    found[name] = unmeasured(_units(layer))
                else:
                    found[name] = self._measured(name, layer, signal, per_unit)
        return BiasShiftReport(self.fisher, self.damping, loss, found)

    def unit_natural_gradient(self, x: Any, y: Tensor) -> dict[str, Tensor]:
        """The natural gradient of every unit's incoming weights and bias (theorem 1), for all units of the layers.

        It is F^-1 times the gradient of the mean loss over the batch, with F of one term of the likelihood; positions
        of a convolution and of a sequence count as independent contributions to a term. Dead units get zeros.

        Args:
            x: as in `measure`.
            y: as in `measure`.

        Returns:
            Directions by parameter name, in each parameter's shape and dtype: ``p.grad = direction[name]`` for an
            optimizer that descends. Parameters of no probed layer are not in it.

        Raises:
            NonFiniteError: as in `measure`.
            RuntimeError: as in `measure`.
            TypeError: if a weight is sharded.
            ValueError: as in `measure`, or if a weight is parametrised or shared by several modules.
        """
        found: dict[str, Tensor] = {}
        self._check_parameters()
        with full_precision(self.model):
            for name, layer, _, signal in self._signals(x, y):
                if signal is not None:
                    found |= self._direction(name, layer, signal)
        return found

    def _direction(self, name: str, layer: Any, signal: Signal) -> dict[str, Tensor]:
        """Unit natural gradient of one layer by parameter name."""
        (units, c), n = live_units(signal), signal.g.shape[1]
        bias = layer.bias is not None
        step = signal.g.new_zeros(len(signal.g), n + bias)
        if len(units):
            solved = self._guarded(
                name,
                natural,
                signal,
                units,
                c,
                damping=self.damping,
                bias=bias,
                solve=self._solve,
                more=False,
            )
            self._converged(name, solved.iterations, solved.residual)
            step[units] = solved.step.to(step.dtype)
        prefix = f"{name}." if name else ""
        found = {f"{prefix}weight": step[:, :n].reshape(layer.weight.shape).to(layer.weight.dtype)}
        if bias:
            found[f"{prefix}bias"] = step[:, n].to(layer.bias.dtype)
        return found

    # --- one batch --------------------------------------------------------------------------------------------------

    def _signals(self, x: Any, y: Tensor) -> Iterator[tuple[str, Any, Passes, Signal | None]]:
        """Name, layer, passes and signal of every layer that ran; a signal that is not finite is None."""
        model = unwrapped(instance("model", self.model, nn.Module))
        layers = named_layers(model, self.layers)
        for name, parameter in model.named_parameters():
            if is_lazy(parameter):
                raise ValueError(
                    f"model must be initialised, got the lazy parameter {name!r}. Run the model once before."
                )
        with no_trace(model, training=self.training, seed=self.seed):
            seen = passes(model, layers, x, y, fisher=self.fisher, likelihood=self.likelihood, seed=self.seed)
        silent = [name for name, calls in seen.calls.items() if not calls]
        if silent and (self.layers is not None or len(silent) == len(layers)):
            raise ValueError(
                f"layers must run in the forward pass, got {', '.join(silent)}, which did not. A fused or functional "
                "path may use their weights without calling them."
            )
        for index, (name, layer) in enumerate(layers.items()):
            if name in silent:
                continue
            signal = None
            if self._admitted(math.isfinite(seen.loss), name, "the loss"):
                seed = stream_seed("bias_shift.layer", self.seed, index)
                signal = signal_of(name, layer, seen, max_rows=self.max_rows, seed=seed)
                finite = all_finite([signal.rows, signal.delta, signal.g])
                signal = signal if self._admitted(finite, name, "its activations or derivatives") else None
            yield name, layer, seen, signal

    def _admitted(self, finite: bool, name: str, what: str) -> bool:
        if finite:
            return True
        text = f"BiasShiftProbe: {what} of layer {name!r} must be finite, got NaN or Inf."
        if what == "the loss":
            text = "BiasShiftProbe: the loss must be finite, got NaN or Inf."
        if self.nonfinite == "raise":
            raise NonFiniteError(f"{text} Lower the learning rate; nonfinite='skip' reports NaN instead.")
        if self.nonfinite == "warn":
            warnings.warn(f"{text} The layer {name!r} is left out.", RuntimeWarning, stacklevel=4)
        return False

    def _measured(self, name: str, layer: Any, signal: Signal, per_unit: bool) -> LayerShift:
        found: LayerShift = self._guarded(
            name, measure, signal, damping=self.damping, bias=layer.bias is not None, solve=self._solve,
            max_units=self.max_units, seed=stream_seed("bias_shift.layer", self.seed), per_unit=per_unit,
        )  # fmt: skip
        self._converged(name, found.iterations, found.residual)
        return found

    def _solve(self, fisher: WeightedGrams, right: Tensor) -> Solved:
        if self.solver == "exact":
            return fisher.solve(right)
        return conjugate_gradients(fisher, right, tolerance=self.tolerance, limit=self.max_iterations)

    def _guarded(self, name: str, act: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return act(*args, **kwargs)
        except SingularError as error:
            raise RuntimeError(
                f"damping must make every unit's Fisher matrix regular, got {self.damping}: in layer {name!r} {error}. "
                "Raise it, or use more rows."
            ) from error

    def _converged(self, name: str, iterations: int, residual: float) -> None:
        if iterations >= self.max_iterations:
            warnings.warn(
                f"BiasShiftProbe: conjugate gradients in layer {name!r} stopped after max_iterations="
                f"{self.max_iterations} at a relative residual of {residual:.1e}. Raise max_iterations or damping, or "
                "use solver='exact'.",
                RuntimeWarning,
                stacklevel=4,
            )

    def _check_parameters(self) -> None:
        """Refuse parameters for which the layer's own gradient is not the parameter's."""
        model = unwrapped(self.model)
        owners: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners.setdefault(id(parameter), []).append(name)
        for name, layer in named_layers(model, self.layers).items():
            if parametrize.is_parametrized(layer):
                raise ValueError(
                    f"layers must have plain weights, got the parametrised {name!r}. Leave it out."
                )
            for parameter in (layer.weight, layer.bias):
                if type(parameter).__name__ == "DTensor":
                    raise TypeError(
                        f"weights must be whole, got a DTensor in {name!r}. Call it before fully_shard."
                    )
                if len(owners.get(id(parameter), ())) > 1:
                    shared = ", ".join(owners[id(parameter)])
                    raise ValueError(
                        f"weights must belong to one module, got one shared by {shared}. Leave them out."
                    )


def _units(layer: Any) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
