"""A point of a front as a checkpoint: its network is the point's, and so are its figures."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file
from test_picking import artefacts
from test_pipeline import MODEL, config, logits
from test_recovery import run_config
from transformers import AutoModelForCausalLM

import prunus
from prunus import cli, finishing, picking
from prunus.errors import UserError
from prunus.fronts import numbered
from prunus.pipeline import compress, step
from prunus.searching.objective import Divergence, kl_from_logits
from prunus.steps import RUNGS
from prunus.subnetwork import SubNetwork

pytestmark = pytest.mark.skipif(
    not MODEL.is_dir(), reason="needs the tiny trained model of the data beside the project"
)


ONE_SHOT = {"reform__sequential": False, "search__generations": 0, "front__evaluations": 24, "front__population": 8}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a front, whose own network has one-shot weights: a pick's are then the ones that the front judged."""
    out = tmp_path_factory.mktemp("searched") / "run"
    compress(config(keep=(0.7,), front__objectives="kl,bytes", **ONE_SHOT), out)
    return out


@pytest.fixture
def fronted(searched: Path, tmp_path: Path) -> Path:
    shutil.copytree(searched, tmp_path / "fronted")
    return tmp_path / "fronted"


def points(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / "search" / "front.json").read_text())["searched"]["front"]
    return found


def own(run: Path) -> set[str]:
    """The networks that the run has checkpoints of."""
    return {json.loads(path.read_text())["subnetwork"] for path in (run / "search").glob("keep-*.json")}


def judged(run: Path, small: Path, dense: Path) -> float:
    """The divergence of one checkpoint from another on the windows that a front is judged again on, from outside."""
    held = load_file(run / "tokens.safetensors")["holdout"]
    windows: Any = Divergence(None, held, windows=RUNGS, holdout=held)  # type: ignore[arg-type]
    ids = held[windows.draw(-1, len(RUNGS) - 1)]
    p, q = (logits(path, ids, trust_remote_code=True)[:, 3:-1:4] for path in (dense, small))
    return float(kl_from_logits(p, q).mean())


def check_point(run: Path, row: dict[str, Any], found: dict[str, Any], dense: Path = MODEL) -> Any:
    """The law of a pick: its network is the point's, it loads, its figures are the front's; returns the model."""
    (chosen,) = found["chosen"]
    path = run / "models" / f"pick-point-{row['point']}"
    assert (found["picked"], chosen["name"]) == (str(path), path.name)
    kept = json.loads((path / "prunus.json").read_text())
    assert kept["subnetwork"] == row["subnetwork"]
    assert kept["pick"]["point"] == row["point"]
    model: Any = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    assert sum(p.numel() for p in model.parameters()) == row["parameters"] == chosen["parameters"]
    assert sum(p.numel() * p.element_size() for p in model.parameters()) == row["values"]["bytes"]
    assert judged(run, path, dense) == pytest.approx(row["values"]["kl"], rel=2e-3)
    assert chosen["in_front"] == {axis: [value, row["errors"][axis]] for axis, value in row["values"].items()}
    card = (path / "README.md").read_text()
    assert f"{row['values']['kl']:.4f}" in card and f"{row['values']['bytes']:,.0f}" in card
    return model


