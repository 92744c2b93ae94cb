"""Moving a model in and out: nothing changes that should not, and nothing is passed over in silence."""

from __future__ import annotations

import copy
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils import parametrize, prune

import streamnorm as sn
from streamnorm.conversion import comparison, foreign

BATCH_NORMS: dict[type[nn.Module], tuple[type[sn.Norm], tuple[int, ...]]] = {
    nn.BatchNorm1d: (sn.StreamingNorm1d, (5, 4)),
    nn.BatchNorm2d: (sn.StreamingNorm2d, (5, 4, 3, 2)),
    nn.BatchNorm3d: (sn.StreamingNorm3d, (5, 4, 3, 2, 2)),
    nn.SyncBatchNorm: (sn.Norm, (5, 4, 3, 2)),
}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: sn.StreamingNorm1d, 2: sn.StreamingNorm2d, 3: sn.StreamingNorm3d}


def with_statistics(layer: nn.Module) -> Any:
    """Any statistics, gain and bias but those of the start."""
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if "var" in name:
                tensor.uniform_(0.3, 4)
            elif tensor.is_floating_point():
                tensor.normal_(0.5)
    return layer


def trained(model: nn.Module, *shape: int) -> Any:
    """A model of ours after three updates, in evaluation mode."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        model(torch.randn(shape) * 2 + 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def norms(model: nn.Module) -> list[nn.Module]:
    kinds = (sn.Norm, nn.modules.batchnorm._BatchNorm)
    return [module for module in model.modules() if isinstance(module, kinds)]


def silent(model: nn.Module, **options: Any) -> Any:
    """Converted without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return sn.convert(model, **options)


# From Batch Normalization


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 7])
@pytest.mark.parametrize("center", ["mean", "zero"])
@pytest.mark.parametrize("kind", BATCH_NORMS, ids=lambda kind: kind.__name__)
def test_a_converted_layer_evaluates_as_before(kind: type[nn.Module], center: str, p: float) -> None:
    expected_type, shape = BATCH_NORMS[kind]
    old = with_statistics(kind(4, eps=1e-3)).eval()
    new = silent(old, p=p, center=center)
    x = torch.randn(shape) * 3
    assert type(new) is expected_type
    torch.testing.assert_close(new(x), old.cpu()(x), rtol=2e-6, atol=2e-6)
    assert new.moment == sn.LpMoment(p, center, "gaussian")


def test_with_the_raw_scale_too() -> None:
    old = with_statistics(nn.BatchNorm1d(4)).eval()
    x = torch.randn(5, 4)
    torch.testing.assert_close(silent(old, scale="raw", p=1)(x), old(x), rtol=2e-6, atol=2e-6)


def test_double_precision_to_its_rounding() -> None:
    old = with_statistics(nn.BatchNorm2d(4).double()).eval()
    x = torch.randn(5, 4, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(silent(old, p=3)(x), old(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtype_stays(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4), with_statistics(nn.BatchNorm1d(4))).to(dtype).eval()
    x = torch.randn(5, 4, dtype=dtype)
    expected = model(x)
    layer = silent(model)[1]
    assert layer.weight.dtype == dtype
    assert layer.long.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(model(x), expected, rtol=2 * step, atol=2 * step)


def test_device_stays() -> None:
    layer = silent(nn.BatchNorm1d(4, device="meta"))
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    layer = silent(nn.BatchNorm1d(4, affine=False, device="meta"))
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_stays(training: bool) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm1d(4))).train(training)
    model[1].train(not training)
    silent(model)
    assert [layer.training for layer in norms(model)] == [training, not training]


