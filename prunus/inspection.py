"""Floor 5: what a model is made of, whether it can be compressed, and how long its widths take on this device."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from prunus.config import CompressConfig
from prunus.models import costs
from prunus.models.checkpoint import uniform_refusal
from prunus.models.families import dims, family_of, full
from prunus.models.loading import device_named, load_configured, usable
from prunus.models.memory import Work, available, memory_needs
from prunus.progress import Progress, silent
from prunus.recording import pictures
from prunus.subnetwork import SubNetwork
from prunus.timing import runtimes
from prunus.timing.timetable import Timetable, cached_path

SUB_LAYERS: tuple[Literal["attention", "mlp", "block"], ...] = ("attention", "mlp", "block")


def inspect_model(config: CompressConfig) -> dict[str, Any]:
    """Loads a model, checks it against its family table, and counts its parameters by part.

    Raises UserError where it cannot be loaded, has no table, or does not agree with it.
    """
    free = available(str(usable(device_named(config.device))))  # before the weights take their part of it
    loaded = load_configured(config)
    model = loaded.model
    family, whole, size = family_of(model.config), full(model.config), dims(model.config)
    layout = costs.layout(model, family)
    total = costs.parameters(layout, whole, "all")
    blocks = costs.parameters(layout, whole, "blocks")
    each = {
        part: sum(
            costs.sublayer_parameters(layout, i, part, shape, whole.hidden) for i, shape in enumerate(whole.layers)
        )
        for part in SUB_LAYERS
    }
    steps = memory_needs(model.config, model.dtype, Work.of(config))
    parts = {
        "attention": each["attention"],
        "MLP": each["mlp"],
        "norms that both read": each["block"],
        "outside the blocks": total - blocks,
    }
    return {
        "model": config.model,
        "model_type": model.config.model_type,
        "family": f"{family.name}: the table covers every parameter",
        "layers": len(whole.layers),
        **{name: size[name] for name in ("hidden", "kv_heads", "q_per_kv", "head_dim", "mlp", "vocab")},
        "dtype": str(loaded.dtype).removeprefix("torch."),
        **({} if model.dtype == loaded.dtype else {"computes in": str(model.dtype).removeprefix("torch.")}),
        "parameters": total,
        "parameters_in_blocks": blocks,
        "weights_bytes": total * loaded.dtype.itemsize,
        "memory_needed_bytes": model.num_parameters() * model.dtype.itemsize + max(steps.values(), default=0),
        "memory_free_bytes": free,
        "uniform_export": uniform_refusal(model.config, family, whole) or "yes, as a stock checkpoint",
        "source_sha256": loaded.source.sha256,
        "steps": [{"step": name, "beside_the_weights_bytes": n} for name, n in steps.items()],
        "parts": [
            {"part": name, "parameters": n, "share": f"{100 * n / total:.1f} %"} for name, n in parts.items() if n
        ],
    }


def inspect_latency(
    config: CompressConfig,
    *,
    step: int | None = None,
    again: bool = False,
    picture: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """The table of a model on this device, measured or from the cache: its facts, and a row for every width.

    picture: where the stairs are drawn, with or without the suffix. Raises UserError where the model cannot be loaded,
    has no table of a family, or does not fit.
    """
    budget = config.budget
    loaded = load_configured(config)
    model = loaded.model
    family = family_of(model.config)
    request = runtimes.request_of(budget)
    table = runtimes.measure(model, family, budget, step=step, again=again, progress=progress)
    drawn = [str(path) for path in pictures.save(pictures.staircase(table), _stem(picture))] if picture else []
    whole, key = full(model.config), table.key
    return {
        "model": config.model,
        **{name: key[name] for name in ("runtime", "device", "threads", "dtype", "attention")},
        "request": f"{request.batch} x {request.prompt} tokens of prompt, {request.generate} generated",
        "dense_prefill_ms": table.ms(whole, "prefill"),
        "dense_token_ms": table.ms(whole, "decode"),
        "dense_request_ms": table.request_ms(whole),
        "tokens_per_second": table.tokens_per_second(whole),
        "outside_the_layers_ms": f"{table.prefill.outside:.4g} prefill, {table.decode.outside:.4g} a token",
        "empty_layer_ms": f"{table.prefill.empty:.4g} prefill, {table.decode.empty:.4g} a token",
        "unrest": f"{100 * table.spread:.1f} %",
        "error_for_a_network_left_out": f"{100 * table.check:.1f} %",
        "table": str(cached_path(key)),
        **({"picture": drawn[0]} if drawn else {}),
        "widths": _rows(table, whole),
    }


def _stem(picture: str) -> Path:
    """Where a picture goes, without the suffix of either of its two files."""
    path = Path(picture)
    return path.with_suffix("") if path.suffix in (".png", ".svg") else path


def _rows(table: Timetable, whole: SubNetwork) -> list[dict[str, Any]]:
    """Each width alone in its layer."""
    rows = []
    full_layer = whole.layers[0]
    for i, kv in enumerate(table.grid.kv_heads):
        for j, q in enumerate(table.grid.q_per_kv):
            share = kv * q / (full_layer.kv_heads * full_layer.q_per_kv)
            times = (table.prefill.attention[i][j], table.decode.attention[i][j])
            rows.append(_row(f"attention {kv} x {q}", share, *times))
    for i, width in enumerate(table.grid.mlp):
        rows.append(_row(f"MLP {width}", width / full_layer.mlp, table.prefill.mlp[i], table.decode.mlp[i]))
    return rows


def _row(part: str, share: float, prefill: float, decode: float) -> dict[str, Any]:
    return {"part": part, "share": f"{100 * share:.0f} %", "prefill_ms": prefill, "token_ms": decode}
