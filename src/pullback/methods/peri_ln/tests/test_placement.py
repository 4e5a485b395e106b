"""The sub-layer and the block against literal transcriptions, the closed forms of section 3, and refusals."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from pullback.methods import peri_ln
from pullback.methods.peri_ln import PLACEMENTS
from pullback.methods.peri_ln.tests import reference

PeriNorm: Any = peri_ln.PeriNorm  # parts that some placements lack are used below
PeriNormBlock: Any = peri_ln.PeriNormBlock


def seeded(seed=0):
    torch.manual_seed(seed)


def shaken(module):
    """Random gains and shifts, so that no norm is at its start."""
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    return module.double()


def norm_of(module):
    if module is None:
        return None
    if isinstance(module, nn.LayerNorm):
        return lambda x: reference.layer_norm(x, module.weight.tolist(), module.bias.tolist(), module.eps)
    return lambda x: reference.rms_norm(x, module.weight.tolist(), module.eps)


def literal(block, tokens):
    """The reference's block on tokens [t][d] with the weights of ours."""
    attention, feedforward = block.attention, block.feedforward
    mix, feed = attention.module, feedforward.module

    def attend(rows):
        return reference.attention(
            rows, mix.qkv.weight.tolist(), mix.out.weight.tolist(), mix.heads, mix.causal
        )

    def forward(rows):
        return [
            reference.linear(
                reference.gelu(reference.linear(x, feed[0].weight.tolist())), feed[2].weight.tolist()
            )
            for x in rows
        ]

    for part, branch in ((attention, attend), (feedforward, forward)):
        norms = [norm_of(each) for each in (part.norm_in, part.norm_out, part.norm_post)]
        tokens = reference.sublayer(tokens, branch, block.placement, *norms)
    return tokens


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_block_is_the_literal_one(placement, norm, causal):
    seeded()
    block = shaken(PeriNormBlock(6, 2, placement=placement, norm=norm, hidden=5, causal=causal, eps=0.01))
    x = torch.randn(4, 6, dtype=torch.float64)
    wanted = torch.tensor(literal(block, x.tolist()), dtype=torch.float64)
    torch.testing.assert_close(block(x[None])[0], wanted, rtol=1e-12, atol=1e-12)


def test_a_mask_is_where_a_token_may_look():
    seeded()
    block = PeriNormBlock(8, 2).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    alone = block(x[:, :3])
    padding = torch.arange(5)[None, None, None] < 3
    torch.testing.assert_close(block(x, padding)[:, :3], alone)
    scores = torch.zeros(5).masked_fill(torch.arange(5) >= 3, -math.inf).double().expand(5, 5)
    torch.testing.assert_close(block(x, scores)[:, :3], alone)
    causal = PeriNormBlock(8, 2, causal=True).double()
    causal.load_state_dict(block.state_dict())
    torch.testing.assert_close(causal(x, padding)[:, :3], causal(x[:, :3]))
    torch.testing.assert_close(causal(x, scores)[:, :3], causal(x[:, :3]))


@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_is_the_written_out_one(masked):
    seeded()
    fused, plain = (
        PeriNormBlock(8, 2, causal=True).double(),
        PeriNormBlock(8, 2, causal=True, fused=False).double(),
    )
    plain.load_state_dict(fused.state_dict())
    mask = torch.rand(2, 1, 5, 5) > 0.3 if masked else None
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    outs = [block(x, mask) for block in (fused, plain)]
    torch.testing.assert_close(*outs)
    grads = [
        torch.autograd.grad(out.square().sum(), (x, *block.parameters()))
        for out, block in zip(outs, (fused, plain), strict=True)
    ]
    torch.testing.assert_close(*grads)
    (first,) = torch.autograd.grad(plain(x, mask).square().sum(), x, create_graph=True)
    assert torch.autograd.grad(first.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("fused", [False, True])
def test_a_token_that_may_look_nowhere_adds_what_a_zero_adds(fused):
    seeded()
    block = PeriNormBlock(8, 2, fused=fused)
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[1] = False
    x = torch.randn(1, 3, 8)
    assert torch.equal(block.attention(x, mask)[:, 1], x[:, 1])
    assert block(x, mask).isfinite().all()


# --- limiting cases -------------------------------------------------------------------------------------------------


def test_without_one_norm_peri_is_pre_or_output():
    seeded()
    x = torch.randn(3, 6, dtype=torch.float64)
    branch = nn.Linear(6, 6).double()
    peri = shaken(PeriNorm(branch, 6))
    pre = PeriNorm(branch, 6, placement="pre").double()
    pre.norm_in = peri.norm_in
    output = PeriNorm(branch, 6, placement="output").double()
    output.norm_out = peri.norm_out
    assert not torch.allclose(peri(x), pre(x))
    kept, peri.norm_out = peri.norm_out, nn.Identity()
    torch.testing.assert_close(peri(x), pre(x), rtol=0, atol=0)
    peri.norm_out, peri.norm_in = kept, nn.Identity()
    torch.testing.assert_close(peri(x), output(x), rtol=0, atol=0)


def test_sandwich_is_the_same_sublayer():
    seeded()
    peri, sandwich = PeriNormBlock(8, 2), PeriNormBlock(8, 2, placement="sandwich")
    sandwich.load_state_dict(peri.state_dict())
    x = torch.randn(2, 3, 8)
    assert torch.equal(peri(x), sandwich(x))


def test_equal_to_x_transformers_with_sandwich_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import uses what torch has deprecated
        from x_transformers import Encoder

    seeded()
    peer: Any = Encoder(
        dim=16, depth=1, heads=2, attn_dim_head=8, pre_norm=True, sandwich_norm=True, use_rmsnorm=True
    ).double()
    ours = PeriNormBlock(16, 2, eps=0.0, bias=True).double()
    (norms, attention, _), (norms2, feed, _) = peer.layers
    with torch.no_grad():
        for module in peer.modules():
            if hasattr(module, "g"):
                module.g.add_(0.2 * torch.randn_like(module.g))
        mix = ours.attention.module
        mix.qkv.weight.copy_(torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]))
        mix.out.weight.copy_(attention.to_out.weight)
        for p in (mix.qkv.bias, mix.out.bias):
            p.zero_()
        first, last = [m for m in feed.modules() if isinstance(m, nn.Linear)]
        for mine, theirs in ((ours.feedforward.module[0], first), (ours.feedforward.module[2], last)):
            mine.weight.copy_(theirs.weight)
            mine.bias.copy_(theirs.bias)
        for part, (before, after, *_) in ((ours.attention, norms), (ours.feedforward, norms2)):
            part.norm_in.weight.copy_(before.g + float(before.unit_offset))
            part.norm_out.weight.copy_(after.g + float(after.unit_offset))
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    peer.final_norm = nn.Identity()
    wanted = peer(x)
    torch.testing.assert_close(ours(x), wanted, rtol=1e-6, atol=1e-6)  # its softmax is in float32