def test_parameters_stay_the_same_objects() -> None:
    """So an optimizer made before goes on working, frozen parameters stay frozen, and layers commit."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model.get_parameter("1.bias").requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = dict(model.named_parameters())
    layer = silent(model)[1]
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert not layer.bias.requires_grad
    model(torch.randn(5, 3)).square().mean().backward()
    gain = layer.weight.clone()
    optimizer.step()
    assert not layer.weight.equal(gain)
    assert int(layer.samples) == 0


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
@pytest.mark.parametrize(("affine", "bias"), [(True, True), (True, False), (False, True)])
def test_with_and_without_parameters(kind: type[nn.Module], affine: bool, bias: bool) -> None:
    arguments: dict[str, Any] = {"affine": affine} | ({} if kind is nn.SyncBatchNorm else {"bias": bias})
    old = with_statistics(kind(4, **arguments)).eval()
    if kind is nn.SyncBatchNorm and not bias:
        old.bias = None
    new = silent(old)
    x = torch.randn(5, 4, 3, 2)
    assert (new.weight is None, new.bias is None) == (not affine, not (affine and bias))
    torch.testing.assert_close(new(x), old(x), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", BATCH_NORMS, ids=lambda kind: kind.__name__)
def test_without_running_statistics_it_starts_at_the_prior(kind: type[nn.Module]) -> None:
    """And evaluates otherwise, which is said, until it is calibrated."""
    expected_type, shape = BATCH_NORMS[kind]
    model: Any = nn.Sequential(kind(4, track_running_stats=False))
    with pytest.warns(UserWarning, match=rf"^0 is a {kind.__name__}: it keeps no running .*streamnorm\.calibrate"):
        sn.convert(model, p=2)
    assert type(model[0]) is expected_type
    assert model[0].long.tolist() == [[0] * 4, [1] * 4]
    assert model[0].weight is not None
    x = torch.randn(shape) * 3 + 2
    sn.calibrate(model, [x])
    torch.testing.assert_close(model.eval()(x), kind(4, track_running_stats=False)(x), rtol=1e-4, atol=1e-5)


def test_options_reach_every_layer() -> None:
    model = silent(
        nn.Sequential(nn.BatchNorm2d(4), nn.SyncBatchNorm(4)), p=3, center="zero", scale="raw", kappa=0.5, eps=0.1
    )
    for layer in model:
        assert layer.moment == sn.LpMoment(3, "zero", "raw")
        assert layer.stream == sn.Stream(kappa=0.5)
        assert layer.eps == 0.1
    for layer in silent(nn.Sequential(nn.BatchNorm2d(4), nn.SyncBatchNorm(4)), ref=("group", 2), window=9):
        assert layer.ref == sn.NormRef.batch(("group", 2))
        assert layer.stream.window == 9
        assert layer.moment.p == 1


@pytest.mark.parametrize(
    ("ref", "groups"),
    [("layer", [0, 0, 0, 0]), (("group", 2), [0, 0, 1, 1]), (sn.NormRef.of("n (k g) ... -> g", g=2), [0, 1, 0, 1])],
    ids=str,
)
def test_a_wider_reference_merges_the_statistics(ref: Any, groups: list[int]) -> None:
    """Into the mean and the variance of the mixture."""
    old = with_statistics(nn.BatchNorm1d(4, affine=False).double())
    mean, variance = silent(old, ref=ref, p=2).eval_stats()
    assert len(mean) == len(variance) == max(groups) + 1
    for group in range(len(mean)):
        members = torch.tensor(groups) == group
        mu = old.running_mean[members].mean()
        second_moment = (old.running_var + old.running_mean.square())[members].mean()
        torch.testing.assert_close(mean[group], mu)
        torch.testing.assert_close(variance[group], second_moment - mu.square())


def test_statistics_per_place_are_those_of_the_channel() -> None:
    old = with_statistics(nn.BatchNorm2d(4)).eval()
    new = silent(old, ref=sn.NormRef.of("n c h w -> c h", h=3))
    x = torch.randn(5, 4, 3, 2)
    torch.testing.assert_close(new(x), old(x), rtol=2e-6, atol=2e-6)


# Names, hooks, shared modules, choices


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.nothing = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.lin(x))
        return y


def test_names_stay() -> None:
    model = nn.ModuleDict({"a": Block(), "b": nn.ModuleList([Block(), nn.Sequential(Block())])})
    before = [name for name, _ in model.named_modules()]
    assert silent(model) is model
    assert [name for name, _ in model.named_modules()] == before
    assert [type(layer) for layer in norms(model)] == [sn.StreamingNorm1d] * 3


def test_a_layer_that_is_the_model_is_returned() -> None:
    old = nn.BatchNorm1d(4)
    assert isinstance(silent(old), sn.StreamingNorm1d)
    assert isinstance(sn.to_batchnorm(sn.StreamingNorm1d(4)), nn.BatchNorm1d)


def test_shared_modules_stay_shared() -> None:
    shared, block = nn.BatchNorm1d(4), Block()
    model = nn.ModuleDict({"x": shared, "y": shared, "b": block, "list": nn.ModuleList([shared, block, block])})
    silent(model)
    layer = model["x"]
    assert isinstance(layer, sn.StreamingNorm1d)
    assert model["y"] is layer
    assert model["list"][0] is layer  # type: ignore[index]
    assert model["list"][1] is model["b"] is block  # type: ignore[index]
    assert len(norms(model)) == 2


HOOKS = ["forward_pre", "forward", "forward with kwargs", "always", "full backward", "full backward pre", "state dict"]


@pytest.mark.parametrize("back", [False, True], ids=["convert", "to_batchnorm"])
@pytest.mark.parametrize("which", HOOKS)
def test_hooks_stay_and_fire(which: str, back: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), sn.StreamingNorm1d(4) if back else nn.BatchNorm1d(4))
    layer, fired = model[1], []

    def hook(module: nn.Module, *args: Any, **_: Any) -> None:
        fired.append((module, args))

    handle: Any = {
        "forward_pre": lambda: layer.register_forward_pre_hook(hook),
        "forward": lambda: layer.register_forward_hook(hook),
        "forward with kwargs": lambda: layer.register_forward_hook(hook, with_kwargs=True),
        "always": lambda: layer.register_forward_hook(hook, always_call=True),
        "full backward": lambda: layer.register_full_backward_hook(hook),
        "full backward pre": lambda: layer.register_full_backward_pre_hook(hook),
        "state dict": lambda: layer.register_state_dict_post_hook(hook),
    }[which]()
    if back:
        sn.to_batchnorm(model)
    else:
        silent(model)
    assert model[1] is not layer
    for _ in range(2):
        model(torch.randn(5, 3)).sum().backward()
        model.state_dict()
        handle.remove()
    assert len(fired) == 1
    module, args = fired[0]
    assert module is model[1]
    if which == "full backward":
        (grad_input,), (grad_output,) = args
        assert grad_input.shape == grad_output.shape == (5, 4)


def test_where_chooses_by_name_and_module() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm1d(8), nn.BatchNorm1d(4)))
    silent(model, where=lambda name, module: name.startswith("1.") and module.num_features == 4)
    assert [type(layer) for layer in norms(model)] == [nn.BatchNorm1d, nn.BatchNorm1d, sn.StreamingNorm1d]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (lambda: nn.GroupNorm(2, 4), sn.Norm),
        (lambda: nn.InstanceNorm2d(4), sn.StreamingNorm2d),
        (lambda: nn.InstanceNorm2d(4, affine=True), sn.StreamingNorm2d),
    ],
)
def test_others_are_converted_when_asked_for(kind: Callable[[], Any], expected: type[nn.Module]) -> None:
    conv, old = nn.Conv2d(3, 4, 1), kind()
    model = nn.Sequential(conv, old, nn.BatchNorm2d(4))
    assert silent(model)[1] is old
    new = silent(model, also=(nn.GroupNorm, nn.InstanceNorm2d), p=2)[1]
    assert new.weight is old.weight
    assert new.bias is old.bias
    assert new.long.tolist() == [[0] * 4, [1] * 4]
    assert new.ref == sn.NormRef.batch("channel")
    data = torch.randn(20, 3, 5, 5)
    sn.calibrate(model, data.split(6))
    torch.testing.assert_close(new.long[0], conv(data).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert type(new) is expected


def test_an_instance_norm_that_tracks_evaluates_as_before() -> None:
    old = with_statistics(nn.InstanceNorm1d(4, track_running_stats=True)).eval()
    new = silent(old, also=(nn.InstanceNorm1d,))
    x = torch.randn(5, 4, 3)
    torch.testing.assert_close(new(x), old(x), rtol=2e-6, atol=2e-6)


# Subclasses


class Renamed(nn.BatchNorm2d):
    """A subclass that evaluates as its parent does."""


class Activated(nn.BatchNorm2d):
    """As some libraries of models have it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


@pytest.fixture
def _forget_converters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "TABLE", [*foreign.TABLE])


def test_a_subclass_without_its_own_forward_is_converted() -> None:
    old = with_statistics(Renamed(4)).eval()
    new = silent(old)
    x = torch.randn(5, 4, 3, 2)
    assert type(new) is sn.StreamingNorm2d
    torch.testing.assert_close(new(x), old(x), rtol=2e-6, atol=2e-6)


