"""Files below a folder, links followed; what an operating system or an editor puts there is not."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from .files import RecipeError, printable

# Made by macOS's zip, Synology, QNAP, Windows, ext4 and Python; hidden folders come on top.
_SYSTEM_FOLDERS = {
    "__macosx",
    "@eadir",
    "#recycle",
    "#snapshot",
    "@recycle",
    "@recently-snapshot",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "__pycache__",
}


@dataclass
class Listing:
    """The contents of a folder, at all depths or at its own alone."""

    files: list[Path] = field(default_factory=list)
    """Not hidden; sorted."""
    folders: list[Path] = field(default_factory=list)
    """Neither hidden nor an operating system's; sorted."""
    passed_over: list[Path] = field(default_factory=list)
    """Hidden folders, an operating system's folders, hidden images."""
    repeated: list[Path] = field(default_factory=list)
    """Links to folders that are listed already, or that lie above."""

    @property
    def images(self) -> list[Path]:
        """The files that are images by their suffix."""
        return [path for path in self.files if is_image(path)]

    def add(self, other: Listing) -> None:
        """Appends another listing."""
        self.files += other.files
        self.folders += other.folders
        self.passed_over += other.passed_over
        self.repeated += other.repeated


def is_image(path: Path) -> bool:
    """Judged by the suffix."""
    return path.suffix.lower() in IMG_EXTENSIONS


def list_folder(folder: Path) -> Listing:
    """The files and folders directly in a folder.

    Raises:
        RecipeError: it can't be read.
    """
    try:
        with os.scandir(folder) as entries:
            found = sorted((folder / entry.name, _is_folder(entry)) for entry in entries)
    except OSError as error:
        where = printable(str(folder))
        raise RecipeError(f"can't read the folder {where}: {error.strerror}") from None
    listing = Listing()
    for path, is_folder in found:
        hidden = path.name.startswith(".")
        if is_folder and (hidden or path.name.lower() in _SYSTEM_FOLDERS):
            listing.passed_over.append(path)
        elif is_folder:
            listing.folders.append(path)
        elif not hidden:
            listing.files.append(path)
        # macOS writes a file ._NAME beside each NAME where a disk can't hold its attributes.
        elif is_image(path) and not path.name.startswith("._"):
            listing.passed_over.append(path)
    return listing


def walk(top: Path) -> Listing:
    """All files and folders below a folder. Links are followed, but no folder is listed twice.

    Real folders come before links, so that images in them keep their own paths. A link to a folder
    above ``top`` would list ``top`` again, and is not followed.

    Raises:
        RecipeError: a folder can't be read.
    """
    listing = Listing()
    real = top.resolve()
    seen = {_identity(path) for path in (*top.absolute().parents, *real.parents)}
    folders, links = deque([top]), deque[Path]()
    while folders or links:
        folder = folders.popleft() if folders else links.popleft()
        identity = _identity(folder)
        if identity in seen:
            listing.repeated.append(folder)
            continue
        seen.add(identity)
        inside = list_folder(folder)
        listing.add(inside)
        for path in inside.folders:
            (links if path.is_symlink() else folders).append(path)
    listing.files.sort()
    return listing


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Links are followed; one that leads to itself is no folder."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
