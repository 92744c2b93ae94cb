"""Character-level language models: normalizations in recurrent networks, at settings down to one sequence at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import torch
from torch import nn
from typing_extensions import TypedDict
from tyro import conf

import streamnorm as sn
from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.score import LOSS, Score
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.data.text import Text, TextData, load_text, open_text
from streamnorm_lab.experiments.experiment import Batch, Experiment, Number, Scores, Split
from streamnorm_lab.experiments.wording import TextWords, Words
from streamnorm_lab.logs.records import End, Run
from streamnorm_lab.methods.layers import Method
from streamnorm_lab.methods.recurrent import RECURRENT
from streamnorm_lab.networks.text import CharModel, generate

MOST_PIECES = 100_000_000
"""Pieces of text in a run: where each begins is drawn before the first one is read."""

File = Annotated[str | None, conf.arg(metavar="FILE", help_behavior_hint="")]


class Sample(TypedDict):
    """Text that a network continued, and its beginning."""

    prompt: str
    text: str


class CharEnd(End, total=False):
    """The last line of a log."""

    sample: Sample


@dataclass(frozen=True, kw_only=True)
class CharExperiment(Experiment[TextData]):
    """Predicting each next character of a text with Adam; so many weight updates, judged by the loss."""

    question: ClassVar[str] = (
        "A recurrent network uses the same weights at every time step. Batch Normalization either mixes the statistics "
        "of all steps or keeps some for each, and needs a mini-batch in any case. Does Streaming Normalization, with "
        "one set of statistics collected over all steps and samples, train as well as Layer Normalization, with "
        "mini-batches and with one sequence at a time?"
    )
    comparisons: ClassVar[tuple[tuple[str, str], ...]] = (
        ("streaming-l1", "layer"),
        ("streaming-l1", "none"),
        ("streaming-l1", "batch-per-step"),
        ("streaming-l1", "batch"),
        ("streaming-l2", "layer"),
        ("streaming-l1", "streaming-l2"),
    )
    catalogue: ClassVar[Mapping[str, Method]] = RECURRENT
    score: ClassVar[Score] = LOSS
    unit: ClassVar[str] = "characters"
    words: ClassVar[Words] = TextWords()
    end_form: ClassVar[type] = CharEnd
    recurrent: ClassVar[type[nn.RNNBase]]
    """The recurrent layers."""

    data: File = None
    """Text file, UTF-8. The first 80% are trained on, the next 10% choose rates, the last 10% are the test.

    Default: the source files of Python's standard library, so that nothing is downloaded."""

    limit: Number = None
    """Use so many characters of the text, the first ones. Default: the whole FILE, or 500,000 of the library."""

    methods: Annotated[tuple[str, ...], conf.arg(metavar="METHOD ...")] = (
        "none",
        "batch-per-step",
        "layer",
        "streaming-l1",
    )
    """Normalizations to compare: none, batch, batch-per-step, layer, streaming-l2, streaming-l1.

    Options of sn.GRU make a variant, for example streaming-l1,window=20000 or streaming-l1,beta=0.7+0.3+0,kappa=0.9."""

    settings: Annotated[tuple[str, ...], conf.arg(metavar="SxU ...")] = ("32x1", "1x4")
    """Sequences per mini-batch x mini-batches per weight update, for example 2x2."""

    rates: Annotated[tuple[float, ...], conf.arg(metavar="RATE ...")] = (3e-3, 1e-2, 3e-2)
    """Learning rates to try. Each method gets its best one per setting, chosen on text held out for that."""

    updates: int = 300
    """Weight updates of each run."""

    steps: int = 50
    """Characters per sequence."""

    hidden: int = 128
    """Features of the hidden state."""

    layers: int = 1
    """Recurrent layers, each fed by the one before."""

    curve_characters: int = 10_000
    """Characters of the test text used for the points of a curve; the final loss always uses all of them."""

    sample: int = 200
    """Characters that the network of seed 0 makes up for the report."""

    def _counts(self) -> tuple[str, ...]:
        return ("updates", "steps", "hidden", "layers", "sample")

    def check(self) -> None:
        """Look at the options before anything is read or written."""
        super().check()
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit}: must be at least 1")
        if self.curve_characters < self.steps:
            message = f"--curve-characters {self.curve_characters}: must be at least --steps {self.steps}, one piece"
            raise UserError(message)
        for setting in map(Setting.parse, self.settings):
            pieces = setting.samples * setting.batches * self.updates
            if pieces > MOST_PIECES:
                raise UserError(
                    f"setting {setting}: {self.updates} updates need {pieces:,} pieces of text; more than "
                    f"{MOST_PIECES:,} are not drawn"
                )

    def open(self) -> Text:
        """Read the text."""
        return open_text(self.data, self.limit, self.steps)

    def load(self, folder: Path) -> TextData:
        """Map the characters into memory."""
        return load_text(folder, self.steps)

    def model(self, data: TextData, method: str) -> CharModel:
        """One-hot characters, the recurrent layers with this method, and a linear layer."""
        options = RECURRENT[method].arguments(self.steps)
        recurrent = partial(cast(Any, self.recurrent), num_layers=self.layers, batch_first=True, **options)
        return CharModel(data.classes, self.hidden, recurrent)

    def optimizer(self, parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(parameters, lr=rate, fused=True)

    def schedule(self, data: TextData, setting: Setting) -> tuple[int, int]:
        """One pass of so many updates."""
        return 1, self.updates

    def batches(self, data: TextData, setting: Setting, seed: int, epoch: int, first_update: int) -> Iterator[Batch]:
        """Pieces that begin anywhere, the same ones wherever a setting has as many samples per update."""
        per_update = setting.samples * setting.batches
        starts = data.train.random_starts(self.updates * per_update, seed)
        for part in starts[first_update * per_update :].split(setting.samples):
            yield data.train.pieces(part)

    def watched(self, data: TextData) -> Split:
        """The first pieces of the test text."""
        return data.test.first(self.curve_characters)

    @classmethod
    def guess(cls, classes: int) -> Scores:
        """All characters alike."""
        return {"loss": math.log(classes), "accuracy": 1 / classes}

    def amounts(self, data: Mapping[str, Any]) -> dict[str, int]:
        """Characters in all."""
        return {"limit": data["train"] + data["validation"] + data["test"]}

    def seen(self, data: Mapping[str, Any], setting: Setting) -> int:
        """Characters of all pieces."""
        return self.updates * setting.batches * setting.samples * self.steps

    def cost(self, data: Mapping[str, Any], setting: Setting) -> float:
        """The mini-batches; a time step costs as much by itself as its work for six sequences."""
        return float(self.updates * setting.batches * (6 + setting.samples))

    def epilogue(self, model: nn.Module, data: TextData, run: Run) -> dict[str, Any]:
        """Text made up by the network of the first reported seed."""
        if run.stage != "final" or run.seed != 0:
            return {}
        prompt = data.test.characters[: self.steps].long()
        made = generate(cast(CharModel, model), prompt, self.sample, run.seed)
        return {"sample": {"prompt": data.spell(prompt), "text": data.spell(made)}}


@dataclass(frozen=True, kw_only=True)
class CharRNN(CharExperiment):
    """Compare normalizations in a simple recurrent network that predicts the next character of a text.

    Each method gets its best learning rate, chosen on text held out for that; then several seeds are run at that rate
    and evaluated on the last tenth of the text.
    """

    name: ClassVar[str] = "char-rnn"
    title: ClassVar[str] = "Character by character, with a simple recurrent network"
    summary: ClassVar[str] = "which normalization trains a recurrent network to predict text, down to one sequence"
    recurrent: ClassVar[type[nn.RNNBase]] = sn.RNN


@dataclass(frozen=True, kw_only=True)
class CharGRU(CharExperiment):
    """Compare normalizations in a GRU that predicts the next character of a text.

    Each method gets its best learning rate, chosen on text held out for that; then several seeds are run at that rate
    and evaluated on the last tenth of the text.
    """

    name: ClassVar[str] = "char-gru"
    title: ClassVar[str] = "Character by character, with a GRU"
    summary: ClassVar[str] = "char-rnn with a GRU"
    recurrent: ClassVar[type[nn.RNNBase]] = sn.GRU


@dataclass(frozen=True, kw_only=True)
class CharLSTM(CharExperiment):
    """Compare normalizations in an LSTM that predicts the next character of a text.

    Each method gets its best learning rate, chosen on text held out for that; then several seeds are run at that rate
    and evaluated on the last tenth of the text.
    """

    name: ClassVar[str] = "char-lstm"
    title: ClassVar[str] = "Character by character, with an LSTM"
    summary: ClassVar[str] = "char-rnn with an LSTM"
    recurrent: ClassVar[type[nn.RNNBase]] = sn.LSTM
