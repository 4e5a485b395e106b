"""Runs of residual blocks in models of many kinds: found, verified, rewired; checkpoints and optimizers carry over."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pullback.methods.shallow import ResidualStack, difference
from pullback.methods.shallow import shallow_ as convert

shallow_: Any = convert  # also with arguments of wrong types, which must be refused


class Block(nn.Module):
    """x + body(x)."""

    def __init__(self, c=4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1))

    def forward(self, x):
        return x + self.body(x)


class Spread(Block):
    """x + F(x) with F in pieces, not one child."""

    def forward(self, x):
        return x + 2.0 * self.body(x)


class Classic(nn.Module):
    """The first ResNet's: an activation follows the addition."""

    def __init__(self, c=4, out=4, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.short = nn.Conv2d(c, out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        return F.relu(self.short(x) + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Dropping(Block):
    """Drops its whole branch at random while training, outside of ``body``."""

    def forward(self, x):
        return x + F.dropout(self.body(x), 0.5, self.training)


class Net(nn.Module):
    """A ModuleList that is walked through, and parts before and after it."""

    def __init__(self, block=Block, count=3, skip=None):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)
        self.blocks, self.skip = nn.ModuleList([block() for _ in range(count)]), skip

    def forward(self, x):
        x = first = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == self.skip:
                x = x + first
        return self.head(x.mean((2, 3)))


IMAGES = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def sequential(*layers) -> Any:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *layers, nn.Flatten(), nn.Linear(4 * 36, 3))


def output(model, mode=None):
    for module in model.modules():
        if isinstance(module, ResidualStack) and mode is not None:
            module.mode = mode
    with torch.no_grad():
        return model(IMAGES)


# --- finding ---------------------------------------------------------------------------------------------------


def test_every_maximal_run_becomes_a_stack():
    torch.manual_seed(0)
    pool = nn.Conv2d(4, 4, 3, stride=1, padding=1)
    model = sequential(Block(), Block(), Block(), pool, Block(), nn.ReLU(), Block(), Block())
    before = output(model)
    lone = model[5]
    found = shallow_(model, Block, probe=IMAGES)
    assert [(run.name, run.blocks, run.branch) for run in found.runs] == [("1", 3, "body"), ("5", 2, "body")]
    assert found.count == 2
    assert model[3] is lone
    assert [type(m).__name__ for m in model] == [
        "Conv2d", "ResidualStack", "Conv2d", "Block", "ReLU", "ResidualStack", "Flatten", "Linear"]  # fmt: skip
    torch.testing.assert_close(output(model, "sequential"), before)
    assert not torch.allclose(output(model, "parallel"), before, atol=1e-3)
    x = model[0](IMAGES).detach()
    torch.testing.assert_close(model[1](x), x + sum(b.body(x) for b in model[1].blocks))
    assert found.runs[0].parameters == 3 * 2 * (4 * 4 * 9 + 4)
    assert 0 < found.runs[0].gap < 1
    assert all(0 < eps < 1 for eps in found.runs[0].eps)


def test_a_walked_module_list_a_named_sequential_and_a_second_call():
    torch.manual_seed(0)
    net: Any = Net()
    before = output(net)
    assert shallow_(net, Block, probe=(IMAGES,), order=2, branch_scale="1/sqrt(N)").count == 1
    assert len(net.blocks) == 1
    assert (net.blocks[0].order, net.blocks[0].branch_scale, net.blocks[0].plan) == (2, "1/sqrt(N)", "wide")
    net.blocks[0].branch_scale = 1.0
    torch.testing.assert_close(output(net, "sequential"), before)
    with pytest.raises(ValueError, match="match must find two or more neighbours"):
        shallow_(net, Block, probe=IMAGES)
    named = nn.Sequential()
    for name in ("stem", "a", "b", "c"):
        named.add_module(name, nn.Conv2d(1, 4, 1) if name == "stem" else Block())
    found = shallow_(named, lambda m: isinstance(m, Block), probe={"input": IMAGES})
    assert list(named._modules) == ["stem", "a"]
    assert found.names["c.body.0.weight"] == "a.blocks.2.body.0.weight"


def test_a_change_of_shape_splits_a_run():
    torch.manual_seed(0)

    class Down(Block):
        def forward(self, x):
            return F.avg_pool2d(x + self.body(x), 2)

    model = nn.Sequential(nn.Conv2d(1, 4, 1), Block(), Block(), Down(), Block(), Block())
    assert [(run.name, run.blocks) for run in shallow_(model, Block, probe=IMAGES).runs] == [
        ("1", 2),
        ("3", 2),
    ]


def test_blocks_that_do_not_feed_each_other_are_left_alone():
    torch.manual_seed(0)
    net = Net(count=4, skip=1)
    before = output(net)
    with pytest.raises(ValueError, match="model must use its blocks one after the other"):
        shallow_(net, Block, probe=IMAGES)  # two runs of two, which shift the position that the model counts
    assert len(net.blocks) == 4
    assert torch.equal(output(net), before)


def test_the_whole_model_is_compared_before_anything_stays_changed():
    torch.manual_seed(0)

    class Indexed(Net):
        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean((2, 3))) * len(self.blocks)

    net = Indexed()
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"output that differs by .* The model is as it was"):
        shallow_(net, Block, probe=IMAGES)
    assert list(net.state_dict()) == list(state)
    assert net.training


