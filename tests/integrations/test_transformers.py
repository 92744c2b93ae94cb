"""transformers: networks that hold BatchNorm, in two dimensions and one, and FrozenBatchNorm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.training import (
    NEW_TASK,
    assert_evaluates_as_before,
    assert_evaluates_better,
    assert_learns,
    converted,
    images,
    in_batches,
    layers,
    with_statistics,
)
from torch import Tensor, nn

import streamnorm as sn

pytestmark = pytest.mark.integration("transformers")


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 48], depths=[1, 1, 1], layer_type="basic", num_labels=4)
    )


def regnet() -> nn.Module:
    from transformers import RegNetConfig, RegNetForImageClassification

    return RegNetForImageClassification(
        RegNetConfig(embedding_size=16, hidden_sizes=[16, 32, 48], depths=[1, 1, 1], groups_width=8, num_labels=4)
    )


def mobilenet() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(
        MobileNetV2Config(depth_multiplier=0.25, num_labels=4, classifier_dropout_prob=0.0)
    )


NETWORKS = [resnet, regnet, mobilenet]


def image_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, target = batch
    return model(pixel_values=x, labels=target).loss


@pytest.mark.shows("ResNet, RegNet, MobileNetV2", "`sn.convert(model)`")
@pytest.mark.parametrize("make", NETWORKS, ids=lambda make: make.__name__)
def test_converted_it_evaluates_as_before(make: Any) -> None:
    model = with_statistics(make(), lambda model: model(images(4)[0])).double()
    new = converted(model)
    assert_evaluates_as_before(model, new, images(3)[0])
    assert_evaluates_as_before(model, sn.to_batchnorm(new), images(3)[0])


@pytest.mark.shows("ResNet, RegNet, MobileNetV2", "`sn.convert(model)`")
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("make", NETWORKS, ids=lambda make: make.__name__)
def test_converted_it_fine_tunes(make: Any, batch_size: int) -> None:
    model = with_statistics(make(), lambda model: model(images(4)[0]))
    new, before, data = converted(model, **NEW_TASK), converted(model, **NEW_TASK), images(4)
    assert_learns(new, image_loss, in_batches(batch_size, *data), epochs=60, lr=1e-4)
    assert_evaluates_better(new, before, image_loss, data)


@pytest.mark.shows("ResNet, `save_pretrained` of a converted model", "load into a converted model: [recipe](models.md)")
def test_saved_and_loaded(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = converted(with_statistics(resnet(), lambda model: model(images(4)[0])))
    assert_learns(model, image_loss, in_batches(2, *images(4)), epochs=10, lr=1e-3)
    model.save_pretrained(tmp_path)
    again = converted(resnet())
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_evaluates_as_before(model, again, images(3)[0])


@pytest.mark.shows("speech: Wav2Vec2-Conformer (BatchNorm1d)", "`sn.convert(model)`")
def test_a_network_for_speech() -> None:
    from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel

    config = Wav2Vec2ConformerConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        feat_extract_norm="layer",
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
        layerdrop=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        conformer_conv_dropout=0.0,
    )
    sound = torch.randn(2, 2000)
    model = with_statistics(Wav2Vec2ConformerModel(config), lambda model: model(sound))
    new = converted(model)
    assert {type(layer) for layer in layers(new)} == {sn.StreamingNorm1d}
    assert_evaluates_as_before(model.double(), converted(model), sound)
    target = torch.randn(16)

    def loss(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return (model(batch[0]).last_hidden_state.mean(1) - target).square().mean()

    assert_learns(new, loss, in_batches(1, sound), epochs=40, lr=3e-3)


@pytest.mark.shows("detection: DETR with its FrozenBatchNorm", "`sn.convert(model, also=(DetrFrozenBatchNorm2d,))`")
def test_a_detector_with_frozen_normalization() -> None:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
    from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

    backbone = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=3,
        num_labels=2,
        dropout=0.0,
    )
    model = DetrForObjectDetection(config).eval()
    frozen = [module for module in model.modules() if isinstance(module, DetrFrozenBatchNorm2d)]
    for module in frozen:
        module.running_mean.normal_(std=0.1)
        module.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 64, 64)
    new = converted(model.double(), also=(DetrFrozenBatchNorm2d,))
    assert len(layers(new)) == len(frozen) > 0
    assert_evaluates_as_before(model, new, x)
    labels = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}

    def loss(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return model(pixel_values=batch[0], labels=[labels] * len(batch[0])).loss

    assert_learns(new.float(), loss, in_batches(1, x), epochs=40, lr=3e-3)


def test_a_group_normalization_with_its_own_forward_is_named() -> None:
    from transformers import BitConfig, BitModel

    model = BitModel(BitConfig(embedding_size=32, hidden_sizes=[32, 32], depths=[1, 1], num_groups=8))
    with pytest.warns(UserWarning, match="BitGroupNormActivation and was not converted: it has a forward of its own"):
        sn.convert(model, also=(nn.GroupNorm,))
