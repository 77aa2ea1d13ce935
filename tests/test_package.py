"""Importing the package is light, and its checkpoints load without a flag once it is imported, in any order."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tiny import ragged, tiny

import prunus
from prunus import machine
from prunus.models.checkpoint import blank
from prunus.models.families import family_of
from prunus.models.slicing import state_of

LOAD = "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
MODEL = "from transformers import AutoModelForCausalLM"
CONFIG = "from transformers import AutoConfig; AutoConfig.from_pretrained(sys.argv[1])"
ORDERS = {
    "a model class first": f"import sys, prunus; from transformers import LlamaForCausalLM; {MODEL}; {LOAD}",
    "looked for, then a configuration": (
        f"import sys, prunus, importlib.util as u; u.find_spec('transformers'); {CONFIG}; {MODEL}; {LOAD}"
    ),
    "transformers first": f"import sys; {MODEL}; import prunus; {LOAD}",
}


def test_importing_prunus_loads_neither_torch_nor_transformers() -> None:
    code = "import prunus, sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("order", ORDERS)
def test_ragged_checkpoints_load_once_prunus_is_imported(order: str, tmp_path: Path) -> None:
    model = tiny("llama")
    family, sub = family_of(model.config), ragged(model.config)
    small = blank(model.config, family, sub, uniform=False, dtype=next(model.parameters()).dtype)
    small.load_state_dict(state_of(model, family, sub), strict=False)
    small.save_pretrained(tmp_path)  # as after fine-tuning: without the modelling file
    done = subprocess.run(
        [sys.executable, "-c", ORDERS[order], str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "PrunusLlamaForCausalLM", done.stderr


def test_every_public_name_is_there_and_callable() -> None:
    for name in prunus.__all__:
        assert callable(getattr(prunus, name)), name
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        _ = prunus.compres  # type: ignore[attr-defined]


def test_the_version_is_known_without_an_installation(tmp_path: Path) -> None:
    """From a source tree alone: the package is found by its path, and no installed copy is asked."""
    root = Path(__file__).resolve().parents[1]
    (tmp_path / "prunus").symlink_to(root / "prunus")
    say = [sys.executable, "-m", "prunus"]
    done = subprocess.run([*say, "version", "--json", "-"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert json.loads(done.stdout)["prunus"] == machine.VERSION == prunus.__version__
    done = subprocess.run([*say, "--version"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == f"prunus, version {machine.VERSION}\n"


def test_the_package_is_built_with_that_version() -> None:
    expanded = pytest.importorskip("setuptools.config.pyprojecttoml").read_configuration
    root = Path(__file__).resolve().parents[1]
    assert expanded(root / "pyproject.toml")["project"]["version"] == machine.VERSION
    assert "version" not in tomllib.loads((root / "pyproject.toml").read_text())["project"]
