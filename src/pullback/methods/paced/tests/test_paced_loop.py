"""The user's own loop: optimizers, schedules, accumulation, mixed precision, resume, compile; two ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pullback.methods.paced import BetaKernel, PassRateTracker, distillation_loss, two_stage
from pullback.testing import run_ranks

PROBLEMS, POSITIONS, SYMBOLS, STEPS = 24, 4, 5, 12


class Student(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(SYMBOLS, 8)
        self.mix = nn.GRU(8, 16, batch_first=True)
        self.head = nn.Linear(16, SYMBOLS)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.4 * torch.randn(p.shape, generator=generator))

    def forward(self, tokens):
        return self.head(self.mix(self.embed(tokens))[0])


def pool():
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(SYMBOLS, (PROBLEMS, POSITIONS), generator=generator)
    teacher = torch.randn(PROBLEMS, POSITIONS, SYMBOLS, generator=generator)
    passed = torch.rand(PROBLEMS, 8, generator=generator) < torch.rand(PROBLEMS, 1, generator=generator)
    mask = torch.ones(PROBLEMS, POSITIONS, dtype=torch.bool)
    mask[:, 0] = False
    return tokens, teacher, mask, passed


def batch_of(step):
    return torch.randperm(PROBLEMS, generator=torch.Generator().manual_seed(step))[:8]


def part_of_loss(model, kernel, tracker, ids, step, count):
    tokens, teacher, mask, _ = pool()
    keep = kernel.active(tracker.rate, ids, least=1)
    loss = distillation_loss(
        model(tokens[keep]), teacher[keep], mask[keep], divergence=two_stage(step, STEPS), reduction="none"
    )
    return kernel(tracker.rate, loss, keep, count=count)


def measured():
    tracker = PassRateTracker(PROBLEMS, k=8)
    tracker.update(torch.arange(PROBLEMS), pool()[3])
    return tracker


class Run:
    """A plain loop with everything that has a state."""

    def __init__(self, make: Any = torch.optim.AdamW, pieces=1, kernel=None):
        self.model, self.tracker = Student(), measured()
        self.kernel, self.pieces = kernel or BetaKernel(), pieces
        self.optimizer = make(self.model.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)

    def step(self, step):
        self.optimizer.zero_grad()
        for ids in batch_of(step).chunk(self.pieces):
            part_of_loss(self.model, self.kernel, self.tracker, ids, step, 8).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        if step == 5:  # pass rates anew at the switch
            rewards = torch.rand(PROBLEMS, 8, generator=torch.Generator().manual_seed(9)) < 0.5
            self.tracker.update(torch.arange(PROBLEMS), rewards, step=step)

    def weights(self):
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])

    def parts(self):
        return (self.model, self.optimizer, self.schedule, self.tracker, self.kernel)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_any_optimizer_trains_and_accumulation_changes_nothing(make):
    whole, split = Run(make), Run(make, pieces=4)
    before = whole.weights()
    for step in range(STEPS):
        whole.step(step)
        split.step(step)
    assert not torch.equal(whole.weights(), before)
    torch.testing.assert_close(split.weights(), whole.weights(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("at", [1, 6, 11])
def test_resume_is_bitwise(at):
    whole, first = Run(), Run()
    for step in range(STEPS):
        whole.step(step)
    for step in range(at):
        first.step(step)
    states = copy.deepcopy([part.state_dict() for part in first.parts()])
    second = Run()
    for part, state in zip(second.parts(), states, strict=True):
        part.load_state_dict(state)
    for step in range(at, STEPS):
        second.step(step)
    assert torch.equal(second.weights(), whole.weights())


def test_zero_exponents_are_the_unweighted_loop_bitwise():
    """The neutral kernel against a loop that knows nothing of weights."""
    run, plain = Run(kernel=BetaKernel(0.0, 0.0)), Student()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    tokens, teacher, mask, _ = pool()
    for step in range(STEPS):
        run.step(step)
        ids = batch_of(step)
        optimizer.zero_grad()
        kind = two_stage(step, STEPS)
        distillation_loss(plain(tokens[ids]), teacher[ids], mask[ids], divergence=kind).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    assert torch.equal(run.weights(), torch.cat([p.detach().reshape(-1) for p in plain.parameters()]))


def test_autocast_with_a_gradient_scaler():
    run, exact = Run(torch.optim.SGD), Run(torch.optim.SGD)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(STEPS):
        exact.step(step)
        run.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = part_of_loss(run.model, run.kernel, run.tracker, batch_of(step), step, 8)
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        scaler.step(run.optimizer)
        scaler.update()
        run.schedule.step()
        if step == 5:
            run.tracker.load_state_dict(exact.tracker.state_dict())
    moved = (run.weights() - Run().weights()).norm()
    assert float((run.weights() - exact.weights()).norm() / moved) < 0.05


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own
def test_a_compiled_step_gives_the_eager_gradients():
    tokens, teacher, mask, _ = pool()
    rate, ids, kernel = measured().rate, batch_of(0), BetaKernel()
    model = nn.Sequential(nn.Embedding(SYMBOLS, 8), nn.Linear(8, SYMBOLS))

    def loss():
        return kernel(
            rate, distillation_loss(model(tokens[ids]), teacher[ids], mask[ids], reduction="none"), ids
        )

    def slopes(function):
        return torch.autograd.grad(function(), list(model.parameters()))

    torch._dynamo.reset()
    for got, wanted in zip(slopes(torch.compile(loss, backend="aot_eager")), slopes(loss), strict=True):
        torch.testing.assert_close(got, wanted)
    torch._dynamo.reset()


def test_deterministic_mode_refuses_nothing():
    plain, strict = Run(pieces=2), Run(pieces=2)
    plain.step(0)
    torch.use_deterministic_algorithms(True)
    try:
        strict.step(0)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(strict.weights(), plain.weights())


# --- two ranks -----------------------------------------------------------------------------------------------------


def trained(model, rank, world, normalize):
    """Steps on this rank's share of each batch, with rates measured in shares as well."""
    tracker, passed = PassRateTracker(PROBLEMS, k=8), pool()[3]
    mine = torch.arange(rank, PROBLEMS, world)
    tracker.update(mine, passed[mine], step=1)
    tracker.synchronize()
    kernel = BetaKernel(normalize=normalize)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        ids = batch_of(step)[rank::world]
        part_of_loss(model, kernel, tracker, ids, step, len(ids)).backward()
        optimizer.step()
    return [tracker.rate, torch.cat([p.detach().reshape(-1) for p in model.parameters()])]


