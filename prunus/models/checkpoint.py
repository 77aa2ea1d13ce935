"""Floor 2: checkpoints in and out: load from anywhere, empty models of a sub-network's shape, save whole or not at all.

A sub-network whose layers are alike is written as a stock class of transformers; any other as a class of
`prunus.models.ragged`, whose file goes into the checkpoint. See docs/formats.md for what a checkpoint holds.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, GenerationConfig
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from prunus.errors import UserError
from prunus.models import ragged
from prunus.models.families import Family, dims
from prunus.models.loading import Loaded, Source, load
from prunus.models.memory import memory_need
from prunus.models.precision import stored
from prunus.recording.artefact import fingerprint, flush, matches, place, remove, writing
from prunus.subnetwork import LayerShape, SubNetwork

log = logging.getLogger(__name__)
MANIFEST = "prunus.json"
CARD = "README.md"
# keys that say which model this was, not what it is
_IDENTITY = (
    "model_type",
    "transformers_version",
    "architectures",
    "auto_map",
    "quantization_config",
    "_name_or_path",
    "_model_name_or_path",
)

# ------------------------------------------------------------------------------- configurations of smaller models


def uniform_refusal(config: Any, family: Family, sub: SubNetwork) -> str | None:
    """The sentence that says why no stock configuration can hold the sub-network; None if one can."""
    if not sub.uniform:
        return (
            f"its layers differ in width or lack a sub-layer, and a stock {config.model_type} configuration has one "
            "width for all layers"
        )
    d, shape = dims(config), sub.layers[sub.alive[0]]
    heads = shape.kv_heads * shape.q_per_kv
    inner = heads * d["head_dim"]
    square = f"{heads} heads of {d['head_dim']} = {inner} against a hidden size of {sub.hidden}"
    if inner != sub.hidden and not family.stock_heads:
        return (
            f"a stock {config.model_type} configuration has no head size of its own: heads x head size must be the "
            f"hidden size, but here it is {square}"
        )
    if inner != sub.hidden and getattr(config, "qk_layernorm", False):
        return (
            f"a stock {config.model_type} model with qk_layernorm sizes those norms hidden size / heads, which is not "
            f"the head size here ({square})"
        )
    if getattr(config, "scale_attn_by_inverse_layer_idx", False) and sub.alive != tuple(range(len(sub.alive))):
        return (
            f"this {config.model_type} divides attention scores by the layer's number, and a stock configuration would "
            "number the layers that are left anew"
        )
    if sub.hidden % heads and _carrier(config, family, sub) == "llama":
        return (
            f"a stock llama configuration wants a hidden size that is a multiple of the heads ({sub.hidden} and "
            f"{heads} here), and Mistral, which does not, has no biases to hold this model's"
        )
    try:
        _stock_config(config, family, sub)
    except Exception as error:  # transformers raises several kinds; all of them mean no
        reason = str(error.__cause__ or error).rstrip(".")
        return f"the stock {config.model_type} configuration refuses its shape: {reason}"
    return None


def _carrier(config: Any, family: Family, sub: SubNetwork) -> str:
    """The stock model type that holds a uniform sub-network: its own, or Mistral for a Llama of odd proportions.

    Mistral without a sliding window is the same function with the same tensor names, and its configuration accepts
    any head size.
    """
    shape = sub.layers[sub.alive[0]]
    odd = config.model_type == "llama" and sub.hidden % (shape.kv_heads * shape.q_per_kv) != 0
    biased = bool(getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False))
    return "mistral" if odd and not biased else str(config.model_type)


def _frame(config: Any, family: Family, sub: SubNetwork) -> dict[str, Any]:
    """Every key of the new config.json but the widths of the layers."""
    raw = {key: value for key, value in config.to_dict().items() if key not in _IDENTITY}
    raw |= {family.key("hidden"): sub.hidden, family.key("layers"): len(sub.alive)}
    if "word_embed_proj_dim" in raw:  # OPT: the size of its embeddings
        raw["word_embed_proj_dim"] = sub.hidden
    if raw.get("layer_types"):  # which layers see all tokens and which a window: a property of each layer
        raw["layer_types"] = [raw["layer_types"][i] for i in sub.alive]
    return raw


def _widths(config: Any, family: Family, shape: LayerShape) -> dict[str, int]:
    widths = {}
    if shape.attends:
        widths[family.key("heads")] = shape.kv_heads * shape.q_per_kv
        if hasattr(config, "num_key_value_heads"):
            widths["num_key_value_heads"] = shape.kv_heads
    if shape.mlp:
        widths[family.key("mlp")] = shape.mlp
    return widths


def _stock_config(config: Any, family: Family, sub: SubNetwork) -> Any:
    shape, head_dim = sub.layers[sub.alive[0]], dims(config)["head_dim"]
    raw = _frame(config, family, sub) | _widths(config, family, shape)
    if raw.get("head_dim") or shape.kv_heads * shape.q_per_kv * head_dim != sub.hidden:
        raw["head_dim"] = head_dim
    carrier = _carrier(config, family, sub)
    if carrier != config.model_type:
        for key in ("attention_bias", "mlp_bias", "pretraining_tp"):
            raw.pop(key, None)
        raw |= {"sliding_window": None, "head_dim": head_dim}
    return CONFIG_MAPPING[carrier](**raw)


def _ragged_config(config: Any, family: Family, sub: SubNetwork) -> Any:
    raw = _frame(config, family, sub)
    whole = dims(config)
    raw["head_dim"] = whole["head_dim"]
    first = sub.layers[sub.alive[0]]
    mlp = next((shape.mlp for shape in sub.layers if shape.mlp), whole["mlp"])
    raw |= _widths(config, family, LayerShape(first.kv_heads, first.q_per_kv, mlp))  # what layers have unless they say
    renumbered = sub.alive != tuple(range(len(sub.alive)))
    layers: dict[int, dict[str, Any]] = {}
    for new, old in enumerate(sub.alive):
        shape = sub.layers[old]
        layers[new] = dict(_widths(config, family, shape))
        skip = [part for part, kept in (("attention", shape.attends), ("mlp", shape.mlp)) if not kept]
        if skip:
            layers[new]["skip"] = skip
        if renumbered and getattr(config, "scale_attn_by_inverse_layer_idx", False):
            layers[new]["original_layer"] = old
    raw["per_layer_config"] = layers
    return ragged.CLASSES[f"prunus_{config.model_type}"][0](**raw)


def blank(config: Any, family: Family, sub: SubNetwork, *, uniform: bool | None, dtype: torch.dtype) -> nn.Module:
    """A causal language model of the sub-network's shape, whose weights are **not initialised**: load a state_dict.

    uniform: True wants a stock class and raises UserError where none can hold it; False wants the ragged class; None
    takes the stock class where it can. The attention implementation is that of `config`.
    """
    refusal = None if uniform is False else uniform_refusal(config, family, sub)
    if uniform and refusal:
        raise UserError(
            f"a uniform (stock) checkpoint was asked for, but {refusal}. Search uniform sub-networks that fit, or "
            "export a ragged checkpoint"
        )
    cls: Any
    if uniform is False or refusal:
        small = _ragged_config(config, family, sub)
        cls = ragged.CLASSES[small.model_type][2]
    else:
        small = _stock_config(config, family, sub)
        cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(small)]
    if config._attn_implementation:
        small._attn_implementation = config._attn_implementation
    with no_init_weights():
        model: Any = cls._from_config(small, dtype=dtype)
    model.tie_weights()
    return model  # type: ignore[no-any-return]


# --------------------------------------------------------------------------------------------------------- saving


def save(
    model: Any,
    tokenizer: Any,
    directory: str | Path,
    *,
    card: str,
    manifest: Mapping[str, Any],
    generation_config: Any = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a checkpoint that `from_pretrained` loads: whole, or not at all.

    Everything is written beside `directory`, flushed, then renamed. A directory that Prunus wrote before is replaced;
    any other that is not empty is refused with UserError, as are a full disk and missing permission.
    card: README.md; manifest: kept in prunus.json with the size and SHA-256 of every file. tokenizer may be None.
    dtype: that the weights are rounded to (**in place**) and written in; None: the model's own.
    """
    dtype = dtype or next(model.parameters()).dtype

    def fill(partial: Path) -> None:
        with _generation_config(model, generation_config), stored(model, dtype):
            model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        tidy_tokenizer(partial)
        _edit(partial / "config.json", _older_config)
        open_to_all(partial)
        (partial / CARD).write_text(card, encoding="utf-8")

    unique = {p.data_ptr(): p.numel() * dtype.itemsize for p in model.parameters()}
    save_files(directory, fill, n_bytes=sum(unique.values()), manifest=manifest)


