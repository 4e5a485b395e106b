"""Live watching in training loops, files that survive interruptions, and two processes."""

from __future__ import annotations

import errno
import json
import math
import os
from typing import Any

import pytest
import torch
from torch import nn

from pullback.methods.layer_gradients import GradientSpectrum, layer_curve
from pullback.methods.layer_gradients.tests import cases as models
from pullback.methods.layer_gradients.tests import reference
from pullback.testing import run_ranks

PATTERN = models.LINEAR


def x_of(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nuclear(record):
    return list(record.values["nuclear"]["weight"])


def of_grads(model):
    return [reference.statistics(each.weight.grad)["nuclear"] for each in model.layers]


# --- live -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad], ids=lambda c: c.__name__
)
def test_watching_reads_the_accumulated_gradient_of_every_nth_step_and_changes_nothing(make):
    trained = []
    for watched in (True, False):
        model = models.mlp()
        optimizer = make(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        spec = GradientSpectrum(model, PATTERN)
        wanted = {}
        handle: Any = spec.watch(optimizer, every=3, tag="live") if watched else None
        for step in range(7):
            optimizer.zero_grad()
            for part in range(2):
                model(x_of(4, 6, seed=2 * step + part)).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            wanted[str(step)] = of_grads(model)
            optimizer.step()
            schedule.step()
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        if watched:
            assert [each.key for each in spec.records] == ["0", "3", "6"]
            assert {each.reduction for each in spec.records} == {"batch"}
            for record in spec.records:
                assert nuclear(record) == pytest.approx(wanted[record.key], rel=1e-5)
            assert handle.steps == 7
            handle.remove()
            handle.remove()
            optimizer.step()
            assert (len(spec.records), handle.attached, handle.steps) == (3, False, 7)
    assert torch.equal(*trained)


def test_watching_with_closure_resumed_and_as_a_block():
    model = models.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    spec = GradientSpectrum(model, PATTERN)

    def closure():
        optimizer.zero_grad()
        loss = model(x_of(4, 6)).square().mean()
        loss.backward()
        return loss

    with spec.watch(optimizer, every=2, first=7) as handle:
        for call in (lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)):
            call()
            assert float(closure().detach()) < 1
        optimizer.step(closure)
        assert "every=2, steps=10" in repr(handle)
    assert [each.key for each in spec.records] == ["8"]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_with_torchs_own_scaler(fused):
    model = models.mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    spec = GradientSpectrum(model, PATTERN)
    spec.watch(optimizer, every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = model(x_of(4, 6)).square().mean()
    wanted = [
        reference.statistics(g)["nuclear"]
        for g in reference.gradients(loss, [each.weight for each in model.layers])
    ]
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert nuclear(spec.records[0]) == pytest.approx(wanted, rel=1e-5)
    (scaler.scale(model(x_of(4, 6)).sum()) * math.inf).backward()
    scaler.step(optimizer)
    assert len(spec.records) == 1  # a step that overflows is left out, and so is its reading


class Twice(torch.optim.SGD):
    """A subclass whose step calls its parent's, so that torch runs the hooks of both."""

    def step(self, closure=None):
        return super().step(closure)


def test_a_subclass_that_calls_its_parents_step_counts_once():
    torch.optim.SGD(models.mlp().parameters())  # torch hooks a class's step when its first instance is made
    model = models.mlp()
    optimizer = Twice(model.parameters(), lr=0.1)
    spec = GradientSpectrum(model, PATTERN)
    handle = spec.watch(optimizer, every=2)
    for _ in range(4):
        model(x_of(4, 6)).square().mean().backward()
        optimizer.step()
    assert (handle.steps, [each.key for each in spec.records]) == (4, ["0", "2"])


def test_what_cannot_be_watched_is_refused():
    model = models.mlp()
    spec = GradientSpectrum(model, PATTERN)
    with pytest.raises(TypeError, match="LBFGS"):
        spec.watch(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(TypeError, match=r"torch.optim.Optimizer, got Mlp"):
        spec.watch(model)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match="optimizer must train one of the watched weights, got 1 others"):
        spec.watch(optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="every must be >= 1, got 0"):
        spec.watch(optimizer, every=0)
    with pytest.raises(ValueError, match=r"got 'nuclear_per_loss'"):
        GradientSpectrum(model, PATTERN, stats=("nuclear_per_loss",)).watch(optimizer)
    spec.watch(optimizer, every=1)
    with pytest.raises(RuntimeError, match=r"got none in step 0. Call loss.backward"):
        optimizer.step()


def test_a_weight_without_gradient_is_unknown_in_a_watch():
    model = models.mlp()
    model.layers[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    spec = GradientSpectrum(model, PATTERN)
    spec.watch(optimizer, every=1)
    model(x_of(4, 6)).sum().backward()
    optimizer.step()
    first, second = nuclear(spec.records[0])
    assert math.isnan(first)
    assert second > 0
    assert spec.records[0].nonfinite == 1


# --- files ----------------------------------------------------------------------------------------------------------


def filled(path, tags, *, resume=False, **settings):
    model = models.mlp()
    spec = GradientSpectrum(model, PATTERN, **settings)
    log = spec.to_jsonl(path, resume=resume)
    for tag in tags:
        spec.measure(lambda: model(x_of(1, 6)).sum(), tag, key=tag)
    return spec, log


def test_a_file_holds_every_record_as_it_comes_and_is_resumed(tmp_path):
    path = tmp_path / "grads.jsonl"
    first, log = filled(path, ["a", "b"])
    lines = path.read_text().splitlines()
    assert json.loads(lines[0])["layers"] == {"weight": [0, 1]}
    assert len(lines) == 3
    log.close()
    log.close()
    second, log = filled(path, ["c"], resume=True)
    assert [each.tag for each in second.records] == ["a", "b", "c"]
    assert second.seen("a")
    assert second.records[:2] == first.records or math.isnan(first.records[0].loss)
    assert second.curve(tag="a")["weight"].tolist() == first.curve(tag="a")["weight"].tolist()
    log.close()
    with pytest.raises(ValueError, match=r"closed. Open it again"):
        log.flush()
    third, _ = filled(path, [], resume=True)
    assert [each.key for each in third.records] == ["a", "b", "c"]


def test_records_made_before_the_file_are_written_too(tmp_path):
    model = models.mlp()
    spec = GradientSpectrum(model, PATTERN)
    spec.measure(lambda: model(x_of(1, 6)).sum(), "early")
    log = spec.to_jsonl(tmp_path / "a.jsonl")
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 2
    with pytest.raises(RuntimeError, match="one log, got a second"):
        spec.to_jsonl(tmp_path / "b.jsonl")
    log.close()
    assert spec.to_jsonl(tmp_path / "b.jsonl").path == tmp_path / "b.jsonl"


@pytest.mark.parametrize("lost", [1, 30])
def test_a_half_written_last_line_is_dropped_and_reported(tmp_path, lost):
    path = tmp_path / "grads.jsonl"
    _, log = filled(path, ["a", "b"])
    log.close()
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.warns(RuntimeWarning, match=r"half-written \(\d+ bytes\) and is dropped; 1 records are kept"):
        spec, log = filled(path, ["c"], resume=True)
    assert [each.tag for each in spec.records] == ["a", "c"]
    assert log.dropped > 0
    log.close()
    assert [each.tag for each in filled(path, [], resume=True)[0].records] == ["a", "c"]


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ('{"some": "json"}\n', {}, "without 'format' in its header"),
        ("a,b\n1,2\n", {}, "one JSON object per line, got b'a,b' in line 1"),
        ("no newline at all", {}, "without a header line"),
        (None, {"reduction": "batch"}, "reduction='batch', got 'per_sample'"),
        (None, {"stats": ("nuclear",)}, r"stats=\['nuclear'\], got"),
    ],
    ids=["foreign", "table", "line", "reduction", "stats"],
)
def test_files_of_others_are_refused_and_left_alone(tmp_path, content, settings, message):
    path = tmp_path / "grads.jsonl"
    if content is None:
        filled(path, ["a"])[1].close()
    else:
        path.write_text(content)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        filled(path, [], resume=True, **settings)
    with pytest.raises(FileExistsError, match="Pass resume=True"):
        filled(path, [], **settings)
    assert path.read_bytes() == before


