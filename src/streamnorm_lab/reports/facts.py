"""Sentences and tables of the README and the documentation that results decide, written into their pages.

A page marks the place of each: between ``<!-- computed: NAME -->`` and ``<!-- /computed -->`` stands what the function
of that name in ``FACTS`` makes of the results. ``make reports`` writes them all, and a test compares them.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import streamnorm
from streamnorm_lab.analysis.claims import FALSE, MIXED, OPEN, PARTLY
from streamnorm_lab.analysis.folders import open_results
from streamnorm_lab.analysis.headline import plain
from streamnorm_lab.analysis.results import CONFIG, Cell, Results
from streamnorm_lab.common.errors import UserError
from streamnorm_lab.common.files import write_text
from streamnorm_lab.common.setting import Setting
from streamnorm_lab.reports.overview import in_short, load_overview
from streamnorm_lab.reports.tables import difference_text, score_text

OURS = "streaming-l1"
MARKED = re.compile(r"(<!-- computed: (?P<name>[a-z-]+) -->\n).*?(<!-- /computed -->)", re.S)


@cache
def results_of(folder: Path) -> Results:
    """The results of a folder, read once."""
    return open_results(folder)


def newest(root: Path, name: str, *methods: str) -> Path:
    """The folder ``name``, or ``name-VERSION``, of the latest version of the layers with results of all ``methods``."""
    named = re.compile(rf"{re.escape(name)}(-\d+\.\d+)?")
    folders = [path.parent for path in sorted(root.glob(f"*/{CONFIG}")) if named.fullmatch(path.parent.name)]
    complete = [folder for folder in folders if set(methods) <= {method.name for method in results_of(folder).methods}]
    return max(complete, key=lambda folder: [int(part) for part in results_of(folder).version.split(".")])


def page_with(text: str, root: Path) -> str:
    """A page's text with every marked place written from the results below ``root``.

    Raises:
        UserError: a mark names nothing that is computed.
    """

    def written(match: re.Match[str]) -> str:
        if match["name"] not in FACTS:
            raise UserError(f"{match['name']!r} is not computed: one of {', '.join(FACTS)}")
        return f"{match[1]}{FACTS[match['name']](root)}\n{match[3]}"

    return MARKED.sub(written, text)


def marked_pages(home: Path) -> list[Path]:
    """The pages of a checkout that have a marked place."""
    pages = [home / "README.md", *sorted((home / "docs").glob("*.md"))]
    return [page for page in pages if MARKED.search(page.read_text(encoding="utf-8"))]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


SMALL_BATCHES = (("online-fc-cifar10", "layer", "fully connected"), ("conv-cifar10-20000", "group", "convolutional"))
SIZES = ("32x1", "2x1", "1x1")


def of_small_batches(root: Path) -> list[tuple[Results, str]]:
    """The results that picture and table of small mini-batches show, and the kind of each network."""
    return [(results_of(newest(root, name, "batch", other, OURS)), kind) for name, other, kind in SMALL_BATCHES]


def picture_words(root: Path) -> str:
    """The picture of small mini-batches and of adaptation in words, for those who do not see it."""
    parts = []
    for results, kind in of_small_batches(root):
        values = [f"{label} {_sizes(results, name)}" for name, label in (("batch", "Batch"), (OURS, "Streaming"))]
        parts.append(f"{kind} network: {' and '.join(values)} with 32, two and one images in a mini-batch")
    return f"Test accuracy on CIFAR-10, {'; '.join(parts)}. {adaptation_sentence(root)}"


def picture(root: Path) -> str:
    """The picture of the README, which on a narrow screen is another one."""
    words = picture_words(root)
    wide, narrow = (f"docs/figures/{name}.svg" for name in ("evidence", "evidence-narrow"))
    return (
        f'<picture>\n  <source media="(max-width: 640px)" srcset="{narrow}">\n'
        f'  <img src="{wide}" alt="{words}">\n</picture>'
    )


def picture_of_site(root: Path) -> str:
    """The same for the documentation, whose style sheet shows one of the two."""
    return f"![{picture_words(root)}](figures/evidence.svg){{.on-wide}}\n![](figures/evidence-narrow.svg){{.on-narrow}}"


def _sizes(results: Results, method: str) -> str:
    cells = [results.cells[method, Setting.parse(size)] for size in SIZES]
    return ", ".join("not at all" if cell.mean is None else _value(results, cell) for cell in cells)


def small_batches(root: Path) -> str:
    """Test accuracy with mini-batches of 32, two and one, by normalization, in two kinds of networks."""
    names = {
        "batch": "`nn.BatchNorm`",
        "layer": "`nn.LayerNorm`",
        "group": "`nn.GroupNorm`",
        OURS: "`sn.StreamingNorm`",
    }
    rows, saw = [], []
    for results, kind in of_small_batches(root):
        saw.append(f"{results.config['data']['train']:,} images in the {kind} network (streamnorm {results.version})")
        for size in SIZES:
            words = f"{kind}, {Setting.parse(size).samples}"
            rows.append([words, *(_accuracy(results, name, size) for name in names)])
    words = (
        "Test accuracy on CIFAR-10 in percent, each method at its best learning rate, mean ± 95% interval over seeds, "
        f"after {_listed(saw)}:"
    )
    table = _table(["network, images in a mini-batch", *names.values()], rows)
    versions = {results.version for results, _ in of_small_batches(root)}
    return "\n\n".join([words, table, *_older(versions, "docs/")])


def _older(versions: set[str], docs: str = "") -> list[str]:
    """A note where layers were of an earlier version than this one, whose defaults differ."""
    now = ".".join(streamnorm.__version__.split(".")[:2])
    if not (older := sorted(versions - {now})):
        return []
    how = f"[how]({docs}experiments.md#versions)"
    return [f"The defaults of streamnorm {now} differ from those of {_listed(older)} ({how})."]


def _made_with(versions: set[str]) -> str:
    return " ".join([f"The layers were those of streamnorm {_listed(sorted(versions))}.", *_older(versions)])


def _accuracy(results: Results, method: str, setting: str) -> str:
    cell = results.cells.get((method, Setting.parse(setting)))
    if cell is None:
        return "–"
    return "cannot train" if cell.mean is None and cell.reason else score_text(results.experiment.score, cell)


def convolutions(root: Path) -> str:
    """Test accuracy of a convolutional network on 20,000 images, by setting, and the rates that were chosen."""
    results = results_of(root / "conv-cifar10-20000-0.3")
    names = {"batch": "Batch", "batch-recalibrated": "Recalibrated", "group": "Group", OURS: "Streaming"}
    rows = []
    for setting in results.settings:
        cells = {name: results.cells[name, setting] for name in names}
        rates = " / ".join(f"{cells[name].rate:g}" for name in ("batch", "group", OURS))
        rows.append([setting.label, *(_accuracy(results, name, str(setting)) for name in names), rates])
    seeds = len({run.run["seed"] for run in results.logs if run.run["stage"] == "final"})
    return (
        f"Test accuracy on CIFAR-10 in percent after {results.config['data']['train']:,} images, streamnorm "
        f"{results.version}, {seeds} seeds, mean ± 95% interval, each at the rate that was best on 5,000 images "
        "(of Batch / Group / streaming). S×U is S images in a mini-batch and U mini-batches in an update:\n\n"
        + "\n\n".join([_table(["S×U", *names.values(), "rates"], rows), *_older({results.version})])
    )


def finetuning(root: Path) -> str:
    """Test accuracy of a small network that goes on with other digits, by what becomes of Batch Normalization."""
    results = results_of(root / "finetune-digits")
    images = results.config["data"]["train"]
    return _by_method(
        results,
        "Test accuracy in percent, {}: a small network, trained on the digits 0 to 4, goes on with "
        f"{images:,} images of 5 to 9 in one pass:",
    )


def pretrained(root: Path) -> str:
    """Test accuracy of a network with weights of ImageNet that goes on with CIFAR-10."""
    results = results_of(root / "finetune-cifar10")
    data, size = results.config["data"], results.config["options"]["size"]
    return _by_method(
        results,
        f"Test accuracy in percent on {data['test']:,} images, {{}}: EfficientNet-Lite0 with weights of ImageNet and "
        f"a new head goes on with {data['train']:,} images of CIFAR-10, scaled to {size}×{size}, in one pass:",
    )


def residual(root: Path) -> str:
    """Test accuracy of a residual network that is trained as usual, with large and with small mini-batches."""
    results = results_of(root / "resnet-cifar10")
    options = results.config["options"]
    return _by_method(
        results,
        f"Test accuracy on CIFAR-10 in percent, {{}}: ResNet-20 of width {options['width']}, "
        f"{results.config['data']['train']:,} images, {options['epochs']} passes, shifts and mirrors, a falling rate:",
    )


def _by_method(results: Results, words: str) -> str:
    """A table of all methods and settings, below a sentence that says which version and how many seeds."""
    settings = [str(setting) for setting in results.settings]
    rows = [[method.label, *(_accuracy(results, method.name, at) for at in settings)] for method in results.methods]
    head = ["method", *(setting.label for setting in results.settings)]
    seeds = len({run.run["seed"] for run in results.logs if run.run["stage"] == "final"})
    sample = f"{seeds} seeds, mean ± 95% interval" if seeds > 1 else "one seed"
    about = f"streamnorm {results.version}, {sample}"
    return "\n\n".join([words.format(about), _table(head, rows), *_older({results.version})])


def stability(root: Path) -> str:
    """The best learning rate of each method and setting, and how many times as large the largest is that trains."""
    results = results_of(newest(root, "conv-cifar10", "group", OURS))
    rows = [
        [method.label, *(_rates(results, results.cells[method.name, setting]) for setting in results.settings)]
        for method in results.methods
        if method.trained_as == method.name
    ]
    return (
        f"Best rate, and the largest of those tried that still trains as a multiple of it; rates up to "
        f"{results.grid[-1]:g}, in steps of about three, {results.config['data']['train']:,} images, streamnorm "
        f"{results.version}:\n\n" + _table(["method", *(setting.label for setting in results.settings)], rows)
    )


def _rates(results: Results, cell: Cell) -> str:
    largest = results.largest_rate(cell)
    if largest is None or cell.rate is None or abs(cell.tuning[cell.rate] - results.guessing) < 0.05:
        return "does not train"
    return f"{cell.rate:g}, {'≥ ' * (largest == results.grid[-1])}{round(largest / cell.rate):g}×"


SCANNERS = {"one": "one scanner", "many": "many scanners", "standardized": "many, standardized"}
"""The folders volumes-…, and the heads of their columns."""


def scanners(root: Path) -> str:
    """The Dice coefficient by normalization, where volumes differ in gain and offset and where they do not."""
    found = {name: results_of(root / f"volumes-{name}") for name in SCANNERS}
    columns = [(name, setting) for name, results in found.items() for setting in results.settings]
    rows = [
        [method.label, *(_accuracy(found[name], method.name, str(setting)) for name, setting in columns)]
        for method in found["many"].methods
    ]
    one = found["one"]
    seeds = len({run.run["seed"] for run in one.logs if run.run["stage"] == "final"})
    links = [f"[{words}](../results/volumes-{name}/)" for name, words in SCANNERS.items()]
    return (
        f"Dice coefficient in percent after {one.config['data']['train']:,} volumes, streamnorm {one.version}, {seeds} "
        f"seeds, mean ± 95% interval, each method at its best rate ({_listed(links)}). S×U is S volumes per mini-batch "
        "and U mini-batches per update:\n\n"
        + _table(["method", *(f"{SCANNERS[name]}, {setting.label}" for name, setting in columns)], rows)
    )


SITUATIONS = (
    ("Large mini-batches, fully connected", "online-fc-cifar10", "128x1"),
    ("Mini-batches of 2, fully connected", "online-fc-cifar10", "2x1"),
    ("One sample at a time, fully connected", "online-fc-cifar10", "1x1"),
    ("Mini-batches of 32, convolutional", "conv-cifar10-20000", "32x1"),
    ("Mini-batches of 2, convolutional", "conv-cifar10-20000", "2x1"),
    ("One sample at a time, convolutional", "conv-cifar10-20000", "1x1"),
    ("Mini-batches of 32, recurrent convolutional", "recurrent-conv-cifar10", "32x1"),
    ("One sample at a time, recurrent convolutional", "recurrent-conv-cifar10", "1x1"),
    ("A pretrained network fine-tuned, mini-batches of 32", "finetune-cifar10", "32x1"),
    ("A pretrained network fine-tuned, one image at a time", "finetune-cifar10", "1x1"),
    ("A small network fine-tuned on other digits, mini-batches of 32", "finetune-digits", "32x1"),
    ("A small network fine-tuned on other digits, one image at a time", "finetune-digits", "1x1"),
    ("Volumes of one scanner, two at a time (Dice)", "volumes-one", "2x1"),
    ("Volumes of one scanner, one at a time (Dice)", "volumes-one", "1x1"),
    ("Volumes of many scanners, two at a time (Dice)", "volumes-many", "2x1"),
    ("Volumes of many scanners, one at a time (Dice)", "volumes-many", "1x1"),
    ("32 sequences, GRU on text", "char-gru-shakespeare", "32x1"),
    ("One sequence at a time, GRU on text", "char-gru-shakespeare", "1x4"),
    ("32 sequences, LSTM on text", "char-lstm-shakespeare", "32x1"),
)


def situations(root: Path) -> str:
    """Streaming Normalization beside the best of the others, where it was measured."""
    rows = []
    for words, name, size in SITUATIONS:
        folder, setting = newest(root, name, "batch", OURS), Setting.parse(size)
        results = results_of(folder)
        ours = results.cells[OURS, setting]
        others = [cell for cell in _best_first(results, setting) if not cell.method.name.startswith("streaming")]
        difference = results.difference(OURS, others[0].method.name, setting)
        score = results.experiment.score
        reading = "no result" if difference is None else score.outcome(difference).split()[0]
        rows.append(
            [
                f"[{words}](../results/{folder.name}/)",
                _value(results, ours),
                f"{plain(others[0].method)}, {_value(results, others[0])}",
                f"{difference_text(score, difference)} {score.unit}: {'not clear' if reading == 'not' else reading}",
            ]
        )
    versions = {results_of(newest(root, name, "batch", OURS)).version for _, name, _ in SITUATIONS}
    head = ["situation", "Streaming L1", "best of the others", "difference, paired by seed, and reading"]
    return f"{_table(head, rows)}\n\n{_made_with(versions)}"


def _best_first(results: Results, setting: Setting) -> list[Cell]:
    cells = [cell for (_, at), cell in results.cells.items() if at == setting and cell.mean is not None]
    sign = 1 if results.experiment.score.lower_is_better else -1
    return sorted(cells, key=lambda cell: sign * (cell.mean.mean if cell.mean else 0.0))


def _value(results: Results, cell: Cell) -> str:
    return "no result" if cell.mean is None else results.experiment.score.value(cell.mean.mean)


def one_at_a_time(root: Path) -> str:
    """Convolutional networks one sample at a time, beside themselves with mini-batches."""
    results = results_of(newest(root, "conv-cifar10-20000", OURS))
    large, small = (results.cells[OURS, Setting.parse(size)] for size in ("32x1", "1x1"))
    return (
        f"In a small convolutional network on 20,000 images of CIFAR-10, `sn.StreamingNorm2d` reaches "
        f"{_value(results, large)} with mini-batches of 32 and {_value(results, small)} with one image at a time, each "
        f"at its best learning rate, which is {large.rate:g} and {small.rate:g} (streamnorm {results.version})."
    )


def adaptation(root: Path) -> str:
    """Accuracies on images that change, in each way of evaluating."""
    results = results_of(newest(root, "adapt-cifar10", OURS))
    section = results.section
    assert section is not None
    table = _table([name.lower() for name in section.head], section.rows)
    return f"{table}\n\n{_made_with({results.version})}"


def adaptation_streams(root: Path) -> str:
    """The same for streams of another order and for entropy minimization, on digits."""
    results = results_of(newest(root, "adapt-digits", OURS))
    section = results.section
    assert section is not None
    kept = [0, *range(2, len(section.head))]  # all are trained at one setting
    head, *rows = ([row[i] for i in kept] for row in (section.head, *section.rows))
    return (
        f"Test accuracy in percent on {results.config['data']['test']:,} images, trained at "
        f"{results.settings[0].label}, mean ± 95% interval, streamnorm {results.version}:\n\n"
        + _table([name.lower() for name in head], rows)
    )


def adaptation_sentence(root: Path) -> str:
    """The accuracy that adapting gave back, in a sentence."""
    section = results_of(newest(root, "adapt-cifar10", OURS)).section
    assert section is not None
    return section.headline


def watching(root: Path) -> str:
    """The share of a training step that a monitor takes, by network, and its target."""
    folder = root / "bench-monitor"
    facts = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    rows = (
        [
            row["network"],
            row["layers"],
            f"{1e3 * float(row['step_seconds']):.2f} ms",
            f"{float(row['inside']):.2%}",
            "met" if row["met"] == "True" else "missed",
            f"{float(row['beside']):+.1%} ({float(row['beside_q1']):+.1%} to {float(row['beside_q3']):+.1%})",
        ]
        for row in _csv(folder / "costs.csv")
    )
    head = ["network", "layers", "step", "inside", "target of 1%", "beside (quartiles)"]
    return (
        f"At `every=50`, one thread, load average before the start {facts['load_before']} "
        f"([bench-monitor](../results/bench-monitor/tables.txt)):\n\n{_table(head, rows)}"
    )


def targets(root: Path) -> str:
    """The targets of time and memory that the benchmark meets and misses, and the nearest of those met."""
    aims = list(_aims(root / "bench"))
    layers = [aim for aim in aims if aim[0] in ("layers", "one-pass")]
    nearest = sorted((aim for aim in layers if aim[3] <= aim[4]), key=lambda aim: aim[3] / aim[4])[-2:][::-1]
    met, missed = sum(aim[3] <= aim[4] for aim in layers), [aim for aim in aims if aim[3] > aim[4]]
    near = " and ".join(f"{what} at {ratio:.2f} of at most {bound:g}" for _, what, _, ratio, bound in nearest)
    rows = [[what, of, f"{ratio:.2f}", f"{bound:g}"] for _, what, of, ratio, bound in missed]
    return (
        f"In [bench](../results/bench/tables.txt) ({_machine(root / 'bench')}) {met} of the {len(layers)} targets of "
        f"`layers` and `one-pass` are met; the nearest of these are {near}. Over all suites {len(missed)} targets are "
        "missed:\n\n" + _table(["case", "of", "ratio", "target"], rows)
    )


def call_floor(root: Path) -> str:
    """The time of small layers beside that of an autograd function that computes nothing."""
    found = {
        (row["case"], row["ours"]): float(row["ratio"])
        for row in _csv(root / "bench" / "times.csv")
        if (row["rival"], row["part"], row["threads"]) == ("no arithmetic", "together", "1")
    }
    cases = dict.fromkeys(case for case, _ in found)
    rows = [[f"`{case}`", *(f"{found[case, name]:.2f}" for name in ("LayerNorm", "streaming L1"))] for case in cases]
    return _table(["case", "LayerNorm", "streaming L1"], rows)


def other_machines(root: Path) -> str:
    """The targets met in the other benchmarks of whole steps, by folder."""
    lines = []
    for name, words in OTHER_BENCHMARKS:
        aims = [aim for aim in _aims(root / name) if aim[2] == "time"]
        met = sum(ratio <= bound for *_, ratio, bound in aims)
        lines.append(
            f"- [{name}](../results/{name}/tables.txt), {words} ({_machine(root / name)}): {met} of {len(aims)} "
            "targets of time are met."
        )
    return "\n".join(lines)


OTHER_BENCHMARKS = (
    ("bench-kept", "with an allocator that keeps freed memory"),
    ("bench-avx2", "that too, and both sides limited to AVX2"),
    ("bench-intel", "on another processor, `layers` and `one-pass`"),
)


def _machine(folder: Path) -> str:
    """The version and the processor of a benchmark."""
    found = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    return f"streamnorm {found['streamnorm']}, {found['processor']}"


KEPT = (
    ("bench", "kept by the engine (default)"),
    ("bench-keep-0", "kept by nobody (`STREAMNORM_KEEP_MIB=0`)"),
    ("bench-kept", "kept by the allocator, for all layers"),
)
"""The keeper of the memory of freed outputs, by benchmark."""


def kept_memory(root: Path) -> str:
    """Ratios of large inputs, by who keeps the memory of freed outputs, as far as it was measured."""
    columns = [(name, words) for name, words in KEPT if (root / name).is_dir()]
    found = {
        (name, row["case"], row["threads"], row["rival"]): float(row["ratio"])
        for name, _ in columns
        for row in _csv(root / name / "times.csv")
        if row["suite"] == "layers" and row["part"] == "together" and row["ours"] == "streaming L1"
    }
    large = list(dict.fromkeys(key[1:3] for key in found if key[3] == "floor"))
    rows = []
    for case, threads in large:
        for rival in ("BatchNorm", "GroupNorm"):
            ratios = (found.get((name, case, threads, rival)) for name, _ in columns)
            rows.append([case, threads, rival, *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios)])
    made = {_machine(root / name) for name, _ in columns}
    head = ["case", "threads", "against", *(f"[{words}](../results/{name}/tables.txt)" for name, words in columns)]
    return f"Streaming L1, forward and backward ({_listed(sorted(made))}):\n\n{_table(head, rows)}"


def resident_memory(root: Path) -> str:
    """The memory of processes that train ResNet-18, with and without kept outputs."""
    folder = root / "bench-resident"
    made = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    rows = [
        [
            f"`nn.{row['norm']}2d`" if row["norm"] == "BatchNorm" else "`sn.StreamingNorm2d`",
            row["kept_mib"] or "–",
            *(f"{float(row[part]):.0f}" for part in ("before", "peak", "after", "waiting")),
        ]
        for row in _csv(folder / "memory.csv")
    ]
    head = ["normalization", "`STREAMNORM_KEEP_MIB`", "before training", "peak", "after", "of which waits"]
    return (
        f"MiB that a process holds which trains ResNet-18 on mini-batches of {made['batch']} images of "
        f"{made['image']}×{made['image']} ({_machine(folder)}):\n\n{_table(head, rows)}"
    )


def inference(root: Path) -> str:
    """The time of folded networks beside networks with Group Normalization; nothing where it was not measured."""
    folder = root / "bench-inference"
    if not (folder / "times.csv").is_file():
        return ""
    parts: dict[str, list[str]] = {}
    for row in _csv(folder / "times.csv"):
        if (row["suite"], row["part"], row["threads"]) == ("inference", "together", "1"):
            where = "in onnxruntime" if row["rival"].endswith("onnxruntime") else "in PyTorch"
            parts.setdefault(row["case"].split(",")[0], []).append(f"{float(row['ratio']):.2f} {where}")
    found = "; ".join(f"{name} {_listed(ratios)}" for name, ratios in parts.items())
    return (
        "A folded network computes what the convolutions compute, and nothing for the normalization. Its time "
        f"for one image, as a ratio to that of the same network with `nn.GroupNorm`: {found} "
        f"(one thread, {_machine(folder)})."
    )


def moments_timed(root: Path) -> str:
    """In how many cases L1 is faster than L2, or slower."""
    rows = [
        row for row in _csv(root / "bench" / "times.csv")
        if row["part"] == "together" and row["ours"].endswith(" L1") and row["rival"].endswith(" L2")
    ]  # fmt: skip
    faster, slower = (sum(float(row["ratio_q3"]) < 1 for row in rows), sum(float(row["ratio_q1"]) > 1 for row in rows))
    return (
        f"In [bench](../results/bench/tables.txt) L1 is faster in {faster} of {len(rows)} cases and slower in "
        f"{slower}; in the other {len(rows) - faster - slower} the quartiles include 1."
    )


def _aims(folder: Path) -> Iterator[tuple[str, str, str, float, float]]:
    """Suite, what was measured, time or memory, ratio and bound, of each target."""
    for row in _csv(folder / "times.csv"):
        if row["target"] and row["part"] == "together":
            what = f"`{row['case']}` {row['ours']} on {row['threads']} thread{'s' * (row['threads'] != '1')}"
            what = row["case"] if row["suite"] == "recurrent" else what
            what += "" if row["stock"] == "True" else f" against {row['rival']}"
            yield row["suite"], what, "time", float(row["ratio"]), float(row["target"])
    for row in _csv(folder / "memory.csv"):
        for kind in ("saved", "peak") if row["target"] else ():
            yield row["suite"], row["case"], f"{kind} memory", float(row[f"{kind}_ratio"]), float(row["target"])


def _csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def gains(root: Path) -> str:
    """Test loss of recurrent layers whose gains start at 1 and at 0.1."""
    results = results_of(root / "char-gru-gain")
    names = [
        method.name for method in results.methods if f"{method.name},gain=0.1" in {m.name for m in results.methods}
    ]
    head = ["method", *(f"{s.label}, gain {gain}" for s in results.settings for gain in ("1", "0.1"))]
    return _table(head, (
        [name, *(score_text(results.experiment.score, results.cells[method, s])
                 for s in results.settings for method in (name, f"{name},gain=0.1"))]
        for name in names
    ))  # fmt: skip


def claims(root: Path) -> str:
    """The number of claims with each verdict, and those that do not hold everywhere."""
    overview = load_overview(root)
    blocks = [in_short(overview)]
    titles = {FALSE: "do not hold", MIXED: "hold in some results and not in others", OPEN: "are open"}
    for verdict, words in titles.items():
        texts = [standing.claim.text for standing in overview.standings if standing.verdict == verdict]
        if texts:
            blocks.append(f"These {words}:\n\n" + "\n".join(f"- {text}" for text in texts))
    partly = sum(standing.verdict == PARTLY for standing in overview.standings)
    return "\n\n".join(blocks) + (
        f"\n\n{partly} more hold in some results and are open in the others." if partly else ""
    )


FACTS: dict[str, Callable[[Path], str]] = {
    "picture": picture,
    "picture-of-site": picture_of_site,
    "small-batches": small_batches,
    "convolutions": convolutions,
    "finetuning": finetuning,
    "pretrained": pretrained,
    "residual": residual,
    "stability": stability,
    "scanners": scanners,
    "situations": situations,
    "one-at-a-time": one_at_a_time,
    "adaptation": adaptation,
    "adaptation-streams": adaptation_streams,
    "adaptation-sentence": adaptation_sentence,
    "targets": targets,
    "call-floor": call_floor,
    "watching": watching,
    "other-machines": other_machines,
    "kept-memory": kept_memory,
    "resident-memory": resident_memory,
    "inference": inference,
    "moments-timed": moments_timed,
    "gains": gains,
    "claims": claims,
}


def write_pages(home: Path) -> list[Path]:
    """Write every marked place of a checkout's pages; the pages that changed."""
    changed = []
    for page in marked_pages(home):
        before = page.read_text(encoding="utf-8")
        after = page_with(before, home / "results")
        if after != before:
            write_text(page, after)
            changed.append(page)
    return changed


if __name__ == "__main__":
    for page in write_pages(Path(sys.argv[1] if len(sys.argv) > 1 else ".")):
        print(f"{page} was written")
