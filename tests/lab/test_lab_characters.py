"""The character model: its data, its start, its causality and its scores."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from pullback.lab.models.characters import CharacterModel, characters, next_symbol_loss, text_loss, windows


class Shift(nn.Module):
    """A causal block: every place gets what stands before it."""

    def forward(self, x):
        return x + functional.pad(x, (0, 0, 1, 0))[:, :-1]


def build(seed=0, std=0.02):
    return CharacterModel(7, 5, [Shift()], 4, first=nn.Identity(), last=nn.LayerNorm(4), seed=seed, std=std)


def test_windows_are_successors_and_drawn_by_seed_and_step():
    text = torch.arange(1000)
    tokens, targets = windows(text, 6, 9, seed=1, step=2)
    assert tokens.shape == targets.shape == (6, 9)
    assert torch.equal(targets, tokens + 1)
    assert torch.equal(windows(text, 6, 9, 1, 2)[0], tokens)
    assert not torch.equal(windows(text, 6, 9, 1, 3)[0], tokens)
    short = windows(torch.arange(10), 200, 9, 0, 0)[1]
    assert short.max() == 9, "the last character is a target too"


def test_the_start_depends_on_the_seed_and_not_on_norms():
    one, other = build(), CharacterModel(7, 5, [], 4, first=nn.LayerNorm(4), last=nn.Identity(), seed=0)
    assert torch.equal(one.symbol.weight, other.symbol.weight)
    assert torch.equal(one.head.weight, other.head.weight)
    assert not torch.equal(build(1).symbol.weight, one.symbol.weight)
    assert build(std=None).head.weight.std().item() == pytest.approx(0.5, rel=0.4)


def test_the_score_of_a_text_is_the_mean_over_its_windows():
    model, text = build(std=1.0), torch.randint(7, (52,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = [
            float(next_symbol_loss(model, text[None, i : i + 5], text[None, i + 1 : i + 6]))
            for i in range(0, 50, 5)
        ]
    assert text_loss(model, text, 5, chunk=3) == pytest.approx(sum(losses) / 10, rel=1e-6)


def test_a_later_character_changes_no_earlier_score():
    model = build(std=1.0)
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    changed = tokens.clone()
    changed[0, 3] = 0
    first, second = model(tokens), model(changed)
    assert torch.equal(first[:, :3], second[:, :3])
    assert not torch.equal(first[:, 3], second[:, 3])


def test_the_text_is_that_of_the_library():
    data = characters()
    assert data.symbols == 94
    assert int(torch.cat([data.train, data.validation, data.test]).max()) == 93
