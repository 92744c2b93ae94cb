"""PyTorch's generic module tests, with the inputs that it tests its own modules with, over the layers that equal them.

``torch.testing._internal.common_modules`` describes each module of torch.nn by constructor and forward inputs. Adapters
make our layer of the same arguments; the layer of torch.nn stands beside it, with the same weights. Where a layer of
ours differs on purpose, ``Differs`` says why and the input is left out; each reason is one of ``REASONS``, and occurs.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from itertools import islice, product
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence
from torch.testing import assert_close

import streamnorm as sn

pytest.importorskip("expecttest", reason="PyTorch's generic module tests need expecttest")
# The import is meant for PyTorch's own test programs: it would forbid others to set flags, and slow TorchScript down.
with (
    patch.object(torch.backends, "disable_global_flags"),
    patch.object(torch._C.ScriptFunction, "__call__", torch._C.ScriptFunction.__call__),
    patch.object(torch._C.ScriptMethod, "__call__", torch._C.ScriptMethod.__call__),
):
    from torch.testing._internal.common_modules import ErrorModuleInput, ModuleErrorEnum, ModuleInfo, module_db

INFOS: dict[type[nn.Module], ModuleInfo] = {info.module_cls: info for info in module_db}

REASONS = {
    "track": "whether running statistics are kept is the kind of a layer of ours, and no option",
    "gain": "gain and bias are per channel, and not per element",
    "batch axis": "a sample without a batch axis is refused, with the hint x[None]",
    "empty": "an empty mini-batch is not counted, where BatchNorm counts it",
    "shape": "normalized_shape lies in the last axes, where ours are samples, then channels",
    "gradgrad": "a streaming layer that trains has no second derivative, and takes gradients one at a time",
    "eps": "eps = 0 is taken, as in torch.nn.GroupNorm, and a negative one refused when the layer is made",
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),  # by gradcheck itself
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

met: set[str] = set()
"""The reasons that occurred while this module was imported: all inputs are adapted then."""


class Differs(Exception):
    """A layer of ours does not take these arguments, for one of ``REASONS``."""

    def __init__(self, reason: str) -> None:
        super().__init__(REASONS[reason])
        met.add(reason)


def _refuse_tracking(track_running_stats: bool, wanted: bool) -> None:
    if track_running_stats != wanted:
        raise Differs("track")


def general(
    n: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True, track: bool = True, **new: Any
):
    """GeneralBatchNorm for a BatchNorm's arguments."""
    _refuse_tracking(track, True)
    return sn.GeneralBatchNorm(n, "channel", momentum, eps=eps, affine=affine, **new)


def special(cls: Callable[..., sn.Norm]) -> Callable[..., sn.Norm]:
    """A streaming layer that takes the mini-batch's own statistics and gradients: Batch Normalization."""

    def make(n: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True, track: bool = True, **new: Any):
        _refuse_tracking(track, True)
        return cls(n, eps, affine, alpha=(0, 0, 1), beta=(0, 0, 1), p=2, **new)

    return make


def group(groups: int, n: int, eps: float = 1e-5, affine: bool = True, **new: Any):
    """SampleNorm for a GroupNorm's arguments."""
    return sn.SampleNorm(n, ("group", groups), eps, affine, **new)


def instance(n: int, eps: float, momentum: float, affine: bool = False, track: bool = False, **new: Any):
    """SampleNorm for an InstanceNorm's arguments."""
    _refuse_tracking(track, False)
    return sn.SampleNorm(n, "channel", eps, affine, **new)


def layer(shape: list[int], eps: float = 1e-5, elementwise_affine: bool = True, **new: Any):
    """SampleNorm for a LayerNorm's arguments, where the normalized shape begins with the channels."""
    if elementwise_affine:
        raise Differs("gain")
    if len(shape) == 1:
        raise Differs("shape")
    return sn.SampleNorm(shape[0], "layer", eps, affine=False, **new)


