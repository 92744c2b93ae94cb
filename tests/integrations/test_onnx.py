"""ONNX files of models that evaluate, run by onnxruntime."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamnorm as sn

pytestmark = [
    pytest.mark.integration("onnxruntime"),
    pytest.mark.filterwarnings("ignore"),  # the exporter's own
]

NEEDED = ("onnx", "onnxscript", "onnxruntime")


def run_by_onnx(model: nn.Module, x: Tensor, more: Tensor, path: Path) -> tuple[list[str], Tensor]:
    """The operators of the exported model, and what it makes of a batch of another size."""
    onnx, _, runtime = (pytest.importorskip(name, reason=f"{name} is not installed") for name in NEEDED)
    free = ({0: torch.export.Dim("samples")},)
    torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=free, verbose=False)
    session: Any = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    graph = onnx.load(path).graph
    names = [node.op_type for node in graph.node] + [weight.name for weight in graph.initializer]
    return names, torch.from_numpy(session.run(None, {session.get_inputs()[0].name: more.numpy()})[0])


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(x * 2 + 1).square().mean().backward()
        optimizer.step()
    return model.eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: nn.Sequential(nn.Linear(3, 6), sn.StreamingNorm1d(6), nn.ReLU()), (4, 3)),
    "convolutional": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), sn.StreamingNorm2d(6), nn.ReLU()), (4, 3, 8, 8)),
    "groups": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), sn.StreamingNorm2d(6, ref=("group", 2))), (4, 3, 8, 8)),
    "sample": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), sn.SampleNorm(6)), (4, 3, 8, 8)),
    "cell": (lambda: sn.GRUCell(3, 4), (4, 3)),
}


def itself(model: nn.Module) -> nn.Module:
    return model


AS_IT_IS = pytest.mark.shows("`torch.onnx.export` of streaming and sample layers and of a recurrent cell", "as it is")
PLAIN = pytest.mark.shows("`torch.onnx.export` without a trace of us", "`sn.to_batchnorm(model)` or `sn.fold(model)`")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(pytest.param(name, itself, marks=AS_IT_IS) for name in MODELS),
        *(pytest.param(n, how, marks=PLAIN) for n in list(MODELS)[:2] for how in (sn.to_batchnorm, sn.fold)),
    ],
)
def test_onnxruntime_gives_what_the_model_gives(
    name: str, how: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    make, shape = MODELS[name]
    x, more = torch.randn(shape), torch.randn(7, *shape[1:])
    model = trained(make(), x)
    names, y = run_by_onnx(how(copy.deepcopy(model)).eval(), x, more, tmp_path / "model.onnx")
    torch.testing.assert_close(y, model(more), rtol=1e-4, atol=1e-5)
    if how is not itself:
        assert not any("long" in name or "short" in name for name in names)
    if how is sn.fold:
        assert not any("Norm" in name for name in names)
