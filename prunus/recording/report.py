"""Floor 4: what a person reads after a run: `report.md` and its pictures, from plain numbers. No torch.

Every figure comes from `ReportData`; what was not measured is left out or shown as a dash, never guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from prunus.recording import pictures, tradeoffs
from prunus.recording.artefact import write_text
from prunus.recording.pictures import ErrorCurve, Network, Step, Tried
from prunus.timing.timetable import Timetable

COLLAPSE_NATS = 1.0  # above this divergence per token the text usually falls apart; the report says so


class ReportData(TypedDict):
    """Everything that a report shows; it is plain JSON, and `prunus report` draws it again from the run directory."""

    model: str  # as the user named it
    family: str
    keep_of: Literal["blocks", "all"]  # which share `--keep` meant
    dense: Network
    chosen: list[Network]
    tried: list[Tried]
    steps: list[Step]
    command: str  # what to type for the same run
    seed: int
    source: dict[str, Any]  # of the weights: id, revision, kind, sha256
    calibration: dict[str, Any]  # source, samples, length, token_hash
    config: dict[str, Any]  # as resolved
    versions: dict[str, str]  # package -> version
    machine: NotRequired[str]  # processor, cores, memory in words
    error_curves: NotRequired[list[ErrorCurve]]
    prompt: NotRequired[str]  # of the samples
    rival: NotRequired[dict[str, Any]]  # whose method it is, where it is not ours: name, title, paper, notes by network
    latency: NotRequired[dict[str, Any]]  # the table that times were predicted by, as JSON
    front: NotRequired[dict[str, Any]]  # a front of several objectives and its control: RUN/search/front.json
    training: NotRequired[dict[str, Any]]  # of the super-network: data, tokens, losses; and the full "network"
    draws: NotRequired[dict[str, Any]]  # sizes that the training drew from: counts, least, most, sampler, empty bins
    types: NotRequired[dict[str, str]]  # where weights are stored in another type than they computed in: both


def write_report(run_dir: Path | str, data: ReportData) -> Path:
    """Write `report.md`, `report.json` and the pictures `report/*.png` and `.svg` into a run; return report.md's path.

    Old ones are replaced file by file, each whole or not at all, so a killed run leaves no half file.
    """
    run_dir = Path(run_dir)
    folder = run_dir / "report"
    far = reference(data)
    pictures.save(pictures.front(data["dense"], data["chosen"], data["tried"], data["keep_of"], far), folder / "front")
    if data["chosen"]:
        pictures.save(pictures.kept(data["dense"], data["chosen"]), folder / "kept")
    if data["steps"]:
        pictures.save(pictures.cost(data["steps"]), folder / "cost")
    if data.get("error_curves"):
        pictures.save(pictures.errors(data["error_curves"]), folder / "errors")
    if "latency" in data:
        pictures.save(pictures.front_of_times(data["dense"], data["chosen"], far), folder / "latency")
        pictures.save(pictures.staircase(Timetable.from_json(json.dumps(data["latency"]))), folder / "staircase")
    if data.get("front"):
        pictures.save(tradeoffs.searched_front(data["front"]), folder / "searched")
    if data.get("draws"):
        save_draws(data["draws"], folder)
    write_text(run_dir / "report.json", json.dumps(data, indent=1))
    write_text(run_dir / "report.md", markdown(data))
    return run_dir / "report.md"


def markdown(data: ReportData) -> str:
    """The report's text; its pictures are named relative to the run directory."""
    sections = (
        _summary(data),
        _figures(data),
        _front(data),
        _times(data),
        _searched(data),
        _kept(data),
        _training(data),
        _draws(data),
        _samples(data),
        _loading(data),
        _cost(data),
        _origin(data),
    )
    return "\n\n".join(s for s in sections if s) + "\n"


# ------------------------------------------------------------------------------------------------------------ figures


