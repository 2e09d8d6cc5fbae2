"""A folder of class folders: its classes, its usable images, and what the user should know."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unicodedata import normalize

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from .files import RecipeError, printable
from .images import Inspection, inspect_image
from .splits import Split
from .walk import Listing, is_image, list_folder, walk


def class_names(folder: Path) -> tuple[str, ...]:
    """The names of a folder's class folders, at least two.

    Raises:
        RecipeError: there are fewer.
    """
    names = tuple(class_folders(folder))
    if len(names) == 1:
        raise RecipeError(f"{folder} has one class only ({names[0]}); at least two are needed")
    return names


def class_folders(folder: Path) -> dict[str, Path]:
    """The class folders by their names, which are :func:`printable`; at least one.

    Raises:
        RecipeError: there is none, or two names look the same.
    """
    listing = list_folder(folder)
    if not listing.folders:
        what = "has no folders" if listing.files else "is empty"
        if listing.images:
            what = "has images but no folders"
        raise RecipeError(f"{folder} {what}: it needs a folder of images for each class")
    names = [printable(path.name) for path in listing.folders]
    for alike in _alike(names, comparable):
        name = comparable(alike[0])
        raise RecipeError(
            f"{folder} has {len(alike)} folders that are called {name}, in different Unicode "
            "forms (NFC and NFD): put their images into one, or rename one"
        )
    return dict(zip(names, listing.folders, strict=True))


def comparable(name: str) -> str:
    """A class name in a form (NFC) that is the same on each system: macOS decomposes accents."""
    return normalize("NFC", printable(name))


def same_classes(first: Iterable[str], second: Iterable[str]) -> bool:
    """Whether two lists of class names are the same."""
    return [comparable(name) for name in first] == [comparable(name) for name in second]


def scan(folder: Path, classes: Sequence[str], corrupt: str) -> Split:
    """The usable images of a folder of class folders.

    Args:
        folder: holds a folder of images for each class.
        classes: the known classes; a label is an index into them.
        corrupt: "refuse" or "skip" images that can't be used.

    Raises:
        RecipeError: an image can't be used, a class has none, or a class isn't known.
    """
    found = class_folders(folder)
    labels = {comparable(name): label for label, name in enumerate(classes)}
    if unknown := sorted(name for name in found if comparable(name) not in labels):
        raise RecipeError(other_classes(folder, list(found), classes, unknown[0]))
    listings = {labels[comparable(name)]: walk(path) for name, path in found.items()}
    paths = [(path, label) for label in sorted(listings) for path in listings[label].images]
    # Every image is decoded once before training, so that a bad one doesn't stop it halfway.
    with ThreadPoolExecutor() as pool:
        inspections = list(pool.map(inspect_image, (path for path, _ in paths)))
    inspected = list(zip(paths, inspections, strict=True))
    bad = [(path, each.fault) for (path, _), each in inspected if each.fault]
    if bad and corrupt == "refuse":
        others = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        where, fault = printable(str(bad[0][0])), bad[0][1]
        raise RecipeError(
            f"can't read image {where}: {fault}{others}; --corrupt skip leaves such out"
        )
    good = [item for item, each in inspected if not each.fault]
    _check_not_empty(found, listings, labels, {label for _, label in good})
    notes = [f"skipped {path}: {fault}" for path, fault in bad]
    notes += _notes_on_images(folder, inspected)
    notes += _notes_on_files(folder, listings.values())
    if missing := [name for label, name in enumerate(classes) if label not in listings]:
        notes.append(f"{folder} has no images of {', '.join(missing)}")
    if same := ["/".join(names) for names in _alike(found, str.casefold)]:
        notes.append(f"{folder} has classes that differ in upper and lower case only: {same[0]}")
    return Split(
        [path for path, _ in good],
        torch.tensor([label for _, label in good], dtype=torch.int64),
        notes=tuple(map(printable, notes)),
    )


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


def _alike(names: Iterable[str], form: Callable[[str], str]) -> list[list[str]]:
    """Groups of two and more names that have the same form."""
    groups = defaultdict(list)
    for name in names:
        groups[form(name)].append(name)
    return [group for group in groups.values() if len(group) > 1]


def _check_not_empty(
    found: Mapping[str, Path],
    listings: Mapping[int, Listing],
    labels: Mapping[str, int],
    present: Set[int],
) -> None:
    for name, path in found.items():
        label = labels[comparable(name)]
        if label not in present:
            ignored = _ignored(file for file in listings[label].files if not is_image(file))
            why = f"; {ignored} (images end in {', '.join(IMG_EXTENSIONS)})" if ignored else ""
            raise RecipeError(f"{path} has no image that can be used{why}")


def _notes_on_images(
    folder: Path, inspected: Sequence[tuple[tuple[Path, int], Inspection]]
) -> list[str]:
    """One note for all images of which the same is to be said."""
    examples: dict[str, list[Path]] = defaultdict(list)
    for (path, _), inspection in inspected:
        for note in inspection.notes:
            examples[note].append(path)
    return [
        f"{folder}: {_count(paths, 'image')} with {note}: {paths[0]}"
        + (" and others" if len(paths) > 1 else "")
        for note, paths in examples.items()
    ]


def _notes_on_files(folder: Path, listings: Iterable[Listing]) -> list[str]:
    """Notes on files and folders that are left out."""
    whole = list_folder(folder)
    inside = Listing()
    for listing in listings:
        inside.add(listing)
    notes = []
    # Beside the class folders images are ignored too.
    others = [path for path in inside.files if not is_image(path)]
    if ignored := _ignored([*whole.files, *others]):
        notes.append(f"{folder}: {ignored}")
    if passed_over := [*whole.passed_over, *inside.passed_over]:
        names = Counter(path.name if path.is_dir() else "hidden images" for path in passed_over)
        listed = ", ".join(f"{name} {count}" for name, count in sorted(names.items()))
        notes.append(f"{folder}: passed over hidden and system files: {listed}")
    if links := inside.repeated:
        more = f" and {len(links) - 1} more" if len(links) > 1 else ""
        notes.append(
            f"passed over the link {links[0]}{more}: the folder that it leads to is taken "
            "already, or holds the link itself"
        )
    return notes


def _ignored(files: Iterable[Path]) -> str:
    """Counts files by suffix; "" for none."""
    ignored = [path for path in files if path.is_file()]
    if not ignored:
        return ""
    ends = Counter(path.suffix.lower() or "without a suffix" for path in ignored)
    listed = ", ".join(f"{end} {count}" for end, count in sorted(ends.items()))
    return f"ignored {_count(ignored, 'file')}: {listed}"


def _count(items: Sequence[object], what: str) -> str:
    return f"{len(items)} {what}" if len(items) == 1 else f"{len(items)} {what}s"
