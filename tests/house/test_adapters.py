"""Adapters against the official signatures of the trainers' callbacks, and without the trainers."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from pullback.adapters import huggingface, lightning
from pullback.adapters.driver import plain
from pullback.core.kinds import StepBatch, Transform
from pullback.core.state import StateError


class Double(Transform):
    def pre_step_(self, batch: StepBatch) -> None:
        torch._foreach_mul_(batch.grads, 2.0)


class Shrink(Transform):
    when = "post"

    def post_step_(self, batch: StepBatch) -> None:
        torch._foreach_mul_(batch.params, 0.5)


class Wrapper:
    """As Lightning's optimizer: the real one is inside."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytorch = ModuleType("lightning.pytorch")
    pytorch.Callback = type("Callback", (), {})
    package = ModuleType("lightning")
    package.pytorch = pytorch
    transformers = ModuleType("transformers")
    transformers.TrainerCallback = type("TrainerCallback", (), {})
    for module in (package, pytorch, transformers):
        module.__spec__ = SimpleNamespace(name=module.__name__)
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def loop() -> SimpleNamespace:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(before_step=lambda: None) -> float:
        optimizer.zero_grad()
        model(torch.ones(1, 1)).sum().backward()
        before_step()
        optimizer.step()
        return model.weight.item()

    return SimpleNamespace(
        model=model, optimizer=optimizer, step=step, trainer=SimpleNamespace(optimizers=[optimizer])
    )


@pytest.mark.usefixtures("trainers")
def test_lightning_edits_inside_the_step_after_clipping(loop: SimpleNamespace) -> None:
    callback = lightning.transform_callback(Double())
    callback.on_train_start(loop.trainer, loop.model)

    def clip() -> None:
        callback.on_before_optimizer_step(loop.trainer, loop.model, loop.optimizer)
        torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 0.5)

    assert loop.step(clip) == pytest.approx(1 - 0.1 * 2 * 0.5)
    callback.on_train_end(loop.trainer, loop.model)
    loop.model.weight.data.fill_(1.0)
    assert loop.step() == pytest.approx(0.9)


@pytest.mark.usefixtures("trainers")
def test_lightning_edits_before_clipping_when_asked(loop: SimpleNamespace) -> None:
    callback = lightning.transform_callback(Double(), before_clipping=True)
    callback.on_train_start(loop.trainer, loop.model)

    def clip() -> None:
        callback.on_before_optimizer_step(loop.trainer, loop.model, loop.optimizer)
        torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 0.5)

    assert loop.step(clip) == pytest.approx(1 - 0.1 * 0.5)
    assert callback.driver.transforms[0].steps == 1
    with pytest.raises(ValueError, match=r"before_clipping needs .* got Shrink"):
        lightning.transform_callback(Shrink(), before_clipping=True)


@pytest.mark.usefixtures("trainers")
@pytest.mark.parametrize("before_clipping", [False, True])
def test_lightning_state_is_kept_over_a_restart(loop: SimpleNamespace, before_clipping: bool) -> None:
    first = lightning.transform_callback(Double(), before_clipping=before_clipping)
    first.on_train_start(loop.trainer, loop.model)
    loop.step(lambda: first.on_before_optimizer_step(loop.trainer, loop.model, loop.optimizer))
    saved = first.state_dict()
    first.on_exception(loop.trainer, loop.model, RuntimeError())
    second = lightning.transform_callback(Double(), before_clipping=before_clipping)
    second.load_state_dict(saved)
    second.on_train_start(loop.trainer, loop.model)
    assert second.driver.transforms[0].steps == 1
    assert second.state_dict() == saved


@pytest.mark.usefixtures("trainers")
def test_lightning_refuses_several_optimizers_and_foreign_states_before_clipping(
    loop: SimpleNamespace,
) -> None:
    callback = lightning.transform_callback(Double(), Double(), before_clipping=True)
    with pytest.raises(ValueError, match="one optimizer, got 2"):
        callback.on_train_start(SimpleNamespace(optimizers=[loop.optimizer] * 2), loop.model)
    other = lightning.transform_callback(Double(), Double())
    other.on_train_start(loop.trainer, loop.model)
    for state in (other.state_dict(), {"updates": [Double().state_dict()]}, {"updates": [{}, {}]}):
        with pytest.raises(StateError):
            callback.load_state_dict(state)


@pytest.mark.usefixtures("trainers")
def test_lightning_can_keep_the_states_of_two_callbacks_apart() -> None:
    made = [lightning.transform_callback(Double(), before_clipping=flag) for flag in (False, True)]
    made.append(lightning.transform_callback(Shrink()))
    assert len({callback.state_key for callback in made}) == 3


@pytest.mark.usefixtures("trainers")
def test_trainer_callback_runs_when_the_optimizer_holds_other_tensors(loop: SimpleNamespace) -> None:
    callback = huggingface.transform_callback(Double())
    flattened = torch.nn.Linear(2, 2)  # the names are those of parameters that the optimizer never sees
    callback.on_train_begin(None, None, None, model=flattened, optimizer=loop.optimizer)
    assert loop.step() == pytest.approx(1 - 0.2)


@pytest.mark.usefixtures("trainers")
def test_trainer_callback_attaches_to_the_optimizer_inside_wrappers(loop: SimpleNamespace) -> None:
    callback = huggingface.transform_callback(Double(), Shrink())
    wrapped = Wrapper(Wrapper(loop.optimizer))
    callback.on_train_begin(None, None, None, model=loop.model, optimizer=wrapped)
    assert "weight" in callback.driver.attachment._given_names.values()
    assert loop.step() == pytest.approx((1 - 0.2) / 2)
    callback.on_train_end(None, None, None)
    assert callback.state_dict()["steps"] == 1


@pytest.mark.usefixtures("trainers")
def test_several_or_no_optimizers_and_foreign_engines_are_refused(loop: SimpleNamespace) -> None:
    callback = lightning.transform_callback(Double())
    with pytest.raises(ValueError, match="one optimizer, got 2"):
        callback.on_train_start(SimpleNamespace(optimizers=[loop.optimizer] * 2), loop.model)
    with pytest.raises(ValueError, match="one optimizer, got 0"):
        huggingface.transform_callback(Double()).on_train_begin(None, None, None, model=loop.model)
    with pytest.raises(TypeError, match="got SimpleNamespace"):
        plain(SimpleNamespace())
    with pytest.raises(TypeError, match="transforms must be"):
        lightning.transform_callback()
    with pytest.raises(TypeError, match=r"got \['str'\]"):
        huggingface.transform_callback("noise")


@pytest.mark.parametrize(
    ("adapter", "modules", "package"),
    [
        (lightning, ("lightning", "pytorch_lightning"), "lightning"),
        (huggingface, ("transformers",), "transformers"),
    ],
)
def test_an_absent_trainer_is_one_clear_line(
    adapter, modules, package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=f"pip install {package}") as caught:
        adapter.transform_callback(Double())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("adapter", "trainer", "base"),
    [(lightning, "lightning.pytorch", "Callback"), (huggingface, "transformers", "TrainerCallback")],
)
def test_the_real_trainer_has_our_hooks(adapter, trainer: str, base: str) -> None:
    official = getattr(pytest.importorskip(trainer), base)
    ours = [name for name in vars(adapter.Hooks) if name.startswith("on_")]
    assert all(hasattr(official, name) for name in ours)
