"""NormRef: which elements share a statistic, checked element by element."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
from collections.abc import Callable

import pytest
import torch

from streamnorm import NormRef

Index = tuple[int, ...]

# A reference, an input shape, and in words of one's own the key that elements with the same statistic share.
TABLE: dict[str, tuple[NormRef, Index, Callable[[Index], Index]]] = {
    "batch, per channel": (NormRef.batch("channel"), (4, 6, 3, 2), lambda i: (i[1],)),
    "batch, whole layer": (NormRef.batch("layer"), (4, 6, 3, 2), lambda i: ()),
    "batch, channel groups": (NormRef.batch(("group", 2)), (4, 6, 3, 2), lambda i: (i[1] // 3,)),
    "ghost batches": (NormRef.batch("channel").ghosts(2), (4, 6, 3, 2), lambda i: (i[0] % 2, i[1])),
    "ghost batches of groups": (NormRef.batch(("group", 3)).ghosts(2), (4, 6, 5), lambda i: (i[0] % 2, i[1] // 2)),
    "ghost batches, whole layer": (NormRef.batch("layer").ghosts(2), (4, 6), lambda i: (i[0] % 2,)),
    "sample, layer": (NormRef.sample("layer"), (4, 6, 3, 2), lambda i: (i[0],)),
    "sample, channel": (NormRef.sample("channel"), (4, 6, 3, 2), lambda i: (i[0], i[1])),
    "sample, groups": (NormRef.sample(("group", 2)), (4, 6, 3, 2), lambda i: (i[0], i[1] // 3)),
    "sample, position": (NormRef.sample("position"), (4, 6, 3, 2), lambda i: (i[0], i[2], i[3])),
    "sample, position of vectors": (NormRef.sample("position"), (4, 6), lambda i: (i[0],)),
    "rows of an image": (NormRef.of("n c h w -> c h", h=3), (4, 6, 3, 2), lambda i: (i[1], i[2])),
    "every other channel": (NormRef.of("n (k g) ... -> g", g=2), (4, 6, 3), lambda i: (i[1] % 2,)),
    "patches": (
        NormRef.of("n c (h a) (w b) -> c h w", h=2, w=1),
        (2, 3, 4, 2),
        lambda i: (i[1], i[2] // 2, i[3] // 2),
    ),
    "five axes": (NormRef.batch("channel"), (2, 3, 2, 1, 2), lambda i: (i[1],)),
    "two axes": (NormRef.batch(("group", 3)), (4, 6), lambda i: (i[1] // 2,)),
    "no samples": (NormRef.batch(("group", 3)), (0, 6), lambda i: (i[1] // 2,)),
}


@pytest.mark.parametrize("name", TABLE)
def test_elements_that_share_a_statistic(name: str) -> None:
    ref, shape, key = TABLE[name]
    view = ref.view(shape)
    groups = torch.arange(view.num_stats).view(view.stats_shape).expand(view.split).reshape(shape)
    elements = list(itertools.product(*map(range, shape)))
    ids: dict[Index, set[int]] = {}
    for element in elements:
        ids.setdefault(key(element), set()).add(int(groups[element]))
    assert all(len(members) == 1 for members in ids.values())
    if elements:
        ordered = [min(ids[shared]) for shared in sorted(ids)]
        assert ordered == list(range(view.num_stats))  # row-major in the key, and none twice
        assert view.num_elements * view.num_stats == len(elements)


@pytest.mark.parametrize("name", TABLE)
def test_a_view_never_copies(name: str) -> None:
    ref, shape, _ = TABLE[name]
    view = ref.view(shape)
    dense = torch.randn(shape)
    strided = torch.randn([2 * size for size in reversed(shape)]).permute(*reversed(range(len(shape))))
    for x in (dense, strided[tuple(slice(0, 2 * size, 2) for size in shape)]):
        assert x.shape == shape
        assert x.view(view.split).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("name", TABLE)
def test_shapes_that_broadcast(name: str) -> None:
    ref, shape, _ = TABLE[name]
    view = ref.view(shape)
    x = torch.randn(shape)
    channels, places = torch.randn(shape[1]), torch.rand(shape[0], *shape[2:])
    by_channel = (x.view(view.split) * channels.view(view.channel_shape)).view(shape)
    assert by_channel.equal(x * channels.view(-1, *(1,) * (len(shape) - 2)))
    by_place = (x.view(view.split) * places.view(view.mask_shape)).view(shape)
    assert by_place.equal(x * places.unsqueeze(1))


def test_names_stand_for_patterns() -> None:
    assert NormRef.batch("channel").pattern == "n c ... -> c"
    assert NormRef.sample(("group", 4)) == NormRef.of("n (g k) ... -> n g", g=4)
    assert NormRef.sample("layer") != NormRef.batch("layer")


@pytest.mark.parametrize(
    ("ref", "channels", "expected"),
    [
        (NormRef.batch("channel"), 6, 6),
        (NormRef.batch("layer"), 6, 1),
        (NormRef.batch(("group", 3)), 6, 3),
        (NormRef.of("n c h w -> c h", h=5), 6, 30),
        (NormRef.of("n c h w -> w", w=5), 6, 5),
        (NormRef.of("(a b) c -> c", a=2), 6, 6),
    ],
    ids=str,
)
def test_statistics_that_a_stream_can_carry(ref: NormRef, channels: int, expected: int) -> None:
    assert ref.spans_samples
    assert ref.num_stats(channels) == expected
    assert ref.least_view(channels).num_stats == expected


@pytest.mark.parametrize(
    "ref",
    [
        NormRef.sample("layer"),
        NormRef.sample("position"),
        NormRef.batch("channel").ghosts(2),
        NormRef.of("n c h w -> c h"),
        NormRef.of("n c ... -> ..."),
    ],
    ids=str,
)
def test_statistics_that_a_stream_cannot_carry(ref: NormRef) -> None:
    with pytest.raises(ValueError, match="depends on the input") as error:
        ref.num_stats(6)
    assert ref.pattern in str(error.value)
    assert "SampleNorm" in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "sizes", "message"),
    [
        ("n c ...", {}, "written like 'n c ... -> c', got 'n c ...'"),
        ("n, c -> c", {}, "written like"),
        ("n c -> (c)", {}, "written like"),
        ("n ((a b) c) -> c", {}, "written like"),
        ("n -> n", {}, "samples and the channels first"),
        ("... c -> c", {}, "comes last on the left"),
        ("n ... c -> c", {}, "comes last on the left"),
        ("n c (h ...) -> c", {}, "comes last on the left"),
        ("n n -> n", {}, "every axis stands once"),
        ("n c -> d", {}, "every axis stands once"),
        ("n c -> c", {"g": 2}, "g=2"),
        ("n (g k) -> g", {"g": 0}, "g=0"),
    ],
)
def test_patterns_that_are_refused(pattern: str, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        NormRef.of(pattern, **sizes)
    assert pattern in str(error.value)


@pytest.mark.parametrize("ref", ["instance", "position", ("group", 0), ("group", "two"), ("groups", 2), 3])
def test_names_that_are_refused(ref: object) -> None:
    with pytest.raises(ValueError, match=r"'channel', 'layer' or \('group', g\)") as error:
        NormRef.batch(ref)  # type: ignore[arg-type]
    assert repr(ref) in str(error.value)


@pytest.mark.parametrize(
    ("ref", "shape", "message"),
    [
        (NormRef.of("n c h w -> c"), (2, 3, 4), "has 3 axes"),
        (NormRef.of("n c -> c"), (2, 3, 4), "has 3 axes"),
        (NormRef.batch("channel"), (2,), "has 1 axes"),
        (NormRef.batch(("group", 4)), (2, 6), "g=4 does not divide an axis of size 6"),
        (NormRef.of("n c h -> h", h=4), (2, 6, 8), "h=4"),
        (NormRef.of("n (g k) -> g"), (2, 6), "give the size of all but one of g, k"),
    ],
)
def test_shapes_that_do_not_fit(ref: NormRef, shape: Index, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ref.view(shape)


def test_copies_are_equal_and_hash_the_same() -> None:
    ref = NormRef.of("n (g k) ... -> g", g=3)
    for other in (copy.deepcopy(ref), pickle.loads(pickle.dumps(ref)), NormRef.batch(("group", 3))):
        assert other == ref
        assert hash(other) == hash(ref)
        assert other.view((2, 6)) == ref.view((2, 6))
