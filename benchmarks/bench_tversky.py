"""Cost of Tversky layers: time of training and of evaluation beside the official package, and what is kept."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
from benchmarks.harness import Row, seconds
from torch import Tensor, nn

from pullback.methods.tversky import TverskyProjection

N, M, K, D = 256, 1000, 512, 128  # inputs, prototypes, features, width
PEER = "tversky 0.2 (official)"
SETTING = f"n={N}, m={M}, k={K}, d={D}"


def _ratio(what: Callable[[], object], against: Callable[[], object], repeats: int = 15) -> float:
    """In processor time: other processes do not count."""
    taken = seconds({"what": what, "against": against}, repeats=repeats, clock=time.process_time)
    return statistics.median(a / b for a, b in zip(taken["what"], taken["against"], strict=True))


def _training(layer: nn.Module, x: Tensor, outer: Tensor) -> Callable[[], object]:
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(layer(x), wanted, outer)


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that the graph of one forward pass holds, beside input and parameters."""
    given = {each.untyped_storage().data_ptr() for each in (x, *layer.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x)
    del out
    return sum(kept.values())


def _official(ours: TverskyProjection) -> nn.Module:
    from tversky.nn import TverskyProjection as Official

    spelling = {"ignorematch": "ignorematch", "subtractmatch": "substractmatch"}[ours.form.difference]
    peer = Official(D, M, K, ours.form.model, False, ours.form.intersection, spelling)
    peer.load_state_dict(ours.state_dict())
    return peer


def training_rows(x: Tensor, outer: Tensor) -> list[Row]:
    """Forward and backward passes of three forms, and the memory of the first."""
    rows = []
    ours = TverskyProjection(D, M, K)
    rows.append(
        Row(
            f"product, ignorematch, forward and backward, {SETTING}",
            "nn.Linear(128, 1000)",
            _ratio(_training(ours, x, outer), _training(nn.Linear(D, M, bias=False), x, outer), 9),
        )
    )
    for intersection, difference, bound in (
        ("product", "ignorematch", 0.8),
        ("product", "substractmatch", None),
        ("min", "ignorematch", None),
    ):
        ours = TverskyProjection(D, M, K, intersection=intersection, difference=difference)
        what = f"{intersection}, {difference}, forward and backward"
        taken = _ratio(_training(ours, x, outer), _training(_official(ours), x, outer))
        rows.append(Row(what, PEER, taken, bound=bound))
    ours = TverskyProjection(D, M, K)
    scores = 4 * (N * K + M * K)
    rows.append(
        Row("bytes kept for the backward pass, product", "the scores alone", kept_bytes(ours, x) / scores)
    )
    rows.append(Row("same", PEER, kept_bytes(ours, x) / kept_bytes(_official(ours), x)))
    return rows


def evaluation_row() -> Row:
    """One input at a time, as a language model samples."""
    ours, x = TverskyProjection(D, M, K).eval(), torch.randn(1, D)
    peer = _official(ours)

    def call(layer: nn.Module) -> Callable[[], object]:
        def once() -> None:
            with torch.no_grad():
                layer(x)

        return once

    return Row("one input in evaluation mode, prototypes kept", PEER, _ratio(call(ours), call(peer), 25))


def feature_row(x: Tensor, outer: Tensor) -> Row:
    """The per-feature minimum beside the tensor of all inputs, prototypes and features."""
    n, m = 32, 100
    ours = TverskyProjection(D, m, K, intersection="min", difference="subtractmatch", reduce="feature")
    part = x[:n].detach().requires_grad_()

    def naive() -> None:
        u = (part @ ours.feature_bank.weight.T).relu()
        v = (ours.prototypes.weight @ ours.feature_bank.weight.T).relu()
        least = torch.minimum(u[:, None], v).sum(-1)
        mine, theirs = (u[:, None] - v).relu().sum(-1), (v - u[:, None]).relu().sum(-1)
        out = ours.theta * least - ours.alpha * mine - ours.beta * theirs
        torch.autograd.grad(out, [part, *ours.parameters()], outer[:n, :m])

    what = f"min, subtractmatch by feature, n={n}, m={m}, k={K}"
    return Row(what, "all pairs times features", _ratio(_training(ours, part, outer[:n, :m]), naive, 7))


def ratios() -> list[Row]:
    """All rows of this benchmark."""
    if importlib.util.find_spec("tversky") is None:
        return [Row(SETTING, PEER, skipped="tversky is not installed: pip install tversky")]
    x, outer = torch.randn(N, D, requires_grad=True), torch.randn(N, M)
    return [*training_rows(x, outer), evaluation_row(), feature_row(x, outer)]
