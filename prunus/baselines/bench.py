"""Floor 5: rival methods and ours on the same model, tokens, budgets and tests: one row for each method and share.

A bench is a run directory whose artefacts are rows: the same command again computes only those that are not there.
`bench.json` has all rows with the command, machine and versions; `bench.md` and `bench.png` are drawn from it.
"""

from __future__ import annotations

import math
import re
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from prunus import describe, pipeline, steps
from prunus.baselines import benchpages, rivals
from prunus.baselines.subject import Outcome, Spent, Subject
from prunus.baselines.table import OURS, find, names
from prunus.config import CompressConfig, configured, flatten, settings
from prunus.errors import UserError
from prunus.evaluation import fingerprint, parameters, perplexity, shapes, text_ids
from prunus.machine import Meter, environment, reset_peak, words
from prunus.models import loading
from prunus.models.checkpoint import verify
from prunus.models.loading import Loaded
from prunus.models.memory import NOTHING, Work
from prunus.progress import Progress, silent
from prunus.recording.artefact import load_json
from prunus.recording.run import Run, read_manifest
from prunus.setting import ANYWHERE
from prunus.steps import Session
from prunus.subnetwork import SubNetwork
from prunus.tasks import asked_for, difference, manager_of, task_scores
from prunus.texts import calibration

STEPS = ("rows",)
DENSE = "dense"
UNREAD = ("keep", "method", "test_text", "test_length", "test_chunks", "front")  # settings that nothing here reads
TYPED = (*UNREAD, "model", "seed", "dtype", *(f"calibration.{key}" for key in ("source", "samples", "length")))
MEASURED = ("perplexity", "ppl", "finite", "task", "shapes", "prefill", "decode", "speed", "timed")  # keys of a row
SPEED = ("prefill_speedup", "decode_speedup", "speed")
TOKENS = "token_hash/"  # notes of the record: the hash of each calibration's tokens,
SOURCES, TEXTS = "source/", "text/"  # and of the files that they, and the test texts, were read from
METHOD_STEPS = ("calibrate", "score", "reform", "search", "extract")  # of a run of ours: what its network took


@dataclass(frozen=True)
class Plan:
    """What a bench is asked for."""

    methods: tuple[str, ...]
    keeps: tuple[float, ...]
    calibrations: tuple[str, ...]  # sources, as `calibration.source` names them
    texts: tuple[str, ...]  # files that every network is scored on; the first is the main one
    lengths: tuple[tuple[int, int], ...] = ((2048, 5), (128, 24))  # tokens in a window, windows
    tasks: tuple[str, ...] = ()
    task_path: str | None = None  # directory of task files for lm-eval
    task_limit: int | None = None  # documents of each task
    speed: bool = True

    def __post_init__(self) -> None:
        for name in self.methods:
            if name != OURS:
                find(name)
        parts = {"methods": "method", "keep": "share", "calibration": "calibration", "text": "text",
                 "lengths": "window length"}  # fmt: skip
        asked = (self.methods, self.keeps, self.calibrations, self.texts, self.lengths)
        for (flag, what), given in zip(parts.items(), asked, strict=True):
            if not given:
                raise UserError(f"a bench needs at least one {what}; give --{flag}")
        for text in self.texts:
            if not Path(text).is_file():
                raise UserError(f"no text file {text!r}; give --text FILE")
        rivals.refuse_calibrated(self.texts, self.calibrations)
        for files in (self.texts, self.calibrations):
            if twins := {name for name in map(_short, files) if [*map(_short, files)].count(name) > 1}:
                raise UserError(f"rows name files without their directories: give {', '.join(twins)} another name")


