"""A character-level language model, and text that it makes up."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CharModel(nn.Module):
    """One-hot characters, recurrent layers, and a linear layer that scores each character as the next one.

    Every sequence starts from a hidden state of zeros.

    Args:
        vocabulary: how many different characters there are.
        hidden: features of the hidden state.
        recurrent: makes the recurrent layers from the number of inputs and of features, samples first.

    Shape:
        Numbers of characters (N, T) to logits (N·T, vocabulary), sample by sample.
    """

    def __init__(self, vocabulary: int, hidden: int, recurrent: Callable[[int, int], nn.RNNBase]) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.recurrent = recurrent(vocabulary, hidden)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        """Scores of the next character after each one."""
        output, _ = self.recurrent(F.one_hot(characters, self.vocabulary).to(self.head.weight.dtype))
        logits: Tensor = self.head(output.flatten(0, 1))
        return logits


@torch.no_grad()
def generate(model: CharModel, prompt: Tensor, length: int, seed: int) -> Tensor:
    """``length`` characters that continue ``prompt``, each drawn from what the model expects.

    The model sees as many characters as the prompt has, from a hidden state of zeros, again for every character:
    sequences of another length than it was trained on are not asked of it.

    Shape:
        prompt (T,), result (length,).
    """
    generator = torch.Generator().manual_seed(seed)
    text = prompt.clone()
    model.eval()
    for _ in range(length):
        expected = model(text[None, -len(prompt) :])[-1].softmax(0)
        text = torch.cat([text, torch.multinomial(expected, 1, generator=generator)])
    model.train()
    return text[len(prompt) :]
