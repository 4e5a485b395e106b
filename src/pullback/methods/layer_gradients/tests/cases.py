"""What the contracts need to know of this room's component, and small models of the families that the presets know."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from pullback.methods.layer_gradients import GradientSpectrum
from pullback.testing import Case

_spectrum: Any = GradientSpectrum  # with arguments of wrong types, which must be refused
PATTERN = r"(?P<layer>\d+)\.(?P<proj>weight)"


def _model(seed=0):
    with torch.random.fork_rng():  # torch's own initialisation moves the global generator
        layers = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 3)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=g))
    return nn.Sequential(*layers)


def _attention(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), nn.Linear(8, 3))


def _batch(generator, dtype):
    return (torch.randn(5, 8, generator=generator, dtype=torch.float64).to(dtype),)


def _sequence(generator, dtype):
    return (torch.randn(1, 5, 8, generator=generator, dtype=torch.float64).to(dtype),)


def _run(component, model, batch):
    component.model = model
    return component.measure(lambda: model(*batch).square().flatten(1).sum(1), tag="t")


def _of(**settings):
    return lambda: GradientSpectrum(_model(), PATTERN, **settings)


_BAD = (
    lambda: _spectrum(torch.zeros(2)),
    lambda: GradientSpectrum(_model()),
    lambda: GradientSpectrum(_model(), "llama"),
    lambda: _spectrum(_model(), 5),
    lambda: _spectrum(_model(), PATTERN, stats="nuclear"),
    lambda: GradientSpectrum(_model(), PATTERN, stats=()),
    lambda: GradientSpectrum(_model(), PATTERN, stats=("trace",)),
    lambda: _spectrum(_model(), PATTERN, reduction="mean"),
    lambda: _spectrum(_model(), PATTERN, splitter="qkv"),
    lambda: _spectrum(_model(), PATTERN, route="fast"),
    lambda: GradientSpectrum(_model(), PATTERN, batch_dim=-1),
    lambda: GradientSpectrum(_model(), PATTERN, loss_scale=0.0),
    lambda: GradientSpectrum(_model(), PATTERN, loss_scale=3.0),
    lambda: _spectrum(_model(), PATTERN, training="eval"),
    lambda: _spectrum(_model(), PATTERN, nonfinite="skip"),
    lambda: _spectrum(_model(), PATTERN, seed=0.5),
)

CASES = (
    *(
        Case(
            name=f"GradientSpectrum[{name}]" if name else "GradientSpectrum",
            kind="probe", build=build, model=_model, inputs=_batch, run=_run, bad=bad,
        )
        for name, build, bad in (
            ("", _of(), _BAD),
            ("train", _of(training=True, reduction="batch"), ()),
            ("dense", _of(route="dense", reduction="batch", training=None), ()),
        )
    ),
    Case(
        name="GradientSpectrum[torch]", kind="probe", build=lambda: GradientSpectrum(_attention()), model=_attention,
        inputs=_sequence, run=_run,
    ),
)  # fmt: skip


# --- models of the tests ---------------------------------------------------------------------------------------------


def seeded(build, seed=0):
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        return build().eval()


def llama(layers=3, **settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40,
        vocab_size=50, initializer_range=0.2, **settings,
    )  # fmt: skip
    return seeded(lambda: LlamaForCausalLM(config))


def qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40,
        vocab_size=50,
    )  # fmt: skip
    return seeded(lambda: Qwen2ForCausalLM(config))


def phi3():
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40,
        vocab_size=50, pad_token_id=0,
    )  # fmt: skip
    return seeded(lambda: Phi3ForCausalLM(config))


def bert():
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, vocab_size=50
    )
    return seeded(lambda: BertForMaskedLM(config))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=32)
    return seeded(lambda: GPT2LMHeadModel(config))


class Encoder(nn.Module):
    """torch's own encoder behind an embedding, with logits."""

    def __init__(self, layers=2):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 40, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(32, 50)

    def forward(self, input_ids):
        return self.head(self.encoder(self.embed(input_ids)))


def encoder():
    return seeded(Encoder)


class Mlp(nn.Module):
    """Two linear layers of one width, with a non-linearity between."""

    def __init__(self, width=6, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


LINEAR = r"layers\.(?P<layer>\d+)\.(?P<proj>weight)"


def mlp(width=6, layers=2):
    return seeded(lambda: Mlp(width, layers))


def ids(batch=1, tokens=9, seed=0):
    return torch.randint(1, 50, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def logits(model, input_ids):
    out = model(input_ids=input_ids)
    return getattr(out, "logits", out)
