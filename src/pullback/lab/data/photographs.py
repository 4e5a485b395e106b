"""Six photographs that scikit-learn and scikit-image install with themselves; nothing is ever downloaded."""

from __future__ import annotations

from functools import cache
from importlib import resources

import numpy as np
import torch
from torch import Tensor

from pullback.lab.data.source import DataError

_FILES = {
    "china": ("sklearn.datasets.images", "china.jpg"),
    "flower": ("sklearn.datasets.images", "flower.jpg"),
    "astronaut": ("skimage.data", "astronaut.png"),
    "chelsea": ("skimage.data", "chelsea.png"),
    "coffee": ("skimage.data", "coffee.png"),
    "retina": ("skimage.data", "retina.jpg"),
}


@cache
def photographs() -> dict[str, Tensor]:
    """Colour photographs by name, each uint8 [height, width, 3].

    china and flower come from scikit-learn (BSD-3-Clause; photographs under CC BY by their authors), astronaut,
    chelsea, coffee and retina from scikit-image (public domain or CC0).

    Raises:
        DataError: if an installed package lacks its photograph.
    """
    from PIL import Image

    found: dict[str, Tensor] = {}
    for name, (package, file) in _FILES.items():
        path = resources.files(package) / file
        if not path.is_file():
            raise DataError(
                f"photograph {file} is not in the installed {package}. "
                f'Reinstall with: pip install --force-reinstall "pullback[lab]".'
            )
        with path.open("rb") as stream, Image.open(stream) as image:
            found[name] = torch.from_numpy(np.array(image.convert("RGB")))
    return found