def test_a_subclass_with_its_own_forward_is_kept_and_named() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(Activated(4)), nn.BatchNorm2d(4))
    kept = model[1][0]  # type: ignore[index]
    with pytest.warns(UserWarning, match=r"1\.0 is a Activated.*register_converter\(Activated") as record:
        sn.convert(model)
    assert record[0].filename == __file__
    assert [type(layer) for layer in norms(model)] == [sn.StreamingNorm2d, Activated, sn.StreamingNorm2d]
    assert model[1][0] is kept  # type: ignore[index]


def test_a_subclass_that_is_left_out_gives_no_warning() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), Activated(4))
    silent(model, where=lambda name, module: not isinstance(module, Activated))
    assert type(model[1]) is Activated


def test_a_lazy_batch_norm_is_named() -> None:
    model = nn.Sequential(nn.LazyBatchNorm1d())
    with pytest.warns(UserWarning, match="LazyBatchNorm1d and was not converted.*first batch"):
        sn.convert(model)
    model(torch.randn(5, 4))
    assert isinstance(silent(model)[0], sn.StreamingNorm1d)


@pytest.mark.usefixtures("_forget_converters")
def test_a_registered_converter_is_used_for_its_type_alone() -> None:
    calls = []

    def converter(module: nn.Module, **options: Any) -> nn.Module:
        calls.append((module, options))
        plain = nn.BatchNorm2d(4)
        plain.load_state_dict(module.state_dict())
        return nn.Sequential(sn.convert(plain, **options), nn.ReLU())

    class Further(Activated):
        pass

    sn.register_converter(Activated, converter)
    old = with_statistics(Activated(4))
    model = nn.Sequential(old, Further(4)).eval()
    x = torch.randn(5, 4, 3, 2)
    expected = old(x)
    with pytest.warns(UserWarning, match="1 is a Further"):
        sn.convert(model, p=3)
    assert calls == [(old, {"p": 3, "scale": "gaussian"})]
    torch.testing.assert_close(model[0](x), expected, rtol=2e-6, atol=2e-6)
    assert not model[0].training
    assert type(model[1]) is Further


@pytest.mark.usefixtures("_forget_converters")
def test_a_converter_may_return_an_empty_module() -> None:
    sn.register_converter(Activated, lambda module, **options: nn.Sequential())
    assert type(silent(nn.Sequential(Activated(4)))[0]) is nn.Sequential


# Layers of other libraries, known by name. tests/integrations has the libraries themselves.


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm has it."""

    def __init__(self, num_features: int, eps: float = 1e-5, **options: Any) -> None:
        super().__init__(num_features, eps, **options)
        self.drop: nn.Module = nn.Dropout(0.5)
        self.act: nn.Module = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y


class GroupNormAct(nn.GroupNorm):
    """As timm has it."""

    def __init__(self) -> None:
        super().__init__(2, 4)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y


BatchNormAct2d.__module__ = GroupNormAct.__module__ = "timm.layers.norm_act"


class FrozenBatchNorm2d(nn.Module):
    """As torchvision has it."""

    def __init__(self, num_features: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.eps = eps
        for name, start in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), start))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance, weight, bias = map(self.get_buffer, ("running_mean", "running_var", "weight", "bias"))
        return nn.functional.batch_norm(x, mean, variance, weight, bias, eps=self.eps)


def test_dropout_and_activation_of_a_layer_stay() -> None:
    old = with_statistics(BatchNormAct2d(4, eps=1e-3)).eval()
    x = torch.randn(5, 4, 3, 2)
    expected = old(x)
    new = silent(nn.Sequential(old).eval())[0]
    assert type(new) is sn.StreamingNormAct2d
    assert new.drop is old.drop
    assert new.act is old.act
    torch.testing.assert_close(new(x), expected, rtol=2e-6, atol=2e-6)
    alone = sn.StreamingNorm2d(4, eps=1e-3, window=20_000)
    alone.load_state_dict(new.state_dict())
    torch.manual_seed(1)
    streamed = nn.functional.silu(nn.functional.dropout(alone(x), 0.5))
    torch.manual_seed(1)
    assert new.train()(x).equal(streamed)


@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore::DeprecationWarning:torch.*")  # torch.compile's own
def test_a_compiled_layer_activates_once() -> None:
    """A subclass goes on with what the traced layer returns."""
    layer = sn.StreamingNormAct2d(4, act=nn.SiLU())
    twin = copy.deepcopy(layer)
    x = torch.randn(5, 4, 3, 2)
    torch.testing.assert_close(torch.compile(layer, backend="eager")(x), twin(x))


def test_a_layer_with_an_activation_goes_back_to_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.ModuleType("timm.layers")
    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
    monkeypatch.setitem(sys.modules, "timm.layers", library)
    model = silent(nn.Sequential(with_statistics(BatchNormAct2d(4, eps=1e-3)))).eval()
    monkeypatch.setattr(library, "BatchNormAct2d", BatchNormAct2d, raising=False)
    x = torch.randn(5, 4, 3, 2)
    expected, act = model(x), model[0].act
    plain = sn.to_batchnorm(model)[0]  # type: ignore[index]
    assert type(plain) is BatchNormAct2d
    assert plain.act is act
    torch.testing.assert_close(plain(x), expected, rtol=2e-6, atol=2e-6)


def test_without_that_library_the_way_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.layers", None)
    with pytest.raises(ValueError, match="timm is not installed: pip install timm"):
        sn.to_batchnorm(sn.StreamingNormAct2d(4, act=nn.ReLU()))


def test_a_fold_leaves_dropout_and_activation() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1), sn.StreamingNormAct2d(4, act=nn.SiLU())), 5, 3, 3, 2)
    x = torch.randn(5, 3, 3, 2)
    folded = sn.fold(model)
    assert not norms(folded)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_group_normalization_with_an_activation_keeps_it() -> None:
    new = silent(GroupNormAct(), also=(nn.GroupNorm,))
    assert type(new) is sn.StreamingNormAct2d
    assert type(new.act) is nn.SiLU


def test_group_normalization_with_its_own_forward_is_kept_and_named() -> None:
    class Own(nn.GroupNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    model = nn.Sequential(Own(2, 4))
    with pytest.warns(UserWarning, match=r"0 is a Own and was not converted: it has a forward of its own"):
        sn.convert(model, also=(nn.GroupNorm,))
    assert type(model[0]) is Own


def test_frozen_normalization_is_converted_when_asked_for() -> None:
    old: Any = FrozenBatchNorm2d(4)
    old.running_mean.normal_()
    old.running_var.uniform_(0.5, 2)
    old.weight.normal_()
    old.bias.normal_()
    model = nn.Sequential(old).eval()
    x = torch.randn(5, 4, 3, 2)
    expected = old(x)
    with pytest.warns(UserWarning, match=r"nothing was converted.*FrozenBatchNorm2d \(0\): write also=\(FrozenBatchN"):
        assert sn.convert(model)[0] is old  # type: ignore[index]
    new = silent(model, also=(FrozenBatchNorm2d,))[0]
    assert type(new) is sn.StreamingNorm2d
    assert new.eps == 1e-3
    torch.testing.assert_close(new(x), expected, rtol=2e-6, atol=2e-6)
    assert [name for name, _ in new.named_parameters()] == ["weight", "bias"]


def test_a_lazy_instance_norm_is_named() -> None:
    with pytest.warns(UserWarning, match="LazyInstanceNorm1d and was not converted: it has no channels"):
        sn.convert(nn.Sequential(nn.LazyInstanceNorm1d()), also=(nn.LazyInstanceNorm1d,))


# Compared with what they replace


def frozen(eps: float, said: float | None = None) -> Any:
    """A frozen BatchNorm with an eps in its forward, and an attribute that says this one, or none that says any."""

    class FrozenBatchNorm2d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.rand(4))
            self.get_buffer("running_var").mul_(1e-3)  # where eps counts
            if said is not None:
                self.eps = said

        def forward(self, x: Tensor) -> Tensor:
            mean, variance, weight, bias = (
                self.get_buffer(n) for n in ("running_mean", "running_var", "weight", "bias")
            )
            scale = weight * (variance + eps).rsqrt()
            return x * scale.view(1, -1, 1, 1) + (bias - mean * scale).view(1, -1, 1, 1)

    return FrozenBatchNorm2d()


@pytest.mark.parametrize(
    ("eps", "said", "options"),
    [(0, None, {}), (1e-5, None, {}), (1e-3, None, {}), (0, 1e-5, {}), (0.3, None, {"eps": 0.3}), (0.3, 0.3, {})],
    ids=str,
)
def test_frozen_normalization_with_any_eps(eps: float, said: float | None, options: Any) -> None:
    old = frozen(eps, said)
    x = torch.randn(5, 4, 3, 2)
    expected = old(x)
    new = silent(nn.Sequential(old).eval(), also=(type(old),), **options)[0]
    assert isinstance(new, sn.StreamingNorm2d)
    assert new.eps == eps
    torch.testing.assert_close(new(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"eps": 1e-5}, {"p": 3, "ref": "layer"}], ids=str)
def test_frozen_normalization_with_an_unknown_eps_is_kept_and_named(options: Any) -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "norm": frozen(0.3)}).eval()
    old = model["norm"]
    with pytest.warns(UserWarning, match=r"^norm is a FrozenB.* was not converted: .* another result: .* apart"):
        sn.convert(model, also=(type(old),), **options)
    assert model["norm"] is old


@pytest.mark.parametrize("options", [{"eps": 0.1}, {"ref": "layer"}, {"ref": sn.NormRef.of("n c h w -> c h", h=3)}])
def test_an_option_that_changes_the_evaluation_is_obeyed(options: Any) -> None:
    old = with_statistics(nn.BatchNorm2d(4)).eval()
    new = silent(old, **options)
    x = torch.randn(5, 4, 3, 2)
    same_values = isinstance(options.get("ref"), sn.NormRef)  # each place starts with the statistics of its channel
    assert bool((new(x) - old(x)).abs().max() < 0.01) == same_values
    also = silent(nn.GroupNorm(2, 4), also=(nn.GroupNorm,), **options)
    assert (also.eps, also.ref) == (new.eps, new.ref)


def doubled(layer: nn.Module) -> nn.Module:
    """The layer with a forward of its own."""
    forward = layer.forward

    def twice(*args: Any) -> Any:
        return 2 * forward(*args)

    layer.forward = twice
    return layer


@pytest.mark.parametrize("make", [lambda: nn.BatchNorm2d(4), lambda: nn.GroupNorm(2, 4), lambda: frozen(0.0)])
def test_a_forward_replaced_on_the_instance_is_kept_and_named(make: Callable[[], nn.Module]) -> None:
    old = doubled(make())
    model = nn.Sequential(nn.Sequential(old)).eval()
    with pytest.warns(UserWarning, match=r"0\.0 is a .* was not converted: its forward was replaced, on this object"):
        sn.convert(model, also=(type(old),))
    assert model[0][0] is old  # type: ignore[index]


class ActivatedFirst(BatchNormAct2d):
    """Another version of a layer that is known by its name."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, self.act(x))


