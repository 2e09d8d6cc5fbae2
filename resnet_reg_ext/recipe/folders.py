"""Folders of images: class folders, folders for splits, and what in them is no image."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from .files import RecipeError
from .images import inspect_image
from .splits import Split

# Other common names of the folders train, val and test.
_LIKE_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval"}


def class_names(folder: Path) -> tuple[str, ...]:
    """The names of a folder's class folders, at least two.

    Raises:
        RecipeError: there are fewer.
    """
    names = _found(folder)
    if len(names) == 1:
        raise RecipeError(f"{folder} has one class only ({names[0]}); at least two are needed")
    return names


def check_class_folders(root: Path, classes: Sequence[str]) -> None:
    """Refuses folders that hold splits or class folders themselves.

    Raises:
        RecipeError: names the folder.
    """
    for name in classes:
        if name.lower() in _LIKE_SPLITS:
            raise RecipeError(
                f"--data {root} has a folder {name}, which looks like a split and not like a "
                "class: splits must be called train, val and test"
            )
    for name in classes:
        inside = [path for path in _folders(root / name) if any(_images_in(path))]
        if inside and not any(map(_is_image, (root / name).iterdir())):
            raise RecipeError(
                f"--data {root} has no images in {name}, but in folders inside it: is "
                f"{root / name} the folder of class folders?"
            )


def scan(folder: Path, classes: Sequence[str], corrupt: str) -> Split:
    """The usable images of a folder of class folders.

    Args:
        folder: holds a folder of images for each class.
        classes: the known classes; a label is an index into them.
        corrupt: "refuse" or "skip" images that can't be used.

    Raises:
        RecipeError: an image can't be used, a class has none, or a class isn't known.
    """
    found = _found(folder)
    if unknown := sorted(set(found) - set(classes)):
        raise RecipeError(other_classes(folder, found, classes, unknown[0]))
    paths = [
        (path, label)
        for label, name in enumerate(classes)
        if name in found
        for path in sorted(_images_in(folder / name))
    ]
    # Every image is decoded once before training, so that a bad one doesn't stop it halfway.
    with ThreadPoolExecutor() as pool:
        faults = list(pool.map(lambda path: inspect_image(path).fault, (path for path, _ in paths)))
    bad = [(path, fault) for (path, _), fault in zip(paths, faults, strict=True) if fault]
    if bad and corrupt == "refuse":
        others = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise RecipeError(
            f"can't read image {bad[0][0]}: {bad[0][1]}{others}; --corrupt skip leaves such out"
        )
    good = [item for item, fault in zip(paths, faults, strict=True) if not fault]
    taken = {path for path, _ in paths}
    present = {label for _, label in good}
    for label, name in enumerate(classes):
        if name in found and label not in present:
            ignored = _ignored(folder / name, taken)
            why = f"; {ignored} (images end in {', '.join(IMG_EXTENSIONS)})" if ignored else ""
            raise RecipeError(f"{folder / name} has no image that can be used{why}")
    labels = torch.tensor([label for _, label in good], dtype=torch.int64)
    notes = [f"skipped {path}: {fault}" for path, fault in bad]
    if ignored := _ignored(folder, taken):
        notes.append(f"{folder}: {ignored}")
    if missing := [name for name in classes if name not in found]:
        notes.append(f"{folder} has no images of {', '.join(missing)}")
    return Split([path for path, _ in good], labels, notes=tuple(notes))


def digest(root: Path, *splits: Split) -> str:
    """SHA-256 of the relative paths, file sizes and labels of images."""
    lines = [
        f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0{label}"
        for split in splits
        for path, label in zip(split.images, split.labels.tolist(), strict=True)
        if isinstance(path, Path)
    ]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def other_classes(
    where: object, found: Sequence[str], known: Sequence[str], unknown: str | None = None
) -> str:
    """The sentence for classes that differ from the training's."""
    name = unknown or next(iter(sorted(set(found) ^ set(known))), "their order")
    return f"{where} has other classes than the training: {name} (known: {', '.join(known)})"


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder; editors and notebooks make hidden ones, which are left out."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _is_image(path: Path) -> bool:
    """Judged by the suffix; macOS writes hidden files with the same suffix, which are none."""
    return path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")


def _visible(folder: Path) -> Iterator[Path]:
    """All files and folders below a folder, except hidden ones."""
    return (
        path
        for path in folder.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _images_in(folder: Path) -> Iterator[Path]:
    """The images below a folder."""
    return filter(_is_image, _visible(folder))


def _ignored(folder: Path, taken: Set[Path]) -> str:
    """Counts the files that are no images, by suffix; "" for none."""
    files = [path for path in _visible(folder) if path not in taken and path.is_file()]
    if not files:
        return ""
    ends = Counter(path.suffix.lower() or "without a suffix" for path in files)
    listed = ", ".join(f"{end} {count}" for end, count in sorted(ends.items()))
    return f"ignored {len(files)} {'file' if len(files) == 1 else 'files'}: {listed}"


def _found(folder: Path) -> tuple[str, ...]:
    """The names of a folder's class folders, at least one."""
    names = tuple(path.name for path in _folders(folder))
    if not names:
        if any(map(_is_image, folder.iterdir())):
            what = "has images but no folders"
        else:
            what = "has no folders" if any(_visible(folder)) else "is empty"
        raise RecipeError(f"{folder} {what}: it needs a folder of images for each class")
    return names
