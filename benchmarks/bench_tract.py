"""Cost of TrAct: time and memory on the first layer of a ResNet beside the official package, share of a ViT-S step."""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable

import torch
from benchmarks.harness import Row, seconds
from torch import Tensor, nn
from torch.nn import functional

from pullback.core.peak_bytes import PeakBytes
from pullback.methods.tract import precondition_input, tract
from pullback.methods.tract.covariance import Patches, precondition

PEER = "torch-tract (official)"


def backward_bytes(layer: nn.Module, x: Tensor) -> int:
    """Peak bytes of one backward pass, beside input, output and its gradient."""
    z = layer(x)
    outer = torch.ones_like(z)
    with PeakBytes(x, z, outer, *layer.parameters()) as meter:
        torch.autograd.grad(z, list(layer.parameters()), outer)
    return meter.most


def _training(layer: nn.Module, x: Tensor, outer: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(layer(x), list(layer.parameters()), outer)


def _median_ratio(what: Callable[[], object], against: Callable[[], object], repeats: int) -> float:
    """In processor time: other processes do not count."""
    taken = seconds({"what": what, "against": against}, repeats=repeats, clock=time.process_time)
    pairs = sorted(a / b for a, b in zip(taken["what"], taken["against"], strict=True))
    return pairs[len(pairs) // 2]


# --- the first layer of a ResNet --------------------------------------------------------------------------------------


def resnet_rows() -> list[Row]:
    """Conv2d(3, 64, 7, stride 2) on 32 images of 224 x 224: 401,408 patches of 147 entries."""
    what = "7x7 convolution, 32 x 224 x 224, forward and backward"
    plain = nn.Conv2d(3, 64, 7, stride=2, padding=3)
    ours, x = copy.deepcopy(plain), torch.randn(32, 3, 224, 224)
    handle = tract(ours)
    outer = torch.randn_like(plain(x))
    handle.enabled = False
    off = _median_ratio(_training(ours, x, outer), _training(plain, x, outer), 5)
    handle.enabled = True
    patches = 4 * 401_408 * 147
    extra = backward_bytes(ours, x) - backward_bytes(plain, x)
    rows = [
        Row("extra peak bytes of the backward pass", "the whole patch matrix", extra / patches, bound=0.25),
        Row(f"{what}, switched off", "plain layer", off, bound=1.1),
        Row(what, "plain layer", _median_ratio(_training(ours, x, outer), _training(plain, x, outer), 5)),
    ]
    if importlib.util.find_spec("torch_tract") is None:
        return [
            *rows,
            Row(what, PEER, skipped="torch-tract is not installed: pip install --no-deps torch-tract"),
        ]
    from torch_tract import TrAct as Official

    peer = Official(copy.deepcopy(plain), l=0.1)
    rows.append(
        Row(what, PEER, _median_ratio(_training(ours, x, outer), _training(peer, x, outer), 5), bound=1.0)
    )
    return rows


def linear_rows() -> list[Row]:
    """A perceptron's first layer on flat digits, where the covariance is large beside the layer."""
    plain, x, outer = nn.Linear(784, 256), torch.randn(1024, 784), torch.randn(1024, 256)
    weight = plain.weight

    def functional_form() -> None:
        z = functional.linear(x, precondition_input(weight, x, 0.1), plain.bias)
        torch.autograd.grad(z, (weight, plain.bias), outer)

    rows = [
        Row(
            "Linear(784, 256), batch 1024",
            "plain layer",
            _median_ratio(functional_form, _training(plain, x, outer), 9),
        )
    ]
    if importlib.util.find_spec("torch_tract") is not None:
        from torch_tract import TrAct as Official

        peer = Official(copy.deepcopy(plain), l=0.1)
        against = _training(peer, x, outer)
        rows.append(
            Row("Linear(784, 256), batch 1024", PEER, _median_ratio(functional_form, against, 9), bound=1.0)
        )
    return rows


# --- the patch embedding of a ViT-S -----------------------------------------------------------------------------------


class Block(nn.Module):
    """One pre-norm block of width 384 with 6 heads."""

    def __init__(self, width: int = 384) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.back = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(self.norm1(x)).unflatten(2, (6, -1)).transpose(1, 2).chunk(3, dim=-1)
        x = x + self.join(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.back(functional.gelu(self.wide(self.norm2(x))))


def vit_row() -> Row:
    """The edit of the patch embedding by itself beside one training step of the whole plain model, batch 16."""
    embed = nn.Conv2d(3, 384, 16, stride=16)
    blocks, head = nn.Sequential(*[Block() for _ in range(12)]), nn.Linear(384, 1000)
    x, y = torch.randn(16, 3, 224, 224), torch.randint(1000, (16,))
    params = [p for module in (embed, blocks, head) for p in module.parameters()]
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        logits = head(blocks(embed(x).flatten(2).mT).mean(1))
        functional.cross_entropy(logits, y).backward()
        optimizer.step()

    patches = Patches(3, 1, (16, 16), (16, 16), (1, 1), ((0, 0), (0, 0)), "zeros")
    grad, lam = torch.randn_like(embed.weight), torch.tensor(0.1)

    def edit() -> None:
        with torch.no_grad():
            precondition(grad, x, lam, samples=patches)

    share = _median_ratio(edit, step, 5)
    return Row(
        "edit of a ViT-S patch embedding, batch 16", "one training step of the ViT-S", share, bound=0.03
    )


def ratios() -> list[Row]:
    """All rows of this benchmark."""
    return [*resnet_rows(), *linear_rows(), vit_row()]
