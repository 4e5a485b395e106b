"""Conversion of torch's layers, and a user's own blocks: function, names, refusals, nothing half done."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from pullback.methods.peri_ln import PeriNorm, PeriNormBlock, convert_norm_placement

convert: Any = convert_norm_placement  # with arguments of wrong types, which must be refused


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def encoder_layer(norm_first=True, **kwargs):
    settings: Any = {"dropout": 0.0, "batch_first": True, "activation": "gelu", **kwargs}
    return nn.TransformerEncoderLayer(16, 4, 24, norm_first=norm_first, **settings).double()


def decoder_layer(norm_first=True, **kwargs):
    settings: Any = {"dropout": 0.0, "batch_first": True, **kwargs}
    return nn.TransformerDecoderLayer(16, 4, 24, norm_first=norm_first, **settings).double()


def encoder(layers=2, norm=None, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # norm_first switches nested tensors off, and says so
        return nn.TransformerEncoder(encoder_layer(**kwargs), layers, norm).double()


def tokens(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def shake(model):
    """Gains and shifts of their own for every norm."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))


def missing_after_loading(model, state):
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    return set(result.missing_keys)


def norm_keys(report, bias=True):
    return {f"{path}.{key}" for path in report.added for key in (("weight", "bias") if bias else ("weight",))}


# --- torch's layers -------------------------------------------------------------------------------------------------


def literal_encoder(layer, x, **masks):
    """x + N_out(M(N_in(x))) from the parts of a converted layer."""
    y = layer.norm1(x)
    x = x + layer.norm1_out(layer.self_attn(y, y, y, need_weights=False, **masks)[0])
    return x + layer.norm2_out(layer.linear2(functional.gelu(layer.linear1(layer.norm2(x)))))


def test_an_encoder_layer_becomes_the_literal_block_in_train_and_eval():
    layer = encoder_layer()
    kept = copy.deepcopy(layer.norm1.state_dict())
    assert convert_norm_placement(layer).converted == 1
    assert all(torch.equal(layer.norm1.state_dict()[key], kept[key]) for key in kept)
    shake(layer)
    x, padding = tokens(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    wanted = literal_encoder(layer, x, key_padding_mask=padding)
    torch.testing.assert_close(layer(x, src_key_padding_mask=padding), wanted, rtol=1e-12, atol=1e-12)
    layer.eval()
    with torch.no_grad():  # where torch's layer would take its fused path and forget the new norms
        torch.testing.assert_close(layer(x, src_key_padding_mask=padding), wanted, rtol=1e-9, atol=1e-9)
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    torch.testing.assert_close(layer(x, causal, is_causal=True), literal_encoder(layer, x, attn_mask=causal))
    torch.testing.assert_close(layer(x, causal)[:, :2], layer(x[:, :2], causal[:2, :2]))


def test_with_identities_a_converted_layer_is_the_layer_that_it_was():
    for build, extra in ((encoder_layer, ()), (decoder_layer, (tokens(2, 4, 16),))):
        layer = build()
        shake(layer)
        x = tokens(2, 3, 16)
        before = layer(x, *extra)
        report = convert_norm_placement(layer)
        assert not torch.allclose(layer(x, *extra), before)
        for path in report.added:
            layer.set_submodule(path, nn.Identity())
        torch.testing.assert_close(layer(x, *extra), before, rtol=1e-12, atol=1e-12)


def test_a_decoder_layer_becomes_the_literal_block():
    layer = decoder_layer(activation="relu")
    report = convert_norm_placement(layer, match=nn.TransformerDecoderLayer)
    assert (report.converted, report.sublayers) == (1, 3)
    shake(layer)
    x, memory = tokens(2, 4, 16), tokens(2, 6, 16)
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    padding = torch.arange(6)[None] >= torch.tensor([[6], [4]])
    y = layer.norm1(x)
    wanted = x + layer.norm1_out(layer.self_attn(y, y, y, attn_mask=mask)[0])
    y = layer.norm2(wanted)
    wanted = wanted + layer.norm2_out(layer.multihead_attn(y, memory, memory, key_padding_mask=padding)[0])
    wanted = wanted + layer.norm3_out(layer.linear2(layer.linear1(layer.norm3(wanted)).relu()))
    got = layer(x, memory, tgt_mask=mask, memory_key_padding_mask=padding)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_output_only_drops_the_input_norms():
    layer = encoder_layer()
    report = convert_norm_placement(layer, "output", gain_init=0.25)
    assert report.dropped == ("norm1", "norm2")
    assert layer.norm1_out.weight.unique().tolist() == [0.25]
    x = tokens(2, 3, 16)
    y = x + layer.norm1_out(layer.self_attn(x, x, x)[0])
    wanted = y + layer.norm2_out(layer.linear2(functional.gelu(layer.linear1(y))))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-10, atol=1e-10)


