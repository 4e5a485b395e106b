"""What is measured on the student: its answers, and how coherent its gradients are (arXiv:2603.11178)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pullback.core.checks import NonFiniteError, fraction, instance, integer, non_negative
from pullback.core.streams import generator, numpy_generator


@contextmanager
def _evaluating(model: Callable[..., Any]) -> Generator[None]:
    """Evaluation mode; every module's own mode comes back, also after an error."""
    modes = [(each, each.training) for each in model.modules()] if isinstance(model, nn.Module) else []
    for each, _ in modes:
        each.training = False
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode


def _map(name: str, function: Callable[[Tensor], Tensor], nested: Any) -> Any:
    """``function`` of every tensor in nested mappings, lists and tuples; None stays."""
    if nested is None or isinstance(nested, Tensor):
        return None if nested is None else function(nested)
    if isinstance(nested, Mapping):
        return {key: _map(name, function, part) for key, part in nested.items()}
    if not isinstance(nested, tuple | list):
        raise TypeError(
            f"{name} must hold tensors in tuples, lists or mappings, got {type(nested).__name__}. "
            "Convert it in a wrapper of the model."
        )
    parts = [_map(name, function, part) for part in nested]
    return type(nested)(*parts) if hasattr(nested, "_fields") else type(nested)(parts)


# --- rollouts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollouts:
    """What a model wrote.

    Args:
        tokens: int64 [prompts, k, max_tokens]; 0 behind the end of an answer.
        mask: bool of the same shape, true for tokens that were written, the stop token included.
    """

    tokens: Tensor
    mask: Tensor


@torch.no_grad()
def rollout(
    model: Callable[..., Any],
    prompts: Tensor | Sequence[Tensor],
    k: int = 8,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    stop: int | None = None,
    cached: bool = False,
    seed: int = 0,
    step: int = 0,
) -> Rollouts:
    """Let a small causal model answer each prompt ``k`` times.

    A module is put into evaluation mode meanwhile and left as it was found. For large models use a serving engine
    and give its rewards to `PassRateTracker`. Every new token reads the device once, to see whether all have stopped.

    Args:
        model: ``model(tokens [n, t]) -> logits [n, t, vocabulary]`` (the last position alone will do), which computes
            the whole prefix anew for each token, at a cost quadratic in the length. With ``cached``:
            ``model(tokens, cache) -> (logits, cache)``, first with all of the prompt and cache None, then with one
            new token; the cache is a tensor, or a tuple, list or mapping of tensors (None allowed), rows first. The
            prompt is then run once for all ``k`` answers.
        prompts: int tokens [n, t], or a list of 1-dim ones, whose lengths may differ (equal ones share a batch, so
            that nothing is padded).
        k: answers per prompt.
        max_tokens: longest answer.
        temperature: divides the logits; 0 takes the likeliest token (one answer, repeated).
        stop: token that ends an answer; None: all are ``max_tokens`` long.
        cached: see ``model``.
        seed: stream of the draws.
        step: training step, so that every refresh draws anew.

    Returns:
        Tokens and mask on the device of the prompts.

    Raises:
        TypeError: if prompts are no integers, or a cache holds something else.
        ValueError: if a number is out of its range, a prompt is empty, or logits are of a wrong shape.
        NonFiniteError: if the logits give no probabilities.
    """
    answers, longest = integer("k", k, minimum=1), integer("max_tokens", max_tokens, minimum=1)
    heat = non_negative("temperature", temperature)
    rows = _prompts(prompts)
    device = rows[0].device if rows else None
    tokens = torch.zeros(len(rows), answers, longest, dtype=torch.int64, device=device)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    lengths = torch.tensor([len(row) for row in rows])
    with _evaluating(model):
        for length in lengths.unique().tolist():
            which = (lengths == length).nonzero().squeeze(1).to(tokens.device)
            prompt = torch.stack([row for row in rows if len(row) == length])
            draws = generator("rollout", seed, step, length, device=tokens.device)
            repeats = 1 if heat == 0 else answers  # the likeliest answer is the same every time
            parts = (
                tokens.new_zeros(len(prompt), repeats, longest),
                mask.new_zeros(len(prompt), repeats, longest),
            )
            _write(model, prompt, *parts, (cached, heat, stop), draws)
            tokens[which], mask[which] = parts
    return Rollouts(tokens, mask)


def _prompts(prompts: Tensor | Sequence[Tensor]) -> list[Tensor]:
    rows = list(prompts)
    for row in rows:
        instance("prompts", row, Tensor, fix="Pass a tensor [n, t] or a list of 1-dim tensors.")
        if row.dtype not in (torch.int64, torch.int32) or row.dim() != 1:
            raise TypeError(
                f"prompts must be rows of integer tokens, got shape {tuple(row.shape)} and dtype {row.dtype}. "
                "Pass a tensor [n, t] or a list of 1-dim tensors."
            )
        if not len(row):
            raise ValueError(
                "prompts must hold at least one token each, got an empty one. Begin with a start token."
            )
    return [row.long() for row in rows]


