"""torch.func, and derivatives beyond the first: they pass where nothing is collected, and are refused where it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call, grad, vmap

import streamnorm as sn
from streamnorm import ops
from streamnorm.ops import Call, processes


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """By torch.func, for the sum of the squared outputs."""

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        y = functional_call(model, parameters, (x,))
        return (y[0] if isinstance(y, tuple) else y).square().sum()

    return grad(loss)({name: value.detach() for name, value in model.named_parameters()})


def backward(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The same by autograd."""
    y = model(x)
    (y[0] if isinstance(y, tuple) else y).square().sum().backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


Transform = Callable[[nn.Module, Tensor], Any]
TRANSFORMS: dict[str, Transform] = {
    "grad": gradients,
    "vjp": lambda model, x: torch.func.vjp(model, x),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "vmap": lambda model, x: vmap(model)(x[None]),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by jvp itself
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=list(TRANSFORMS))
@pytest.mark.parametrize("make", [sn.StreamingNorm1d, lambda n: sn.GRU(n, n)], ids=["layer", "recurrent"])
def test_a_layer_that_collects_refuses(engine: str, make: Callable[[int], nn.Module], transform: Transform) -> None:
    model = make(4)
    x = torch.randn(3, 4) if isinstance(model, sn.StreamingNorm1d) else torch.randn(5, 3, 4)
    before = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(RuntimeError, match=r"model\.eval\(\), or `with streamnorm\.frozen\(model\)"):
        transform(model, x)
    assert all(buffer.equal(kept) for buffer, kept in zip(model.buffers(), before, strict=True))
    assert len(backward(model, x)) == len(list(model.parameters()))  # and goes on as before


@pytest.mark.parametrize("name", ["frozen", "evaluating", "sample", "recurrent, layer"])
def test_what_keeps_nothing_passes(engine: str, name: str) -> None:
    norm: nn.Module = sn.SampleNorm(4) if name == "sample" else sn.StreamingNorm1d(4)
    model: nn.Module = (
        sn.GRU(4, 4, norm="layer") if name == "recurrent, layer" else nn.Sequential(nn.Linear(4, 4), norm)
    )
    if name == "frozen":
        sn.freeze(model)
    model = model.double().train(name != "evaluating")
    x = torch.randn(*((5,) if name == "recurrent, layer" else ()), 3, 4, dtype=torch.float64)
    ours, theirs = gradients(model, x), backward(model, x)
    assert ours.keys() == theirs.keys()
    for parameter, value in theirs.items():
        torch.testing.assert_close(ours[parameter], value, rtol=1e-10, atol=1e-12)


class GroupNorm(nn.GroupNorm):
    """By operations that have all derivatives, of which the fused ones lack some."""

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(1, (self.num_groups, -1)).flatten(2)
        variance, mean = torch.var_mean(groups, 2, correction=0, keepdim=True)
        y = ((groups - mean) * (variance + self.eps).rsqrt()).view_as(x)
        shape = (-1,) + (1,) * (x.dim() - 2)
        return y * self.weight.view(shape) + self.bias.view(shape)


Pair = tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]
PAIRS: dict[str, Pair] = {
    "layer": (lambda: sn.SampleNorm(6), lambda: GroupNorm(1, 6), (4, 6)),
    "instance": (lambda: sn.SampleNorm(6, "channel"), lambda: nn.InstanceNorm1d(6, affine=True), (3, 6, 5)),
    "group": (lambda: sn.SampleNorm(6, ("group", 2)), lambda: GroupNorm(2, 6), (3, 6, 2, 2)),
    "batch": (lambda: sn.GeneralBatchNorm(6), lambda: nn.BatchNorm1d(6), (4, 6)),
    "batch, images": (lambda: sn.GeneralBatchNorm(6), lambda: nn.BatchNorm2d(6), (3, 6, 2, 3)),
    "evaluating": (lambda: sn.GeneralBatchNorm(6).eval(), lambda: nn.BatchNorm1d(6).eval(), (4, 6)),
}


