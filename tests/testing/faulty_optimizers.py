"""Faults in optimizers."""

import torch
from faults import fault
from good_steps import OPTIMIZER, GoodOptimizer


class Undeclared(GoodOptimizer):
    """Has a default that its groups lack."""

    def __init__(self, params, lr: float = 0.05):
        super().__init__(params, lr)
        self.defaults["forgotten"] = 1


class Ascending(GoodOptimizer):
    """Steps the wrong way."""

    def update(self, group, params):
        super().update({**group, "maximize": not group["maximize"]}, params)


class Unchecked(GoodOptimizer):
    """Takes any learning rate."""

    def __init__(self, params, lr=0.05):
        super().__init__(params)
        for group in (self.defaults, *self.param_groups):
            group["lr"] = lr


class Coasting(GoodOptimizer):
    """Goes on by momentum where there is no gradient."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for p, state in self.state.items():
                if p.grad is None and p.requires_grad:
                    p.sub_(0.01 * state["velocity"])
        return loss


class OneRate(GoodOptimizer):
    """Uses the first group's learning rate everywhere."""

    def update(self, group, params):
        super().update({**group, "lr": self.param_groups[0]["lr"]}, params)


class FixedGroups(GoodOptimizer):
    """Trains the groups that it was built with."""

    def __init__(self, params, lr: float = 0.05):
        super().__init__(params, lr)
        self.defaults["count"] = None
        for group in self.param_groups:
            group["count"] = len(self.param_groups)

    def update(self, group, params):
        if group["count"] is not None:
            super().update(group, params)


class Each(GoodOptimizer):
    """Does something with every parameter first."""

    change = staticmethod(lambda p: None)

    def update(self, group, params):
        for p in params:
            self.change(p)
        super().update(group, params)


class SkippingSparse(GoodOptimizer):
    """Leaves sparse gradients out in silence."""

    def update(self, group, params):
        super().update(group, [p for p in params if not p.grad.is_sparse])


class NeverMaximizing(GoodOptimizer):
    """Ignores maximize."""

    def update(self, group, params):
        super().update({**group, "maximize": False}, params)


class OtherForeach(GoodOptimizer):
    """Steps further on the foreach path."""

    def update(self, group, params):
        super().update({**group, "lr": group["lr"] * (1.01 if group["foreach"] else 1.0)}, params)


class Silent(GoodOptimizer):
    """Keeps the loss to itself."""

    def step(self, closure=None):
        super().step(closure)


class Uncounted(GoodOptimizer):
    """Decays its rate by a count that is in no state."""

    count = 0

    def step(self, closure=None):
        self.count += 1
        return super().step(closure)

    def update(self, group, params):
        super().update({**group, "lr": group["lr"] * 0.9**self.count}, params)


class Deaf(GoodOptimizer):
    """Steps on by a fixed rate when the scheduler's is zero."""

    def update(self, group, params):
        super().update({**group, "lr": group["lr"] or 0.01}, params)


class FloatsOnly(GoodOptimizer):
    """Refuses a tensor rate, when it is too late."""

    def update(self, group, params):
        if isinstance(group["lr"], torch.Tensor):
            raise TypeError("lr must be a float, got a tensor.")
        super().update(group, params)


class Boasting(GoodOptimizer):
    """Says that it unscales by itself."""

    _step_supports_amp_scaling = True


class Hoarding(GoodOptimizer):
    """Keeps every gradient."""

    def update(self, group, params):
        self.__dict__.setdefault("kept", []).extend(p.grad.clone() for p in params)
        super().update(group, params)


class Seeded(GoodOptimizer):
    """Depends on the global seed."""

    def update(self, group, params):
        super().update({**group, "lr": group["lr"] * (1 + torch.initial_seed() % 11)}, params)


def no_compiling(p):
    if torch.compiler.is_compiling():
        p.add_(1.0)


def no_bf16(p):
    if p.numel() > 1:
        torch.linalg.qr(p.grad.to_dense().reshape(-1, 1))


def each(check, change, also=""):
    return fault(
        check,
        OPTIMIZER,
        type("Each", (Each,), {"__doc__": Each.__doc__, "change": staticmethod(change)}),
        also=also,
    )


FAULTS = (
    fault("torch_optimizer", OPTIMIZER, Undeclared),
    fault("descends", OPTIMIZER, Ascending),
    fault("neutral_optimizer", OPTIMIZER, neutral=lambda params: GoodOptimizer(params, lr=1e-4)),
    fault("bad_rates", OPTIMIZER, Unchecked),
    fault("optimizer_missing_gradients", OPTIMIZER, Coasting),
    fault("groups_apart", OPTIMIZER, OneRate),
    fault("optimizer_added_group", OPTIMIZER, FixedGroups),
    each("optimizer_dtypes", no_bf16),
    each("optimizer_odd_parameters", lambda p: p.view(-1)),
    fault("sparse_gradients", OPTIMIZER, SkippingSparse),
    fault("maximizes", OPTIMIZER, NeverMaximizing),
    fault("foreach_equals_loop", OPTIMIZER, OtherForeach),
    fault("optimizer_closures", OPTIMIZER, Silent),
    fault("optimizer_resumes", OPTIMIZER, Uncounted, also="deep_copy state_resumes"),
    fault("rate_is_followed", OPTIMIZER, Deaf, also="neutral_optimizer"),
    fault("tensor_rate", OPTIMIZER, FloatsOnly),
    fault("optimizer_scaler", OPTIMIZER, Boasting),
    each("optimizer_compiles", no_compiling),
    fault("optimizer_no_growth", OPTIMIZER, Hoarding),
    fault("optimizer_ranks", OPTIMIZER, Seeded, also="global_generators"),
)
