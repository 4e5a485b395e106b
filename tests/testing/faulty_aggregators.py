"""Faults in aggregators."""

from faults import fault
from good_modules import AGGREGATOR, GoodAggregator
from torch import nn


class Bare(nn.Module):
    """An aggregator for its shape only."""

    kind = "aggregator"

    def forward(self, jacobian, /):
        if jacobian.dim() != 2 or bool(jacobian.isnan().any()):
            raise ValueError("jacobian must be a finite matrix.")
        return jacobian.detach().mean(0)


class Changed(GoodAggregator):
    """The mean of the gradients, with something done to it."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, jacobian, /):
        if not bool(jacobian.isfinite().all()):
            raise ValueError("jacobian must be finite, got NaN or Inf.")
        return self.change(jacobian.detach(), jacobian.detach().mean(0))


class Attached(GoodAggregator):
    """Forgets to detach."""

    def forward(self, jacobian, /):
        return super().forward(jacobian) + 0.0 * jacobian.sum(0)


class Lenient(GoodAggregator):
    """Takes tensors of any shape."""

    def __call__(self, jacobian, /):
        return nn.Module.__call__(self, jacobian)

    def forward(self, jacobian, /):
        return super().forward(jacobian) if jacobian.dim() == 2 else jacobian.mean(0)


class Blind(GoodAggregator):
    """Turns NaN into zero."""

    def forward(self, jacobian, /):
        return super().forward(jacobian.nan_to_num())


def narrow_only(jacobian, mean):
    if jacobian.shape[1] > 64:
        raise RuntimeError("too many parameters for this aggregator")
    return mean


def least_row(jacobian, mean):
    least = jacobian.norm(dim=1).min()
    return mean + 0.0 * (least / least)


def several(jacobian):
    return float(len(jacobian) > 1)


def changed(check, change, promise="", also=""):
    promises = frozenset(promise.split())
    return fault(check, AGGREGATOR, lambda: Changed(change), also=also, invariances=promises)


FAULTS = (
    fault("torchjd_aggregator", AGGREGATOR, Bare, invariances=frozenset()),
    changed("output_form", lambda jacobian, mean: mean.double()),
    changed("nasty_matrices", least_row, also="matrix_scales"),
    changed("matrix_scales", lambda jacobian, mean: mean + 0.0 * (jacobian**2).sum() ** 6),
    changed("one_task", lambda jacobian, mean: 0.5 * mean),
    changed("task_order", lambda jacobian, mean: jacobian[0], "permutation"),
    changed("scale_equivariance", lambda jacobian, mean: mean + 0.1 * several(jacobian), "scale"),
    changed("no_conflict", lambda jacobian, mean: mean, "non_conflict"),
    changed("row_space", lambda jacobian, mean: mean + 0.1 * several(jacobian), "row_space"),
    fault("no_graph_out", AGGREGATOR, Attached),
    changed("driven_by_torchjd", narrow_only),
    fault("not_a_matrix", AGGREGATOR, Lenient),
    fault("nonfinite_matrix", AGGREGATOR, Blind),
)
