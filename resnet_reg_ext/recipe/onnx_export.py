"""Checkpoints in other programs' formats: ONNX, and files for ``load_compact``."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..atomic_write import atomic_write
from ..structure import save_compact
from .files import RecipeError
from .loaders import IMAGENET_MEAN, IMAGENET_STD
from .model import Classifier, load_classifier
from .shapes import ARCHITECTURE

TOLERANCE = 1e-4  # of the outputs' size: sums are added up in another order
_INPUT, _OUTPUT = "images", "logits"


def need(*packages: str) -> None:
    """Refuses to go on without packages of the extra ``export``.

    Raises:
        RecipeError: says what to install.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise RecipeError(
                f"{package} is missing: pip install 'resnet_reg_ext[export]' ({error})"
            ) from None


def export(checkpoint: Path, onnx: Path | None, weights: Path | None, *, check: bool) -> list[Path]:
    """Writes a checkpoint's model to other formats; returns the files written.

    Args:
        checkpoint: of a run, dense or compact.
        onnx: the ONNX file, for any number of images (count, 3, size, size) of the size that was
            trained on. Its metadata have the classes, the size, and mean and deviation by which
            images are normalised.
        weights: a file for ``load_compact``: .pt or .safetensors.
        check: compare onnxruntime's outputs with torch's before the file gets its name.

    Raises:
        RecipeError: a package is missing, the file can't be written, or outputs differ.
    """
    if onnx is None and weights is None:
        raise RecipeError("nothing to write: give --onnx FILE or --weights FILE")
    if onnx is not None:
        need("onnx", "onnxscript", *(["onnxruntime"] if check else []))
    elif check:
        raise RecipeError("--check compares an ONNX file: give --onnx FILE")
    classifier = load_classifier(checkpoint)
    written = []
    if onnx is not None:
        _check_folder("--onnx", onnx)
        with atomic_write(onnx) as temporary:
            write_onnx(
                classifier.model,
                classifier.run.image_size,
                temporary,
                classes=json.dumps(list(classifier.classes)),
                mean=json.dumps(IMAGENET_MEAN),
                std=json.dumps(IMAGENET_STD),
            )
            if check:
                difference = largest_difference(classifier, temporary)
                if not difference <= TOLERANCE:
                    raise RecipeError(
                        f"onnxruntime's outputs differ from torch's by {difference:.1e} of their "
                        f"size, more than {TOLERANCE:g}: {onnx} is not written"
                    )
                print(f"onnxruntime's outputs differ by {difference:.1e} of their size")
        written.append(onnx)
    if weights is not None:
        _check_folder("--weights", weights)
        save_compact(weights, classifier.model, architecture=ARCHITECTURE)
        written.append(weights)
    return written


def _check_folder(option: str, file: Path) -> None:
    if not file.parent.is_dir():
        raise RecipeError(f"{option} {file}: there is no folder {file.parent}")
    if file.is_dir():
        raise RecipeError(f"{option} {file} is a folder: must be a file")


def write_onnx(model: nn.Module, image_size: int, file: Path, **metadata: str) -> None:
    """Writes a model in evaluation mode and float32; the number of images is free."""
    program = torch.onnx.export(
        model.float().eval(),
        (torch.zeros(2, 3, image_size, image_size),),
        input_names=[_INPUT],
        output_names=[_OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("count")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(image_size=str(image_size), **metadata)
    program.save(str(file), external_data=False)


def session(file: Path, threads: int | None = None) -> Any:
    """An onnxruntime session on the CPU.

    Args:
        file: of ONNX.
        threads: so many; None lets onnxruntime decide.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
        # Threads that wait for work would take time from what is measured beside.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def largest_difference(classifier: Classifier, file: Path) -> float:
    """Between onnxruntime's and torch's logits, of their size, for one and for three images."""
    model: nn.Module = classifier.model.float().eval()
    running, size = session(file), classifier.run.image_size
    largest = 0.0
    for count in (1, 3):
        images = torch.randn((count, 3, size, size), generator=torch.Generator().manual_seed(count))
        with torch.inference_mode():
            expected: Tensor = model(images)
        (got,) = running.run([_OUTPUT], {_INPUT: images.numpy()})
        error = float((torch.from_numpy(got) - expected).abs().max())
        scale = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
        # max() would drop a NaN.
        largest = error / scale if not error / scale <= largest else largest
    return largest
