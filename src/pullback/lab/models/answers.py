"""Right and irrelevant answers with less or more reasoning, controls of equal length, and models to give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice

import torch
from torch import Tensor, nn

from pullback.core.streams import generator
from pullback.lab.data import python_topics
from pullback.lab.data.additions import FORMATS, Addition
from pullback.lab.data.questions import Question, questions
from pullback.lab.models.adder import School, accuracy, answer_of, schooled
from pullback.lab.models.language import Language, smollm2, tiny_language
from pullback.lab.models.responses import Response, derangement

BLOCKS = 8
"""Disjoint groups of the questions of a language model."""


@dataclass(frozen=True)
class Answers:
    """A model and what it is asked.

    Args:
        model: frozen, in evaluation mode.
        logits: maps tokens [n, t] to logits [n, t, symbols].
        kinds: responses to the same questions by kind; see `kinds_of`.
        accuracy: share of right answers of the model itself, by format; empty where it was not asked.
    """

    model: nn.Module
    logits: Callable[[Tensor], Tensor]
    kinds: Mapping[str, Sequence[Response]]
    accuracy: Mapping[str, float]


def kinds_of(
    right: Mapping[str, Sequence[Response]],
    shuffled: Mapping[str, Sequence[Response]],
    repeated: Sequence[Response],
    text: Tensor,
    seed: int,
) -> dict[str, list[Response]]:
    """All kinds of responses.

    Args:
        right: right answers to the questions, by format.
        shuffled: answers to other questions, by format.
        repeated: the bare answers, repeated to the length of the detailed ones.
        text: plain English as tokens [n].
        seed: of what is drawn.

    Returns:
        The formats; ``padded``; ``few``: detailed, scored at as many random tokens as ``none``; ``KIND/shuffled`` of
        all formats and of ``few``; ``KIND/text``: English in the place of prompt and response, scored at the same
        places; ``text-short`` and ``text-long``: those of ``none`` and ``detailed``.
    """
    kinds = {name: list(rows) for name, rows in right.items()}
    kinds["padded"] = list(repeated)
    kinds["few"] = _few(right["detailed"], right["none"], seed)
    kinds |= {f"{name}/shuffled": list(rows) for name, rows in shuffled.items()}
    kinds["few/shuffled"] = _few(shuffled["detailed"], right["none"], seed)
    for name in (*right, "padded", "few"):
        kinds[f"{name}/text"] = [
            each.over(text, generator("text", seed, index)) for index, each in enumerate(kinds[name])
        ]
    for name, like in (("text-short", "none"), ("text-long", "detailed")):
        kinds[name] = kinds[f"{name}/text"] = kinds[f"{like}/text"]
    return kinds


def _few(long: Sequence[Response], short: Sequence[Response], seed: int) -> list[Response]:
    pairs = enumerate(zip(long, short, strict=True))
    return [each.thinned(other.count, generator("few", seed, index)) for index, (each, other) in pairs]


# --- the decoder that adds ---------------------------------------------------------------------------------------


def of_adder(school: School, seed: int, problems: int) -> Answers:
    """Problems that the decoder of a seed was not trained on.

    Args:
        school: how it was trained.
        seed: of everything.
        problems: how many; accuracies are those on all that were held out.
    """
    taught = schooled(school, seed)
    asked = taught.held[:problems]
    order = derangement(problems, seed, lambda one, other: asked[one].sum == asked[other].sum)
    topics = python_topics()
    right = {form: [answer_of(each, form) for each in asked] for form in FORMATS}
    shuffled = {
        form: [_written(each, asked[other], form) for each, other in zip(asked, order, strict=True)]
        for form in FORMATS
    }
    repeated = []
    for each, long in zip(asked, right["detailed"], strict=True):
        words = topics.encode(f"{each.sum} ").tolist()
        prompt = topics.encode(each.prompt("none")).tolist()
        repeated.append(Response.of(prompt, list(islice(cycle(words), long.count))))
    kinds = kinds_of(right, shuffled, repeated, topics.test, seed)
    known = {form: accuracy(taught.model, taught.held, form) for form in FORMATS}
    return Answers(taught.model, taught.model, kinds, known)


def _written(asked: Addition, other: Addition, form: str) -> Response:
    """The response to another problem under this problem's prompt."""
    encode = python_topics().encode
    return Response.of(encode(asked.prompt(form)).tolist(), encode(other.response(form)).tolist())


# --- a language model ----------------------------------------------------------------------------------------------


def of_language(block: int, *, tiny: bool = False) -> Answers:
    """Four of the questions: two of arithmetic and two of common sense.

    An irrelevant answer belongs to another question of the same kind; the exchange is the same for all blocks.

    Args:
        block: which group of questions, modulo `BLOCKS`.
        tiny: a random model instead of the real one, and two questions.
    """
    language = tiny_language(0) if tiny else smollm2()
    every = questions()
    size = len(every) // BLOCKS
    start = block % BLOCKS * size
    chosen = range(start, start + (2 if tiny else size))
    partner = _partners(len(every))
    right = {form: [_answer(language, every[i], getattr(every[i], form)) for i in chosen] for form in FORMATS}
    shuffled = {
        form: [_answer(language, every[i], getattr(every[partner[i]], form)) for i in chosen]
        for form in FORMATS
    }
    repeated = []
    for i, long in zip(chosen, right["detailed"], strict=True):
        words = language.encode(" ".join([every[i].none] * long.count))
        repeated.append(Response.of(language.prompt(every[i].ask), words[: long.count]))
    kinds = kinds_of(right, shuffled, repeated, _english(tiny), block)
    return Answers(language.model, language.logits, kinds, {})


def _answer(language: Language, question: Question, answer: str) -> Response:
    return Response.of(language.prompt(question.ask), language.encode(answer))


def _partners(count: int) -> list[int]:
    """For every question another one of its kind: kinds take turns."""
    half = [derangement(count // 2, kind) for kind in (0, 1)]
    return [2 * half[i % 2][i // 2] + i % 2 for i in range(count)]


@cache
def _english(tiny: bool) -> Tensor:
    topics = python_topics()
    language = tiny_language(0) if tiny else smollm2()
    return torch.tensor(language.encode(topics.decode(topics.test)))
