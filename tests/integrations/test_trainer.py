"""The Trainer of transformers: the state after it is that of the same loop written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integrations import loops
from integrations.training import assert_same_state
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

pytestmark = pytest.mark.integration("transformers")


class WithLoss(nn.Module):
    """What the Trainer wants of a model: keywords in, the loss first out."""

    def __init__(self) -> None:
        super().__init__()
        self.model = loops.network()

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": loops.loss(self.model, (pixel_values, labels))}


class Examples(Dataset[Any]):
    def __init__(self) -> None:
        self.data = loops.data()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, target = self.data[index]
        return {"pixel_values": x, "labels": target}


def trained(folder: Path, resume: bool = False, **options: Any) -> nn.Module:
    import transformers

    class InOrder(transformers.Trainer):  # type: ignore[misc]
        """The examples in their order, as the loop by hand has them."""

        def get_train_dataloader(self) -> Any:
            return self.accelerator.prepare(DataLoader(Examples(), batch_size=loops.BATCH_SIZE))

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=loops.BATCH_SIZE,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"num_train_epochs": 2, "gradient_accumulation_steps": 3, "max_grad_norm": 0.1, **options},
    )
    model = WithLoss()
    optimizer = loops.make_optimizer(model)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = InOrder(model, arguments, train_dataset=Examples(), optimizers=(optimizer, constant))
    trainer.train(resume_from_checkpoint=resume or None)
    return model.model


@pytest.mark.shows("Trainer, `gradient_accumulation_steps` and `max_grad_norm`", "as it is")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_accumulation_and_clipping(tmp_path: Path, accumulate: int) -> None:
    model = trained(tmp_path, gradient_accumulation_steps=accumulate, save_strategy="no")
    assert_same_state(model, loops.by_hand(epochs=2, accumulate=accumulate, clip=0.1))


@pytest.mark.shows("Trainer, `bf16=True`", "as it is")
def test_mixed_precision(tmp_path: Path) -> None:
    model = trained(tmp_path, bf16=True, save_strategy="no")
    assert_same_state(model, loops.by_hand(epochs=2, accumulate=3, clip=0.1, autocast=torch.bfloat16))


@pytest.mark.shows("Trainer, checkpoint and resume", "`train(resume_from_checkpoint=True)`")
@pytest.mark.parametrize("steps", [4, 2], ids=["between epochs", "within an epoch"])
def test_checkpoint_and_resume(tmp_path: Path, steps: int) -> None:
    trained(tmp_path, max_steps=steps, save_steps=steps)
    model = trained(tmp_path, resume=True, save_strategy="no")
    assert_same_state(model, loops.by_hand(epochs=2, accumulate=3, clip=0.1))
