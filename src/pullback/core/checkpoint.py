"""Checkpoints that a crash cannot spoil and that damage cannot pass through unseen.

A checkpoint is a folder ``checkpoint-<number>`` with three files: tensors (safetensors), scalars (JSON) and a
manifest (JSON) with size and SHA-256 of both. Each file is written beside its place, flushed to disk and
renamed; the manifest is renamed last, and only then does the checkpoint exist. Loading compares every byte
with the manifest before any tensor is used. Nothing here pickles, and damaged checkpoints are reported, never
deleted. One process at a time writes into a folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pullback.core.checks import integer, shown
from pullback.core.rng import rng_state, set_rng_state

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriteError",
    "load",
    "rng_state",
    "save",
    "set_rng_state",
]

FORMAT = "pullback.checkpoint"
FORMAT_VERSION = 1
_TENSORS, _SCALARS, _MANIFEST = "tensors.safetensors", "scalars.json", "manifest.json"
_PARTS = (_TENSORS, _SCALARS)
_RESERVED = "__metadata__"  # of the safetensors format: a tensor of that name is written and cannot be read
_FOLDER = re.compile(r"checkpoint-(\d{8,})")
_LARGEST_MANIFEST = 1_000_000


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, of a newer version, or no checkpoint at all."""


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; what was there before is intact."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte was compared with its manifest.

    Args:
        tensors: tensors by name, on the CPU.
        scalars: everything else, as plain values.
        path: the checkpoint's own folder.
    """

    tensors: dict[str, Tensor]
    scalars: dict[str, Any]
    path: Path


# --- writing ------------------------------------------------------------------------------------------------


def save(
    folder: str | Path, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Write the next checkpoint into ``folder`` and drop the ones before the last ``keep``.

    Args:
        folder: where the checkpoints of one run live; made when absent.
        tensors: dense tensors by name, on any device.
        scalars: plain JSON values (str keys, lists, numbers, strings, bools, None); ``packing.pack`` makes
            both out of an optimizer's state.
        keep: how many checkpoints stay, the new one included.

    Returns:
        The new checkpoint's own folder.

    Raises:
        TypeError: if a tensor or scalar cannot be stored; nothing was written.
        ValueError: if ``keep`` is below 1.
        CheckpointWriteError: if the disk is full, read-only or failing; earlier checkpoints are intact.
    """
    keep = integer("keep", keep, minimum=1)
    contents = {_TENSORS: _tensor_bytes(tensors), _SCALARS: _scalar_bytes(scalars)}
    root = Path(folder)
    place: Path | None = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        number = 1 + max((_number(each) for each in _folders(root)), default=0)
        _drop_uncommitted(root)
        fresh = root / f"checkpoint-{number:08d}"
        fresh.mkdir()
        place = fresh
        for name, content in contents.items():
            _write(fresh / name, content)
        _sync_folder(fresh)
        _sync_folder(root)
        _write(fresh / _MANIFEST, _manifest_bytes(number, contents))  # from here on the checkpoint exists
        _sync_folder(fresh)
    except OSError as error:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
        raise _write_error(root, error) from error
    _prune(root, keep)
    return fresh


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        _check_storable(name, tensor)
        values = tensor.detach().cpu().contiguous()
        if values.untyped_storage().data_ptr() in storages:
            values = values.clone()  # tied tensors and views are stored one by one
        storages.add(values.untyped_storage().data_ptr())
        plain[name] = values
    try:
        return safetensors.torch.save(plain)
    except KeyError as error:  # its table of dtypes
        raise TypeError(
            f"tensors must be of a dtype that safetensors knows, got {error.args[0]}. "
            "Save torch.view_as_real(tensor), or convert it."
        ) from error


def _check_storable(name: object, tensor: object) -> None:
    """Refuse what would be lost: another tensor, or a name under which the file could not be read again."""
    if not isinstance(name, str) or name == _RESERVED or not _encodable(name):
        raise TypeError(
            f"tensors must have string names other than {_RESERVED!r}, got {shown(name)}. Use str(name), or rename it."
        )
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensors[{name!r}] must be a dense tensor, got {shown(tensor)}. Use scalars.")
    if tensor.layout is not torch.strided or tensor.is_meta or hasattr(tensor, "placements"):
        fix = "Use .to_dense() for sparse ones, .full_tensor() for sharded ones; a meta tensor holds nothing."
        raise TypeError(f"tensors[{name!r}] must be a dense tensor with data, got {shown(tensor)}. {fix}")


