"""What the README and the documentation show is true: their Python runs, their links lead somewhere."""

from __future__ import annotations

import json
import re
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from integrations import libraries, table

import streamnorm

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]

# A block of another library's may say what it needs in the line before it: <!-- needs: accelerate -->
BLOCK = re.compile(r"(?:^<!-- needs: (?P<needs>[\w, ]+) -->\n)?^```python\n(?P<code>.*?)^```$", re.M | re.S)
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"")


def examples(page: Path) -> list[tuple[list[str], str]]:
    """The Python blocks of a page: the libraries that each needs, and its code at its own line numbers."""
    text = page.read_text(encoding="utf-8")
    found = []
    for block in BLOCK.finditer(text):
        lines_before = "\n" * text.count("\n", 0, block.start("code"))
        found.append((re.findall(r"\w+", block["needs"] or ""), lines_before + block["code"]))
    return found


@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore::DeprecationWarning:torch.*")  # torch.compile's own
@pytest.mark.parametrize(
    "page", [page for page in PAGES if examples(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after the other, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for needs, code in examples(page):
        if all(find_spec(library) for library in needs):
            with warnings.catch_warnings():
                if needs:  # the warnings of other libraries are theirs to repair
                    warnings.simplefilter("ignore")
                    libraries.prepare()
                exec(compile(code, page, "exec"), names)


def test_the_network_of_the_start_does_not_train_with_batch_normalization(tmp_path, monkeypatch) -> None:
    """docs/start.md: below 30% with nn.BatchNorm2d in the place of sn.StreamingNorm2d."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for _, code in examples(ROOT / "docs" / "start.md"):
        code = code.replace("sn.StreamingNorm2d", "nn.BatchNorm2d").replace("assert accuracy > 0.7", "")
        exec(compile(code, "start.md", "exec"), names)
        if "accuracy" in names:
            break
    assert names["accuracy"] < 0.3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [link[1] or link[2] for link in LINK.finditer(prose)]
    files = [target.split("#")[0] for target in targets if not re.match(r"https?:|mailto:|#", target)]
    missing = [name for name in files if not (page.parent / name).exists()]
    assert not missing


def test_every_public_name_is_documented() -> None:
    documented = set(re.findall(r"\b\w+\b", (ROOT / "docs" / "api.md").read_text(encoding="utf-8")))
    assert not {name for name in streamnorm.__all__ if not name.startswith("_")} - documented


def test_the_compatibility_table_is_that_of_the_record() -> None:
    page = table.PAGE.read_text(encoding="utf-8")
    record = json.loads(table.RECORD.read_text(encoding="utf-8"))
    assert table.page_with(table.text(record), page) == page, "write it with: make compatibility"
