"""Attachment of transforms to torch optimizers: order, steps, scaling, copies, state and what must not happen."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

from pullback.core.attachment import attach
from pullback.core.checks import NonFiniteError
from pullback.core.clip import ClipGradNorm
from pullback.core.kinds import StepBatch, Transform
from pullback.core.state import StateError
from pullback.core.streams import generator


class Double(Transform):
    """Double every gradient: order and repetition show in the number."""

    def pre_step_(self, batch):
        for grad in batch.grads:
            grad.mul_(2)


class Neutral(Transform):
    """Do nothing."""


class Noise(Transform):
    """Counter-based noise: any slip of a counter or an index changes the weights."""

    def pre_step_(self, batch):
        for index, grad in zip(batch.indices, batch.grads, strict=True):
            stream = generator("test", 0, batch.step, index)
            grad.add_(torch.randn(grad.shape, generator=stream).to(grad.dtype))


class Mean(Transform):
    """Running mean of gradients, with state per parameter."""

    def __init__(self):
        self.mean = torch.zeros(())

    def pre_step_(self, batch):
        self.mean = 0.5 * self.mean + sum(grad.sum() for grad in batch.grads)

    def extra_state(self):
        return {"mean": self.mean}

    def load_extra_state(self, state):
        self.mean = state["mean"].clone()


class Recorder(Transform):
    """Keep what both hooks saw."""

    when = "both"

    def __init__(self):
        self.seen: list[StepBatch] = []
        self.grads: list[list[torch.Tensor]] = []
        self.after: list[list[torch.Tensor]] = []

    def pre_step_(self, batch):
        self.seen.append(batch)
        self.grads.append([grad.clone() for grad in batch.grads])

    def post_step_(self, batch):
        self.after.append([param.detach().clone() for param in batch.params])


class Halve(Transform):
    """Halve the parameters after the step."""

    when = "post"

    def post_step_(self, batch):
        for param in batch.params:
            param.mul_(0.5)


def model(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def backward(net, step=0, *, scale=1.0):
    with torch.random.fork_rng():
        torch.manual_seed(1000 + step)
        inputs, wanted = torch.randn(8, 4), torch.randn(8, 2)
    loss = (net(inputs) - wanted).square().mean() * scale
    loss.backward()
    return loss


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


def train(net, optimizer, steps, *, first=0, closure=False):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        if closure:

            def evaluate(step=step):
                optimizer.zero_grad()
                return backward(net, step)

            optimizer.step(evaluate)
        else:
            backward(net, step)
            optimizer.step()


# --- what a step does ----------------------------------------------------------------------------------------


def test_neutral_attachment_is_bitwise_nothing(make):
    plain, attached = model(), model()
    train(plain, make(plain.parameters()), 5)
    optimizer = make(attached.parameters())
    handle = attach(optimizer, Neutral(), ClipGradNorm(float("inf")))
    before = torch.get_rng_state()
    train(attached, optimizer, 5)
    assert equal(weights(plain), weights(attached))
    assert torch.equal(before, torch.get_rng_state())
    assert handle.steps == 5


def test_pre_step_edits_reach_the_update():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attach(optimizer, Double())
    start = weights(net)
    backward(net)
    plain = [p.grad.clone() for p in net.parameters()]
    optimizer.step()
    expected = [p - 0.1 * 2 * g for p, g in zip(start, plain, strict=True)]
    torch.testing.assert_close(weights(net), expected)


def test_order_is_the_one_given():
    def norm_after(*transforms):
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        attach(optimizer, *transforms)
        backward(net, scale=1e3)
        optimizer.step()
        return torch.nn.utils.get_total_norm([p.grad for p in net.parameters()]).item()

    assert norm_after(ClipGradNorm(1.0), Double()) == pytest.approx(2.0, rel=1e-4)
    assert norm_after(Double(), ClipGradNorm(1.0)) == pytest.approx(1.0, rel=1e-4)


def test_post_step_sees_the_updated_parameters():
    net, plain = model(), model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = Recorder()
    attach(optimizer, Halve(), recorder)
    train(net, optimizer, 1)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), 1)
    assert equal(weights(net), [0.5 * p for p in weights(plain)])
    assert equal(recorder.after[0], weights(net))


def test_batch_names_indices_groups_and_step():
    net = model()
    net[0].bias.requires_grad_(False)
    groups = [{"params": list(net[0].parameters())}, {"params": list(net[2].parameters()), "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    recorder = Recorder()
    attach(optimizer, recorder, names=net)
    train(net, optimizer, 2)
    last = recorder.seen[-1]
    assert last.names == ["0.weight", "2.weight", "2.bias"]
    assert last.indices == [0, 2, 3]
    assert [group["lr"] for group in last.groups] == [0.1, 0.5, 0.5]
    assert [batch.step for batch in recorder.seen] == [0, 1]
    assert last.optimizer is optimizer


def test_names_from_the_optimizer_or_by_position():
    for given, expected in [("named", "0.weight"), ("plain", "group0.0")]:
        net = model()
        source = net.named_parameters() if given == "named" else net.parameters()
        recorder = Recorder()
        optimizer = torch.optim.SGD(source, lr=0.1)
        attach(optimizer, recorder)
        train(net, optimizer, 1)
        assert recorder.seen[0].names[0] == expected


def test_closure_is_edited_after_it_ran(make):
    by_closure, by_hand = model(), model()
    first, second = make(by_closure.parameters()), make(by_hand.parameters())
    one, other = attach(first, Noise()), attach(second, Noise())
    train(by_closure, first, 4, closure=True)
    train(by_hand, second, 4)
    assert equal(weights(by_closure), weights(by_hand))
    assert one.steps == other.steps == 4


def test_closure_by_keyword_and_its_loss():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = Recorder()
    attach(optimizer, recorder)
    loss = optimizer.step(closure=lambda: backward(net))
    assert loss.item() > 0
    assert len(recorder.seen) == 1


def test_a_closure_evaluated_twice_is_refused():
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            for _ in range(2):
                with torch.enable_grad():
                    closure()

    net = model()
    optimizer = Twice(net.parameters(), lr=0.1)
    attach(optimizer, Double())
    with pytest.raises(
        RuntimeError, match=r"Twice\.step evaluated its closure twice .* call transform\.update_"
    ):
        optimizer.step(lambda: backward(net))


def test_super_step_runs_transforms_once():
    class Child(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # from now on SGD.step carries hooks of its own
    net, plain = model(), model()
    child, parent = Child(net.parameters(), lr=0.1), torch.optim.SGD(plain.parameters(), lr=0.1)
    one = attach(child, Double())
    attach(parent, Double())
    train(net, child, 3)
    train(plain, parent, 3)
    assert equal(weights(net), weights(plain))
    assert one.steps == 3


def test_an_error_in_the_step_does_not_silence_the_next_one():
    class Fails(torch.optim.SGD):
        broken = True

        def step(self, closure=None):
            if self.broken:
                raise OSError("broken")
            return super().step(closure)

    net = model()
    optimizer = Fails(net.parameters(), lr=0.1)
    handle = attach(optimizer, Neutral())
    backward(net)
    with pytest.raises(OSError, match="broken"):
        optimizer.step()
    assert handle.steps == 0
    Fails.broken = False
    optimizer.step()
    assert handle.steps == 1


def test_accumulation_counts_one_step():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = Recorder()
    attach(optimizer, recorder)
    for step in range(3):
        backward(net, step)
    total = [p.grad.clone() for p in net.parameters()]
    optimizer.step()
    assert len(recorder.seen) == 1
    assert equal(recorder.grads[0], total)


def test_missing_gradients_every_other_step_keep_indices():
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    recorder = Recorder()
    handle = attach(optimizer, recorder)
    for step in range(4):
        optimizer.zero_grad()
        backward(net, step)
        if step % 2:
            net[0].weight.grad = None
        optimizer.step()
    assert [batch.indices for batch in recorder.seen] == [[0, 1, 2, 3], [1, 2, 3]] * 2
    optimizer.zero_grad()
    optimizer.step()
    assert handle.steps == 4


def test_add_param_group_mid_run():
    net = model()
    optimizer = torch.optim.AdamW(net[0].parameters())
    recorder = Recorder()
    attach(optimizer, recorder, names=net)
    train(net, optimizer, 1)
    optimizer.add_param_group({"params": list(net[2].parameters())})
    train(net, optimizer, 1, first=1)
    assert recorder.seen[0].names == ["0.weight", "0.bias"]
    assert recorder.seen[1].names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert recorder.seen[1].indices == [0, 1, 2, 3]


@pytest.mark.parametrize("schedule", ["step", "onecycle"])
def test_schedulers_work_as_without(schedule):
    results = []
    for attached in (False, True):
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        if schedule == "step":
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)
        else:
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6)
        if attached:
            attach(optimizer, Neutral())
        for step in range(5):
            train(net, optimizer, 1, first=step)
            scheduler.step()
        results.append((weights(net), scheduler.get_last_lr()))
    assert equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_compiled_step_is_edited():
    net, plain = model(), model()
    first, second = (torch.optim.SGD(each.parameters(), lr=torch.tensor(0.1)) for each in (net, plain))
    one, _ = attach(first, Noise()), attach(second, Noise())
    step = torch.compile(first.step, backend="eager")
    for number in range(3):
        first.zero_grad()
        backward(net, number)
        step()
    train(plain, second, 3)
    torch.testing.assert_close(weights(net), weights(plain))
    assert one.steps == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    param = nn.Parameter(torch.ones(5, dtype=dtype))
    optimizer = torch.optim.SGD([param], lr=1.0)
    attach(optimizer, Double())
    param.grad = torch.full_like(param, 0.25)
    optimizer.step()
    assert torch.equal(param, torch.full_like(param, 0.5))


def test_odd_parameters():
    params = [
        nn.Parameter(torch.ones(())),
        nn.Parameter(torch.ones(0, 3)),
        nn.Parameter(torch.ones(4, 4).t()),
    ]
    optimizer = torch.optim.SGD(params, lr=1.0)
    attach(optimizer, ClipGradNorm(1e9), Double())
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert [param.sum().item() for param in params] == [-1.0, 0.0, -16.0]


# --- GradScaler ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_scaler_shows_unscaled_gradients(name, fused, unscale_first):
    kind = torch.optim.SGD if name == "sgd" else torch.optim.AdamW
    net, plain = model(), model()
    optimizer, reference = (
        kind(net.parameters(), lr=0.1, fused=fused),
        kind(plain.parameters(), lr=0.1, fused=fused),
    )
    recorder, double = Recorder(), Double()
    handle = attach(optimizer, recorder, double)
    attach(reference, Double())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(backward_loss(net, step)).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    train(plain, reference, 3)
    torch.testing.assert_close(weights(net), weights(plain))
    assert max(grad.abs().max().item() for grad in recorder.grads[0]) < 10
    assert handle.steps == 3


def backward_loss(net, step):
    with torch.random.fork_rng():
        torch.manual_seed(1000 + step)
        inputs, wanted = torch.randn(8, 4), torch.randn(8, 2)
    return (net(inputs) - wanted).square().mean()


@pytest.mark.parametrize("fused", [False, True])
def test_scaler_overflow_advances_nothing(fused):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused)
    handle = attach(optimizer, Noise(), Halve())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(backward_loss(net, 0)).backward()
    scaler.step(optimizer)
    scaler.update()
    start, counts = weights(net), [int(state["step"]) for state in optimizer.state.values()]
    optimizer.zero_grad()
    scaler.scale(backward_loss(net, 1) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert equal(start, weights(net))
    assert counts == [int(state["step"]) for state in optimizer.state.values()]
    assert handle.steps == 1
    assert scaler.get_scale() == 512.0


# --- NaN and Inf ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_is_named_before_anything_moves(bad):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    handle = attach(optimizer, Double(), names=net)
    train(net, optimizer, 2)
    start = weights(net)
    optimizer.zero_grad()
    backward(net)
    net[2].bias.grad[1] = bad
    others = net[0].weight.grad.clone()
    with pytest.raises(NonFiniteError, match=r"AdamW, step 2: .*'2\.bias' holds (NaN|Inf) in 1 of 2 entries"):
        optimizer.step()
    assert equal(start, weights(net))
    assert torch.equal(net[0].weight.grad, others)
    assert handle.steps == 2


def test_skip_is_as_if_the_step_had_not_happened(make):
    with_bad, without = model(), model()
    first, second = make(with_bad.parameters()), make(without.parameters())
    one, other = attach(first, Noise(), Mean(), nonfinite="skip"), attach(second, Noise(), Mean())
    train(with_bad, first, 3)
    train(without, second, 3)
    first.zero_grad()
    backward(with_bad)
    with_bad[0].weight.grad[0, 0] = float("nan")
    kept = [p.grad for p in with_bad.parameters()]
    before, saved = torch.get_rng_state(), copy.deepcopy(first.state_dict())
    first.step()
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is grad for p, grad in zip(with_bad.parameters(), kept, strict=True))
    torch.testing.assert_close(saved, first.state_dict(), rtol=0, atol=0)
    train(with_bad, first, 3, first=3)
    train(without, second, 3, first=3)
    assert equal(weights(with_bad), weights(without))
    assert (one.steps, one.skipped, other.steps) == (6, 1, 6)
    assert torch.equal(one.transforms[1].mean, other.transforms[1].mean)


def test_skip_with_a_closure():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    handle = attach(optimizer, Double(), nonfinite="skip")
    start = weights(net)
    optimizer.step(lambda: backward(net, scale=float("nan")))
    assert equal(start, weights(net))
    assert (handle.steps, handle.skipped) == (0, 1)


def test_skip_puts_counters_in_groups_back():
    class Counts(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
                group["t"] += 1

    net = model()
    optimizer = Counts(net.parameters(), lr=0.1)
    optimizer.param_groups[0].update(k=0, t=torch.zeros(()))
    attach(optimizer, nonfinite="skip")
    backward(net, scale=float("nan"))
    optimizer.step()
    assert optimizer.param_groups[0]["k"] == 0
    assert optimizer.param_groups[0]["t"].item() == 0


def test_a_second_attachment_does_not_count_a_skipped_step():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attach(optimizer, nonfinite="skip")
    second = attach(optimizer, Noise(), Halve())
    start = weights(net)
    backward(net, scale=float("nan"))
    optimizer.step()
    assert equal(start, weights(net))
    assert second.steps == 0


def test_warn_goes_on():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    handle = attach(optimizer, Neutral(), nonfinite="warn")
    backward(net, scale=float("nan"))
    with pytest.warns(
        RuntimeWarning, match=r"attachment to SGD, step 0: .* goes on because nonfinite='warn'"
    ):
        optimizer.step()
    assert handle.steps == 1


def test_large_finite_gradients_are_no_alarm():
    param = nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.SGD([param], lr=1e-38)
    attach(optimizer)
    param.grad = torch.full_like(param, 3e38)  # their sum and their Euclidean norm overflow
    optimizer.step()
    assert torch.isfinite(param).all()
    assert param.abs().max() > 1


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


# --- refusals ------------------------------------------------------------------------------------------------


def test_refusals():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    noise = Noise()
    with pytest.raises(TypeError, match="got Linear"):
        attach(net[0], noise)
    with pytest.raises(TypeError, match="got LBFGS"):
        attach(torch.optim.LBFGS(net.parameters()), noise)
    with pytest.raises(TypeError, match="Call its class first"):
        attach(optimizer, Noise)
    with pytest.raises(ValueError, match="twice"):
        attach(optimizer, noise, noise)
    with pytest.raises(ValueError, match=r"nonfinite must be one of .* Did you mean 'skip'"):
        attach(optimizer, noise, nonfinite="skp")
    with pytest.raises(ValueError, match="names must name parameters of the optimizer"):
        attach(optimizer, noise, names=model())
    assert not optimizer._optimizer_step_pre_hooks
    handle = attach(optimizer, noise)
    with pytest.raises(ValueError, match="attached to another optimizer already"):
        attach(torch.optim.SGD(net.parameters(), lr=0.1), noise)
    with pytest.raises(RuntimeError, match=r"handle|attachment\.remove"):
        noise.update_(net)
    handle.remove()
    attach(optimizer, noise)


def test_wrappers_without_hooks_are_refused():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner = inner

    with pytest.raises(TypeError, match="wrapper Wrapper"):
        attach(Wrapper(None), Noise())


# --- by hand -------------------------------------------------------------------------------------------------


def test_update_by_hand_equals_attachment():
    by_hand, attached = model(), model()
    first, second = (torch.optim.AdamW(each.parameters()) for each in (by_hand, attached))
    noise = Noise()
    Noise().attach(second)
    for step in range(4):
        first.zero_grad()
        backward(by_hand, step)
        noise.update_(by_hand.parameters())
        first.step()
    train(attached, second, 4)
    assert equal(weights(by_hand), weights(attached))
    assert noise.steps == 4


def test_update_by_hand_refuses_and_skips():
    net = model()
    noise = Noise()
    with pytest.raises(ValueError, match=r"Noise\.update_: none of 4 parameters has a gradient"):
        noise.update_(net)
    with pytest.raises(TypeError, match=r"Pass \[tensor\]"):
        noise.update_(net[0].weight)
    backward(net)
    net[0].bias.grad[0] = float("nan")
    before = net[0].weight.grad.clone()
    noise.update_(net, nonfinite="skip")
    assert noise.steps == 0
    assert torch.equal(before, net[0].weight.grad)
    with pytest.raises(NonFiniteError, match=r"Noise, step 0: .*'0\.bias'"):
        noise.update_(net)


def test_clip_equals_torch():
    net, plain = model(), model()
    backward(net, scale=100.0)
    backward(plain, scale=100.0)
    ClipGradNorm(0.5).update_(net)
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    assert equal([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), -float("inf")])
def test_clip_refuses(bad):
    with pytest.raises(ValueError, match="max_norm must be > 0"):
        ClipGradNorm(bad)


@pytest.mark.parametrize("bad", ["nonsense", 1.0, 3, None])
def test_clip_names_a_wrong_norm_type(bad):
    with pytest.raises(ValueError, match=r"norm_type must be one of 2\.0, inf, got"):
        ClipGradNorm(1.0, norm_type=bad)
    assert ClipGradNorm(1.0, norm_type=2).norm_type == 2.0