# --- use ------------------------------------------------------------------------------------------------------------


def test_dropout_stands_after_the_output_norm():
    seeded()
    layer = PeriNorm(nn.Linear(64, 64), 64, dropout=0.5)
    x = torch.zeros(200, 64)
    nn.init.ones_(layer.module.bias)
    kept = layer(x)
    wanted = layer.norm_out(layer.module(layer.norm_in(x)))
    assert torch.all((kept == 0) | torch.isclose(kept, 2 * wanted))
    assert 0.45 < float((kept == 0).float().mean()) < 0.55


class _Tuple(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, x, shift, *, scale=1.0):
        return self.map(x) * scale + shift, "weights"


def test_further_arguments_and_outputs_pass_through():
    layer = PeriNorm(_Tuple(), 4)
    x = torch.randn(2, 4)
    y, rest = layer(x, 1.0, scale=2.0)
    assert rest == "weights"
    wanted = x + layer.norm_out(2 * layer.module.map(layer.norm_in(x)) + 1)
    assert torch.equal(y, wanted)


def test_norms_stay_in_float32_under_autocast():
    seeded()
    block = PeriNormBlock(32, 4)
    seen = []
    for module in block.modules():
        if isinstance(module, nn.RMSNorm):
            module.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block(torch.randn(2, 3, 32))
    assert out.dtype == torch.float32
    assert {result for _, result in seen} == {torch.float32}
    assert torch.bfloat16 in {given for given, _ in seen}, "branches ran in half precision"
    half = block.to(torch.bfloat16)
    assert half(torch.randn(2, 3, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_half_precision_norms_do_not_overflow():
    norm = PeriNorm(nn.Linear(4, 4), 4).norm_out.to(torch.float16)
    big = torch.full((1, 4), 3e4, dtype=torch.float16)  # its square leaves the range of float16
    torch.testing.assert_close(norm(big), torch.ones(1, 4, dtype=torch.float16))


def test_a_zero_branch_is_refused_under_an_output_norm_only():
    zero: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.zeros_(zero[1].weight)
    nn.init.zeros_(zero[1].bias)
    for placement in ("peri", "sandwich", "output"):
        with pytest.raises(ValueError, match=r"module must not be initialised to zero .* gain_init=1/sqrt"):
            PeriNorm(zero, 4, placement=placement)
    PeriNorm(zero, 4, placement="pre")
    PeriNorm(zero, 4, check_zero=False)
    nn.init.ones_(zero[1].bias)
    PeriNorm(zero, 4)  # its output is not zero


def test_the_refused_gradient_is_what_the_message_says():
    """Why: the same zero output, the same gradient, 1/sqrt(eps) times larger."""
    zero = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(zero.weight)
    x, outer = torch.ones(1, 4), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    plain = torch.autograd.grad(PeriNorm(zero, 4, placement="pre", eps=1e-6)(x), zero.weight, outer)[0]
    peri = torch.autograd.grad(PeriNorm(zero, 4, eps=1e-6, check_zero=False)(x), zero.weight, outer)[0]
    torch.testing.assert_close(peri, 1e3 * plain, rtol=1e-4, atol=0)


def test_messages_name_argument_value_and_fix():
    with pytest.raises(ValueError, match=r"heads must divide dim=12, got 5. Use 4"):
        PeriNormBlock(12, 5)
    with pytest.raises(ValueError, match=r"gain_init must be 1 with placement='pre'.*got 0.5"):
        PeriNormBlock(12, 4, placement="pre", gain_init=0.5)
    with pytest.raises(ValueError, match=r"gain_init must be > 0, got 0.*1/sqrt\(2 \* blocks\)"):
        PeriNormBlock(12, 4, gain_init=0.0)
