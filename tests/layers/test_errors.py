"""Every error quotes the value and says what to write instead, and a refused input leaves everything as it was."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamnorm as sn
from streamnorm import ops

ENGINES = [engine.name for engine in ops.ENGINES]


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


U: Any = sn  # without the types that would keep these mistakes from being made

# What stands for a number, a count or a choice and is none. The message quotes the value and says what is meant.
KINDS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "channels a float": (lambda: U.StreamingNorm1d(4.0), "got 4.0", "an integer of at least 1"),
    "channels a string": (lambda: U.SampleNorm("4"), "got '4'", "an integer of at least 1"),
    "channels in groups": (lambda: U.GeneralBatchNorm("4", ("group", 2)), "got '4'", "an integer"),
    "channels None": (lambda: U.StreamingNormAct2d(None), "got None", "an integer"),
    "channels True": (lambda: U.StreamingNorm1d(True), "got True", "an integer of at least 1"),
    "eps a string": (lambda: U.StreamingNorm1d(4, eps="1e-5"), "got '1e-5'", "such as 1e-5"),
    "eps None": (lambda: U.GeneralBatchNorm(4, eps=None), "got None", "such as 1e-5"),
    "affine a number": (lambda: U.SampleNorm(4, affine=1), "got 1", "True or False"),
    "bias a string": (lambda: U.StreamingNorm1d(4, bias="no"), "got 'no'", "True or False"),
    "dtype of integers": (lambda: U.StreamingNorm1d(4, dtype=torch.int64), "got torch.int64", "such as torch.float32"),
    "p a string": (lambda: U.StreamingNorm1d(4, p="1"), "got '1'", "such as 1 or 2"),
    "p None": (lambda: U.LpMoment(None), "got None", "such as 1 or 2"),
    "window a string": (lambda: U.StreamingNorm1d(4, window="200"), "got '200'", "a number above 0"),
    "window True": (lambda: U.StreamingNorm1d(4, window=True), "got True", "a number above 0"),
    "alpha a string": (lambda: U.StreamingNorm1d(4, alpha="ab"), "got 'ab'", "such as (0.7, 0.3)"),
    "alpha of strings": (lambda: U.StreamingNorm1d(4, alpha=("1", "0")), "got ('1', '0')", "two or three"),
    "beta with None": (lambda: U.StreamingNorm1d(4, beta=(None, 1)), "got (None, 1)", "two or three"),
    "kappa a string": (lambda: U.StreamingNorm1d(4, kappa="0.7"), "got '0.7'", "such as 0.7"),
    "prior a number": (lambda: U.Stream(prior=3), "got 3", "such as (0, 1)"),
    "momentum a string": (lambda: U.GeneralBatchNorm(4, momentum="0.1"), "got '0.1'", "in [0, 1] or None"),
    "ghosts a float": (lambda: U.GeneralBatchNorm(4, ghosts=2.0), "got 2.0", "an integer of at least 1"),
    "a pattern that is no text": (lambda: U.NormRef(3), "got 3", "'n c ... -> c'"),
    "a reference by name": (
        lambda: U.Norm(4, "channel", U.LpMoment()),
        "got 'channel'",
        "NormRef.batch('channel')",
    ),
    "a moment by its order": (
        lambda: U.Norm(4, U.NormRef.batch("channel"), 2),
        "got 2",
        "LpMoment(p=1)",
    ),
    "a stream by its window": (
        lambda: U.Norm(4, U.NormRef.batch("channel"), U.LpMoment(), 200),
        "got 200",
        "Stream(window=200)",
    ),
    "another stream by its window": (lambda: U.StreamingNorm1d(4).set_stream(200), "got 200", "Stream(window"),
    "no stream": (lambda: U.StreamingNorm1d(4).set_stream(None), "got None", "Stream(window"),
    "an activation by its name": (
        lambda: U.StreamingNormAct2d(4, act="relu"),
        "got 'relu'",
        "such as nn.ReLU()",
    ),
    "an activation's class": (
        lambda: U.StreamingNormAct2d(4, act=nn.ReLU),
        "got <class",
        "such as nn.ReLU()",
    ),
    "a dropout by its rate": (
        lambda: U.StreamingNormAct2d(4, drop=0.1),
        "got 0.1",
        "such as nn.Dropout(0.1)",
    ),
    "a norm that is a number": (lambda: U.GRU(3, 4, norm=3), "got 3", "'streaming', 'batch'"),
    "a norm that is a module": (
        lambda: U.GRU(3, 4, norm=nn.LayerNorm(4)),
        "got a module",
        "norm=lambda features: LayerNorm(...)",
    ),
    "a factory of no modules": (lambda: U.GRU(3, 4, norm=str), "made '12' of 12", "a module"),
    "gain a string": (lambda: U.LSTM(3, 4, gain="x"), "got 'x'", "such as 0.1"),
    "max_steps a float": (
        lambda: U.RNN(3, 4, norm="batch-per-step", max_steps=2.5),
        "got 2.5",
        "the length of your training sequences",
    ),
    "reset_after a string": (lambda: U.GRU(3, 4, reset_after="no"), "got 'no'", "True or"),
    "norm_cell a number": (lambda: U.LSTMCell(3, 4, norm_cell=1), "got 1", "True or False"),
    "mini-batches a string": (lambda: U.accumulate([], "2"), "got '2'", "an integer"),
    "a loader that is a number": (lambda: U.accumulate(3, 2), "got int", "a DataLoader"),
    "calibration with a number": (lambda: U.calibrate(U.StreamingNorm1d(4), 3), "got int", "a DataLoader"),
    "a forward that is none": (lambda: U.calibrate(U.StreamingNorm1d(4), [], 3), "got 3", "a function"),
    "an adaptation by a string": (lambda: U.adapt(U.StreamingNorm1d(4), "fast"), "got 'fast'", "above 0"),
    "a converted type": (lambda: U.register_converter("x", S), "got 'x'", "a layer type"),
    "a converter": (lambda: U.register_converter(nn.Hardtanh, 3), "got 3", "a function"),
    "where by position": (lambda: U.convert(nn.BatchNorm1d(4), 200), "got 200", "where(name, module)"),
    "also without a tuple": (
        lambda: U.convert(nn.GroupNorm(1, 4), also=nn.GroupNorm),
        "GroupNorm'>",
        "such as (nn.GroupNorm,)",
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds(name: str) -> None:
    call, value, meaning = KINDS[name]
    with pytest.raises(TypeError, match=re.escape(value)) as error:
        call()
    assert meaning in str(error.value)


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    layer = S(numpy.int64(4), eps=torch.tensor(1e-3), p=numpy.float64(1.5), alpha=torch.tensor([0.5, 0.5]))  # type: ignore[arg-type]
    assert layer.num_features == 4
    assert layer.formula == S(4, eps=torch.tensor(1e-3).item(), p=1.5, alpha=(0.5, 0.5)).formula
    assert hash(sn.LpMoment(torch.tensor(2.0))) == hash(sn.LpMoment(2))  # type: ignore[arg-type]
    assert sn.NormRef.batch(("group", numpy.int64(2))) == sn.NormRef.batch(("group", 2))


@pytest.mark.parametrize("call", [sn.convert, sn.fold, sn.to_batchnorm, sn.commit, sn.freeze, sn.reset_stats, sn.adapt])
@pytest.mark.parametrize("given", [[S(4)], nn.BatchNorm1d, None])
def test_a_model_is_asked_for(call: Callable[[Any], Any], given: Any) -> None:
    got = {list: "got list", type: "got the class BatchNorm1d", type(None): "got NoneType"}[type(given)]
    with pytest.raises(TypeError, match=f"expected a layer or a model, which is a torch.nn.Module, {got}"):
        call(given)


# Names of arguments

SURPRISE = "got an unexpected keyword argument"
# What is made, of what, and how the message begins.
MISSPELT: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
    (sn.StreamingNorm2d, (4,), {"windw": 3}, f"StreamingNorm2d {SURPRISE} 'windw'; did you mean 'window'?"),
    (sn.StreamingNormAct2d, (4,), {"actt": 3}, f"StreamingNormAct2d {SURPRISE} 'actt'; did you mean 'act'?"),
    (sn.StreamingNormAct2d, (4,), {"refs": 3}, f"StreamingNormAct2d {SURPRISE} 'refs'; did you mean 'ref'?"),
    (sn.SampleNorm, (4,), {"afine": 3}, f"SampleNorm {SURPRISE} 'afine'; did you mean 'affine'?"),
    (sn.SampleNorm, (4,), {"window": 3}, f"SampleNorm {SURPRISE} 'window'; it takes num_features, ref, eps, affine,"),
    (sn.GeneralBatchNorm, (4,), {"momemtum": 3}, f"GeneralBatchNorm {SURPRISE} 'momemtum'; did you mean 'momentum'?"),
    (sn.Norm, (4, None, None), {"strem": 3}, f"Norm {SURPRISE} 'strem'; did you mean 'stream'?"),
    (sn.Stream, (), {"windows": 3}, f"Stream {SURPRISE} 'windows'; did you mean 'window'?"),
    (sn.LpMoment, (), {"centre": 3}, f"LpMoment {SURPRISE} 'centre'; did you mean 'center'?"),
    (sn.NormRef, ("n c -> c",), {"size": 3}, f"NormRef {SURPRISE} 'size'; did you mean 'sizes'?"),
    (sn.GRU, (3, 4), {"dropuot": 3}, f"GRU {SURPRISE} 'dropuot'; did you mean 'dropout'?"),
    (sn.LSTM, (3, 4), {"windw": 3}, f"LSTM {SURPRISE} 'windw'; did you mean 'window'?"),
    (sn.RNNCell, (3, 4), {"nonlinarity": 3}, f"RNNCell {SURPRISE} 'nonlinarity'; did you mean 'nonlinearity'?"),
    (sn.LSTMCell, (3, 4), {"nonlinearity": 3}, "LSTMCell takes no nonlinearity, got nonlinearity=3: only RNN and"),
    (sn.GRU, (3, 4), {"norm_cell": 3}, "GRU takes no norm_cell, got norm_cell=3: only LSTM and LSTMCell have it"),
    (sn.GRU, (3, 4), {"affine": 3}, "GRU takes no affine, got affine=3: write norm=lambda features: StreamingNorm1d("),
    (sn.convert, (nn.BatchNorm1d(4),), {"windw": 3}, f"convert {SURPRISE} 'windw'; did you mean 'window'?"),
    (sn.convert, (nn.BatchNorm1d(4),), {"momentum": 3}, "convert takes no momentum, got momentum=3: it has a memory"),
    (sn.StreamingNorm1d, (4,), {"momntum": 3}, "StreamingNorm1d takes no momentum, got momntum=3: it has a memory"),
    (sn.StreamingNorm1d, (4,), {"track_running_stats": 3}, "StreamingNorm1d takes no track_running_stats, got track"),
    (sn.StreamingNorm3d, (), {}, "StreamingNorm3d: missing a required argument: 'num_features'"),
    (sn.StreamingNorm1d, (4, 1e-5, True, 1), {}, "StreamingNorm1d takes num_features, eps, affine by position and p,"),
    (type("MyNorm", (S,), {}), (4,), {"windw": 3}, f"MyNorm {SURPRISE} 'windw'; did you mean 'window'?"),
    (type("MyGRU", (sn.GRU,), {}), (3, 4), {"windw": 3}, f"MyGRU {SURPRISE} 'windw'; did you mean 'window'?"),
]


@pytest.mark.parametrize(("make", "args", "kwargs", "message"), MISSPELT, ids=[case[3][:40] for case in MISSPELT])
def test_an_argument_that_is_not_there(make: Any, args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(TypeError, match="^" + re.escape(message)):
        make(*args, **kwargs)


def test_a_projection_is_refused_as_torch_does() -> None:
    for make in (nn.GRU, U.GRU, U.RNN):
        with pytest.raises(ValueError, match=r"^proj_size argument is only supported for LSTM, not RNN or GRU$"):
            make(3, 4, proj_size=2)


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: S(4, ref="chanel"), "did you mean 'channel'?"),
        (lambda: S(4, ref="n c ... -> c"), "write NormRef('n c ... -> c')"),
        (lambda: sn.GRU(3, 4, norm="stream"), "did you mean 'streaming'?"),
        (lambda: sn.synchronize(S(4), "updates"), "did you mean 'update'?"),
    ],
)
def test_the_nearest_choice_is_named(call: Callable[[], Any], hint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(hint)):
        call()


@pytest.mark.parametrize(
    "make",
    [
        *(partial(layer, 4) for layer in (S, sn.StreamingNorm2d, sn.StreamingNorm3d, sn.StreamingNormAct2d, G, N)),
        *(partial(network, 3, 4) for network in (sn.RNN, sn.GRU, sn.LSTM, sn.RNNCell, sn.GRUCell, sn.LSTMCell)),
        partial(sn.GRU, 3, 4, norm="batch-per-step", max_steps=3),
    ],
    ids=lambda make: make.func.__name__,
)
def test_initialization_is_skipped_as_for_torch_layers(make: Any) -> None:
    skipped = nn.utils.skip_init(make.func, *make.args, **make.keywords)
    assert {t.device.type for t in skipped.state_dict().values()} == {"cpu"}
    skipped.reset_parameters()
    ready = make()
    for name, value in ready.state_dict().items():
        if "weight_" not in name and "bias_" not in name:
            assert skipped.state_dict()[name].equal(value), name


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
INPUTS: dict[str, tuple[Callable[[], sn.Norm], tuple[int, ...], tuple[Any, ...], type[Exception], str, str]] = {
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
    "float8": (
        lambda: S(4),
        (3, 4),
        (OK(3, 4).to(torch.float8_e4m3fn),),
        TypeError,
        "torch.float8_e4m3fn",
        "write x.float()",
    ),
    "mask that is no tensor": (
        lambda: S(4),
        (3, 4),
        (OK(3, 4), [True] * 3),
        TypeError,
        "got a list",
        "a bool tensor of shape (3,)",
    ),
    "mask on another device": (
        lambda: S(4),
        (3, 4),
        (OK(3, 4), torch.ones(3, dtype=torch.bool, device="meta")),
        RuntimeError,
        "the mask on meta",
        "write mask.to(x.device)",
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


@pytest.mark.parametrize("version", [None, 1])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_a_batch_norm_of_version_1(version: int | None, assign: bool) -> None:
    """From before there was ``num_batches_tracked``: GeneralBatchNorm takes it as nn.BatchNorm does."""
    plain = nn.BatchNorm1d(3)
    plain(torch.randn(8, 3))
    old = OrderedDict((name, value) for name, value in plain.state_dict().items() if "num" not in name)
    if version is not None:
        old._metadata = OrderedDict({"": {"version": version}})  # type: ignore[attr-defined]
    ours, theirs = G(3), nn.BatchNorm1d(3)
    for layer in (ours, theirs):
        layer(torch.randn(8, 3))
        layer.load_state_dict(old, assign=assign)
    for name, value in theirs.state_dict().items():
        assert value.equal(ours.state_dict()[name]), name
    on_meta = G(3, device="meta")
    on_meta.load_state_dict(old, assign=True)
    assert on_meta.num_batches_tracked.equal(torch.tensor(0))
    with pytest.raises(RuntimeError, match="running_mean"):  # this one is missed
        G(3).load_state_dict({name: value for name, value in old.items() if name != "running_mean"})


def test_a_state_dict_of_another_size_is_refused_as_torch_does() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for long"):
        S(4).load_state_dict(S(4, ref=("group", 2)).state_dict())


# Second derivatives


@pytest.mark.parametrize("through", ["input", "gain"])
def test_a_second_derivative_is_refused(through: str) -> None:
    """By the engine that serves, and not before it is asked for."""
    layer = S(4)
    x = torch.randn(3, 4, requires_grad=True)
    assert layer.weight is not None
    target: Tensor = x if through == "input" else layer.weight
    (first,) = torch.autograd.grad(layer(x).pow(3).sum(), target, create_graph=True)
    assert torch.isfinite(first).all()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match="a second derivative through a streaming") as error:
        first.square().sum().backward()
    assert "create_graph=True" in str(error.value)
    assert "streamnorm.frozen(model)" in str(error.value)
    for name, tensor in layer.state_dict().items():
        assert tensor.equal(before[name]), name


def test_a_second_derivative_of_a_stream_is_refused_by_every_engine(engine: str) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    (first,) = torch.autograd.grad(S(4)(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative through a streaming"):
        first.square().sum().backward()


@pytest.mark.parametrize("target", ["x", "0.weight", "0.bias", "1.weight", "3.weight"])
@pytest.mark.parametrize("name", ENGINES)
def test_no_way_to_a_second_derivative_is_open(name: str, target: str) -> None:
    """``autograd.grad`` runs only what leads to its targets; part of a derivative would be a wrong one."""
    model = nn.Sequential(nn.Linear(3, 4), S(4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(5, 3, requires_grad=True)
    with ops.force(name):
        (first,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative through a streaming"):
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
