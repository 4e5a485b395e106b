"""Faults in what runs something: recompute, probe, search, learner, field."""

from dataclasses import replace

import numpy as np
import torch
from faults import fault
from faulty_modules import VmappedIdentity
from good_runs import (
    FIELD,
    LEARNED_FIELD,
    LEARNER,
    PROBE,
    RECOMPUTE,
    SEARCH,
    SOLUTION,
    GoodField,
    GoodLearner,
    GoodProbe,
    GoodRecompute,
    GoodSearch,
    LearnedField,
    Slope,
    follow,
)
from sklearn.base import BaseEstimator, ClassifierMixin
from torch.utils.checkpoint import checkpoint


class Shifted(GoodRecompute):
    """Shifts the output."""

    def __call__(self, model, *arguments):
        return super().__call__(model, *arguments) + 1e-6


class Steeper(GoodRecompute):
    """Scales the gradient."""

    def __call__(self, model, *arguments):
        return VmappedIdentity.apply(super().__call__(model, *arguments), 1.01)


class NewDice(GoodRecompute):
    """Draws anew in the second pass."""

    keep_rng = False


class TwiceCounted(GoodRecompute):
    """Updates buffers in both passes."""

    keep_buffers = False


class Storing(GoodRecompute):
    """Stores everything."""

    def __call__(self, model, *arguments):
        return model(*arguments)


class WatchingAutograd(GoodRecompute):
    """Gives other values without autograd."""

    def __call__(self, model, *arguments):
        out = super().__call__(model, *arguments)
        return out if torch.is_grad_enabled() else 2 * out


class Hooking(GoodRecompute):
    """Leaves a hook behind."""

    def __call__(self, model, *arguments):
        model.register_forward_hook(lambda *_: None)
        return super().__call__(model, *arguments)


class Reentrant(GoodRecompute):
    """Works with backward() alone."""

    def __call__(self, model, *arguments):
        if not torch.is_grad_enabled():
            return model(*arguments)
        inputs = [each if each.requires_grad else each.clone().requires_grad_() for each in arguments]
        modes = self.buffers_of(model)

        def call(*given):
            if torch.is_grad_enabled():
                with modes:
                    return model(*given)
            return model(*given)

        return checkpoint(call, *inputs, use_reentrant=True)


class Nudging(GoodProbe):
    """Moves a parameter."""

    def __call__(self, model, *batch):
        with torch.no_grad():
            next(model.parameters()).add_(1e-6)
        return super().__call__(model, *batch)


class Clearing(GoodProbe):
    """Clears the gradients."""

    def __call__(self, model, *batch):
        model.zero_grad()
        return super().__call__(model, *batch)


class Sleeping(GoodProbe):
    """Leaves the model in eval mode."""

    def __call__(self, model, *batch):
        result = super().__call__(model, *batch)
        model.eval()
        return result


class Littering(GoodProbe):
    """Leaves its hook when the model raises."""

    def __call__(self, model, *batch):
        handle = model.register_forward_hook(lambda *_: None)
        result = super().__call__(model, *batch)
        handle.remove()
        return result


class Reseeding(GoodProbe):
    """Moves the global generator when the model raises."""

    def __call__(self, model, *batch):
        state = torch.get_rng_state()
        torch.rand(1)
        result = super().__call__(model, *batch)
        torch.set_rng_state(state)
        return result


class Loose(GoodProbe):
    """Returns a dictionary."""

    def __call__(self, model, *batch):
        return vars(super().__call__(model, *batch))


class Trusting(GoodProbe):
    """Measures something else when the user has switched autograd off."""

    def __call__(self, model, *batch):
        result = super().__call__(model, *batch)
        return result if torch.is_grad_enabled() else replace(result, norms={})


class Replacing(GoodProbe):
    """Leaves a copy of a parameter in the model."""

    def __call__(self, model, *batch):
        result = super().__call__(model, *batch)
        owner = next(each for each in model.modules() if each._parameters)
        name, parameter = next(iter(owner._parameters.items()))
        fresh = torch.nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        fresh.grad = parameter.grad
        owner._parameters[name] = fresh
        return result


class Rewriting(GoodProbe):
    """Puts the values of parameters back by writing into them."""

    def __call__(self, model, *batch):
        kept = [each.detach().clone() for each in model.parameters()]
        try:
            return super().__call__(model, *batch)
        finally:
            with torch.no_grad():
                for parameter, values in zip(model.parameters(), kept, strict=True):
                    parameter.copy_(values)


