"""Faults in signals, layers and objectives."""

import torch
from faults import fault
from good_modules import LAYER, OBJECTIVE, SIGNAL, GoodLayer, GoodObjective, GoodSignal
from torch import nn


class Identity(torch.autograd.Function):
    """Identity whose gradient comes back times ``factor``; without a rule for vmap."""

    @staticmethod
    def forward(x, factor):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class VmappedIdentity(Identity):
    """The same, with a rule for vmap."""

    generate_vmap_rule = True


class OnceIdentity(torch.autograd.Function):
    """Identity that cannot be differentiated twice."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, factor):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.factor, None


class OldIdentity(torch.autograd.Function):
    """Identity in the style that torch.func cannot transform."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class HiddenWeight(torch.autograd.Function):
    """Scales by a weight that it was not given as an input, and fills its gradient on the side."""

    @staticmethod
    def forward(ctx, x, holder):
        ctx.holder = holder
        ctx.save_for_backward(x)
        return x * holder.hidden.detach()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if torch._C._current_graph_task_id() != -1 and ctx.holder.filling:
            ctx.holder.hidden.grad = (grad * x).sum().reshape(())
        return grad * ctx.holder.hidden.detach(), None


class Hidden(GoodLayer):
    """Has a weight that autograd does not see."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Parameter(torch.ones(()))
        self.filling = True

    def forward(self, x):
        return HiddenWeight.apply(super().forward(x), self)


class After(GoodLayer):
    """A layer with something done to its output."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(super().forward(x))


class Before(GoodLayer):
    """A layer with something done to its input."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return super().forward(self.change(x))


class Spare(GoodLayer):
    """Has a parameter that it never uses."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Parameter(torch.zeros(2))


class Counting(GoodLayer):
    """Counts its calls, in eval mode as well."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return super().forward(x)


def broken_graph(x):
    torch._dynamo.graph_break()
    return x


def autocast_blind(x):
    return x * 0.0 if torch.is_autocast_enabled("cpu") else x


def watching_autograd(x):
    return x if torch.is_grad_enabled() else 2.0 * x


def after(change):
    return lambda: After(change)


def before(change):
    return lambda: Before(change)


class Shifting(GoodSignal):
    """Adds a constant on the way forward."""

    def forward(self, x):
        return super().forward(x) + 0.5


class Normalising(GoodSignal):
    """Divides the gradient by its norm."""

    def forward(self, x):
        return Normalised.apply(x)


class Normalised(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad / grad.norm()


class Once(GoodSignal):
    """Cannot be differentiated twice."""

    def forward(self, x):
        return OnceIdentity.apply(x, -0.5)


class Row(GoodObjective):
    """Returns its loss with an axis too many."""

    def __init__(self):
        super().__init__()
        self.reduction = None

    def forward(self, x, y):
        self.reduction = "mean"
        loss = super().forward(x, y).reshape(1)
        self.reduction = None
        return loss


class HalfSum(GoodObjective):
    """Halves the sum."""

    def forward(self, x, y):
        loss = super().forward(x, y)
        return 0.5 * loss if self.reduction == "sum" else loss


FAULTS = (
    fault("dtypes", LAYER, after(torch.Tensor.double)),
    fault("noncontiguous", LAYER, before(lambda x: x.view(-1).view(x.shape))),
    fault("batch_of_one", LAYER, after(lambda x: x / (x.new_tensor(x.shape[0]) - 1))),
    fault("empty_batch", LAYER, after(lambda x: x + 0 * x.amax())),
    fault("autocast", LAYER, after(autocast_blind)),
    fault("compiles", LAYER, after(broken_graph)),
    fault("func_grad", LAYER, after(OldIdentity.apply), also="func_vmap"),
    fault("func_vmap", LAYER, after(lambda x: Identity.apply(x, 1.0))),
    fault("without_autograd", LAYER, after(watching_autograd)),
    fault("scales", LAYER, before(lambda x: x * (x.abs().sum() / x.abs().sum()))),
    fault(
        "explicit_parameters", LAYER, Hidden, also="gradcheck parameters_alive autocast func_grad func_vmap"
    ),
    fault("forward_values", SIGNAL, Shifting),
    fault("declared_backward", SIGNAL, backward=lambda grad, x: (0.5 * grad,)),
    fault("double_backward", SIGNAL, Once),
    fault("neutral_signal", SIGNAL, neutral=lambda: GoodSignal(1.0 + 1e-6)),
    fault("gradient_scales", SIGNAL, Normalising, backward=None),
    fault("gradcheck", LAYER, after(lambda x: VmappedIdentity.apply(x, 1.01))),
    fault("gradgradcheck", LAYER, after(lambda x: OnceIdentity.apply(x, 1.0))),
    fault("output_shape", LAYER, shape=lambda shape: (shape[0], 4)),
    fault("parameters_alive", LAYER, Spare),
    fault("eval_is_pure", LAYER, Counting, also="func_grad"),
    fault("scalar", OBJECTIVE, Row),
    fault("reductions", OBJECTIVE, HalfSum),
    fault("neutral_objective", OBJECTIVE, neutral=lambda: GoodObjective(1e-6)),
)
