"""Checkpoints that are damaged, interrupted or written to a full disk: found, told, and nothing is lost."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pullback.core import checkpoint as module
from pullback.core.checkpoint import (
    CheckpointError,
    CheckpointWriteError,
    load,
    save,
)

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3, dtype=torch.int64)}
SCALARS = {"step": 3, "best": 0.5, "name": "x", "list": [1, None, True]}


# --- damage -------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    """A folder with two checkpoints, and the newer one's path."""
    save(tmp_path, TENSORS, {"step": 1})
    return save(tmp_path, {**TENSORS, "a": TENSORS["a"] + 1}, {"step": 2})


FILES = ["tensors.safetensors", "scalars.json", "manifest.json"]


def refused(place, message="cannot be used"):
    listing = sorted(str(each) for each in place.parent.rglob("*"))
    with pytest.raises(CheckpointError, match=message) as caught:
        load(place.parent)
    text = str(caught.value)
    assert place.name in text
    assert "The newest sound checkpoint is" in text
    assert "checkpoint-00000001" in text
    assert listing == sorted(str(each) for each in place.parent.rglob("*"))
    return text


@pytest.mark.parametrize("name", FILES)
def test_every_bit_flip_is_found(two, name):
    path = two / name
    good = path.read_bytes()
    rng = random.Random(0)
    for _ in range(70):
        position, bit = rng.randrange(len(good)), rng.randrange(8)
        bad = bytearray(good)
        bad[position] ^= 1 << bit
        path.write_bytes(bad)
        with pytest.raises(CheckpointError):
            load(two.parent)
    path.write_bytes(good)
    assert load(two.parent).scalars["step"] == 2


