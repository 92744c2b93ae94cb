"""Lightning: the state after its loops is that of the same loop written by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations import loops
from integrations.training import assert_same_state, layers
from torch import Tensor, nn

import streamnorm as sn

pytestmark = pytest.mark.integration("lightning")

AS_IT_IS = "as it is"


def module(automatic: bool = True) -> Any:
    """A LightningModule around the network; with manual optimization it steps after every third mini-batch."""
    import lightning

    class Classifier(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = loops.network()
            self.automatic_optimization = automatic

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = loops.loss(self.model, batch)
            if not automatic:
                self.manual_backward(loss / 3)
                if (index + 1) % 3 == 0:
                    self.optimizers().step()
                    self.optimizers().zero_grad()
            return loss

        def validation_step(self, batch: Any, index: int) -> Tensor:
            return loops.loss(self.model, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return loops.make_optimizer(self.model)

    return Classifier()


def trainer(folder: Path, **options: Any) -> Any:
    import lightning

    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "max_epochs": 1,
    }
    return lightning.Trainer(**{**quiet, **options})


def fitted(folder: Path, **options: Any) -> nn.Module:
    classifier = module()
    trainer(folder, **options).fit(classifier, loops.loader())
    return classifier.model


@pytest.mark.shows("Trainer, `accumulate_grad_batches`", AS_IT_IS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_accumulation(tmp_path: Path, accumulate: int) -> None:
    model = fitted(tmp_path, max_epochs=2, accumulate_grad_batches=accumulate)
    assert_same_state(model, loops.by_hand(epochs=2, accumulate=accumulate))


@pytest.mark.shows("Trainer, `gradient_clip_val`", AS_IT_IS)
def test_gradient_clipping(tmp_path: Path) -> None:
    model = fitted(tmp_path, accumulate_grad_batches=3, gradient_clip_val=0.1)
    expected = loops.by_hand(accumulate=3, clip=0.1)
    assert_same_state(model, expected)
    unclipped = loops.by_hand(accumulate=3)
    assert not model.get_parameter("0.weight").equal(unclipped.get_parameter("0.weight"))


@pytest.mark.shows('Trainer, `precision="bf16-mixed"`', AS_IT_IS)
def test_mixed_precision(tmp_path: Path) -> None:
    model = fitted(tmp_path, accumulate_grad_batches=3, precision="bf16-mixed")
    assert_same_state(model, loops.by_hand(accumulate=3, autocast=torch.bfloat16))
    assert model.get_buffer("1.long").dtype == torch.float32


@pytest.mark.shows("Trainer, validation between updates", AS_IT_IS)
def test_validation_leaves_the_state_alone(tmp_path: Path) -> None:
    classifier = module()
    fit = trainer(tmp_path, accumulate_grad_batches=3, val_check_interval=2)
    fit.fit(classifier, loops.loader(), loops.loader(6))
    assert_same_state(classifier.model, loops.by_hand(accumulate=3))


@pytest.mark.shows("checkpoint and resume between epochs", "`fit(…, ckpt_path=…)`")
def test_checkpoint_and_resume(tmp_path: Path) -> None:
    """Within an epoch Lightning starts the loader anew, so there the loops differ, and not by our doing."""
    first = trainer(tmp_path, accumulate_grad_batches=3)
    first.fit(module(), loops.loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = module()
    second = trainer(tmp_path, accumulate_grad_batches=3, max_epochs=2)
    second.fit(resumed, loops.loader(), ckpt_path=tmp_path / "half.ckpt")
    assert_same_state(resumed.model, loops.by_hand(epochs=2, accumulate=3))


@pytest.mark.shows("manual optimization", AS_IT_IS)
def test_manual_optimization(tmp_path: Path) -> None:
    classifier = module(automatic=False)
    trainer(tmp_path).fit(classifier, loops.loader())
    assert_same_state(classifier.model, loops.by_hand(accumulate=3))


@pytest.mark.shows("`EMAWeightAveraging`", AS_IT_IS)
def test_an_exponential_average(tmp_path: Path) -> None:
    """Statistics are averaged with the weights; what ends up in the model is the average."""
    from lightning.pytorch.callbacks import EMAWeightAveraging

    states: list[dict[str, Tensor]] = []
    loops.by_hand(after_step=lambda model: states.append(copy.deepcopy(model.state_dict())))
    model = fitted(tmp_path, callbacks=[EMAWeightAveraging(decay=0.9)])
    average = states[0]
    for state in states[1:]:
        # As torch does it, which rounds whole numbers down: the average has seen fewer samples.
        average = {name: (0.9 * average[name] + (1 - 0.9) * t).to(t.dtype) for name, t in state.items()}
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, average[name], msg=name)


def test_bound_to_the_wrapped_optimizer(tmp_path: Path) -> None:
    """``self.optimizers()`` gives wrappers."""
    from lightning.pytorch.callbacks import LambdaCallback

    bind = LambdaCallback(on_fit_start=lambda _, module: sn.bind(module.model, module.optimizers()))
    model = fitted(tmp_path, callbacks=[bind], accumulate_grad_batches=3)
    assert_same_state(model, loops.by_hand(accumulate=3))


@pytest.mark.parametrize("affine", [True, False])
def test_two_networks_whose_gradients_are_toggled(tmp_path: Path, affine: bool) -> None:
    """The generator's turn comes first, with the critic's parameters frozen."""
    import lightning

    def network(outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, 6), sn.StreamingNorm1d(6, affine=affine), nn.Linear(6, outputs))

    class Adversarial(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.generator, self.critic = network(8), network(1)
            self.automatic_optimization = False
            self.waiting: list[list[int]] = []

        def training_step(self, batch: Any, index: int) -> None:
            for number, optimizer in enumerate(self.optimizers()):
                with optimizer.toggle_model():
                    fake = self.generator(batch[0])
                    self.manual_backward(self.critic(fake if number == 0 else fake.detach()).mean())
                    optimizer.step()
                    optimizer.zero_grad()
                self.waiting.append([int(layer.samples) for layer in layers(self)])

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(model.parameters(), lr=0.01) for model in (self.generator, self.critic)], []

    module = Adversarial()
    data = torch.utils.data.TensorDataset(torch.randn(12, 8))
    trainer(tmp_path).fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    assert module.waiting == [[0, 4], [4, 0]] * 3
