"""Character-level language models: normalizations in recurrent networks, at settings down to one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import nn
from typing_extensions import TypedDict

import streamnorm as sn
from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.score import LOSS, Score
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.data.text import TextData
from streamnorm_lab.data.text_task import TextTask
from streamnorm_lab.experiments.experiment import Experiment
from streamnorm_lab.experiments.options import Amount, File, MethodNames, Positive, Rates, SettingNames
from streamnorm_lab.experiments.wording import TextWords, Words
from streamnorm_lab.logs.records import End, Run
from streamnorm_lab.methods.method import Method
from streamnorm_lab.methods.recurrent import RECURRENT
from streamnorm_lab.networks.text import CharModel, generate


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
    kind: ClassVar[type[TextTask]] = TextTask
    words: ClassVar[Words] = TextWords()
    end_form: ClassVar[type] = CharEnd
    recurrent: ClassVar[type[nn.RNNBase]]
    """The recurrent layers."""

    data: File = None
    """Text file, UTF-8. The first 80% are trained on, the next 10% choose rates, the last 10% are the test.

    Default: the source files of Python's standard library, so that nothing is downloaded."""

    limit: Amount = None
    """Use so many characters of the text, the first ones. Default: the whole FILE, or 500,000 of the library."""

    methods: MethodNames = (
        "none",
        "batch-per-step",
        "layer",
        "streaming-l1",
    )
    """Normalizations to compare: none, batch, batch-per-step, layer, streaming-l2, streaming-l1.

    Options of sn.GRU make a variant, for example streaming-l1,window=20000 or streaming-l1,beta=0.7+0.3+0,kappa=0.9."""

    settings: SettingNames = ("32x1", "1x4")
    """Sequences per mini-batch x mini-batches per weight update, for example 2x2."""

    rates: Rates = (3e-3, 1e-2, 3e-2)
    """Learning rates to try. Each method gets its best one per setting, chosen on text held out for that."""

    updates: Positive = 300
    """Weight updates of each run."""

    steps: Positive = 50
    """Characters per sequence."""

    hidden: Positive = 128
    """Features of the hidden state."""

    layers: Positive = 1
    """Recurrent layers, each fed by the one before."""

    curve_characters: Positive = 10_000
    """Characters of the test text used for the points of a curve; the final loss always uses all of them."""

    sample: Positive = 200
    """Characters that the network of seed 0 makes up for the report."""

    def check(self) -> None:
        """Look at the options before anything is read or written."""
        super().check()
        if self.curve_characters < self.steps:
            message = f"--curve-characters {self.curve_characters}: must be at least --steps {self.steps}, one piece"
            raise UserError(message)

    @property
    def task(self) -> TextTask:
        """Text."""
        return TextTask(self.data, self.limit, self.steps, self.updates, self.curve_characters)

    def model(self, data: TextData, method: str) -> CharModel:
        """One-hot characters, the recurrent layers with this method, and a linear layer."""
        options = RECURRENT[method].arguments(self.steps)
        recurrent = partial(cast(Any, self.recurrent), num_layers=self.layers, batch_first=True, **options)
        return CharModel(data.classes, self.hidden, recurrent)

    def optimizer(self, parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(parameters, lr=rate, fused=True)

    def work(self, setting: Setting) -> float:
        """A time step costs as much by itself as its work for six sequences."""
        return 6.0 + setting.samples

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