ActivatedFirst.__name__, ActivatedFirst.__module__ = "BatchNormAct2d", "timm.layers.norm_act"


class Centred(nn.BatchNorm2d):
    """Without a forward of its own, and yet another function."""

    def _check_input_dim(self, input: Tensor) -> None:
        input -= 1


@pytest.mark.parametrize(("kind", "tracks"), [(ActivatedFirst, True), (ActivatedFirst, False), (Centred, True)])
def test_what_evaluates_otherwise_is_kept_and_named(kind: Any, tracks: bool) -> None:
    old = with_statistics(kind(4, track_running_stats=tracks))
    model = nn.Sequential(nn.BatchNorm2d(4), old)
    with pytest.warns(UserWarning, match=r"^1 is a .* was not converted: .* gives another result"):
        sn.convert(model)
    assert model[1] is old
    assert isinstance(model[0], sn.StreamingNorm2d)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mean", [0, 3, -200])
@pytest.mark.parametrize("deviation", [1e-3, 0.5, 40])
@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_statistics_of_any_size_are_no_difference(p: float, deviation: float, mean: float, dtype: torch.dtype) -> None:
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    model[1].running_mean.add_(mean)
    model[1].running_var.mul_(deviation**2)
    silent(model.to(dtype), p=p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(sn.fold(model)[1]) is nn.Identity
        assert type(sn.to_batchnorm(model)[1]) is nn.BatchNorm2d  # type: ignore[index]


def test_statistics_that_a_moment_cannot_hold() -> None:
    """sigma to the power of seven is beyond single precision."""
    old = nn.BatchNorm2d(4)
    old.get_buffer("running_var").fill_(1e13)
    with pytest.warns(UserWarning, match=r"was not converted: what would take its place gives another result"):
        assert sn.convert(old, p=7) is old
    silent(old, p=2)


def test_statistics_that_are_not_numbers_are_those_of_before() -> None:
    old = nn.BatchNorm2d(4)
    old.get_buffer("running_var")[1] = torch.nan
    x = torch.randn(5, 4, 3, 2)
    torch.testing.assert_close(silent(old.eval())(x), old(x), equal_nan=True)


def test_a_comparison_leaves_no_trace() -> None:
    """Neither hooks, nor modes, nor statistics, nor random numbers notice it."""
    norm, act = with_statistics(BatchNormAct2d(4)), nn.Sequential(nn.Dropout(0.5), nn.SiLU())
    norm.act, model = act, nn.Sequential(norm, nn.GroupNorm(2, 4), nn.BatchNorm2d(4))
    fired: list[nn.Module] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: fired.append(module))
        module.register_forward_pre_hook(lambda module, _: fired.append(module))
    act[0].eval()
    modes = [module.training for module in act.modules()]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    silent(model, also=(nn.GroupNorm,))
    assert [module.training for module in act.modules()] == modes
    assert not fired
    assert torch.get_rng_state().equal(random)
    assert model[0].act is act
    for name in ("weight", "bias"):
        assert model[0].get_parameter(name).equal(state[f"0.{name}"])
    model[2](torch.randn(5, 4, 3, 2))
    assert len(fired) == 2


