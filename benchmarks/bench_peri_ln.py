"""Cost of the output norms: a Peri-LN block beside the same block in Pre-LN form, and beside x-transformers'."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch
from benchmarks.harness import Row, seconds
from torch import Tensor, nn

from pullback.methods.peri_ln import PeriNormBlock, ResidualStreamProbe

PEER = "x-transformers (sandwich_norm)"


def _training(block: nn.Module, x: Tensor, outer: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(block(x), list(block.parameters()), outer)


def _ratio(what: Callable[[], object], against: Callable[[], object], repeats: int) -> float:
    """Median of paired ratios, in processor time: other processes do not count."""
    taken = seconds({"what": what, "against": against}, repeats=repeats, clock=time.process_time)
    pairs = sorted(a / b for a, b in zip(taken["what"], taken["against"], strict=True))
    return pairs[len(pairs) // 2]


def _block_row(width: int, tokens: int, repeats: int, bound: float | None) -> Row:
    x, outer = torch.randn(4, tokens, width), torch.randn(4, tokens, width)
    peri, pre = (
        PeriNormBlock(width, width // 32, placement=placement, causal=True) for placement in ("peri", "pre")
    )
    ratio = _ratio(_training(peri, x, outer), _training(pre, x, outer), repeats)
    what = f"Peri-LN block of width {width}, 4 x {tokens} tokens, forward and backward"
    return Row(what, "the same block, Pre-LN", ratio, bound=bound)


def _peer_row() -> Row:
    what = "Peri-LN block of width 512, 4 x 128 tokens, forward and backward"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its import uses what torch has deprecated
            from x_transformers import Decoder
    except ImportError:
        return Row(what, PEER, skipped="x-transformers is not installed: pip install x-transformers")
    peer = Decoder(
        dim=512, depth=1, heads=16, attn_dim_head=32, pre_norm=True, sandwich_norm=True, use_rmsnorm=True,
        attn_flash=True, ff_no_bias=True,
    )  # fmt: skip
    peer.final_norm = nn.Identity()
    x, outer = torch.randn(4, 128, 512), torch.randn(4, 128, 512)
    ours = PeriNormBlock(512, 16, causal=True)
    theirs = [p for p in peer.parameters() if p.requires_grad]

    def run() -> object:
        return torch.autograd.grad(peer(x), theirs, outer, allow_unused=True)

    return Row(what, PEER, _ratio(_training(ours, x, outer), run, 9))


def _probe_row() -> Row:
    model = nn.Sequential(*(PeriNormBlock(512, 16) for _ in range(2)))
    probe = ResidualStreamProbe(model)
    x = torch.randn(4, 128, 512)

    def plain() -> None:
        model(x).square().mean().backward()
        model.zero_grad()

    def read() -> None:
        with probe:
            plain()

    return Row("pass with ResidualStreamProbe, 2 blocks of width 512", "without", _ratio(read, plain, 7))


def ratios() -> list[Row]:
    """All rows of this room."""
    torch.manual_seed(0)
    return [
        _block_row(512, 128, 9, 1.08),
        _block_row(64, 64, 31, None),
        _peer_row(),
        _probe_row(),
    ]
