"""Named random streams that are computed from a key, never from a shared generator.

A stream is named and counted: ``generator("noise", seed, step, index)``. Equal keys give equal numbers on
every rank and after every resume; different keys give independent numbers; nothing has to be saved, and
neither torch's, NumPy's nor Python's global generator is read or moved.
"""

from __future__ import annotations

import hashlib
import struct
from functools import cache

import numpy as np
import torch

_WORDS = 624
_HEADER = struct.Struct("<QiiQ")  # initial seed, draws left before the next twist, seeded, next word
_KNOWN_SEED, _KNOWN_WORDS = 5489, (5489, 1301868182, 2938499221)  # first words of the published generator


def _key(name: str, seed: int, counters: tuple[int, ...]) -> bytes:
    """An injective encoding of name, seed and counters."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}. Name the stream, for example 'noise'.")
    numbers = (seed, *counters)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise TypeError(
                f"seed and counters must be integers, got {number!r}. Use int(...) on whole numbers."
            )
    return repr((name, *map(int, numbers))).encode("utf-8", "surrogatepass")


def stream_seed(name: str, seed: int, *counters: int) -> int:
    """64-bit seed of a stream: a blake2b digest of the key.

    Args:
        name: what the numbers are for.
        seed: the user's seed.
        counters: what tells the draws of a stream apart, for example step and parameter index.

    Returns:
        An integer in [0, 2**64). Two of a million keys collide with probability 3e-8.

    Raises:
        TypeError: if the name is no string, or the seed or a counter is no integer.
    """
    digest = hashlib.blake2b(_key(name, seed, counters), digest_size=8, person=b"pullback").digest()
    return int.from_bytes(digest, "little")


@cache
def _state_tail() -> bytes | None:
    """What follows the words in a fresh CPU generator's state; ``None`` when the layout is another one."""
    state = torch.Generator().manual_seed(_KNOWN_SEED).get_state().numpy().tobytes()
    end = _HEADER.size + 8 * _WORDS
    known = (
        len(state) > end
        and _HEADER.unpack_from(state) == (_KNOWN_SEED, 1, 1, 0)
        and struct.unpack_from(f"<{len(_KNOWN_WORDS)}Q", state, _HEADER.size) == _KNOWN_WORDS
    )
    return state[end:] if known else None


def generator(name: str, seed: int, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator at the start of a stream.

    torch seeds its CPU generator with 32 bits only, so that among 1e6 seeds more than a hundred pairs would
    share all their numbers; here all 19,937 bits of its state come from the key (SHAKE-256). Generators of
    other devices take the full 64-bit :func:`stream_seed`. Numbers differ between device types.

    Args:
        name: what the numbers are for.
        seed: the user's seed.
        counters: what tells the draws of a stream apart, for example step and parameter index.
        device: where the numbers will be drawn.

    Returns:
        A new generator, independent of every other one.

    Raises:
        TypeError: if the name is no string, or the seed or a counter is no integer.
    """
    number = stream_seed(name, seed, *counters)
    stream = torch.Generator(device=device)
    tail = _state_tail() if stream.device.type == "cpu" else None
    if tail is None:
        return stream.manual_seed(number)
    words = np.frombuffer(hashlib.shake_256(_key(name, seed, counters)).digest(4 * _WORDS), dtype="<u4")
    state = _HEADER.pack(number, 1, 1, 0) + words.astype("<u8").tobytes() + tail
    return stream.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def numpy_generator(name: str, seed: int, *counters: int) -> np.random.Generator:
    """A NumPy generator (Philox, 128-bit key) at the start of a stream; see :func:`generator`.

    Raises:
        TypeError: if the name is no string, or the seed or a counter is no integer.
    """
    digest = hashlib.blake2b(_key(name, seed, counters), digest_size=16, person=b"pullback").digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