# --- branches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", ["body", lambda block, x: block.body(x)])
def test_a_declared_branch_is_verified(branch):
    torch.manual_seed(0)
    net: Any = Net()
    before = output(net)
    shallow_(net, Block, probe=IMAGES, branch=branch)
    torch.testing.assert_close(output(net, "sequential"), before)
    with pytest.raises(
        ValueError, match=r"block 'blocks.\d' \(Spread\) must compute x \+ F\(x\), got an error of"
    ):
        shallow_(Net(Spread), Spread, probe=IMAGES, branch=branch)
    with pytest.raises(ValueError, match="with F = any one of its children"):
        shallow_(Net(Spread), Spread, probe=IMAGES)
    shallow_(Net(Spread), Spread, probe=IMAGES, branch=lambda block, x: 2.0 * block.body(x))


def test_a_wrong_name_is_told():
    with pytest.raises(AttributeError, match="no attribute 'main'"):
        shallow_(Net(), Block, probe=IMAGES, branch="main")


def test_plain_blocks_are_refused():
    model = sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    with pytest.raises(ValueError, match=r"must compute x \+ F\(x\).*pass fold_post_activation=True"):
        shallow_(model, nn.Conv2d, probe=IMAGES)


def test_an_activation_after_the_addition_is_refused_or_folded():
    torch.manual_seed(0)
    model = sequential(nn.ReLU(), Classic(), Classic(), Classic()).eval()
    before = output(model)
    with pytest.raises(ValueError, match="fold_post_activation=True"):
        shallow_(model, Classic, probe=IMAGES)
    with pytest.warns(UserWarning, match="normalise by batch statistics"):
        found = shallow_(model, Classic, probe=IMAGES, fold_post_activation=True)
    assert found.runs[0].branch == "difference"
    torch.testing.assert_close(output(model, "sequential"), before)
    x = torch.relu(model[0](IMAGES))
    stack = model[2]
    stack.mode = "parallel"
    torch.testing.assert_close(stack(x), x + sum(block(x) - x for block in stack.blocks))
    assert stack.branch is difference


def test_zero_branches_do_not_hide_an_activation_after_the_addition():
    torch.manual_seed(0)
    blocks = [Classic() for _ in range(2)]
    for block in blocks:
        nn.init.zeros_(block.bn2.weight)  # then block(x) = relu(x) = x on what the block sees
    model = sequential(nn.ReLU(), *blocks)

    def branch(block, x):
        return block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))

    with pytest.raises(ValueError, match=r"must compute x \+ F\(x\)"):
        shallow_(model, Classic, probe=IMAGES, branch=branch)


def test_random_depth_outside_of_the_branch_is_noticed():
    with pytest.raises(ValueError, match="in evaluation or training mode"):
        shallow_(Net(Dropping), Dropping, probe=IMAGES, branch="body")
    net: Any = Net(Dropping)
    shallow_(net, Dropping, probe=IMAGES, branch=lambda b, x: F.dropout(b.body(x), 0.5, b.training))
    assert net.blocks[0].plan == "loop"


