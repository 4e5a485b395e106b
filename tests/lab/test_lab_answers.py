"""Additions in three formats, the decoder that learns them, questions, and the controls made from answers."""

import re

import pytest
import torch

from pullback.core.streams import generator
from pullback.lab.data import python_topics
from pullback.lab.data.additions import FORMATS, Addition, additions
from pullback.lab.data.questions import questions
from pullback.lab.models.adder import School, accuracy, answer_of, decoder, schooled
from pullback.lab.models.answers import _partners, of_adder
from pullback.lab.models.responses import Response, derangement, padded

TINY = School(steps=4, layers=2, width=16, heads=2, rows=2, texts=1, window=16, held=12)


# --- additions ---------------------------------------------------------------------------------------------------


def test_every_step_of_every_response_is_right():
    train, held = additions(100, seed=0)
    assert len({(p.first, p.second) for p in train + held}) == 8100
    for problem in train + held:
        for form in ("simplified", "detailed"):
            equations = re.findall(r"([\d+]+)=(\d\d)", problem.response(form))
            assert len(equations) == 2
            assert all(sum(map(int, left.split("+"))) == int(right) for left, right in equations)
            ones, tens = (int(right) for _, right in equations)
            assert tens * 10 + ones % 10 == problem.sum
        for form in FORMATS:
            assert re.findall(r"\d+", problem.response(form))[-1] == str(problem.first + problem.second)
        write, carry = re.search(r"write (\d) and carry (\d)", problem.response("detailed")).groups()
        assert int(carry + write) == problem.first % 10 + problem.second % 10


def test_formats_grow_and_say_which_they_are():
    problem = Addition(47, 38)
    lengths = [len(problem.response(form)) for form in FORMATS]
    assert lengths == sorted(lengths)
    assert lengths[-1] > 10 * lengths[0]
    assert len({problem.prompt(form) for form in FORMATS}) == 3


def test_held_problems_depend_on_the_seed_alone():
    assert additions(50, 1) == additions(50, 1)
    assert additions(50, 1)[1] != additions(50, 2)[1]
    with pytest.raises(ValueError, match="held must be 1 to 8099, got 8100"):
        additions(8100, 0)


# --- responses ---------------------------------------------------------------------------------------------------


def test_a_response_scores_what_follows_the_prompt():
    response = Response.of([1, 2, 3], [4, 5])
    assert response.tokens.tolist() == [1, 2, 3, 4, 5]
    assert response.scored.tolist() == [False, False, False, True, True]
    with pytest.raises(ValueError, match="must hold tokens, got 0 and 1"):
        Response.of([], [1])


def test_thinning_keeps_some_of_the_scored_tokens():
    response = Response.of([1, 2], range(3, 43))
    few = response.thinned(5, generator("t", 0))
    assert few.count == 5
    assert bool((~few.scored | response.scored).all())
    assert torch.equal(few.tokens, response.tokens)
    assert not torch.equal(few.scored, response.thinned(5, generator("t", 1)).scored)
    assert response.thinned(100, generator("t", 0)).count == 40


def test_text_takes_the_place_of_all_tokens():
    text = torch.arange(100, 200)
    response = Response.of([1, 2], [3, 4, 5])
    over = response.over(text, generator("t", 0))
    assert torch.equal(over.scored, response.scored)
    assert over.tokens.diff().tolist() == [1, 1, 1, 1]
    starts = {int(response.over(text[:6], generator("t", seed)).tokens[0]) for seed in range(20)}
    assert starts == {100, 101}  # the last piece is within reach, and nothing beyond it


def test_padding_is_never_scored():
    tokens, scored = padded([Response.of([1], [2]), Response.of([3, 4], [5, 6, 7])])
    assert tokens.tolist() == [[1, 2, 0, 0, 0], [3, 4, 5, 6, 7]]
    assert scored.sum(1).tolist() == [1, 3]


def test_derangements_move_everything_and_avoid_what_is_alike():
    for seed in range(8):
        order = derangement(9, seed, lambda one, other: one % 3 == other % 3)
        assert sorted(order) == list(range(9))
        assert all(i % 3 != other % 3 for i, other in enumerate(order))
    assert derangement(9, 0) == derangement(9, 0)
    with pytest.raises(ValueError, match="got 1"):
        derangement(1, 0)


# --- the decoder -------------------------------------------------------------------------------------------------


