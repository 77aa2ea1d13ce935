"""Floor 0: files that are whole or not there: written under another name, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunus.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Files = dict[str, dict[str, Any]]  # path inside an artefact ("" for a single file) -> {"bytes": ..., "sha256": ...}


@contextmanager
def writing(path: str | Path, partial: Path | None = None) -> Iterator[None]:
    """Turns a full disk, a missing permission and the like into a UserError that names `path`.

    `partial` (a file or a directory) is removed whenever the block fails, whatever the reason.
    """
    try:
        yield
    except BaseException as error:
        if partial is not None:
            remove(partial)
        if reason := trouble(error):
            raise UserError(f"cannot write {str(path)!r}: {reason}") from error
        raise


def trouble(error: BaseException) -> str:
    """What a person can do about an error of the disk, or "" for other errors. Libraries in Rust lose the errno."""
    number, text = getattr(error, "errno", None), str(error)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or "quota exceeded" in text.lower():
        return "the disk is full; nothing half-written was kept. Make room, then give the same command again"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS) or "Permission denied" in text or "Read-only file" in text:
        return "no permission; choose a directory that you may write to"
    if number in (errno.ENOTDIR, errno.EEXIST):
        return "a file stands where a directory is needed; choose another path"
    if number == errno.EISDIR:
        return "a directory stands where a file is needed; choose another path"
    if number == errno.ENOTEMPTY:
        return "a directory with other files stands there; choose another path"
    if number == errno.ENOENT:
        return "there is no such file or folder, or it was deleted meanwhile; choose another path"
    if isinstance(error, OSError) and number in (errno.ENAMETOOLONG, errno.EIO, errno.EFBIG):
        return f"{error.strerror}; choose another directory"
    return ""


def refuse_unwritable(path: str | Path) -> None:
    """Raise UserError, before long work, for a file that `write_text` could not write; folders on its way are made."""
    target = Path(path).absolute()
    there = next(folder for folder in target.parents if folder.exists())
    with writing(path):
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def remove(path: Path) -> None:
    """Delete a file or a directory tree, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Make a file, or a directory with everything in it, survive a loss of power."""
    if path.is_dir():
        for inner in path.iterdir():
            flush(inner)
    _sync(path)


def _sync(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # directories cannot be opened on Windows
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some file systems cannot flush directories
            raise
    finally:
        os.close(handle)


def place(partial: Path, target: Path) -> None:
    """Give a flushed file or directory its name; the one step that makes an artefact exist."""
    os.replace(partial, target)
    _sync(target.parent)


def write_text(path: str | Path, text: str, partial: Path | None = None) -> None:
    """Write a text file whole or not at all; raises UserError where the disk is full or may not be written to.

    partial: where to write first, on the same disk; a hidden name beside `path` by default.
    """
    target = Path(path)
    partial = partial or target.with_name(f".{target.name}.partial-{os.getpid()}")
    with writing(target, partial):
        partial.parent.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        flush(partial)
        place(partial, target)


def fingerprint(path: Path) -> Files:
    """Size and SHA-256 of a file (under the name ""), or of every file in a directory."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    out: Files = {}
    for file in files:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        name = file.relative_to(path).as_posix() if path.is_dir() else ""
        out[name] = {"bytes": file.stat().st_size, "sha256": digest}
    return out


def digest(files: Files) -> str:
    """One SHA-256 for all files of a directory."""
    text = json.dumps({name: one["sha256"] for name, one in files.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def matches(path: Path, files: Files) -> bool:
    """True if every recorded file is there as it was written; further files in a directory do not matter."""
    whole = [path / name if name else path for name in files]
    if not all(p.is_file() and p.stat().st_size == one["bytes"] for p, one in zip(whole, files.values(), strict=True)):
        return False  # sizes first: they cost nothing
    for file, one in zip(whole, files.values(), strict=True):
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != one["sha256"]:
                return False
    return bool(files)


# -------------------------------------------------------------------------------------------------------- formats


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Named tensors as a safetensors file."""
    from safetensors.torch import save_file

    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of `save_tensors`, on the CPU."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def save_json(value: Any, path: Path) -> None:
    """Plain data as JSON."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def load_json(path: Path) -> Any:
    """What `save_json` wrote; tuples come back as lists."""
    return json.loads(path.read_text(encoding="utf-8"))


def save_text(value: str, path: Path) -> None:
    """A page of text."""
    path.write_text(value, encoding="utf-8")


def load_text(path: Path) -> str:
    """What `save_text` wrote."""
    return path.read_text(encoding="utf-8")


FORMATS: Mapping[str, tuple[Callable[[Any, Path], None], Callable[[Path], Any]]] = {
    ".safetensors": (save_tensors, load_tensors),
    ".json": (save_json, load_json),
    ".md": (save_text, load_text),
    ".txt": (save_text, load_text),
}
