"""The command line as a newcomer meets it: help, and one clear line for each mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import streamnorm
from streamnorm_lab.commands.main import COMMANDS, main


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        code = main(words)
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(capsys, words):
    code, out, _ = answer(capsys, *words)
    assert code == 0
    assert all(name in out for name in COMMANDS)
    assert "streamnorm run online-fc" in out


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_version(capsys, word):
    assert answer(capsys, word) == (0, f"streamnorm {streamnorm.__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(capsys, command):
    code, out, _ = answer(capsys, command, "--help")
    assert code == 0
    assert f"usage: streamnorm {command}" in out


@pytest.mark.parametrize("name", ["online-fc", "figure5"])
def test_experiment_explains_its_options(capsys, name):
    code, out, _ = answer(capsys, "run", name, "--help")
    assert code == 0
    for option in ("data", "out", "methods", "settings", "rates", "seeds", "epochs", "limit", "width", "depth"):
        assert f"--{option} " in out
    assert "(default: None)" not in out


def test_list_names_experiments_and_their_figures(capsys):
    code, out, _ = answer(capsys, "list")
    assert code == 0
    assert "online-fc" in out
    assert "figure 5" in out


def test_info_names_versions_and_engines(capsys):
    code, out, _ = answer(capsys, "info")
    assert code == 0
    assert "engine torch" in out
    assert "processor" in out


def test_data_describes_what_there_is(capsys):
    code, out, _ = answer(capsys, "data")
    assert code == 0
    assert "1,297 training and 500 test" in out.replace("\n", " ")


MISTAKES = [
    (["fly"], "unknown command 'fly': choose from run"),
    (["rnu"], "unknown command 'rnu' (did you mean 'run'?): choose from run"),
    (["run", "online"], "unknown experiment 'online' (did you mean 'online-fc'?): choose from online-fc"),
    (["run", "table2"], "unknown experiment 'table2' (did you mean 'table1'?): choose from online-fc"),
    (["run", "shoe-size"], "char-lstm, resnet, adapt, finetune, volumes, table1"),
    (
        ["run", "online-fc", "--methods", "layer", "bach"],
        "unknown method 'bach' (did you mean 'batch'?): choose from none, batch, batch-renorm",
    ),
    (
        ["run", "online-fc", "--methods", "streaming-l1,windw=3"],
        "method 'streaming-l1,windw=3': unknown option 'windw' (did you mean 'window'?): choose from eps, p, center",
    ),
    (["run", "char-gru", "--methods", "layer,gian=3"], "unknown option 'gian' (did you mean 'gain'?)"),
    (["run", "online-fc", "--methods", "layer,eps=3"], "method 'layer,eps=3': it has no options"),
    (["run", "online-fc", "--methods", "streaming-l1,window=3,window=4"], "an option is named twice"),
    (["run", "online-fc", "--methods", "group,groups=many"], "a value of another kind is needed"),
    (["run", "online-fc", "--methods", "rms,eps=nan"], "with these options its output is not finite"),
    (["run", "online-fc", "--methods"], "--methods: name at least one"),
    (["run", "online-fc", "--methods", "layer", "layer"], "layer is named twice"),
    (["run", "online-fc", "--settings", "2by16"], "setting '2by16' is not of the form SxU"),
    (["run", "online-fc", "--settings", "9999x1"], "more than the 800 training images"),
    (["run", "online-fc", "--rates", "0"], "--rates 0: must be above 0"),
    (["run", "online-fc", "--rates", "nan"], "--rates nan: must be a finite number"),
    (["run", "online-fc", "--rates", "1e400"], "--rates inf: must be a finite number"),
    (["run", "online-fc", "--checkpoint-every", "nan"], "--checkpoint-every nan: must be a finite number"),
    (["run", "online-fc", "--settings", "1x9999999999"], "setting '1x9999999999' is not of the form SxU"),
    (["run", "char-gru", "--settings", "1x99999999"], "more than 100,000,000 are not drawn"),
    (["run", "adapt", "--window", "inf"], "--window inf: must be a finite number"),
    (["run", "resnet", "--weight-decay", "inf"], "--weight-decay inf: must be a finite number"),
    (["run", "online-fc", "--out", "~nobody-of-this-name/x"], "~nobody-of-this-name/x: no such user's home folder"),
    (["bench", "--only", "layer"], "--only: unknown suite 'layer' (did you mean 'layers'?)"),
    (["run", "online-fc", "--seeds", "0"], "--seeds 0: must be at least 1"),
    (["run", "online-fc", "--width", "0"], "--width 0: must be at least 1"),
    (["run", "online-fc", "--momentum", "1"], "--momentum 1: must be at least 0 and below 1"),
    (["run", "online-fc", "--limit", "5000"], "it has 1297 training images"),
    (["run", "online-fc", "--data", "nowhere"], "--data nowhere: no such folder"),
    (["report", "nowhere"], "nowhere: no such folder"),
    (["report", "."], "it holds no experiment.json"),
    (["report", "a", "b"], "a: no such folder"),
    (["list", "all"], "unexpected 'all'"),
    (["data", "nowhere"], "nowhere: no such folder"),
]


@pytest.mark.parametrize(
    ("words", "message"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_is_one_line_and_leaves_nothing(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = answer(capsys, *words)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert err.startswith("streamnorm: ")
    assert not out
    assert not list(tmp_path.iterdir())


def test_an_option_of_the_wrong_kind_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = answer(capsys, "run", "online-fc", "--seeds", "three")
    assert code == 2
    assert "--seeds" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["/proc/nothing", "taken", "taken/below"])
@pytest.mark.parametrize(
    "words", [("run", "online-fc", "--out"), ("bench", "--quick", "--out"), ("data", "--download")]
)
def test_an_output_folder_that_cannot_be(capsys, tmp_path, monkeypatch, words, folder):
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("a file")
    code, _, err = answer(capsys, *words, folder)
    assert code == 2
    assert err.startswith("streamnorm: ")
    assert folder in err
    assert len(err.splitlines()) == 1
    if folder != "/proc/nothing":
        assert f"{words[-1]} {folder}: taken is a file; name a folder" in err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_text_that_never_ends(capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    code, _, err = answer(capsys, "run", "char-gru", "--data", str(tmp_path / "pipe"))
    assert code == 2
    assert "this is a device or a pipe" in err


@pytest.mark.parametrize(
    ("size", "message"), [("many", "WORLD_SIZE is 'many', no number of processes"), ("2", "do not find each other")]
)
def test_processes_that_torchrun_did_not_start(capsys, tmp_path, monkeypatch, size, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.delenv("RANK", raising=False)
    code, _, err = answer(capsys, "run", "online-fc")
    assert code == 2
    assert message in err
    assert "start the command by torchrun, or unset the variable" in err
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_report_on_a_full_disk_leaves_the_old_one(capsys, tmp_path):
    """The temporary file lies on a device without room."""
    from streamnorm_lab.common.files import write_text

    (tmp_path / "report.html").write_text("the old one")
    (tmp_path / ".report.html.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "report.html", "the new one")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "the old one"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_the_layers_imports_nothing_of_the_experiments():
    extras = {"tyro", "rich", "matplotlib", "pyarrow", "PIL", "sklearn", "scipy"}
    found = python(f"import sys, streamnorm; print({extras!r} & set(sys.modules))")
    assert found.stdout.strip() == "set()", found.stderr


@pytest.mark.parametrize("package", ["tyro", "rich", "matplotlib", "scipy"])
def test_a_missing_extra_is_named_in_one_line(package):
    found = python(
        f"import sys; sys.modules[{package!r}] = None\nfrom streamnorm_lab.commands.main import main\n"
        "sys.exit(main(['report', 'nowhere']))"
    )
    if package == "scipy":  # only needed once there are results
        assert "no such folder" in found.stderr
        return
    assert found.returncode == 2
    assert found.stderr.splitlines() == [
        f"streamnorm: this command needs the package '{package}': pip install \"streamnorm[experiments]\""
    ]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("STREAMNORM_ENGINE", "fast", "there is no engine 'fast'"), ("STREAMNORM_KEEP_MIB", "all", "got 'all'")],
)
def test_what_the_environment_says_wrongly_is_one_line(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    found = subprocess.run([sys.executable, "-m", "streamnorm_lab", "info"], capture_output=True, text=True)
    assert found.returncode == 2
    assert message in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_help_needs_no_extra():
    found = python(
        "import sys; sys.modules['tyro'] = None\n"
        "from streamnorm_lab.commands.main import main\nsys.exit(main(['--help']))"
    )
    assert found.returncode == 0
    assert "usage: streamnorm" in found.stdout


def test_a_reader_that_leaves_early_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "streamnorm", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait()