def test_a_comparison_of_layers_that_adapt_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(3, 4), sn.StreamingNorm1d(4)).eval()
    with sn.adapt(model):
        model(torch.randn(5, 3))
        state = copy.deepcopy(model.state_dict())
        sn.fold(model)
        layer = model[1]
        sn.to_batchnorm(model)
    for name, tensor in layer.state_dict().items():
        assert tensor.equal(state[f"1.{name}"]), name
    assert not layer.frozen


def test_what_does_not_run_cannot_be_compared_and_says_so() -> None:
    class Images(nn.BatchNorm1d):
        def _check_input_dim(self, input: Tensor) -> None:
            if input.dim() != 4:
                raise ValueError(f"expected 4D input, got {input.dim()}D")

    with pytest.warns(UserWarning, match=r"^0 is a Images: it could not be compared .*ValueError: expected 4D input"):
        model = sn.convert(nn.Sequential(Images(4)))
    assert isinstance(model[0], sn.StreamingNorm1d)  # type: ignore[index]


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_where_there_are_no_numbers_nothing_is_compared(device: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    if device == "meta":
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False))
        with pytest.warns(UserWarning, match="calibrate"):
            sn.convert(model.to(device))
        sn.to_batchnorm(sn.fold(model))
    else:
        with FakeTensorMode():
            sn.to_batchnorm(silent(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))))


# With pruning and parametrizations


class Positive(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.abs()


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 2),
    "pruned bias": lambda layer: prune.random_unstructured(layer, "bias", 1),
    "parametrized": lambda layer: parametrize.register_parametrization(layer, "weight", Positive()),
    "both parametrized": lambda layer: [
        parametrize.register_parametrization(layer, name, Positive()) for name in ("weight", "bias")
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_pruned_and_parametrized_layers_stay_so(change: str) -> None:
    """There, through training, and back; the parameters are those that the optimizer has."""
    old = with_statistics(nn.BatchNorm2d(4))
    CHANGES[change](old)
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1), old).eval()
    x = torch.randn(5, 3, 6, 6)
    expected, before = model(x), {id(p) for p in model.parameters()}
    names = {name for name, _ in model.named_parameters()}
    silent(model)
    layer = model[1]
    assert isinstance(layer, sn.StreamingNorm2d)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert {id(p) for p in model.parameters()} == before
    assert {name for name, _ in model.named_parameters()} == names

    zeros = {name: getattr(layer, name) == 0 for name in ("weight", "bias")}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model.train()(torch.randn(5, 3, 6, 6)).square().mean().backward()
        optimizer.step()
    trained = model.eval()(x)
    for name, zero in zeros.items():
        if "parametrized" not in change:
            assert not getattr(layer, name)[zero].any()
        elif name == "weight" or "both" in change:
            assert (getattr(layer, name) >= 0).all()
    torch.testing.assert_close(sn.fold(model)(x), trained, rtol=1e-4, atol=1e-4)
    sn.to_batchnorm(model)
    assert isinstance(model[1], nn.BatchNorm2d)
    torch.testing.assert_close(model(x), trained, rtol=1e-4, atol=1e-4)
    assert {id(p) for p in model.parameters()} == before
    if change == "pruned":
        prune.remove(model[1], "weight")
        torch.testing.assert_close(model(x), trained, rtol=1e-4, atol=1e-4)
    if change == "parametrized":
        parametrize.remove_parametrizations(model[1], "weight")
        torch.testing.assert_close(model(x), trained, rtol=1e-4, atol=1e-4)


def test_a_gain_that_is_computed_otherwise_is_kept_and_named() -> None:
    old: Any = nn.BatchNorm2d(4)
    del old.weight
    old.root = nn.Parameter(torch.ones(4))
    old.weight = old.root.detach() ** 2
    with pytest.warns(UserWarning, match=r"the model is a BatchNorm2d and was not converted: its weight is computed"):
        assert sn.convert(old) is old


# Nothing to convert, and what else a model may count on


SEEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "group": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)),
        r"no BatchNorm in Sequential, and nothing was converted\. It holds GroupNorm \(1\): write "
        r"also=\(nn\.GroupNorm,\), and then streamnorm\.calibrate",
    ),
    "many": (
        lambda: nn.Sequential(*(nn.InstanceNorm2d(4) for _ in range(5))),
        r"InstanceNorm2d \(0, 1, 2 and 2 more\): write also=\(nn\.InstanceNorm2d,\)",
    ),
    "layer": (lambda: nn.Sequential(nn.LayerNorm(4)), r"LayerNorm \(0\): it normalizes the last axes .*also= does not"),
    "rms": (lambda: nn.Sequential(nn.RMSNorm(4)), r"RMSNorm \(0\): it normalizes the last axes .*register_converter"),
    "recurrent": (lambda: nn.GRU(3, 4), r"GRU \(the model\): streamnorm\.GRU takes its weights"),
    "ours": (lambda: nn.Sequential(sn.StreamingNorm1d(4)), r"StreamingNorm1d \(0\): of streamnorm already"),
    "none": (lambda: nn.Linear(3, 4), "It holds no normalization layer: put streaming ones where"),
    "several": (lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.LayerNorm(4)), r"GroupNorm \(0\): .*; LayerNorm \(1\): "),
}


@pytest.mark.parametrize("name", SEEN)
def test_a_model_in_which_nothing_is_converted(name: str) -> None:
    make, message = SEEN[name]
    model = make()
    before = list(model.modules())
    with pytest.warns(UserWarning, match=message) as record:
        assert sn.convert(model) is model
    assert len(record) == 1
    assert record[0].filename == __file__
    assert list(model.modules()) == before


