"""A g++ for tests that build the package, and don't ask how fast the result is.

Compiles with -O1, and keeps objects: of the same preprocessed text with the same flags, g++ makes
the same object. ``wrapper`` writes a program to give as CXX; what it runs is this file.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

OPTIMISED = "-O1"  # the kernels of a CPU compile in half the time of -O3, and faster than with -O0
NAMES_A_FILE = ("-o", "-MF")


def wrapper(path: Path) -> Path:
    """Writes the program."""
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -E -S "{Path(__file__)}" "$@"\n')
    path.chmod(0o755)
    return path


def main(arguments: Sequence[str]) -> int:
    """Does what g++ would with the arguments."""
    command = ["g++", *map(without_links, arguments), OPTIMISED]
    if "-c" not in arguments or "-MF" not in arguments:  # not csrc/build.py's rule for C++
        return subprocess.run(command).returncode
    out = Path(arguments[arguments.index("-o") + 1])
    key = object_key(command, out)
    if not key:  # g++ says what is wrong
        return subprocess.run(command).returncode
    kept = cache() / key
    if not kept.exists():
        result = subprocess.run(command)
        if result.returncode:
            return result.returncode
        scratch = kept.with_name(f"{kept.name}.{os.getpid()}")
        shutil.copyfile(out, scratch)
        scratch.replace(kept)
    shutil.copyfile(kept, out)
    return 0


def without_links(word: str) -> str:
    """A folder of headers by its one name, which their assertions hold."""
    return f"-I{os.path.realpath(word[2:])}" if word.startswith("-I/") else word


def object_key(command: Sequence[str], out: Path) -> str:
    """Of compiler, flags and preprocessed text; empty where there is none for an error.

    Writes the dependencies for ninja on the way. What -I and -D do is in the text.
    """
    compile_ = command.index("-c")
    source = command[compile_ + 1]
    place = command.index("-o")
    preprocess = [*command[:place], *command[place + 2 :], "-E", "-P", "-MT", str(out)]
    done = subprocess.run(preprocess, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if done.returncode:
        return ""
    flags = [
        word
        for before, word in itertools.pairwise(["", *command])
        if word != source and before not in NAMES_A_FILE and not word.startswith(("-I", "-D"))
    ]
    version = subprocess.run(["g++", "--version"], capture_output=True).stdout
    content = b"\0".join([version, " ".join(flags).encode(), done.stdout])
    return hashlib.sha256(content).hexdigest()


def cache() -> Path:
    """The folder of the objects."""
    folder = Path(tempfile.gettempdir()) / f"resnet-reg-ext-objects-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