def test_a_post_layer_gets_fresh_norms_and_says_so():
    layer = encoder_layer(norm_first=False)
    shake(layer)
    old = layer.norm1
    report = convert_norm_placement(layer)
    assert report.dropped == ("norm1", "norm2")
    assert "post-LN norms were replaced" in report.notes[0]
    assert layer.norm1 is not old
    assert layer.norm1.weight.unique().tolist() == [1.0]
    x = tokens(2, 3, 16)
    torch.testing.assert_close(layer(x), literal_encoder(layer, x), rtol=1e-10, atol=1e-10)


def test_dropout_stands_behind_the_output_norm():
    layer = encoder_layer(dropout=1.0)
    convert_norm_placement(layer)
    x = tokens(2, 3, 16)
    assert torch.equal(layer(x), x), "all that is added is dropped, whatever the shift of its norm"
    nn.init.ones_(layer.norm1_out.bias)
    assert torch.equal(layer(x), x)


def test_stacks_keep_their_keys_and_get_a_final_norm_if_they_have_none():
    model = encoder(norm=nn.LayerNorm(16))
    state = copy.deepcopy(model.state_dict())
    report = convert_norm_placement(model, match=nn.TransformerEncoderLayer)
    assert report.added == tuple(f"layers.{i}.norm{j}_out" for i in (0, 1) for j in (1, 2))
    assert missing_after_loading(model, state) == norm_keys(report)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    bare = encoder()
    assert convert_norm_placement(bare).added[-1] == "norm"
    assert isinstance(bare.norm, nn.LayerNorm)
    assert convert_norm_placement(encoder(), final_norm=False).added[-1] == "layers.1.norm2_out"


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_stack_is_the_same_in_train_and_eval(norm_first):
    model = encoder(norm_first=norm_first)
    convert_norm_placement(model)
    shake(model)
    x, padding = tokens(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    wanted = model(x, src_key_padding_mask=padding)
    model.eval()
    with torch.no_grad():
        got = model(x, src_key_padding_mask=padding)
    assert not got.is_nested
    torch.testing.assert_close(got[~padding], wanted[~padding], rtol=1e-9, atol=1e-9)


def test_a_whole_transformer_is_converted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Transformer(16, 4, 1, 1, 24, dropout=0.0, batch_first=True, norm_first=True)
    report = convert_norm_placement(model)
    assert (report.converted, report.sublayers) == (2, 5)
    assert model(torch.randn(2, 3, 16), torch.randn(2, 4, 16)).shape == (2, 4, 16)


def test_a_converted_layer_can_be_copied_saved_and_compiled():
    layer = encoder_layer().float()
    convert_norm_placement(layer)
    x = torch.randn(2, 3, 16)
    wanted = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), wanted)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), wanted)
    assert isinstance(layer, nn.TransformerEncoderLayer)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), wanted)


# --- our own --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["pre", "post"])
@pytest.mark.parametrize("target", ["peri", "sandwich", "output"])
def test_our_own_block_changes_its_placement(start, target):
    block = PeriNormBlock(8, 2, placement=start)
    report = convert_norm_placement(block, target)
    assert (report.converted, report.sublayers) == (1, 2)
    fresh = PeriNormBlock(8, 2, placement=target)
    assert block.placement == target
    assert set(block.state_dict()) == set(fresh.state_dict())
    fresh.load_state_dict(block.state_dict())
    x = torch.randn(2, 3, 8)
    assert torch.equal(block(x), fresh(x))
    names = {"pre": ["norm_in"], "post": ["norm_post"]}[start] if (start, target) != ("pre", "peri") else []
    if start == "pre" and target == "sandwich":
        names = []
    assert report.dropped == tuple(
        f"{part}.{name}" for part in ("attention", "feedforward") for name in names
    )


