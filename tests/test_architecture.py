"""Imports run one way, from the laboratory down to the formulas, and there is no circle.

Read off the source, imports inside functions included. What is only imported for type checkers counts as well: it is
knowledge of what lies above, too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCE.rglob("*.py")
}

ROOMS = {
    "core": "core",
    "ops": "ops",
    "training": "training",
    "layers": "layers",
    "recurrent": "recurrent",
    "above": "adaptation conversion distributed insight statistics __init__",
}
"""From the formulas up: the modules and packages of ``streamnorm`` in each room, which may import from those before."""

LABORATORY = (
    *("common", "logs", "data", "methods", "networks", "experiments", "analysis", "reports", "running", "bench"),
    *("commands", "__init__"),
)
"""The packages of ``streamnorm_lab``, above all of ``streamnorm``, likewise."""

PUBLIC = {"streamnorm", "streamnorm.ops", "streamnorm.ops.plain"}
"""What the laboratory may import: the public names, the switch between engines, and the reference to build on."""


def imports(name: str) -> Iterator[str]:
    """The modules of ours that a module imports."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found = (f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names)
            yield from (module for module in found if module in MODULES)


GRAPH = {name: set(imports(name)) - {name} for name in MODULES}
EDGES = {(name, found) for name, all_found in GRAPH.items() for found in all_found}
RANK = {f"streamnorm.{name}": rank for rank, names in enumerate(ROOMS.values()) for name in names.split()}
RANK |= {f"streamnorm_lab.{name}": len(ROOMS) + rank for rank, name in enumerate(LABORATORY)}
RANK |= {"streamnorm.__main__": len(RANK), "streamnorm_lab.__main__": len(RANK)}


def room(name: str) -> str:
    """The package or module, directly below ``streamnorm`` or ``streamnorm_lab``, that a module belongs to."""
    return ".".join([*name.split("."), "__init__"][:2])


def circle(graph: dict[str, set[str]]) -> str:
    """The modules of a circle, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " imports ".join(reversed(error.args[1]))
    return ""


def test_every_module_has_a_room():
    assert set(map(room, MODULES)) <= RANK.keys()


def test_imports_run_downwards():
    assert not [f"{a} imports {b}" for a, b in EDGES if RANK[room(b)] > RANK[room(a)]]


def test_there_is_no_circle():
    assert not circle(GRAPH)


def test_the_library_never_imports_the_laboratory():
    """But for ``python -m streamnorm``, which nothing imports."""
    assert {a for a, b in EDGES if a.split(".")[0] == "streamnorm" and b.split(".")[0] == "streamnorm_lab"} == {
        "streamnorm.__main__"
    }
    assert not [a for a, b in EDGES if b == "streamnorm.__main__"]


def test_the_laboratory_uses_public_names():
    ours = {(a, b) for a, b in EDGES if a.split(".")[0] == "streamnorm_lab" and b.split(".")[0] == "streamnorm"}
    assert {(a, b) for a, b in ours if b not in PUBLIC} == set()


SOURCES = SOURCE / "streamnorm" / "csrc"
"""The C++ sources, and the README that lists the files of each folder from below."""
FILES = {path.relative_to(SOURCES).as_posix(): path.read_text(encoding="utf-8") for path in SOURCES.glob("*/*")}


def test_cpp_includes_run_downwards():
    places: dict[str, int] = {}
    for line in (SOURCES / "README.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"`(\w+)/`, ", line):
            folder = heading[1]
        elif row := re.match(r"\| `(.+?)` \|", line):
            places[f"{folder}/{row[1]}"] = len(places)
    assert places.keys() == FILES.keys()
    for name, text in FILES.items():
        for found in re.findall(r'^#(?:include|define KERNELS) "(.*)"', text, re.M):
            assert places[found] < places[name], f"{name} includes {found}, which stands below it in the README"
            assert found.split("/")[0] in ("common", name.split("/")[0]), f"{name} includes {found}"
            if name.endswith("-inl.h"):
                assert found.endswith("-inl.h"), f"{name} includes {found}"


def test_cpp_files_are_short():
    assert not {name for name, text in FILES.items() if text.count("\n") >= 600}


def test_instruction_sets_are_listed_once():
    assert [name for name, text in FILES.items() if "#pragma GCC target" in text] == ["common/targets.h"]