def _summary(data: ReportData) -> str:
    dense, chosen = data["dense"], data["chosen"]
    lines = [f"# {data['model']}, compressed by Prunus"]
    if chosen:
        sizes = [n["parameters"] for n in chosen]
        span = _millions(sizes[0]) if len(chosen) == 1 else f"{_millions(max(sizes))} to {_millions(min(sizes))}"
        networks = "One smaller network" if len(chosen) == 1 else f"{len(chosen)} smaller networks"
        lines.append(
            f"{networks} of {span} parameters, cut out of {_millions(dense['parameters'])} (family {data['family']})."
        )
    if rival := data.get("rival"):
        lines.append(f"Method: **{rival['name']}**, {rival['title']} ({rival['paper']}); nothing of ours is in it.")
        lines += [f"- {name}: {'; '.join(notes)}" for name, notes in rival["notes"].items() if notes]
    collapsed = [n["name"] for n in chosen if n.get("kl_nats", 0.0) > COLLAPSE_NATS]
    if collapsed:
        lines.append(
            f"**Careful: {', '.join(collapsed)}.** A divergence above {COLLAPSE_NATS:g} nat per token usually means "
            "text of clearly lower quality. Read the samples below, keep more, or train the network a little."
        )
    return "\n\n".join(lines)


def reference(data: ReportData) -> str:
    """What divergences are taken from: a training moves the full network, and the others imitate that one."""
    return "the trained full network" if "training" in data else "the dense model"


def _networks(data: ReportData) -> list[Network]:
    trained = [data["training"]["network"]] if "training" in data else []
    return [data["dense"], *trained, *data["chosen"]]