def test_the_checkpoint_of_a_point_is_that_point(fronted: Path) -> None:
    mine, before = own(fronted), artefacts(fronted)
    rows = [row for row in points(fronted) if row["subnetwork"] not in mine]
    assert len(rows) > 2
    for row in (rows[0], rows[len(rows) // 2], rows[-1]):
        check_point(fronted, row, prunus.pick(fronted, point=row["point"]))
        assert prunus.pick(fronted, point=row["point"])["from"] == ["keep-0.7"]
    after = artefacts(fronted)
    assert {name: entry for name, entry in after.items() if entry["step"] != "pick"} == before
    assert len(set(after) - set(before)) == 6


def test_points_have_the_same_numbers_everywhere(fronted: Path) -> None:
    rows = points(fronted)
    assert [row["point"] for row in rows] == list(range(1, len(rows) + 1))
    shown = CliRunner().invoke(cli.app, ["search", str(fronted)], prog_name="prunus").stdout
    report = (fronted / "report.md").read_text()
    for row in rows:
        kl = f"{row['values']['kl']:.4g} ± {row['errors']['kl']:.2g}"
        assert any(line.split()[0] == str(row["point"]) and kl in line for line in shown.splitlines() if line.strip())
        assert any(line.startswith(f"| {row['point']} |") and kl in line for line in report.splitlines())
    older = {"searched": {"front": [{k: v for k, v in row.items() if k != "point"} for row in rows]}}
    assert numbered(older)["searched"]["front"] == rows


def test_a_point_of_a_front_that_another_search_made_is_another_pick(fronted: Path) -> None:
    was = {row["point"]: row["subnetwork"] for row in points(fronted)}
    number = next(n for n, sub in was.items() if sub not in own(fronted))
    prunus.pick(fronted, point=number)
    step(fronted, "search", {"front.method": "local", "front.evaluations": 16})
    now = {row["point"]: row["subnetwork"] for row in points(fronted)}
    assert now[number] != was[number]
    with pytest.raises(UserError, match=r"made otherwise \(other widths\).*--out"):
        prunus.pick(fronted, point=number)


def test_a_pick_that_was_killed_goes_on(fronted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = next(row for row in points(fronted) if row["subnetwork"] not in own(fronted))

    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(finishing, "save_network", killed)
        with pytest.raises(KeyboardInterrupt):
            prunus.pick(fronted, point=row["point"], refit=1)
    monkeypatch.setattr(picking, "_weights", lambda *_: pytest.fail("the weights were there"))
    found = prunus.pick(fronted, point=row["point"], refit=1)
    assert Path(found["picked"], "model.safetensors").is_file()


@pytest.mark.parametrize("number", [0, -1, 99])
def test_a_number_that_is_not_there_is_refused_with_the_range(
    fronted: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunus.models.loading.load_configured", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=rf"has points 1 to {len(points(fronted))} \(.*\); given {number}"):
        prunus.pick(fronted, point=number)


def test_a_run_without_a_front_is_told_the_command(fronted: Path, tmp_path: Path) -> None:
    run = tmp_path / "plain"
    compress(config(keep=(0.7,), **ONE_SHOT), run)
    with pytest.raises(UserError, match=r"has no front of several objectives; search one: prunus search .* --front "):
        prunus.pick(run, point=1)
    (fronted / "search" / "front.json").write_text("{}")
    with pytest.raises(UserError, match=r"has not finished its front of kl, bytes .*; do that first: prunus search "):
        prunus.pick(fronted, point=1)


def test_a_point_that_the_run_has_a_checkpoint_of_is_not_made_twice(fronted: Path) -> None:
    """The search begins from the run's own networks, so that a front may hold them; here it is made to."""
    manifest, file = json.loads((fronted / "manifest.json").read_text()), fronted / "search" / "front.json"
    found = json.loads(file.read_text())
    found["searched"]["front"][0]["subnetwork"] = next(iter(own(fronted)))
    file.write_text(json.dumps(found))
    entry = manifest["artefacts"]["search/front.json"]["files"][""]
    entry |= {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    (fronted / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"point 1 is a network of the run's own, .*models/keep-0.7; take that one"):
        prunus.pick(fronted, point=1)


def test_a_point_of_a_uniform_front_is_uniform(tmp_path: Path) -> None:
    run = tmp_path / "run"
    compress(config(keep=(0.7,), uniform=True, front__objectives="kl,bytes", **ONE_SHOT), run)
    row = next(row for row in points(run) if row["subnetwork"] not in own(run))
    check_point(run, row, prunus.pick(run, point=row["point"]))
    path = run / "models" / f"pick-point-{row['point']}"
    assert json.loads((path / "config.json").read_text())["model_type"] in ("llama", "mistral")
    assert not list(path.glob("*.py"))


def test_points_of_a_trained_space_have_the_trained_weights(tmp_path: Path) -> None:
    """Whole and smaller hidden sizes: what is cut out is the trained super-network, sorted as it was trained."""
    run = tmp_path / "run"
    asked = {"train__space": "llama_joint", "train__sampler": "grid", "train__steps": 4, "search__space": "trained"}
    asked["front__least"] = 0.2  # smaller than any network of whole hidden size
    compress(run_config(front__objectives="kl,bytes", **asked, **ONE_SHOT), run)
    seen, whole = set(), SubNetwork.from_json(next(iter(own(run)))).hidden
    for row in points(run):
        cut = SubNetwork.from_json(row["subnetwork"]).hidden < whole
        if row["subnetwork"] in own(run) or cut in seen:
            continue
        seen.add(cut)
        found = prunus.pick(run, point=row["point"], refit=2 if cut else 0)
        model = check_point(run, row, found, run / "supernet")
        assert (model.config.hidden_size < whole) is cut
        assert any("lacks hidden channels" in note for note in found["notes"]) is cut
        assert ("predicted_nats" in found["chosen"][0]) is not cut
    assert seen == {True, False}
    shutil.rmtree(run / "supernet")
    with pytest.raises(UserError, match=r"supernet is missing or damaged.*prunus train "):
        prunus.pick(run, point=1)


def test_the_command_shows_what_the_front_says(fronted: Path) -> None:
    row = next(row for row in points(fronted) if row["subnetwork"] not in own(fronted))
    done = CliRunner().invoke(cli.app, ["pick", str(fronted), "--point", str(row["point"]), "--measure"])
    assert done.exit_code == 0, done.output
    assert "in the front" in done.stdout
    assert f"{row['values']['kl']:.4g} ± {row['errors']['kl']:.2g}" in done.stdout
    assert f"models/pick-point-{row['point']}" in done.stdout.replace("\n", "")
    assert "the front judged it with one-shot weights" in done.stderr
