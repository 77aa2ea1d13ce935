"""Floor 5: what a model is made of, and whether it can be compressed, before anybody waits for it."""

from __future__ import annotations

from typing import Any, Literal

from prunus import costs
from prunus.checkpoint import uniform_refusal
from prunus.config import CompressConfig
from prunus.families import dims, family_of, full
from prunus.loading import load
from prunus.memory import available, memory_need

SUB_LAYERS: tuple[Literal["attention", "mlp", "block"], ...] = ("attention", "mlp", "block")


def inspect_model(config: CompressConfig) -> dict[str, Any]:
    """Loads a model, checks it against its family table, and counts its parameters by part.

    Raises UserError where it cannot be loaded, has no table, or does not agree with it.
    """
    loaded = load(
        config.model,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )
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
    parts = {
        "attention": each["attention"],
        "MLP": each["mlp"],
        "norms that both read": each["block"],
        "outside the blocks": total - blocks,
    }
    width = next(model.parameters()).element_size()
    return {
        "model": config.model,
        "model_type": model.config.model_type,
        "family": f"{family.name}: the table covers every parameter",
        "layers": len(whole.layers),
        **{name: size[name] for name in ("hidden", "kv_heads", "q_per_kv", "head_dim", "mlp", "vocab")},
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": total,
        "parameters_in_blocks": blocks,
        "weights_bytes": total * width,
        "memory_needed_bytes": memory_need(
            model.config, model.dtype, samples=config.calibration.samples, length=config.calibration.length
        ),
        "memory_free_bytes": available(str(model.device)),
        "uniform_export": uniform_refusal(model.config, family, whole) or "yes, as a stock checkpoint",
        "source_sha256": loaded.source.sha256,
        "parts": [
            {"part": name, "parameters": n, "share": f"{100 * n / total:.1f} %"} for name, n in parts.items() if n
        ],
    }