def both_measured(rank):
    """What ranks hold after they measured one problem at the same step, and another at different steps."""
    tracker = PassRateTracker(3, k=2)
    tracker.update(torch.tensor([0]), torch.tensor([[1, rank]]), step=4)
    tracker.update(torch.tensor([1]), torch.tensor([[rank, rank]]), step=5 + rank)
    tracker.synchronize()
    tracker.synchronize()  # nothing new: nothing changes
    return [tracker.rate, tracker.measured_at, torch.tensor(tracker.clock), tracker.tries]


def found_on(rank):
    found = [both_measured(rank)]
    for normalize in ("pool-mean", "batch-mean"):
        wrapped = nn.parallel.DistributedDataParallel(Student().double())
        found.append(trained(wrapped, rank, 2, normalize))
    return found


@pytest.mark.timeout(240)
def test_two_ranks_equal_one_process():
    ranks = run_ranks(found_on)
    for rate, measured_at, clock, tries in (ranks[0][0], ranks[1][0]):
        assert tries.tolist() == [4.0, 2.0, 0.0]
        assert rate.nan_to_num(-1).tolist() == [0.75, 1.0, -1.0]
        assert (measured_at.tolist(), int(clock)) == ([4, 6, -1], 6)
    for normalize, first, second in zip(("pool-mean", "batch-mean"), ranks[0][1:], ranks[1][1:], strict=True):
        alone = trained(Student().double(), 0, 1, normalize)
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[0], alone[0])
        assert torch.equal(first[1], second[1])
        torch.testing.assert_close(first[1], alone[1], rtol=0, atol=1e-7)
