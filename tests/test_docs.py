"""The pages tell the truth where a machine can see it: links, paths, names of modules, commands, settings, extras."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from prunus.cli import app
from prunus.config import resolve, settings
from prunus.errors import UserError
from prunus.flags import given, spread

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"]
PAGES = [*NAMES, *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
ELSEWHERE = {"modeling_prunus.py", "modeling_prunus_sliced.py", "configuration_decilm.py"}  # only in checkpoints
SECTIONS = {key.partition(".")[0] for key in settings() if "." in key}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
DRAWN = re.compile(r"<!-- results:([\w.-]+) -->.*?<!-- /results:\1 -->", re.DOTALL)  # commands of the past


def text_of(page: str) -> str:
    """A page without the tables that are drawn from measurements."""
    return DRAWN.sub("", (ROOT / page).read_text(encoding="utf-8"))


def prose(text: str) -> str:
    return FENCE.sub("", text)


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """The code blocks of a page: language and code."""
    for found in FENCE.finditer(text):
        yield found[1], found[2]


def inline(text: str) -> list[str]:
    """What stands between single backticks, on one line."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(text))]


# --------------------------------------------------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get: lower case, without punctuation, numbered where they are alike."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", prose(page.read_text(encoding="utf-8")), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip()).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.add(next(name for n in range(99) if (name := f"{slug}-{n}" if n else slug) not in found))
    return found


def broken_links(text: str, folder: Path, itself: Path) -> list[str]:
    bad = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(text))):
        name, _, anchor = target.partition("#")
        page = folder / name if name else itself
        if re.match(r"[a-z]+:", target):
            continue
        if not page.exists() or (anchor and anchor not in anchors(page)):
            bad.append(target)
    return bad


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_resolve(page: str) -> None:
    assert broken_links(text_of(page), (ROOT / page).parent, ROOT / page) == []


# --------------------------------------------------------------------------------------------------- files and modules


@cache
def basenames() -> frozenset[str]:
    rooms = ("prunus", "tests", "benchmarks", "docs")
    return frozenset(path.name for room in rooms for path in (ROOT / room).rglob("*.*")) | ELSEWHERE


def lost_files(text: str) -> list[str]:
    """Files of the repository that a page names and that are not there; names in capitals stand for any."""
    bad = set()
    for path in re.findall(r"(?<![\w/.-])((?:prunus|tests|benchmarks|docs)/[\w./*-]*[\w*/])", text):
        if "NAME" not in path and not path.startswith("benchmarks/results/") and not list(ROOT.glob(path.rstrip("/"))):
            bad.add(path)
    for code in inline(text):
        if re.fullmatch(r"[\w*/]+\.py", code) and not _is_file(code):
            bad.add(code)
    return sorted(bad)


def _is_file(code: str) -> bool:
    if "NAME" in code:
        return True
    if "/" in code:
        return bool([*ROOT.glob(code), *(ROOT / "prunus").glob(code)])
    return code in basenames() or any(ROOT.glob(f"prunus/*/{code}"))


def lost_names(text: str) -> list[str]:
    """Dotted names of the package that cannot be imported."""
    bad = []
    for dotted in re.findall(r"(?<![\w/.-])prunus(?:\.\w+)+", text):
        if dotted not in ("prunus.json",) and not _resolves(dotted):
            bad.append(dotted)
    for language, code in blocks(text):
        if language == "python" and "..." not in code:
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prunus"):
                    wanted = [f"{node.module}.{alias.name}" for alias in node.names]
                    bad += [name for name in wanted if not _resolves(name)]
    return bad


def _resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ImportError:
            continue
        for name in parts[n:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_module_that_a_page_names_is_there(page: str) -> None:
    text = text_of(page)
    assert lost_files(text) == []
    assert lost_names(text) == []


# ------------------------------------------------------------------------------------------------------------ commands


def commands(text: str) -> Iterator[tuple[list[str], bool]]:
    """Commands that a page shows, as words, and whether they stand in a block, ready to be copied."""
    for language, code in blocks(text):
        if language in ("", "bash", "sh"):
            for line in code.replace("\\\n", " ").splitlines():
                yield from ((words, True) for words in _words(line))
    for code in inline(text):
        yield from ((words, False) for words in _words(code))


def _words(line: str) -> Iterator[list[str]]:
    if re.match(r"(prunus|python|torchrun|accelerate|make|pip) ", line):
        yield shlex.split(line, comments=True)


def mistakes(words: list[str], whole: bool) -> list[str]:
    """What is wrong with one command of a page: an unknown verb, flag, script or target, a value that is refused."""
    if words[0] in ("torchrun", "accelerate") and "prunus" in words:
        return mistakes(words[words.index("prunus") :], False)
    if words[:2] == ["python", "-m"]:
        return [] if _resolves(words[2]) else [words[2]]
    if words[0] == "python" and words[1].endswith(".py"):
        return _script(words)
    if words[0] == "make":
        return [] if re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text(), re.MULTILINE) else words
    if words[0] != "prunus" or words[1].startswith("-") or words[1] == "VERB":
        return []
    verbs = words[1].split("|")
    if unknown := [verb for verb in verbs if verb not in app.commands]:
        return unknown
    bad = [f"{verb} {flag}" for verb in verbs for flag in _flags(words) if flag not in _known(verb)]
    return bad or (_refusal(verbs[0], words[2:]) if whole and len(verbs) == 1 and "..." not in words else [])


