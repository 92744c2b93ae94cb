"""The monitor: when it samples, what it keeps and writes, and that training does not notice it."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

import streamnorm as sn
from streamnorm.insight import Record, Sample
from streamnorm.insight import monitor as module
from streamnorm.insight import record as record_module
from streamnorm.insight.monitor import Monitor


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), sn.StreamingNorm1d(6), nn.ReLU(), nn.Linear(6, 6), sn.StreamingNorm1d(6))


def train(model: nn.Module, updates: int, optimizer: torch.optim.Optimizer | None = None, samples: int = 2) -> None:
    optimizer = SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    for _ in range(updates):
        optimizer.zero_grad()
        model(torch.randn(samples, 4)).square().mean().backward()
        optimizer.step()


def seen(watching: Monitor) -> list[int]:
    return [sample.update for sample in watching.record.samples]


def told(watching: Monitor, kind: str) -> list[tuple[int, str]]:
    return [(event.update, event.text) for event in watching.record.events if event.kind == kind]


def test_samples_at_the_first_update_at_every_so_many_and_at_the_end() -> None:
    model = network()
    with sn.monitor(model, every=10) as watching:
        train(model, 34)
        assert seen(watching) == [1, 10, 20, 30]
    assert seen(watching) == [1, 10, 20, 30, 34]
    last = watching.record.samples[-1]
    assert list(last.layers) == ["1", "4"]
    assert last.layers["1"].samples == 0, "read after the last commit"
    assert {sample.layers["1"].samples for sample in watching.record.samples[:-1]} == {2}
    assert {sample.rate for sample in watching.record.samples[:-1]} == {0.1}
    assert watching.record.status == "finished"
    assert watching.record.updates == 34
    assert not watching.running


def test_training_is_the_same_with_and_without(engine: str) -> None:
    watched, alone = network(), network()
    with sn.monitor(watched, every=3):
        torch.manual_seed(1)
        train(watched, 20)
    torch.manual_seed(1)
    train(alone, 20)
    for ours, theirs in zip(watched.state_dict().values(), alone.state_dict().values()):
        assert ours.equal(theirs)


def test_nothing_stays_behind() -> None:
    model = network()
    before = {name: len(value) for name, value in vars(model).items() if name.endswith("hooks")}
    watching = sn.monitor(model, every=5).start()
    train(model, 12)
    watching.stop()
    assert {name: len(value) for name, value in vars(model).items() if name.endswith("hooks")} == before
    updates = watching.record.updates
    train(model, 5)
    assert watching.record.updates == updates
    reference = weakref.ref(model)
    del model, watching
    gc.collect()
    assert reference() is None


def test_it_can_be_started_again() -> None:
    model = network()
    watching = sn.monitor(model, every=5)
    for _ in range(2):
        with watching:
            train(model, 7)
        assert seen(watching) == [1, 5, 7]
    watching.stop()
    watching.start()
    with pytest.raises(RuntimeError, match="runs already"):
        watching.start()
    watching.stop()


@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_every_is_a_whole_number(every: int) -> None:
    with pytest.raises(ValueError, match="every is a number of weight updates"):
        sn.monitor(network(), every=every)


def test_a_model_without_a_streaming_layer() -> None:
    with pytest.raises(ValueError, match="Linear holds no streaming layer to monitor"):
        sn.monitor(nn.Linear(2, 2))


def test_recurrent_layers_by_name() -> None:
    model = nn.ModuleDict({"first": sn.GRU(3, 5), "cell": sn.LSTMCell(5, 4)})
    optimizer = SGD(model.parameters(), lr=0.1)
    with sn.monitor(model, every=1) as watching:
        for _ in range(2):
            output, _ = model["first"](torch.randn(7, 2, 3))
            hidden, _ = model["cell"](output[-1])
            hidden.sum().backward()
            optimizer.step()
    names = ["first.norm_ih_l0", "first.norm_hh_l0", "cell.norm_ih", "cell.norm_hh"]
    sample = watching.record.samples[-1]
    assert list(sample.layers) == names
    assert [sample.layers[name].samples for name in names] == [14, 14, 2, 2]


# Which updates count


def test_optimizers_of_other_models_do_not_count() -> None:
    model, other = network(), network()
    with sn.monitor(model, every=1) as watching:
        train(other, 3)
        assert watching.record.updates == 0
        train(model, 2)
        assert watching.record.updates == 2
    assert seen(watching) == [1, 2]


def test_a_step_that_no_layer_follows_counts() -> None:
    """An optimizer that trains other parameters of the model updates its network too."""
    model = network()
    optimizer, rest = SGD(model[1:].parameters(), lr=0.1), SGD(model[0].parameters(), lr=0.1)
    sn.bind(model, optimizer)
    with sn.monitor(model, every=1) as watching:
        train(model, 1, optimizer)
        rest.step()
    assert watching.record.updates == 2
    assert told(watching, "update") == [(1, "SGD: 2 of 2 layers commit"), (2, "SGD: 0 of 2 layers commit")]
    assert [sample.layers["1"].idle for sample in watching.record.samples] == [0, 1]


def test_commits_by_hand_count() -> None:
    model = network()
    with sn.monitor(model, every=2) as watching:
        for _ in range(4):
            model(torch.randn(3, 4))
            sn.commit(model)
    assert seen(watching) == [1, 2, 4]
    assert told(watching, "update") == [(1, "streamnorm.commit: 2 of 2 layers commit")]
    assert math.isnan(watching.record.samples[-1].rate)


@pytest.mark.parametrize("steps", [1, 7], ids="critic steps {}".format)
def test_two_optimizers_take_turns(steps: int) -> None:
    """Whichever step a sample falls on: each layer is read when it commits itself."""
    model = nn.ModuleDict({"generator": network(), "critic": network()})
    optimizers = {name: SGD(part.parameters(), lr=0.1) for name, part in model.items()}
    for name, part in model.items():
        sn.bind(part, optimizers[name])
    with sn.monitor(model, every=20) as watching:
        for _ in range(160 // (steps + 1)):
            for name in ["critic"] * steps + ["generator"]:
                train(model[name], 1, optimizers[name])
    assert told(watching, "warning") == []
    for sample in watching.record.samples[2:-1]:
        for name, reading in sample.layers.items():
            assert (reading.idle, reading.samples) == (0, 2), (sample.update, name)
            assert 0 < reading.replaced <= 2 / 18


def test_a_layer_that_no_one_uses_delays_no_sample() -> None:
    model = nn.ModuleDict({"used": network(), "unused": sn.StreamingNorm1d(3)})
    with sn.monitor(model, every=5) as watching:
        train(model["used"], 21, SGD(model.parameters(), lr=0.1))
        assert seen(watching) == [1, 5, 10, 15, 20]
    assert [sample.layers["unused"].idle for sample in watching.record.samples] == [1, 5, 10, 15, 20, 21]


def test_no_update_at_all_is_told() -> None:
    model = network()
    watching = sn.monitor(model).start()
    model(torch.randn(2, 4))
    with pytest.warns(RuntimeWarning, match=r"no weight update was noticed .* streamnorm.commit\(model\)"):
        watching.stop()
    with sn.monitor(network()):
        pass


def test_an_optimizer_for_each_parameter() -> None:
    """Stepped within backward, they make one weight update together."""
    model = network()
    optimizers = {parameter: SGD([parameter], lr=0.1) for parameter in model.parameters()}
    for parameter, optimizer in optimizers.items():
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    with sn.monitor(model, every=2) as watching:
        for _ in range(8):
            model(torch.randn(2, 4)).square().mean().backward()
            for optimizer in optimizers.values():
                optimizer.zero_grad()
    assert seen(watching) == [1, 2, 4, 6, 8]
    assert {reading.samples for sample in watching.record.samples[2:-1] for reading in sample.layers.values()} == {2}


# Events


def test_changes_of_the_rate() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.4)
    with sn.monitor(model, every=2) as watching:
        for update in range(1, 41):
            optimizer.param_groups[0]["lr"] = 0.4 if update <= 10 else 0.04 * 0.95 ** (update - 11)
            train(model, 1, optimizer)
    assert told(watching, "rate") == [
        (12, "learning rate 0.4 to 0.038"),
        (26, "learning rate 0.038 to 0.0185"),
        (40, "learning rate 0.0185 to 0.00904"),
    ]
    assert watching.record.samples[-1].rate == pytest.approx(0.04 * 0.95**29)


def test_checkpoints() -> None:
    model = network()
    with sn.monitor(model, every=5) as watching:
        train(model, 3)
        state = model.state_dict()
        model.state_dict()
        train(model, 10)
        nn.ModuleDict({"part": model}).state_dict()
        model.load_state_dict(state)
        watching.note("epoch", "the second begins")
    assert told(watching, "checkpoint") == [
        (3, "state_dict was read"),
        (13, "state_dict was read"),
        (13, "state_dict was loaded"),
    ]
    assert told(watching, "epoch") == [(13, "the second begins")]


def save_and_load(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), save_and_load])
def test_copies_of_a_model_are_not_watched(how: Callable[[nn.Module], nn.Module]) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    with sn.monitor(model, every=1) as watching:
        train(model, 1, optimizer)
        double = how(model)
        double.state_dict()
        double.load_state_dict(double.state_dict())
        train(double, 3)
        how(double)
        assert watching.record.updates == 1
        assert told(watching, "checkpoint") == []


@pytest.mark.filterwarnings("ignore:.* runs away")
def test_warnings_name_the_layer_once() -> None:
    model = network()
    with sn.monitor(model, every=1) as watching:
        train(model, 2)
        with torch.no_grad():
            next(model.parameters()).mul_(1e6)
        train(model, 3)
        with torch.no_grad():
            next(model.parameters()).fill_(math.nan)
        train(model, 3)
    warned = told(watching, "warning")
    assert warned[0] == (3, "1: the scale of 6 channels grew tenfold within 1 updates")
    assert warned[-1] == (6, "1: 6 channels met values that are not finite; 1 other layer likewise")


def test_constant_channels_are_told() -> None:
    model = nn.Sequential(nn.Linear(4, 3), sn.StreamingNorm1d(3, window=0.5))
    with torch.no_grad():
        next(model.parameters())[1:] = 0
    with sn.monitor(model, every=5) as watching:
        train(model, 30, SGD(model[1].parameters(), lr=0.1))
    assert [text for _, text in told(watching, "warning")] == ["1: 2 channels without variance"]


def test_a_layer_that_collects_and_never_commits_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONG_IDLE", 40)
    model = network()
    unused = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    sn.bind(model[1], unused)
    with sn.monitor(model, every=10) as watching:
        train(model, 60)
    assert told(watching, "warning") == [
        (40, "1: 40 updates since its last commit: name its optimizer with streamnorm.bind")
    ]


# What is kept


def test_the_record_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(record_module, "CAPACITY", 16)
    monkeypatch.setattr(record_module, "EVENTS", 8)
    model = network()
    with sn.monitor(model, every=2, out=tmp_path) as watching:
        for round in range(100):
            train(model, 5)
            watching.note("round", str(round))
            assert len(watching.record.samples) <= 17
    kept = seen(watching)
    assert kept == [1, *range(64, 500, 64), 500]
    assert len(told(watching, "round")) <= 8
    lines = (tmp_path / "monitor.jsonl").read_text().count("sample")
    assert lines < 60, "of 250 samples: the log follows the resolution of the record"


def test_the_log_is_the_record(tmp_path: Path) -> None:
    model = network()
    with sn.monitor(model, every=4, out=tmp_path) as watching:
        train(model, 30)
        model.state_dict()
        running = Record.read(tmp_path / "monitor.jsonl")
        assert running.status == "running"
    record, live = Record.read(tmp_path / "monitor.jsonl"), watching.record
    assert (record.status, record.updates, record.every) == ("finished", 30, 4)
    assert record.layers == live.layers
    assert record.events == live.events
    assert [sample.update for sample in record.samples] == seen(watching)
    for ours, theirs in zip(record.samples, live.samples):
        assert ours.scalars() == pytest.approx(theirs.scalars(), rel=1e-3)


def test_a_log_that_ends_in_the_middle_of_a_line(tmp_path: Path) -> None:
    model = network()
    with sn.monitor(model, every=4, out=tmp_path):
        train(model, 30)
    log = tmp_path / "monitor.jsonl"
    text = log.read_text()
    log.write_text(text[: text.rindex('"type":"end"') - 40])
    record = Record.read(log)
    assert record.status == "running"
    assert record.samples[-1].update == 28


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not JSON\n",
        "[1]\n",
        '{"type":"other"}\n',
        '{"type":"monitor","version":1}\n',
        '{"type":"monitor","version":99}\n',
    ],
)
def test_a_file_that_is_no_log(text: str, tmp_path: Path) -> None:
    log = tmp_path / "monitor.jsonl"
    log.write_text(text + "\n")
    with pytest.raises(ValueError, match=r"monitor\.jsonl"):
        Record.read(log)


def test_going_on_from_a_checkpoint(tmp_path: Path) -> None:
    model = network()
    with sn.monitor(model, every=5, out=tmp_path):
        train(model, 23)
    watching = sn.monitor(model, every=5, out=tmp_path)
    watching.start(update=17)
    assert seen(watching) == [1, 5, 10, 15]
    train(model, 10)
    watching.stop()
    assert seen(watching) == [1, 5, 10, 15, 20, 25, 27]
    again = Record.read(tmp_path / "monitor.jsonl")
    assert [sample.update for sample in again.samples] == [1, 5, 10, 15, 20, 25, 27]
    seconds = [sample.seconds for sample in again.samples]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("change", ["every", "layers"])
def test_a_log_of_something_else_is_replaced(change: str, tmp_path: Path) -> None:
    with sn.monitor(network(), every=5, out=tmp_path) as watching:
        train(watching.model, 20)
    model = network()[:2] if change == "layers" else network()
    watching = sn.monitor(model, every=4 if change == "every" else 5, out=tmp_path).start(update=10)
    assert seen(watching) == []
    watching.stop()


def test_an_exception_is_the_end_of_the_record(tmp_path: Path) -> None:
    def interrupted() -> None:
        with sn.monitor(model := network(), every=4, out=tmp_path):
            train(model, 5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert Record.read(tmp_path / "monitor.jsonl").status == "stopped by KeyboardInterrupt"


# What goes wrong outside


def test_a_disk_that_fails_ends_the_writing_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    model = network()
    watching = sn.monitor(model, every=2, out=tmp_path).start()
    train(model, 4)
    monkeypatch.setattr("streamnorm.insight.page.write", fail)
    assert watching._run is not None
    monkeypatch.setattr(watching._run._output, "_page_due", 0.0)
    with pytest.warns(RuntimeWarning, match="writes no more .* No space left"):
        watching._run.evaluate()
    assert seen(watching) == [1, 2, 4]
    train(model, 4)
    watching.stop()
    assert seen(watching) == [1, 2, 4, 6, 8]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    watching = sn.monitor(network(), out=tmp_path / "file")
    with pytest.raises(FileExistsError):
        watching.start()
    assert not watching.running


def test_sinks() -> None:
    samples: list[Sample] = []
    closed: list[bool] = []

    class Sink:
        def __call__(self, sample: Sample) -> None:
            samples.append(sample)

        def close(self) -> None:
            closed.append(True)

    model = network()
    with sn.monitor(model, every=3, sinks=[Sink(), lambda sample: None]):
        train(model, 10)
    assert [sample.update for sample in samples] == [1, 3, 6, 9, 10]
    assert closed == [True]
    scalars = samples[1].scalars()
    assert scalars["rate"] == 0.1
    assert scalars["samples/4"] == 2
    assert all(math.isfinite(value) for value in scalars.values())


def test_a_sink_that_fails_is_left_out() -> None:
    def offline(sample: Sample) -> None:
        raise ConnectionError("no network")

    samples: list[Sample] = []
    model = network()
    watching = sn.monitor(model, every=3, sinks=[offline, samples.append]).start()
    with pytest.warns(RuntimeWarning, match="hands no more samples to .*offline.*no network"):
        train(model, 10)
    watching.stop()
    assert len(samples) == 5


def test_a_sink_that_cannot_be_closed() -> None:
    class Sink:
        def __call__(self, sample: Sample) -> None:
            pass

        def close(self) -> None:
            raise ConnectionError("no network")

    model = network()
    watching = sn.monitor(model, every=3, sinks=[Sink()]).start()
    train(model, 10)
    with pytest.warns(RuntimeWarning, match="hands no more samples to .*no network"):
        watching.stop()
    assert watching.record.status == "finished"


def test_a_fault_of_the_monitor_does_not_end_the_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    model = network()
    monkeypatch.setattr("streamnorm.insight.readings.Reader.take", fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watching = sn.monitor(model, every=2, out=tmp_path).start()
        train(model, 3)
        watching.stop()
    assert Record.read(tmp_path / "monitor.jsonl").status == "stopped by ZeroDivisionError"
    warned = [str(each.message) for each in caught if each.category is RuntimeWarning]
    assert len(warned) == 1
    assert "stopped at weight update 1" in warned[0]
    assert not model[1].samples


@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore::DeprecationWarning:torch.*")  # torch.compile's own
def test_a_compiled_step() -> None:
    model = network()
    compiled: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]
    optimizer = Adam(model.parameters())
    with sn.monitor(compiled, every=2) as watching:
        train(compiled, 6, optimizer)
    assert seen(watching) == [1, 2, 4, 6]
    assert list(watching.record.samples[-1].layers) == ["1", "4"]
    assert watching.record.samples[-1].layers["1"].samples == 2
