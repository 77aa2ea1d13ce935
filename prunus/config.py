"""Floor 0: what a run is asked to do. Frozen dataclasses, read from YAML and from flags over it; no torch.

A setting is declared once, in its dataclass: default, sentence of help, range, and the step that first reads it. Flags,
checks, the file `config.yaml` of a run and the question "may this change on an existing run?" derive from that.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from prunus.errors import UserError
from prunus.searching.options import FrontConfig, check_storage
from prunus.setting import ANYWHERE, Section, Setting, declared, setting
from prunus.targets import LIMITS, Kind, Target, typed, unlike
from prunus.targets import BudgetConfig as BudgetConfig
from prunus.training.learning import TrainConfig

STEPS = (  # in the order they run
    "calibrate", "score", "train", "reform", "search", "extract", "evaluate", "front", "report",
)  # fmt: skip
KEEP = (0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True)
class CalibrationConfig(Section):
    """Text that the method may look at; never test text."""

    prefix: ClassVar[str] = "calibration."
    source: str = setting(
        "auto",
        "a data set (wikitext2, c4), a .txt or .jsonl file, `generated` (the model's own samples), or `auto`: "
        "wikitext2 where prunus[hub] is installed and a hub is reachable, else generated",
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
class ScoreConfig(Section):
    """How important each unit of the network is."""

    prefix: ClassVar[str] = "score."
    method: Literal["obs", "wanda", "activation", "taylor", "magnitude"] = setting(
        "obs", "importance score, for `reform.order` score; greedy orders need none", step="score", flag="score"
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
class ReformConfig(Section):
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
    shrinkage: float = setting(
        0.5,
        "share of the curvature that gives way to the identity, for texts unlike the calibration's",
        step="score",
        low=0.01,
        high=1.0,
    )
    openings: int = setting(
        1024, "single tokens that are fitted as first ones of a text, where attention sinks form", step="score", low=0
    )
    block: int = setting(16, "neurons that the greedy order removes at a time", step="score", low=1)
    sensitivity: int = setting(
        1, "levels of each sub-layer whose divergence is measured; 0: trust the curvature", step="reform", low=0
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
class SearchConfig(Section):
    """Which widths each network keeps."""

    prefix: ClassVar[str] = "search."
    method: Literal["levels", "shen", "random", "nsga2", "tpe", "local"] = setting(
        "levels",
        "levels (error curves, then level-switch evolution), shen (as published), random, nsga2 and tpe (Optuna's), "
        "local (neighbours of the allocation, with restarts)",
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
    population: int = setting(8, "candidates of a generation of --search shen", step="search", low=1)
    offspring: int = setting(
        16, "candidates tried in a generation, but by shen", step="search", flag="offspring", low=1
    )
    slack: float = setting(
        0.002, "how far below its budget a network may stay, as a share of the budget", step="search", above=0, high=0.2
    )
    mlp_step: int = setting(32, "neurons between two levels of an MLP", step="reform", low=1)
    depth: bool = setting(True, "whole attention and MLP sub-blocks may go", step="reform")
    attention: Literal["grid", "groups", "whole", "none"] = setting(
        "grid",
        "what may go of an attention: KV groups and query heads (grid), whole KV groups, the attention of a layer as a "
        "whole (what vLLM's class for ragged layers holds), or none",
        step="reform",
        flag="attention",
    )
    space: Literal["own", "trained"] = setting(
        "own",
        "own: every layer by itself (all alike with --uniform), at the model's hidden size; trained: the space that "
        "the super-network was trained in (--space), hidden sizes too",
        step="reform",
        flag="search-space",
    )
    workers: int = setting(1, "processes that share the search", step=ANYWHERE, flag="workers", low=1)
    storage: str | None = setting(
        None, "where the record of a search is that several runs share: a database's URL, or a file that ends in "
        ".journal; `none`: in the run", step=ANYWHERE, flag="storage",
    )  # fmt: skip
    study: str | None = setting(None, "name of this search in a shared storage that holds others", step=ANYWHERE)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_storage(self.storage)


@dataclass(frozen=True)
class RivalConfig(Section):
    """What other people's methods may spend; they use the calibration text of ours."""

    prefix: ClassVar[str] = "rival."
    search_tokens: int = setting(100_000, "forward tokens of a rival's search for each network", step="score", low=1)
    generations: int = setting(
        5, "generations of Shen et al.'s evolution (theirs: 50), which share rival.search_tokens", step="score", low=1
    )
    window: int = setting(1024, "tokens of the window that rivals judge candidates by", step="score", low=8)
    gradients: int = setting(10, "calibration sequences that LLM-Pruner's gradients come from", step="score", low=1)


