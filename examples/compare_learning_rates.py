"""Does a ten times larger learning rate help? A trial on a model of your own.

Run it with: pullback trial examples/compare_learning_rates.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from pullback.lab import Arms, Curves, Metric, PairedSeeds, Trial

RATES = {"lr 0.01": 0.01, "lr 0.1": 0.1}


def run(cfg, arm, hp, seed, log):
    """One training run: everything it needs comes in, everything it measures goes out."""
    rng = torch.Generator().manual_seed(seed)  # both arms see the same batches for the same seed
    torch.manual_seed(seed)  # ... and start from the same weights
    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(
        len(labels), generator=torch.Generator().manual_seed(0)
    )  # the same split for every run
    images, labels = images.float()[order] / 16, labels.long()[order]
    train, test = slice(0, 1200), slice(1200, None)

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))  # your model here
    optimizer = torch.optim.SGD(model.parameters(), lr=RATES[arm])
    for step in range(cfg["steps"]):
        batch = torch.randint(1200, (32,), generator=rng)
        loss = F.cross_entropy(model(images[train][batch]), labels[train][batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            log.value("train_loss", loss.item(), step)
    accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
    return {"test_accuracy": accuracy}


trial = Trial(
    title="Learning rate 0.1 against 0.01 on 8x8 digits",
    run=run,
    arms=Arms(baseline="lr 0.01", method="lr 0.1"),
    primary=Metric("test_accuracy", better="higher", unit="fraction", worst=0.0),
    sizes={"smoke": {"steps": 50}, "full": {"steps": 600}},
    figures=(PairedSeeds(), Curves("train_loss")),
)
