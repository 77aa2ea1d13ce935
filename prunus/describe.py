"""Floor 5: what a run says about its networks: figures, model cards, manifests, the data of the report."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunus import machine
from prunus.choosing import open_record
from prunus.evaluation import chunked, compare_speed, perplexity, text_ids
from prunus.finishing import holdout_nats
from prunus.models import costs
from prunus.models.families import dims
from prunus.models.slicing import Override, extract
from prunus.recording.pictures import ErrorCurve, Network, Tried
from prunus.recording.report import ReportData, save_draws
from prunus.searching.options import MEASURED, TITLES
from prunus.steps import Prepared, Session
from prunus.subnetwork import SubNetwork
from prunus.texts.calibration import column_in, refuse_seen
from prunus.timing import runtimes

PROMPT = "The history of the city begins"
SAMPLE_TOKENS = 60
PROMPT_TOKENS, TIMED_TOKENS = 256, 16  # that speed is measured with: read at once, written one by one


def network(s: Session, name: str, sub: SubNetwork) -> Network:
    """The sizes of one network, from shapes alone."""
    whole = s.whole
    found: Network = {
        "name": name,
        "kept_blocks": costs.parameters(s.layout, sub, "blocks") / costs.parameters(s.layout, whole, "blocks"),
        "kept_all": costs.parameters(s.layout, sub, "all") / costs.parameters(s.layout, whole, "all"),
        "parameters": costs.parameters(s.layout, sub, "all"),
        "n_bytes": int(costs.n_bytes(s.layout, sub, s.width)),
        "hidden": sub.hidden,
        "layers": [(x.kv_heads, x.q_per_kv, x.mlp) for x in sub.layers],
        "uniform": sub.uniform,
    }
    found.update(_budgeted(s, sub))
    return found


def _budgeted(s: Session, sub: SubNetwork) -> Any:
    """What the budget counts, by the table or exactly; nothing where the target is a share."""
    if s.config.constraint == "memory_bytes":
        return {"memory_bytes": int(s.cost(sub))}
    if (table := s.timetable) is None:
        return {}
    ms = table.request_ms(sub)
    return {
        "predicted_ms": ms,
        "predicted_speedup": table.request_ms(s.whole) / ms,
        "predicted_tps": table.tokens_per_second(sub),
    }


def measure(s: Session, p: Prepared, name: str, sub: SubNetwork, weights: Override) -> Network:
    """Sizes and measured figures of one network: divergence, perplexity, speed against the dense model, a sample."""

    inputs = {"subnetwork": sub.key(), "weights": s.run.sha256(f"weights/{name}.safetensors")}
    with s.progress(f"evaluation of {name}"):
        found: Any = s.run.do(
            "evaluate", f"evaluation/{name}.json", lambda: figures(s, p, name, sub, weights), inputs=inputs
        )
    return _as_network(found)


def figures(s: Session, p: Prepared, name: str, sub: SubNetwork, weights: Override) -> dict[str, Any]:
    """What `measure` records: sizes, held-out divergence, perplexity, a sample, speed. Computed, not recorded."""
    found: dict[str, Any] = {**network(s, name, sub)}
    values = s.nats.get(name) or holdout_nats(s, p, sub, weights)
    found["kl_nats"] = statistics.fmean(values)
    found["kl_se"] = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    small = extract(s.model, s.family, sub, weights, uniform=True if s.config.uniform else None)
    found |= judged(s, small)
    found |= timed(s.model, small)
    if s.timetable is not None:
        request = runtimes.compare(s.model, small, s.config.budget)
        found |= {"measured_ms": request["request_ms"], "measured_speedup": request["speedup"]}
        found["measured_tps"] = 1000 * s.request.batch / request["token_ms"]
    return found


def timed(dense: nn.Module, small: nn.Module) -> dict[str, Any]:
    """How fast a network is, in turns with the dense model: ratios, and tokens per second of both on this machine."""
    config: Any = dense.config
    room = int(getattr(config, "max_position_embeddings", None) or PROMPT_TOKENS + TIMED_TOKENS)
    speed = compare_speed(dense, small, prompt=min(PROMPT_TOKENS, room - TIMED_TOKENS), generate=TIMED_TOKENS)
    ratios = {"prefill_speedup": speed.prefill, "decode_speedup": speed.decode}
    return {**ratios, "speed": asdict(speed), "timed_on": f"{machine.words()}, {next(dense.parameters()).device}"}


def measure_dense(s: Session) -> Network:
    """The same figures of the dense model."""
    with s.progress("evaluation of the dense model"):
        found: Any = s.run.do(
            "evaluate", "evaluation/dense.json", lambda: {**network(s, "dense", s.whole), **judged(s, s.model)}
        )
    return _as_network(found)


def measure_trained(s: Session) -> Network:
    """The same figures of the trained full network, whose imitation the others are."""
    with s.progress("evaluation of the trained full network"):
        found: Any = s.run.do(
            "evaluate", "evaluation/trained.json",
            lambda: {**network(s, "full network, trained", s.whole), **judged(s, s.model)},
        )  # fmt: skip
    return _as_network(found)


def check_text(s: Session) -> None:
    """Refuse a text to score on that cannot be read, is too short, or has windows longer than the model's positions."""
    c = s.config
    if c.test_text:
        chunked(s.model, _text_ids(s, c.test_text), c.test_length, c.test_chunks)


