"""Token ids and labels of prompt and response, and the mean loss over response tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
import torch.nn.functional as F
from torch import Tensor

from pullback.core.checks import choice, floating, integer, shown

Ids: TypeAlias = Sequence[int] | Tensor
IGNORED = -100
"""The label that carries no loss, as in torch's cross entropy."""


@final
@dataclass(frozen=True)
class Responses:
    """A batch of prompts with their responses, ready for a causal language model.

    Args:
        input_ids: int64 [examples, tokens], padded at the end.
        labels: the same ids where a token is of the response, -100 elsewhere; not shifted.
        attention_mask: int64, 1 for tokens, 0 for padding.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor

    @property
    def mask(self) -> Tensor:
        """True where a token is of the response, bool [examples, tokens]."""
        return self.labels != IGNORED


def response_mask(prompt_ids: Ids, response_ids: Ids) -> Tensor:
    """Which tokens of ``prompt_ids + response_ids`` belong to the response.

    Tokenise both apart and join the ids. A tokenizer may merge characters across the border of the joined *text*, and a
    search for the response in the text finds a short one ("5") in the wrong place.

    Args:
        prompt_ids: token ids, may be empty.
        response_ids: token ids, at least one.

    Returns:
        bool [tokens].

    Raises:
        TypeError: if ids are no whole numbers.
        ValueError: if the response is empty.

    Example:
        >>> response_mask([5, 6, 7], [8])
        tensor([False, False, False,  True])
    """
    prompt, response = _ids("prompt_ids", prompt_ids), _ids("response_ids", response_ids)
    if not len(response):
        raise ValueError("response_ids must hold at least one token, got none. An empty answer has no loss.")
    return torch.arange(len(prompt) + len(response)) >= len(prompt)


def response_batch(
    pairs: Sequence[tuple[Ids, Ids]], *, pad_id: int = 0, max_length: int | None = 1024
) -> Responses:
    """Join prompts and responses, cut them to ``max_length`` tokens, pad them at the end.

    Args:
        pairs: (prompt ids, response ids) of each example.
        pad_id: fills short rows.
        max_length: longest row, the paper's 1024; None for no limit. The end of a response is cut, and counts no more.

    Raises:
        TypeError: if ids are no whole numbers.
        ValueError: if there is no pair, a response is empty, or a prompt leaves no room for a token of its response.

    Example:
        >>> response_batch([([1, 2], [3]), ([4], [5])]).labels
        tensor([[-100, -100,    3],
                [-100,    5, -100]])
    """
    if not len(pairs):
        raise ValueError("pairs must hold at least one prompt with its response, got none.")
    limit = None if max_length is None else integer("max_length", max_length, minimum=1)
    rows, masks = [], []
    for number, (prompt, response) in enumerate(pairs):
        mask = response_mask(prompt, response)[:limit]
        if not mask.any():
            raise ValueError(
                f"max_length must leave room for the response, got {limit} with a prompt of {len(prompt)} tokens in "
                f"example {number}. Shorten the prompt, or raise it."
            )
        rows.append(torch.cat([_ids("prompt_ids", prompt), _ids("response_ids", response)])[:limit])
        masks.append(mask)
    longest = max(map(len, rows))
    shape = (len(rows), longest)
    ids = torch.full(shape, integer("pad_id", pad_id), dtype=torch.int64)
    labels, attention = torch.full(shape, IGNORED), torch.zeros(shape, dtype=torch.int64)
    for index, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        ids[index, : len(row)] = row
        labels[index, : len(row)] = torch.where(mask, row, IGNORED)
        attention[index, : len(row)] = 1
    return Responses(ids, labels, attention)


def response_loss(
    logits: Tensor, labels: Tensor, *, reduction: Literal["per_sample", "mean"] = "per_sample"
) -> Tensor:
    """Mean cross entropy over the response tokens of each example, in float32 at least.

    The logits at position t predict the label at t + 1, as in every causal language model: the shift happens here.

    Args:
        logits: [examples, tokens, vocabulary], or without the first axis.
        labels: int64 [examples, tokens], -100 where there is no loss.
        reduction: ``"per_sample"`` gives [examples]; ``"mean"`` their mean.

    Raises:
        TypeError: if the logits are no floating tensor or the labels no integers.
        ValueError: if shapes do not fit, or an example has no label.
    """
    floating("logits", logits)
    choice("reduction", reduction, ("per_sample", "mean"))
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be a tensor of integers, got {shown(labels)}. Use response_batch.")
    if logits.dim() == 2 and labels.dim() == 1:
        logits, labels = logits[None], labels[None]
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels must have the shape of logits without the vocabulary, got {tuple(labels.shape)} against "
            f"{tuple(logits.shape)}. Do not shift them."
        )
    targets = labels[:, 1:]
    counts = (targets != IGNORED).sum(1)
    if not bool((counts > 0).all()):
        raise ValueError(
            "labels must hold at least one response token after the first position of every example, got none in "
            f"example {int((counts == 0).nonzero()[0])}. Check the mask: all of it is ignored."
        )
    scores = logits[:, :-1]
    scores = scores if scores.dtype == torch.float64 else scores.float()
    terms = F.cross_entropy(scores.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    losses = terms.sum(1) / counts
    return losses if reduction == "per_sample" else losses.mean()


def _ids(name: str, ids: Ids) -> Tensor:
    tensor = (
        ids if isinstance(ids, Tensor) else torch.tensor(list(ids) if not isinstance(ids, str) else [0.5])
    )
    if not tensor.numel():
        return torch.zeros(0, dtype=torch.int64)
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be a list of token ids, got {shown(ids)}. Tokenise the text first.")
    return tensor.to("cpu", torch.int64)
