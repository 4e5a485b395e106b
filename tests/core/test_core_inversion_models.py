"""Gradient inversion: models of the field, and models that need care."""

import pytest
import torch
from inversion_parts import batch, perceptron, seeded, shared
from torch import nn
from torch.nn import functional

from pullback.core.inversion import GradientInversion
from pullback.core.inversion_victim import unwrapped

LOSS = functional.cross_entropy


def attack(model, loss_fn=LOSS, **settings):
    return GradientInversion(model, loss_fn, **{"max_iters": 12, "tolerance": 0.0, **settings})


def attacked(model, x, y, loss_fn=LOSS, **settings):
    rows = shared(model, x, y, loss_fn)
    return attack(model, loss_fn, **settings).reconstruct(rows, labels=y, input_shape=x.shape)


def works(result):
    return (
        result.status == "max_steps"
        and bool(result.images.isfinite().all())
        and result.loss < result.trace["loss"][0]
    )


# --- models ---------------------------------------------------------------------------------------------------------


def image_batch(size=1):
    generator = torch.Generator().manual_seed(2)
    return torch.rand(size, 1, 8, 8, generator=generator), torch.arange(size) % 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.relu(x + self.norm(self.conv(x)))


class Attention(nn.Module):
    """Fused attention, whose kernels have no second derivative."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.head = nn.Linear(16, 8), nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x):
        tokens = self.embed(x.reshape(len(x), 4, 16))
        q, k, v = (each.view(len(x), 4, 2, 4).mT for each in self.qkv(tokens).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(
            q.mT.contiguous(), k.mT.contiguous(), v.mT.contiguous()
        )
        return self.head(mixed.flatten(1).view(len(x), 4, 8).mean(1))


MODELS = {
    "lenet": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 4)),
    "resnet": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), Block(), Block(), nn.Flatten(), nn.Linear(144, 4)),
    "attention": Attention,
    "transformer": lambda: nn.Sequential(
        nn.Flatten(2), nn.Linear(64, 8), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        nn.Flatten(), nn.Linear(8, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_of_the_field_can_be_attacked(name):
    model = seeded(MODELS[name]()).eval()
    assert works(attacked(model, *image_batch(2), bounds=(0.0, 1.0)))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = kind(8, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.rnn(x[:, 0])[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_models_can_be_attacked(kind):
    assert works(attacked(seeded(Recurrent(kind)), *image_batch()))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.embed(x).mean(1))


def test_models_on_whole_numbers_are_refused():
    model = seeded(Tokens())
    x, y = torch.tensor([[1, 2, 3]]), torch.tensor([0])
    with pytest.raises(ValueError, match="embeds whole numbers, which cannot be searched by gradients"):
        attacked(model, x, y)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad


class Custom(nn.Module):
    def forward(self, x):
        return Once.apply(x)


class Flash(nn.Module):
    """A kernel called by its own name, around the switch that turns such kernels off."""

    def forward(self, x):
        rows = x.flatten(2)[:, None]
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(rows, rows, rows)[0]


@pytest.mark.parametrize("layer", [Custom, Flash])
def test_operations_without_second_derivative_are_named(layer):
    model = seeded(nn.Sequential(nn.Conv2d(1, 2, 3), layer(), nn.Tanh(), nn.Flatten(), nn.Linear(72, 4)))
    name = {Custom: "Once", Flash: "flash_attention_for_cpu_backward"}[layer]
    with pytest.raises(RuntimeError, match=f"model must be differentiable twice, got .*{name}"):
        attacked(model, *image_batch())


def test_wrappers_are_looked_through():
    model = perceptron()
    x, y = batch()
    rows = shared(model, x, y)
    plain = attack(model).reconstruct(rows, labels=y, input_shape=x.shape)
    compiled, parallel = torch.compile(model, backend="eager"), nn.DataParallel(model)
    for wrapped in (compiled, parallel, nn.DataParallel(compiled)):
        assert unwrapped(wrapped) is model
        result = attack(wrapped).reconstruct(rows, labels=y, input_shape=x.shape)
        assert torch.equal(result.trace["loss"], plain.trace["loss"])


def test_compiled_parts_run_uncompiled():
    model = seeded(nn.Sequential(nn.Conv2d(1, 4, 3), Block(), nn.Flatten(), nn.Linear(144, 4))).eval()
    x, y = image_batch()
    rows = shared(model, x, y)
    plain = attack(model).reconstruct(rows, labels=y, input_shape=x.shape)
    runs = []

    def backend(graph, inputs):
        return lambda *args: runs.append(1) or graph(*args)

    def used():
        runs.clear()
        with torch.no_grad():
            model(x)
        return bool(runs)

    model[1].compile(backend=backend)
    assert used()
    runs.clear()
    again = attack(model).reconstruct(rows, labels=y, input_shape=x.shape)
    assert not runs
    assert used()
    assert torch.equal(again.trace["loss"], plain.trace["loss"])


BAD_MODELS = {
    "half": (lambda: perceptron().bfloat16(), TypeError, "model must be in float32 or float64, got '0.weight'"),
    "empty": (lambda: nn.Sequential(nn.ReLU()), ValueError, "model must have parameters, got none"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), ValueError, "model must be initialised, got '0.weight'"),
    "mixed": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4).double()), ValueError, "on one device in one dtype",
    ),
    "function": (lambda: functional.relu, TypeError, "model must be of type Module, got"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("case", BAD_MODELS)
def test_models_that_cannot_be_attacked_are_refused(case):
    make, kind, message = BAD_MODELS[case]
    with pytest.raises(kind, match=message):
        attack(make()).reconstruct([torch.ones(1)], labels=torch.tensor([0]), input_shape=(1, 6))


def test_models_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"must not hold inference tensors, got '0\.weight'"):
        attack(model).reconstruct(
            [torch.ones(4, 6), torch.ones(4)], labels=torch.tensor([0]), input_shape=(1, 6)
        )
