"""Checkpoints: round trips, bit-exact resume and old formats."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pullback.core import checkpoint as module
from pullback.core.attachment import attach
from pullback.core.checkpoint import (
    CheckpointError,
    load,
    rng_state,
    save,
    set_rng_state,
)
from pullback.core.kinds import Transform
from pullback.core.packing import pack, unpack
from pullback.core.state import StateError
from pullback.core.streams import generator

FIXTURE = Path(__file__).parent / "fixtures" / "format_1"
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3, dtype=torch.int64)}
SCALARS = {"step": 3, "best": 0.5, "name": "x", "list": [1, None, True]}


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert other[name].dtype == tensor.dtype
        assert torch.equal(other[name], tensor)


# --- round trips --------------------------------------------------------------------------------------------


def test_round_trip_and_keep(tmp_path):
    places = [save(tmp_path / "run", TENSORS, {**SCALARS, "step": step}, keep=2) for step in range(5)]
    assert sorted(each.name[-1] for each in (tmp_path / "run").iterdir()) == ["4", "5"]
    found = load(tmp_path / "run")
    assert found.path == places[-1]
    assert found.scalars == {**SCALARS, "step": 4}
    same(TENSORS, found.tensors)
    assert load(places[-2]).scalars["step"] == 3


def nested(depth):
    inner = []
    for _ in range(depth):
        inner = [inner]
    return inner


@pytest.mark.parametrize("version", ["1", 0, None, True, 1.0])
def test_a_version_that_is_none_is_refused(tmp_path, version):
    manifest = save(tmp_path, {}, {}) / "manifest.json"
    manifest.write_bytes(module._sealed({**json.loads(manifest.read_bytes()), "format_version": version}))
    with pytest.raises(CheckpointError, match=r"must have format_version 1, got"):
        load(tmp_path)


def test_awkward_tensors(tmp_path):
    whole = torch.arange(12.0)
    tensors = {
        "transposed": whole.reshape(3, 4).t(), "tied": whole, "tied too": whole, "view": whole[3:5],
        "expanded": torch.ones(1).expand(4), "empty": torch.ones(0, 3), "scalar": torch.tensor(1.5),
        "bf16": torch.ones(3, dtype=torch.bfloat16), "bool": torch.tensor([True, False]),
        "grad": nn.Parameter(torch.ones(2)), "nan": torch.tensor([float("inf"), -0.0]),
        "../../x/\u202e<b>": torch.ones(1),
    }  # fmt: skip
    save(tmp_path, tensors, {})
    same(tensors, load(tmp_path).tensors)


@pytest.mark.parametrize(
    ("tensors", "scalars", "message"),
    [
        ({"a": 1.0}, {}, r"tensors\['a'\] must be a dense tensor"),
        ({"a": torch.eye(2).to_sparse()}, {}, r"dense tensor with data, .*\.to_dense\(\)"),
        ({"a": torch.ones(1, device="meta")}, {}, "a meta tensor holds nothing"),
        (
            {"a": torch.ones(1, dtype=torch.complex128)},
            {},
            r"got torch\.complex128\. Save torch\.view_as_real",
        ),
        ({"__metadata__": torch.ones(1)}, {}, "other than '__metadata__'"),
        ({"\ud800": torch.ones(1)}, {}, "Use str"),
        ({}, {"a": nested(5000)}, "nested less deeply"),
        ({1: torch.ones(1)}, {}, "string names"),
        ({}, {"a": (1, 2)}, r"scalars\['a'\] must be a plain JSON value, got \(1, 2\)\. Use packing"),
        ({}, {"a": {1: 2}}, r"scalars\['a'\] must have string keys"),
        ({}, {"a": [np.float32(1)]}, r"scalars\['a'\]\[0\]"),
        ({}, {"a": torch.ones(1)}, "plain JSON value"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_writing(tmp_path, tensors, scalars, message):
    with pytest.raises(TypeError, match=message):
        save(tmp_path / "run", tensors, scalars)
    assert not (tmp_path / "run").exists()


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
KEYS = st.text(max_size=5) | st.integers(-5, 5)
NESTED = st.recursive(
    LEAVES,
    lambda s: (
        st.lists(s, max_size=3) | st.lists(s, max_size=3).map(tuple) | st.dictionaries(KEYS, s, max_size=3)
    ),
)


@settings(max_examples=50)
@given(st.dictionaries(KEYS, NESTED, max_size=3))
def test_pack_unpack_through_json(state):
    tensors, scalars = pack({"state": state, "tensor": [torch.ones(2), {0: torch.zeros(1)}]})
    found = unpack(tensors, json.loads(json.dumps(scalars)))
    assert found["state"] == state
    assert repr(found["state"]) == repr(state)
    assert torch.equal(found["tensor"][1][0], torch.zeros(1))


def test_pack_and_unpack_refuse():
    with pytest.raises(TypeError, match="must be a tensor or a plain value"):
        pack({"a": object()})
    with pytest.raises(TypeError, match="string or integer keys"):
        pack({"a": {1.5: 2}})
    for tree in ({"x": []}, {"tensor": "missing"}, {"map": [], "list": []}, None):
        with pytest.raises(ValueError, match=r"must be what pack\(\) returned"):
            unpack({}, {"tree": tree})


# --- bit-exact resume ---------------------------------------------------------------------------------------


class Noise(Transform):
    def pre_step_(self, batch):
        for index, grad in zip(batch.indices, batch.grads, strict=True):
            grad.add_(torch.randn(grad.shape, generator=generator("test", 0, batch.step, index)), alpha=0.01)


class Run:
    """A loop with everything that must resume: dropout, shuffling, scheduler, average, transform, all generators."""

    length = 10

    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
            self.data = torch.randn(40, 4)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, total_steps=100)
        self.average = torch.optim.swa_utils.AveragedModel(self.model)
        self.handle = attach(self.optimizer, Noise())
        self.step = 0

    def parts(self):
        return {
            name: getattr(self, name) for name in ("model", "optimizer", "scheduler", "average", "handle")
        }

    def train(self, steps):
        for _ in range(steps):
            epoch, position = divmod(self.step, self.length)
            order = torch.randperm(40, generator=generator("order", 0, epoch))
            inputs = self.data[order[4 * position : 4 * position + 4]] + random.random() + np.random.rand()  # noqa: NPY002
            self.optimizer.zero_grad()
            self.model(inputs).square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()
            self.average.update_parameters(self.model)
            self.step += 1
        return self

    def state(self):
        return {"rng": rng_state(), "step": self.step, **{n: p.state_dict() for n, p in self.parts().items()}}

    def load(self, state):
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.step = state["step"]
        set_rng_state(state["rng"])
        return self

    def result(self):
        return torch.cat(
            [p.detach().flatten() for each in (self.model, self.average) for p in each.parameters()]
        )


@pytest.fixture
def seeded():
    before = rng_state()

    def seed():
        torch.manual_seed(1)
        random.seed(1)
        random.gauss(0, 1)  # leaves a half used pair
        np.random.seed(1)  # noqa: NPY002
        np.random.standard_normal()  # noqa: NPY002

    yield seed
    set_rng_state(before)


def test_resume_at_every_step_is_bitwise(tmp_path, seeded):
    seeded()
    whole = Run().train(50).result()
    seeded()
    run = Run()
    for step in range(50):
        save(tmp_path, *pack(run.state()), keep=50)
        run.train(1)
        assert run.step == step + 1
    for stop in range(50):
        seeded()
        torch.rand(7)
        found = load(tmp_path / f"checkpoint-{stop + 1:08d}")
        resumed = Run().load(unpack(found.tensors, found.scalars)).train(50 - stop)
        assert torch.equal(resumed.result(), whole), f"stopped at step {stop}"


def test_resume_without_generators_differs(tmp_path, seeded):
    seeded()
    whole = Run().train(10).result()
    seeded()
    state = Run().train(5).state()
    torch.manual_seed(77)
    state["rng"] = rng_state()
    assert not torch.equal(Run().load(state).train(5).result(), whole)


def test_generators_continue(seeded):
    seeded()
    state = unpack(*pack(rng_state()))
    draws = [one_of_each() for _ in range(2)]
    torch.rand(3)
    set_rng_state(state)
    assert draws == [one_of_each() for _ in range(2)]


def one_of_each():
    drawn = np.random.standard_normal()  # noqa: NPY002
    return torch.rand(1).item(), random.gauss(0, 1), random.random(), drawn


def test_wrong_generator_state_changes_nothing(seeded):
    seeded()
    state = rng_state()
    state["numpy"]["keys"] = state["numpy"]["keys"][:5]
    torch.rand(3)
    before = torch.get_rng_state()
    with pytest.raises(StateError, match=r"rng_state\.numpy\.keys must have shape \(624,\)"):
        set_rng_state(state)
    assert torch.equal(before, torch.get_rng_state())


# --- versions -----------------------------------------------------------------------------------------------


def test_format_1_is_read_for_ever():
    found = load(FIXTURE)
    state = unpack(found.tensors, found.scalars)
    assert torch.equal(state["weights"]["a"], torch.arange(6.0).reshape(2, 3))
    betas = state["optimizer"]["param_groups"][0]["betas"]
    assert isinstance(betas, tuple)
    assert betas[1] == 0.999
    run = Run()
    run.handle.load_state_dict(state["attachment"])
    assert run.handle.steps == 3
    assert run.handle.transforms[0].steps == 3


def test_no_pickle_on_these_paths(tmp_path):
    evil = tmp_path / "checkpoint-00000001"
    evil.mkdir()
    marker = tmp_path / "marker"
    payload = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    for name in ("tensors.safetensors", "scalars.json", "manifest.json"):
        (evil / name).write_bytes(payload)
    with pytest.raises(CheckpointError):
        load(tmp_path)
    assert not marker.exists()