def _figures(data: ReportData) -> str:
    networks = _networks(data)
    texts = list(dict.fromkeys(label for n in networks for label in n.get("perplexity", {})))
    head = ["network", "kept of blocks", "kept of all", "parameters", "weights"]
    rows = [
        [
            _cell(n["name"]),
            f"{100 * n['kept_blocks']:.2f} %",
            f"{100 * n['kept_all']:.2f} %",
            _millions(n["parameters"]),
            f"{n['n_bytes'] / 1e6:,.1f} MB",
        ]
        for n in networks
    ]
    if any("kl_nats" in n for n in networks):
        head.append(f"KL to {reference(data)} (nats)")
        for row, n in zip(rows, networks, strict=True):
            error = f" ± {n['kl_se']:.2g}" if "kl_se" in n else ""
            row.append(f"{n['kl_nats']:.4g}{error}" if "kl_nats" in n else "–")
    for text in texts:
        head.append(f"perplexity, {_cell(text)}")
        for row, n in zip(rows, networks, strict=True):
            row.append(f"{n['perplexity'][text]:.4g}" if text in n.get("perplexity", {}) else "–")
    if any("memory_bytes" in n for n in networks):
        head.append("weights and KV cache")
        for row, n in zip(rows, networks, strict=True):
            row.append(f"{n['memory_bytes'] / 1e6:,.1f} MB" if "memory_bytes" in n else "–")
    for title, key in (("prefill speed", "prefill_speedup"), ("decode speed", "decode_speedup")):
        if any(key in n for n in networks):
            head.append(title)
            for row, n in zip(rows, networks, strict=True):
                row.append(f"{n[key]:.2f}×" if key in n else "–")  # type: ignore[literal-required]
    return "## Figures\n\n" + table(head, rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is words, the others are numbers, aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _front(data: ReportData) -> str:
    what = "the decoder blocks' parameters" if data["keep_of"] == "blocks" else "all parameters"
    words = [
        "## Quality against size",
        "![quality against size](report/front.png)",
        f"Size is the share kept of {what}. Blue points are the checkpoints of this run, judged on held-out tokens; "
        "the labels are their parameters. Nothing was fitted to these tokens, but the last choices (between the best "
        "networks, of refitted layers) were made by some of them, so a test text of your own is the stricter judge.",
    ]
    if data["tried"]:
        words[-1] += (
            " Faint points are candidates that the search tried, judged on the search's own tokens before the final "
            "pass, so they are comparable with each other and only roughly with the blue ones."
        )
    return "\n\n".join(words)


def _times(data: ReportData) -> str:
    """Predicted and measured times, where a budget was a time."""
    if "latency" not in data:
        return ""
    key, request = data["latency"]["key"], data["latency"]["request"]
    columns = {
        "ms, predicted": ("predicted_ms", "{:,.4g}"),
        "ms, measured": ("measured_ms", "{:,.4g}"),
        "speed-up, predicted": ("predicted_speedup", "{:.2f}×"),
        "measured": ("measured_speedup", "{:.2f}×"),
        "tokens/s, predicted": ("predicted_tps", "{:,.4g}"),
        "tokens/s, measured": ("measured_tps", "{:,.4g}"),
        f"KL to {reference(data)} (nats)": ("kl_nats", "{:.4g}"),
    }
    rows = [
        [_cell(n["name"]), *(form.format(n[k]) if k in n else "–" for k, form in columns.values())]  # type: ignore[literal-required]
        for n in (data["dense"], *data["chosen"])
    ]
    return "\n\n".join(
        [
            "## Quality against time",
            "![quality against milliseconds of a request](report/latency.png)",
            f"One request: {request['batch']} x {request['prompt']} tokens of prompt, then {request['generate']} "
            f"tokens for each, in {key['runtime']} on {key['device']} ({key['dtype']}"
            + (f", threads: {key['threads']}" if key["threads"] else "")
            + "). Predicted times are sums from the table of this device below; measured ones are medians of runs in "
            "turns with the dense model, at another moment: speed-ups can be compared better than milliseconds.",
            table(["network", *columns], rows),
            "![milliseconds of every width](report/staircase.png)",
            f"While the table was measured, times of whole forwards varied by {100 * data['latency']['spread']:.1f} % "
            f"(half the distance of the quartiles); for the dense model, measured beside it, the table is off by "
            f"{100 * data['latency']['check']:.1f} %.",
        ]
    )


def _searched(data: ReportData) -> str:
    """A front of several objectives, beside its random-search control."""
    found = data.get("front")
    if not found:
        return ""
    names, own = found["objectives"], found["searched"]
    rows = [
        [str(row["point"]), _millions(row["parameters"]), f"{100 * row['kept']:.1f} %"]
        + [_on_axis(name, row["values"][name], row["errors"][name]) for name in names]
        for row in own["front"]
    ]
    return "\n\n".join(
        [
            f"## A front of {' and '.join(names)}",
            "![the searched front beside a random search](report/searched.png)",
            f"Blue, with the table's numbers: {found['method']}, {found['evaluations']} networks judged. Grey: as many "
            "random ones, of evenly spread sizes. Points with bars are each search's front, judged again on text (or "
            "task examples) that no search has seen, with standard errors; faint ones are all that was tried, on the "
            "search's own. Weights are one-shot, before the final pass. Hypervolume, the share of the box from the "
            "best to a little "
            f"beyond the worst of both fronts that each dominates: {own['hypervolume']:.3f} searched, "
            f"{found['control']['hypervolume']:.3f} at random. `search/front.json` holds every network, "
            "and `prunus pick RUN --point N` makes a checkpoint of a point.",
            table(["point", "parameters", "kept of blocks", *(_cell(title) for title in found["titles"])], rows),
        ]
    )


def _on_axis(name: str, value: float, error: float | None) -> str:
    if name in ("parameters", "bytes"):
        return f"{value:,.0f}"
    shown = f"{value / 1e9:,.4g} G" if name == "flops" else f"{value:.4g}"
    return shown if error is None else f"{shown} ± {error:.2g}"


def save_draws(draws: Mapping[str, Any], folder: Path) -> Path:
    """Draw the sizes that a training draws from as `sizes.png` and `.svg` into a folder; return the PNG's path."""
    drawn = {"uniform draws": draws["random"]}
    if draws.get("pool"):
        drawn[f"drawn from the pool, {draws['sampler']}"] = draws["pool"]
    return pictures.save(pictures.sizes(drawn, draws["least"], draws["most"]), folder / "sizes")[0]


def _training(data: ReportData) -> str:
    """What the super-network learnt, on what, and what the held-out windows say of it."""
    found = data.get("training")
    if not found:
        return ""
    together = f", {found['processes']} processes together" if found.get("processes", 1) > 1 else ""
    words = [
        "## What the training did",
        f"{found['steps']:,} steps, {found['tokens']:,} tokens of {_cell(found['data'])} in "
        f"{_lasted(found['seconds'])}{together}. Divergences on this page are from the full network as it is "
        "after that; a part of what the perplexities gain is the training's text, which the row of the full network "
        "shows.",
    ]
    for eased in found.get("eased", ()):
        changed = [f"{key} from {was} to {now}" for key, (was, now) in eased.items() if key != "step"]
        words.append(f"After step {eased['step']}: {', '.join(changed)}.")
    if scored := found.get("held_out"):
        names = [key.removeprefix("eval_").removesuffix("_nats") for key in scored[0] if key.endswith("_nats")]
        ends = (scored[0], scored[-1])
        rows = [[_cell(name), *(f"{row[f'eval_{name}_nats']:.4f}" for row in ends)] for name in names]
        words.append(table(["sub-network, nats per token of held-out windows", "before", "after"], rows))
    return "\n\n".join(words)


def _lasted(seconds: float) -> str:
    return f"{seconds / 60:,.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"


def _draws(data: ReportData) -> str:
    found = data.get("draws")
    if not found:
        return ""
    words = [
        "## What the training drew",
        "![sizes of uniform draws and of the pool](report/sizes.png)",
        "Uniform widths give skewed sizes; bins of parameter counts cure that.",
    ]
    if empty := found.get("empty"):
        named = ", ".join(f"{low / 1e6:.3g} to {high / 1e6:.3g}" for low, high in empty)
        words.append(
            f"{len(empty)} of {found['bins']} bins stayed empty after {found['attempts']:,} draws, so that the "
            f"training saw no network of these sizes, in millions of parameters: {named}."
        )
    return "\n\n".join(words)


def _kept(data: ReportData) -> str:
    if not data["chosen"]:
        return ""
    words = [
        "## What was kept in every layer",
        "![share of heads and neurons kept in every layer](report/kept.png)",
    ]
    gone = [line for n in data["chosen"] if (line := _dropped(n, data["dense"]))]
    if gone:
        words.append("Dropped whole sub-layers:\n\n" + "\n".join(gone))
    if data.get("error_curves"):
        words += [
            "![reconstruction error of every sub-layer](report/errors.png)",
            "The error left after the best linear reconstruction, for every nested level of every sub-layer.",
        ]
    return "\n\n".join(words)


def _dropped(network: Network, dense: Network) -> str:
    pairs = list(enumerate(zip(network["layers"], dense["layers"], strict=True)))
    attention = [str(i) for i, (n, d) in pairs if d[0] and not n[0] * n[1]]
    mlp = [str(i) for i, (n, d) in pairs if d[2] and not n[2]]
    words = [f"attention of layer {', '.join(attention)}"] if attention else []
    words += [f"MLP of layer {', '.join(mlp)}"] if mlp else []
    return f"- {network['name']}: {'; '.join(words)}" if words else ""


def _samples(data: ReportData) -> str:
    written = [n for n in _networks(data) if "sample" in n]
    if not written:
        return ""
    prompt = _quote(data.get("prompt", ""))
    words = ["## What they write", f"Greedy continuation of\n\n{prompt}" if data.get("prompt") else "Greedy samples."]
    words += [f"**{n['name']}**\n\n{_quote(n['sample'])}" for n in written]
    return "\n\n".join(words)


def _quote(text: str) -> str:
    """Text of a model as a code block by indentation, which no character in it can end."""
    return "\n".join(f"    {line}" for line in (text.splitlines() or [""]))


# ------------------------------------------------------------------------------------------------------------ loading


def _loading(data: ReportData) -> str:
    saved, types = [n for n in data["chosen"] if "path" in n], data.get("types")
    words, typed = [], ""
    if types:
        typed = f', dtype="{types["computed"]}"'
        words.append(
            f"The weights are stored in {types['stored']}, which this processor does not multiply: everything here was "
            f"computed and timed in {types['computed']}, and runs many times faster in it."
        )
    for uniform, title, argument in (
        (True, "Plain Transformers, no Prunus needed", ""),
        (False, "Layers of different widths: the checkpoint brings its own modelling file", ", trust_remote_code=True"),
    ):
        group = [n for n in saved if n.get("uniform", False) is uniform]
        if not group:
            continue
        names = ", ".join(f"`{n['path']}`" for n in group)
        words.append(f"{title} ({names}):")
        words.append(
            "```python\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{group[0]["path"]}"{argument}{typed})\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{group[0]["path"]}"{argument})\n'
            "```"
        )
        if not uniform:
            words.append("After `import prunus` the argument `trust_remote_code` is not needed.")
    return "\n\n".join(["## How to load them", "Paths are relative to this directory.", *words]) if words else ""