def test_where_that_chooses_nothing() -> None:
    with pytest.warns(UserWarning, match=r"^where= chose no layer in Sequential.*BatchNorm1d \(0\): left out"):
        sn.convert(nn.Sequential(nn.BatchNorm1d(4)), where=lambda name, _: name == "backbone")


@pytest.mark.usefixtures("_forget_converters")
def test_a_model_in_which_a_registered_converter_did_something() -> None:
    sn.register_converter(nn.LayerNorm, lambda module, **_: sn.SampleNorm(4))
    assert isinstance(silent(nn.Sequential(nn.LayerNorm(4)))[0], sn.SampleNorm)


class Held(nn.Sequential):
    """A backbone that keeps its BatchNorms in evaluation, as several detection libraries have it."""

    def train(self, mode: bool = True) -> Held:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def test_layers_that_are_held_in_evaluation_are_named() -> None:
    model = Held(*(with_statistics(nn.BatchNorm2d(4)) for _ in range(5))).train()
    with pytest.warns(UserWarning, match=r"a module in training mode: 0, 1, 2 and 2 more\. .*streamnorm\.freeze"):
        sn.convert(model)
    sn.freeze(model)
    before = copy.deepcopy(model.state_dict())
    model.train()(torch.randn(5, 4, 3, 2))
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_a_part_in_evaluation_is_its_owners_choice() -> None:
    """Put there by ``.eval()``, which reaches streaming layers too."""
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(4)), nn.BatchNorm2d(4))
    model[0].eval()
    silent(model)


# All or nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ref": ("group", 3)}, "8 channels do not fall into 3 equal groups"),
        ({"window": 0}, "window"),
        ({"window": 9, "kappa": 0.5}, "window=9 and kappa=0.5 exclude each other"),
        ({"p": 0.5}, "p must be"),
        ({"affine": False}, "affine=False.*leave it out"),
        ({"dtype": torch.float64}, "dtype=torch.float64.*leave it out"),
        ({"also": (nn.LayerNorm,)}, r"3 is a LayerNorm.*register_converter\(LayerNorm"),
    ],
)
def test_what_is_refused_changes_nothing(options: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.LayerNorm(8))
    before = list(model)
    with pytest.raises(ValueError, match=message):
        sn.convert(model, **options)
    assert list(model) == before


def test_an_unknown_option_is_refused() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6))
    with pytest.raises(TypeError, match="momentum"):
        sn.convert(model, momentum=0.1)
    assert type(model[0]) is nn.BatchNorm1d


# Back to plain layers


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("ref", ["channel", "layer", ("group", 2), sn.NormRef.of("n (k g) ... -> g", g=2)], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_to_batchnorm_evaluates_as_before(dims: int, ref: Any, p: float) -> None:
    shape = {1: (5, 4), 2: (5, 4, 3, 2), 3: (5, 4, 3, 2, 2)}[dims]
    layer = trained(NORMS[dims](4, p=p, ref=ref, window=5), *shape)
    layer.train()(torch.randn(shape))  # short-term statistics count as well
    model = nn.Sequential(layer).eval()
    x = torch.randn(shape)
    expected = model(x)
    assert sn.to_batchnorm(model) is model
    assert type(model[0]) is {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
    torch.testing.assert_close(model(x), expected, rtol=2e-6, atol=2e-6)
    assert model[0].weight is layer.weight
    assert not model[0].training


@pytest.mark.parametrize(("affine", "bias"), [(True, False), (False, True)])
def test_to_batchnorm_with_and_without_parameters(affine: bool, bias: bool) -> None:
    layer = trained(nn.Sequential(nn.Linear(4, 4), sn.StreamingNorm1d(4, affine=affine, bias=bias)), 5, 4)
    x = torch.randn(5, 4)
    expected = layer(x)
    torch.testing.assert_close(sn.to_batchnorm(layer)(x), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_to_batchnorm_keeps_the_dtype(dtype: torch.dtype) -> None:
    model = trained(nn.Sequential(nn.Linear(4, 4), sn.StreamingNorm1d(4)), 5, 4).to(dtype)
    x = torch.randn(5, 4, dtype=dtype)
    expected = model(x)
    plain = sn.to_batchnorm(model)
    assert isinstance(model[1], nn.BatchNorm1d)
    assert {tensor.dtype for tensor in model[1].state_dict().values()} == {dtype, torch.int64}
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(plain(x), expected, rtol=4 * step, atol=4 * step)


def test_there_and_back_is_the_start() -> None:
    model = nn.Sequential(with_statistics(nn.BatchNorm2d(4)), nn.Sequential(with_statistics(nn.BatchNorm2d(4))))
    before = copy.deepcopy(model.state_dict())
    after = sn.to_batchnorm(silent(model, p=3)).state_dict()
    assert list(after) == list(before)
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-6)


def test_general_batch_norm_needs_dims() -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), sn.GeneralBatchNorm(4, ghosts=2)), 5, 4, 3, 2)
    with pytest.raises(ValueError, match=r"1 takes any rank.*dims=1, 2 or 3"):
        sn.to_batchnorm(model)
    x = torch.randn(5, 4, 3, 2)
    expected = model(x)
    torch.testing.assert_close(sn.to_batchnorm(model, dims=2)(x), expected)
    assert type(model[1]) is nn.BatchNorm2d


def test_a_layer_of_ours_that_computes_something_else_is_refused() -> None:
    class Own(sn.StreamingNorm2d):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x, mask).relu()

    others: list[nn.Module] = [Own(4), doubled(sn.SampleNorm(4)), doubled(sn.GRU(3, 4)), doubled(sn.RNNCell(3, 4))]
    for layer in others:
        model = nn.Sequential(sn.StreamingNorm2d(4), layer)
        before = list(model)
        with pytest.raises(ValueError, match=r"^1 has no equivalent in torch\.nn: .*what would take its place"):
            sn.to_batchnorm(model)
        assert list(model) == before


def test_a_subclass_that_computes_the_same_goes_back() -> None:
    class Renamed(sn.StreamingNorm1d):
        pass

    assert type(sn.to_batchnorm(nn.Sequential(Renamed(4)))[0]) is nn.BatchNorm1d  # type: ignore[index]


@pytest.mark.parametrize(("ref", "groups"), [("layer", 1), ("channel", 4), (("group", 2), 2)], ids=str)
def test_sample_norm_becomes_group_norm(ref: Any, groups: int) -> None:
    model = nn.Sequential(with_statistics(sn.SampleNorm(4, ref, eps=1e-3)))
    x = torch.randn(5, 4, 3, 2)
    expected = model(x)
    torch.testing.assert_close(sn.to_batchnorm(model)(x), expected, rtol=2e-6, atol=2e-6)
    assert isinstance(model[0], nn.GroupNorm)
    assert model[0].num_groups == groups


