"""The monitor's sinks and callbacks, with the libraries that they are for."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations import loops
from torch import Tensor, nn

import streamnorm as sn
from streamnorm.insight import Record
from streamnorm.insight.monitor import Monitor

UPDATES = 12


def watched(sink: Any) -> Monitor:
    """A short training, watched at every third update."""
    model = loops.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sn.monitor(model, every=3, sinks=[sink]) as watching:
        for batch in list(loops.loader())[:UPDATES]:
            optimizer.zero_grad()
            loops.loss(model, batch).backward()
            optimizer.step()
    return watching


def expected(watching: Monitor, field: str) -> dict[int, float]:
    """The values of a field of the first layer, by update."""
    samples = watching.record.samples
    name = next(iter(samples[0].layers))
    values = {sample.update: getattr(sample.layers[name], field) for sample in samples}
    return {update: value for update, value in values.items() if math.isfinite(value)}


@pytest.mark.integration("tensorboard")
def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watching = watched(sn.insight.tensorboard(tmp_path))
    curves = EventAccumulator(str(tmp_path)).Reload()
    for field in ("drift", "scale", "present"):
        curve = {event.step: event.value for event in curves.Scalars(f"streamnorm-{field}/1")}
        assert curve == pytest.approx(expected(watching, field), rel=1e-6)
    assert [event.value for event in curves.Scalars("streamnorm-rate")] == pytest.approx([0.1] * 5)


@pytest.mark.integration("tensorboard")
def test_a_writer_of_the_user_stays_open(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        watched(sn.insight.tensorboard(writer))
        writer.add_scalar("loss", 1.0, 20)


@pytest.mark.filterwarnings("ignore")
def test_wandb(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    with pytest.raises(ValueError, match=r"call wandb\.init"):
        sn.insight.wandb()
    with wandb.init(mode="offline", dir=tmp_path) as run:
        run.log({"loss": 1.0})
        watching = watched(sn.insight.wandb())
        run.log({"loss": 0.5})
        assert run.summary["streamnorm-drift/1"] == pytest.approx(list(expected(watching, "drift").values())[-1])
        assert run.summary["streamnorm-update"] == UPDATES


def classifier() -> Any:
    import lightning

    class Classifier(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = loops.network()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return loops.loss(self.model, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Classifier()


def trainer(folder: Path, **options: Any) -> Any:
    import lightning

    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(accelerator="cpu", default_root_dir=folder, **{"logger": False, **quiet, **options})


@pytest.mark.integration("lightning")
def test_lightning(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    callback = sn.insight.lightning_callback(every=4, out=tmp_path / "seen")
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, max_epochs=1, callbacks=[callback], logger=logger).fit(classifier(), loops.loader())
    record = Record.read(tmp_path / "seen" / "monitor.jsonl")
    updates = len(loops.loader())
    assert (record.status, record.updates) == ("finished", updates)
    assert record.events[0].text == "SGD: 2 of 2 layers commit"
    assert list(record.samples[-1].layers) == ["model.1", "model.5"]
    logger.save()
    with open(Path(logger.log_dir) / "metrics.csv", encoding="utf-8") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["streamnorm-drift/model.1"]]
    assert steps == [sample.update for sample in callback.monitor.record.samples]


@pytest.mark.integration("lightning")
def test_lightning_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    updates = len(loops.loader())
    for epochs in (1, 2):
        callback = sn.insight.lightning_callback(every=2, out=tmp_path / "seen")
        fit = trainer(tmp_path, max_epochs=epochs, callbacks=[callback])
        fit.fit(classifier(), loops.loader(), ckpt_path=tmp_path / "one.ckpt" if epochs == 2 else None)
        fit.save_checkpoint(tmp_path / "one.ckpt")
    record = Record.read(tmp_path / "seen" / "monitor.jsonl")
    assert record.updates == 2 * updates
    assert [s.update for s in record.samples] == [1, *range(2, 2 * updates + 1, 2)]


@pytest.mark.integration("lightning")
def test_lightning_that_fails(tmp_path: Path) -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError

    callback = sn.insight.lightning_callback(out=tmp_path / "seen")
    module = classifier()
    module.model.append(Failing())
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, max_epochs=1, callbacks=[callback]).fit(module, loops.loader())
    assert Record.read(tmp_path / "seen" / "monitor.jsonl").status == "stopped by ZeroDivisionError"


@pytest.mark.integration("transformers")
def test_transformers(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = loops.network()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": loops.loss(self.model, (x, labels))}

    callback = sn.insight.transformers_callback(every=4, out=tmp_path / "seen")
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=1, per_device_train_batch_size=2, save_steps=5, use_cpu=True, report_to=[]
    )
    data = [{"x": x, "labels": target} for batch in loops.loader() for x, target in zip(*batch)]
    Trainer(WithLoss(), arguments, train_dataset=data, callbacks=[callback]).train()
    record = Record.read(tmp_path / "seen" / "monitor.jsonl")
    assert record.status == "finished"
    assert record.updates == callback.monitor.record.updates == len(data) // 2
    assert list(record.samples[-1].layers) == ["model.1", "model.5"]
    assert "saved at step 5" in [event.text for event in record.events if event.kind == "checkpoint"]
