"""How the images that are evaluated are related to those of the training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from .files import RecipeError
from .folders import class_folders, comparable, digest, scan
from .layouts import Layout, find_layout, set_folders
from .settings import DIGITS, Run
from .splits import WHOLE, Source, Split
from .walk import walk

CHANGED = "the images are not what they were in training: some have come, gone or changed"


def remarks(
    checkpoint: Path,
    run: Run,
    source: Source | None,
    data: str | None,
    images: Split,
    classes: tuple[str, ...],
) -> list[str]:
    """What has to be known of figures on these images: they trained or chose the network, or not.

    Args:
        checkpoint: the file that is evaluated.
        run: of the checkpoint, its ``data`` found.
        source: the files that it was trained on, where it tells.
        data: the images that were asked for; None is the run's own.
        images: what is measured.
        classes: the class names.
    """
    if images.name == WHOLE:
        return []
    own = data is None or _same_place(data, source.folder if source else run.data)
    root, lines = Path(run.data if data is None else data), []
    if source is not None:
        is_same = _is_unchanged(root, run, classes, source)
        if own and not is_same:
            lines.append(f"{root}: {CHANGED}")
        own = own or is_same
    if not own:
        return lines
    if images.name == "train":
        lines.append(
            "these images trained the network: the figures say nothing of images that are new to it"
        )
    elif images.name == selection_split(run, root):
        lines.append(_how_chosen(checkpoint, run))
    return [line for line in lines if line]


def selection_split(run: Run, root: Path) -> str:
    """The split whose figures were watched during training and chose ``best.ckpt``.

    Args:
        run: the run that was trained.
        root: the folder of its images, which may have been moved.
    """
    if run.data == DIGITS or run.val_fraction is not None:
        return "val"
    # Of a version that had no test set, the folder test may have chosen.
    return "val" if "val" in find_layout(root).folders else "test"


def _how_chosen(checkpoint: Path, run: Run) -> str:
    chose = []
    if not checkpoint.name.startswith("last"):
        chose.append("the epoch of this checkpoint (best.ckpt is that of their lowest loss)")
    if run.early_stopping:
        chose.append("when training stopped (--early-stopping)")
    if not chose:
        return ""
    return (
        f"these images chose {' and '.join(chose)}: the figures are too good for new images; by "
        "how much, only a third set can tell"
    )


def _is_unchanged(root: Path, run: Run, classes: tuple[str, ...], source: Source) -> bool:
    """Whether a folder has the files that a run was given."""
    try:
        return any(
            source.digest == _digest_of(root, folders, run, classes)
            for folders in _possible_folders(root, run, classes)
        )
    except RecipeError:  # a folder has gone, or is not what it was
        return False


def _possible_folders(root: Path, run: Run, classes: tuple[str, ...]) -> list[list[Path]]:
    """The folders that a digest may be of, as today's version takes it and as one before."""
    layout = find_layout(root, classes)
    if not layout.is_split:
        layout = Layout({})
    folders = list(set_folders(run, root, layout).values())
    # A version that had no test set left the folder test out beside a folder val.
    return [folders, folders[:2]] if len(folders) > 2 else [folders]


def _digest_of(root: Path, folders: Sequence[Path], run: Run, classes: tuple[str, ...]) -> str:
    if run.corrupt == "skip":  # which images were left out is known once they are decoded
        return digest(root, *(scan(folder, classes, "skip") for folder in folders))
    return digest(root, *(_listed(folder, classes) for folder in folders))


def _listed(folder: Path, classes: tuple[str, ...]) -> Split:
    """All images of class folders, undecoded, in the order of ``scan``."""
    labels = {comparable(name): label for label, name in enumerate(classes)}
    found = {labels.get(comparable(name), -1): path for name, path in class_folders(folder).items()}
    pairs = [(path, label) for label in sorted(found) for path in walk(found[label]).images]
    return Split([path for path, _ in pairs], torch.tensor([label for _, label in pairs]))


def _same_place(data: str, other: str) -> bool:
    if DIGITS in (data, other):
        return data == other
    return Path(data).resolve() == Path(other).resolve()