def _flags(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]


@cache
def _known(verb: str) -> frozenset[str]:
    command = app.commands[verb]
    options = (one for one in command.get_params(click.Context(command)) if isinstance(one, click.Option))
    return frozenset(name for one in options for name in (*one.opts, *one.secondary_opts))


def _refusal(verb: str, words: list[str]) -> list[str]:
    """What the command line itself says against the command, and the settings against their values."""
    try:
        parameters = app.commands[verb].make_context(verb, spread(words)).params
        asked = given({**parameters, "keep": None} if verb in ("bench", "pick") else parameters)
        resolve(None, {"model": "any", **asked})
    except (click.ClickException, UserError) as error:
        return [f"{verb}: {error}"]
    return []


def _script(words: list[str]) -> list[str]:
    path = next((path for path in (ROOT / words[1], ROOT / "benchmarks" / "peers" / words[1]) if path.is_file()), None)
    if path is None:
        return [words[1]]
    shared = "".join(other.read_text(encoding="utf-8") for other in (ROOT / "benchmarks").glob("*.py"))
    return [flag for flag in _flags(words[2:]) if f'"{flag}"' not in path.read_text(encoding="utf-8") + shared]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_a_page_shows_would_be_understood(page: str) -> None:
    assert [one for words, whole in commands(text_of(page)) for one in mistakes(words, whole)] == []


def test_every_verb_is_in_the_handbook() -> None:
    page = text_of("docs/cli.md")
    assert [verb for verb in app.commands if not re.search(rf"`(prunus )?{verb}[` ]", page)] == []


# ---------------------------------------------------------------------------------------------------------- settings


def unknown_settings(text: str) -> list[str]:
    """Settings in backticks, or after --set, that are none; extras of the package that are none."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    keys = [code for code in inline(text) if re.fullmatch(rf"({'|'.join(SECTIONS)})\.(?!py$|md$|json$)\w+", code)]
    keys += re.findall(r"--set ([a-z][\w.]+)=", text)
    wanted = re.findall(r"prunus\[([\w,-]+)\]", text)
    return [key for key in keys if key not in settings()] + [
        extra for names in wanted for extra in names.split(",") if extra not in extras
    ]


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_and_extra_that_a_page_names_is_known(page: str) -> None:
    assert unknown_settings(text_of(page)) == []


# ------------------------------------------------------------------------------------------------- the test can fail

WRONG = """# A page
[gone](gone.md), [no such place](README.md#nowhere), [nor here](#nor-here), but [here](#a-page) and [there](README.md).

`prunus/flat.py`, `moved.py`, `prunus.models.checkpoint.nothing`, `search.speed`, `prunus[none]`, `prunus fly --high`

```
prunus compress MODEL --out RUN --kept 0.8
prunus compress MODEL --out RUN --keep 1.8
prunus compress MODEL --keep 0.8
prunus score|leap RUN
python benchmarks/latency.py --modell base
python benchmarks/none.py
python -m prunus.manual docs/cli.md
make coffee
```

```python
from prunus.training.training import fit
```
"""


def test_what_is_wrong_is_found() -> None:
    assert broken_links(WRONG, ROOT, ROOT / "CHANGELOG.md") == ["gone.md", "README.md#nowhere", "#nor-here", "#a-page"]
    assert lost_files(WRONG) == ["benchmarks/none.py", "moved.py", "prunus/flat.py"]
    lost = {"manual", "models.checkpoint.nothing", "training.training", "training.training.fit"}
    assert set(lost_names(WRONG)) == {f"prunus.{name}" for name in lost}
    assert unknown_settings(WRONG) == ["search.speed", "none"]
    found = [mistakes(words, whole) for words, whole in commands(WRONG)]
    assert found[0] == ["compress --kept"]
    assert "keep lies in (0, 1]" in found[1][0] and found[2] == ["compress: Missing parameter: out"]
    assert found[3:] == [["leap"], ["--modell"], ["benchmarks/none.py"], ["prunus.manual"], ["make", "coffee"], ["fly"]]