@pytest.mark.parametrize("name", FILES)
def test_truncation_appended_bytes_and_empty_files_are_found(two, name):
    path = two / name
    good = path.read_bytes()
    for bad in [b"", good[:1], good[: len(good) // 2], good[:-1], good + b"\0", good + b" ", good + good]:
        path.write_bytes(bad)
        assert name in refused(two)


@pytest.mark.parametrize("name", FILES)
def test_files_swapped_between_checkpoints_are_found(two, name):
    shutil.copy(two.parent / "checkpoint-00000001" / name, two / name)
    refused(two)


def test_a_renamed_checkpoint_is_found(two):
    later = two.with_name("checkpoint-00000007")
    two.rename(later)
    refused(later, "belongs to checkpoint 2, not to checkpoint-00000007")


@pytest.mark.parametrize("name", FILES[:2])
def test_missing_files_and_links_are_found(two, name, tmp_path):
    content = (two / name).read_bytes()
    (two / name).unlink()
    refused(two, "missing or no plain file")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(content)
    (two / name).symlink_to(elsewhere)
    refused(two, "missing or no plain file")


def test_message_names_both_hashes(two):
    path = two / "tensors.safetensors"
    good = path.read_bytes()
    bad = good[:-1] + bytes([good[-1] ^ 1])
    path.write_bytes(bad)
    text = refused(two)
    assert hashlib.sha256(good).hexdigest() in text
    assert hashlib.sha256(bad).hexdigest() in text
    assert str(path) in text


def test_no_sound_checkpoint_is_said(two):
    for place in two.parent.iterdir():
        (place / "scalars.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="No other one is sound"):
        load(two.parent)


def reseal(path, **changes):
    body = json.loads(path.read_bytes())
    body.update(changes)
    path.write_bytes(module._sealed(body))


def test_manifests_that_lie_are_refused(two):
    path = two / "manifest.json"
    good = path.read_bytes()
    files = json.loads(good)["files"]
    evil = {**files, "tensors.safetensors": {**files["tensors.safetensors"], "path": "/etc/passwd"}}
    renamed = {"../../etc/passwd": files["scalars.json"], "scalars.json": files["scalars.json"]}
    lies = [
        ({"format_version": 2}, "must have format_version <= 1, got 2: update pullback"),
        ({"format_version": 0}, "must have format_version 1, got 0"),
        ({"format": "other"}, "no manifest of this format"),
        ({"files": renamed}, "must list"),
        ({"files": evil}, "must list"),
        ({"files": []}, "must list"),
        ({"checkpoint": "2"}, "belongs to checkpoint '2'"),
    ]
    for changes, message in lies:
        path.write_bytes(good)
        reseal(path, **changes)
        refused(two, message)
    for raw in (b"[" * 100_000, b"null", b"\xff\xfe", b"{}", b" " * 2_000_000):
        path.write_bytes(raw)
        refused(two)


def test_hostile_names_beside_checkpoints_are_ignored(two, tmp_path_factory):
    root = two.parent
    outside = tmp_path_factory.mktemp("outside")
    shutil.copytree(two, outside / "checkpoint-00000099")
    (root / "latest").write_text("../../etc/passwd")
    (root / "checkpoint-00000050").symlink_to(outside / "checkpoint-00000099")
    (root / "checkpoint-99999999999").write_text("a file")
    (root / "checkpoint-\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661x").mkdir()
    (root / "<img src=x>").mkdir()
    assert load(root).scalars["step"] == 2
    save(root, TENSORS, {"step": 3}, keep=1)
    assert load(root).scalars["step"] == 3
    assert (outside / "checkpoint-00000099" / "manifest.json").exists()
    assert (root / "latest").exists()


def test_nothing_to_load(tmp_path):
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="folder must hold a checkpoint, got none"):
            load(place)


def test_pruning_neither_counts_nor_deletes_damaged_ones(two):
    (two / "scalars.json").write_bytes(b"")
    save(two.parent, TENSORS, {"step": 3}, keep=2)
    assert sorted(each.name[-1] for each in two.parent.iterdir()) == ["1", "2", "3"]
    save(two.parent, TENSORS, {"step": 4}, keep=2)
    assert sorted(each.name[-1] for each in two.parent.iterdir()) == ["2", "3", "4"]


# --- crashes and full disks ---------------------------------------------------------------------------------


SAVER = """
import sys, torch
from pullback.core.checkpoint import save
torch.set_num_threads(1)
print("ready", flush=True)
step = int(sys.argv[2])
while True:
    step += 1
    save(sys.argv[1], {"a": torch.full((200_000,), float(step))}, {"step": step})
    print(step, flush=True)
"""


def kill_while_saving(folder, first, delay):
    """Save in a loop in another process, kill it after ``delay``, and return the last step that it had committed."""
    child = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(folder), str(first)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    reported = child.stdout.read().splitlines()
    child.wait()
    child.stdout.close()
    return max((int(line) for line in reported if line), default=first)


@pytest.mark.slow
def test_kill_at_random_moments_loses_nothing(tmp_path):
    rng = random.Random(0)
    last = 0
    for _ in range(6):
        committed = kill_while_saving(tmp_path, last, rng.uniform(0.0, 0.3))
        if committed == 0:
            continue
        found = load(tmp_path)
        assert found.scalars["step"] in {committed, committed + 1}  # killed between commit and report
        assert torch.equal(found.tensors["a"], torch.full((200_000,), float(found.scalars["step"])))
        last = found.scalars["step"]
        assert len(list(tmp_path.iterdir())) <= 4  # two kept, one being pruned, one begun
    assert last > 0
    save(tmp_path, {}, {"step": -1})
    assert len(list(tmp_path.iterdir())) == 2
    assert not list(tmp_path.rglob("*.partial"))


POINTS = ["fsync", "replace", "mkdir", "rmtree"]


@pytest.mark.parametrize("call", range(1, 14))
def test_a_crash_at_every_system_call_loses_nothing(tmp_path, monkeypatch, call):
    save(tmp_path, TENSORS, {"step": 1}, keep=1)

    class Crash(BaseException):
        """Stands for the end of the process: nothing may tidy up after it."""

    count = 0

    def crash_before(function):
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count == call:
                raise Crash
            return function(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", crash_before(os.fsync))
        patch.setattr(module.shutil, "rmtree", crash_before(shutil.rmtree))
        for name in ("mkdir", "replace", "unlink"):
            patch.setattr(Path, name, crash_before(getattr(Path, name)))
        try:
            save(tmp_path, TENSORS, {"step": 2}, keep=1)
        except Crash:
            pass
        else:
            assert call > count
    assert load(tmp_path).scalars["step"] in {1, 2}
    save(tmp_path, TENSORS, {"step": 3}, keep=1)
    assert load(tmp_path).scalars["step"] == 3
    assert len(list(tmp_path.iterdir())) == 1


LIMITED = """
import resource, signal, sys, torch
from pullback.core.checkpoint import CheckpointWriteError, save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    save(sys.argv[1], {"a": torch.zeros(100_000)}, {})
except CheckpointWriteError as error:
    print(error)
save(sys.argv[1], {"a": torch.zeros(10)}, {"small": 1})
"""


def test_full_disk_leaves_the_previous_checkpoint(tmp_path):
    save(tmp_path, TENSORS, SCALARS)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "no space left" in done.stdout
    assert "checkpoint-00000001 is intact. Free space" in done.stdout
    assert load(tmp_path / "checkpoint-00000001").scalars == SCALARS
    assert load(tmp_path).scalars == {"small": 1}
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "no space left"), (errno.EROFS, "cannot write"), (errno.EIO, "cannot write")],
)
def test_failing_disk_is_told_and_tidied(tmp_path, monkeypatch, number, message):
    save(tmp_path, TENSORS, SCALARS)

    def fails(_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", fails)
        with pytest.raises(CheckpointWriteError, match=message) as caught:
            save(tmp_path, TENSORS, {})
    assert caught.value.errno == number
    assert load(tmp_path).scalars == SCALARS
    assert len(list(tmp_path.iterdir())) == 1


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointWriteError, match="there was no earlier one"):
        save(tmp_path / "file" / "run", TENSORS, {})


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write into read-only folders")
def test_read_only_folder(tmp_path):
    save(tmp_path, TENSORS, SCALARS)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointWriteError, match=r"cannot write .* is intact"):
            save(tmp_path, TENSORS, {})
    finally:
        tmp_path.chmod(0o700)
    assert load(tmp_path).scalars == SCALARS
