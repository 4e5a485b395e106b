"""The handle of an attachment: removal, copies, order in print, and resume."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from attached import (
    Double,
    Halve,
    Mean,
    Neutral,
    Noise,
    Recorder,
    backward,
    equal,
    model,
    train,
    weights,
)

from pullback.core.attachment import attach
from pullback.core.clip import ClipGradNorm
from pullback.core.state import StateError

# --- the handle ----------------------------------------------------------------------------------------------


def test_remove_and_with():
    net, plain = model(), model()
    optimizer, reference = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (net, plain))
    with attach(optimizer, Noise()) as handle:
        assert handle.attached
    handle.remove()
    train(net, optimizer, 2)
    train(plain, reference, 2)
    assert equal(weights(net), weights(plain))
    assert not handle.attached
    assert "removed" in repr(handle)


def test_fifty_attachments_leave_nothing():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    gone = []
    for step in range(50):
        handle = attach(optimizer, Recorder(), names=net)
        train(net, optimizer, 1, first=step)
        handle.remove()
        gone.append(weakref.ref(handle))
        del handle
    gc.collect()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert [ref() for ref in gone] == [None] * 50


def test_attachment_does_not_keep_the_optimizer_alive():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    handle = attach(optimizer, Neutral())
    ref = weakref.ref(optimizer)
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert ref() is None
    finally:
        gc.enable()
    assert not handle.attached
    with pytest.raises(ReferenceError, match="reattach"):
        _ = handle.optimizer


def test_repr_prints_the_order():
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    text = repr(attach(optimizer, Halve(), ClipGradNorm(1.0), Double()))
    lines = [line.strip() for line in text.splitlines()]
    assert lines[1:5] == [
        "1. before the step: ClipGradNorm(max_norm=1, norm_type=2)",
        "2. before the step: Double()",
        "3. the step: AdamW (1 groups, 4 parameters)",
        "4. after the step: Halve()",
    ]


def test_two_attachments_run_in_order():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attach(optimizer, ClipGradNorm(1.0))
    attach(optimizer, Double())
    backward(net, scale=1e3)
    optimizer.step()
    assert torch.nn.utils.get_total_norm([p.grad for p in net.parameters()]).item() == pytest.approx(
        2.0, rel=1e-4
    )


def run_on(net, optimizer, first):
    train(net, optimizer, 3, first=first)
    return weights(net)


def test_deepcopy_of_the_optimizer_and_reattach():
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    handle = attach(optimizer, Noise())
    train(net, optimizer, 2)
    copied_net, copied = copy.deepcopy((net, optimizer))
    expected = run_on(net, optimizer, 2)
    assert not copied._optimizer_step_pre_hooks
    handle.transforms[0].steps = handle.steps = 2
    handle.reattach(copied)
    assert equal(run_on(copied_net, copied, 2), expected)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("how", [copy.deepcopy, lambda whole: pickle.loads(pickle.dumps(whole))])
def test_copies_of_optimizer_and_attachment_keep_working(how):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    handle = attach(optimizer, Noise(), names=net)
    train(net, optimizer, 2)
    other_net, other, other_handle = how((net, optimizer, handle))
    expected = run_on(net, optimizer, 2)
    assert equal(run_on(other_net, other, 2), expected)
    assert other_handle.steps == handle.steps == 5
    assert other_handle.optimizer is other


def test_reattach_to_fewer_parameters_is_refused():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    handle = attach(optimizer, Noise())
    train(net, optimizer, 1)
    with pytest.raises(ValueError, match="must have the 4 parameters of the old one, got 2"):
        handle.reattach(torch.optim.SGD(net[0].parameters(), lr=0.1))
    assert handle.optimizer is optimizer


# --- state ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", range(0, 7, 2))
def test_resume_is_bitwise_and_loads_weights_only(make, stop):
    whole = model()
    optimizer = make(whole.parameters())
    attach(optimizer, Noise(), Mean(), Noise())
    train(whole, optimizer, 6)

    net = model()
    optimizer = make(net.parameters())
    handle = attach(optimizer, Noise(), Mean(), Noise())
    train(net, optimizer, stop)
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict(), handle.state_dict()], file)
    file.seek(0)
    parts = torch.load(file, weights_only=True)

    net = model(seed=9)
    optimizer = make(net.parameters())
    handle = attach(optimizer, Noise(), Mean(), Noise())
    for each, part in zip((net, optimizer, handle), parts, strict=True):
        each.load_state_dict(part)
    train(net, optimizer, 6 - stop, first=stop)
    assert equal(weights(whole), weights(net))


def broken_states():
    yield "newer", lambda s: s.update(format_version=2), "format_version must be <= 1, got 2"
    yield "older", lambda s: s.update(format_version=0), "too old"
    yield "no version", lambda s: s.pop("format_version"), "format_version must be an integer"
    yield "missing", lambda s: s.pop("steps"), r"missing \['steps'\]"
    yield "unknown", lambda s: s.update(extra=1), r"unknown \['extra'\]"
    yield "type", lambda s: s.update(steps="3"), "steps must be of type int"
    yield "transform", lambda s: s["transforms"].pop("Mean"), r"missing \['Mean'\]"
    yield "inner", lambda s: s["transforms"]["Mean"].update(steps=None), "Mean.steps must be of type int"
    shape = torch.zeros(2)
    yield "shape", lambda s: s["transforms"]["Mean"]["state"].update(mean=shape), r"shape \(\) .* got \(2,\)"
    dtype = torch.zeros((), dtype=torch.float64)
    yield "dtype", lambda s: s["transforms"]["Mean"]["state"].update(mean=dtype), "got .* torch.float64"
    yield "count", lambda s: s.update(skipped=-1), "Attachment.skipped must be >= 0, got -1"
    yield "inner count", lambda s: s["transforms"]["Mean"].update(steps=-7), "Mean.steps must be >= 0, got -7"
    yield "inner version", lambda s: s["transforms"]["Mean"].update(format_version=9), "<= 1, got 9"


@pytest.mark.parametrize(
    ("edit", "message"), [case[1:] for case in broken_states()], ids=[c[0] for c in broken_states()]
)
def test_state_is_taken_whole_or_not_at_all(edit, message):
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    handle = attach(optimizer, Noise(), Mean())
    train(net, optimizer, 2)
    state = copy.deepcopy(handle.state_dict())
    train(net, optimizer, 2, first=2)
    now = copy.deepcopy(handle.state_dict())
    edit(state)
    with pytest.raises(StateError, match=message):
        handle.load_state_dict(state)
    torch.testing.assert_close(handle.state_dict(), now, rtol=0, atol=0)
