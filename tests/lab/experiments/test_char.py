"""Character-level language models: one run, the methods, the model, and a whole experiment."""

from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.lab import finish, set_scores, stop_after, timeless
from torch import nn

import streamnorm as sn
from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.analysis.verdict import sentences
from streamnorm_lab.commands.main import main
from streamnorm_lab.common.errors import UserError
from streamnorm_lab.data.text import Text, load_text
from streamnorm_lab.experiments.catalogue import EXPERIMENTS
from streamnorm_lab.experiments.char import CharGRU, CharLSTM, CharRNN
from streamnorm_lab.logs.records import Run
from streamnorm_lab.methods.method import reported, trainable
from streamnorm_lab.methods.recurrent import RECURRENT
from streamnorm_lab.networks.text import CharModel, generate
from streamnorm_lab.running.train import Training, evaluate

WORDS = "to be or not to be that is the question whether tis nobler in the mind to suffer "


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """1,300 characters, in pieces of 8."""
    folder = tmp_path_factory.mktemp("text")
    Text("words", "a few words", (WORDS * 20)[:1300]).prepare(folder)
    return load_text(folder, 8)


def experiment(kind=CharGRU, **options):
    return kind(
        **{"hidden": 12, "steps": 8, "updates": 6, "points": 3, "curve_characters": 40, "sample": 20, **options}
    )


