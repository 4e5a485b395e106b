"""Faults in what all kinds share: documentation, copies, state, traces, refusals."""

from fractions import Fraction

import torch
from faults import fault
from good_modules import LAYER, SIGNAL, GoodLayer, GoodSignal
from good_runs import FIELD, LEARNER, GoodField, GoodLearner


class Undocumented(GoodField):
    pass


class Unreadable(GoodField):
    """Shows the default repr."""

    __repr__ = object.__repr__


class Shared(GoodField):
    """Counts its calls in the class."""

    calls = 0

    def __call__(self, x):
        type(self).calls += 1
        return super().__call__(x) + 1e-13 * type(self).calls


class Singleton(GoodField):
    """Copies to itself, and remembers how often it was called."""

    def __init__(self, rate: float = 1.0):
        super().__init__(rate)
        self.calls = 0

    def __deepcopy__(self, memo):
        return self

    def __call__(self, x):
        self.calls += 1
        return super().__call__(x) + 1e-12 * self.calls


class Drawing(GoodField):
    """Moves the global generator."""

    def __call__(self, x):
        torch.rand(1)
        return super().__call__(x)


class Editing(GoodField):
    """Edits its input, the same way every time."""

    def __call__(self, x):
        return super().__call__(x.clamp_(-1.0, 1.0))


class Training(GoodSignal):
    """Switches itself to training mode."""

    def forward(self, x):
        self.train()
        return super().forward(x)


class PlainTensor(GoodLayer):
    """Keeps a constant as a plain tensor."""

    def __init__(self):
        super().__init__()
        self.offset = torch.zeros(())

    def forward(self, x):
        return super().forward(x) + self.offset.to(x.dtype)


class Keeping(GoodLearner):
    """Keeps the graph of its last loss, which a deep copy leaves out."""

    def step(self, batch):
        weight = self.weight.clone().requires_grad_()
        self.last = {"loss": (weight**2).sum()}
        return super().step(batch)

    def __deepcopy__(self, memo):
        twin = type(self)()
        twin.load_state_dict(self.state_dict())
        return twin


class Forgetting(GoodLearner):
    """Leaves the velocity out of its state."""

    def state_dict(self):
        return {"format_version": 1, "weight": self.weight.clone()}

    def load_state_dict(self, state):
        super().load_state_dict({**state, "velocity": torch.zeros(9)} if "weight" in state else state)


class Exotic(GoodLearner):
    """Saves an object that only pickle knows."""

    def state_dict(self):
        return {**super().state_dict(), "rate": Fraction(1, 10)}

    def load_state_dict(self, state):
        if state.get("format_version") != 1:
            raise ValueError("format_version must be 1.")
        if set(state) != set(self.state_dict()):
            raise ValueError("state has other keys.")
        self.weight, self.velocity = state["weight"].clone(), state["velocity"].clone()


class Gullible(GoodLearner):
    """Takes what it finds in a state."""

    def load_state_dict(self, state):
        if state.get("format_version", 1) != 1:
            raise ValueError("format_version must be 1.")
        self.weight = state.get("weight", self.weight).clone()
        self.velocity = state.get("velocity", self.velocity).clone()


class Futurist(GoodLearner):
    """Loads states of any version."""

    def load_state_dict(self, state):
        super().load_state_dict({**state, **({"format_version": 1} if "format_version" in state else {})})


class Aliasing(GoodLearner):
    """Hands out its own tensors."""

    def state_dict(self):
        return {"format_version": 1, "weight": self.weight, "velocity": self.velocity}


class Unchecked(GoodField):
    """Takes any rate."""

    def __init__(self, rate: float = 1.0):
        self.rate = rate


class Terse(GoodField):
    """Refuses without a reason."""

    def __init__(self, rate: float = 1.0):
        if isinstance(rate, str) or rate != rate:
            raise ValueError("bad argument")
        self.rate = rate


FAULTS = (
    fault("docstring", FIELD, Undocumented),
    fault("readable_repr", FIELD, Unreadable),
    fault("independent_instances", FIELD, Shared, also="deep_copy global_generators solve_repeats"),
    fault("deep_copy", FIELD, Singleton),
    fault("global_generators", FIELD, Drawing, also="solve_repeats"),
    fault("inputs_left_alone", FIELD, Editing),
    fault("modes_and_hooks", SIGNAL, Training),
    fault("tensors_in_state", LAYER, PlainTensor),
    fault("no_graph_kept", LEARNER, Keeping, also="graph_bounded"),
    fault("state_resumes", LEARNER, Forgetting),
    fault("state_weights_only", LEARNER, Exotic),
    fault("state_foreign", LEARNER, Gullible),
    fault("state_newer", LEARNER, Futurist),
    fault("state_is_a_snapshot", LEARNER, Aliasing),
    fault("bad_arguments", FIELD, Unchecked),
    fault("error_messages", FIELD, Terse),
)