def read_lengths(asked: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Windows as they are typed: "2048:5" is 5 windows of 2048 tokens, "128" as many as make 10,240 tokens."""
    found = []
    for word in asked:
        tokens, _, windows = word.partition(":")
        if not tokens.isdigit() or (windows and not windows.isdigit()) or int(tokens) < 2 or windows == "0":
            raise UserError(f"--lengths reads TOKENS or TOKENS:WINDOWS, as in 2048:5; given {word!r}")
        found.append((int(tokens), int(windows) if windows else max(1, 10240 // int(tokens))))
    return tuple(found)


def run(config: CompressConfig, plan: Plan, out: str | Path, progress: Progress = silent) -> dict[str, Any]:
    """All rows of a bench, those that are there already not computed again; returns what bench.json holds.

    config: the model, seed, dtype, calibration windows and settings of all methods; its `keep`, `method` and
    `calibration.source` are not read. Raises UserError for what cannot be asked, before long work where it is known.
    """
    rivals.refuse_unfair(configured(config), plan.methods)
    out, c = Path(out), config.calibration
    known = {"auto": calibration.auto_source()} if "auto" in plan.calibrations else {}
    plan = replace(plan, calibrations=tuple(dict.fromkeys(known.get(name, name) for name in plan.calibrations)))
    work = NOTHING  # of a bench that is there: it has fitted before, and rows that are done take nothing
    if not (out / "manifest.json").exists():  # rows that are there need no text and no task any more
        if plan.tasks:
            manager_of(asked_for(plan.tasks), plan.task_path)
        for source in plan.calibrations:
            calibration.check(source, c.samples + c.holdout, column=c.column)
        work = Work.of(replace(config, method=OURS if OURS in plan.methods else plan.methods[0], keep=plan.keeps))
        work = replace(work, beside=int(work.ours))  # our run loads a model of its own
    loaded = loading.load_configured(config, work=work)
    with Run.open(out, recorded(config, plan), asdict(loaded.source), steps=STEPS) as record:
        bench = _Bench(config, plan, out, progress, loaded, record)
        rows = everything(record, list(bench.rows()))
        data = {
            "command": command(config, plan, out, **_spanned(rows, plan)),
            "machine": words(),
            "versions": environment(),
            "threads": torch.get_num_threads(),
            "device": str(bench.device),
            "calibration": {"samples": config.calibration.samples, "length": config.calibration.length},
            "rows": rows,
            "views": benchpages.views(rows),
        }
        written = benchpages.write(out, data)
        return {**data, "report": str(written)}


def everything(record: Run, asked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows of a bench, those of earlier commands too: the dense model, then by calibration, method and share."""
    files = {file: one["seconds"] for file, one in record.manifest["artefacts"].items() if record.done(file)}
    there = [{**load_json(record.path(file)), "row_seconds": took} for file, took in files.items()]
    dense: dict[str, Any] = next((row.get("tasks", {}) for row in there if row["method"] == DENSE), {})
    known = [_which(row) for row in there]
    refused = [row for row in asked if "refused" in row and _which(row) not in known]
    hashes = {key.removeprefix(TOKENS): one for key, one in record.notes.items() if key.startswith(TOKENS)}
    for row in [*there, *refused]:  # of earlier versions, and refused before tokens were drawn
        if (name := row.get("calibration")) in hashes:
            row.setdefault("token_hash", hashes[name])
    refused = [_told(row) for row in refused]
    there = [_told({**row, **_decoded(row, there)}, dense) for row in there]
    order = (DENSE, *names())
    sources = list(dict.fromkeys(row.get("calibration", "") for row in there))
    return sorted(
        [*there, *refused],
        key=lambda row: (
            row["method"] != DENSE,
            sources.index(row.get("calibration", "")) if row.get("calibration", "") in sources else len(sources),
            order.index(row["method"]),
            -row["kept"],
        ),
    )


def _which(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What no two rows of a bench have in common."""
    return row["method"], row.get("calibration"), row["kept"]


def _decoded(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the dense model decodes: the median over all networks that were timed in turns with it, on its machine."""
    alike = {key: row[key] for key in ("machine", "threads", "device") if key in row}.items()
    timed = [one for one in rows if "speed" in one and "timed_with" not in one and alike <= one.items()]
    if row["method"] != DENSE or not timed:
        return {}
    return {"decoded": statistics.median(one["speed"]["dense"]["decode"] for one in timed)}


def _told(row: dict[str, Any], dense: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """A row with what its tables show under other names or in other units. dense: the dense model's tasks."""
    told = {"weights_mb": row["n_bytes"] / 1e6} if "n_bytes" in row else {}
    told |= {"decoded": row["speed"]["small"]["decode"]} if "speed" in row else {}
    told |= {"network": f"{row['method']}, {row['calibration']}"} if "calibration" in row else {}
    told |= {"scored": True} if "tasks" in row else {}
    scores: Mapping[str, Any] = row.get("tasks", {})
    for task, one in scores.items():
        told |= {f"task_{task}": one["score"], f"task_{task}_se": one["se"]}
    if row["method"] != DENSE and (gained := difference(scores, dense)):
        told |= {"task_gain": gained[0], "task_gain_se": gained[1]}
    if scores:  # those of every example stay in the row's file
        told["tasks"] = {t: {k: v for k, v in one.items() if k != "each"} for t, one in scores.items()}
    return {**row, **told}


def _spanned(rows: Sequence[Mapping[str, Any]], plan: Plan) -> dict[str, Any]:
    """The methods, shares and calibrations of all rows, so that one command makes them all."""
    own = [row for row in rows if row["method"] != DENSE]
    named = {slug(_short(source)): source for source in plan.calibrations}  # rows of earlier calls: by their own names
    drawn = [row["calibration"] for row in own if "calibration" in row]
    return {
        "methods": tuple(dict.fromkeys([*(row["method"] for row in own), *plan.methods])),
        "keeps": tuple(sorted({*(row["kept"] for row in own), *plan.keeps}, reverse=True)),
        "calibrations": tuple(dict.fromkeys([*(named.get(x, x) for x in drawn), *plan.calibrations])),
    }


def recorded(config: CompressConfig, plan: Plan) -> dict[str, Any]:
    """What must be the same in all rows of a bench; methods, shares and calibrations may be added at any time."""
    raw = config.to_dict()
    for key in UNREAD:
        raw.pop(key)
    raw["calibration"] = {k: v for k, v in raw["calibration"].items() if k != "source"}
    asked = {"texts": list(plan.texts), "lengths": [list(pair) for pair in plan.lengths], "tasks": list(plan.tasks)}
    return {**raw, "bench": {**asked, "task_limit": plan.task_limit, "speed": plan.speed}}


def command(config: CompressConfig, plan: Plan, out: Path, **only: Any) -> str:
    """The command line of a bench, or of one of its rows; directories are left out of names."""
    plan = replace(plan, **only)
    keeps = [f"{k:g}" for k in plan.keeps]
    typed = ["prunus", "bench", _short(config.model), "--methods", *plan.methods, "--keep", *keeps]
    for source in plan.calibrations:
        typed += ["--calibration", _short(source)]
    for text in plan.texts:
        typed += ["--text", _short(text)]
    typed += ["--lengths", *(f"{length}:{n}" for length, n in plan.lengths)]
    c = config.calibration
    typed += ["--samples", str(c.samples), "--length", str(c.length)]
    typed += ["--seed", str(config.seed), "--dtype", config.dtype]
    typed += ["--tasks", *plan.tasks] if plan.tasks else []
    typed += ["--tasks-path", _short(plan.task_path)] if plan.task_path else []
    typed += ["--limit", str(plan.task_limit)] if plan.task_limit is not None else []
    typed += [] if plan.speed else ["--no-speed"]
    values = flatten(config.to_dict())
    for key, one in settings().items():
        section = key.partition(".")[0]
        if key in TYPED or section in ("front", "train") or one.step == ANYWHERE:
            continue
        if values[key] != one.default:
            typed += ["--set", f"{key}={replace(one, default=values[key]).shown}"]
    return shlex.join([*typed, "--out", _short(str(out))])


def _short(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] if "/" in path else path


@dataclass
class _Bench:
    """One call of `run`."""

    config: CompressConfig
    plan: Plan
    out: Path
    progress: Progress
    loaded: Loaded
    record: Run

    def __post_init__(self) -> None:
        self.model: nn.Module = self.loaded.model
        self.device = next(self.model.parameters()).device
        column, tokenizer = self.config.calibration.column, self.loaded.tokenizer
        self.sources = [_Source(self, source) for source in self.plan.calibrations]
        for text in self.plan.texts:
            self.agree(TEXTS + _short(text), calibration.hashes(text))
        self.texts = {t: text_ids(t, tokenizer, column=calibration.column_in(t, column)) for t in self.plan.texts}
        self.unreachable = self.out_of_reach()

    def agree(self, key: str, found: Any, note: bool = True) -> None:
        """Note what rows are made from; raises UserError where those that are there were made from something else."""
        known = self.record.notes.get(key)
        if found and known and found != known and self.record.manifest["artefacts"]:
            raise UserError(
                f"the rows in {str(self.out)!r} were made with another text of the name {key.partition('/')[2]!r}; "
                "give that one (`generated` text: on the machine that drew it), or choose another --out"
            )
        if found and note:
            self.record.note(key, found)

    def out_of_reach(self) -> dict[float, str]:
        """The shares that our search cannot reach, and why; raises UserError for settings that no run of ours takes.

        Nothing where all rows of ours are there already.
        """
        keeps = [k for k in self.plan.keeps if not all(self.record.done(one.file(OURS, k)) for one in self.sources)]
        if OURS not in self.plan.methods or not keeps:
            return {}
        config = self.ours(keeps, "generated")  # texts have been looked at, or are not needed any more
        pipeline.refuse_idle(config)
        s = Session.of(self.record, config, self.loaded, self.progress)
        space, far = steps.widest_space(s), dict[float, str]()
        for keep in keeps:
            try:
                space.window(s.cost, keep, of=s.cost(s.whole), slack=steps.slack(s))
            except UserError as error:
                far[keep] = str(error)
        if near := tuple(keep for keep in keeps if keep not in far):
            s.config = self.ours(near, "generated")
            steps.check_request(s)
        return far

    def ours(self, keeps: Sequence[float], source: str) -> CompressConfig:
        """What `compress` is asked for; our networks are scored as all others are, not by it."""
        text = replace(self.config.calibration, source=source)
        asked = replace(self.config, keep=tuple(keeps), method=OURS, device=str(self.device))
        return replace(asked, test_text=None, calibration=text)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The dense model's row, then method after method; refused ones say why."""
        yield self.kept("rows/dense.json", self.dense)
        for source in self.sources:
            for method in self.plan.methods:
                for keep in sorted(self.plan.keeps, reverse=True):
                    yield source.row(method, keep)

    def kept(self, file: str, compute: Any) -> dict[str, Any]:
        found: dict[str, Any] = self.record.do("rows", file, compute)
        return found

    def dense(self) -> dict[str, Any]:
        loading.say_type(self.model, self.loaded.dtype, self.config.dtype)
        whole, asked = parameters(self.model)["all"], self.plan
        first = {"methods": asked.methods[:1], "keeps": asked.keeps[:1], "calibrations": asked.calibrations[:1]}
        return {
            "method": DENSE, "kept": 1.0, "command": command(self.config, asked, self.out, **first),
            "kept_blocks": 1.0, "kept_all": 1.0, "parameters": whole, "n_bytes": whole * self.loaded.dtype.itemsize,
            **self.measured(self.model), **self.where(),
        }  # fmt: skip

    def where(self) -> dict[str, Any]:
        machine, threads = words(), torch.get_num_threads()
        return {"machine": machine, "versions": environment(), "threads": threads, "device": str(self.device)}

    def measured(
        self, model: nn.Module, structured: bool = True, run: Mapping[str, Any] = MappingProxyType({})
    ) -> dict[str, Any]:
        """Perplexities, task scores and speed of one network. ppl2048 and the like are of the first text.

        A mask leaves the dense model's shapes and so its speed, which is not timed again; of several networks with the
        same shapes the first is timed. Two methods may end at the same network, which is measured once.
        run: what the run that made the network wrote of it; its time serves, too.
        """
        same = {"fingerprint": fingerprint(model)}
        if row := self.earlier(same):
            known = {key: value for key, value in row.items() if key.startswith(MEASURED)}
            return {**known, **same, "measured_with": row.get("measured_with", f"{row['method']}, {row['kept']:.0%}")}
        found: dict[str, Any] = {**same, "perplexity": {}}
        for number, (text, ids) in enumerate(self.texts.items()):
            for length, windows in self.plan.lengths:
                score = perplexity(model, ids, length=length, chunks=windows)
                entry = {"ppl": score.ppl, "nats": score.nats, "se": score.se, "windows": windows}
                found["perplexity"].setdefault(_short(text), {})[str(length)] = entry
                found[f"ppl{length}" if not number else f"ppl{length}_{Path(text).stem}"] = score.ppl
                found["finite"] = found.get("finite", True) and score.ppl < float("inf")
        if self.plan.tasks:
            scores = task_scores(
                model, self.loaded.tokenizer, self.plan.tasks, path=self.plan.task_path, limit=self.plan.task_limit
            )
            found["tasks"] = scores
            found["task_mean"] = sum(one["score"] for one in scores.values()) / len(scores)
            errors = [one["se"] for one in scores.values()]
            found["task_mean_se"] = None if None in errors else math.hypot(*errors) / len(errors)
        if self.plan.speed and structured and model is not self.model:
            found |= self.timed(model, run)
        return found

    def timed(self, model: nn.Module, run: Mapping[str, Any]) -> dict[str, Any]:
        """The speed of a network: of its shapes in an earlier row, or of its run, on this machine; else measured."""
        own: dict[str, Any] = {"shapes": shapes(model)}
        if (row := self.earlier(own)) and "speed" in row:
            known = {key: row[key] for key in SPEED}
            return {**own, **known, "timed_with": row.get("timed_with", f"{row['method']}, {row['kept']:.0%}")}
        if run.get("timed_on") != f"{words()}, {self.device}":
            run = describe.timed(self.model, model)
        return own | {key: run[key] for key in SPEED}

    def earlier(self, own: Mapping[str, Any]) -> dict[str, Any] | None:
        """A row that is there already, of this machine, with what is given."""
        for file in self.record.manifest["artefacts"]:
            row: dict[str, Any] = load_json(self.record.path(file)) if self.record.done(file) else {}
            if row.get("method") != DENSE and own.items() <= row.items() and self.where().items() <= row.items():
                return row
        return None


class _Source:
    """The rows of one calibration text; its tokens are drawn when the first row needs them."""

    def __init__(self, bench: _Bench, source: str) -> None:
        self.bench, self.source = bench, source
        self.name = slug(_short(source))
        self.hashes = calibration.hashes(source)
        self._subject: Subject | None = None
        bench.agree(SOURCES + self.name, self.hashes, note=False)

    @property
    def subject(self) -> Subject:
        if self._subject is None:
            self._subject = rivals.subject_of(self.bench.config, self.bench.model, self.tokens(), self.bench.progress)
        return self._subject

    def tokens(self) -> Tensor:
        """The windows that our own run calibrates on with the same settings: same source, seed, number and length."""
        b, c = self.bench, self.bench.config.calibration
        n = c.samples + c.holdout
        with b.progress(f"calibration text: {self.source}", n * c.length):
            ids = calibration.calibration_tokens(
                self.source, b.loaded.tokenizer, samples=n, length=c.length, seed=b.config.seed, model=b.model,
                device=b.device, column=c.column,
            )  # fmt: skip
        fit, _ = calibration.split(ids, c.holdout)
        for text, seen in b.texts.items():
            calibration.refuse_seen(fit, seen, text)
        b.agree(TOKENS + self.name, calibration.token_hash(fit))
        b.agree(SOURCES + self.name, self.hashes)
        return fit.to(b.device)

    def file(self, method: str, keep: float) -> str:
        """Where a row is, in the bench."""
        return f"rows/{self.name}/{slug(method)}-{keep:g}.json"

    def row(self, method: str, keep: float) -> dict[str, Any]:
        """One row, from its file where that is done."""
        b = self.bench
        own = {"method": method, "calibration": self.name, "kept": keep}
        own["command"] = command(b.config, b.plan, b.out, methods=(method,), keeps=(keep,), calibrations=(self.source,))
        kind = str(getattr(b.model.config, "model_type", ""))
        if refusal := b.unreachable.get(keep) if method == OURS else find(method).refusal(kind, keep):
            return {**own, "done": False, "refused": refusal}

        def compute() -> dict[str, Any]:
            with b.progress(f"{method}, {100 * keep:g} %, {self.name}"):
                found = self.ours(keep) if method == OURS else self.rival(method, keep)
            if found["done"]:
                found["peak_mb"] = found["peak_bytes"] / 1e6
            return {**own, "token_hash": b.record.notes[f"{TOKENS}{self.name}"], **found, **b.where()}

        return b.kept(self.file(method, keep), compute)

    def rival(self, method: str, keep: float) -> dict[str, Any]:
        baseline, subject = find(method), self.subject
        try:
            outcome, spent = subject.run(lambda: baseline.run(subject, keep))
        except UserError as error:  # a share that a method cannot reach: the others go on
            return {"done": False, "refused": str(error)}
        return self.described(outcome, spent, baseline.structured)

    def described(self, outcome: Outcome, spent: Spent, structured: bool = True, **run: Any) -> dict[str, Any]:
        """A network's row: its sizes, what it took, and what it is worth; one that gives NaN, say, is a result too."""
        dense, notes = self.bench.loaded, list(outcome.notes)
        sizes = rivals.sizes(outcome, dense.model, dense.dtype.itemsize)
        sizes.pop("uniform")
        try:
            measured = self.bench.measured(outcome.model, structured, **run)
        except UserError as error:
            return {"done": False, "refused": f"the network cannot be measured: {error}"}
        return {"done": True, **sizes, "notes": notes, **asdict(spent), "structured": structured, **measured}

    def ours(self, keep: float) -> dict[str, Any]:
        """From a run of `compress` beside the rows, which makes the networks of all shares together."""
        b, folder = self.bench, self.bench.out / "prunus" / self.name
        beside = self.beside(folder)
        there = read_manifest(folder)["config"]["keep"] if (folder / "manifest.json").is_file() else []
        if not there:  # else its tokens may be those of an earlier text
            b.agree(SOURCES + self.name, self.hashes)
        keeps = sorted({*there, *(k for k in b.plan.keeps if k not in b.unreachable)}, reverse=True)
        config = b.ours(keeps, self.source)
        data = pipeline.compress(config, folder, b.progress)
        network = next(n for n in data["chosen"] if n["name"] == f"keep-{keep:g}")
        small = loading.load(str(folder / network["path"]), dtype=b.config.dtype, device=str(b.device), compress=False)
        steps = [step for step in data["steps"] if step["name"] in METHOD_STEPS]
        spent = Spent(
            sum(step["seconds"] for step in steps),
            sum(step["forward_tokens"] for step in steps),
            max(0, max(step["peak_bytes"] for step in steps) - beside[0]),
            max(0, max(step["peak_cuda_bytes"] for step in steps) - beside[1]),
        )
        b.agree(TOKENS + self.name, read_manifest(folder)["notes"]["token_hash"])
        layers = SubNetwork.from_json(str(verify(folder / network["path"])["subnetwork"]))
        note = f"one run for {len(keeps)} shares: its cost is that of all of them"
        outcome, written = Outcome(small.model, layers, (note,)), load_json(folder / f"evaluation/keep-{keep:g}.json")
        return self.described(outcome, spent, run=written)

    def beside(self, folder: Path) -> list[int]:
        """Bytes (of the process, on a CUDA device) that are not our run's: the bench's model, what others remember.

        Taken before the run loads a model of its own; the least of all calls that worked on it. 0 for runs of earlier
        versions, which have no note of it.
        """
        reset_peak()
        notes, key, now = self.bench.record.notes, f"beside/{self.name}", Meter()
        least = [now.resident_bytes, now.resident_cuda_bytes]
        before = notes.get(key, [0, 0] if (folder / "manifest.json").is_file() else least)
        self.bench.record.note(key, [min(pair) for pair in zip(least, before, strict=True)])
        return list(notes[key])


def slug(text: str) -> str:
    """A name for files."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "x"
