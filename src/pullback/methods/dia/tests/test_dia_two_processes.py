"""Every rank of a data-parallel client has masks of its own; its own share is attacked through the wrapper."""

import torch
from torch import nn

from pullback.methods.dia import DropoutInversion
from pullback.methods.dia.tests.cases import LOSS, client, perceptron, picture
from pullback.testing import run_ranks
from pullback.testing.tools import same


def found_on(rank):
    model, x, y = perceptron(0.25), picture(4, 2)[rank : rank + 1], torch.tensor([rank])
    shared, masks = client(model, x, y, seed=rank)
    wrapped = nn.parallel.DistributedDataParallel(model)
    results = [
        DropoutInversion(each, LOSS, max_iters=5, tolerance=0.0).reconstruct(
            shared, labels=y, input_shape=x.shape
        )
        for each in (wrapped, model)
    ]
    untouched = all(parameter.grad is None for parameter in model.parameters())
    return {"same": same(results[0].trace, results[1].trace), "untouched": untouched, "masks": masks}


def test_a_wrapped_model_is_attacked_on_each_rank_by_itself():
    first, second = run_ranks(found_on)
    for found in (first, second):
        assert found["same"]
        assert found["untouched"]
    assert not same(first["masks"], second["masks"])