class Odd(GoodSearch):
    """Has a status of its own."""

    def run(self, gradient, budget=None, seed=0):
        return replace(super().run(gradient, budget, seed), status="done")


class Biased(GoodSearch):
    """Is off by a little."""

    def run(self, gradient, budget=None, seed=0):
        result = super().run(gradient, budget, seed)
        return replace(result, value=result.value + 0.01)


class Greedy(GoodSearch):
    """Spends more than its budget."""

    def run(self, gradient, budget=None, seed=0):
        return super().run(gradient, 200, seed)


class Raising(GoodSearch):
    """Raises where a status would do."""

    def run(self, gradient, budget=None, seed=0):
        result = super().run(gradient, budget, seed)
        if result.status == "diverged":
            raise ArithmeticError(result.message)
        return result


class GlobalStart(GoodSearch):
    """Starts where the global generator's seed says."""

    def start(self, seed):
        return super().start(seed) + torch.initial_seed()


class CarryingOver(GoodSearch):
    """Carries something over from run to run."""

    runs = 0

    def run(self, gradient, budget=None, seed=0):
        result = super().run(gradient, budget, seed)
        self.runs += 1
        return replace(result, value=result.value + 1e-6 * self.runs)


class Dozing(GoodSearch):
    """Leaves the user's model in eval mode."""

    def run(self, gradient, budget=None, seed=0):
        self.model.eval()
        return super().run(gradient, budget, seed)


class TensorLoss(GoodLearner):
    """Returns its loss as a tensor."""

    def step(self, batch):
        return {name: torch.tensor(value) for name, value in super().step(batch).items()}


class Upside(GoodLearner):
    """Reports its loss with the wrong sign."""

    def step(self, batch):
        return {name: -value for name, value in super().step(batch).items()}


class Flipped(GoodLearner):
    """Predicts the other class."""

    def predict(self, x):
        return 1 - super().predict(x)


class Peeking(GoodLearner):
    """Would take labels."""

    def predict(self, x, labels=None):
        return super().predict(x)


class Wearing(GoodLearner):
    """Forgets a little with every prediction."""

    def predict(self, x):
        answer = super().predict(x)
        self.weight = 0.99 * self.weight
        return answer


class Relative(GoodLearner):
    """Compares the examples of a batch with each other."""

    def predict(self, x):
        scores = self.scores(x)
        return (scores > scores.mean()).long() if len(x) > 1 else torch.full((1,), 2)


class Grown(GoodLearner):
    """Predicts with a graph."""

    def predict(self, x):
        return super().predict(x).double().requires_grad_()


class Tracing(GoodLearner):
    """Finds its scores with an autograd graph that it does not need."""

    def scores(self, x):
        self.weight.requires_grad_()
        score = super().scores(x).sigmoid().logit()
        self.weight.requires_grad_(False)
        return score.detach()


class Paired(GoodLearner):
    """Needs two examples for its loss."""

    def step(self, batch):
        return {"loss": super().step(batch)["loss"] + 0.0 * batch[0].std(0).sum().item()}


class Hollow(GoodLearner):
    """Learns from nothing."""

    def admit(self, x):
        if len(x):
            super().admit(x)

    def step(self, batch):
        return super().step(batch) if len(batch[0]) else {"loss": 0.0}


class Late(GoodLearner):
    """Looks at the batch when it has learned from it."""

    def admit(self, x):
        if not len(x):
            super().admit(x)

    def step(self, batch):
        losses = super().step(batch)
        GoodLearner.admit(self, batch[0])
        return losses


class Forgetful(ClassifierMixin, BaseEstimator):
    """Answers without having been fitted, and takes anything."""

    kind = "learner"

    def fit(self, x, y):
        self.centres_ = np.stack([np.asarray(x)[np.asarray(y) == k].mean(0) for k in (0, 1)])
        return self

    def predict(self, x):
        gaps = ((np.asarray(x)[:, None] - self.centres_) ** 2).sum(-1)
        return gaps.argmin(1)


class Doubled(GoodField):
    """Answers in float64."""

    def __call__(self, x):
        return super().__call__(x).double()


class DoubledSlope(LearnedField):
    """Answers in float64, inside its dataclass."""

    def forward(self, x, t):
        return Slope(super().forward(x, t).value.double())


class Mixed(GoodField):
    """Lets the rows of a batch talk."""

    def __call__(self, x):
        return super().__call__(x) + (1e-3 * (x - x.mean(0)) if len(x) else 0.0)


