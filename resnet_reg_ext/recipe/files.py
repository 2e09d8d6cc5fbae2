"""Files that are whole or not there: written aside, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unicodedata import category


class RecipeError(Exception):
    """Something that the user can put right, in one sentence."""


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Gives a path beside ``path`` to write to; renames it at the end, removes it on an error."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file."""
    with aside(path) as temporary:
        temporary.write_text(text)


def prepare_folder(folder: Path, needed: int) -> None:
    """Makes the output folder, before anything takes time.

    Args:
        folder: where output will go.
        needed: bytes that will be written.

    Raises:
        RecipeError: it can't be written to, or the disk has less room.
    """
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
