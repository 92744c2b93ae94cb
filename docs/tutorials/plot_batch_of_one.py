"""
Batch of one: from BatchNorm to StreamingNorm
=============================================

Batch Normalization takes its statistics from the mini-batch, and fails where that is a single image. This tutorial
trains the same small convolutional network on scikit-learn's digits three times, one image at a time, and changes one
line between the runs: the normalization layer.
"""

import copy

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import streamnorm as sn

_ = torch.manual_seed(0)

# %%
# The data are 1,797 images of 8×8 pixels. 1,200 of them are for training, the rest for testing.

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(images))
train, test = order[:1200], order[1200:]


# %%
# The network takes the normalization as an argument, so that a run differs in one place only.


def network(norm):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        norm(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        norm(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        norm(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def accuracy(model):
    model.eval()
    with torch.no_grad():
        share = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
    model.train()
    return 100 * share


# %%
# The loop is the usual one, with a mini-batch of one image and an update after each. Every 100 images it measures the
# accuracy on the test images, in evaluation mode.


def train_one_by_one(model, rate, passes=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    curve = []
    for step, i in enumerate(train.repeat(passes)):
        loss = nn.functional.cross_entropy(model(images[i][None]), labels[i][None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # streaming layers notice it and move their statistics on
        if (step + 1) % 100 == 0:
            curve.append(accuracy(model))
    return curve


# %%
# Each layer has its best rate of 0.001, 0.003 and 0.01: a comparison at a single rate would favour one of them.

layers = {
    "BatchNorm2d": nn.BatchNorm2d,
    "GroupNorm, 8 groups": lambda channels: nn.GroupNorm(8, channels),
    "StreamingNorm2d": sn.StreamingNorm2d,
}
rates = (0.001, 0.003, 0.01)
curves = {}
for name, norm in layers.items():
    runs = {rate: train_one_by_one(network(norm), rate) for rate in rates}
    best = max(runs, key=lambda rate: sum(runs[rate][-6:]))
    curves[name] = runs[best]
    print(f"{name:20} best rate {best}, accuracy at the end {runs[best][-1]:.1f}%")

# %%
fig, ax = plt.subplots(figsize=(7, 4))
for name, curve in curves.items():
    ax.plot([100 * (i + 1) for i in range(len(curve))], curve, label=name)
ax.set(xlabel="images seen, one at a time", ylabel="test accuracy (%)", ylim=(0, 100))
ax.legend()
fig.tight_layout()

# %%
# Batch Normalization lowers its training loss, and fails in evaluation: the statistics of one image, which it trains
# with, are not the running averages, which it evaluates with. Group Normalization knows no such difference, as it
# looks at one image in both cases. Streaming Normalization knows none either, as it looks at all images seen in both.
#
# One seed shows this; how far apart the methods are, with intervals over seeds, is what the
# experiments measure.
#
# A model that is there already
# -----------------------------
#
# ``sn.convert`` replaces the Batch Normalizations of a trained network. It evaluates as before, and goes on training
# with mini-batches of any size.

model = network(nn.BatchNorm2d)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
for batch in train.repeat(3).split(32):
    loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
before = accuracy(model)
converted = sn.convert(copy.deepcopy(model))
print(f"trained with mini-batches of 32: {before:.1f}%, converted: {accuracy(converted):.1f}%")

# %%
# For deployment the statistics fold into the convolutions: nothing of the normalization is left.

fused = sn.fold(converted.eval())
print(fused)