@pytest.mark.parametrize(
    "layer",
    [
        sn.SampleNorm(4, p=1),
        sn.SampleNorm(4, center="zero"),
        sn.SampleNorm(4, "position"),
        sn.SampleNorm(4, bias=False),
        sn.Norm(4, sn.NormRef.of("n c h w -> c h", h=3), sn.LpMoment(), sn.Stream()),
    ],
    ids=str,
)
def test_a_layer_without_a_plain_equal_is_refused(layer: sn.Norm) -> None:
    model = nn.Sequential(sn.StreamingNorm2d(4), layer)
    before = list(model)
    with pytest.raises(ValueError, match=r"1 has no equivalent in torch\.nn|1 keeps a statistic per place"):
        sn.to_batchnorm(model, dims=2)
    assert list(model) == before


# Fold


def assert_folds(model: nn.Module, x: Tensor, left: int = 0, tolerance: float = 1e-5) -> Any:
    """Folded, the model gives the same and has this many normalizations left; the original has all of its own."""
    before, number = model(x), len(norms(model))
    state = copy.deepcopy(model.state_dict())
    folded = sn.fold(model)
    torch.testing.assert_close(folded(x), before, rtol=tolerance, atol=tolerance)
    assert len(norms(folded)) == left
    assert not folded.training
    assert len(norms(model)) == number
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())
    return folded


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_into_a_linear(bias: bool, affine: bool) -> None:
    model = trained(nn.Sequential(nn.Linear(3, 4, bias=bias), sn.StreamingNorm1d(4, affine=affine), nn.ReLU()), 5, 3)
    assert_folds(model, torch.randn(6, 3))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_into_a_convolution(dims: int, groups: int, bias: bool, transposed: bool) -> None:
    cls = (TRANSPOSED if transposed else CONVS)[dims]
    conv = cls(4, 6, 3, stride=2, padding=1, groups=groups, bias=bias)
    model = trained(nn.Sequential(conv, NORMS[dims](6)), 3, 4, *(5,) * dims)
    assert_folds(model, torch.randn(2, 4, *(5,) * dims))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_into_a_convolution_with_padding(mode: Any) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode=mode)
    assert_folds(trained(nn.Sequential(conv, sn.StreamingNorm2d(6)), 3, 4, 6, 6), torch.randn(2, 4, 6, 6))


@pytest.mark.parametrize("ref", ["layer", ("group", 2), sn.NormRef.of("n (k g) ... -> g", g=2)], ids=str)
@pytest.mark.parametrize("p", [1, 3])
def test_any_reference_and_moment_folds(ref: Any, p: float) -> None:
    model = nn.Sequential(nn.Linear(3, 4), sn.StreamingNorm1d(4, ref=ref, p=p, window=4))
    assert_folds(trained(model, 5, 3), torch.randn(6, 3))


def test_general_batch_norm_folds() -> None:
    assert_folds(trained(nn.Sequential(nn.Linear(3, 4), sn.GeneralBatchNorm(4)), 5, 3), torch.randn(6, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_folded_model_keeps_its_dtype(dtype: torch.dtype) -> None:
    model = trained(nn.Sequential(nn.Linear(3, 4), sn.StreamingNorm1d(4)), 5, 3).to(dtype)
    folded = assert_folds(model, torch.randn(6, 3, dtype=dtype), tolerance=8 * torch.finfo(dtype).eps)
    assert {parameter.dtype for parameter in folded.parameters()} == {dtype}


class Residual(nn.Module):
    """The block of a ResNet."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = sn.StreamingNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = sn.StreamingNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), sn.StreamingNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        out: Tensor = self.relu(y)
        return out


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), sn.StreamingNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Residual(8, 8), Residual(8, 16, 2), Residual(16, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(self.stem(x)).mean((2, 3))
        y: Tensor = self.head(h)
        return y


def test_terms_that_cancel_each_other_do_not_keep_a_layer() -> None:
    """Their sum is nearly 0, and what rounding leaves of it differs once the weights have another scale."""
    x = comparison.random((comparison.SAMPLES, 2), torch.zeros(1))
    linear, norm = nn.Linear(2, 64, bias=False), sn.StreamingNorm1d(64)
    assert norm.weight is not None
    with torch.no_grad():
        linear.weight.copy_(torch.linspace(50, 90, 64)[:, None] * torch.stack((x[0, 1], -x[0, 0])))
        norm.weight.fill_(0.3)
    assert not any(isinstance(module, sn.Norm) for module in sn.fold(nn.Sequential(linear, norm)).modules())


def test_a_resnet_folds() -> None:
    model = trained(ResNet(), 4, 3, 8, 8)
    assert len(norms(model)) == 8
    assert_folds(model, torch.randn(2, 3, 8, 8))


class Stays(nn.Module):
    """A linear layer and a norm, joined in ways that are not one after the other and nothing else."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.lin, self.norm, self.relu = how, nn.Linear(4, 4), sn.StreamingNorm1d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor
        if self.how == "shared linear":
            y = self.norm(self.lin(torch.tanh(self.lin(x))))
        elif self.how == "shared norm":
            y = self.norm(self.lin(self.norm(x)))
        elif self.how == "output used twice":
            h = self.lin(x)
            y = self.norm(h) + h
        elif self.how == "masked":
            y = self.norm(self.lin(x), x[:, 0] > 0)
        elif self.how == "masked by name":
            y = self.norm(self.lin(x), mask=x[:, 0] > 0)
        elif self.how == "activation before":
            y = self.norm(self.relu(self.lin(x)))
        elif self.how == "function between":
            y = self.norm(torch.tanh(self.lin(x)))
        elif self.how == "weight shared":
            y = linear(self.norm(self.lin(x)), self.lin.weight.t())
        elif self.how == "gain shared":
            y = self.norm(self.lin(x)) * self.norm.weight
        else:
            y = self.norm(x)
        return y


WAYS = ["shared linear", "shared norm", "output used twice", "masked", "masked by name", "activation before"]
WAYS += ["function between", "weight shared", "gain shared", "nothing before"]


@pytest.mark.parametrize("how", WAYS)
def test_what_cannot_fold_stays(how: str) -> None:
    assert_folds(trained(Stays(how), 7, 4), torch.randn(6, 4), left=1)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_what_has_hooks_stays(which: int, hook: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), sn.StreamingNorm1d(4))

    def doubled(module: nn.Module, *args: Any) -> Any:
        return 2 * args[-1] if isinstance(args[-1], Tensor) else (2 * args[0][0],)

    getattr(model[which], hook)(doubled)
    assert_folds(trained(model, 5, 4), torch.randn(6, 4), left=1)


@pytest.mark.parametrize("which", [0, 1])
def test_what_computes_something_else_stays_and_is_named(which: int) -> None:
    """Found by the comparison alone: in the graph, a forward of the instance is a call like any other."""
    model = trained(nn.Sequential(nn.Linear(3, 4), sn.StreamingNorm1d(4), nn.ReLU()), 5, 3)
    forward = type(model[which]).forward
    model[which].forward = types.MethodType(lambda self, x: 2 * forward(self, x), model[which])
    with pytest.warns(UserWarning, match=r"^1 was not folded: what would take its place gives another result"):
        assert_folds(model, torch.randn(6, 3), left=1)


def test_a_parametrized_layer_stays() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), sn.StreamingNorm1d(4))
    assert_folds(trained(model, 5, 4), torch.randn(6, 4), left=1)