# --------------------------------------------------------------------------------------------------------------- cost


def _cost(data: ReportData) -> str:
    steps = data["steps"]
    if not steps:
        return ""
    head = ["step", "seconds", "forward tokens", "peak memory"]
    rows = [
        [_cell(s["name"]), f"{s['seconds']:,.1f}", f"{s['forward_tokens']:,.0f}", _gb(s["peak_bytes"])] for s in steps
    ]
    seconds, tokens = sum(s["seconds"] for s in steps), sum(s["forward_tokens"] for s in steps)
    peak = max(s["peak_bytes"] for s in steps)
    rows.append(["**whole run**", f"**{seconds:,.1f}**", f"**{tokens:,.0f}**", f"**{_gb(peak)}**"])
    on_gpu = [s.get("peak_cuda_bytes", 0) for s in steps]
    if any(on_gpu):
        head.append("peak GPU memory")
        for row, n in zip(rows, [*on_gpu, max(on_gpu)], strict=True):
            row.append(_gb(n))
    words = ["## What it cost", "![seconds, forward tokens and memory of every step](report/cost.png)"]
    words.append(table(head, rows))
    if "machine" in data:
        words.append(f"Machine: {data['machine']}.")
    return "\n\n".join(words)


# ------------------------------------------------------------------------------------------------------------- origin


def _origin(data: ReportData) -> str:
    facts = [["seed", str(data["seed"])], *_flat("weights", data["source"]), *_flat("calibration", data["calibration"])]
    facts += [[name, version] for name, version in data["versions"].items()]
    rows = [[_cell(name), f"`{_cell(value)}`"] for name, value in facts]
    return "\n\n".join(
        [
            "## How to get the same",
            f"```\n{data['command']}\n```",
            table(["fact", "value"], rows),
            "<details><summary>Configuration as resolved</summary>\n\n"
            f"```json\n{json.dumps(data['config'], indent=2)}\n```\n\n</details>",
        ]
    )


def _flat(title: str, facts: Mapping[str, Any]) -> list[list[str]]:
    return [[f"{title}: {name}", str(value)] for name, value in facts.items() if value is not None]


def _millions(parameters: int) -> str:
    return f"{parameters / 1e9:.3f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"


def _gb(n: int) -> str:
    return f"{n / 1e9:.2f} GB"


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