def save_files(
    directory: str | Path, fill: Callable[[Path], None], *, n_bytes: int, manifest: Mapping[str, Any]
) -> None:
    """Write a directory whole or not at all: `fill` writes into another one, which is flushed, then renamed.

    n_bytes: about what it will take. Refuses as `save` does; if `fill` raises, what stood there stays.
    """
    target = Path(directory).absolute()
    refuse_foreign(target)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    with writing(target, partial):
        target.parent.mkdir(parents=True, exist_ok=True)
        _refuse_full(n_bytes, target)
        remove(partial)
        partial.mkdir()
        fill(partial)
        text = json.dumps({**manifest, "files": fingerprint(partial)}, indent=1)
        (partial / MANIFEST).write_text(text + "\n", encoding="utf-8")
        flush(partial)
        _exchange(partial, target)


def _exchange(partial: Path, target: Path) -> None:
    """Give a finished directory its name; the one that had it is deleted only then, and put back if that fails.

    Files that somebody put into it (an exported one, say) are carried over, but for names that are taken; where its
    manifest cannot be read, all of it stays beside the new one.
    """
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    replaced = target.exists()
    if replaced:
        os.replace(target, old)
    try:
        place(partial, target)
    except BaseException:
        if replaced and not target.exists():
            os.replace(old, target)
        raise
    if replaced:
        try:
            for path in _added(old):
                new = target / path.relative_to(old)
                if not os.path.lexists(new):
                    new.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, new)
            remove(old)
        except (OSError, ValueError, KeyError, TypeError):  # what is whose cannot be told: nothing is lost
            names = (target.with_name(f"{target.name}.before-{n}") for n in count(1))
            beside = next(path for path in names if not os.path.lexists(path))
            os.replace(old, beside)
            log.warning("%s was replaced; what it held is in %s, since its record of files is damaged", target, beside)


