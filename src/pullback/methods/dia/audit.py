"""What can be reconstructed from one gradient: an audit of one's own model, with and without defences."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pullback.core.checks import floating, fraction, instance, shown
from pullback.core.image_quality import match, psnr, ssim
from pullback.core.inversion import GradientInversion
from pullback.core.inversion_closed_form import LayerLeak, first_layer_leak, fits_input, recover_labels
from pullback.core.inversion_problem import Bounds, checked_bounds
from pullback.core.inversion_result import Reconstruction
from pullback.core.inversion_victim import LossFunction, left_alone, unwrapped
from pullback.core.streams import generator
from pullback.methods.dia.attack import DropoutInversion, mask_accuracy
from pullback.methods.dia.masks import DROPOUTS, dropout_sites, record_masks

Defender: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]
Utility: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor]], float]
"""``utility(shared gradients, true gradients) -> number``; what a defence costs."""


@dataclass(frozen=True)
class Score:
    """How close one set of images is to the originals.

    Args:
        name: what made the images.
        images: [B, ...], in the order of the originals.
        psnr: [B] in dB, on the scale where the box (or the batch's own range) is 1.
        ssim: [B], or None for inputs that are no images.
    """

    name: str
    images: Tensor
    psnr: Tensor
    ssim: Tensor | None

    def __str__(self) -> str:
        similar = "   -" if self.ssim is None else f"{float(self.ssim.mean()):.2f}"
        return f"{self.name:<24} {float(self.psnr.mean()):8.1f} {float(self.psnr.max()):8.1f} {similar:>8}"


@dataclass(frozen=True)
class AuditReport:
    """What one gradient gives away; printing it gives a table.

    Args:
        truth: the client's inputs.
        scores: the attack first, then what needs no gradient: the best image of one colour, and the nearest reference;
            and the closed form where there is one.
        leak: what the first layer's gradient says.
        labels: the labels that the attack used.
        labels_right: whether these are the client's, as a set; None if they were given.
        mask_accuracy: share of dropout decisions that were found; None without dropout.
        result: the attack itself, with trace and masks, in its own order.
        gradients: what was shared, after the defence, by name.
        true_gradients: what would have been shared without it.
        notes: what limits the finding.
    """

    truth: Tensor
    scores: tuple[Score, ...]
    leak: LayerLeak
    labels: Tensor
    labels_right: bool | None
    mask_accuracy: float | None
    result: Reconstruction
    gradients: dict[str, Tensor] = field(repr=False)
    true_gradients: dict[str, Tensor] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> Tensor:
        """The attack's reconstructions, in the order of the originals."""
        return self.scores[0].images

    @property
    def psnr(self) -> float:
        """Mean PSNR of the attack, dB."""
        return float(self.scores[0].psnr.mean())

    @property
    def ssim(self) -> float | None:
        """Mean SSIM of the attack; None for inputs that are no images."""
        found = self.scores[0].ssim
        return None if found is None else float(found.mean())

    def __str__(self) -> str:
        head = f"{'':<24} {'PSNR dB':>8} {'best':>8} {'SSIM':>8}"
        lines = [head, *map(str, self.scores), f"closed form: {self.leak.verdict}"]
        lines += [
            f"attack: {self.result.status} after {self.result.steps} iterations ({self.result.message})"
        ]
        if self.mask_accuracy is not None:
            lines.append(f"dropout masks found: {100 * self.mask_accuracy:.1f} % of units")
        if self.labels_right is not None:
            lines.append(f"labels inferred: {'right' if self.labels_right else 'wrong'}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def audit(
    model: nn.Module,
    loss_fn: LossFunction,
    x: Tensor,
    y: Tensor,
    *,
    defence: Defender | None = None,
    bounds: Bounds | None = None,
    reference: Tensor | None = None,
    infer_labels: bool = False,
    seed: int = 0,
    **settings: Any,
) -> AuditReport:
    """Measure what one shared gradient of your own model and data gives away.

    The client's gradient is taken in the mode that the model is in: in train mode dropout is active, and the attack is
    `DropoutInversion`; else it is the ordinary inversion. Beside the attack stand rivals that use no gradient at all:
    an attack that is not clearly better than they has found nothing. The model is left as it was.

    Args:
        model: the model at the parameters of interest.
        loss_fn: ``loss_fn(model(x), y)``, with the reduction that is used in training.
        x: the client's batch.
        y: its labels.
        defence: what is done to the gradients before they are shared, see `pullback.core.gradient_defences`.
        bounds: box of the pixels, also the scale of the scores; None: no box, scale of the batch itself.
        reference: [N, ...] further images, such as the training set: the nearest of them is a rival.
        infer_labels: whether the attack infers the labels from the gradient, instead of knowing them.
        seed: stream of the dropout masks and of the attack's starts.
        **settings: as `GradientInversion` and `DropoutInversion`; here ``max_iters=1000``, ``schedule="milestones"``,
            ``tolerance=0`` and ``stop_patience=None`` unless given.

    Returns:
        A report with images, scores, notes and the attack's result.

    Raises:
        TypeError, ValueError: if an argument does not fit the model.
    """
    floating("x", x, fix="Whole numbers, such as tokens, cannot be searched by gradients.")
    if not isinstance(y, Tensor) or not y.dim() or len(y) != len(x):
        raise ValueError(
            f"y must have one row for each of the {len(x)} inputs, got {shown(y)}. Pass their labels."
        )
    scale = _Scale(x, bounds)
    true, truth, notes = _client(model, loss_fn, x, y, seed)
    names = list(true)
    shared = dict(zip(names, defence(list(true.values())), strict=True)) if defence is not None else true
    labels = recover_labels(shared, len(x)).to(y.device) if infer_labels else y
    attack = _attack(model, loss_fn, x, truth, bounds, settings)
    result = attack.reconstruct(shared, labels=labels, input_shape=x.shape, seed=seed)
    order = match(result.images, x)
    masks = mask_accuracy(result.masks, truth, order=order) if truth and result.masks else None
    right = bool((labels.sort().values == y.sort().values).all()) if infer_labels else None
    leak = first_layer_leak(shared)
    rows = [("attack", result.images[order]), *_rivals(x, reference), *_closed_form(leak, x)]
    scores = tuple(scale.score(name, images) for name, images in rows)
    return AuditReport(
        x.detach().clone(), scores, leak, labels, right, masks, result, shared, true, (*notes, *result.notes)
    )


def _attack(
    model: nn.Module,
    loss_fn: LossFunction,
    x: Tensor,
    truth: Any,
    bounds: Bounds | None,
    settings: dict[str, Any],
) -> GradientInversion:
    defaults: dict[str, Any] = {
        "max_iters": 1000,
        "schedule": "milestones",
        "tolerance": 0.0,
        "stop_patience": None,
    }
    settings = {"bounds": bounds} | defaults | settings
    training = any(module.training for module in unwrapped(model).modules())
    if training and settings.get("masks", "search") is not None:
        dropout_sites(model, x)  # refuses dropout that has no name, which the attack would silently miss
    if truth:
        return DropoutInversion(model, loss_fn, **settings)
    return GradientInversion(
        model, loss_fn, **{n: v for n, v in settings.items() if not n.startswith("mask")}
    )


def _client(
    model: nn.Module, loss_fn: LossFunction, x: Tensor, y: Tensor, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Gradients by name, dropout masks by call and notes of one client step that leaves no trace."""
    inner = unwrapped(model)
    named = {name: p for name, p in inner.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError(
            "model must have parameters that require gradients, got none: nothing would be shared."
        )
    drops = any(isinstance(m, DROPOUTS) and m.training and getattr(m, "p", 0) > 0 for m in inner.modules())
    stream = generator("audit.dropout", seed, device=x.device)
    with torch.inference_mode(False), torch.enable_grad(), left_alone(inner, x.device):
        if drops:
            with record_masks(inner, generator=stream) as masks:
                loss = loss_fn(inner(x.detach().clone()), y)
        else:
            masks, loss = {}, loss_fn(inner(x.detach().clone()), y)
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    notes = []
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in inner.modules()):
        notes.append(
            "the client normalised by batch statistics; the attack uses running ones and is weaker for it"
        )
    return dict(zip(named, gradients, strict=True)), masks, notes


def _rivals(x: Tensor, reference: Tensor | None) -> Iterable[tuple[str, Tensor]]:
    """Images that need no gradient: one colour per image, and the nearest of other images."""
    axes = tuple(range(2, x.dim())) if x.dim() > 2 else (1,)
    yield "one colour (mean)", x.detach().mean(axes, keepdim=True).expand_as(x)
    if reference is not None:
        floating("reference", reference, shape=(None, *x.shape[1:]), fix="Give images of the inputs' shape.")
        if not len(reference):
            raise ValueError("reference must hold images, got none. Leave it out.")
        rows, others = x.detach().double().flatten(1), reference.detach().to(x.device).double().flatten(1)
        yield "nearest reference", reference.to(x)[torch.cdist(rows, others).argmin(1).to(reference.device)]


def _closed_form(leak: LayerLeak, x: Tensor) -> Iterable[tuple[str, Tensor]]:
    if leak.input is not None and fits_input(leak, x.shape):
        yield "closed form", leak.input.to(x).view_as(x)


class _Scale:
    """Scores on the scale of the box, or of the batch."""

    def __init__(self, x: Tensor, bounds: Bounds | None) -> None:
        low, high = (x.min(), x.max()) if bounds is None else checked_bounds(bounds)
        self.low = torch.as_tensor(low, dtype=torch.float64, device=x.device)
        self.width = torch.as_tensor(high, dtype=torch.float64, device=x.device) - self.low
        if not bool((self.width > 0).all()):
            raise ValueError(f"x must not be constant, got {shown(x)} of one value. Give bounds.")
        self.truth = self._unit(x)

    def _unit(self, images: Tensor) -> Tensor:
        return ((images.detach().double() - self.low) / self.width).clamp(0, 1)

    def score(self, name: str, images: Tensor) -> Score:
        """Scores of images in the order of the originals; pixels outside the scale are clipped."""
        unit = self._unit(images)
        similar = ssim(unit, self.truth) if unit.dim() == 4 else None
        return Score(name, images.detach().clone(), psnr(unit, self.truth), similar)


# --- defences against what they cost --------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrivacyUtility:
    """One defence: how much it hides and what it costs.

    Args:
        name: the defence.
        psnr: mean PSNR of the attack, dB; lower is more private.
        ssim: mean SSIM; None for inputs that are no images.
        utility: what the utility function gave; higher is better.
        report: everything else.
    """

    name: str
    psnr: float
    ssim: float | None
    utility: float
    report: AuditReport = field(repr=False)


def cosine_utility(shared: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """Cosine of the shared gradient with the true one: 1 means that the direction of training is unchanged."""
    dots = [[float((a.double() * b.double()).sum()) for a, b in zip(one, other, strict=True)]
            for one, other in ((shared, true), (shared, shared), (true, true))]  # fmt: skip
    both, first, second = map(sum, dots)
    return both / (first * second) ** 0.5 if first * second > 0 else 0.0


def one_step_utility(model: nn.Module, loss_fn: LossFunction, x: Tensor, y: Tensor, *, lr: float) -> Utility:
    """A utility function: by how much one step of plain gradient descent along the shared gradient lowers the loss.

    The loss is taken in evaluation mode on ``(x, y)``, before and after; the model is not changed.

    Args:
        model: the model that is audited.
        loss_fn: loss of output and labels.
        x: inputs where the loss is taken, better not those of the client.
        y: their labels.
        lr: length of the step.
    """
    inner = unwrapped(model)

    def utility(shared: Sequence[Tensor], true: Sequence[Tensor]) -> float:
        del true
        names = [name for name, p in inner.named_parameters() if p.requires_grad]
        values = dict(inner.named_parameters())
        moved = {n: values[n].detach() - lr * g.to(values[n]) for n, g in zip(names, shared, strict=True)}
        with left_alone(inner, x.device), torch.no_grad():
            inner.eval()
            before = loss_fn(inner(x), y)
            return float(before - loss_fn(torch.func.functional_call(inner, moved, (x,)), y))

    return utility


def privacy_utility(
    model: nn.Module,
    loss_fn: LossFunction,
    x: Tensor,
    y: Tensor,
    defences: Mapping[str, Defender | None],
    *,
    dropout: Sequence[float] = (),
    utility: Utility = cosine_utility,
    **settings: Any,
) -> list[PrivacyUtility]:
    """Audit several defences on the same batch, with the same seed, and say what each costs.

    Args:
        model: the model.
        loss_fn: its loss.
        x: the client's batch.
        y: its labels.
        defences: by name; None: no defence.
        dropout: rates; for each of them the client trains with all dropout modules at that rate, as a defence. The
            utility then compares with the gradient that has no dropout.
        utility: ``utility(shared, true) -> number``, for example `one_step_utility`.
        **settings: as `audit`.

    Returns:
        One row per defence and then per rate, in the given order.
    """
    rows = []
    for name, defence in defences.items():
        report = audit(model, loss_fn, x, y, defence=defence, **settings)
        rows.append(_row(name, report, utility, list(report.true_gradients.values())))
    if dropout:
        with dropout_rate(model, 0.0):
            true, _, _ = _client(model, loss_fn, x, y, 0)
        for rate in dropout:
            with dropout_rate(model, rate):
                report = audit(model, loss_fn, x, y, **settings)
            rows.append(_row(f"dropout {rate:g}", report, utility, list(true.values())))
    return rows


def _row(name: str, report: AuditReport, utility: Utility, true: Sequence[Tensor]) -> PrivacyUtility:
    cost = float(utility(list(report.gradients.values()), true))
    return PrivacyUtility(name, report.psnr, report.ssim, cost, report)


@contextmanager
def dropout_rate(model: nn.Module, p: float) -> Generator[None]:
    """All dropout modules at rate ``p`` and in train mode while the context is open; then as they were.

    Args:
        model: a model with dropout modules.
        p: the rate, in [0, 1).

    Raises:
        ValueError: if there is no dropout module, or the rate is 1.
    """
    instance("model", model, nn.Module)
    if fraction("p", p) == 1.0:
        raise ValueError("p must be below 1, got 1: nothing would pass.")
    found = [module for module in model.modules() if isinstance(module, DROPOUTS)]
    if not found:
        raise ValueError("model must have dropout modules, got none. Add nn.Dropout where it shall defend.")
    before = [(module, module.p, module.training) for module in found]
    try:
        for module in found:
            module.p, module.training = p, True
        yield
    finally:
        for module, rate, training in before:
            module.p, module.training = rate, training
