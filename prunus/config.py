"""Floor 0: what a run is asked to do. Frozen dataclasses, read from YAML and from flags over it; no torch.

A setting is declared once, in its dataclass: default, sentence of help, range, and the step that first reads it. Flags,
checks, the file `config.yaml` of a run and the question "may this change on an existing run?" derive from that.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from prunus.errors import UserError

STEPS = ("calibrate", "score", "reform", "search", "extract", "evaluate", "report")  # in the order they run
ANYWHERE = "anywhere"  # the step of settings that say where to compute, not what: they may differ on an existing run


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    step: str,
    flag: str | None = None,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
) -> Any:
    """A dataclass field that knows what a person asks about it; the range is low <= value <= high, value > above."""
    return field(
        default=default, metadata={"help": help, "step": step, "flag": flag, "low": low, "above": above, "high": high}
    )


class _Section:
    """Checks and tidies its own values ("1e-3" -> 0.001, a list -> a tuple) when it is made; raises UserError."""

    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        known = settings()
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            if one := known.get(self.prefix + f.name):
                object.__setattr__(self, f.name, one.parse(getattr(self, f.name)))


@dataclass(frozen=True)
class CalibrationConfig(_Section):
    """Text that the method may look at; never test text."""

    prefix: ClassVar[str] = "calibration."
    source: str = setting(
        "auto",
        "a data set (wikitext2, c4), a .txt or .jsonl file, `generated` (the model's own samples), or `auto`: "
        "wikitext2 where a hub is reachable, else generated",
        step="calibrate",
        flag="calibration",
    )
    samples: int = setting(64, "calibration sequences", step="calibrate", flag="samples", low=1)
    length: int = setting(1024, "tokens in each calibration sequence", step="calibrate", flag="length", low=8)
    holdout: int = setting(
        16, "further sequences of the same source, kept aside to accept or refuse a change", step="calibrate", low=1
    )
    column: str | None = setting(None, "field of a .jsonl file that holds the text", step="calibrate", flag="column")


@dataclass(frozen=True)
class ScoreConfig(_Section):
    """How important each unit of the network is."""

    prefix: ClassVar[str] = "score."
    method: Literal["obs", "wanda", "activation", "taylor", "magnitude"] = setting(
        "obs", "importance score", step="score", flag="score"
    )
    aggregator: Literal[
        "mean",
        "norm",
        "norm-mean",
        "mean-norm",
        "variance",
        "variance-norm",
        "variance-mean",
        "mean-variance",
        "norm-variance",
    ] = setting(
        "mean",
        "how the score `activation` gathers a batch and then its sequences",
        step="score",
        flag="aggregator",
    )


@dataclass(frozen=True)
class ReformConfig(_Section):
    """How the weights that stay take over the work of those that go."""

    prefix: ClassVar[str] = "reform."
    method: Literal["closed-form", "admm", "none"] = setting(
        "closed-form", "reformation of the kept weights", step="reform", flag="reform"
    )
    damping: float = setting(
        0.003, "ridge, as a share of what is typical on the Gram matrix's diagonal", step="score", low=0.0
    )
    fisher: int = setting(
        8,
        "calibration sequences that the loss's curvature is taken from, to weigh errors by; 0: none",
        step="score",
        low=0,
    )
    openings: int = setting(
        1024, "single tokens that are fitted as first ones of a text, where attention sinks form", step="score", low=0
    )
    block: int = setting(16, "neurons that the greedy order removes at a time", step="score", low=1)
    sensitivity: int = setting(
        0, "levels of each sub-layer whose divergence is measured; 0: trust the curvature", step="reform", low=0
    )
    order: Literal["greedy", "score"] = setting(
        "greedy", "order of units: greedy removal with compensation, or the score as it is", step="score"
    )
    iterations: int = setting(30, "iterations of ADMM", step="reform", low=1)
    sequential: bool = setting(
        True, "refit each chosen network from the inputs that its own compressed layers produce", step="extract"
    )
    sequential_samples: int | None = setting(
        None, "calibration sequences that the pass uses; `none` for all", step="extract", low=1
    )
    sequential_damping: float = setting(
        0.3, "ridge of that pass, towards the reformed weights", step="extract", low=0.0
    )
    readers: float | None = setting(
        0.3,
        "ridge of that pass for the matrices that read the residual stream; `none` leaves them",
        step="extract",
        low=0.0,
    )
    drift: float = setting(
        1.0, "share of the residual stream's drift that the pass is asked to undo", step="extract", low=0.0, high=2.0
    )


@dataclass(frozen=True)
class SearchConfig(_Section):
    """Which widths each network keeps."""

    prefix: ClassVar[str] = "search."
    method: Literal["levels", "shen", "random", "nsga2"] = setting(
        "levels",
        "levels (error curves, then level-switch evolution), shen (as published), random, nsga2",
        step="search",
        flag="search",
    )
    objective: Literal["kl", "ppl"] = setting(
        "kl",
        "what a candidate is judged by: KL divergence to the dense model, or perplexity",
        step="search",
        flag="objective",
    )
    constraint: Literal["parameters-blocks", "parameters-all", "bytes", "flops"] | None = setting(
        None,
        "what a keep ratio counts; by default the parameters that --keep-of names",
        step="search",
        flag="constraint",
    )
    generations: int = setting(
        1, "generations of the evolution, for each ratio", step="search", flag="generations", low=0
    )
    population: int = setting(8, "candidates that survive a generation", step="search", low=1)
    offspring: int = setting(16, "candidates tried in each generation", step="search", flag="offspring", low=1)
    slack: float = setting(
        0.002, "how far below its budget a network may stay, as a share of the budget", step="search", above=0, high=0.2
    )
    mlp_step: int = setting(32, "neurons between two levels of an MLP", step="reform", low=1)
    depth: bool = setting(True, "whole attention and MLP sub-blocks may go", step="reform")
    hidden: bool = setting(False, "the hidden size may shrink", step="search")
    workers: int = setting(1, "processes that share the search", step=ANYWHERE, flag="workers", low=1)


@dataclass(frozen=True)
class CompressConfig(_Section):
    """Everything that decides what `compress` makes of a model; where it is written is not part of it."""

    model: str = setting(help="a hub id, a local directory, a .gguf file, or `demo`", step="calibrate")
    keep: tuple[float, ...] = setting(
        (0.9, 0.8, 0.7, 0.6, 0.5),
        "shares to keep, one checkpoint for each",
        step="search",
        flag="keep",
        above=0,
        high=1,
    )
    keep_of: Literal["blocks", "all"] = setting(
        "blocks",
        "the parameters that --keep is a share of: those in the transformer blocks, or all",
        step="search",
        flag="keep-of",
    )
    uniform: bool = setting(
        False, "only networks that a stock configuration can describe (all layers alike)", step="search", flag="uniform"
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps", step=ANYWHERE, flag="device")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "of the weights; auto is what the checkpoint was saved in", step="calibrate", flag="dtype"
    )
    seed: int = setting(0, "all randomness follows from it", step="calibrate", flag="seed", low=0, high=2**32 - 1)
    revision: str | None = setting(None, "branch, tag or commit of a hub model", step="calibrate", flag="revision")
    trust_remote_code: bool = setting(
        False, "allow modelling code that comes with the model", step="calibrate", flag="trust-remote-code"
    )
    test_text: str | None = setting(
        None, "a text file to judge the finished checkpoints on; never calibrated on", step="evaluate", flag="test-text"
    )
    test_length: int = setting(2048, "tokens in each test chunk", step="evaluate", flag="test-length", low=2)
    test_chunks: int | None = setting(
        5, "test chunks, from the beginning of the text; `none` for all", step="evaluate", flag="test-chunks", low=1
    )
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    reform: ReformConfig = field(default_factory=ReformConfig)
    search: SearchConfig = field(default_factory=SearchConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.keep)) != len(self.keep):
            raise UserError(f"each keep ratio counts once, given {_text(self.keep)}; leave the repeated one out")
        if not self.keep:
            raise UserError("keep is empty; give at least one ratio in (0, 1], as in --keep 0.8")
        object.__setattr__(self, "keep", tuple(sorted(self.keep, reverse=True)))

    @property
    def constraint(self) -> str:
        """What a keep ratio counts."""
        return self.search.constraint or f"parameters-{self.keep_of}"

    def to_dict(self) -> dict[str, Any]:
        """Nested plain data, every default written out."""
        raw: dict[str, Any] = dataclasses.asdict(self)
        return {**raw, "keep": list(self.keep)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> CompressConfig:
        """From nested or dotted keys ("search.generations"); unknown keys and bad values raise UserError."""
        flat = _checked(flatten(raw))
        if flat.get("model") is None:
            raise UserError("no model was named; give a hub id, a local directory or a .gguf file")
        values: dict[str, Any] = {}
        for name, section in _sections().items():
            own = {key.partition(".")[2]: v for key, v in flat.items() if key.startswith(f"{name}.")}
            values[name] = section(**own)
        return cls(**{key: v for key, v in flat.items() if "." not in key}, **values)


@dataclass(frozen=True)
class Setting:
    """One setting of the configuration: its dotted key, its type, and what a value must be."""

    key: str
    type: Any
    default: Any  # dataclasses.MISSING where it must be given
    help: str
    step: str
    flag: str | None  # its name on the command line, without dashes; others are reached by --set key=value
    low: float | None
    above: float | None
    high: float | None

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of a Literal type, empty for others."""
        return typing.get_args(self.plain) if typing.get_origin(self.plain) is Literal else ()

    @property
    def plain(self) -> Any:
        """The type without `| None`."""
        if isinstance(self.type, types.UnionType) or typing.get_origin(self.type) is typing.Union:
            return next(t for t in typing.get_args(self.type) if t is not types.NoneType)
        return self.type

    def parse(self, value: Any) -> Any:
        """The value as its type, from Python, YAML or a flag's text; raises UserError naming the key and the rule."""
        if self.plain is not self.type and (value is None or value == "none"):
            return None
        if typing.get_origin(self.plain) is tuple:
            items = value.replace(",", " ").split() if isinstance(value, str) else value
            items = items if isinstance(items, list | tuple) else [items]
            return tuple(self._one(float, item) for item in items)
        if self.choices:
            if value not in self.choices:
                raise UserError(f"{self.key} is one of {', '.join(self.choices)}; given {value!r}{self._guess(value)}")
            return value
        return self._one(self.plain, value)

    def _one(self, kind: Any, value: Any) -> Any:
        number = _as(kind, value)
        if number is None:
            what = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
            raise UserError(f"{self.key} is {what}; given {value!r}")
        if kind in (int, float) and not self._inside(number):
            percent = self.key == "keep" and 1 < number <= 100
            hint = f"; for {number:g} per cent write {number / 100:g}" if percent else ""
            raise UserError(f"{self.key} lies in {self.range}; given {number:g}{hint}")
        return number

    def _inside(self, number: float) -> bool:
        return (
            math.isfinite(number)
            and (self.low is None or number >= self.low)
            and (self.above is None or number > self.above)
            and (self.high is None or number <= self.high)
        )

    @property
    def shown(self) -> str:
        """The default as it is typed; empty where it must be given."""
        if self.default is dataclasses.MISSING:
            return ""
        if isinstance(self.default, tuple):
            return " ".join(f"{x:g}" for x in self.default)
        return "none" if self.default is None else str(self.default).lower()

    @property
    def range(self) -> str:
        """The allowed interval, as mathematicians write it; empty where every value will do."""
        if self.low is None and self.above is None and self.high is None:
            return ""
        left = f"({self.above:g}" if self.above is not None else "(-inf" if self.low is None else f"[{self.low:g}"
        return f"{left}, inf)" if self.high is None else f"{left}, {self.high:.10g}]"

    def _guess(self, value: Any) -> str:
        near = difflib.get_close_matches(str(value), [str(c) for c in self.choices], 1)
        return f" (did you mean {near[0]!r}?)" if near else ""


