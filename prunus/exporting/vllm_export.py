"""Floor 5: a checkpoint that vLLM's own classes load: as it is, or with DeciLM's `block_configs` for ragged layers.

vLLM's DeciLM (nemotron-nas) is a Llama in which every layer has its own number of KV heads and its own MLP width, and
may lack either sub-layer; the number of query heads is one for all. `benchmarks/serve_vllm.py` compares vLLM itself.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from prunus.errors import UserError
from prunus.exporting import decilm
from prunus.exporting.agreement import N_TOKENS, log_probabilities, text_tokens
from prunus.exporting.architectures import Shapes, rope_of, shapes_of
from prunus.exporting.onnx_graph import has_window
from prunus.models import checkpoint, ragged
from prunus.models.checkpoint import save_files, tidy_tokenizer
from prunus.models.loading import Loaded
from prunus.progress import Progress

CARRIED = ("llama", "mistral", "qwen2")  # what DeciLM's layers compute
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_OTHER = ("per_layer_config", "model_type", "auto_map", "architectures", "transformers_version", "layer_types")


def write(loaded: Loaded, target: Path, progress: Progress) -> dict[str, Any]:
    """Write the checkpoint into a directory, whole or not at all; what was written and how it was tried.

    Raises UserError where vLLM has no class for the model's layers, naming what to search instead.
    """
    model, shapes = loaded.model, shapes_of(loaded.model.config)
    stock = is_stock(shapes)
    raw = None if stock else block_configuration(model.config, shapes)
    tokens = text_tokens(loaded.tokenizer)[: min(N_TOKENS, int(model.config.max_position_embeddings))]
    model.set_attn_implementation("eager")
    reference = log_probabilities(model, tokens)

    def fill(partial: Path) -> None:
        with progress("writing"):
            model.save_pretrained(partial)
            loaded.tokenizer.save_pretrained(partial)
            tidy_tokenizer(partial)
        if raw is not None:
            (partial / f"{ragged.MODULE}.py").unlink(missing_ok=True)
            (partial / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
            shutil.copyfile(str(decilm.__file__), partial / f"{decilm.MODULE}.py")
        checkpoint.open_to_all(partial)
        with progress("verification"):
            again = _stock_again(partial, model) if stock else rebuilt(partial, model.dtype)
            again.to(model.device).set_attn_implementation("eager")
            if not torch.equal(log_probabilities(again, tokens), reference):
                raise UserError(
                    "what was written does not give the same logits when it is read again; please report it"
                )

    n_bytes = sum({p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}.values())
    save_files(target, fill, n_bytes=n_bytes, manifest={"format": "vllm", "source": vars(loaded.source)})
    if stock:
        notes = ["all layers are alike: this is a stock checkpoint, and vLLM reads the original just as well"]
        how = "read again by the stock class: the same logits to the last bit"
    else:
        notes = [f"vllm serve {target.name} --trust-remote-code: the configuration class comes with the checkpoint"]
        how = "rebuilt from block_configs as vLLM reads them: the same logits to the last bit"
    return {
        "file": str(target),
        "architecture": type(model).__name__ if stock else "DeciLMForCausalLM",
        "file_bytes": sum(path.stat().st_size for path in target.glob("*.safetensors")),
        "layers": len(shapes.layers),
        "verified": f"{how}; not loaded in vLLM (benchmarks/serve_vllm.py does that, in an environment of its own)",
        "tokens_compared": len(tokens),
        "notes": notes,
    }


def is_stock(shapes: Shapes) -> bool:
    """True if vLLM's own class of the family holds the model: its Qwen2 takes a head for hidden size / heads."""
    first = shapes.layers[0]
    square = first.kv_heads * first.q_per_kv * shapes.head_dim == shapes.hidden
    return shapes.alike and (square or shapes.model_type != "qwen2")