def test_single_sublayers_are_converted():
    model = nn.Sequential(PeriNorm(nn.Linear(4, 4), 4, placement="pre"), nn.Linear(4, 4))
    assert convert_norm_placement(model).added == ("0.norm_out",)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_nothing_to_convert_raises_with_the_reasons():
    with pytest.raises(
        ValueError, match=r"model must hold a block to convert, got none in Sequential\. Name"
    ):
        convert_norm_placement(nn.Sequential(nn.Linear(2, 2)))
    layer = encoder_layer()
    convert_norm_placement(layer)
    with pytest.raises(ValueError, match=r"its placement is 'peri' already"):
        convert_norm_placement(layer)

    class Own(nn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return 2 * super()._ff_block(x)

    with pytest.raises(ValueError, match=r"Own has a forward of its own\. Give sublayers="):
        convert_norm_placement(Own(16, 4))
    with pytest.raises(ValueError, match=r"the structure of Linear is not known"):
        convert_norm_placement(nn.Linear(2, 2), match=nn.Linear)


def test_bad_arguments_are_refused():
    layer = encoder_layer()
    for placement in ("pre", "post", "inside"):
        with pytest.raises(ValueError, match="placement must be one of 'peri', 'sandwich', 'output'"):
            convert(layer, placement)
    with pytest.raises(TypeError, match="model must be of type Module, got list"):
        convert([layer])
    with pytest.raises(ValueError, match=r"embedding must be None with placement='sandwich'"):
        convert_norm_placement(layer, "sandwich", embedding="embed")
    with pytest.raises(ValueError, match=r"embedding must be the path of a module .* got 'embed'"):
        convert_norm_placement(layer, embedding="embed")
    assert not hasattr(layer, "norm1_out"), "nothing was changed"


def test_a_zero_branch_is_refused_before_anything_changes():
    model = encoder()
    nn.init.zeros_(model.layers[1].linear2.weight)
    nn.init.zeros_(model.layers[1].linear2.bias)
    keys = set(model.state_dict())
    with pytest.raises(ValueError, match=r"layers\.1\.linear2 must not be initialised to zero"):
        convert_norm_placement(model)
    assert set(model.state_dict()) == keys


def test_residual_scales_warn():
    model = encoder(layers=4)
    with torch.no_grad():
        for layer in model.layers:
            first = layer.self_attn.in_proj_weight.std()
            layer.self_attn.out_proj.weight.normal_(0, float(first) / 8**0.5)
    with pytest.warns(UserWarning, match=r"output weights of layers\.0 are initialised 0\.3. times smaller"):
        convert_norm_placement(model)
    scaled = encoder()
    scaled.layers[0].layer_scale = nn.Parameter(1e-4 * torch.ones(16))
    with pytest.warns(UserWarning, match=r"layers\.0\.layer_scale scales a branch"):
        convert_norm_placement(scaled)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_norm_placement(encoder(layers=4))


# --- a user's own block ---------------------------------------------------------------------------------------------


class Mine(nn.Module):
    def __init__(self, shared=None):
        super().__init__()
        self.before, self.branch, self.drop = nn.LayerNorm(6), shared or nn.Linear(6, 6), nn.Dropout(0.5)

    def forward(self, x):
        return x + self.drop(self.branch(self.before(x)))


def parts(module):
    return [(module.before, module.branch, module.drop)] if isinstance(module, Mine) else None


def test_a_callback_names_the_sublayers():
    model: Any = nn.Sequential(nn.Embedding(9, 6), Mine(), Mine()).eval()
    state = copy.deepcopy(model.state_dict())
    report = convert_norm_placement(model, sublayers=parts, embedding="0")
    assert report.added == ("1.branch.norm_out", "2.branch.norm_out", "0.norm_out")
    assert missing_after_loading(model, state) == norm_keys(report)
    ids = torch.tensor([[1, 2]])
    x = functional.layer_norm(functional.embedding(ids, model[0].weight), (6,))
    for block in model[1:]:
        inner = functional.linear(block.before(x), block.branch.weight, block.branch.bias)
        x = x + functional.layer_norm(inner, (6,))
    torch.testing.assert_close(model(ids), x)


def test_a_callback_that_lies_is_refused():
    model = nn.Sequential(Mine())
    with pytest.raises(TypeError, match=r"sublayers\('0'\) must give \(norm, module, dropout\) triples"):
        convert(model, sublayers=lambda m: [m.branch] if isinstance(m, Mine) else None)
    with pytest.raises(ValueError, match=r"must give modules inside that block"):
        convert_norm_placement(
            model, sublayers=lambda m: [(None, nn.Linear(6, 6), None)] if isinstance(m, Mine) else None
        )
    with pytest.raises(ValueError, match=r"sublayers must name a norm for branch of '0', got None"):
        convert_norm_placement(
            model, sublayers=lambda m: [(None, m.branch, None)] if isinstance(m, Mine) else None
        )
    both = nn.Linear(6, 6)
    with pytest.raises(ValueError, match=r"1\.branch must be a module of its own, got the one of 0\.branch"):
        convert_norm_placement(nn.Sequential(Mine(both), Mine(both)), sublayers=parts)
    replaced: Any = nn.Sequential(Mine())
    replaced[0].branch.forward = lambda x: x
    with pytest.raises(ValueError, match="forward was replaced"):
        convert_norm_placement(replaced, sublayers=parts)
