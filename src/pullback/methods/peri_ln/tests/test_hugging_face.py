"""Blocks of real Hugging Face models, small ones built from configurations."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from pullback.methods.peri_ln import ResidualStreamProbe, convert_norm_placement, norm_param_groups

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
LLAMA = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 32}


def build(name, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    return transformers.AutoModelForCausalLM.from_config(config).double()


def gpt2(**settings):
    small = {
        "vocab_size": 50,
        "n_embd": 16,
        "n_layer": 3,
        "n_head": 2,
        "n_positions": 32,
        "initializer_range": 0.3,
    }
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return build("GPT2", **{**small, **dropout, **settings})


def ids():
    return torch.arange(3, 15).reshape(2, 6)  # beyond the special tokens


def learns(model):
    optimizer = torch.optim.AdamW(norm_param_groups(model, 0.01), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids(), labels=ids()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[-1] < losses[0] - 0.1


def check(model, report, wanted):
    """Names and weights stay, with identities the model is what it was, and what is added has RMS 1."""
    before, state = wanted
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert {key.rpartition(".")[0] for key in result.missing_keys} == set(report.added)
    norms = {path: model.get_submodule(path) for path in report.added}
    seen = []
    for norm in norms.values():
        norm.register_forward_hook(lambda _, __, out: seen.append(out.square().mean(-1).sqrt()))
    assert not torch.allclose(model(ids()).logits, before)
    assert len(seen) == report.sublayers
    torch.testing.assert_close(torch.stack(seen), torch.ones_like(torch.stack(seen)), rtol=1e-3, atol=0)
    for path in norms:
        model.set_submodule(path, nn.Identity())
    torch.testing.assert_close(model(ids()).logits, before, rtol=1e-10, atol=1e-10)
    for path, norm in norms.items():
        model.set_submodule(path, norm)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Gemma"])
def test_llama_like(name):
    extra = {"head_dim": 8} if name == "Gemma" else {}
    model = build(name, **LLAMA, **extra)
    wanted = model(ids()).logits, copy.deepcopy(model.state_dict())
    report = convert_norm_placement(model)
    assert (report.converted, report.sublayers, report.skipped) == (2, 4, ())
    assert report.added[0] == "model.layers.0.self_attn.norm_out"
    check(model, report, wanted)
    assert learns(model)


def test_gemma_keeps_the_form_of_its_gain():
    """Gemma multiplies by 1 + weight: a gain of 0.5 is a weight of -0.5."""
    model = build("Gemma", **LLAMA, head_dim=8)
    convert_norm_placement(model, gain_init=0.5)
    assert model.model.layers[0].mlp.norm_out.weight.unique().tolist() == [-0.5]


def test_gpt2_like_warns_of_its_scaled_init():
    model = gpt2()
    wanted = model(ids()).logits, copy.deepcopy(model.state_dict())
    with pytest.warns(
        UserWarning, match=r"output weights of transformer\.h\.0 are initialised 0\.[34]. times smaller"
    ):
        report = convert_norm_placement(model)
    assert (report.converted, report.sublayers) == (3, 6)
    check(model, report, wanted)
    assert learns(model)


@pytest.mark.filterwarnings("ignore:.*residual scale")
def test_gpt2_with_dropout_says_where_it_stays():
    assert "dropout inside the branches" in convert_norm_placement(gpt2(resid_pdrop=0.1)).notes[0]


def test_gpt2_with_cross_attention_has_three_sublayers():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, add_cross_attention=True)
    report = convert_norm_placement(transformers.GPT2Model(config))
    assert [path.split(".")[2] for path in report.added] == ["attn", "crossattention", "mlp"]


def test_generation_with_a_cache_equals_one_pass():
    model = build("Llama", **LLAMA).eval()
    convert_norm_placement(model, embedding="model.embed_tokens")
    assert "model.embed_tokens.norm_out.weight" in model.state_dict()
    out = model.generate(ids(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    for step in range(6, 10):
        assert torch.equal(model(out[:, :step]).logits[:, -1].argmax(-1), out[:, step])


def test_attentions_are_still_recorded():
    model = build("Llama", **LLAMA, attn_implementation="eager")
    convert_norm_placement(model)
    out = model(ids(), output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == 2
    assert len(out.hidden_states) == 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "reason"), [("Bert", "post-LN with the norms inside"), ("OpenAIGPT", "post-LN blocks")]
)
def test_post_models_are_refused(name, reason):
    torch.manual_seed(0)
    settings = (
        {"n_embd": 16, "n_layer": 1, "n_head": 2}
        if name == "OpenAIGPT"
        else {**SMALL, "intermediate_size": 24}
    )
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings))
    with pytest.raises(ValueError, match=reason):
        convert_norm_placement(model)


@pytest.mark.parametrize(("name", "placement"), [("Gemma2", "peri"), ("Olmo2", "output")])
def test_models_with_output_norms_are_left_alone_and_can_be_probed(name, placement):
    model = build(name, **LLAMA, **({"head_dim": 8} if name == "Gemma2" else {}))
    with pytest.raises(ValueError, match=f"its placement is '{placement}' already"):
        convert_norm_placement(model)
    report = ResidualStreamProbe(model)(lambda m, x: m(input_ids=x, labels=x).loss, ids())
    assert len(report.blocks) == 2


def test_a_residual_multiplier_warns():
    model = build("Granite", **LLAMA, residual_multiplier=0.25)
    with pytest.warns(UserWarning, match="residual_multiplier scales a branch"):
        convert_norm_placement(model)


def test_the_probe_reads_a_converted_model():
    model = build("Llama", **LLAMA)
    convert_norm_placement(model, embedding="model.embed_tokens")
    report = ResidualStreamProbe(model)(lambda m, x: m(input_ids=x, labels=x).loss, ids())
    assert [block.name for block in report.blocks] == ["model.layers.0", "model.layers.1"]
    assert [grad.last for grad in report.blocks[0].gradients] == [
        "self_attn.o_proj.weight",
        "mlp.down_proj.weight",
    ]
    assert report.input_var == pytest.approx(1.0, rel=0.1)
    assert report.gradient_norm > 0