def _encodable(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _scalar_bytes(scalars: Mapping[str, Any]) -> bytes:
    try:
        _check_plain("scalars", dict(scalars))
        return json.dumps(dict(scalars), sort_keys=True, indent=1).encode()
    except RecursionError:
        raise TypeError("scalars must be nested less deeply, got more levels than Python allows.") from None


def _check_plain(where: str, value: object) -> None:
    """Refuse what JSON would change silently: tuples, keys that are no strings, NumPy numbers, objects."""
    if type(value) is dict:
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} must have string keys, got {shown(key)}. Use packing.pack(state).")
            _check_plain(f"{where}[{key!r}]", item)
    elif type(value) is list:
        for position, item in enumerate(value):
            _check_plain(f"{where}[{position}]", item)
    elif value is not None and type(value) not in {str, int, float, bool}:
        raise TypeError(f"{where} must be a plain JSON value, got {shown(value)}. Use packing.pack(state).")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _manifest_bytes(number: int, contents: Mapping[str, bytes]) -> bytes:
    body = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "checkpoint": number,
        "files": {name: {"sha256": _digest(each), "bytes": len(each)} for name, each in contents.items()},
        "versions": {"torch": str(torch.__version__), "safetensors": str(safetensors.__version__)},
    }
    return _sealed(body)


