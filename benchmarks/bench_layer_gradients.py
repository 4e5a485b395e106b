"""Cost of gradient spectra beside forward and backward passes of a language model, and beside forming gradients."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from benchmarks.harness import Row, seconds
from torch import nn

from pullback.core.spectra import product_values
from pullback.methods.layer_gradients import GradientSpectrum, response_loss

WIDTH, INNER, DEPTH, VOCABULARY = 576, 1536, 30, 8192
TOKENS, RESPONSE = 128, 32


def ratio_to(base: str, what: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median ratios of processor time to that of ``base``, repetitions interleaved."""
    taken = seconds(what, repeats=repeats, clock=time.process_time)
    return {
        name: statistics.median(a / b for a, b in zip(times, taken[base], strict=True))
        for name, times in taken.items()
    }


def one_projection() -> list[Row]:
    """One square projection and 32 response tokens: the gradient formed, or never."""
    g = torch.Generator().manual_seed(0)
    inputs, errors = (torch.randn(1, RESPONSE, WIDTH, generator=g) for _ in range(2))

    def dense() -> torch.Tensor:
        return torch.linalg.svdvals(errors[0].T @ inputs[0])

    def full() -> torch.Tensor:
        return torch.linalg.svd(errors[0].T @ inputs[0], full_matrices=False).S

    found = ratio_to(
        "dense",
        {"dense": dense, "full": full, "core": lambda: product_values([(inputs, errors)], route="low_rank")},
        7,
    )
    what = f"spectrum of a {WIDTH} x {WIDTH} gradient of {RESPONSE} tokens"
    return [
        Row(f"{what}, from the core", "forming it and svdvals", found["core"], bound=0.2),
        Row(f"{what}, svd with vectors (official)", "forming it and svdvals", found["full"]),
    ]


def language_model() -> nn.Module:
    """A Llama of 30 layers with grouped queries and random weights, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=DEPTH, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=VOCABULARY, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def whole_model() -> list[Row]:
    """All 120 projections of the model, against passes without a probe."""
    model = language_model()
    ids = torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : TOKENS - RESPONSE] = -100
    names = [name for name, _ in model.named_parameters()]

    def loss() -> torch.Tensor:
        return response_loss(model(input_ids=ids, use_cache=False).logits, labels)

    def passes(trainable: str) -> Callable[[], None]:
        def run() -> None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trainable in name)
                parameter.grad = None
            loss().sum().backward()

        return run

    probe = GradientSpectrum(model)
    dense = GradientSpectrum(model, stats=("nuclear",), route="dense")
    found = ratio_to(
        "watched",
        {"watched": passes("self_attn"), "all": passes(""), "probe": lambda: probe.measure(loss)},
        3,
    )
    slow = ratio_to("watched", {"watched": passes("self_attn"), "dense": lambda: dense.measure(loss)}, 1)
    model.requires_grad_(True)
    what = f"all 120 projections of a {DEPTH}-layer model, {TOKENS} tokens, {RESPONSE} of the response"
    against = "forward and backward, Q, K, V, O trainable"
    note = f"{len(names)} parameters"
    return [
        Row(f"{what}: probe", against, found["probe"], bound=1.3),
        Row(
            f"{what}: probe", "forward and backward, all trainable", found["probe"] / found["all"], note=note
        ),
        Row(f"{what}: gradients formed, svdvals", against, slow["dense"]),
    ]


def per_sample() -> Row:
    """Sixteen examples of a perceptron at once, against BackPACK's gradients of each and their svdvals."""
    what, against = "spectra of 16 examples, 3 layers of 256 units", "BackPACK's BatchGrad and svdvals"
    try:
        import backpack
        from backpack.extensions import BatchGrad
    except ImportError:
        return Row(what, against, skipped="backpack-for-pytorch is not installed")
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(16, 256, generator=g), torch.randint(256, (16,), generator=g)
    layers = [nn.Linear(256, 256) for _ in range(3)]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
    probe = GradientSpectrum(model, r"(?P<layer>\d+)\.(?P<proj>weight)")
    extended, loss = (
        backpack.extend(copy.deepcopy(model)),
        backpack.extend(nn.CrossEntropyLoss(reduction="sum")),
    )
    inputs = x.clone().requires_grad_()

    def peer() -> list[torch.Tensor]:
        extended.zero_grad()
        with backpack.backpack(BatchGrad()):
            loss(extended(inputs), y).backward()
        return [
            torch.linalg.svdvals(each.weight.grad_batch) for each in extended if isinstance(each, nn.Linear)
        ]

    def ours() -> object:
        return probe.measure(lambda: nn.functional.cross_entropy(model(x), y, reduction="none"))

    return Row(what, against, ratio_to("peer", {"peer": peer, "ours": ours}, 3)["ours"])


def between_readings() -> Row:
    """What a watch costs in the steps that it does not read."""
    steps = {}
    for name in ("plain", "watched"):
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model(torch.randn(4, 64)).sum().backward()
        if name == "watched":
            watched = GradientSpectrum(model, r"(?P<layer>\d+)\.(?P<proj>weight)", stats=("nuclear",))
            watched.watch(optimizer, every=10**9, first=1)
        steps[name] = optimizer.step
    found = ratio_to(
        "plain", {name: lambda f=step: [f() for _ in range(20)] for name, step in steps.items()}, 25
    )
    return Row("step of a watched optimizer between readings", "the step without a watch", found["watched"])


def ratios() -> list[Row]:
    """All rows of this benchmark."""
    return [*one_projection(), *whole_model(), per_sample(), between_readings()]
