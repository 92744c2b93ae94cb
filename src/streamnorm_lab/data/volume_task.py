"""Segmenting generated volumes: the class of every place, judged by the Dice coefficient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from streamnorm_lab.common.forms import Size
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.data.image_task import ImageFacts, Images, ImageTask
from streamnorm_lab.data.task import Scores
from streamnorm_lab.data.volumes import CLASSES, volumes


class VolumeFacts(ImageFacts):
    """The facts that identify volumes, and the number of places in each."""

    targets: Size


@dataclass(frozen=True)
class VolumeTask(ImageTask):
    """Generated volumes, shuffled at each pass.

    Args:
        scanners: "one" or "many": whether they differ in gain and offset.
        standardize: whether each one has mean 0 and deviation 1.
        edge: places along each axis.
    """

    scanners: str = "many"
    standardize: bool = False
    edge: int = 16

    unit: ClassVar[str] = "voxels"
    form: ClassVar[type] = VolumeFacts

    @property
    def units_per_sample(self) -> int:
        """A sample is a volume."""
        return self.edge**3

    def open(self, settings: Sequence[Setting]) -> Images:
        """Volumes are generated when they are prepared."""
        return self._of(volumes(self.edge, self.scanners, self.standardize), settings)

    @staticmethod
    def measure(logits: Tensor, targets: Tensor, samples: int) -> Mapping[str, float]:
        """The sum of the Dice coefficients of ``samples`` volumes, each the mean over its classes but the background.

        The coefficient of a class is twice the places that are rightly given to it, by those that are given to it and
        those that are of it.
        """
        found, true = logits.argmax(1).view(samples, -1), targets.view(samples, -1)
        total = 0.0
        for kind in range(1, CLASSES):
            mine, its = found == kind, true == kind
            both, either = (mine & its).sum(1), mine.sum(1) + its.sum(1)
            total += (2 * both / either).sum().item()
        return {"dice": total / (CLASSES - 1)}

    @staticmethod
    def guess(classes: int) -> Scores:
        """Finding nothing."""
        return {"loss": None, "accuracy": 1 / classes, "dice": 0.0}