def test_damage_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "grads.jsonl"
    filled(path, ["a", "b"])[1].close()
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1][:20], *lines[2:]]))
    with pytest.raises(ValueError, match="in line 2"):
        filled(path, [], resume=True)


def test_nothing_is_lost_on_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "grads.jsonl"
    model = models.mlp()
    spec = GradientSpectrum(model, PATTERN)
    log = spec.to_jsonl(path)
    spec.measure(lambda: model(x_of(1, 6)).sum(), "a")
    whole = path.read_bytes()
    write = os.write
    room = [10]

    def full(fd, data):
        if fd != log._fd:
            return write(fd, data)
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = write(fd, bytes(data)[: room[0]])
        room[0] = 0
        return taken

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="1 records must be written, and wait in memory") as caught:
        spec.measure(lambda: model(x_of(1, 6)).sum(), "b")
    assert caught.value.errno == errno.ENOSPC
    assert log.waiting == 1
    assert path.read_bytes() == whole
    assert [each.tag for each in spec.records] == ["a", "b"]
    monkeypatch.undo()
    spec.measure(lambda: model(x_of(1, 6)).sum(), "c")
    log.close()
    assert [json.loads(line)["tag"] for line in path.read_text().splitlines()[1:]] == ["a", "b", "c"]


# --- two processes --------------------------------------------------------------------------------------------------


