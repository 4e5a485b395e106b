"""The domain-adversarial loss and what measures its success (Ganin et al. 2016, arXiv:1505.07818)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback.core.checks import NON_FINITE_POLICIES, NonFinite, NonFiniteError, choice, instance
from pullback.core.kinds import Objective
from pullback.core.streams import numpy_generator
from pullback.methods.dann.reversal import GradientReversal

# --- the loss ------------------------------------------------------------------------------------------------------


@final
class DomainAdversarialLoss(Objective):
    r"""Domain classification loss behind a gradient reversal layer (paper eq. 10 with eq. 16-17).

    Each domain's loss is averaged over its own examples, then the domains are added up as in eq. 10, so that
    unequal halves of a batch weigh the same. Add the result to the total with weight 1; the strength of the reversal
    is the layer's business.

    After every call ``accuracy`` holds the domain accuracy, averaged over domains, as a 0-dim tensor (no host
    read). It is a sign of life, not of success: 0.5 is neither needed nor enough. Measure `proxy_a_distance` with a
    fresh classifier instead.

    Args:
        domain_head: maps features [n, ...] to one logit ([n] or [n, 1], two domains, positive = target; binary
            cross-entropy) or to K logits ([n, K], K domains in the order of the call; cross-entropy).
        grl: the reversal layer; None makes a new one of strength 1.
        forward: ``"joint"`` sends all domains through the head in one call (head batch norm sees the mixture),
            ``"separate"`` in one call per domain (each domain is normalised by its own statistics).
        combine: ``"sum"`` over domains (eq. 10) or their ``"mean"`` (what a plain mean over a balanced batch
            gives; half of it with two domains).
        nonfinite: what to do when the loss is NaN or Inf: ``"raise"``, ``"skip"`` (a zero without gradient) or
            ``"warn"``. Costs one host read a call; inside ``torch.compile`` there is no check.

    Raises:
        TypeError: if ``domain_head`` is no module or ``grl`` no `GradientReversal`.
        ValueError: if an option is unknown.
    """

    accuracy: Tensor

    def __init__(
        self,
        domain_head: nn.Module,
        grl: GradientReversal | None = None,
        *,
        forward: Literal["joint", "separate"] = "joint",
        combine: Literal["sum", "mean"] = "sum",
        nonfinite: NonFinite = "raise",
    ) -> None:
        super().__init__()
        self.domain_head = instance("domain_head", domain_head, nn.Module)
        self.grl = instance("grl", GradientReversal() if grl is None else grl, GradientReversal)
        self.forward_mode = choice("forward", forward, ("joint", "separate"))
        self.combine = choice("combine", combine, ("sum", "mean"))
        self.nonfinite = choice("nonfinite", nonfinite, NON_FINITE_POLICIES)
        self.register_buffer("accuracy", torch.tensor(float("nan")), persistent=False)

    def forward(self, *features: Tensor | None) -> Tensor:
        """Loss of telling the domains apart.

        Args:
            *features: one tensor [n_k, ...] per domain, source first. None or an empty tensor leaves a domain out;
                with fewer than two left the call warns and the loss says nothing about the difference of domains.

        Returns:
            0-dim loss.

        Raises:
            TypeError: if features are no floating tensors.
            ValueError: if there are fewer than two arguments, no example at all, or logits of a wrong shape.
            NonFiniteError: if the loss is NaN or Inf and ``nonfinite="raise"``.
        """
        present = self._present(features)
        logits = self._logits([x for _, x in present])
        losses, right = zip(
            *(self._domain(z, k, len(features)) for z, (k, _) in zip(logits, present, strict=True)),
            strict=True,
        )
        self.accuracy = torch.stack(right).mean()
        loss = torch.stack(losses).sum() if self.combine == "sum" else torch.stack(losses).mean()
        return loss if torch.compiler.is_compiling() else self._admit(loss)

    @staticmethod
    def _present(features: Sequence[Tensor | None]) -> list[tuple[int, Tensor]]:
        if len(features) < 2:
            raise ValueError(
                f"features must be given for at least 2 domains, got {len(features)}. "
                "Call loss(source_features, target_features)."
            )
        present = [(k, x) for k, x in enumerate(features) if x is not None and len(x)]
        if not present:
            raise ValueError(
                "features must hold at least one example, got none in any domain. Skip this batch."
            )
        if len(present) == 1:
            warnings.warn(
                f"DomainAdversarialLoss: this batch holds domain {present[0][0]} only, so its loss cannot align "
                "anything. Draw every batch from all domains.",
                RuntimeWarning,
                stacklevel=4,
            )
        return present

    def _logits(self, features: list[Tensor]) -> list[Tensor]:
        if self.forward_mode == "separate" or len(features) == 1:
            return [self.domain_head(self.grl(x)) for x in features]
        joint = self.domain_head(self.grl(torch.cat(features)))
        return list(joint.split([len(x) for x in features]))

    @staticmethod
    def _domain(logits: Tensor, domain: int, domains: int) -> tuple[Tensor, Tensor]:
        """Mean loss and accuracy of the examples of one domain; half precision is raised to float32."""
        z = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        if domains == 2 and (z.dim() == 1 or z.shape[1:] == (1,)):
            z = z.reshape(-1)
            loss = F.softplus(-z if domain == 1 else z).mean()
            return loss, ((z > 0) == (domain == 1)).to(z.dtype).mean().detach()
        if z.dim() != 2 or z.shape[1] != domains:
            one = " or (n,) or (n, 1)" if domains == 2 else ""
            raise ValueError(
                f"domain_head must give logits of shape (n, {domains}){one}, got {tuple(logits.shape)}. "
                "Change its last layer or the number of feature tensors."
            )
        target = torch.full((len(z),), domain, dtype=torch.long, device=z.device)
        return F.cross_entropy(z, target), (z.argmax(1) == domain).to(z.dtype).mean().detach()

    def _admit(self, loss: Tensor) -> Tensor:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return loss  # values under torch.func transforms cannot be read
        value = float(loss.detach())
        if math.isfinite(value):
            return loss
        text = f"DomainAdversarialLoss: the loss is {value}. Lower lam or the learning rate, or set clip="
        if self.nonfinite == "raise":
            raise NonFiniteError(f"{text} on GradientReversal; nonfinite='skip' leaves such batches out.")
        if self.nonfinite == "skip":
            return loss.new_zeros((), requires_grad=loss.requires_grad)
        warnings.warn(f"{text}. It is returned because nonfinite='warn'.", RuntimeWarning, stacklevel=4)
        return loss

    def extra_repr(self) -> str:
        """The options."""
        return f"forward={self.forward_mode!r}, combine={self.combine!r}, nonfinite={self.nonfinite!r}"


# --- how far apart two domains are ---------------------------------------------------------------------------------


def _matrix(name: str, value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu().double().numpy()
    x = np.asarray(value, dtype=np.float64)
    if x.ndim < 2 or len(x) < 4:
        raise ValueError(f"{name} must be of shape (n >= 4, d), got {x.shape}. Pass one row per example.")
    x = x.reshape(len(x), -1)
    if not np.isfinite(x).all():
        raise ValueError(f"{name} must be finite, got NaN or Inf. Look for divergence in the features.")
    return x


def proxy_a_distance(
    source: Any, target: Any, *, c: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0), seed: int = 0
) -> float:
    r"""Proxy A-distance :math:`2 (1 - 2 \epsilon)` between two sets of features (paper section 5.1.1).

    Linear support vector machines learn to tell the sets apart on one half of each; :math:`\epsilon` is the lowest
    error over ``c`` on the other half, averaged over the two domains. Features are standardised with the mean and
    deviation of the first halves, so that ``c`` means the same for every network. Needs scikit-learn.

    Args:
        source: features [n, d] of the source (tensor or array); further axes are flattened.
        target: features [m, d] of the target.
        c: strengths of the machines (small = strongly regularised).
        seed: stream of the halving.

    Returns:
        Distance in [0, 2]: 0 cannot be told apart, 2 separable. The least error over several machines is slightly
        optimistic, so that equal distributions give a little above 0.

    Raises:
        ImportError: if scikit-learn is missing.
        ValueError: if the shapes do not fit, values are not finite, or ``c`` is empty.
    """
    try:
        from sklearn.svm import LinearSVC
    except ImportError as error:
        raise ImportError(
            'proxy_a_distance needs scikit-learn. Install it with: pip install "pullback[lab]".'
        ) from error
    xs, xt = _matrix("source", source), _matrix("target", target)
    if xs.shape[1] != xt.shape[1]:
        raise ValueError(f"target must have {xs.shape[1]} features as source has, got {xt.shape[1]}.")
    if not len(c):
        raise ValueError("c must hold at least one value, got none. Use for example (0.01, 1.0).")
    halves = [_halves(x, numpy_generator("proxy-a-distance", seed, k)) for k, x in enumerate((xs, xt))]
    train = np.concatenate([halves[0][0], halves[1][0]])
    mean, scale = train.mean(0), train.std(0)
    scale[scale == 0] = 1.0
    labels = np.repeat([0, 1], [len(half) for half, _ in halves])
    errors = []
    for strength in c:
        machine = LinearSVC(C=strength, class_weight="balanced", dual=False, max_iter=500, tol=1e-3)
        machine.fit((train - mean) / scale, labels)
        wrong = [np.mean(machine.predict((test - mean) / scale) != k) for k, (_, test) in enumerate(halves)]
        errors.append(float(np.mean(wrong)))
    return min(2.0, max(0.0, 2.0 * (1.0 - 2.0 * min(errors))))


def _halves(x: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    order = rng.permutation(len(x))
    return x[order[: len(x) // 2]], x[order[len(x) // 2 :]]


# --- choosing the strength without target labels -------------------------------------------------------------------

Predict: TypeAlias = Callable[[Any], Any]
"""A fitted model: labels of some inputs."""

Fit: TypeAlias = Callable[[Any, Any, Any, Any, Predict | None], Predict]
"""``fit(source_x, source_y, target_x, value, start) -> predict``; ``start`` is the model to begin from, or None."""


@dataclass(frozen=True)
class ReverseValidation:
    """Outcome of `reverse_validation`.

    Args:
        best: value of least reverse risk (the first one on a tie).
        risks: reverse risk of every value, in the order of the grid; each in [0, 1].
    """

    best: Any
    risks: tuple[tuple[Any, float], ...]


def reverse_validation(
    fit: Fit,
    source: tuple[Any, Any],
    target: Any,
    grid: Sequence[Any],
    *,
    validation: float = 0.1,
    seed: int = 0,
) -> ReverseValidation:
    r"""Choose a hyperparameter without a target label (paper section 5.1.2).

    For each value a model is fitted from source to target, labels the target, and a second one, begun from the
    first, is fitted back from the self-labelled target to the unlabelled source; its error on held-out *labelled
    source* is the reverse risk. Costs two fits a value.

    Args:
        fit: how a model is fitted (see `Fit`).
        source: inputs and labels; tensors or arrays that take an index array.
        target: inputs without labels.
        grid: values to try.
        validation: share of each domain that is held out, in (0, 1).
        seed: stream of the split.

    Returns:
        The best value and all risks.

    Raises:
        ValueError: if the grid is empty, lengths differ, or a part of the split would be empty.
    """
    xs, ys = source
    if not len(grid):
        raise ValueError("grid must hold at least one value, got none. Use for example (0.1, 0.3, 1.0).")
    if len(xs) != len(ys):
        raise ValueError(f"source must hold equally many inputs and labels, got {len(xs)} and {len(ys)}.")
    keep_s, held = _split(len(xs), validation, seed, 0)
    keep_t, _ = _split(len(target), validation, seed, 1)
    risks = []
    for value in grid:
        forward = fit(xs[keep_s], ys[keep_s], target[keep_t], value, None)
        backward = fit(target[keep_t], forward(target[keep_t]), xs[keep_s], value, forward)
        wrong = np.asarray(backward(xs[held])) != np.asarray(ys[held])
        risks.append((value, float(wrong.mean())))
    return ReverseValidation(best=min(risks, key=lambda pair: pair[1])[0], risks=tuple(risks))


def _split(n: int, share: float, seed: int, domain: int) -> tuple[np.ndarray, np.ndarray]:
    order = numpy_generator("reverse-validation", seed, domain).permutation(n)
    held = round(share * n)
    if not 0 < held < n:
        raise ValueError(
            f"validation must leave examples on both sides, got {share} of {n}. Use 0.1 or more examples."
        )
    return order[held:], order[:held]
