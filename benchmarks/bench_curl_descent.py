"""The flip itself beside a training step, the attachment around it, and the curl meter in passes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from benchmarks.harness import Row, ratio
from torch import Tensor, nn

from pullback.core.kinds import StepBatch
from pullback.methods.curl_descent import RuleFlip, curl_fraction


def network() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A perceptron of 1.3 million weights on a batch of 128."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )
    return model, torch.randn(128, 256), torch.randint(10, (128,))


def stepping(make: Callable[[nn.Sequential], RuleFlip | None]) -> Callable[[], None]:
    """Forward, backward and SGD with momentum; with a rule attached, or with a bare attachment."""
    from pullback import attach

    model, x, y = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    rule = make(model)
    attach(optimizer, *([] if rule is None else [rule]))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def plain() -> Callable[[], None]:
    """The same step without any attachment."""
    model, x, y = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def edit(**settings: object) -> Callable[[], None]:
    """The flip of all three layers alone, on gradients that are there already."""
    model, x, y = network()
    nn.functional.cross_entropy(model(x), y).backward()
    rule = RuleFlip(list(model[::2]), **settings)  # ty: ignore[invalid-argument-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    params = list(model.parameters())
    grads = [p.grad for p in params if p.grad is not None]
    rows = [str(i) for i in range(len(params))]
    batch = StepBatch([*params], grads, rows, list(range(len(params))), [{}] * len(params), 0, optimizer)
    return lambda: rule.pre_step_(batch)


def dense(model: nn.Sequential) -> Callable[[], None]:
    """What the reference does: a product with the diagonal matrix."""
    weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    grads = [torch.randn_like(weight) for weight in weights]
    diagonals = [torch.diag(torch.ones(weight.shape[1])) for weight in weights]

    def flip() -> None:
        for grad, diagonal in zip(grads, diagonals, strict=True):
            grad.copy_(grad @ diagonal)

    return flip


def ratios() -> list[Row]:
    """All rows of this benchmark."""
    model, x, y = network()
    small = nn.Sequential(nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 10))
    signs = RuleFlip(small[2], fraction=0.1).signs(small)
    loss = lambda: nn.functional.cross_entropy(small(x), y)  # noqa: E731
    tenth = edit(fraction=0.1)
    return [
        Row(
            "step with a tenth of all columns flipped",
            "step with an attachment of nothing",
            ratio(
                stepping(lambda m: RuleFlip(list(m[::2]), fraction=0.1)), stepping(lambda m: None), repeats=25
            ),
            1.03,
        ),
        Row(
            "flip of a tenth of all columns",
            "a training step of 1.3 M weights",
            ratio(tenth, plain()),
            note="gradients out of the cache, as the other step left it; a tenth of this from the cache",
        ),
        Row(
            "flip of random halves of all layers",
            "a training step",
            ratio(edit(fraction=0.5, which="random"), plain()),
            note="one broadcast product per gradient",
        ),
        Row(
            "flip of a tenth of all columns",
            "products with dense diagonal matrices",
            ratio(tenth, dense(model)),
            0.1,
        ),
        Row(
            "step with RuleFlip(readout) attached",
            "step with an attachment of nothing",
            ratio(stepping(lambda m: RuleFlip(m[4], fraction=0.1)), stepping(lambda m: None), repeats=25),
            1.02,
        ),
        Row(
            "curl_fraction, one probe",
            "one forward and backward pass",
            ratio(
                lambda: curl_fraction(loss, small, signs),
                lambda: torch.autograd.grad(loss(), list(small.parameters())),
            ),
            note="one pass and two Hessian-vector products",
        ),
    ]
