"""The house has floors: a file imports only from its own floor and those below it, and never in a circle."""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "prunus"
TRAVELLING = (
    "models.ragged",
    "models.sliced",
    "exporting.decilm",
)  # files that go with checkpoints and import nothing of ours
MODULES = sorted(".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py"))
NO_FLOOR = {*TRAVELLING, *(m for m in MODULES if m.split(".")[-1] == "__init__")}  # and the front doors
TORCHLESS = ("torch", "transformers", "peft", "accelerate")


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))


def floor(module: str) -> int:
    found = re.match(r"Floor (\d): ", ast.get_docstring(tree(module)) or "")
    assert found, f'prunus/{module}.py begins with its floor: """Floor N: what it is."""'
    return int(found[1])


def imported(module: str, whole_file: bool) -> set[str]:
    """Modules that a file imports: at its top, or also inside functions. What only type checkers read is left out."""
    names: set[str] = set()
    hidden = {id(n) for block in ast.walk(tree(module)) if _for_types(block) for n in ast.walk(block)}
    for node in ast.walk(tree(module)) if whole_file else tree(module).body:
        if id(node) in hidden:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def own(module: str, whole_file: bool = False) -> set[str]:
    parts = (name.split(".") for name in imported(module, whole_file) if name.startswith("prunus."))
    found = {".".join(p[1:n]) for p in parts for n in (2, 3)}
    return {name for name in found if name in MODULES and name != module}


@pytest.mark.parametrize("module", [m for m in MODULES if m not in NO_FLOOR])
def test_imports_only_from_its_floor_and_below(module: str) -> None:
    above = {other: floor(other) for other in own(module) - NO_FLOOR if floor(other) > floor(module)}
    assert above == {}, f"{module} stands on floor {floor(module)}"


def test_no_circles() -> None:
    tuple(TopologicalSorter({m: own(m) - {"__init__"} for m in MODULES}).static_order())


def test_plain_data_and_the_record_need_no_torch() -> None:
    light = [m for m in MODULES if m not in NO_FLOOR and floor(m) in (0, 4)]
    assert {"subnetwork", "config", "recording.run", "recording.report"} <= set(light)
    heavy = {m: names for m in light if (names := _packages(m) & set(TORCHLESS))}
    assert heavy == {}


def _packages(module: str) -> set[str]:
    return {name.split(".")[0] for name in imported(module, whole_file=False)}


@pytest.mark.parametrize("module", TRAVELLING)
def test_the_travelling_files_import_nothing_of_ours(module: str) -> None:
    assert own(module, whole_file=True) == set()


@pytest.mark.parametrize("module", [m for m in MODULES if m not in NO_FLOOR])
def test_the_map_in_the_readme_has_every_file_in_its_room_on_its_floor(module: str) -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    room, _, name = module.rpartition(".")
    row = next(line for line in lines if line.startswith(f"| `prunus/{room}{'/' if room else ''}` "))
    files = dict(part.strip(" |").split(" ", 1) for part in row.split(" | ")[2].split(" · "))
    assert f"`{name}`" in files[str(floor(module))]