def recurrent(cls: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A recurrent layer or cell of ours without a normalization."""
    return lambda *args, **kwargs: cls(*args, norm=None, **kwargs)


class Pair(NamedTuple):
    """A layer of ours, made as torch.nn's is."""

    make: Callable[..., nn.Module]
    theirs: type[nn.Module]
    axes: int = 0
    """How many axes an input with samples has at least; 0 for any."""

    @property
    def info(self) -> ModuleInfo:
        return INFOS[self.theirs]


PAIRS = {
    "GeneralBatchNorm, 1d": Pair(general, nn.BatchNorm1d),
    "GeneralBatchNorm, 2d": Pair(general, nn.BatchNorm2d),
    "GeneralBatchNorm, 3d": Pair(general, nn.BatchNorm3d),
    "StreamingNorm1d": Pair(special(sn.StreamingNorm1d), nn.BatchNorm1d),
    "StreamingNorm2d": Pair(special(sn.StreamingNorm2d), nn.BatchNorm2d),
    "StreamingNorm3d": Pair(special(sn.StreamingNorm3d), nn.BatchNorm3d),
    "SampleNorm, groups": Pair(group, nn.GroupNorm),
    "SampleNorm, 1d": Pair(instance, nn.InstanceNorm1d, 3),
    "SampleNorm, 2d": Pair(instance, nn.InstanceNorm2d, 4),
    "SampleNorm, 3d": Pair(instance, nn.InstanceNorm3d, 5),
    "SampleNorm, layer": Pair(layer, nn.LayerNorm),
    **{name: Pair(recurrent(getattr(sn, name)), getattr(nn, name)) for name in ("RNN", "GRU", "LSTM")},
    **{name: Pair(recurrent(getattr(sn, name)), getattr(nn, name)) for name in ("RNNCell", "GRUCell", "LSTMCell")},
}


class Sample(NamedTuple):
    """A layer of ours and torch.nn's with the same weights, and an input."""

    ours: Any
    theirs: Any
    args: tuple[Any, ...]
    reference: Callable[..., Any] | None


def samples(pair: Pair, dtype: torch.dtype = torch.float64, training: bool = True, **new: Any) -> Iterator[Sample]:
    """All inputs of PyTorch's that the pair takes."""
    options = {"device": "cpu", "dtype": dtype, **new}
    for given in pair.info.module_inputs_func(
        pair.info, requires_grad=True, training=training, device="cpu", dtype=dtype
    ):
        made, used = given.constructor_input, given.forward_input
        try:
            ours = pair.make(*made.args, **made.kwargs, **options).train(training)
            if used.args[0].dim() < pair.axes:
                raise Differs("batch axis")
        except Differs:
            continue
        theirs = pair.theirs(*made.args, **made.kwargs, **options).train(training)
        with torch.no_grad():
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                if a.device.type != "meta":
                    a.copy_(b.copy_(torch.rand_like(b) + 0.5))
        assert not used.kwargs
        yield Sample(ours, theirs, used.args, given.reference_fn)


for each in PAIRS.values():
    assert list(samples(each))


def pairs(*kinds: str) -> pytest.MarkDecorator:
    """Parametrize by the pairs whose names begin so."""
    names = [name for name in PAIRS if not kinds or name.startswith(kinds)]
    return pytest.mark.parametrize("pair", [PAIRS[name] for name in names], ids=names)


MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])


def leaves(value: Any) -> list[Tensor]:
    """The tensors in nested tuples."""
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, Tensor):
        return [value]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, tuple | list) else []


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested tuples of other tensors."""
    if isinstance(value, tuple):
        return tuple(changed(item, change) for item in value)
    return change(value) if isinstance(value, Tensor) else value


def near(dtype: torch.dtype) -> dict[str, Any]:
    tolerances = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
    return {"rtol": tolerances[dtype], "atol": tolerances[dtype]}


def gradients(module: nn.Module, args: Any, outputs: Any) -> list[Tensor]:
    """Of inputs and parameters, for an output gradient that is the same for all who ask."""
    of = [t for t in (*leaves(args), *module.parameters()) if t.requires_grad]
    torch.manual_seed(5)
    arriving = [torch.randn(y.shape, dtype=y.dtype) for y in leaves(outputs)]
    found = torch.autograd.grad(leaves(outputs), of, arriving, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(of, found, strict=True)]


@MODES
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name, pair in PAIRS.items() for dtype in pair.info.dtypes], ids=str
)
def test_forward_and_gradient(name: str, dtype: torch.dtype, training: bool) -> None:
    """Values, dtypes and shapes of torch.nn's module, for the dtypes that PyTorch tests it with."""
    for sample in samples(PAIRS[name], dtype, training):
        y, expected = sample.ours(*sample.args), sample.theirs(*sample.args)
        assert_close(y, expected, **near(dtype))
        found = gradients(sample.ours, sample.args, y)
        assert_close(found, gradients(sample.theirs, sample.args, expected), **near(dtype))
        if sample.reference is not None:
            assert_close(sample.ours(*sample.args), sample.reference(sample.ours, *sample.args), **near(dtype))