@pytest.fixture(params=list(PAIRS))
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, Tensor]:
    """A layer of ours and torch.nn's, with the same gains and biases, and an input."""
    ours, theirs, shape = PAIRS[request.param]
    a, b = ours().double(), theirs().double()
    with torch.no_grad():
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            p.copy_(torch.rand_like(p) + 0.5)
            q.copy_(p)
    x = torch.randn(shape, dtype=torch.float64)
    x.view(-1)[::3] = 0  # as activations are
    return a, b, x


def assert_close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def penalty(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The derivatives of a penalty on gradients, with respect to the input and all parameters."""
    inputs = [x.clone().requires_grad_(), *model.parameters()]
    found = torch.autograd.grad(output(model, inputs[0]).pow(3).sum(), inputs, create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in found), inputs))  # type: ignore[arg-type]


def output(model: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """For recurrent layers, outputs and final states."""
    y = model(x)
    return (
        torch.cat([t.flatten() for t in (y[0], *(y[1] if isinstance(y[1], tuple) else y[1:]))])
        if isinstance(y, tuple)
        else y
    )


def batched(model: nn.Module, x: Tensor) -> list[Tensor]:
    inputs = [x.clone().requires_grad_(), *model.parameters()]
    y = output(model, inputs[0])
    torch.manual_seed(1)
    return list(torch.autograd.grad(y, inputs, torch.randn(3, *y.shape, dtype=y.dtype), is_grads_batched=True))


def tangent(model: nn.Module, x: Tensor) -> Tensor:
    """Along the input and all parameters."""
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p.detach(), p.detach().cos()) for name, p in model.named_parameters()}
        y = functional_call(model, duals, (forward_ad.make_dual(x, x.cos()),))
        return forward_ad.unpack_dual(y[0] if isinstance(y, tuple) else y).tangent


def tangent_of_gradient(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Forward over reverse: the gradients move with the gradient of the output."""
    inputs = [x.clone().requires_grad_(), *model.parameters()]
    y = output(model, inputs[0])
    with forward_ad.dual_level():
        found = torch.autograd.grad(y, inputs, forward_ad.make_dual(y.detach().sin(), y.detach().cos()))
        return [forward_ad.unpack_dual(g).tangent for g in found]


Derivative = Callable[[nn.Module, Tensor], Any]
DERIVATIVES: dict[str, Derivative] = {
    "second": penalty,
    "batched": batched,
    "jacobian": lambda model, x: jacobian(lambda x: output(model, x), x, vectorize=True),
    "jacobian, forward": lambda model, x: jacobian(
        lambda x: output(model, x), x, vectorize=True, strategy="forward-mode"
    ),
    "hessian": lambda model, x: hessian(lambda x: output(model, x).pow(3).sum(), x, vectorize=True),
    "tangent": tangent,
    "tangent of gradient": tangent_of_gradient,
}


@pytest.mark.parametrize("name", list(DERIVATIVES))
def test_layers_without_a_stream_have_the_derivatives_of_torch_nn(
    engine: str, pair: tuple[nn.Module, nn.Module, Tensor], name: str
) -> None:
    ours, theirs, x = pair
    derivative = DERIVATIVES[name]
    assert_close(derivative(ours, x), derivative(theirs, x))
    for kept, expected in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert_close(kept, expected)


def masked(x: Tensor) -> Tensor:
    """A function of the input through a masked layer, in PyTorch's operations."""
    layer = sn.SampleNorm(4, p=3, center="zero").double()
    y: Tensor = layer(x, x.detach()[:, 0] > 0)
    return y


def test_masks_and_other_moments(engine: str) -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(masked, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(masked, x, check_fwd_over_rev=True, check_rev_over_rev=True)


RECURRENT: dict[str, Callable[..., nn.Module]] = {
    "RNN": lambda norm: sn.RNN(3, 4, norm=norm),
    "GRU": lambda norm: sn.GRU(3, 4, 2, norm=norm, bidirectional=True),
    "GRU, before": lambda norm: sn.GRU(3, 4, norm=norm, reset_after=False),
    "LSTM": lambda norm: sn.LSTM(3, 4, norm=norm),
    "LSTM, all": lambda norm: sn.LSTM(3, 4, norm=norm, norm_cell=True, proj_size=2),
}


@pytest.mark.parametrize("name", ["second", "batched", "tangent", "tangent of gradient"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("kind", list(RECURRENT))
def test_recurrent_layers_without_a_stream_have_all_derivatives(engine: str, kind: str, norm: str, name: str) -> None:
    """Beside autograd through the formulas, step by step."""
    ours = RECURRENT[kind](norm).double()
    theirs = copy.deepcopy(ours)
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    found = DERIVATIVES[name](ours, x)
    with ops.force("plain"):
        expected = DERIVATIVES[name](theirs, x)
    assert_close(found, expected)
    assert_close(list(ours.buffers()), list(theirs.buffers()))


@pytest.mark.parametrize("name", list(DERIVATIVES))
@pytest.mark.parametrize("make", [sn.StreamingNorm1d, lambda n: sn.GRU(n, n)], ids=["layer", "recurrent"])
def test_a_layer_that_collects_refuses_derivatives(engine: str, make: Callable[[int], nn.Module], name: str) -> None:
    """Forward mode before the use; the others where they are asked for, with nothing changed by it."""
    model = make(4).double()
    x = torch.randn(*((3, 4) if isinstance(model, sn.StreamingNorm1d) else (5, 3, 4)), dtype=torch.float64)
    twin = copy.deepcopy(model)
    start = x.clone().requires_grad_()
    y = output(twin, start).sum()
    if name in ("second", "hessian"):  # a first derivative is one, with or without a graph
        torch.autograd.grad(y, [start, *(twin.parameters() if name == "second" else ())])
    with pytest.raises(RuntimeError, match=r"streaming .* layer that trains.*`with streamnorm\.frozen\(model\)"):
        DERIVATIVES[name](model, x)
    forward_mode = name in ("tangent", "jacobian, forward")
    used = model if not forward_mode else twin
    assert all(
        int(value) == (0 if forward_mode else int(expected))
        for (key, value), (_, expected) in zip(model.named_buffers(), twin.named_buffers(), strict=True)
        if key.rsplit(".")[-1] in ("samples", "grad_samples")
    )
    assert len(backward(used, x)) == len(list(used.parameters()))  # and goes on as before


def test_training_beside_forward_mode(engine: str) -> None:
    """A level of forward-mode differentiation is no hindrance for tensors without a tangent."""
    layer, twin = sn.StreamingNorm1d(4).double(), sn.StreamingNorm1d(4).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    for _ in range(2):
        with forward_ad.dual_level():
            ours = backward(layer, x)
        assert_close(ours, backward(twin, x))
    assert_close(list(layer.buffers()), list(twin.buffers()))


def test_a_gain_that_changed_since(engine: str) -> None:
    """Second derivatives are computed from the gain that was used, or refused."""
    layer = sn.SampleNorm(4).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = layer(x).pow(2).sum()
    with torch.no_grad():
        layer.weight.mul_(2)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"changed between its forward and a backward|modified by an inplace"):
        torch.autograd.grad(y, x, create_graph=True)


def test_processes_that_join_their_batches_refuse_before_they_wait() -> None:
    layer = sn.GeneralBatchNorm(4)
    view = layer.ref.view((3, 4))
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.randn(3, 4), torch.randn(3, 4))
        with pytest.raises(RuntimeError, match="streaming or synchronized layer"):
            processes.normalize(Call(x, None, None, None, view, layer.formula), None)