class Aligned(LearnedField):
    """Multiplies times along the features instead of the rows, where there is one for each."""

    def forward(self, x, t):
        if isinstance(t, torch.Tensor) and t.dim() and len(t):
            return Slope(super().forward(x, t).value * (1.0 + 1e-3 * t[0]))
        return super().forward(x, t)


class MixedSlope(LearnedField):
    """Lets the rows of a batch talk, inside its dataclass."""

    def forward(self, x, t):
        return Slope(super().forward(x, t).value + (1e-3 * (x - x.mean(0)) if len(x) else 0.0))


def follow_once_more(field, steps):
    field(torch.ones(2, 1, dtype=torch.float64), 0.0)
    return follow(field, steps)


def follow_with_graph(field, steps):
    with torch.enable_grad():
        return follow.__wrapped__(field, steps)


def follow_with_noise(field, steps):
    return follow(field, steps) + 1e-9 * torch.rand(2, 1)


def euler(field, steps):
    x = torch.ones(2, 1, dtype=torch.float64)
    for _ in range(steps):
        x = x + field(x) / steps
    return x


FAULTS = (
    fault("same_outputs", RECOMPUTE, Shifted, also="same_random_numbers recompute_without_autograd"),
    fault("same_gradients", RECOMPUTE, Steeper, also="same_random_numbers recompute_explicit"),
    fault("same_random_numbers", RECOMPUTE, NewDice),
    fault("same_batch_statistics", RECOMPUTE, TwiceCounted),
    fault("stored_bytes", RECOMPUTE, Storing),
    fault("recompute_without_autograd", RECOMPUTE, WatchingAutograd),
    fault("recompute_leaves_no_trace", RECOMPUTE, Hooking),
    fault("recompute_explicit", RECOMPUTE, Reentrant, also="same_batch_statistics"),
    fault("model_values", PROBE, Nudging, also="grad_mode_off waiting_graph"),
    fault("model_gradients", PROBE, Clearing),
    fault("model_modes", PROBE, Sleeping),
    fault("model_hooks", PROBE, Littering),
    fault("model_objects", PROBE, Replacing),
    fault("waiting_graph", PROBE, Rewriting),
    fault("random_state", PROBE, Reseeding),
    fault("frozen_result", PROBE, Loose),
    fault("grad_mode_off", PROBE, Trusting),
    fault("result_form", SEARCH, Odd),
    fault("closed_form", SEARCH, Biased),
    fault("budget_kept", SEARCH, Greedy),
    fault("failure_is_a_status", SEARCH, Raising),
    fault("seeded_search", SEARCH, GlobalStart, also="global_generators"),
    fault("reusable_search", SEARCH, CarryingOver),
    fault("searched_model_left_alone", SEARCH, Dozing),
    fault("losses_form", LEARNER, TensorLoss),
    fault("loss_falls", LEARNER, Upside),
    fault("separates", LEARNER, Flipped),
    fault("predict_takes_no_labels", LEARNER, Peeking),
    fault("predict_is_pure", LEARNER, Wearing),
    fault("one_example", LEARNER, Relative),
    fault("graph_bounded", LEARNER, Tracing),
    fault("one_example_step", LEARNER, Paired),
    fault("no_examples", LEARNER, Hollow),
    fault("nonfinite_batch", LEARNER, Late),
    fault("scikit_learn", LEARNER, Forgetful),
    fault("predictions_without_graph", LEARNER, Grown),
    fault("field_closed_form", FIELD, solution=SOLUTION[:1, None] * 0.5, order=None),
    fault("solver_order", FIELD, solve=euler, tolerance=0.01, evaluations=None),
    fault("conversions_invert", FIELD, conversions=lambda field, x: [(x, field(x))]),
    fault("field_dtypes", FIELD, Doubled),
    fault("rows_apart", FIELD, Mixed, also="conversions_invert"),
    fault("rows_apart", LEARNED_FIELD, MixedSlope),
    fault("field_dtypes", LEARNED_FIELD, DoubledSlope),
    fault("times_broadcast", LEARNED_FIELD, Aligned),
    fault("field_evaluations", LEARNED_FIELD, solve=follow_once_more),
    fault("solve_keeps_no_graph", LEARNED_FIELD, solve=follow_with_graph),
    fault("solve_repeats", LEARNED_FIELD, solve=follow_with_noise),
)