@pairs("General", "RNN", "GRU", "LSTM")
def test_states_are_interchangeable(pair: Pair) -> None:
    """Names and values, after a use in training."""
    for sample in samples(pair):
        for each in (sample.ours, sample.theirs):
            each(*sample.args)
        if leaves(sample.args)[0].numel() == 0:
            assert (int(sample.ours.num_batches_tracked), int(sample.theirs.num_batches_tracked)) == (0, 1)
            sample.theirs.num_batches_tracked.zero_()
            met.add("empty")
        assert_close(sample.ours.state_dict(), sample.theirs.state_dict(), **near(torch.float64))
        sample.theirs.load_state_dict(sample.ours.state_dict())
        sample.ours.load_state_dict(sample.theirs.state_dict())


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pairs()
def test_device_and_dtype_are_those_asked_for(pair: Pair, dtype: torch.dtype, device: str) -> None:
    """By factory arguments, by a default device, and by a conversion later."""
    for sample in samples(pair, dtype, device=device):
        made = [sample.ours, copy.deepcopy(sample.ours).to_empty(device=device), sample.ours.to(device, dtype)]
        for module, tensor in ((m, t) for m in made for t in (*m.parameters(), *m.buffers())):
            assert tensor.device.type == device, module
            assert tensor.dtype == dtype or not tensor.is_floating_point(), module
        other = torch.float32 if dtype == torch.float64 else torch.float64
        kinds = [t.dtype for t in sample.theirs.to(other).state_dict().values()]
        converted = sample.ours.to(other).state_dict()
        assert {t.dtype for t in converted.values()} <= {other, *kinds}
    with torch.device(device):
        for sample in samples(pair, dtype, device=None):
            assert {t.device.type for t in sample.ours.state_dict().values()} <= {device}


@MODES
@pairs()
def test_pickles_and_copies_compute_the_same(pair: Pair, training: bool) -> None:
    for sample in samples(pair, training=training):
        sample.ours(*sample.args)
        file = io.BytesIO()
        torch.save(sample.ours, file)
        file.seek(0)
        twins = [
            torch.load(file, weights_only=False),
            pickle.loads(pickle.dumps(sample.ours)),
            copy.deepcopy(sample.ours),
        ]
        y = sample.ours(*sample.args)
        for twin in twins:
            assert twin.training == training
            assert repr(twin) == repr(sample.ours)
            assert_close(twin(*sample.args), y, rtol=0, atol=0)
            assert_close(twin.state_dict(), sample.ours.state_dict(), rtol=0, atol=0)


def scattered(t: Tensor) -> Tensor:
    """The same values with gaps between them."""
    if t.dim() == 0 or t.numel() == 0:
        return t
    return torch.stack((t, torch.full_like(t, torch.nan)), -1)[..., 0]


