"""Printing that goes on where a terminal can't show a letter, or is gone."""

from __future__ import annotations

import io
import os
import sys


def escape_what_cannot_be_shown() -> None:
    """Makes the standard streams escape letters that their encoding lacks (backslashreplace).

    Class names in Chinese meet a Latin-1 terminal, names from old archives aren't UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def one_line(text: str) -> str:
    """A text whose line breaks and control characters, as file names may have, are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def leave_terminal() -> None:
    """Sends standard output and error to /dev/null where they go to a terminal that has closed."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")  # EIO from a terminal that is gone
        except OSError:
            os.dup2(nowhere, descriptor)
    os.close(nowhere)
