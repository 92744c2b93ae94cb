"""
Watching training: a rate that is too high
==========================================

Training with one sample at a time can go wrong without a word: the loss is noisy anyway. This tutorial watches a
convolutional network on scikit-learn's digits with :func:`streamnorm.monitor`, sees what a learning rate that is too
high does, asks :func:`streamnorm.diagnose` what to do, and does it.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import streamnorm as sn

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)


def block(channels, width, stride=1):
    conv = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, sn.StreamingNorm2d(width), nn.ReLU())


def network():
    torch.manual_seed(0)
    body = nn.Sequential(block(16, 16), block(16, 32, 2), block(32, 32), block(32, 64, 2))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(block(1, 16), body, head)


# %%
# The loop is the usual one. The monitor stands around it; with ``out="seen"`` it would also write a page that refreshes
# itself in a browser while training runs.


def train(model, optimizer, images_seen):
    with sn.monitor(model, every=10) as watching:
        for i in torch.randint(0, 1400, (images_seen,)).tolist():
            loss = nn.functional.cross_entropy(model(images[i][None]), labels[i][None])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return watching


model = network()
optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
watching = train(model, optimizer, 400)

# %%
# A notebook, and this page, show the record where the monitor is the last value of a cell. Rows are layers, from the
# input to the output; the colour is drift, the distance of recent statistics to remembered ones. A click on a row opens
# the layer's curves.

watching

# %%
# At first the statistics leave their prior, as they should. From about image 150 on they move by several deviations,
# and more and more: the weights change faster than a memory of 50 images follows. A diagnosis says it in words. It runs
# one forward and one backward pass, and changes nothing.

batch = images[:64], labels[:64]
print(sn.diagnose(model, batch, nn.functional.cross_entropy))

# %%
# What it advises, tried for longer:

model = network()
optimizer = torch.optim.SGD(model.parameters(), lr=0.005 / 4, momentum=0.9)
calm = train(model, optimizer, 2000)
print(sn.diagnose(model, batch, nn.functional.cross_entropy))

# %%
calm
