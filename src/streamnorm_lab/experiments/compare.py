"""Normalizations in a network of the user's own: what ``streamnorm compare`` runs."""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from tyro import conf

from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.forms import Between
from streamnorm_lab.common.functions import described, find_function
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.experiments.images import ImageExperiment
from streamnorm_lab.experiments.options import FREE, Folder, MethodNames, Rates, SettingNames
from streamnorm_lab.experiments.wording import CompareWords, Words
from streamnorm_lab.methods.layers import NormFactory

TRIED = 4
"""Samples that the network is tried with before the first run."""


@dataclass(frozen=True, kw_only=True)
class Compare(ImageExperiment):
    """Compare normalizations in a network of your own, with large mini-batches and with small ones.

    FUNCTION(norm) in MODULE.py, in this folder, builds the network, with norm(channels, dimensions) wherever it
    normalizes: dimensions is 0 after a fully connected layer, 1 in sequences, 2 in images, 3 in volumes. Each
    normalization gets its best learning rate at each setting, chosen on validation data; then several seeds are run at
    that rate and evaluated on the test data.

    streamnorm compare mine:build

    streamnorm compare mine:build --data mine:data --methods group streaming-l1 --settings 1x1 --minutes 30
    """

    name: ClassVar[str] = "compare"
    title: ClassVar[str] = "Normalizations in a network of your own"
    summary: ClassVar[str] = "which normalization trains your own network: streamnorm compare MODULE:FUNCTION"
    question: ClassVar[str] = (
        "Which normalization trains this network, with mini-batches of which size, and how much does each one depend "
        "on its learning rate?"
    )
    words: ClassVar[Words] = CompareWords()
    per_sample: ClassVar[bool] = True

    function: Annotated[conf.Positional[str], conf.arg(metavar="MODULE:FUNCTION")]
    """The function that builds the network."""

    code: Annotated[str, conf.Suppress] = ""
    """Tells versions of the function's module apart; nobody types it."""

    data: Folder = None
    """Folder with images, Parquet files or CIFAR-10's binary files, or MODULE:FUNCTION, which gives two data sets.

    Default: scikit-learn's digits, 8×8 pixels of 10 classes. `streamnorm data --help` tells more."""

    size: Annotated[int | None, conf.arg(metavar="INT", help_behavior_hint=""), Between(1)] = None
    """Scale images to this height and width. Default: as they are."""

    methods: MethodNames = ("batch", "group", "layer", "streaming-l1")
    """Normalizations to compare. There are also none, batch-renorm, mabn, instance, rms, online and streaming-l2;
    options make variants of any, for example streaming-l1,window=1000 or group,groups=4."""

    settings: SettingNames = ("32x1", "4x1", "1x1")
    """Samples per mini-batch x mini-batches per weight update, for example 2x16."""

    rates: Rates = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """Learning rates to try, per sample of a weight update: 0.001 is 0.032 where 32 samples make an update (the linear
    scaling rule). Each method gets its best one per setting, chosen on data held out for that."""

    minutes: Annotated[float | None, conf.arg(metavar="FLOAT", help_behavior_hint=""), FREE, Between(0, above=True)] = (
        None
    )
    """About how long all of it may take. Speed is measured first, and as many training samples are used as fit.

    Default: as long as it takes."""

    def check(self) -> None:
        """Look at the options, and at the function, before anything is read or written."""
        super().check()
        find_function(self.function)

    @property
    def label(self) -> str:
        """The function's name tells the folders of several networks apart."""
        return f"{self.name}-{self.function.rpartition(':')[2]}"

    def network(self, shape: tuple[int, ...], classes: int, norm: NormFactory) -> nn.Module:
        """The network that the function builds.

        Raises:
            UserError: it raises an error, builds no module, or one without a normalization or without parameters.
        """
        function, (watched, asked) = find_function(self.function), _watched(norm)
        try:
            model = function(watched)
        except UserError:
            raise
        except Exception as error:  # of the user's own
            raise UserError(f"{self.function}: calling it raises {described(error)}") from None
        if not isinstance(model, nn.Module):
            what = "nothing" if model is None else f"a {type(model).__name__}"
            raise UserError(f"{self.function} returns {what}, and must return a torch.nn.Module")
        if not asked:
            raise UserError(
                f"{self.function} does not call its argument: norm(channels, dimensions) gives a normalization layer"
            )
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UserError(f"{self.function} returns a network without parameters to train")
        return model

    def work(self, setting: Setting) -> float:
        """A mini-batch costs as much by itself as its work for three samples."""
        return 3.0 + setting.samples

    def fingerprint(self) -> str:
        """A hash of the code of the function's module, without comments: runs of other code are not continued."""
        path = inspect.getsourcefile(inspect.unwrap(find_function(self.function)))
        try:
            text = Path(path or "").read_text(encoding="utf-8")
            code = ast.dump(ast.parse(text))
        except (OSError, ValueError, SyntaxError):  # it has no file, or none of Python's
            return ""
        return hashlib.sha256(code.encode()).hexdigest()[:16]

    def rehearse(self, facts: Mapping[str, Any]) -> None:
        """Build the network with each method, and run it on random numbers of the data's shape.

        Raises:
            UserError: it cannot be built, or does not fit the data.
        """
        shape = (TRIED, *facts["shape"])
        inputs = torch.zeros(shape, dtype=torch.int64) if facts.get("dtype") == "int64" else torch.randn(shape)
        refused = []
        for method in self.methods:
            chosen = self.catalogue[method]
            with torch.random.fork_rng():
                model = self.network(shape[1:], facts["classes"], chosen.make)
                try:
                    logits = model(inputs)
                except ValueError as error:  # where a normalization cannot be, its runs say so
                    refused.append(error)
                    continue
                except Exception as error:  # of the user's own
                    raise self._misfit(shape, error) from None
            self._check_logits(logits, facts["classes"])
        if len(refused) == len(self.methods):
            raise self._misfit(shape, refused[0])

    def _misfit(self, shape: tuple[int, ...], error: Exception) -> UserError:
        return UserError(f"{self.function}: the network does not take inputs of shape {shape}: {described(error)}")

    def _check_logits(self, logits: Any, classes: int) -> None:
        if not isinstance(logits, Tensor):
            raise UserError(f"{self.function}: the network gives a {type(logits).__name__}, and must give one tensor")
        if logits.dim() != 2 or len(logits) != TRIED or logits.shape[1] < classes:
            raise UserError(
                f"{self.function}: for {TRIED} samples the network gives numbers of shape {tuple(logits.shape)}; "
                f"needed is ({TRIED}, {classes}), one for each of the {classes} classes of these data"
            )


def _watched(norm: NormFactory) -> tuple[NormFactory, list[int]]:
    """The factory, as the user's function sees it, and the channels that it has been asked for."""
    asked = []

    def norm_(channels: int, dimensions: int) -> nn.Module:
        if isinstance(dimensions, bool) or dimensions not in (0, 1, 2, 3):
            raise ValueError(f"norm(channels, dimensions): dimensions is 0, 1, 2 or 3, got {dimensions!r}")
        asked.append(channels)
        return norm(channels, dimensions)

    norm_.__qualname__ = "norm"  # what Python calls it where an argument is missing
    return norm_, asked
