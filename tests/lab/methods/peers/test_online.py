"""Online Normalization against the equations of Chiley et al. (2019), one sample and one channel at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streamnorm_lab.methods.peers.online import OnlineNorm

EPS = 1e-5


class Plain:
    """One channel, as the paper writes it: x is (samples, places)."""

    def __init__(self, forward_decay, backward_decay):
        self.af, self.ab = forward_decay, backward_decay
        self.mu, self.var, self.e_y, self.e_1 = 0.0, 1.0, 0.0, 0.0

    def forward(self, x):
        y, sigma = np.empty_like(x), np.empty(len(x))
        for t in range(len(x)):
            sigma[t] = np.sqrt(self.var + EPS)
            y[t] = (x[t] - self.mu) / sigma[t]
            delta = x[t].mean() - self.mu
            self.var = self.af * self.var + (1 - self.af) * x[t].var() + self.af * (1 - self.af) * delta**2
            self.mu = self.af * self.mu + (1 - self.af) * x[t].mean()
        return y, sigma

    def backward(self, dy, y, sigma):
        dx = np.empty_like(dy)
        for t in range(len(dy)):
            tilde = dy[t] - (1 - self.ab) * self.e_y * y[t]
            self.e_y += (tilde * y[t]).mean()
            dx[t] = tilde / sigma[t] - (1 - self.ab) * self.e_1
            self.e_1 += dx[t].mean()
        return dx


@pytest.mark.parametrize("samples", [1, 2, 5, 16, 23])
@pytest.mark.parametrize("places", [(), (3, 2)])
def test_forward_backward_and_state_are_the_papers_recursions(samples, places):
    torch.manual_seed(0)
    layer = OnlineNorm(3, 0.9, 0.8, guard="none").double()
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
    plain = [Plain(0.9, 0.8) for _ in range(3)]
    gain, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    for _ in range(4):
        x = (2 * torch.randn(samples, 3, *places, dtype=torch.float64) + 1).requires_grad_()
        output = layer(x)
        dz = torch.randn_like(output)
        layer.zero_grad()
        output.backward(dz)
        assert x.grad is not None
        assert layer.weight.grad is not None
        assert layer.bias.grad is not None
        flat, flat_dz = (t.detach().numpy().reshape(samples, 3, -1) for t in (x, dz))
        for c in range(3):
            y, sigma = plain[c].forward(flat[:, c])
            dx = plain[c].backward(flat_dz[:, c] * gain[c], y, sigma)
            shape = (samples, *places)
            np.testing.assert_allclose(output.detach()[:, c], (y * gain[c] + bias[c]).reshape(shape), rtol=1e-10)
            np.testing.assert_allclose(x.grad[:, c], dx.reshape(shape), rtol=1e-10)
            np.testing.assert_allclose(layer.weight.grad[c], (flat_dz[:, c] * y).sum(), rtol=1e-10)
            np.testing.assert_allclose(layer.bias.grad[c], flat_dz[:, c].sum(), rtol=1e-10)
    state = {"mean": "mu", "variance": "var", "scale_error": "e_y", "mean_error": "e_1"}
    for ours, theirs in state.items():
        np.testing.assert_allclose(getattr(layer, ours), [getattr(channel, theirs) for channel in plain], rtol=1e-10)


def test_a_mini_batch_is_its_samples_one_by_one():
    torch.manual_seed(1)
    x = torch.randn(6, 4, dtype=torch.float64)
    together, alone = OnlineNorm(4).double(), OnlineNorm(4).double()
    torch.testing.assert_close(together(x), torch.cat([alone(row) for row in x.split(1)]))
    torch.testing.assert_close(together.variance, alone.variance)


@pytest.mark.parametrize("places", [(), (3, 2)])
def test_layer_scaling_divides_by_the_root_mean_square_of_each_sample(places):
    torch.manual_seed(2)
    x = torch.randn(4, 3, *places, dtype=torch.float64)
    plain, scaled = OnlineNorm(3, guard="none").double(), OnlineNorm(3).double()
    for layer in (plain, scaled):
        layer.bias.data.fill_(0.5)
    y = plain(x).detach().numpy()
    expected = [sample / np.sqrt((sample**2).mean() + EPS) for sample in y]
    np.testing.assert_allclose(scaled(x).detach().numpy(), expected, rtol=1e-10)


def test_clamping():
    x = torch.tensor([[-9.0, 2.0, 30.0]])
    torch.testing.assert_close(OnlineNorm(3, guard="clamp")(x), torch.tensor([[-5.0, 2.0, 5.0]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("samples", [1, 4])
def test_evaluation_is_a_fixed_map_of_each_sample_and_changes_nothing(samples):
    torch.manual_seed(3)
    layer = OnlineNorm(3, 0.9, guard="none")
    layer(torch.randn(50, 3) * 3 + 2)
    layer.eval()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(samples, 3)
    expected = (x.numpy() - before["mean"].numpy()) / np.sqrt(before["variance"].numpy() + EPS)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(("option", "message"), [({"guard": "x"}, "got 'x'"), ({"forward_decay": 1}, "got 1")])
def test_what_cannot_be_is_refused(option, message):
    with pytest.raises(ValueError, match=message):
        OnlineNorm(3, **option)
