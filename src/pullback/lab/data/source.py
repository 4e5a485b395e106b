"""Embedded files, opened only when their content is what was shipped."""

from __future__ import annotations

import hashlib
import io
from importlib import resources

import numpy as np

SHA256 = {
    "mnist10k.npz": "0217e13bd0668deb198aa7d305edbf0331eb89f8a6e7dd226e03d1aa3a9bd4ef",
    "sentiment.tsv.gz": "f72e534b7e88803a9df7a6f04015204b6e4f5f782a25100619f20341fd125b7f",
    "mni152_2mm.npz": "49e02463357961d06162c45f63c414518c0172db21e9997622ed66a5ef12d80a",
    "topics.txt.gz": "248ca9940bc69dcaf36a7e5c993f3d5d9c7b9042bdb2e1af0eb7a02a5cf23b66",
}


class DataError(RuntimeError):
    """A data file is missing or is not the one that was shipped."""


def embedded(name: str) -> bytes:
    """Content of the embedded file ``name``.

    Raises:
        DataError: if the file is missing or its SHA-256 is not the shipped one.
    """
    path = resources.files("pullback.lab.data") / "files" / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error}. Reinstall pullback.") from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        raise DataError(
            f"data file {path} is damaged: expected SHA-256 {SHA256[name]}, found {found}. Reinstall pullback."
        )
    return content


def embedded_arrays(name: str) -> dict[str, np.ndarray]:
    """Arrays of the embedded ``.npz`` file ``name`` (never unpickled)."""
    with np.load(io.BytesIO(embedded(name)), allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}
