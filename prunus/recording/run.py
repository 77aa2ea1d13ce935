"""Floor 4: a directory that remembers which steps are done, so that the same command again goes on where it stopped.

The order that makes `kill -9` harmless: an artefact is written under `.prunus/partial`, flushed, and hashed; its hash
is recorded in `manifest.json` (itself written whole or not at all); then it gets its name. It counts as done only where
the file and the record agree, so a stop between any two of these leaves a directory that can be opened again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from prunus.config import STEPS, defaults, difference, flatten, nest, to_yaml
from prunus.errors import UserError
from prunus.machine import Meter, environment, reset_peak
from prunus.recording import changes
from prunus.recording.artefact import FORMATS, digest, fingerprint, flush, matches, place, remove, write_text, writing
from prunus.recording.lock import acquire
from prunus.targets import Target

T = TypeVar("T")
Admit = Callable[["Run"], None]  # may refuse, before anything is recorded or deleted
FORMAT = 1  # of manifest.json; a later, incompatible one counts up
HEADER = "What this run was asked for, with every default. A record: it is written from manifest.json, not read."
log = logging.getLogger(__name__)


class Run:
    """A run directory, locked for this process; use it as a context manager, or close() it."""

    def __init__(self, directory: Path, manifest: dict[str, Any], lock: FileLock | None, steps: Sequence[str]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.steps = tuple(steps)
        self._lock = lock
        self._meters: list[Meter] = []
        self._made: list[Path] | None = None  # by _create: directories that were not there, innermost first

    # ------------------------------------------------------------------------------------------ opening and closing

    @classmethod
    def open(
        cls,
        directory: str | Path,
        config: Mapping[str, Any],
        source: Mapping[str, Any],
        *,
        steps: Sequence[str] = STEPS,
        admit: Admit = lambda _: None,
    ) -> Run:
        """Creates a run, or opens the one that is there if it has the same configuration and model.

        config: nested plain data (`CompressConfig.to_dict()`); source: what identifies the model, its `sha256` first.
        Settings that only say where to compute may differ, and settings may be added to (more keep ratios, a test text
        where there was none): the steps that these touch are done again, the others are kept. admit: may refuse them.
        Raises UserError, with nothing changed, for another model, another configuration (naming the keys), a directory
        that holds foreign files, and a run that another process is working on.
        """
        directory = Path(directory)
        if not (directory / "manifest.json").exists():
            return cls._create(directory, config, source, steps)
        run = cls.reopen(directory, steps=steps)
        try:
            run._admit(config, source, admit)
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def reopen(cls, directory: str | Path, *, steps: Sequence[str] = STEPS) -> Run:
        """Opens an existing run with the configuration that it recorded."""
        directory = Path(directory)
        manifest = read_manifest(directory)
        lock = acquire(directory)
        run = cls(directory, manifest, lock, steps)
        try:
            remove(run._partial)
            run._sweep()
            run._write_config()
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def _create(
        cls, directory: Path, config: Mapping[str, Any], source: Mapping[str, Any], steps: Sequence[str]
    ) -> Run:
        if directory.exists() and not directory.is_dir():
            raise UserError(f"{str(directory)!r} is a file; name a directory for the run")
        foreign = sorted(p.name for p in directory.iterdir() if p.name != ".prunus") if directory.exists() else []
        if foreign:
            more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
            raise UserError(
                f"{str(directory)!r} is no run of Prunus and holds other files ({', '.join(foreign[:5])}{more}); "
                "choose a new or an empty directory"
            )
        made = [path for path in (directory, *directory.parents) if not path.exists()]
        with writing(directory):
            (directory / ".prunus").mkdir(parents=True, exist_ok=True)
        manifest = {
            "prunus_run": FORMAT,
            "created": _now(),
            "source": dict(source),
            "config": _plain(config),
            "environments": [],
            "artefacts": {},
            "growing": {},
            "unfinished": {},
            "notes": {},
        }
        run = cls(directory, manifest, acquire(directory), steps)
        run._made = made
        run._write_manifest()
        run._write_config()
        return run

    def _admit(self, config: Mapping[str, Any], source: Mapping[str, Any], admit: Admit) -> None:
        """Refuse what differs; take over what may differ."""
        self.refuse_other(source, "choose another --out")
        new = _plain(config)
        old_values, new_values = flatten(self.config), flatten(new)
        newer = {key: value for key, value in defaults().items() if key in new_values}  # than the run's version
        old_values = {**newer, **old_values, **self._searched(old_values, new_values)}
        differing = [key for key in difference(old_values, new_values) if key != "model"]  # the model's path may change
        refused = [
            key for key in differing if not changes.is_free(key) and not changes.only_adds(key, old_values, new_values)
        ]
        if refused and self.manifest["artefacts"]:  # a run that has come to nothing yet may start again as it likes
            named = "; ".join(
                f"{key}: {changes.show(old_values, key)} in the run, {changes.show(new_values, key)} now"
                for key in refused
            )
            raise UserError(
                f"{str(self.directory)!r} was made with another configuration ({named}). Give the recorded values "
                "(config.yaml there), choose another --out, or " + changes.advice(self.directory, new_values, refused)
            )
        done = sum(not entry.get("stale") for entry in self.manifest["artefacts"].values())
        log.info("%s is there already: going on with it, %d files and folders are done", self.directory, done)
        if difference(self.config, new):
            admit(self)
            self._take(new, first=changes.first_touched(self.steps, old_values, new_values, differing))

    def _searched(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
        """The targets of before, without those that go again and were never searched: refused as out of reach, say."""
        found: dict[str, Any] = {}
        for key in changes.TARGETS:
            if old.get(key) and new.get(key):
                kind: Any = key.removeprefix("budget.")
                made = self.manifest["artefacts"]
                stays = [v for v in old[key] if v in new[key] or f"search/{Target(kind, v).name}.json" in made]
                found[key] = stays or new[key]
        return found

    def refuse_other(self, source: Mapping[str, Any], advice: str) -> None:
        """Raise UserError for another model than the run's; its path may differ where its checksum is the same."""
        known = self.source
        identity = "sha256" if known.get("sha256") and source.get("sha256") else "id"
        if known.get(identity) != source.get(identity):
            raise UserError(
                f"{str(self.directory)!r} is a run of another model: {_describe(known)}, given {_describe(source)}; "
                f"{advice}"
            )

    def close(self) -> None:
        """Give the directory free for other processes."""
        remove(self._partial)
        (self.directory / ".prunus" / "owner").unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *stopped: object) -> None:
        """Close it; a run that was refused before anything came of it leaves no directory behind."""
        something = self.manifest["artefacts"] or self.manifest["growing"]
        if something or self._made is None or kind is None or not issubclass(kind, UserError):
            self.close()
            return
        for file in ("manifest.json", "config.yaml"):
            remove(self.directory / file)
        self.close()
        remove(self.directory / ".prunus")
        with contextlib.suppress(OSError):  # somebody put a file there meanwhile
            for path in self._made:
                path.rmdir()

    # --------------------------------------------------------------------------------------------------- the record

    @property
    def config(self) -> dict[str, Any]:
        """The recorded configuration, nested plain data."""
        raw: dict[str, Any] = self.manifest["config"]
        return raw

    @property
    def source(self) -> dict[str, Any]:
        """What identifies the model."""
        raw: dict[str, Any] = self.manifest["source"]
        return raw

    def path(self, file: str) -> Path:
        """Where an artefact is, or will be."""
        return self.directory / file

    def sha256(self, file: str) -> str:
        """Hash of a finished artefact; of a directory, the hash of its files' hashes."""
        files = self.manifest["artefacts"][file]["files"]
        return str(files[""]["sha256"]) if "" in files else digest(files)

    def note(self, key: str, value: Any) -> None:
        """Write down a fact of the run (plain data), such as the hash of its tokens."""
        if self.manifest["notes"].get(key) != _plain(value):
            self.manifest["notes"][key] = _plain(value)
            self._write_manifest()

    @property
    def notes(self) -> dict[str, Any]:
        """The facts that were noted."""
        raw: dict[str, Any] = self.manifest["notes"]
        return raw

    def costs(self) -> dict[str, dict[str, float]]:
        """Seconds, forward tokens and peak memory of each step, in the order of steps."""
        out: dict[str, dict[str, float]] = {}
        for step in self.steps:
            own = [a for a in self.manifest["artefacts"].values() if a["step"] == step and not a.get("stale")]
            if own:
                out[step] = {
                    "seconds": sum(a["seconds"] for a in own),
                    "forward_tokens": sum(a["forward_tokens"] for a in own),
                    "peak_bytes": max(a["peak_bytes"] for a in own),
                    "peak_cuda_bytes": max(a["peak_cuda_bytes"] for a in own),
                    "artefacts": len(own),
                }
        return out

    def count_tokens(self, n: int) -> None:
        """Add n forward tokens to what is being computed."""
        for meter in self._meters:
            meter.forward_tokens += n

    # ---------------------------------------------------------------------------------------------------- the steps

    def done(self, file: str, inputs: Mapping[str, Any] | None = None) -> bool:
        """True if an artefact is there, whole, and made from the same inputs."""
        entry = self.manifest["artefacts"].get(file)
        if entry is None or entry.get("stale") or (entry["inputs"] != _plain(inputs or {})):
            return False
        return matches(self.path(file), entry["files"])

    def do(
        self,
        step: str,
        file: str,
        compute: Callable[[], T],
        save: Callable[[T, Path], None] | None = None,
        load: Callable[[Path], T] | None = None,
        *,
        inputs: Mapping[str, Any] | None = None,
    ) -> T:
        """The artefact `file` of a step: loaded where it is done, else computed and written.

        file: path inside the run; what `save` makes of it may be a file or a directory. save and load default to the
            format of the suffix: .safetensors (named tensors), .json (plain data), .md and .txt (text).
        inputs: plain data that the artefact depends on beside the configuration (hashes of earlier artefacts, say);
            where it differs from the recorded one, the artefact is made again.
        An artefact that is damaged is made again; one that somebody changed is set aside first, not deleted.
        Raises UserError where a file that is not the run's stands in its place, or the disk is full.
        """
        if step not in self.steps:
            raise ValueError(f"no step {step!r}; known are {', '.join(self.steps)}")
        as_saved = save is None and file.endswith(".json")  # lists for tuples: the first time as the second
        if (save is None) != (load is None) or (save is None and Path(file).suffix not in FORMATS):
            raise ValueError(f"{file}: give save and load, both, or one of the suffixes {', '.join(FORMATS)}")
        if save is None or load is None:
            save, load = FORMATS[Path(file).suffix]
        target = self.path(file)
        if self.done(file, inputs):
            return load(target)
        if os.path.lexists(target) and file not in self.manifest["artefacts"]:
            raise UserError(f"{str(target)!r} is in the way and was not written by this run; move it elsewhere")
        partial = self._partial / file
        with self._measured(file) as cost:
            value = compute()
            with writing(target, partial):
                partial.parent.mkdir(parents=True, exist_ok=True)
                save(value, partial)
                flush(partial)
                target.parent.mkdir(parents=True, exist_ok=True)
            files = fingerprint(partial)
        self._clear(file)
        self.manifest["artefacts"].pop(file, None)  # the newest stands last
        self.manifest["artefacts"][file] = {
            "step": step,
            "files": files,
            "inputs": _plain(inputs or {}),
            "finished": _now(),
            "environment": self._environment(),
            **cost,
        }
        self.manifest["unfinished"].pop(file, None)
        self._write_manifest()
        with writing(target):
            place(partial, target)
        return load(target) if as_saved else value

    def grow(self, step: str, file: str) -> Path:
        """The path of a file that a step appends to itself (a journal); it is the run's, but not hashed."""
        if step not in self.steps:
            raise ValueError(f"no step {step!r}; known are {', '.join(self.steps)}")
        if file not in self.manifest["growing"]:
            if os.path.lexists(self.path(file)):
                raise UserError(f"{str(self.path(file))!r} is in the way and was not written by this run; move it")
            self.manifest["growing"][file] = {"step": step}
            self._write_manifest()
        self.path(file).parent.mkdir(parents=True, exist_ok=True)
        return self.path(file)

    def change(
        self, step: str, overrides: Mapping[str, Any], *, again: bool = False, admit: Admit = lambda _: None
    ) -> dict[str, Any]:
        """Give settings (dotted keys) new values for a step and all later ones, whose artefacts are deleted.

        again: delete them whatever the values. admit: called before anything is recorded or deleted; may refuse.
        Returns the new configuration. Raises UserError for a setting that an earlier step has already used.
        """
        flat, own = flatten(self.config), changes.FIRST.get(step, step)
        wanted = {key: value for key, value in flatten(_plain(overrides)).items() if value != flat.get(key)}
        used = self.steps[: self.steps.index(own)]
        for key in wanted:
            if (where := changes.step_of(key, self.steps)) in used:
                raise UserError(
                    f"{key} is {changes.show(flat, key)} in this run, and its step {where!r} comes before {step!r}; "
                    f"start another run, or {changes.advice(self.directory, wanted, [key])}"
                )
        if wanted or again:
            admit(self)
            new = {**flat, **wanted}
            old = {**flat, **self._searched(flat, new)}
            differing = [key for key in wanted if old.get(key) != new[key]]
            touched = changes.first_touched(self.steps, old, new, differing)
            first = [step for step in (touched, own if again else None) if step]
            self._take(nest(new), first=min(first, key=self.steps.index, default=None))
        return self.config

    def require_space(self, n_bytes: int, what: str) -> None:
        """Raise UserError now, before long work, where the disk cannot take `what` (a plural)."""
        free = shutil.disk_usage(self.directory).free
        if n_bytes > free:
            raise UserError(
                f"{what} need {n_bytes / 1e9:.2f} GB, but the disk of {str(self.directory)!r} has "
                f"{free / 1e9:.2f} GB left; make room, or choose another --out"
            )

    # ------------------------------------------------------------------------------------------------------ inside

    @property
    def _partial(self) -> Path:
        return self.directory / ".prunus" / "partial"

    def _write_manifest(self) -> None:
        text = json.dumps(self.manifest, indent=1) + "\n"
        write_text(self.directory / "manifest.json", text, self._partial / "manifest.json")

    def _write_config(self) -> None:
        path, text = self.directory / "config.yaml", to_yaml(self.config, HEADER)
        if not path.exists() or path.read_text(encoding="utf-8", errors="replace") != text:
            write_text(path, text, self._partial / "config.yaml")

    def _take(self, config: Mapping[str, Any], first: str | None) -> None:
        """Record a configuration and what it makes stale in one write; only then delete anything."""
        self.manifest["config"] = _plain(config)
        if first is not None:
            late = self.steps[self.steps.index(first) :]
            for entry in (*self.manifest["artefacts"].values(), *self.manifest["growing"].values()):
                if entry["step"] in late:
                    entry["stale"] = True
        self._write_manifest()
        self._write_config()
        self._sweep()

    def _sweep(self) -> None:
        """Delete what is stale; harmless to stop in and to repeat."""
        artefacts, growing = self.manifest["artefacts"], self.manifest["growing"]
        stale = [file for file, entry in artefacts.items() if entry.get("stale")]
        outgrown = [file for file, entry in growing.items() if entry.get("stale")]
        for file in stale:
            self._clear(file)
            del artefacts[file]
        for file in outgrown:
            for path in (self.path(file), *self.path(file).parent.glob(f"{self.path(file).name}.*")):  # its locks
                remove(path)
            del growing[file]
        if stale or outgrown:
            self._write_manifest()

    def _clear(self, file: str) -> None:
        """Make room for an artefact: delete what the run wrote, set aside what somebody has changed since."""
        target, entry = self.path(file), self.manifest["artefacts"].get(file)
        if entry is None or not os.path.lexists(target):
            return
        inside = [p for p in target.rglob("*") if not p.is_dir()] if target.is_dir() else [target]
        if len(inside) == len(entry["files"]) and matches(target, entry["files"]):
            with writing(target):
                self._partial.mkdir(parents=True, exist_ok=True)
                gone = self._partial / f"deleted-{time.monotonic_ns()}"
                os.replace(target, gone)  # deleting a directory takes many steps; losing its name takes one
            remove(gone)
            return
        n = next(n for n in range(1, 10**6) if not os.path.lexists(target.with_name(f"{target.name}.changed-{n}")))
        aside = target.with_name(f"{target.name}.changed-{n}")
        with writing(aside):
            os.replace(target, aside)
        log.warning("%s is not as it was written: set aside as %s, and made again", target, aside.name)

    def _environment(self) -> int:
        """Index of the versions in use among those that the manifest lists."""
        known: list[dict[str, str]] = self.manifest["environments"]
        now = environment()
        if now not in known:
            known.append(now)
        return known.index(now)

    @contextmanager
    def _measured(self, file: str) -> Iterator[dict[str, float]]:
        """Fills the yielded dict with seconds, forward tokens and peak memory, earlier broken attempts included."""
        out: dict[str, float] = {}
        before = self.manifest["unfinished"].get(file, {"seconds": 0.0, "forward_tokens": 0})
        for meter in self._meters:  # an outer measurement goes on: keep what it has seen before the peak is reset
            meter.see()
        reset_peak()
        own = Meter()
        self._meters.append(own)
        finished = False
        try:
            yield out
            finished = True
        finally:
            for meter in self._meters:
                meter.see()
            self._meters.remove(own)
            spent = {
                "seconds": round(before["seconds"] + own.end(self._meters), 3),
                "forward_tokens": before["forward_tokens"] + own.forward_tokens,
            }
            out |= {**spent, "peak_bytes": own.peak_bytes, "peak_cuda_bytes": own.peak_cuda_bytes}
            if not finished:
                self.manifest["unfinished"][file] = spent
                try:
                    self._write_manifest()
                except UserError as error:  # the first trouble is the one to report
                    log.warning("%s", error)


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The record of a run, to look at; takes no lock. Raises UserError where there is none, or it cannot be read."""
    path = Path(directory) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{str(directory)!r} is no run of Prunus (it has no manifest.json); start one with compress"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {str(path)!r}: {error}; restore it, or choose another --out") from None
    found = manifest.get("prunus_run") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise UserError(
            f"{str(path)!r} has format {found!r}, this version of Prunus reads {FORMAT}; choose another --out"
        )
    return dict(manifest)


def _describe(source: Mapping[str, Any]) -> str:
    sha = str(source.get("sha256", ""))[:12]
    return f"{source.get('id', 'unknown')}{f' (sha256 {sha})' if sha else ''}"


def _plain(value: Any) -> Any:
    """Plain data as JSON gives it back."""
    return json.loads(json.dumps(value))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