def _text_ids(s: Session, text: str) -> Tensor:
    """The tokens of a text to score on, from the calibration text's column where the file has it."""
    return text_ids(text, s.tokenizer, column=column_in(text, s.config.calibration.column))


def check_unseen(s: Session, ids: Tensor) -> None:
    """Refuse a text to score on that the calibration windows (n, length) were taken from."""
    if text := s.config.test_text:
        refuse_seen(ids, _text_ids(s, text), text)


def judged(s: Session, model: nn.Module) -> dict[str, Any]:
    """What a model writes, and its perplexity where the run has a text."""
    found: dict[str, Any] = {"sample": _sample(s, model)}
    if s.config.test_text:
        ids = _text_ids(s, s.config.test_text)
        result = perplexity(model, ids, length=s.config.test_length, chunks=s.config.test_chunks)
        found["perplexity"] = {_protocol(s): result.ppl}
        s.run.count_tokens(result.n_tokens)
    return found


def _protocol(s: Session) -> str:
    chunks = "all chunks" if s.config.test_chunks is None else f"{s.config.test_chunks} chunks"
    return f"{str(s.config.test_text).rpartition('/')[2]}, {chunks} of {s.config.test_length} tokens"


@torch.inference_mode()
def _sample(s: Session, model: Any) -> str:
    ids: Tensor = s.tokenizer(PROMPT, return_tensors="pt")["input_ids"].to(s.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=SAMPLE_TOKENS, do_sample=False, use_cache=True,
        pad_token_id=s.tokenizer.pad_token_id or s.tokenizer.eos_token_id or 0,
    )  # fmt: skip
    return str(s.tokenizer.decode(out[0], skip_special_tokens=True))


def _as_network(raw: dict[str, Any]) -> Network:
    return {**raw, "layers": [(a, b, c) for a, b, c in raw["layers"]]}  # type: ignore[typeddict-item]