@dataclass(frozen=True)
class CompressConfig(Section):
    """Everything that decides what `compress` makes of a model; where it is written is not part of it."""

    model: str = setting(help="a hub id, a local directory, a .gguf file, or `demo`", step="calibrate")
    method: str = setting(
        "prunus",
        "who chooses what stays: prunus, or a rival by the name that `prunus bench --list` gives it",
        step="score",
        flag="method",
    )
    keep: tuple[float, ...] = setting(
        KEEP,
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
    device: str = setting("auto", "auto, cpu, cuda, cuda:1", step=ANYWHERE, flag="device")
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
    train: TrainConfig = field(default_factory=TrainConfig)
    reform: ReformConfig = field(default_factory=ReformConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    front: FrontConfig = field(default_factory=FrontConfig)
    rival: RivalConfig = field(default_factory=RivalConfig)

    def __post_init__(self) -> None:
        for name, section in _sections().items():
            if isinstance(given := getattr(self, name), Mapping):
                _checked({f"{name}.{key}": value for key, value in given.items()})
                object.__setattr__(self, name, section(**given))
            elif not isinstance(given, section):
                raise UserError(f"{name} is a group of settings: a {section.__name__} or a mapping; given {given!r}")
        super().__post_init__()
        if self.search.space == "trained" and not self.train.data:
            raise UserError(
                "search.space is trained, but nothing is trained; give --train FILE, or leave --search-space out"
            )
        if self.budget.targets:
            self._check_budget()
            object.__setattr__(self, "keep", ())
            return
        if not unlike(self.targets):
            raise UserError(
                f"each keep ratio counts once, given {typed(self.keep)}; networks are named by six digits, so leave "
                "one of the same name out"
            )
        if not self.keep:
            raise UserError("keep is empty; give at least one ratio in (0, 1], as in --keep 0.8")
        object.__setattr__(self, "keep", tuple(sorted(self.keep, reverse=True)))

    def _check_budget(self) -> None:
        kind = self.budget.targets[0].kind
        if self.keep and self.keep != KEEP:  # the default gives way
            raise UserError(
                f"a run has one kind of target, given keep {typed(self.keep)} and budget.{kind}; start a run for each"
            )
        if self.search.constraint:
            raise UserError(
                f"search.constraint says what --keep is a share of; budget.{kind} limits a cost of its own, so leave "
                f"search.constraint out, given {self.search.constraint}"
            )

    @property
    def targets(self) -> tuple[Target, ...]:
        """What the networks are asked to come to, the mildest first."""
        return self.budget.targets or tuple(Target("keep", keep) for keep in self.keep)

    @property
    def constraint(self) -> str:
        """The cost that the targets limit: what a keep ratio counts, or the cost of a budget."""
        kind: Kind = self.targets[0].kind
        return LIMITS.get(kind) or self.search.constraint or f"parameters-{self.keep_of}"

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


def configured(config: object) -> CompressConfig:
    """The configuration itself; raises UserError for anything else, the name of a model say."""
    if not isinstance(config, CompressConfig):
        raise UserError(f"a verb takes a CompressConfig, as in CompressConfig(model='demo'); given {config!r}")
    return config


@cache
def _sections() -> dict[str, Any]:
    hints = typing.get_type_hints(CompressConfig)
    return {
        f.name: hints[f.name] for f in dataclasses.fields(CompressConfig) if dataclasses.is_dataclass(hints[f.name])
    }


@cache
def settings() -> Mapping[str, Setting]:
    """Every setting by its dotted key, in the order of declaration."""
    return types.MappingProxyType({one.key: one for one in declared(CompressConfig)})


def defaults() -> dict[str, Any]:
    """The settings that need not be given, with what they are then; plain data."""
    flat = {key: one.default for key, one in settings().items() if one.default is not dataclasses.MISSING}
    return {key: _plain(value) for key, value in flat.items()}


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
