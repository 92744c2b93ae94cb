"""Memory of large outputs, which the C++ engine keeps from step to step: given out once at a time."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import streamnorm as sn
from streamnorm import ops
from streamnorm.ops import native

pytestmark = pytest.mark.skipif(
    ops.engines()["native"].startswith("not available"), reason="the C++ extension was not built"
)

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _own_memory() -> Iterator[None]:
    """Nothing waits when a test begins, and up to 64 MiB may."""
    before = native.keep_memory(0)
    native.keep_memory(64 * MIB)
    yield
    native.keep_memory(before)


def image(images: int = 4) -> Tensor:
    """Of half a mebibyte for 4."""
    return torch.randn(images, 32, 32, 32)


def test_the_next_output_gets_the_memory_of_the_last() -> None:
    layer = sn.StreamingNorm2d(32)
    y = layer(image())
    place = y.data_ptr()
    del y
    assert native.waiting_memory() == MIB // 2
    assert layer(image()).data_ptr() == place


def test_layers_share_it_and_sizes_do_not_mix() -> None:
    place = sn.StreamingNorm2d(32)(image()).data_ptr()
    half, whole = sn.StreamingNorm2d(32)(image(2)), sn.GeneralBatchNorm(64)(torch.randn(2, 64, 32, 32))
    assert half.data_ptr() != place
    assert whole.data_ptr() == place


@pytest.mark.parametrize(
    "hold",
    [
        pytest.param(lambda y: y, id="the output"),
        pytest.param(lambda y: y[1:, ::2], id="a view of it"),
        pytest.param(lambda y: y.sin(), id="a node that saved it"),
        pytest.param(lambda y: y.detach().numpy(), id="an array"),
        pytest.param(lambda y: y.untyped_storage(), id="its storage"),
    ],
)
def test_memory_is_not_given_out_while_someone_holds_it(hold: object) -> None:
    layer = sn.StreamingNorm2d(32)
    y = layer(image())
    held, place = hold(y), y.data_ptr()  # type: ignore[operator]
    del y
    assert layer(image()).data_ptr() != place
    del held
    assert layer(image()).data_ptr() == place


def test_gradients_of_inputs_come_from_it_too() -> None:
    layer = sn.StreamingNorm2d(32)
    places = set()
    for _ in range(3):
        x = image().requires_grad_()
        y = layer(x)
        y.backward(image())
        assert x.grad is not None
        places.add(frozenset((y.data_ptr(), x.grad.data_ptr())))
        del x, y
    assert len(places) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_kept_output_is_like_any_other(dtype: torch.dtype, layout: torch.memory_format) -> None:
    results = []
    for most in (0, 64 * MIB):
        native.keep_memory(most)
        torch.manual_seed(0)
        layer = sn.StreamingNorm2d(32, dtype=torch.float64 if dtype == torch.float64 else None)
        for _ in range(2):  # the second time in used memory
            x = image().to(dtype).to(memory_format=layout).requires_grad_()
            y = layer(x)
            y.sum().backward()
            assert x.grad is not None
            assert y.dtype == x.grad.dtype == dtype
            assert y.stride() == x.grad.stride() == x.stride()
            results.append((y.detach(), x.grad))
            del x, y
    for kept, fresh in zip(results[2:], results[:2]):
        assert all(map(torch.equal, kept, fresh))


def test_strides_of_axes_of_one_element_stay() -> None:
    x = torch.empty_strided((1, 64, 1, 512), (70000, 512, 7, 1)).normal_()
    assert sn.StreamingNorm2d(64)(x).stride() == x.stride()


def test_layouts_that_take_turns_keep_their_strides() -> None:
    """Also below the size from which memory is kept, where what an output is asked for with is remembered."""
    layer = sn.StreamingNorm2d(4)
    for layout in (torch.contiguous_format, torch.channels_last) * 2:
        x = torch.randn(2, 4, 5, 3).to(memory_format=layout).requires_grad_()
        y = layer(x)
        y.sum().backward()
        assert x.grad is not None
        assert y.stride() == x.grad.stride() == x.stride()


def test_threads_that_share_a_layer_get_outputs_in_their_own_layout() -> None:
    layer, wrong = sn.SampleNorm(4, "channel"), []
    x = torch.randn(2, 4, 5, 3)

    def use(layout: torch.memory_format) -> None:
        own = x.to(memory_format=layout)
        expected = sn.SampleNorm(4, "channel")(own)
        for _ in range(2000):
            y = layer(own)
            if y.stride() != own.stride() or not torch.equal(y, expected):
                wrong.append(y)

    threads = [threading.Thread(target=use, args=(f,)) for f in (torch.contiguous_format, torch.channels_last) * 2]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong


def test_no_more_waits_than_allowed_and_the_longest_unused_goes_first() -> None:
    layer = sn.StreamingNorm2d(32)
    native.keep_memory(MIB)
    first, second, third = layer(image()), layer(image()), layer(image())
    places = [second.data_ptr(), third.data_ptr()]
    del first, second, third
    assert native.waiting_memory() == MIB
    again = [layer(image()), layer(image())]
    assert sorted(y.data_ptr() for y in again) == sorted(places)


def test_outputs_of_many_sizes_take_little_more_memory_than_without_waiting() -> None:
    script = """