def _next(model: Callable[..., Any], tokens: Tensor, cache: Any, cached: bool) -> tuple[Tensor, Any]:
    """Logits of the token that follows [rows, vocabulary], and the cache."""
    logits, cache = model(tokens, cache) if cached else (model(tokens), None)
    if (
        not isinstance(logits, Tensor)
        or logits.dim() != 3
        or len(logits) != len(tokens)
        or not logits.shape[1]
    ):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"model must give logits of shape ({len(tokens)}, positions, vocabulary), got {got}. "
            "Wrap it in a function that returns the tensor of logits."
        )
    return logits[:, -1], cache


def _write(
    model: Callable[..., Any],
    prompt: Tensor,
    tokens: Tensor,
    mask: Tensor,
    how: tuple[bool, float, int | None],
    draws: torch.Generator,
) -> None:
    """Fill ``tokens`` and ``mask`` [prompts, repeats, longest]; the prompt is run once for all repeats."""
    (cached, heat, stop), (_, repeats, longest) = how, tokens.shape
    logits, cache = _next(model, prompt, None, cached)
    cache = _map("cache", lambda part: part.repeat_interleave(repeats, 0), cache)
    logits, prompt = (x.repeat_interleave(repeats, 0) for x in (logits, prompt))
    written, kept = tokens.view(-1, longest), mask.view(-1, longest)
    running = torch.ones(len(written), dtype=torch.bool, device=logits.device)
    for position in range(longest):
        if position:
            so_far = written[:, :position]
            fed = so_far[:, -1:] if cached else torch.cat([prompt, so_far], 1)
            logits, cache = _next(model, fed, cache, cached)
        chances = (logits.float() / (heat or 1.0)).softmax(-1)
        bad, left = torch.stack([chances.isnan().any(), running.any()]).tolist()
        if bad:
            raise NonFiniteError(
                "rollout: logits are NaN, +Inf or all -Inf. Look for divergence in the student."
            )
        if not left:
            break
        drawn = chances.argmax(-1) if heat == 0 else torch.multinomial(chances, 1, generator=draws).squeeze(1)
        written[:, position] = torch.where(running, drawn, 0)
        kept[:, position] = running
        if stop is not None:
            running = running & (drawn != stop)


# --- is there a bell? ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientSNR:
    r"""Signal-to-noise ratio of the gradient in each group of examples; all numbers float64, [groups].

    Args:
        groups: their labels, in the order of the call.
        examples: examples of each, int64.
        snr: unbiased estimate :math:`(\|\bar g\|^2 - tr(S)/n) / tr(S)` of the squared mean over the variance of a
            single gradient; may be below 0 where there is no signal.
        low: lower end of the bootstrap interval of ``snr``.
        high: upper end.
        signal: unbiased estimate of the squared norm of the mean gradient.
        noise: :math:`tr(S)`, the summed variance of one gradient.
        naive: :math:`\|\bar g\|^2 / tr(S)`, too high by 1/n: groups of unequal size draw a false shape with it.
    """

    groups: tuple[Any, ...]
    examples: Tensor
    snr: Tensor
    low: Tensor
    high: Tensor
    signal: Tensor
    noise: Tensor
    naive: Tensor


