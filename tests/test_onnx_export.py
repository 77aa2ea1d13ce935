"""An ONNX graph computes what the checkpoint does, with any batch, length and cache, or it is not written."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny import ragged
from transformers import AutoModelForCausalLM, AutoTokenizer
from words import bytes_bpe, checkpoint, cut, tiny

from prunus import cli
from prunus.errors import UserError
from prunus.exporting import onnx_export, onnx_graph
from prunus.exporting.export import export
from prunus.exporting.onnx_graph import Session
from prunus.models.checkpoint import verify
from prunus.subnetwork import LayerShape, SubNetwork

ONNX = pytest.mark.skipif(
    not all(find_spec(name) for name in (*onnx_graph.PACKAGES, "transformers.exporters")),
    reason="needs onnx, onnxscript and onnxruntime (the extra onnx)",
)


def small(name: str, kind: str) -> Any:
    """A tiny model of two or three layers: tracing takes seconds for each."""
    kinds = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]} if name == "gemma2" else {}
    model = tiny(name, num_hidden_layers=3, **kinds)
    full = LayerShape(4, 2, 64)
    layers = {
        "uniform": (full, full, LayerShape(0, 0, 0)),
        "ragged": (LayerShape(3, 2, 40), LayerShape(0, 0, 33), LayerShape(2, 1, 0)),
    }[kind]
    return cut(model, SubNetwork(48, layers))


@ONNX
@pytest.mark.parametrize(("name", "cached"), [("llama", True), ("gemma2", False)])  # with and without a window
def test_the_graph_is_the_model(name: str, cached: bool, tmp_path: Path) -> None:
    model = small(name, "ragged")
    where = checkpoint(model, tmp_path)
    found = export(where, format="onnx")
    assert found["file"] == str(tmp_path / "model-onnx" / "model.onnx")
    assert found["cache"] == cached == (found["notes"] == [])
    assert found["arithmetic_nats"] < 1e-9 and found["largest_difference"] < 1e-4 and found["agreement"] == 1
    verify(tmp_path / "model-onnx")
    shutil.rmtree(where)  # the graph stands alone
    session = Session(tmp_path / "model-onnx", 1)
    assert session.shapes["input_ids"] == ["batch", "tokens"]
    ids = torch.randint(3, 300, (3, 21), generator=torch.Generator().manual_seed(5))
    for rows, length in ((1, 1), (3, 21), (2, 70)):
        some = ids.repeat(1, 4)[:rows, :length]
        logits, _ = session.run(some, torch.ones_like(some), session.empty(rows))
        torch.testing.assert_close(logits, model(input_ids=some).logits, atol=1e-4, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model-onnx")
    assert tokenizer("the rain")["input_ids"] == bytes_bpe()("the rain")["input_ids"]
    if not cached:
        return
    heads = [shape[1] for key, shape in session.shapes.items() if key.endswith(".key")]
    assert heads == [3, 1, 2]  # the layer without attention has a stand-in
    assert session.shapes["past_key_values.0.value"] == ["batch", heads[0], "past", 8]
    past, given, out = session.empty(1), ids[:1, :5], []
    want = model.generate(given, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 5:].tolist()
    for step in range(8):
        logits, past = session.run(given, torch.ones(1, 5 + step, dtype=torch.long), past)
        given = logits[:, -1:].argmax(-1)
        out.append(int(given))
    assert out == want


@ONNX
def test_another_function_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = checkpoint(small("llama", "uniform"), tmp_path)
    own = onnx_graph.trace

    def wrong(model: Any, *, cached: bool) -> Any:
        other = AutoModelForCausalLM.from_pretrained(where, attn_implementation="sdpa").eval()
        other.model.layers[1].input_layernorm.weight.data *= 1.1
        return own(other, cached=cached)

    monkeypatch.setattr(onnx_graph, "trace", wrong)
    with pytest.raises(UserError, match="computes something else than PyTorch for a whole text"):
        export(where, format="onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_model_that_cannot_be_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such operator\nand a page of text")

    monkeypatch.setattr(onnx_graph, "check_installed", lambda: None)
    monkeypatch.setattr(onnx_export, "version", lambda name: "1")
    monkeypatch.setattr(onnx_graph, "trace", fails)
    with pytest.raises(UserError, match=r"cannot be traced to ONNX .*\(no such operator\)"):
        export(checkpoint(small("llama", "uniform"), tmp_path), format="onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_is_refused_before_the_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = checkpoint(tiny("llama"), tmp_path)
    with pytest.raises(UserError, match="--quant is for --format gguf"):
        export(where, format="onnx", quant="q8_0")
    with pytest.raises(UserError, match="the checkpoint itself"):
        export(where, format="onnx", out=where, overwrite=True)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious").write_text("precious")
    with pytest.raises(UserError, match="--overwrite"):
        export(where, format="onnx", out=taken)
    with pytest.raises(UserError, match="is a file"):
        export(where, format="onnx", out=taken / "precious")
    monkeypatch.setattr(onnx_graph, "check_installed", lambda: None)
    with pytest.raises(UserError, match="written in float32"):
        export(where, format="onnx", dtype="bfloat16")
    monkeypatch.setattr(onnx_export, "write", lambda *a: pytest.fail("not reached"))
    monkeypatch.undo()
    monkeypatch.setattr(onnx_graph.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnx, onnxscript, onnxruntime; install with pip install 'prunus\[onnx\]'"):
        export(where, format="onnx")
    assert (taken / "precious").read_text() == "precious"


@ONNX
def test_the_command(tmp_path: Path) -> None:
    where = checkpoint(small("llama", "uniform"), tmp_path)
    command = [
        "export",
        where,
        "--format",
        "onnx",
        "--out",
        str(tmp_path / "graph"),
        "--json",
        str(tmp_path / "a.json"),
    ]
    (tmp_path / "graph").mkdir()  # an empty directory is no obstacle
    done = CliRunner().invoke(cli.app, command, prog_name="prunus")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "a.json").read_text())["cache"] is True
    assert (tmp_path / "graph" / "model.onnx.data").is_file()
    shapes = Session(tmp_path / "graph", 1).shapes
    assert [shape[1] for key, shape in shapes.items() if key.endswith(".key")] == [4, 4]  # the last layer has left
    assert "torch.onnx" not in done.output
    again = CliRunner().invoke(cli.app, command, prog_name="prunus")
    assert again.exit_code == 2 and "--overwrite" in again.stderr


def test_windows_have_no_growing_cache() -> None:
    assert onnx_graph.has_window(tiny("gemma2").config)
    assert not onnx_graph.has_window(tiny("gemma2", layer_types=["full_attention"] * 4).config)
    assert onnx_graph.has_window(tiny("mistral", sliding_window=16).config)
    assert not onnx_graph.has_window(tiny("llama").config)
    model = tiny("gemma3")
    assert onnx_graph.has_window(cut(model, ragged(model.config)).config)
