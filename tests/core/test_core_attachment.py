"""Attachment of transforms to torch optimizers: what a step does, order, and scaled gradients."""

import pytest
import torch
from attached import Double, Halve, Neutral, Noise, Recorder, backward, equal, model, train, weights
from torch import nn

from pullback.core.attachment import attach
from pullback.core.clip import ClipGradNorm

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