def test_blocks_with_hooks_or_more_arguments_are_refused():
    net: Any = Net()
    net.blocks[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"block 'blocks.1' must have no hooks"):
        shallow_(net, Block, probe=IMAGES)

    class Masked(Block):
        def forward(self, x, mask=None):
            return super().forward(x)

    class Walk(Net):
        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x, mask=None)
            return x

    with pytest.raises(ValueError, match="takes or gives more than one tensor"):
        shallow_(Walk(Masked), Masked, probe=IMAGES)


def test_arguments_of_wrong_types_are_refused():
    for match in ("Block", (Block, 3), 3):
        with pytest.raises(TypeError, match="match must"):
            shallow_(Net(), match, probe=IMAGES)
    with pytest.raises(TypeError, match="model must be of type Module"):
        shallow_([Block()], Block, probe=IMAGES)


def test_equal_blocks_are_warned_about():
    torch.manual_seed(0)
    net: Any = Net()
    net.blocks[2].load_state_dict(net.blocks[0].state_dict())
    with pytest.warns(UserWarning, match="blocks 0 and 2 hold equal parameters"):
        shallow_(net, Block, probe=IMAGES)


def test_a_shared_block_stays_shared():
    torch.manual_seed(0)
    block = Block()
    model = sequential(block, block, block)
    found = shallow_(model, Block, probe=IMAGES)
    assert all(each is block for each in model[1].blocks)
    x = model[0](IMAGES).detach()
    torch.testing.assert_close(model[1](x), x + 3 * block.body(x))
    assert found.names["3.body.0.bias"] == "1.blocks.2.body.0.bias"


# --- checkpoints and optimizers --------------------------------------------------------------------------------


def test_checkpoints_carry_over_in_both_directions():
    torch.manual_seed(0)
    layers = [Block(), Block(), nn.BatchNorm2d(4), Block(), Block()]
    model = sequential(*layers)
    old = copy.deepcopy(model.state_dict())
    other = copy.deepcopy(model)
    found = shallow_(model, Block, probe=IMAGES)
    assert set(found.names) == set(old)
    assert list(found.names.values()) == list(model.state_dict())
    for p in model.parameters():
        nn.init.zeros_(p)
    model.load_state_dict(found.rename(old))
    assert all(torch.equal(model.state_dict()[found.names[name]], value) for name, value in old.items())
    other.load_state_dict(found.rename(model.state_dict(), back=True))
    for mode, net in (("train", model), ("train", other)):
        net.train(mode == "train")
    torch.testing.assert_close(output(model, "sequential"), output(other))
    with pytest.raises(ValueError, match="state must hold names of the old model, got '1"):
        found.rename({"1.blocks.0.body.0.weight": 1})


def test_an_optimizer_made_before_goes_on_as_if_nothing_had_happened():
    def trained(convert):
        torch.manual_seed(0)
        net: Any = Net()
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for step in range(6):
            if convert and step == 3:
                shallow_(net, Block, probe=IMAGES, mode="sequential")
                state = optimizer.state_dict()
                optimizer = torch.optim.Adam(
                    net.parameters(), lr=1e-2
                )  # the order of parameters is the same, too
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            net(IMAGES).square().sum().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    torch.testing.assert_close(trained(True), trained(False), rtol=0, atol=1e-6)


def test_conversion_leaves_modes_random_state_and_values():
    torch.manual_seed(0)
    model = sequential(nn.BatchNorm2d(4), nn.Dropout(0.5), Block(), Block())
    model[1].eval()
    values, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    blocks = list(model)[3:5]
    found = shallow_(model, Block, probe=IMAGES)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(model.state_dict()[found.names[k]], v) for k, v in values.items())
    assert not model[1].training
    assert model.training
    assert all(a is b for a, b in zip(model[3].blocks, blocks, strict=True))
    assert not any(m._forward_hooks for m in model.modules())


def test_a_transformer_of_blocks_is_converted():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner = (
                nn.LayerNorm(4),
                nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)),
            )

        def forward(self, x):
            return x + self.inner(self.norm(x))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), Mlp(), Mlp(), Mlp())
    before = output(model)
    shallow_(model, Mlp, probe=IMAGES, branch=lambda block, x: block.inner(block.norm(x)))
    torch.testing.assert_close(output(model, "sequential"), before)
