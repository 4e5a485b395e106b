"""The states of the global random generators, for a resume that goes on bit by bit."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from pullback.core.state import check_state

FORMAT_VERSION = 1


def rng_state() -> dict[str, Any]:
    """States of torch's, NumPy's and Python's global generators and of every accelerator.

    Returns:
        Plain values and tensors (``packing.pack`` prepares them for a checkpoint). Streams of
        ``pullback.core.streams`` need none of this: they have no state.
    """
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    version, words, python_gauss = random.getstate()
    return {
        "format_version": FORMAT_VERSION,
        "torch": torch.get_rng_state(),
        "accelerator": _accelerator_states(),
        "numpy": {
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
        "python": {
            "version": int(version),
            "words": torch.tensor(words, dtype=torch.int64),
            "has_gauss": python_gauss is not None,
            "gauss": float(python_gauss or 0.0),
        },
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put all generators back; call it after data loading has been wound forward.

    Args:
        state: what :func:`rng_state` returned, on a machine with the same accelerators.

    Raises:
        StateError: if the state is of another form or version; then nothing was changed.
    """
    check_state("rng_state", state, rng_state(), version=FORMAT_VERSION)
    numpy, python = state["numpy"], state["python"]
    words = tuple(int(word) for word in python["words"])
    random.setstate((python["version"], words, python["gauss"] if python["has_gauss"] else None))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(  # noqa: NPY002 - the global one is meant
        ("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["gauss"])
    )
    torch.set_rng_state(state["torch"])
    for index, one in enumerate(state["accelerator"]):
        _accelerator().set_rng_state(one, index)


def _accelerator() -> Any:
    device = torch.accelerator.current_accelerator()
    return None if device is None else torch.get_device_module(device)


def _accelerator_states() -> list[torch.Tensor]:
    module = _accelerator()
    if module is None or not module.is_available():
        return []
    return [module.get_rng_state(index) for index in range(torch.accelerator.device_count())]