class Normed(models.Mlp):
    """With buffers, which DistributedDataParallel broadcasts in every forward pass."""

    def __init__(self):
        super().__init__()
        self.load_state_dict(models.mlp().state_dict())
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.norm(super().forward(x))


def found_on(rank):
    model = Normed()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    spec = GradientSpectrum(wrapped, PATTERN)
    spec.watch(optimizer, every=2, tag="live")
    for step in range(3):
        if rank == 0:  # the other rank takes no part in a sample
            for _ in range(2):
                spec.measure(lambda s=step: wrapped(x_of(2, 6, seed=s)).square().sum(1), "sample")
        optimizer.zero_grad()
        wrapped(x_of(4, 6, seed=10 * step + rank)).square().mean().backward()
        optimizer.step()
    everything = spec.gather()
    live = layer_curve(everything, tag="live")
    return [
        len(everything), [each.tag for each in everything].count("sample"), live["weight"], live.sem["weight"],
        [nuclear(each) for each in spec.records if each.tag == "live"],
        torch.cat([p.detach().flatten() for p in wrapped.parameters()]),
    ]  # fmt: skip


@pytest.mark.timeout(240)
def test_two_processes_gather_and_read_averaged_gradients():
    (first, second) = run_ranks(found_on, timeout=120.0)
    assert first[:2] == second[:2] == [2 * 2 + 12, 12]
    assert torch.equal(first[2], second[2])
    assert torch.equal(first[5], second[5])
    assert first[4] == second[4]
    model = Normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wanted = []
    for step in range(3):
        optimizer.zero_grad()
        for rank in range(2):
            (model(x_of(4, 6, seed=10 * step + rank)).square().mean() / 2).backward()
        wanted.append(of_grads(model))
        optimizer.step()
    assert first[4][0] == pytest.approx(wanted[0], rel=1e-5)
    assert first[4][1] == pytest.approx(wanted[2], rel=1e-5)
    alone = GradientSpectrum(model, PATTERN)
    alone.measure(lambda: model(x_of(1, 6)).sum())
    assert [nuclear(each) for each in alone.gather()] == [nuclear(each) for each in alone.records]
