"""Checkpoint files: read without trust, checked whole, written whole."""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic_write import atomic_write
from .files import RecipeError
from .former import is_former
from .settings import Run, run_from_file
from .shapes import FORMAT, checked_description
from .splits import Source

# What Lightning's checkpoints hold beside the weights, to go on training from.
_TRAINING_STATE = ("optimizer_states", "lr_schedulers", "callbacks", "loops")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of this recipe whose description has been checked."""

    run: Run
    classes: tuple[str, ...]
    state_dict: Mapping[str, Tensor]
    source: Source | None
    """The files that it was trained on, where it tells."""
    is_resumable: bool
    is_former: bool
    """Of a version that had no test set."""
    shapes: Mapping[str, Any] | None = None
    """Those of a compact model; None where it has all channels."""


def read_file(path: Path) -> Any:
    """What a .safetensors or torch file holds; runs none of its code.

    Raises:
        RecipeError: it can't be read.
    """
    if not path.is_file():
        raise RecipeError(f"{path} is not a file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if _is_torchscript(path):
            raise RecipeError(
                f"{path} is a TorchScript archive, which holds code: save the state dict alone, "
                "torch.save(torch.jit.load(FILE).state_dict(), NEW)"
            )
        # torchvision's and DINO's training scripts keep their options so; it has no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except RecipeError:
        raise
    except OSError as error:
        raise RecipeError(f"can't read {path}: {error.strerror or error}") from None
    except pickle.UnpicklingError:  # torch's text advises an option of its own
        raise RecipeError(
            f"{path} holds no weights that can be read: it is no checkpoint or state dict, or has "
            "objects in it that could run code"
        ) from None
    # Each format and each kind of damage has an error of its own, some of which derive from
    # Exception alone.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "weights_only" in reason:
            reason = "it has objects in it that could run code"
        raise RecipeError(f"{path} holds no weights: {reason:.300}") from None


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def check_tensor(where: object, name: object, value: Any) -> None:
    """Refuses what can't be copied into a parameter or a buffer of a ResNet-50.

    Raises:
        RecipeError: it is no tensor, or a sparse, quantized, meta or complex one.
    """
    kind = ""
    if not isinstance(name, str):
        kind = f"under {name!r:.50}, which is no name"
    elif not isinstance(value, Tensor):
        kind = f"a {type(value).__name__}"
    elif value.is_meta:
        kind = "a tensor on the meta device, which has no values"
    elif value.layout != torch.strided:
        kind = f"a tensor of the layout {value.layout}"
    elif value.is_quantized or value.is_complex():
        kind = f"a tensor of {value.dtype}"
    if kind:
        raise RecipeError(f"{where} can't be used: its {name!s:.100} is {kind}")


def load_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint of this recipe, as Lightning wrote it.

    Raises:
        RecipeError: it is something else, or damaged.
    """
    content = read_file(path)
    if not isinstance(content, Mapping) or not {"run", "classes", "state_dict"} <= set(content):
        raise RecipeError(f"{path} is not a checkpoint of `resnet-reg train`")
    run = run_from_file(content["run"], path)
    state = content["state_dict"]
    if not isinstance(state, Mapping):
        raise RecipeError(f"{path} is damaged: its state dict is a {type(state).__name__}")
    for name, value in state.items():
        check_tensor(path, name, value)
    resumable = "optimizer_states" in content
    if resumable:
        _check_training_state(content, run, path)
    classes = class_names(content["classes"], path)
    source = _source(content.get("source"), path)
    former, shapes = is_former(content["run"]), shapes_in(path, content)
    return Checkpoint(run, classes, state, source, resumable, former, shapes)


def shapes_in(path: Path, content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The shapes of a compact model in a file; None where it has all channels.

    Args:
        path: the file.
        content: what :func:`read_file` gave: a checkpoint of this recipe, a file that
            ``save_compact`` wrote, or anything else.

    Raises:
        RecipeError: they are damaged, or of another architecture.
    """
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(FORMAT)
        if text is None:
            return None
        try:
            return checked_description(json.loads(text), path)
        except (ValueError, RecursionError):
            raise RecipeError(f"{path} is damaged: its description is no JSON") from None
    found = content if content.get("format") == FORMAT else content.get(FORMAT)
    return checked_description(found, path)


def class_names(content: Any, where: object) -> tuple[str, ...]:
    """The names of the classes that a file tells, in the order of the labels.

    Raises:
        RecipeError: they are not at least two different texts.
    """
    names = tuple(content) if isinstance(content, list | tuple) else ()
    if len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise RecipeError(
            f"{where} is damaged: its classes must be at least two names, and are {content!r:.100}"
        )
    if len(set(names)) < len(names):
        raise RecipeError(f"{where} is damaged: its classes have a name twice: {content!r:.100}")
    return names


def _source(content: Any, where: Path) -> Source | None:
    if content is None:
        return None
    names = {field.name for field in fields(Source)}
    if not isinstance(content, Mapping) or set(content) != names:
        raise RecipeError(f"{where} is damaged: its source must have {' and '.join(sorted(names))}")
    if not all(isinstance(value, str) and "\0" not in value for value in content.values()):
        raise RecipeError(f"{where} is damaged: its source must be texts, and is {content!r:.100}")
    return Source(**content)


def _check_training_state(content: Mapping[str, Any], run: Run, where: Path) -> None:
    """The counts that training goes on from, and the kinds of what Lightning restores."""
    for name, kind in (
        ("optimizer_states", list),
        ("lr_schedulers", list),
        ("callbacks", dict),
        ("loops", dict),
    ):
        if not isinstance(content.get(name, kind()), kind):
            raise RecipeError(
                f"{where} is damaged: its {name} are a {type(content[name]).__name__}, not a "
                f"{kind.__name__}"
            )
    for name, most in (("epoch", run.epochs), ("global_step", None)):
        value = content.get(name, 0)
        if type(value) is not int or not 0 <= value < 2**63 or (most is not None and value > most):
            limit = "" if most is None else f" up to {most}"
            raise RecipeError(
                f"{where} is damaged: its {name} must be a whole number{limit}, and is "
                f"{value!r:.50}"
            )


def save_checkpoint(content: Mapping[str, Any], path: Path) -> None:
    """Writes a checkpoint whole; where that fails the former file stays.

    Raises:
        RecipeError: the disk is full or the like.
    """
    try:
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        # torch turns whatever ends a write into a RuntimeError of its own: Ctrl-C too.
        cause: BaseException | None = error
        while cause and not isinstance(cause, OSError | KeyboardInterrupt):
            cause = cause.__context__
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
        raise RecipeError(f"can't write {path}: {reason}") from None


def keep_weights_alone(path: Path) -> None:
    """Takes the optimizer's state and the like out of a checkpoint, half of its size."""
    content = read_file(path)
    if isinstance(content, dict) and "optimizer_states" in content:
        save_checkpoint({k: v for k, v in content.items() if k not in _TRAINING_STATE}, path)
