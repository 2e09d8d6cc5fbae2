"""``resnet-reg predict``: a trained network on images that have no labels."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from ..atomic_write import atomic_write
from .files import RecipeError, printable
from .images import inspect_image, load_image
from .loaders import batch_size_for, transform
from .model import load_classifier
from .predictions import Table, check_finite
from .terminal import one_line
from .train import be_quiet
from .walk import walk

FORMATS = ("csv", "json")


class _Images(Dataset[tuple[int, Tensor | str]]):
    """The row and the transformed image, or the reason why it can't be read."""

    def __init__(self, paths: Sequence[Path], image_size: int) -> None:
        self.paths, self.transform = paths, transform(image_size, "none")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[int, Tensor | str]:
        try:
            return row, self.transform(load_image(self.paths[row]))
        except Exception as error:  # Pillow's decoders raise many kinds
            return row, inspect_image(self.paths[row]).fault or str(error)


def predict(
    checkpoint: Path,
    sources: Sequence[Path],
    out: Path | None = None,
    *,
    form: str | None = None,
    overwrite: bool = False,
    workers: int = 0,
) -> int:
    """Writes class and probabilities of images, one row each; returns how many were passed over.

    The images are read and transformed as ``evaluate`` does: upright, in sRGB, on white, the
    shorter side resized to the run's ``image_size``, the middle cut out. Images that can't be read
    are named on standard error and left out.

    Args:
        checkpoint: ``last.ckpt`` or ``best.ckpt`` of a run.
        sources: image files, and folders whose images are taken at any depth.
        out: the file to write; None is standard output.
        form: "csv" or "json"; None goes by the suffix of ``out``, and is "csv" otherwise.
        overwrite: replace a file that is there.
        workers: processes that load images.

    Raises:
        RecipeError: something that the user can put right.
    """
    be_quiet()
    if out is not None and out.exists() and not overwrite:
        raise RecipeError(f"--out {out} is there already: give another, or --overwrite")
    if out is not None and not out.parent.is_dir():
        raise RecipeError(f"--out {out} can't be written: there is no folder {out.parent}")
    form = form or ("json" if out is not None and out.suffix.lower() == ".json" else "csv")
    paths = find_images(sources)
    classifier = load_classifier(checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier.to(device).eval()
    size = classifier.run.image_size
    dtype = classifier.model.fc.weight.dtype
    loader = DataLoader(
        _Images(paths, size),
        batch_size=batch_size_for(size),
        num_workers=workers,
        collate_fn=list,
    )
    passed_over = 0
    with _opened(out) as file, _bar(len(paths)) as bar, torch.inference_mode():
        table = Table(file, classifier.classes, form)
        for batch in loader:
            good = [(row, image) for row, image in batch if isinstance(image, Tensor)]
            for row, fault in batch:
                if isinstance(fault, str):
                    passed_over += 1
                    _warn(f"passed over {paths[row]}: {fault}")
            if good:
                images = torch.stack([image for _, image in good]).to(device, dtype)
                logits = classifier(images).float().cpu()
                check_finite(logits, f"an image such as {printable(str(paths[good[0][0]]))}")
                for (row, _), shares in zip(good, logits.softmax(1).tolist(), strict=True):
                    table.add(printable(str(paths[row])), shares)
            bar.update(len(batch))
        table.end()
    if passed_over:
        _warn(f"{passed_over} of {len(paths)} images passed over")
    return passed_over


def find_images(sources: Sequence[Path]) -> list[Path]:
    """The images of some files and folders, each once, in their order.

    A file that is named is taken whatever its suffix; in a folder the suffix tells.

    Raises:
        RecipeError: a source is not there, or a folder has no images.
    """
    found: dict[Path, None] = {}
    for source in sources:
        if source.is_dir():
            images = walk(source).images
            if not images:
                raise RecipeError(
                    f"{source} has no images: they end in {', '.join(IMG_EXTENSIONS)}"
                )
            found |= dict.fromkeys(images)
        elif source.exists() or source.is_symlink():
            found[source] = None
        else:
            raise RecipeError(f"{source} is neither a file nor a folder")
    return list(found)


@contextmanager
def _opened(out: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that is whole or not there."""
    if out is None:
        yield sys.stdout
        return
    with atomic_write(out) as part, part.open("w", encoding="utf-8", newline="") as file:
        yield file


def _bar(total: int) -> Any:
    """A bar on a terminal, a line now and then in a log."""
    interval = 0.5 if sys.stderr.isatty() else 15
    return tqdm(total=total, desc="predict", unit="image", mininterval=interval)


def _warn(text: str) -> None:
    with suppress(OSError):
        tqdm.write(one_line(printable(text)), file=sys.stderr)