def gradient_snr(
    loss_fn: Callable[[Any, Any], Tensor],
    model: nn.Module,
    groups: Mapping[Any, Any],
    *,
    select: Callable[[str], bool] | None = None,
    vectorize: bool = True,
    chunk: int | None = 64,
    bootstrap: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> GradientSNR:
    """Measure, group by group, how coherent the gradients of single examples are.

    Put the problems into groups by their pass rate: a bell over the rates is what `BetaKernel` presumes. The model
    is measured in evaluation mode and left as it was found. Memory: the gradients of one group at a time, examples
    times parameters.

    Args:
        loss_fn: ``loss_fn(model, batch)`` gives the loss of a batch of one (a scalar or one value). Use the ``model``
            that it is handed and call it only: with ``vectorize`` it stands for the model under `torch.func.vmap`.
        model: the student; parameters that require a gradient are measured.
        groups: label to batch: a tensor, or mapping, list or tuple of them, the examples along the first axis.
        select: which parameters to measure, by name; None: all.
        vectorize: whether `torch.func` may compute many gradients at once; False runs one backward pass per example,
            which also works where vmap does not (checkpointing, control flow that depends on data).
        chunk: examples per vmap, None: all; bounds activations.
        bootstrap: resamples of the examples for the intervals.
        level: their coverage, in (0, 1).
        seed: stream of the resamples.

    Returns:
        The ratios and their intervals. A group of equal gradients has a ratio of Inf, one of zeros NaN.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if there is no group, one has fewer than 2 examples, or nothing is selected.
        NonFiniteError: if a gradient is NaN or Inf.
    """
    instance("model", model, nn.Module)
    if not groups:
        raise ValueError("groups must hold at least one group, got none. Pass {label: batch}.")
    resamples, covered = integer("bootstrap", bootstrap, minimum=2), fraction("level", level)
    if covered in (0.0, 1.0):
        raise ValueError(f"level must lie in (0, 1), got {level}. Use 0.95.")
    params = {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and (select is None or select(name))
    }
    if not params:
        raise ValueError(
            "select must leave at least one trainable parameter, got none. Unfreeze or rename some."
        )
    rows, sizes = [], []
    with _evaluating(model), torch.enable_grad():
        for position, (label, batch) in enumerate(groups.items()):
            n = _examples(label, batch)
            sizes.append(n)
            measured = (loss_fn, model, params, batch)
            grads = _vectorized(*measured, chunk) if vectorize else _looped(*measured, n)
            counts = numpy_generator("gradient-snr", seed, position).multinomial(n, [1 / n] * n, resamples)
            rows.append(_ratios(_gram(grads, label), counts, covered))
    return GradientSNR(
        tuple(groups), torch.tensor(sizes), *torch.tensor(rows, dtype=torch.float64).T.contiguous()
    )


def _examples(label: Any, batch: Any) -> int:
    lengths: set[int] = set()

    def look(leaf: Tensor) -> Tensor:
        lengths.add(len(leaf) if leaf.dim() else 0)
        return leaf

    _map(f"group {label!r}", look, batch)
    if len(lengths) != 1 or min(lengths) < 2:
        raise ValueError(
            f"group {label!r} must hold at least 2 examples, as many in every tensor, got {sorted(lengths)}. "
            "Merge it with its neighbour."
        )
    return lengths.pop()


def _vectorized(
    loss_fn: Callable[[Any, Any], Tensor],
    model: nn.Module,
    params: Mapping[str, Tensor],
    batch: Any,
    chunk: int | None,
) -> list[Tensor]:
    """Gradients of each example, one tensor [examples, ...] per parameter, by vmap over grad."""

    def loss(points: Mapping[str, Tensor], example: Any) -> Tensor:
        def call(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(model, {**others, **points}, args, kwargs)

        return loss_fn(call, _map("batch", lambda leaf: leaf.unsqueeze(0), example)).sum()

    others = {
        name: p.detach() for name, p in model.named_parameters()
    }  # detached: no graph is built for them
    points = {name: others.pop(name) for name in params}
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), chunk_size=chunk)(points, batch)
    return list(found.values())


def _looped(
    loss_fn: Callable[[Any, Any], Tensor],
    model: nn.Module,
    params: Mapping[str, Tensor],
    batch: Any,
    size: int,
) -> list[Tensor]:
    """The same, one backward pass per example."""
    points, rows = list(params.values()), []
    for i in range(size):
        loss = loss_fn(model, _map("batch", lambda leaf, i=i: leaf[i : i + 1], batch)).sum()
        rows.append(torch.autograd.grad(loss, points, allow_unused=True, materialize_grads=True))
    return [torch.stack(grads) for grads in zip(*rows, strict=True)]


def _gram(grads: list[Tensor], label: Any) -> np.ndarray:
    """Inner products of all pairs of gradients [n, n], summed over parameters in float64."""
    wide = (g.flatten(1).double() for g in grads)
    total = sum((g @ g.T for g in wide), torch.zeros((), dtype=torch.float64, device=grads[0].device))
    if not bool(total.isfinite().all()):
        raise NonFiniteError(f"group {label!r}: a gradient is NaN or Inf. Look at the loss of its examples.")
    return total.cpu().numpy()


def _ratios(gram: np.ndarray, counts: np.ndarray, level: float) -> tuple[float, ...]:
    """snr, low, high, signal, noise and naive ratio of one group.

    The interval is the basic bootstrap: resamples hold repeated examples, which adds 1/n to their ratios, so that
    their errors are taken around the ratio of the resampled population itself, not around the estimate. Where
    the signal is weak it is too wide rather than too narrow.
    """
    n = len(gram)
    squares = np.diag(gram)

    def parts(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = np.einsum("bi,bi->b", weights @ gram, weights) / n**2
        return mean, np.maximum(weights @ squares - n * mean, 0.0) / (n - 1)

    with np.errstate(divide="ignore", invalid="ignore"):
        mean, noise = (float(each[0]) for each in parts(np.ones((1, n))))
        if noise <= 1e-13 * float(squares.sum()):  # rounding: the gradients are equal
            noise = 0.0
        signal = mean - noise / n
        snr, naive = float(np.float64(signal) / noise), float(np.float64(mean) / noise)
        drawn_mean, drawn_noise = parts(counts.astype(np.float64))
        drawn = np.where(drawn_noise > 0, drawn_mean / drawn_noise - 1 / n, np.nan)
        errors = drawn - np.float64(mean) / (noise * (n - 1) / n)
        few, many = np.nanquantile(errors, [(1 - level) / 2, (1 + level) / 2]) if noise else (np.nan, np.nan)
    return snr, snr - float(many), snr - float(few), signal, noise, naive