def block_configuration(config: Any, shapes: Shapes) -> dict[str, Any]:
    """The config.json of a DeciLM of these shapes; raises UserError where its layers cannot hold them."""
    if refusal := _refusal(config, shapes):
        as_is = "" if any(not s.attends for s in shapes.layers) else (
            " The checkpoint itself, as it is, runs in vLLM's slower transformers backend: vllm serve CHECKPOINT "
            "--trust-remote-code (tried with vLLM 0.32 for llama; docs/formats.md)."
        )  # fmt: skip
        raise UserError(
            f"vLLM's class for layers of different widths (DeciLM) cannot hold this model: {refusal}. Search with "
            "search.attention=whole (--attention whole), which cuts attention whole or not at all, or with --uniform."
            + as_is
        )
    first = next(shape for shape in shapes.layers if shape.attends)
    raw = {key: value for key, value in config.to_dict().items() if key not in _OTHER}
    raw |= {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": decilm.DeciLMConfig.model_type,
        "auto_map": {"AutoConfig": f"{decilm.MODULE}.{decilm.DeciLMConfig.__name__}"},
        "num_attention_heads": first.kv_heads * first.q_per_kv,
        "num_key_value_heads": first.kv_heads,
        "head_dim": shapes.head_dim,
        "intermediate_size": max(shape.mlp for shape in shapes.layers),
        "block_configs": [_block(shape) for shape in shapes.layers],
    }
    raw["sliding_window"] = None
    if shapes.model_type == "qwen2":
        raw["qkv_bias"] = True  # queries, keys and values have biases, the output projection has none
    return raw


def _block(shape: Any) -> dict[str, dict[str, Any]]:
    attention = {"no_op": not shape.attends, "n_heads_in_group": shape.q_per_kv if shape.attends else None}
    ffn = {"no_op": not shape.mlp, "intermediate_size": shape.mlp or None}
    return {part: {**own, "replace_with_linear": False} for part, own in (("attention", attention), ("ffn", ffn))}


def _refusal(config: Any, shapes: Shapes) -> str | None:
    if shapes.model_type not in CARRIED:
        return f"it computes what {', '.join(CARRIED)} do, and this is a {shapes.model_type}"
    heads = {shape.kv_heads * shape.q_per_kv for shape in shapes.layers if shape.attends}
    if len(heads) > 1:
        few = ", ".join(map(str, sorted(heads)))
        return f"it has one number of query heads for all layers, and here they have {few}"
    if not shapes.layers[0].attends:
        return "its first layer must keep its attention"
    if has_window(config):
        return f"its layers see all tokens, and here a sliding window of {config.sliding_window}"
    if str(config.hidden_act) not in ("silu", "swish"):
        return f"its MLP computes silu, not {config.hidden_act}"
    kind = rope_of(config).get("rope_type", "default")
    return None if kind in ROPE_TYPES else f"RoPE of type {kind} has not been tried in it"


# ----------------------------------------------------------------------------------------------------- reading it back


def rebuilt(directory: Path, dtype: torch.dtype) -> Any:
    """The model that `block_configs` describe, as vLLM's DeciLM reads them, in our ragged classes, with the weights.

    Raises UserError where a weight is missing, left over, or of another shape.
    """
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config = decilm.DeciLMConfig(**{k: v for k, v in raw.items() if k not in ("model_type", "auto_map")})
    layers: dict[int, dict[str, Any]] = {}
    for i, block in enumerate(config.block_configs):
        own: dict[str, Any] = {"num_attention_heads": config.num_attention_heads}
        if not block.attention.no_op:
            own["num_key_value_heads"] = config.num_attention_heads // block.attention.n_heads_in_group
        if not block.ffn.no_op:
            own["intermediate_size"] = block.ffn.intermediate_size
        if skip := [name for name, part in (("attention", block.attention), ("mlp", block.ffn)) if part.no_op]:
            own["skip"] = skip
        layers[i] = own
    flat = {k: v for k, v in raw.items() if k not in (*_OTHER, "block_configs", "qkv_bias")}
    own_config, _, own_class = ragged.CLASSES["prunus_qwen2" if getattr(config, "qkv_bias", False) else "prunus_llama"]
    with no_init_weights():
        small: Any = own_class._from_config(  # type: ignore[attr-defined]
            own_config(**flat, per_layer_config=layers), dtype=dtype
        )
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        weights |= load_file(path)
    if small.config.tie_word_embeddings:
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    try:
        small.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the weights are not those that block_configs describe: {error}; please report it") from error
    small.tie_weights()
    return small.eval()


def _stock_again(directory: Path, model: Any) -> Any:
    again: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=model.dtype)
    return again.eval()