def test_a_run_is_the_loop_that_one_would_write(text, tmp_path):
    """Against a plain loop: pieces from anywhere, hidden states of zeros, gradients averaged over 2×3 pieces."""
    logged = finish(experiment(), Run("final", "streaming-l1", "2x3", 0.02, 5), text, tmp_path / "log.jsonl")

    torch.manual_seed(5)
    gru, head = sn.GRU(text.classes, 12, batch_first=True), nn.Linear(12, text.classes)
    optimizer = torch.optim.Adam([*gru.parameters(), *head.parameters()], lr=0.02)
    characters = text.train.characters.long()
    starts = torch.randint(len(characters) - 8, (36,), generator=torch.Generator().manual_seed(5))

    def loss_of(first):
        pieces = torch.stack([characters[start : start + 9] for start in first])
        output, _ = gru(F.one_hot(pieces[:, :-1], text.classes).float())
        return F.cross_entropy(head(output).transpose(1, 2), pieces[:, 1:])

    for group in starts.split(6):
        optimizer.zero_grad()
        for part in group.split(2):
            (loss_of(part) / 3).backward()
        optimizer.step()
    gru.eval()
    characters = text.test.characters.long()
    with torch.no_grad():
        expected = loss_of(torch.arange(0, 8 * (129 // 8), 8)).item()
    assert logged.end["scores"]["streaming-l1"]["loss"] == pytest.approx(expected, rel=1e-4)
    assert logged.end["updates"] == 6
    assert logged.end["characters"] == 6 * 6 * 8
    assert logged.end["characters_evaluated"] == 128


@pytest.mark.parametrize("kind", [CharRNN, CharGRU, CharLSTM])
def test_every_method_starts_from_the_same_weights_and_sees_the_same_pieces(text, kind):
    names = [*RECURRENT, "streaming-l1,window=50"]
    trainings = [Training(experiment(kind), Run("final", name, "2x2", 0.1, 3), text) for name in names]
    assert {type(t.model.recurrent) for t in trainings} == {kind.recurrent}
    weights = [{name: p for name, p in t.model.named_parameters() if "norm" not in name} for t in trainings]
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        assert all(torch.equal(other[name], weight) for name, weight in weights[0].items())
    targets = [torch.cat([batch[1] for batch in t._batches(0, 0)]) for t in trainings]
    assert all(torch.equal(targets[0], other) for other in targets)


def test_settings_with_as_many_samples_per_update_see_the_same_pieces(text, tmp_path):
    """Without statistics of the mini-batch they also end alike."""
    losses = [
        finish(experiment(), Run("final", "layer", setting, 0.02, 0), text, tmp_path / f"{setting}.jsonl").end["scores"]
        for setting in ("4x1", "2x2", "1x4")
    ]
    assert [score["layer"]["loss"] for score in losses] == pytest.approx([losses[0]["layer"]["loss"]] * 3, rel=1e-5)


def test_choosing_a_rate_never_looks_at_the_test_text(text, tmp_path):
    blind = type(text)(text.vocabulary, text.train, text.validation, text.test.first(0))
    logged = finish(experiment(), Run("tune", "layer", "4x1", 0.01, 0), blind, tmp_path / "log.jsonl")
    assert logged.end["characters_evaluated"] == 128
    assert all("test" not in point for point in logged.points)
    assert "sample" not in logged.end


@pytest.mark.parametrize("kind", [CharRNN, CharGRU, CharLSTM])
@pytest.mark.parametrize("method", ["batch-per-step", "streaming-l1"])
@pytest.mark.parametrize("updates", [1, 4])
def test_an_interrupted_run_ends_with_the_same_numbers(text, tmp_path, kind, method, updates):
    options, run = experiment(kind, checkpoint_every=0.0), Run("final", method, "3x2", 0.02, 0)
    whole = finish(options, run, text, tmp_path / "whole.jsonl")
    stop_after(updates, options, run, text, tmp_path / "torn.jsonl")
    assert (tmp_path / "torn.ckpt").exists()
    assert timeless(finish(options, run, text, tmp_path / "torn.jsonl")) == timeless(whole)


@pytest.mark.parametrize("method", ["batch", "batch-per-step"])
def test_batch_statistics_refuse_one_sequence_and_the_reason_is_kept(text, tmp_path, method):
    logged = finish(experiment(), Run("tune", method, "1x4", 0.1, 0), text, tmp_path / "log.jsonl")
    assert logged.end["status"] == "fails"
    assert "one value per statistic" in logged.end["reason"]


def test_a_diverging_run_counts_with_the_loss_of_guessing(text, tmp_path, monkeypatch):
    monkeypatch.setattr(F, "cross_entropy", lambda *inputs: torch.tensor(math.inf))
    logged = finish(experiment(), Run("final", "none", "4x1", 0.1, 0), text, tmp_path / "log.jsonl")
    assert logged.end["status"] == "diverged"
    assert logged.end["scores"]["none"]["loss"] == pytest.approx(math.log(text.classes))


def test_evaluation_is_the_mean_over_all_characters(text, monkeypatch):
    model = experiment().model(text, "none")
    inputs, targets = text.test.batch(slice(None))
    with torch.no_grad():
        expected = F.cross_entropy(model(inputs), targets).item()
    monkeypatch.setattr("streamnorm_lab.running.train.EVALUATION_BATCH", 3)
    assert evaluate(model, text.test)["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", [*RECURRENT, "streaming-l1,window=500", "layer,gain=0.1"])
@pytest.mark.parametrize("layer", [sn.RNN, sn.GRU, sn.LSTM])
def test_every_method_makes_recurrent_layers(name, layer):
    output, _ = layer(3, 4, **RECURRENT[name].arguments(5))(torch.randn(5, 2, 3))
    assert output.shape == (5, 2, 4)


def test_streaming_methods_are_the_layer_with_its_defaults():
    for name, p in (("streaming-l1", 1), ("streaming-l2", 2)):
        assert repr(sn.GRU(3, 4, **RECURRENT[name].arguments(5))) == repr(sn.GRU(3, 4, p=p))
    assert RECURRENT["none"].arguments(5) == {"norm": None}
    assert RECURRENT["batch-per-step"].arguments(5) == {"norm": "batch-per-step", "max_steps": 5}


def test_a_variant_has_the_options_that_its_name_says():
    variant = RECURRENT["streaming-l2,beta=0.7+0.3+0,kappa=0.9,center=zero"]
    assert variant.arguments(9) == {
        "norm": "streaming",
        "p": 2,
        "beta": (0.7, 0.3, 0.0),
        "kappa": 0.9,
        "center": "zero",
    }
    names = {"layer", "streaming-l1", "streaming-l1,window=500", "streaming-l1,window=9"}
    methods = reported(names, RECURRENT)
    assert {method.name for method in methods} == names
    assert len({method.colour for method in methods}) == len({method.label for method in methods}) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "steaming",
            "unknown method 'steaming' (did you mean 'streaming-l2'?): choose from none, batch, batch-per-step, layer",
        ),
        ("steaming,window=5", "unknown method 'steaming,window=5'"),
        ("streaming-l1,window", "'window' is not of the form option=value"),
        ("streaming-l1,windw=5", "windw"),
        ("streaming-l1,window=-5", "a number above 0"),
        ("streaming-l1,alpha=0.5+0.2", "alpha"),
        ("layer,window=5", "window=5 is an option of norm='streaming'"),
    ],
)
def test_a_method_that_cannot_be_is_one_clear_line(name, message):
    with pytest.raises(UserError, match=r"^(unknown )?method '") as caught:
        trainable([name], RECURRENT)
    assert message in str(caught.value)