import torch, streamnorm as sn
from streamnorm.ops import native
layer = sn.StreamingNorm2d(32)
for n in (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 11, 10, 9, 8, 7):
    layer(torch.randn(n, 32, 32, 32))
    assert native.waiting_memory() <= 12 * 3 // 2 << 17  # half as much again as the most in use at once
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_zero_keeps_nothing() -> None:
    native.keep_memory(0)
    y = sn.StreamingNorm2d(32)(image())
    assert y.untyped_storage().resizable()  # it is PyTorch's
    del y
    assert native.waiting_memory() == 0


def test_memory_comes_back_once_nothing_may_wait() -> None:
    y = sn.StreamingNorm2d(32)(image())
    native.keep_memory(0)
    del y
    assert native.waiting_memory() == 0


def test_small_outputs_are_left_to_the_allocator() -> None:
    y = sn.StreamingNorm1d(128)(torch.randn(4, 128))
    del y
    assert native.waiting_memory() == 0


def test_a_kept_output_copies_pickles_and_goes_to_other_processes() -> None:
    y = sn.StreamingNorm2d(32)(image()).detach()
    values = y.clone()
    assert torch.equal(copy.deepcopy(y), values)
    assert torch.equal(pickle.loads(pickle.dumps(y)), values)
    y.share_memory_()
    assert y.is_shared()
    assert torch.equal(y, values)


def test_threads_that_train_beside_each_other() -> None:
    def train(results: list[Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        layer = sn.StreamingNorm2d(32)
        for _ in range(20):
            x = torch.randn(4, 32, 32, 32, generator=generator).requires_grad_()
            y = layer(x)
            y.backward(torch.randn(4, 32, 32, 32, generator=generator))
            assert x.grad is not None
            results.append(y.detach().sum() + x.grad.abs().sum())

    results: list[list[Tensor]] = [[] for _ in range(4)]
    threads = [threading.Thread(target=train, args=(own,)) for own in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own in results[1:]:
        assert torch.equal(torch.stack(own), torch.stack(results[0]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_after_a_fork_both_processes_go_on() -> None:
    script = """
import os, torch, streamnorm as sn
torch.set_num_threads(1)
layer, x = sn.StreamingNorm2d(32), torch.randn(4, 32, 32, 32)
layer(x)
child = os.fork()
layer(x)
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(("wanted", "bytes"), [("", 256 * MIB), ("0", 0), ("32", 32 * MIB)])
def test_the_environment_says_how_much(wanted: str, bytes: int) -> None:
    script = "from streamnorm.ops import native; print(native.keep_memory(0))"
    environment = {**os.environ, "STREAMNORM_KEEP_MIB": wanted}
    out = subprocess.run([sys.executable, "-c", script], check=True, env=environment, capture_output=True, text=True)
    assert int(out.stdout) == bytes


def test_a_setting_that_is_no_number_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMNORM_KEEP_MIB", "lots")
    with pytest.raises(ValueError, match=r"STREAMNORM_KEEP_MIB is a number of mebibytes, such as 256, .* got 'lots'"):
        native._load()
