"""The networks, against networks written out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import streamnorm as sn
from streamnorm_lab.methods.layers import METHODS
from streamnorm_lab.networks.images import SharedBlock, feedforward_convolutional, recurrent_convolutional

NORMS = ("batch", "layer", "streaming-l1")


class Written(nn.Module):
    """Architecture B of the paper's figure 2 with width 3, line by line."""

    def __init__(self, norm):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 3, 3, padding=1), norm(3, 2)
        self.conv2, self.norm2 = nn.Conv2d(3, 3, 3, padding=1), norm(3, 2)
        self.conv3, self.norm3 = nn.Conv2d(3, 3, 3, padding=1), norm(3, 2)
        self.conv4, self.norm4 = nn.Conv2d(3, 6, 3, stride=2, padding=1), norm(6, 2)
        self.conv5, self.norm5 = nn.Conv2d(6, 6, 3, padding=1), norm(6, 2)
        self.conv6, self.norm6 = nn.Conv2d(6, 6, 3, padding=1), norm(6, 2)
        self.conv7, self.norm7 = nn.Conv2d(6, 12, 3, stride=2, padding=1), norm(12, 2)
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = x + self.norm3(self.conv3(F.relu(self.norm2(self.conv2(x)))))
        x = F.relu(self.norm4(self.conv4(x)))
        x = x + self.norm6(self.conv6(F.relu(self.norm5(self.conv5(x)))))
        x = F.relu(self.norm7(self.conv7(x)))
        return self.head(x.mean((2, 3)))


def seeded(make, *arguments):
    torch.manual_seed(0)
    return make(*arguments)


def steps(model, images):
    """The outputs along some training steps, and the evaluation after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    outputs = []
    for part in images:
        optimizer.zero_grad()
        outputs.append(model(part))
        outputs[-1].square().sum().backward()
        optimizer.step()
    model.eval()
    return torch.stack([*outputs, model(images[0])])


@pytest.mark.parametrize("method", NORMS)
def test_architecture_b_is_what_one_would_write(method):
    norm, images = METHODS[method].make, torch.randn(3, 4, 2, 8, 8)
    built, written = seeded(feedforward_convolutional, 2, 10, norm, 3), seeded(Written, norm)
    torch.testing.assert_close(steps(built, images), steps(written, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", NORMS)
def test_the_recurrent_network_with_one_application_is_the_feedforward_one(method):
    """The same names in their state dicts, one loads into the other, the same outputs along training."""
    norm, images = METHODS[method].make, torch.randn(3, 4, 2, 8, 8)
    feedforward = seeded(feedforward_convolutional, 2, 10, norm, 3)
    recurrent = recurrent_convolutional(2, 10, norm, 3, (1, 1))
    recurrent.load_state_dict(feedforward.state_dict())
    assert torch.equal(steps(recurrent, images), steps(feedforward, images))


def test_more_applications_share_weights_and_normalization():
    norm = METHODS["streaming-l1"].make
    once, often = (seeded(recurrent_convolutional, 2, 10, norm, 3, times) for times in ((1, 1), (3, 2)))
    assert {name: value.shape for name, value in often.state_dict().items()} == {
        name: value.shape for name, value in once.state_dict().items()
    }
    images = torch.randn(4, 2, 8, 8)
    assert not torch.allclose(once(images), often(images))


def test_a_block_applied_twice_is_the_block_of_the_block():
    block = SharedBlock(3, METHODS["layer"].make, 1)
    twice = SharedBlock(3, METHODS["layer"].make, 2)
    twice.load_state_dict(block.state_dict())
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(twice(x), block(block(x)))


def test_every_application_counts_in_the_stream():
    """An application is a use: after k of them, the short-term count holds k times the elements of the input."""
    block = SharedBlock(3, METHODS["streaming-l1"].make, 4)
    block(torch.randn(2, 3, 5, 5))
    assert isinstance(block.norm1, sn.StreamingNorm2d)
    assert block.norm1.count.tolist() == [4 * 2 * 25] * 3
    assert block.norm1.samples.item() == 4 * 2