def card(s: Session, name: str, found: Network, dense: Network, license_name: str | None = None) -> str:
    """The model card of one checkpoint: what it is, its figures, how to load it."""
    uniform = found.get("uniform", False)
    rows = [
        ("parameters", f"{dense['parameters']:,}", f"{found['parameters']:,}"),
        ("kept of the decoder blocks", "100 %", f"{100 * found['kept_blocks']:.2f} %"),
        ("kept of all parameters", "100 %", f"{100 * found['kept_all']:.2f} %"),
        ("weights, MB", f"{dense['n_bytes'] / 1e6:.1f}", f"{found['n_bytes'] / 1e6:.1f}"),
    ]
    far = f"divergence from the {'trained full network' if s.tier else 'original'}, nats per token"
    for key, how in (("kl_nats", ""), ("predicted_kl_nats", ", predicted")):
        if (nats := found.get(key)) is not None:
            rows.append((far + how, "0", f"{nats:.4f}"))
    for text, value in found.get("perplexity", {}).items():
        whole = dense.get("perplexity", {}).get(text)
        rows.append((f"perplexity ({text})", "–" if whole is None else f"{whole:.2f}", f"{value:.2f}"))
    for axis, title in TITLES.items():
        if axis in found.get("in_front", {}):
            how = ", with one-shot weights" if axis in MEASURED else ""
            title = title.replace("dense model", "trained full network") if s.tier else title
            theirs, own = (_exact(*one["in_front"][axis]) for one in (dense, found))
            rows.append((f"{title}, in the front{how}", theirs, own))
    speed = [("prefill", found.get("prefill_speedup")), ("decoding", found.get("decode_speedup"))]
    rows += [(f"{what}, speed on the machine that made it", "1.00 x", f"{v:.2f} x") for what, v in speed if v]
    table = "\n".join(f"| {a} | {b} | {c} |" for a, b, c in rows)
    extra = "" if uniform else ", trust_remote_code=True"
    why = (
        "It is an ordinary checkpoint: nothing else is needed to load it."
        if uniform
        else "Its layers differ in width, so it brings a small modelling file; `import prunus` replaces the flag."
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
base_model: {s.run.source.get("id")}
tags: [prunus, compressed]
---
# {name}: a smaller network inside {s.run.source.get("id")}

Cut out by Prunus {machine.VERSION}, {_tier(s)}.

| | original | this network |
|---|---:|---:|
{table}

## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH"{extra})
tokenizer = AutoTokenizer.from_pretrained("PATH"{extra})
```

{why}{_advice(s)} The licence is that of the original model.
"""


def _advice(s: Session) -> str:
    """What to do on a machine that may be another one than this."""
    if s.dtype.itemsize != 2:
        return ""
    name = str(s.dtype).removeprefix("torch.")
    return (
        f' Where the processor does not multiply {name} (most without AVX-512), `dtype="float32"` is many times faster.'
    )


def _exact(value: float, error: float | None) -> str:
    shown = f"{value:,.0f}" if float(value).is_integer() else f"{value:.4f}"
    return shown if error is None else f"{shown} ± {error:.2g}"


def _tier(s: Session) -> str:
    source = s.run.notes.get("calibration_source", s.config.calibration.source)
    if s.tier:
        return f"after training the super-network on {Path(str(s.config.train.data)).name}; calibrated on {source}"
    how = "without training" if s.config.method == "prunus" else f"by the method {s.config.method}, without training"
    return f"{how}; calibrated on {source}"


def manifest(s: Session, sub: SubNetwork, found: Network) -> dict[str, Any]:
    """What the checkpoint remembers of its origin, its super-network's training included."""
    trained = s.run.notes.get("train")
    return {
        **({"train": trained} if trained else {}),
        "source": dict(s.run.source),
        "subnetwork": sub.to_json(),
        "seed": s.config.seed,
        "token_hash": s.run.notes.get("token_hash"),
        "figures": {k: v for k, v in found.items() if k not in ("layers", "sample")},
        "environment": machine.environment(),
    }


def report_data(
    s: Session,
    p: Prepared | None,
    dense: Network,
    chosen: Mapping[str, Network],
    command: str,
    trained: Network | None = None,
) -> ReportData:
    """Everything that the report shows; p: None where nothing was searched; trained: the full network, where it was."""
    calibration = s.config.calibration
    return {
        "model": s.config.model,
        "family": s.family.name,
        "keep_of": s.config.keep_of,
        "dense": dense,
        "chosen": [{**found, "path": f"models/{name}"} for name, found in chosen.items()],
        "tried": tried(s, p) if p else [],
        "steps": [
            {
                "name": name,
                "seconds": float(cost["seconds"]),
                "forward_tokens": int(cost["forward_tokens"]),
                "peak_bytes": int(cost["peak_bytes"]),
                "peak_cuda_bytes": int(cost["peak_cuda_bytes"]),
            }
            for name, cost in s.run.costs().items()
        ],
        "command": command,
        "seed": s.config.seed,
        "source": dict(s.run.source),
        "calibration": {
            "source": s.run.notes.get("calibration_source", calibration.source),
            "samples": calibration.samples,
            "length": calibration.length,
            "token_hash": s.run.notes.get("token_hash"),
        },
        "config": s.config.to_dict(),
        "versions": machine.environment(),
        "machine": machine.words(),
        "prompt": PROMPT,
        **({"error_curves": error_curves(s, p)} if p else {}),  # type: ignore[typeddict-item]
        **({"training": {**s.run.notes["train"], "network": trained}} if trained else {}),  # type: ignore[typeddict-item]
        **({"draws": drawn(s)} if s.config.train.data and drawn(s) else {}),  # type: ignore[typeddict-item]
        **({"types": types} if (types := _types(s)) else {}),  # type: ignore[typeddict-item]
        **({"latency": json.loads(s.timetable.to_json())} if s.timetable else {}),  # type: ignore[typeddict-item]
    }


def _types(s: Session) -> dict[str, str]:
    """The types that weights are stored and computed in, where these are two."""
    computed = next(s.model.parameters()).dtype
    both = {"stored": s.dtype, "computed": computed}
    return {key: str(one).removeprefix("torch.") for key, one in both.items()} if computed != s.dtype else {}


def tried(s: Session, p: Prepared) -> list[Tried]:
    """Every candidate of the search at the largest token budget that it was judged on."""
    if p.objective.kind != "kl":
        return []
    best: dict[str, tuple[int, Tried]] = {}
    whole = costs.parameters(s.layout, s.whole, s.config.keep_of)
    for trial in open_record(s, p).trials():
        kept = costs.parameters(s.layout, trial.subnetwork, s.config.keep_of) / whole
        key = trial.subnetwork.key()
        if key not in best or best[key][0] < trial.rung:
            best[key] = trial.rung, {"method": trial.method, "kept": kept, "kl_nats": trial.value}
    return [entry for _, entry in best.values()]


def error_curves(s: Session, p: Prepared) -> list[ErrorCurve]:
    """Reformed error of every level relative to that of dropping the sub-layer."""
    d = dims(s.model.config)
    out: list[ErrorCurve] = []
    widths = [round(d["mlp"] * k / 16) for k in range(17)]
    for i in range(len(s.whole.layers)):
        mlp, heads = p.errors.mlp[i], p.errors.attention[i]
        nothing = max(float(mlp[0]), 1e-12)
        out.append(
            {
                "layer": i,
                "part": "mlp",
                "kept": [w / d["mlp"] for w in widths],
                "error": [float(mlp[w]) / nothing for w in widths],
            }
        )
        nothing = max(float(heads[0, 0]), 1e-12)
        groups = range(d["kv_heads"] + 1)
        out.append(
            {
                "layer": i,
                "part": "attention",
                "kept": [g / d["kv_heads"] for g in groups],
                "error": [float(heads[g, d["q_per_kv"]]) / nothing for g in groups],
            }
        )
    return out


def scores(s: Session, orders: Mapping[str, Tensor]) -> dict[str, Any]:
    """The result of the step `score`: the least important members of every layer."""
    return {
        "run": str(s.run.directory),
        "layers": len(s.stream),
        "least_important": {unit: [row.flatten().tolist()[-8:] for row in order] for unit, order in orders.items()},
    }


def trained(s: Session) -> dict[str, Any]:
    """The result of the step `train`: what was trained, on what, and what it cost."""
    note = s.run.notes.get("train", {})
    found = drawn(s)
    picture = {"sizes": str(save_draws(found, s.run.directory / "report"))} if found else {}
    return {"run": str(s.run.directory), **note, **picture}


def drawn(s: Session) -> dict[str, Any]:
    """How the sizes of the training's draws are spread; nothing where the run has no pool, or an older version's."""
    path = s.run.path("pool.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["histogram"] if path.is_file() else {}
    return found if "least" in found else {}


def levels(s: Session, p: Prepared) -> dict[str, Any]:
    """The result of the step `reform`: the divergence of every sub-layer at half width and without it."""
    rows = []
    for curve in p.curves:
        half = min(range(len(curve.levels)), key=lambda k: abs(curve.costs[k] - curve.costs[0] / 2))
        rows.append(
            {"layer": curve.layer, "part": curve.which, "half_nats": curve.nats[half], "dropped_nats": curve.nats[-1]}
        )
    return {"run": str(s.run.directory), "sub_layers": rows}


def found(s: Session, chosen: Mapping[str, SubNetwork], front: dict[str, Any] | None = None) -> dict[str, Any]:
    """The result of the step `search`: the networks, with their sizes; and a front, where one was asked for."""
    data = {"run": str(s.run.directory), "chosen": [network(s, name, sub) for name, sub in chosen.items()]}
    return {**data, "front": front} if front else data