@MODES
@pairs()
def test_inputs_and_gradients_that_are_not_contiguous(pair: Pair, training: bool) -> None:
    for sample in samples(pair, training=training):
        plain = copy.deepcopy(sample.ours)
        expected = plain(*sample.args)
        output_gradients = [torch.randn_like(y) for y in leaves(expected)]
        of = [t for t in leaves(sample.args) if t.requires_grad] + list(plain.parameters())
        wanted = torch.autograd.grad(leaves(expected), of, output_gradients, allow_unused=True)
        for inputs, outputs in product((False, True), repeat=2):
            twin = copy.deepcopy(sample.ours)
            args = changed(sample.args, lambda t: scattered(t.detach()).requires_grad_()) if inputs else sample.args
            y = twin(*args)
            assert_close(y, expected, **near(torch.float64))
            of = [t for t in leaves(args) if t.requires_grad] + list(twin.parameters())
            arriving = [scattered(g) for g in output_gradients] if outputs else output_gradients
            found = torch.autograd.grad(leaves(y), of, arriving, allow_unused=True)
            for a, b in zip(found, wanted, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    assert_close(a, b, **near(torch.float64))


def as_function(sample: Sample) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """The module as a function of its inputs and parameters, and these."""
    inputs = [t for t in leaves(sample.args) if t.requires_grad]
    names, parameters = zip(*sample.ours.named_parameters()) if list(sample.ours.parameters()) else ((), ())

    def function(*tensors: Tensor) -> Any:
        given = iter(tensors)
        args = changed(sample.args, lambda t: next(given) if t.requires_grad else t)
        return tuple(leaves(torch.func.functional_call(sample.ours, dict(zip(names, given)), args)))

    return function, (*inputs, *parameters)


@MODES
@pairs()
def test_gradients_are_those_of_finite_differences(pair: Pair, training: bool) -> None:
    for sample in samples(pair, training=training):
        function, tensors = as_function(sample)
        streams = training and isinstance(sample.ours, sn.Norm) and sample.ours.stream is not None
        more = {} if streams else {"check_batched_grad": True, "check_forward_ad": isinstance(sample.ours, sn.Norm)}
        if all(t.numel() for t in tensors):
            assert gradcheck(function, tensors, fast_mode=True, **more)


@MODES
@pairs("General", "Sample")
def test_second_derivatives_are_those_of_finite_differences(pair: Pair, training: bool) -> None:
    for sample in samples(pair, training=training):
        function, tensors = as_function(sample)
        if all(t.numel() for t in tensors):
            assert gradgradcheck(function, tensors, fast_mode=True, check_batched_grad=True, check_fwd_over_rev=True)


@pairs("RNN", "GRU", "LSTM")
def test_second_derivatives_of_recurrent_layers(pair: Pair) -> None:
    """One input in ten: what computes them without a normalization is torch.nn's own code."""
    for sample in islice(samples(pair), 0, None, 10):
        assert gradgradcheck(*as_function(sample), fast_mode=True)


@pairs("Streaming")
def test_second_derivatives_of_a_stream(pair: Pair) -> None:
    """Refused in training, and those of finite differences in evaluation."""
    for sample in samples(pair, training=False):
        function, tensors = as_function(sample)
        if all(t.numel() for t in tensors):
            assert gradgradcheck(function, tensors, fast_mode=True)
    for sample in samples(pair):
        if sample.args[0].numel() == 0:
            continue
        y = sample.ours(*sample.args)
        (first,) = torch.autograd.grad(y.pow(3).sum(), sample.args[0], create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative through a streaming"):
            first.sum().backward()
        y = sample.ours(*sample.args)
        several = torch.ones(2, *y.shape, dtype=y.dtype)
        with pytest.raises(RuntimeError, match="one at a time"):
            torch.autograd.grad(y, sample.args[0], several, is_grads_batched=True)
        met.add("gradgrad")


@MODES
@pairs("General", "Streaming", "Sample")
def test_memory_formats(pair: Pair, training: bool) -> None:
    """What comes in channels last goes out so."""
    for sample in samples(pair, training=training):
        (x,) = sample.args
        if x.dim() not in (4, 5) or x.numel() == 0:
            continue
        memory_format = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        twin = copy.deepcopy(sample.ours).to(memory_format=memory_format)
        expected = sample.ours(x)
        leaf = x.detach().contiguous(memory_format=memory_format).requires_grad_()
        y = twin(leaf)
        assert y.is_contiguous(memory_format=memory_format)
        assert_close(y, expected, **near(torch.float64))
        assert_close(gradients(twin, leaf, y), gradients(sample.ours, x, expected), **near(torch.float64))


@pairs("General", "Streaming", "Sample")
def test_training_and_evaluation_differ_where_torch_nn_s_do(pair: Pair) -> None:
    for sample in samples(pair):
        if sample.args[0].numel() == 0:
            continue
        differ = not torch.allclose(sample.ours(*sample.args), sample.ours.eval()(*sample.args))
        assert differ == (pair.info.train_and_eval_differ and "Instance" not in pair.theirs.__name__)


@pairs("RNN", "GRU", "LSTM")
def test_errors_are_torch_nn_s(pair: Pair) -> None:
    """Where PyTorch has a test of an error, ours raises it, with the same words."""
    if pair.info.module_error_inputs_func is None:
        pytest.skip("PyTorch has no errors to test for this module")
    given: list[ErrorModuleInput] = pair.info.module_error_inputs_func(
        pair.info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    )
    for error in given:
        made, used = error.module_error_input.constructor_input, error.module_error_input.forward_input
        if error.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                pair.make(*made.args, **made.kwargs)
        else:
            module = pair.make(*made.args, **made.kwargs)
            with pytest.raises(error.error_type, match=error.error_regex):
                module(*used.args, **used.kwargs)


@pairs("General", "Streaming")
def test_an_eps_of_zero_is_taken(pair: Pair) -> None:
    assert pair.make(3, 0.0).eps == 0
    with pytest.raises(ValueError, match="eps is added"):
        pair.make(3, -1.0)
    met.add("eps")


def test_every_difference_is_one() -> None:
    """Those that are met while a test runs belong to tests of their own."""
    assert met | {"gradgrad", "eps", "empty"} == set(REASONS)
