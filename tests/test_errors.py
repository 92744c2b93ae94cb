"""Every error quotes the value and says what to write instead, and a refused input leaves everything as it was."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamnorm as sn
from streamnorm import ops

ENGINES = [engine.NAME for engine in ops.ENGINES]


# Constants

S = sn.StreamingNorm1d
G = sn.GeneralBatchNorm
N = sn.SampleNorm

# A call that is refused, the value that the message quotes, and what it says to write instead.
CONSTANTS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "alpha below 1": (lambda: S(4, alpha=(0.7, 0.2)), "(0.7, 0.2), which sum to 0.9", "such as (0.7, 0.3)"),
    "alpha above 1": (lambda: S(4, alpha=(0.7, 0.2, 0.2)), "(0.7, 0.2, 0.2), which sum to 1.1", "such as (0.7, 0.3)"),
    "alpha negative": (lambda: S(4, alpha=(1.5, -0.5)), "(1.5, -0.5)", "at least 0 that sum to 1"),
    "alpha nan": (lambda: S(4, alpha=(math.nan, 1)), "(nan, 1)", "such as (0.7, 0.3)"),
    "alpha a number": (lambda: S(4, alpha=0.7), "got 0.7", "two or three numbers"),  # type: ignore[arg-type]
    "alpha of four": (lambda: S(4, alpha=(1, 0, 0, 0)), "got (1, 0, 0, 0)", "two or three numbers"),
    "beta not finite": (lambda: S(4, beta=(math.inf, 0)), "(inf, 0)", "such as (0.7, 0.3, 0)"),
    "beta of one": (lambda: S(4, beta=(1,)), "got (1,)", "two or three numbers"),
    "kappa above 1": (lambda: S(4, kappa=1.5), "got 1.5", "in [0, 1], such as 0.7"),
    "kappa below 0": (lambda: S(4, kappa=-0.1), "got -0.1", "in [0, 1], such as 0.7"),
    "kappa of two": (lambda: S(4, kappa=(0.7, 0.3)), "got (0.7, 0.3)", "four of them"),
    "kappa one of four": (lambda: S(4, kappa=(0.7, 0.3, 0.7, 2)), "got (0.7, 0.3, 0.7, 2)", "in [0, 1]"),
    "kappa nan": (lambda: S(4, kappa=math.nan), "got nan", "in [0, 1], such as 0.7"),
    "window with kappa": (lambda: S(4, window=50, kappa=0.7), "window=50 and kappa=0.7", "either the window or"),
    "window with alpha": (lambda: S(4, window=50, alpha=(1, 0)), "window=50 and alpha=(1, 0)", "either the window or"),
    "window with beta": (lambda: S(4, window=50, beta=(1, 0)), "window=50 and beta=(1, 0)", "either the window or"),
    "window 0": (lambda: S(4, window=0), "got 0", "a number above 0"),
    "window negative": (lambda: S(4, window=-3), "got -3", "a number above 0"),
    "window infinite": (lambda: S(4, window=math.inf), "got inf", "a number above 0"),
    "p below 1": (lambda: S(4, p=0.5), "got 0.5", "1 and 2 are the usual ones"),
    "p nan": (lambda: N(4, p=math.nan), "got nan", "at least 1"),
    "p infinite": (lambda: G(4, p=math.inf), "got inf", "finite number"),
    "center": (lambda: S(4, center="median"), "got 'median'", "'mean' or 'zero'"),
    "scale": (lambda: S(4, scale="normal"), "got 'normal'", "'raw' or 'gaussian'"),
    "eps negative": (lambda: S(4, eps=-1e-3), "got -0.001", "at least 0, such as 1e-5"),
    "eps nan": (lambda: N(4, eps=math.nan), "got nan", "at least 0, such as 1e-5"),
    "no channels": (lambda: S(0), "got 0", "at least 1"),
    "groups, streaming": (lambda: S(8, ref=("group", 3)), "8 channels do not fall into 3", "a divisor of 8"),
    "groups, batch": (lambda: G(8, ("group", 3)), "8 channels do not fall into 3", "a divisor of 8"),
    "groups, sample": (lambda: N(8, ("group", 3)), "8 channels do not fall into 3", "a divisor of 8"),
    "groups of a reference": (
        lambda: sn.Norm(8, sn.NormRef.batch(("group", 3)), sn.LpMoment(), sn.Stream()),
        "g=3",
        "divide an axis of size 8",
    ),
    "stream on positions": (lambda: S(4, ref="position"), "ref='position'", "use SampleNorm"),
    "stream on samples": (lambda: S(4, ref=sn.NormRef.sample("layer")), "'n c ... -> n'", "Use SampleNorm"),
    "stream on sample groups": (lambda: S(4, ref=sn.NormRef.sample(("group", 2))), "-> n g", "Use SampleNorm"),
    "stream on ghosts": (lambda: S(4, ref=sn.NormRef.batch("channel").ghosts(2)), "-> ghost c", "depends on the input"),
    "stream on places": (lambda: S(4, ref=sn.NormRef.of("n c l -> c l")), "'n c l -> c l'", "give the size"),
    "ref unknown": (lambda: S(4, ref="batch"), "got 'batch'", "'channel', 'layer' or ('group', g)"),
    "ref unknown, sample": (lambda: N(4, "batch"), "got 'batch'", "'channel', 'position' or ('group', g)"),
    "running statistics of samples": (lambda: G(4, "position"), "got 'position'", "'channel', 'layer'"),
    "momentum": (lambda: G(4, momentum=1.5), "got 1.5", "in [0, 1] or None"),
    "ghosts": (lambda: G(4, ghosts=0), "got 0", "at least 1"),
    "prior": (lambda: sn.Stream(prior=(0, 0)), "got (0, 0)", "such as (0, 1)"),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants(name: str) -> None:
    call, value, mend = CONSTANTS[name]
    with pytest.raises(ValueError, match=re.escape(value)) as error:
        call()
    assert mend in str(error.value)


def test_a_momentum_in_the_place_of_affine_is_explained() -> None:
    with pytest.raises(TypeError, match=r"got 0\.1; .*window="):
        sn.StreamingNorm1d(4, 1e-5, 0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [sn.StreamingNorm2d, sn.StreamingNormAct2d])
def test_a_momentum_is_explained(make: Any) -> None:
    with pytest.raises(TypeError, match=r"StreamingNorm\w*2d takes no momentum, got momentum=0\.01: .*window=N/0\.1"):
        make(4, momentum=0.01)
    assert "momentum" not in inspect.signature(make).parameters
    assert "window" in inspect.signature(sn.StreamingNorm2d).parameters


def test_rounding_is_no_error() -> None:
    assert sn.Stream(alpha=(0.1, 0.2, 0.7)).alpha == (0.1, 0.2, 0.7)
    assert sn.Stream(alpha=(1 / 3, 1 / 3, 1 / 3)).alpha is not None


# Inputs


def half_used(layer: sn.Norm, *shape: int) -> sn.Norm:
    """In the middle of an update, so that every buffer holds something."""
    for _ in range(2):
        layer(torch.randn(shape, dtype=next(layer.parameters()).dtype, requires_grad=True)).sum().backward()
        sn.commit(layer)
    layer(torch.randn(shape, dtype=next(layer.parameters()).dtype, requires_grad=True)).sum().backward()
    return layer


OK = torch.zeros
# A layer, an input shape that it takes, what it refuses, the error, what the message quotes and what it says to write.
INPUTS: dict[str, tuple[Callable[[], sn.Norm], tuple[int, ...], tuple[Tensor, ...], type[Exception], str, str]] = {
    "rank, 1d": (
        lambda: S(4),
        (3, 4),
        (OK(3, 4, 5, 5),),
        ValueError,
        "expected 2D or 3D input, got 4D input of shape (3, 4, 5, 5)",
        "StreamingNorm2d takes it",
    ),
    "rank, 2d": (
        lambda: sn.StreamingNorm2d(4),
        (3, 4, 2, 2),
        (OK(3, 4),),
        ValueError,
        "expected 4D input, got 2D input of shape (3, 4)",
        "StreamingNorm1d takes it",
    ),
    "rank, 3d": (
        lambda: sn.StreamingNorm3d(4),
        (3, 4, 2, 2, 2),
        (OK(3, 4, 5, 5, 5, 5),),
        ValueError,
        "expected 5D input, got 6D input of shape (3, 4, 5, 5, 5, 5)",
        "5D",
    ),
    "one sample without its axis": (
        lambda: sn.StreamingNorm2d(4),
        (3, 4, 2, 2),
        (OK(4, 2, 2),),
        ValueError,
        "3D input of shape (4, 2, 2)",
        "a batch of one is x[None]",
    ),
    "a vector": (lambda: S(4), (3, 4), (OK(4),), ValueError, "1D input of shape (4,)", "a batch of one is x[None]"),
    "a vector, any rank": (lambda: G(4), (3, 4), (OK(4),), ValueError, "1D of shape (4,)", "x[None]"),
    "a number": (lambda: N(4), (3, 4), (OK(()),), ValueError, "0D of shape ()", "(N, C, ...)"),
    "channels": (
        lambda: sn.StreamingNorm2d(4),
        (3, 4, 2, 2),
        (OK(3, 5, 2, 2),),
        ValueError,
        "expected 4 channels in axis 1, got an input of shape (3, 5, 2, 2)",
        "write StreamingNorm2d(5)",
    ),
    "channels last": (
        lambda: S(4),
        (3, 4, 2),
        (OK(3, 7, 4),),
        ValueError,
        "(3, 7, 4)",
        "move the channels to axis 1",
    ),
    "integers": (lambda: S(4), (3, 4), (OK(3, 4).long(),), TypeError, "torch.int64", "write x.float()"),
    "booleans": (lambda: N(4), (3, 4), (OK(3, 4).bool(),), TypeError, "torch.bool", "write x.float()"),
    "integers and nothing in them": (lambda: S(4), (3, 4), (OK(0, 4).int(),), TypeError, "torch.int32", "x.float()"),
    "float64": (
        lambda: S(4),
        (3, 4),
        (OK(3, 4).double(),),
        TypeError,
        "the input is torch.float64 and the layer's state torch.float32",
        ".double() or .float()",
    ),
    "float64, running statistics": (
        lambda: G(4),
        (3, 4),
        (OK(3, 4).double(),),
        TypeError,
        "the input is torch.float64 and the layer's state torch.float32",
        ".double() or .float()",
    ),
    "float32 into float64": (
        lambda: S(4).double(),
        (3, 4),
        (OK(3, 4),),
        TypeError,
        "the input is torch.float32 and the layer's state torch.float64",
        ".double() or .float()",
    ),
    "float16 into float64": (lambda: S(4).double(), (3, 4), (OK(3, 4).half(),), TypeError, "torch.float16", ".float()"),
    "mask of numbers": (
        lambda: S(4),
        (3, 4),
        (OK(3, 4), OK(3)),
        ValueError,
        "got torch.float32 of shape (3,)",
        "write mask.bool()",
    ),
    "mask of another shape": (
        lambda: S(4),
        (3, 4, 5),
        (OK(3, 4, 5), OK(3, 4, 5).bool()),
        ValueError,
        "got torch.bool of shape (3, 4, 5)",
        "a bool tensor of shape (3,) or (3, 5)",
    ),
    "mask for another batch": (
        lambda: N(4),
        (3, 4, 5),
        (OK(3, 4, 5), OK(1).bool()),
        ValueError,
        "got torch.bool of shape (1,)",
        "(3,) or (3, 5)",
    ),
    "reference of another size": (
        lambda: S(4, ref=sn.NormRef.of("n c l -> c l", l=5)),
        (3, 4, 5),
        (OK(3, 4, 6),),
        ValueError,
        "l=5",
        "divide an axis of size 6",
    ),
    "reference of another rank": (
        lambda: S(4, ref=sn.NormRef.of("n c l -> c")),
        (3, 4, 5),
        (OK(3, 4),),
        ValueError,
        "(3, 4)",
        "it has 2 axes",
    ),
    "one value and its own mean": (
        lambda: G(4),
        (3, 4),
        (OK(1, 4),),
        ValueError,
        "one value per statistic for an input of shape (1, 4)",
        "Use StreamingNorm",
    ),
    "one value and its own mean, sample": (
        lambda: N(4, "channel"),
        (3, 4, 5),
        (OK(3, 4),),
        ValueError,
        "shape (3, 4)",
        "a wider reference",
    ),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs(engine: str, name: str) -> None:
    make, shape, refused, kind, value, mend = INPUTS[name]
    layer = half_used(make(), *shape)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(kind) as error:
        layer(*refused)
    assert value in str(error.value)
    assert mend in str(error.value)
    for buffer, tensor in layer.state_dict().items():
        assert tensor.equal(before[buffer]), buffer


@pytest.mark.parametrize("how", ["moved", "loaded"])
@pytest.mark.parametrize("make", [S, G], ids=lambda make: make.__name__)
def test_an_input_that_was_right_before_the_layer_changed(make: Callable[..., sn.Norm], how: str) -> None:
    layer, x = make(4), torch.randn(3, 4)
    layer(x)
    if how == "moved":
        layer.double()
    else:
        layer.load_state_dict(make(4).double().state_dict(), assign=True)
    with pytest.raises(TypeError, match=r"the input is torch\.float32 and the layer's state torch\.float64"):
        layer(x)


EVALUATED = [name for name in INPUTS if "its own mean" not in name]  # in evaluation one value is enough


@pytest.mark.parametrize("name", EVALUATED)
def test_inputs_in_evaluation(name: str) -> None:
    make, shape, refused, kind, value, _ = INPUTS[name]
    layer = half_used(make(), *shape).eval()
    with pytest.raises(kind) as error:
        layer(*refused)
    assert value in str(error.value)


# State dicts


def test_a_state_dict_from_batch_norm() -> None:
    plain = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4)))
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(half_used(S(4), 3, 4)))
    layer = model.get_submodule("1.0")
    for strict in (True, False):
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(RuntimeError) as error:
            model.load_state_dict(plain.state_dict(), strict=strict)
        assert "1.0.running_var: this is the state of a BatchNorm" in str(error.value)
        assert "streamnorm.convert(model)" in str(error.value)
        for name, tensor in layer.state_dict().items():
            assert tensor.equal(before[name]), name


def test_a_state_dict_of_another_size_is_refused_as_torch_does() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for long"):
        S(4).load_state_dict(S(4, ref=("group", 2)).state_dict())


# Second derivatives


@pytest.mark.parametrize("make", [S, G, N], ids=lambda make: make.__name__)
@pytest.mark.parametrize("through", ["input", "gain"])
def test_a_second_derivative_is_refused(make: Callable[..., sn.Norm], through: str) -> None:
    """By the engine that serves, and not before it is asked for."""
    layer = make(4)
    x = torch.randn(3, 4, requires_grad=True)
    assert layer.weight is not None
    target: Tensor = x if through == "input" else layer.weight
    (first,) = torch.autograd.grad(layer(x).pow(3).sum(), target, create_graph=True)
    assert torch.isfinite(first).all()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match="a second derivative through a streamnorm layer") as error:
        first.square().sum().backward()
    assert "create_graph=True" in str(error.value)
    assert "streamnorm.frozen(model)" in str(error.value)
    for name, tensor in layer.state_dict().items():
        assert tensor.equal(before[name]), name


def test_a_second_derivative_of_a_stream_is_refused_by_every_engine(engine: str) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    (first,) = torch.autograd.grad(S(4)(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative through a streamnorm layer"):
        first.square().sum().backward()


@pytest.mark.parametrize("target", ["x", "0.weight", "0.bias", "1.weight", "3.weight"])
@pytest.mark.parametrize(
    ("name", "make"),
    [(name, make) for name in ENGINES for make in (S, G) if name != "plain" or make is S],  # G is autograd alone there
)
def test_no_way_to_a_second_derivative_is_open(name: str, make: Callable[..., sn.Norm], target: str) -> None:
    """``autograd.grad`` runs only what leads to its targets; part of a derivative would be a wrong one."""
    model = nn.Sequential(nn.Linear(3, 4), make(4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(5, 3, requires_grad=True)
    with ops.force(name):
        (first,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative through a streamnorm layer"):
        torch.autograd.grad(first.square().sum(), x if target == "x" else model.get_parameter(target))


def test_create_graph_gives_the_same_gradient(engine: str) -> None:
    layer, x, gradients = S(4), torch.randn(3, 4), []
    for create_graph in (False, True):
        leaf = x.clone().requires_grad_()
        each = copy.deepcopy(layer)
        (gradient,) = torch.autograd.grad(each(leaf).pow(3).sum(), leaf, create_graph=create_graph)
        gradients.append((gradient.detach(), each.short_grad))
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs)


def test_retain_graph_works(engine: str) -> None:
    layer = S(4, beta=(0, 0, 1))
    x = torch.randn(3, 4, requires_grad=True)
    loss = layer(x).pow(3).sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_graph_that_was_freed_is_refused_as_torch_does(engine: str) -> None:
    loss = S(4)(torch.randn(3, 4, requires_grad=True)).pow(3).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_an_input_changed_in_place_before_backward_is_refused_as_torch_does() -> None:
    h = torch.randn(3, 4, requires_grad=True) * 1
    loss = S(4)(h).pow(3).sum()
    with torch.no_grad():
        h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Others


def test_evaluation_statistics_of_a_layer_that_keeps_none() -> None:
    with pytest.raises(ValueError, match="SampleNorm takes its statistics from each input"):
        N(4).eval_stats()


def test_constants_of_a_layer_without_a_stream() -> None:
    with pytest.raises(ValueError, match="GeneralBatchNorm carries no stream"):
        G(4).set_stream(sn.Stream())


def test_an_engine_that_does_not_exist() -> None:
    names = ", ".join(ENGINES)
    with (
        pytest.raises(ValueError, match=rf"no engine 'cuda'; STREAMNORM_ENGINE can be one of {names}"),
        ops.force("cuda"),
    ):
        pass