def test_a_linear_over_sequences_stays() -> None:
    """Its features come last, and the norm's channels in axis 1."""
    assert_folds(trained(nn.Sequential(nn.Linear(3, 4), sn.StreamingNorm1d(5)), 6, 5, 3), torch.randn(2, 5, 3), left=1)


def test_sample_statistics_and_plain_batch_norm_stay() -> None:
    layers = nn.Linear(3, 4), sn.SampleNorm(4), nn.Linear(4, 4), nn.BatchNorm1d(4)
    assert_folds(trained(nn.Sequential(*layers), 5, 3), torch.randn(6, 3), left=2)


def test_a_norm_with_two_names_folds_under_both() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.norm = nn.Linear(3, 4), sn.StreamingNorm1d(4)
            self.alias, self.inner = self.norm, nn.Sequential(self.lin)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.lin(x))
            return y

    folded = assert_folds(trained(Aliased(), 5, 3), torch.randn(6, 3))
    assert folded.norm is folded.alias
    assert folded.inner[0] is folded.lin


def test_a_tied_weight_unties_in_the_copy_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), sn.StreamingNorm1d(4), nn.ReLU(), nn.Linear(4, 4))
    model[3].weight = model[0].weight
    assert_folds(trained(model, 5, 4), torch.randn(6, 4))
    assert model[3].weight is model[0].weight


class Reader(nn.Module):
    """A recurrent layer between others, called as torch.nn's is, or with what only ours takes."""

    def __init__(self, lengths: bool = False, **options: Any) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(3, 4), sn.StreamingNorm1d(4), nn.Linear(10, 2)
        self.gru = sn.GRU(4, 5, batch_first=True, bidirectional=True, **options)
        self.extra = {"lengths": torch.tensor([6, 2])} if lengths else {}

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.norm(self.embed(x.reshape(-1, 3))).view(x.shape[0], -1, 4)
        output, _ = self.gru(embedded, **self.extra)
        y: Tensor = self.head(output.sum(1))
        return y


def trained_reader(**options: Any) -> tuple[Reader, Tensor, Tensor]:
    """A reader that has collected statistics, an input and what it gives."""
    model, x = Reader(**options), torch.randn(2, 6, 3)
    for _ in range(3):
        model(torch.randn(2, 6, 3) + 1).square().sum().backward()
        sn.commit(model)
    return model, x, model.eval()(x)


def test_recurrent_layers_become_torchs() -> None:
    model, x, before = trained_reader()
    folded = sn.fold(model)
    assert type(folded.gru) is nn.GRU
    assert not norms(folded)
    torch.testing.assert_close(folded(x), before)
    assert type(model.gru) is sn.GRU
    plain = sn.to_batchnorm(model)
    assert type(plain.gru) is nn.GRU
    assert not any(type(module).__module__.startswith("streamnorm") for name, module in plain.named_modules() if name)
    torch.testing.assert_close(plain(x), before)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (sn.RNN, {"nonlinearity": "relu", "num_layers": 2}),
        (sn.GRU, {"norm": "batch", "bias": False}),
        (sn.LSTM, {"bidirectional": True, "num_layers": 2, "dropout": 0.5, "batch_first": True}),
        (sn.LSTM, {"proj_size": 2}),
        (sn.RNNCell, {}),
        (sn.GRUCell, {}),
        (sn.LSTMCell, {"dtype": torch.float64}),
    ],
)
def test_every_recurrent_network_is_compared(make: Any, options: Any) -> None:
    """Those that torch.nn equals go over; one whose forward does something else is named."""
    network = make(3, 4, **options)
    with torch.no_grad():
        for name, tensor in network.named_buffers():
            if name.endswith(("long", "running_mean", "running_var")):
                tensor.uniform_(0.5, 1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(sn.to_batchnorm(copy.deepcopy(network))) is make._torch_type
        assert type(sn.fold(nn.Sequential(copy.deepcopy(network)))[0]) is make._torch_type
    forward = type(network).forward
    network.forward = types.MethodType(lambda self, *args: forward(self, *args)[:1], network)
    with pytest.warns(UserWarning, match=r"^0 was not folded: (it gives|what would take its place)"):
        assert type(sn.fold(nn.Sequential(network))[0]) is make


@pytest.mark.parametrize("options", [{"norm": "layer"}, {"reset_after": False}], ids=str)
def test_a_recurrent_layer_without_a_plain_equal(options: dict[str, Any]) -> None:
    """It stays where the rest is folded, and a whole model of plain layers is refused."""
    model, x, before = trained_reader(**options)
    folded = sn.fold(model)
    assert type(folded.gru) is sn.GRU
    assert not any(folded.norm is norm for norm in norms(folded))
    torch.testing.assert_close(folded(x), before)
    with pytest.raises(ValueError, match=r"^gru: torch\.nn has nothing that evaluates as GRU"):
        sn.to_batchnorm(model)
    torch.testing.assert_close(model(x), before)


def test_a_recurrent_layer_with_arguments_of_its_own_stays() -> None:
    model, x, before = trained_reader(lengths=True)
    folded = sn.fold(model)
    assert type(folded.gru) is sn.GRU
    torch.testing.assert_close(folded(x), before)


def test_a_model_that_cannot_be_traced_is_refused() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = sn.StreamingNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(x) if x.sum() > 0 else x
            return y

    with pytest.raises(ValueError, match=r"torch\.fx, which cannot trace this model"):
        sn.fold(Branches())