def _added(directory: Path) -> list[Path]:
    """Files and links in a directory of ours that its manifest does not name."""
    if not any(directory.iterdir()):
        return []
    own = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
    known = {directory / name for name in (*own, MANIFEST)}
    return [path for path in directory.rglob("*") if (path.is_symlink() or path.is_file()) and path not in known]


def refuse_foreign(target: Path) -> None:
    """Raise UserError where `save` would not write: a directory that holds what Prunus did not write."""
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST).is_file())):
        raise UserError(
            f"{str(target)!r} exists and was not written by Prunus (it has no {MANIFEST}); choose another directory, "
            "or empty this one"
        )


def _refuse_full(n_bytes: int, target: Path) -> None:
    """Raise UserError before writing where the weights cannot fit."""
    import shutil

    need, free = n_bytes + 2**24, shutil.disk_usage(target.parent).free
    if need > free:
        raise UserError(
            f"cannot write {str(target)!r}: it needs {need / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; "
            "make room or choose another directory"
        )


@contextlib.contextmanager
def _generation_config(model: Any, wanted: Any) -> Iterator[None]:
    """For the time of saving, give the model a generation config that transformers agrees to write."""
    before = model.generation_config
    chosen = copy.deepcopy(wanted if wanted is not None else before)
    try:
        if chosen is not None:
            chosen.validate(strict=True)
    except ValueError:  # published files often name sampling options without switching sampling on
        chosen.do_sample = True
        try:
            chosen.validate(strict=True)
        except ValueError:
            tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
            chosen = GenerationConfig(**{name: getattr(chosen, name) for name in tokens})  # type: ignore[no-untyped-call]
    model.generation_config = chosen
    try:
        yield
    finally:
        model.generation_config = before


def open_to_all(directory: Path) -> None:
    """Give every file the permissions of config.json: safetensors leaves its files readable by their owner only."""
    mode = (directory / "config.json").stat().st_mode
    for path in directory.rglob("*"):
        if path.is_file():  # a tokenizer with several chat templates has a folder of them
            path.chmod(mode)


def _edit(path: Path, change: Any) -> None:
    if path.is_file():
        raw = json.loads(path.read_text(encoding="utf-8"))
        change(raw)
        path.write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tidy_tokenizer(directory: Path) -> None:
    """Spell a saved tokenizer's configuration so that older programs read it too (**in place**)."""
    _edit(directory / "tokenizer_config.json", _older_tokenizer)


def _older_tokenizer(raw: dict[str, Any]) -> None:
    """Spell the class as transformers 4 knows it, which transformers 5 loads too; forget where it was read from."""
    for key in ("is_local", "local_files_only"):
        raw.pop(key, None)
    if raw.get("tokenizer_class") == "TokenizersBackend":
        raw["tokenizer_class"] = "PreTrainedTokenizerFast"
        raw.setdefault("model_input_names", ["input_ids", "attention_mask"])


def _older_config(raw: dict[str, Any]) -> None:
    """Write RoPE a second time under the keys that transformers 4 reads, which would else assume a default."""
    rope = raw.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    full = rope.get("full_attention", rope)
    if not isinstance(full, dict) or "rope_theta" not in full:
        return
    raw.setdefault("rope_theta", full["rope_theta"])
    if "sliding_attention" in rope:
        raw.setdefault("rope_local_base_freq", rope["sliding_attention"]["rope_theta"])
    if "partial_rotary_factor" in full:
        name = "rotary_pct" if raw["model_type"].endswith("gpt_neox") else "partial_rotary_factor"
        raw.setdefault(name, full["partial_rotary_factor"])
    if full.get("rope_type", "default") != "default":
        known = ("rope_theta", "partial_rotary_factor")
        raw.setdefault("rope_scaling", {key: value for key, value in full.items() if key not in known})


def verify(directory: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint, once every file has the size and checksum that it names; UserError if not."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise UserError(f"{str(directory)!r} has no {MANIFEST}, so it is no checkpoint of Prunus")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        files = manifest["files"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{str(path)!r} is damaged ({error}); fetch or write the checkpoint again") from error
    for name, one in files.items():
        if not matches(path.parent / name, {"": one}):
            raise UserError(f"{name!r} in {str(directory)!r} is not the file that was written; fetch or write it again")
    return manifest


__all__ = [
    "CARD",
    "MANIFEST",
    "Loaded",
    "Source",
    "blank",
    "load",
    "memory_need",
    "refuse_foreign",
    "save",
    "save_files",
    "tidy_tokenizer",
    "uniform_refusal",
    "verify",
]