class _Counting(nn.Module):
    """Expects the next number of a cycle, and remembers how much it was shown."""

    def __init__(self):
        super().__init__()
        self.shown: list[int] = []

    def forward(self, characters):
        self.shown.append(characters.shape[1])
        return F.one_hot((characters.flatten() + 1) % 5, 5) * 100.0


def test_generated_text_is_drawn_from_what_the_model_expects():
    model = _Counting()
    made = generate(model, torch.tensor([2, 3, 4]), 7, 0)  # type: ignore[arg-type]
    assert made.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert model.shown == [3] * 7
    assert model.training


def test_generated_text_follows_from_the_seed_alone():
    torch.manual_seed(0)
    model = CharModel(6, 5, lambda inputs, hidden: nn.GRU(inputs, hidden, batch_first=True))
    prompt = torch.tensor([1, 2, 3])
    before = torch.get_rng_state()
    first, again, other = (generate(model, prompt, 40, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


SMALL = [
    *("--methods", "batch-per-step", "layer", "streaming-l1", "streaming-l1,window=500"),
    *("--settings", "2x1", "1x2", "--rates", "0.003", "0.03", "--seeds", "3", "--limit", "3000"),
    *("--updates", "4", "--hidden", "8", "--steps", "10", "--points", "2", "--sample", "12", "--jobs", "1"),
    *("--curve-characters", "50"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("char") / "out"
    assert main(["run", "char-gru", *SMALL, "--out", str(folder)]) == 0
    return folder


def test_an_experiment_from_the_command_to_the_report(finished):
    results = open_results(finished)
    assert [method.name for method in results.methods][-1] == "streaming-l1,window=500"
    cell = results.cells["streaming-l1", results.settings[0]]
    assert cell.rate == min(cell.tuning, key=lambda rate: cell.tuning[rate])
    assert set(cell.scores) == {0, 1, 2}
    assert all(0 < loss < 2 * math.log(100) for loss in cell.scores.values())
    page = (finished / "report.html").read_text()
    for words in ("bits", "nats", "What it writes", "Python", "streaming-l1,window=500", "cannot train at 1×2"):
        assert words in page
    assert "image" not in page.replace("data:image/svg+xml", "")
    assert page.count("<h3>Streaming L1</h3>") == 2
    with open(finished / "results.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "done"]
    assert len(rows) == 7
    for row in rows:
        assert float(row["bits_per_character"]) == pytest.approx(float(row["loss"]) / math.log(2))
        assert 0 < float(row["train_loss"]) < 2 * math.log(100)


def test_a_second_time_nothing_is_run_again_and_another_text_is_refused(finished, tmp_path, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*.jsonl")}
    assert main(["run", "char-gru", *SMALL, "--out", str(finished)]) == 0
    other = tmp_path / "other.txt"
    other.write_text(WORDS * 40)
    assert main(["run", "char-gru", *SMALL, "--data", str(other), "--out", str(finished)]) == 2
    assert "choose another folder with --out" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in finished.rglob("*.jsonl")} == before


def test_the_lower_loss_is_ahead(finished, tmp_path):
    """The verdict, with losses that are known."""
    folder = shutil.copytree(finished, tmp_path / "copy")
    set_scores(folder, {"layer": (2.0, 2.1, 2.2), "streaming-l1": (1.9, 2.0, 2.11)}, "loss")
    said = sentences(open_results(folder))
    assert "Streaming L1 is ahead of Layer at 2×1 and 1×2 (−0.097 nats)." in said


@pytest.mark.parametrize("name", ["char-rnn", "char-gru", "char-lstm"])
def test_the_command_line_explains_the_options(name, capsys):
    assert name in EXPERIMENTS
    with pytest.raises(SystemExit):
        main(["run", name, "--help"])
    out = capsys.readouterr().out
    for option in ("data FILE", "limit", "updates", "steps", "hidden", "layers", "methods", "settings", "rates"):
        assert f"--{option} " in out
    assert "(default: None)" not in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--updates", "0"], "--updates 0: must be at least 1"),
        (["--limit", "0"], "--limit 0: must be at least 1"),
        (["--limit", "400"], "give at least 520 characters"),
        (["--curve-characters", "49"], "--curve-characters 49: must be at least --steps 50"),
        (["--data", "nowhere.txt"], "--data nowhere.txt: no such file"),
        (["--data", "."], "this is a folder"),
        (["--data", "latin.txt"], "not UTF-8 text"),
        (["--methods", "batch-recalibrated"], "unknown method 'batch-recalibrated'"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(capsys, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes(b"caf\xe9 " * 1000)
    assert main(["run", "char-gru", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["latin.txt"]
