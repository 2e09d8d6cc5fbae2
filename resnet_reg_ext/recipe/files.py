"""Output: files that are whole or not there, in a folder that one run at a time writes to."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unicodedata import category

from ..atomic_write import atomic_write

LOCK = ".lock"


class RecipeError(Exception):
    """Something that the user can put right, in one sentence."""


class Stopped(Exception):
    """A signal stopped the run after a step, and a checkpoint was written."""

    def __init__(self, number: int, folder: Path) -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.folder = number, folder


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, whatever the locale; names that aren't UTF-8 are escaped."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        RecipeError: it can't be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"can't read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is damaged: {error!s:.200}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path} is damaged: it holds a {type(content).__name__}")
    return content


def prepare_folder(folder: Path, needed: int) -> None:
    """Makes the output folder, before anything takes time.

    Args:
        folder: where output will go.
        needed: bytes that will be written.

    Raises:
        RecipeError: it can't be written to, or the disk has less room.
    """
    if "::" in str(folder.absolute()):
        raise RecipeError(
            f"--out {folder} can't be used: Lightning takes :: in a path for a chain of protocols"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise RecipeError(f"can't write to --out {folder}: {error.strerror}") from None
    if free < needed:
        raise RecipeError(
            f"--out {folder} has {free / 1e6:.0f} MB free; this needs {needed / 1e6:.0f} MB"
        )


def printable(name: str) -> str:
    r"""Escapes what a line of UTF-8 text can't hold: control characters and lone surrogates.

    Python puts surrogates into file names that aren't UTF-8 (PEP 383): the bytes ``caf\xe9`` become
    ``caf\udce9`` here, spelt out.
    """
    return "".join(
        c.encode("unicode_escape").decode() if category(c) in ("Cc", "Cs", "Zl", "Zp") else c
        for c in name
    )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other runs out of an output folder, and removes what a killed run left half written.

    The kernel releases the lock when the process ends, however it ends. Where the file system has
    no locks there is no protection.

    Raises:
        RecipeError: another run holds the folder.
    """
    with (folder / LOCK).open("a+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # NFS answers with the latter
            file.seek(0)
            holder = file.readline(200).strip() or "another process"
            raise RecipeError(
                f"--out {folder} is in use by another run ({holder}): wait for its end, or give "
                "another --out"
            ) from None
        except OSError:
            yield
            return
        for part in folder.glob(".*.part"):
            part.unlink(missing_ok=True)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            # Closing is not enough: forked loader workers may hold the descriptor a while longer.
            fcntl.flock(file, fcntl.LOCK_UN)


def is_unused(folder: Path) -> bool:
    """Whether a folder is missing, empty, or holds only what a run killed at its start left."""
    if not folder.is_dir():
        return True
    return all(p.name == LOCK or p.match(".*.part") for p in folder.iterdir())