def test_the_decoder_sees_only_what_came_before():
    model = decoder(TINY, 0)
    tokens = torch.randint(20, (2, 12), generator=generator("tokens", 0))
    changed = tokens.clone()
    changed[:, 7:] += 1
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_training_is_a_function_of_the_seed_and_lowers_the_loss():
    school = School(steps=20, layers=1, width=16, heads=2, rows=4, texts=1, window=16, held=12)
    one, two = schooled.__wrapped__(school, 3), schooled.__wrapped__(school, 3)
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not any(p.requires_grad for p in one.model.parameters())
    tokens, scored = padded([answer_of(each, "detailed") for each in one.held])

    @torch.no_grad()
    def loss(model):
        return torch.nn.functional.cross_entropy(model(tokens[:, :-1])[scored[:, 1:]], tokens[scored])

    assert float(loss(one.model)) < 0.9 * float(loss(decoder(school, 3)))


def test_accuracy_is_that_of_writing_greedily():
    train, _ = additions(12, 0)
    problems = train[:6]
    model = decoder(School(layers=2, width=32, heads=2), 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    tokens, scored = padded([answer_of(each, "none") for each in problems[:3]])
    for _ in range(60):  # three of six are learned by heart
        optimizer.zero_grad()
        out = model(tokens[:, :-1])[scored[:, 1:]]
        torch.nn.functional.cross_entropy(out, tokens[scored]).backward()
        optimizer.step()
    right = 0
    topics = python_topics()
    for problem in problems:
        written = topics.encode(problem.prompt("none"))
        wanted = problem.response("none")
        for _ in wanted:
            written = torch.cat([written, model(written[None])[0, -1:].argmax(-1)])
        right += topics.decode(written).endswith(wanted)
    assert right >= 3
    assert accuracy(model, problems, "none") == pytest.approx(right / 6)


# --- all kinds of answers ----------------------------------------------------------------------------------------


def test_kinds_differ_in_what_they_should_and_agree_in_the_rest():
    asked = of_adder(TINY, 0, problems=8)
    kinds, held = asked.kinds, schooled(TINY, 0).held
    topics = python_topics()
    for index, problem in enumerate(held[:8]):
        long, none = kinds["detailed"][index], kinds["none"][index]
        few, repeated = kinds["few"][index], kinds["padded"][index]
        assert few.count == none.count == kinds["few/shuffled"][index].count == len(problem.response("none"))
        assert repeated.count == long.count
        assert topics.decode(repeated.tokens[len(problem.prompt("none")) :]).startswith(
            f"{problem.sum} {problem.sum} "
        )
        for form in FORMATS:
            wrong = topics.decode(kinds[f"{form}/shuffled"][index].tokens)
            assert wrong.startswith(problem.prompt(form))
            assert not wrong.endswith(problem.response(form))
        for name in ("none", "detailed", "few", "padded"):
            text = kinds[f"{name}/text"][index]
            assert torch.equal(text.scored, kinds[name][index].scored)
            assert topics.decode(text.tokens) in topics.text
        assert kinds["text-short"][index] is kinds["none/text"][index]
        assert kinds["text-long"][index] is kinds["detailed/text"][index]
    assert asked.accuracy.keys() == set(FORMATS)


# --- questions ---------------------------------------------------------------------------------------------------


def test_questions_are_distinct_and_longer_answers_contain_the_bare_one():
    every = questions()
    assert len(every) == 32
    assert len({each.ask for each in every}) == len({each.none for each in every}) == 32
    for each in every:
        assert len(each.none) < len(each.simplified) < len(each.detailed)
        assert len(each.detailed) > 2 * len(each.simplified)
        key = each.none.split()[-1 if "In" in each.none or "At" in each.none else 0].strip(",").lower()
        assert key in each.simplified.lower(), each.ask


def test_the_numbers_of_arithmetic_questions_are_right():
    for each in questions()[::2]:
        number = int(re.match(r"\d+", each.none).group())
        assert int(re.findall(r"\d+", each.detailed)[-1]) == number, each.ask
        for left, right in re.findall(r"((?:\d+ [-+*/] )+\d+) = (\d+)", each.simplified):
            assert eval(left) == int(right), each.ask


def test_irrelevant_answers_are_of_the_same_kind():
    order = _partners(32)
    assert sorted(order) == list(range(32))
    assert all(i != other and i % 2 == other % 2 for i, other in enumerate(order))
