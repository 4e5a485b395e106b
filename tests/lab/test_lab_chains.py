"""Chains of arithmetic, the student that is stopped half-way, and the small causal transformer."""

import pytest
import torch

from pullback.core.streams import generator
from pullback.lab.data.chains import (
    ANSWER,
    BLANK,
    DRAWN,
    END,
    EQUALS,
    LONGEST,
    PLUS,
    PROMPT,
    SYMBOLS,
    TIMES,
    Chains,
    chains,
)
from pullback.lab.models.arithmetic import School, problems_of, schooled
from pullback.lab.models.causal import CausalTransformer

TINY = School(beyond=0.5, pool=60, held=40, start=0.02, width=32)


def evaluated(problem: Chains, row: int) -> list[int]:
    """The chain of one problem, value by value."""
    value, values = int(problem.first[row]), []
    for place in range(int(problem.length[row])):
        operator, operand = int(problem.operators[row, place]), int(problem.operands[row, place])
        value = {
            PLUS: (value + operand) % 10,
            TIMES: value * operand % 10,
            BLANK: operand,
            DRAWN: int(problem.drawn[row, place]),
        }[operator]
        values.append(value)
    return [*values, END]


@pytest.mark.parametrize("kind", ["learnable", "copy", "beyond"])
def test_answers_are_the_running_values(kind):
    problems = chains(200, generator("t", 0), kind)
    answers, mask, prompts = problems.answers(), problems.mask, problems.prompts()
    assert answers.shape == mask.shape == (200, ANSWER)
    assert prompts.shape == (200, PROMPT)
    for row in range(200):
        length = int(problems.length[row])
        assert answers[row][mask[row]].tolist() == evaluated(problems, row)
        used = prompts[row, : 2 * length + 1].tolist()
        assert used[0::2] == [int(problems.first[row]), *problems.operands[row, :length].tolist()]
        assert used[1::2] == problems.operators[row, :length].tolist()
        assert set(prompts[row, 2 * length + 1 : -1].tolist()) <= {BLANK}
        assert prompts[row, -1] == EQUALS
    assert set(problems.length.tolist()) == set(range(1, LONGEST + 1))


def test_operators_of_each_kind():
    for kind, wanted in (("learnable", {PLUS, TIMES}), ("copy", {BLANK}), ("beyond", {DRAWN})):
        assert set(chains(300, generator("t", 1), kind).operators.unique().tolist()) == wanted
    with pytest.raises(ValueError, match="kind must be 'learnable', 'copy' or 'beyond', got 'hard'"):
        chains(3, generator("t", 0), "hard")


def test_the_verifier_wants_the_whole_chain_and_nothing_behind_it():
    problems = chains(100, generator("t", 2))
    answers = problems.answers()
    assert bool(problems.right(answers).all())
    several = torch.stack([answers, answers], 1)
    for row in range(100):
        several[
            row, 1, int(torch.randint(int(problems.length[row]) + 1, (), generator=generator("p", row)))
        ] = BLANK
    assert problems.right(several).tolist() == [[True, False]] * 100
    behind = torch.where(problems.mask, answers, 7)
    assert bool(problems.right(behind).all())


def test_the_teacher_goes_on_from_what_was_written():
    problem = Chains(
        torch.tensor([3]), torch.tensor([[PLUS, TIMES, BLANK, DRAWN, PLUS, PLUS]]), torch.tensor([[4, 2, 5, 0, 1, 1]]),
        torch.tensor([[9, 9, 9, 8, 9, 9]]), torch.tensor([5]),
    )  # fmt: skip
    written = torch.tensor([[6, 1, END, 0, 7, 7, 7]])  # 7 would be right, then 2 after 6, then the blank's 5
    chances = problem.teacher(written, 0.16).exp()[0]
    for position, right in enumerate([7, 2, 5, 8, 1, END, END]):
        wanted = torch.full((SYMBOLS,), 0.01)
        wanted[right] += 0.84
        torch.testing.assert_close(chances[position], wanted)
    lost = problem.teacher(torch.tensor([[END, 0, 0, 0, EQUALS, 0, 0]]), 0.16).exp()[0]
    for position in (1, 5):
        assert position == 5 or torch.allclose(lost[position], torch.full((SYMBOLS,), 1 / SYMBOLS))
    assert lost[5].argmax() == END
    assert float(problem.teacher(problem.answers(), 0.0)[0, 0, 7]) == 0.0


def test_keys_tell_prompts_apart():
    problems = chains(3000, generator("t", 3))
    prompts = {tuple(row) for row in problems.prompts().tolist()}
    assert len(set(problems.keys().tolist())) == len(prompts)


def test_tests_are_not_in_the_pool():
    problems = problems_of(TINY, 5)
    pool = set(problems.pool.chains.keys().tolist())
    for part in (problems.validation, problems.test, problems.copy, problems.copy_validation):
        assert not pool & set(part.chains.keys().tolist())
    assert len(problems.pool.chains) == 60
    assert int((problems.pool.chains.operators == DRAWN).any(1).sum()) == 30
    assert set(problems.validation.chains.keys().tolist()) != set(problems.test.chains.keys().tolist())


def test_the_student_is_the_same_every_time_and_not_shared():
    _, first = schooled(TINY, 5)
    with torch.no_grad():
        first.head.bias.add_(1.0)
    problems, second = schooled(TINY, 5)
    assert not torch.equal(first.head.bias, second.head.bias)
    assert problems.validation.accuracy(second) >= 0.02 > problems.validation.accuracy(first) / 10


def test_accuracy_is_the_chance_of_a_right_sample():
    problems, student = schooled(TINY, 5)
    part, total = problems.test, 0.0
    for row in range(40):
        chance, tokens = 1.0, part.prompts[row].tolist()
        for symbol in evaluated(part.chains, row):
            chance *= float(student(torch.tensor([tokens]))[0, -1].detach().softmax(-1)[symbol])
            tokens.append(symbol)
        total += chance
    assert part.accuracy(student) == pytest.approx(total / 40, rel=1e-4)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_transformer_is_causal_and_its_cache_exact(layers):
    model = CausalTransformer(SYMBOLS, 12, 16, heads=4, layers=layers, generator=generator("m", 0))
    tokens = torch.randint(SYMBOLS, (3, 12), generator=generator("t", 4))
    whole = model(tokens)
    changed = tokens.clone()
    changed[:, 8:] = 0
    torch.testing.assert_close(model(changed)[:, :8], whole[:, :8])
    assert not torch.allclose(model(changed)[:, 8:], whole[:, 8:])
    torch.testing.assert_close(model(tokens, 5), whole[:, -5:])
    logits, cache = model.extend(tokens[:, :6])
    torch.testing.assert_close(logits[:, 0], whole[:, 5])
    for position in range(6, 12):
        logits, cache = model.extend(tokens[:, position : position + 1], cache)
        torch.testing.assert_close(logits[:, 0], whole[:, position])
    logits, _ = model.extend(tokens[:, 6:], model.extend(tokens[:, :6])[1], None)
    torch.testing.assert_close(logits, whole[:, 6:])