def _as(kind: Any, value: Any) -> Any:
    """value as an int, float, bool or str, or None where it is not one; "1e-3" is text to YAML 1.1, a number to us."""
    if kind is bool:
        named = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        return value if isinstance(value, bool) else named.get(str(value).lower())
    if kind is str:
        return value if isinstance(value, str) and value else None
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
        if kind is float:
            return number
        return int(value) if isinstance(value, int | str) else int(number) if number.is_integer() else None
    except (TypeError, ValueError, OverflowError):
        return None


@cache
def _sections() -> dict[str, Any]:
    hints = typing.get_type_hints(CompressConfig)
    return {
        f.name: hints[f.name] for f in dataclasses.fields(CompressConfig) if dataclasses.is_dataclass(hints[f.name])
    }


@cache
def settings() -> Mapping[str, Setting]:
    """Every setting by its dotted key, in the order of declaration."""
    return types.MappingProxyType({one.key: one for one in _declared(CompressConfig, "")})


def _declared(section: Any, prefix: str) -> Iterator[Setting]:
    hints = typing.get_type_hints(section)
    for f in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from _declared(hints[f.name], f"{f.name}.")
        else:
            yield Setting(prefix + f.name, hints[f.name], f.default, **f.metadata)


def flatten(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif value is None and name in _sections():  # `search:` with nothing under it
            continue
        else:
            flat[name] = value
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested ones."""
    out: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        inner = out
        for name in path:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return out


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ, in the order of `new`; a key that only one side has differs."""
    a, b = flatten(old), flatten(new)
    missing = object()
    return [key for key in {**b, **a} if _plain(a.get(key, missing)) != _plain(b.get(key, missing))]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file as nested data; raises UserError where it is missing, broken, or not a page of `key: value`."""
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no configuration file {str(path)!r}; give the path of a YAML file") from None
    except OSError as error:
        raise UserError(f"cannot read the configuration {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the configuration {str(path)!r} is not text; give a YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"the configuration {str(path)!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict | None):
        raise UserError(f"the configuration {str(path)!r} must be a page of `key: value`; it is a {type(raw).__name__}")
    return raw or {}


def resolve(file: str | Path | None = None, flags: Mapping[str, Any] | None = None) -> CompressConfig:
    """The configuration of a file, with flags (dotted keys; None means not given) over it."""
    flat = flatten(read_yaml(file)) if file is not None else {}
    flat |= {key: value for key, value in (flags or {}).items() if value is not None}
    return CompressConfig.from_dict(flat)


def overrides(file: str | Path | None = None, flags: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a file and flags over it ask of a run that has a configuration already: dotted keys, checked values."""
    flat = flatten(read_yaml(file)) if file is not None else {}
    flat |= {key: value for key, value in (flags or {}).items() if value is not None}
    return {key: settings()[key].parse(value) for key, value in _checked(flat).items()}


def _checked(flat: dict[str, Any]) -> dict[str, Any]:
    known = settings()
    for key, value in flat.items():
        if key in _sections():
            raise UserError(f"{key} is a group of settings, given {value!r}; write its members under it")
        if key not in known:
            raise UserError(f"unknown setting {key!r}{_nearest(key, known)}")
    return flat


def to_yaml(config: CompressConfig | Mapping[str, Any], header: str = "") -> str:
    """The configuration as a YAML page that `resolve` reads back, with a comment on top."""
    raw = config.to_dict() if isinstance(config, CompressConfig) else dict(config)
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    page: str = yaml.safe_dump(raw, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)
    return comment + page


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    last = key.rpartition(".")[2].replace("-", "_")
    same = [name for name in known if name.rpartition(".")[2] == last]
    near = (
        same
        or difflib.get_close_matches(key, known, 1)
        or [name for name in known if name.rpartition(".")[2] in difflib.get_close_matches(last, _last_names(known), 1)]
    )
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def _last_names(known: Mapping[str, Any]) -> list[str]:
    return [name.rpartition(".")[2] for name in known]


def _text(values: tuple[float, ...]) -> str:
    return " ".join(f"{v:g}" for v in values)
