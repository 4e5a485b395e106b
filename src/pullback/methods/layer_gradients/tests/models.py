"""Small models of the families that the presets know, with weights of their own."""

from __future__ import annotations

import warnings

import torch
from torch import nn


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
