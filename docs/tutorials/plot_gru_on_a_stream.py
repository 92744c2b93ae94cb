"""
A GRU that learns from a stream
===============================

A network that learns online sees one sequence that does not end: no mini-batch, no second pass. This tutorial lets a
GRU read the source of a Python module once, character by character, and predict the next one, without normalization
and with two kinds of it.
"""

import argparse
import inspect
import time

import matplotlib.pyplot as plt
import torch
from torch import nn

import streamnorm as sn

# %%
# The stream is the first 15,000 characters of ``argparse.py``.

text = inspect.getsource(argparse)[:15001]
alphabet = sorted(set(text))
stream = torch.tensor([alphabet.index(character) for character in text])[:, None]
print(f"{len(stream) - 1} characters, {len(alphabet)} different ones")


# %%
# ``sn.GRU`` has the signature of ``nn.GRU`` and the names of its weights, and takes ``norm=`` besides.


class Reader(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.embedding = nn.Embedding(len(alphabet), 32)
        self.rnn = rnn(32, 64)
        self.out = nn.Linear(64, len(alphabet))

    def forward(self, characters, state=None):
        hidden, state = self.rnn(self.embedding(characters), state)
        return self.out(hidden), state


# %%
# The loop reads 25 characters, goes back over them (truncated backpropagation), changes the weights once, and keeps the
# hidden state without its history. What it returns is the loss in bits on characters that the network had not seen
# before it was asked: on a stream, training and testing are one.


def read(rnn, rate, length=25):
    torch.manual_seed(1)
    model = Reader(rnn)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    state, bits = None, []
    for start in range(0, len(stream) - length, length):
        piece = stream[start : start + length + 1]
        prediction, state = model(piece[:-1], state)
        loss = nn.functional.cross_entropy(prediction.flatten(0, 1), piece[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state = state.detach()
        bits.append(loss.item() / 0.6931)
    return model, torch.tensor(bits)


# %%
# Each network gets its better rate of two.

networks = {
    "nn.GRU": nn.GRU,
    'sn.GRU, norm="layer"': lambda *sizes: sn.GRU(*sizes, norm="layer"),
    'sn.GRU, norm="streaming"': lambda *sizes: sn.GRU(*sizes, norm="streaming"),
}
curves, models = {}, {}
for name, rnn in networks.items():
    runs, started = {}, time.perf_counter()
    for rate in (0.003, 0.01):
        runs[rate] = read(rnn, rate)
    seconds = (time.perf_counter() - started) / len(runs)
    best = min(runs, key=lambda rate: runs[rate][1].mean())
    models[name], curves[name] = runs[best]
    print(f"{name:26} best rate {best}: {curves[name].mean():.2f} bits a character, {seconds:.0f} s a run")

# %%
fig, ax = plt.subplots(figsize=(7, 4))
for name, bits in curves.items():
    smooth = bits.unfold(0, 100, 10).mean(1)
    ax.plot((torch.arange(len(smooth)) * 10 + 50) * 25, smooth, label=name)
ax.set(xlabel="characters read", ylabel="bits a character, mean of 2,500", ylim=(1.5, 4))
ax.legend()
fig.tight_layout()

# %%
# Both normalizations help, and about equally. They differ in what they are afterwards. Layer Normalization takes its
# statistics from each hidden vector, so a deployed network has to compute them at every step. Streaming Normalization
# evaluates with statistics that are fixed: the network becomes PyTorch's own GRU, with the same outputs.

rnn = models['sn.GRU, norm="streaming"'].rnn.eval()
plain = rnn.to_torch()
x = torch.randn(20, 1, 32)
print(type(plain), torch.allclose(plain(x)[0], rnn(x)[0], atol=1e-5))
