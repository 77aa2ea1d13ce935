"""Floor 2: where the record of a search is: a journal file, or a relational database for several machines."""

from __future__ import annotations

import os
import random
import re
import time
import warnings
from contextlib import suppress
from pathlib import Path

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from sqlalchemy import exc

from prunus.errors import UserError

BEAT, GRACE = 10, 60  # seconds between two signs of life of a process in a database, and after which it counts as dead
DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient", "pymysql": "PyMySQL"}
ATTEMPTS = 8  # at opening a database whose tables another process is making


def is_url(storage: object) -> bool:
    """True for the URL of a database, False for a file."""
    return isinstance(storage, str) and "://" in storage


def journal(path: Path) -> optuna.storages.JournalStorage:
    """A journal file, made where there is none; a last line that was left unfinished is cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _mend(path)
    return optuna.storages.JournalStorage(JournalFileBackend(str(path)))


def _mend(path: Path) -> None:
    """Cut a last line that a full disk or a lost machine left unfinished."""
    lock = JournalFileSymlinkLock(str(path))
    with suppress(FileNotFoundError), path.open("r+b") as file:
        if not file.seek(0, os.SEEK_END):
            return
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
        lock.acquire()
        try:
            file.seek(0)
            whole = file.read().rpartition(b"\n")
            file.truncate(len(whole[0]) + len(whole[1]))
        finally:
            lock.release()


def database(url: str) -> optuna.storages.RDBStorage:
    """A relational database, its tables made where there are none; ${NAME} in its URL is an environment variable.

    Raises UserError for a URL that says nothing, a driver that is not installed, and a database that does not answer.
    """
    filled = os.path.expandvars(url)
    if missing := re.search(r"\$\{?(\w+)", filled):
        raise UserError(f"search.storage names the environment variable {missing[1]}, which is not set; given {url!r}")
    options = {"connect_args": {"timeout": 60}} if filled.startswith("sqlite") else {"pool_pre_ping": True}
    for attempt in range(ATTEMPTS):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return optuna.storages.RDBStorage(
                    filled, engine_kwargs=options, heartbeat_interval=BEAT, grace_period=GRACE
                )
        except exc.NoSuchModuleError:
            raise UserError(f"no kind of database is called {url.partition(':')[0]!r}; given {url!r}") from None
        except (exc.ArgumentError, ValueError):
            raise UserError(
                f"search.storage {url!r} is no URL of a database; write it as sqlite:////shared/trials.db (four "
                "strokes before an absolute path) or postgresql://user@host/name"
            ) from None
        except ImportError as error:
            driver = str(getattr(error.__cause__ or error, "name", None) or "its driver")
            raise UserError(
                f"the database of {url!r} needs the Python module {driver}, which is not installed; "
                f"pip install {DRIVERS.get(driver, driver)!r}"
            ) from None
        except (exc.DBAPIError, optuna.exceptions.StorageInternalError, RuntimeError) as error:
            text = " ".join(str(error).split()).partition(" [SQL")[0]
            twice = "already exists" in text or "UNIQUE" in text or "duplicate key" in text
            if not twice or attempt == ATTEMPTS - 1:
                raise UserError(f"the database {url!r} cannot be used: {text[:300]}") from None
            time.sleep(0.1 + random.random() * 0.4)  # another process is making the same tables
    raise AssertionError("unreachable")


__all__ = ["database", "is_url", "journal"]
