"""``streamnorm run finetune`` with a network of timm, its weights in a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import streamnorm as sn
from streamnorm_lab.common.errors import UserError
from streamnorm_lab.methods.finetuning import FINETUNE_METHODS
from streamnorm_lab.networks.trained import check_backbone, expected_range, of_package

pytestmark = pytest.mark.integration("timm")


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_weights_in_a_file_and_a_new_head(name: str, tmp_path: Path) -> None:
    import timm

    model = timm.create_model(name)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    check_backbone(f"timm:{name}", str(tmp_path / "weights.pth"))
    made = of_package(f"timm:{name}", str(tmp_path / "weights.pth"), 7)
    first, own = (next(net.parameters()) for net in (made, model))
    assert torch.equal(first, own)
    x = torch.randn(4, 3, 32, 32)
    for method in ("batch-frozen", "group", "streaming-l1"):
        network = FINETUNE_METHODS[method].prepare(of_package(f"timm:{name}", str(tmp_path / "weights.pth"), 7), x)
        assert network(x).shape == (4, 7)
        if method != "batch-frozen":
            assert not any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())
    assert any(isinstance(layer, sn.Norm) for layer in network.modules())
    assert len(expected_range(f"timm:{name}").mean) == 3


def test_mistakes(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"none")
    with pytest.raises(UserError, match="they cannot be read"):
        of_package("timm:resnet18", str(tmp_path / "weights.pth"), 7)
    with pytest.raises(UserError, match="unknown network of timm 'resnet19'"):
        check_backbone("timm:resnet19", str(tmp_path / "weights.pth"))
