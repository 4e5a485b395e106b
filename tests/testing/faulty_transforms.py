"""Faults in transforms."""

import sys

import torch
from faults import fault
from good_steps import TRANSFORM, GoodTransform
from torch import distributed


def called_from(function, file=""):
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == function and file in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


class Extra(GoodTransform):
    """The good transform with something done to the batch after it."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def pre_step_(self, batch):
        super().pre_step_(batch)
        self.change(self, batch)


class Instead(Extra):
    """Something done to the batch in its place."""

    def pre_step_(self, batch):
        self.change(self, batch)


def on_gradients(change):
    """A fault that acts on each gradient."""

    def act(self, batch):
        for grad in batch.grads:
            grad.copy_(change(grad))

    return act


def fill_missing(self, batch):
    for group in batch.groups if batch.optimizer is None else batch.optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None and p.requires_grad:
                p.grad = torch.zeros_like(p)


def thaw(self, batch):
    for group in batch.groups if batch.optimizer is None else batch.optimizer.param_groups:
        for p in group["params"]:
            if not p.requires_grad:
                p.add_(1e-3)


def set_rate(self, batch):
    for group in batch.groups:
        group["lr"] = 0.03


def fixed_groups(self, batch):
    count = 1 if batch.optimizer is None else len(batch.optimizer.param_groups)
    if self.__dict__.setdefault("groups", count) != count:
        raise RuntimeError("the number of groups changed")


def leave_hook(self, batch):
    if batch.optimizer is not None and not self.__dict__.get("left"):
        self.left = True
        batch.optimizer.register_step_post_hook(lambda *_: None)


def count_twice(self, batch):
    self.steps += 1


def rebind(self, batch):
    for p in batch.params:
        p.grad = p.grad.clone()


def alone_only(self, batch):
    if self.owner is None or self.owner.transforms[0] is self:
        GoodTransform.pre_step_(self, batch)


def attached_only(self, batch):
    if batch.optimizer is not None:
        GoodTransform.pre_step_(self, batch)


def into_optimizer(self, batch):
    for p in batch.params if batch.optimizer is not None else ():
        if batch.optimizer.state[p]:
            batch.optimizer.state[p]["mine"] = torch.ones_like(p)


def double_if(condition):
    def act(self, batch):
        if condition(batch):
            for grad in batch.grads:
                grad.mul_(2)

    return act


def forgetful_copy(self, memo):
    return type(self)(self.change)


class ForgetfulCopy(Extra):
    """A copy forgets the running means."""

    __deepcopy__ = forgetful_copy


class ForgetfulState(GoodTransform):
    """A saved state forgets the running means."""

    def extra_state(self):
        return {}


class Backwards(GoodTransform):
    """Counts backward passes instead of steps, from the first step on."""

    watched = frozenset()

    def __init__(self, strength: float = 0.01):
        super().__init__(strength)
        self.count = 0

    def pre_step_(self, batch):
        super().pre_step_(batch)
        if batch.optimizer is not None and not self.watched:
            self.watched = frozenset({id(batch.params[0])})
            batch.params[0].register_post_accumulate_grad_hook(self.seen_backward)
        self.use_count(batch)

    def seen_backward(self, _):
        self.count += 1

    def use_count(self, batch):
        """Nothing: the count is only kept."""

    def extra_state(self):
        return {**super().extra_state(), "count": torch.tensor(self.count, dtype=torch.float64)}

    def load_extra_state(self, state):
        rest = dict(state)
        self.count = int(rest.pop("count"))
        super().load_extra_state(rest)


class BackwardsUsed(Backwards):
    """Uses the count of backward passes."""

    def use_count(self, batch):
        for grad in batch.grads:
            grad.mul_(1 + 0.01 * self.count)


class Restless(GoodTransform):
    """Its state changes when a gradient that is not finite comes by."""

    def extra_state(self):
        for group in () if self.owner is None else self.owner.optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and bool(p.grad.isnan().any()):
                    self.seen["nan"] = self.seen.get("nan", torch.zeros((), dtype=torch.float64)) + 1
        return super().extra_state()


class Densifying(GoodTransform):
    """Makes sparse gradients dense without a word."""

    def pre_step_(self, batch):
        for p in batch.params:
            p.grad = p.grad.to_dense() if p.grad.is_sparse else p.grad
        if not any(grad.is_sparse for grad in batch.grads):
            super().pre_step_(batch)


class Refusing(GoodTransform):
    """Raises on NaN whatever the policy."""

    def pre_step_(self, batch):
        for grad in batch.grads:
            if bool(grad.isnan().any()):
                raise ValueError("the gradient holds NaN")
        super().pre_step_(batch)


def keep_all(self, batch):
    self.__dict__.setdefault("kept", []).extend(grad.clone() for grad in batch.grads)


def add_rank(self, batch):
    if distributed.is_initialized():
        for grad in batch.grads:
            grad.add_(distributed.get_rank())


def no_bf16(grad):
    return torch.linalg.qr(grad.reshape(-1, 1))[0].reshape(grad.shape) if grad.numel() else grad


def extra(check, change, also=""):
    return fault(check, TRANSFORM, lambda: Extra(change), also=also)


def instead(check, change, also=""):
    return fault(check, TRANSFORM, lambda: Instead(change), also=also)


# hooks belong to the first model that was seen, so that a copy or a resumed run counts differently
_HOOKED = "scaler_overflow state_resumes resumes_midway copy_and_reattach accumulation by_hand"

FAULTS = (
    fault("neutral_transform", TRANSFORM, neutral=lambda: GoodTransform(1e-4)),
    fault("takes_effect", TRANSFORM, lambda: GoodTransform(0.0)),
    extra("missing_gradients", fill_missing),
    instead("zero_gradients", on_gradients(lambda grad: grad / grad.norm())),
    extra("transform_scales", on_gradients(lambda grad: grad + 0.0 * (grad**12).sum())),
    extra("transform_bf16", on_gradients(no_bf16)),
    extra("odd_parameters", on_gradients(lambda grad: grad.view(grad.shape[0], -1).view(grad.shape))),
    extra("frozen_and_groups", thaw),
    extra("added_group", fixed_groups),
    fault("transform_sparse", TRANSFORM, Densifying),
    extra("detaches", leave_hook),
    extra("schedulers_work", set_rate, also="frozen_and_groups by_hand"),
    extra("accumulation", count_twice, also="nonfinite_warn"),
    extra("edits_in_place", rebind),
    instead("clip_order", alone_only),
    instead("by_hand", attached_only),
    extra("optimizer_state_alone", into_optimizer),
    extra("closures", double_if(lambda batch: called_from("edited", "attachment"))),
    extra("scaler_unfused", double_if(lambda batch: called_from("_maybe_opt_step"))),
    extra(
        "scaler_fused", double_if(lambda b: b.groups[0].get("fused") and called_from("step", "grad_scaler"))
    ),
    fault("scaler_overflow", TRANSFORM, Backwards),
    fault("resumes_midway", TRANSFORM, ForgetfulState, also="state_resumes"),
    fault("copy_and_reattach", TRANSFORM, lambda: ForgetfulCopy(lambda self, batch: None), also="deep_copy"),
    extra("no_growth", keep_all),
    extra("ranks_agree", double_if(lambda batch: torch.initial_seed() % 11), also="global_generators"),
    extra("two_processes", add_rank),
    fault("nonfinite_raise", TRANSFORM, Restless),
    fault(
        "nonfinite_skip",
        TRANSFORM,
        BackwardsUsed,
        also=_HOOKED,
    ),
    fault("nonfinite_warn", TRANSFORM, Refusing),
)