def _sealed(body: Mapping[str, Any]) -> bytes:
    """The one way to write a manifest: its own digest inside, so that a change anywhere shows."""
    bare = {key: value for key, value in body.items() if key != "sha256"}
    digest = _digest(json.dumps(bare, sort_keys=True).encode())
    return (json.dumps({**bare, "sha256": digest}, sort_keys=True, indent=1) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _sync_folder(folder: Path) -> None:
    """Make renames durable, where folders can be opened at all."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_error(root: Path, error: OSError) -> CheckpointWriteError:
    kept = [each for each in _newest_first(root) if not _damage(each)]
    before = f"{kept[0]} is intact" if kept else "there was no earlier one"
    full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    what = "no space left" if full else "cannot write"
    fix = "Free space or choose another folder." if full else "Choose a folder that you may write to."
    number = errno.ENOSPC if full else (error.errno or errno.EIO)
    return CheckpointWriteError(
        number, f"checkpoint not saved, {what} ({error.strerror or error}); {before}. {fix}", str(root)
    )


# --- finding ------------------------------------------------------------------------------------------------


def _number(place: Path) -> int:
    found = _FOLDER.fullmatch(place.name)
    return int(found.group(1)) if found else 0


def _folders(root: Path) -> list[Path]:
    """Folders that are named like a checkpoint; links and other names are nobody's business here."""
    return [each for each in root.iterdir() if _number(each) and each.is_dir() and not each.is_symlink()]


def _newest_first(root: Path) -> list[Path]:
    """Committed checkpoints, sound or not."""
    if not root.is_dir():
        return []
    committed = [each for each in _folders(root) if os.path.lexists(each / _MANIFEST)]
    return sorted(committed, key=_number, reverse=True)


def _drop_uncommitted(root: Path) -> None:
    """Remove what an interrupted save left: a folder without manifest never was a checkpoint."""
    for each in _folders(root):
        leftovers = {_TENSORS, _SCALARS, *(f".{name}.partial" for name in (*_PARTS, _MANIFEST))}
        if {inside.name for inside in each.iterdir()} <= leftovers:
            shutil.rmtree(each)


def _prune(root: Path, keep: int) -> None:
    """Drop whole old checkpoints; one that looks damaged is neither counted nor deleted."""
    whole = [each for each in _newest_first(root) if not _damage(each, hashes=False)]
    for each in whole[keep:]:
        (each / _MANIFEST).unlink()  # first it stops being a checkpoint, then it goes
        shutil.rmtree(each)


# --- reading ------------------------------------------------------------------------------------------------


def load(folder: str | Path) -> Checkpoint:
    """Read the newest checkpoint of ``folder``, or the checkpoint that ``folder`` itself is.

    Args:
        folder: a run's folder, or one ``checkpoint-<number>`` in it.

    Returns:
        Tensors and scalars, every byte compared with the manifest.

    Raises:
        CheckpointError: if there is none, or the newest one is damaged or from a newer version. The message
            names the file, what was expected and found, and the newest sound checkpoint; nothing is deleted,
            and no other checkpoint is taken silently.
    """
    root = Path(folder)
    if _FOLDER.fullmatch(root.name) and os.path.lexists(root / _MANIFEST):
        place, others = root, _newest_first(root.parent)
    else:
        others = _newest_first(root)
        if not others:
            raise CheckpointError(
                f"folder must hold a checkpoint, got none in {str(root)!r}. Name the folder that save() "
                "wrote to."
            )
        place = others[0]
    contents: dict[str, bytes] = {}
    trouble = _damage(place, contents=contents)
    if not trouble:
        try:
            tensors = safetensors.torch.load(contents[_TENSORS])
            scalars = json.loads(contents[_SCALARS])
        except (safetensors.SafetensorError, ValueError, RecursionError) as error:
            trouble = f"{place / _TENSORS} is no readable checkpoint part ({error})"
        else:
            return Checkpoint(tensors, scalars, place)
    sound = next((each for each in others if each != place and not _damage(each)), None)
    fallback = (
        f"The newest sound checkpoint is {sound}: load that one." if sound else "No other one is sound."
    )
    raise CheckpointError(f"{place.name} cannot be used: {trouble}. {fallback} Nothing was deleted.")


def _damage(place: Path, *, hashes: bool = True, contents: dict[str, bytes] | None = None) -> str:
    """What is wrong with a checkpoint, or nothing; fills ``contents`` with the bytes that were checked."""
    try:
        manifest = _read_manifest(place)
        if isinstance(manifest, str):
            return manifest
        for name in _PARTS:
            path, expected = place / name, manifest["files"][name]
            if path.is_symlink() or not path.is_file():
                return f"{path} is missing or no plain file"
            size = path.stat().st_size
            if size != expected["bytes"]:
                return f"{path} must have {expected['bytes']} bytes, got {size}"
            if not hashes:
                continue
            content = path.read_bytes()
            if _digest(content) != expected["sha256"]:
                return f"{path} must have SHA-256 {expected['sha256']}, got {_digest(content)}"
            if contents is not None:
                contents[name] = content
    except OSError as error:
        return f"{place} cannot be read ({error.strerror or error})"
    return ""


def _read_manifest(place: Path) -> dict[str, Any] | str:
    """The manifest, or what is wrong with it."""
    path = place / _MANIFEST
    if path.is_symlink() or not path.is_file():
        return f"{path} is no plain file"
    size = path.stat().st_size
    if not 0 < size <= _LARGEST_MANIFEST:
        return f"{path} must have 1 to {_LARGEST_MANIFEST} bytes, got {size}"
    raw = path.read_bytes()
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return f"{path} is no JSON ({error})"
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return f"{path} is no manifest of this format"
    version = found.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        return f"{path} must have format_version <= {FORMAT_VERSION}, got {version}: update pullback"
    if type(version) is not int or version != FORMAT_VERSION:
        return f"{path} must have format_version {FORMAT_VERSION}, got {shown(version)}"
    sealed = _sealed(found)
    if sealed != raw:
        return f"{path} was altered: it must have SHA-256 {_digest(sealed)}, got {_digest(raw)}"
    if found.get("checkpoint") != _number(place):
        return f"{path} belongs to checkpoint {shown(found.get('checkpoint'))}, not to {place.name}"
    files = found.get("files")
    listed = isinstance(files, dict) and set(files) == set(_PARTS)
    parts = list(files.values()) if listed else [None]
    if not all(isinstance(part, dict) and {"sha256", "bytes"} == set(part) for part in parts):
        return f"{path} must list {', '.join(_PARTS)} with sha256 and bytes"
    return found
