"""``resnet-reg patch``: a fine-tuned checkpoint as a patch of its initial weights, and back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..atomic_write import atomic_write
from ..patch import apply_patch, save_patch
from .command_line import is_rank_zero
from .files import RecipeError
from .libraries import import_libraries
from .options import Parser
from .settings import expanded

_T = TypeVar("_T")


def run(arguments: list[str]) -> None:
    """``resnet-reg patch save`` and ``resnet-reg patch apply``."""
    parser = Parser(prog="resnet-reg patch", allow_abbrev=False)
    commands = parser.add_subparsers(dest="action", required=True)
    save = commands.add_parser(
        "save", help="write what a checkpoint has otherwise than its initial weights"
    )
    save.add_argument(
        "checkpoint", type=expanded, metavar="CHECKPOINT", help="the fine-tuned model"
    )
    apply = commands.add_parser("apply", help="make the fine-tuned model again")
    apply.add_argument("patch", type=expanded, metavar="PATCH", help="what `save` has written")
    for action in (save, apply):
        action.add_argument(
            "--start",
            type=expanded,
            required=True,
            metavar="FILE",
            help="the weights that it was tuned from, as --weights of `train` takes them",
        )
    save.add_argument(
        "--out",
        type=expanded,
        metavar="FILE",
        help="the patch (default: patch.safetensors beside the checkpoint)",
    )
    apply.add_argument(
        "--out",
        type=expanded,
        metavar="FILE",
        required=True,
        help="where the state dict goes: .safetensors, or anything else for torch.save",
    )
    args = parser.parse_args(arguments)
    import_libraries()
    if args.action == "save":
        out = args.out or args.checkpoint.parent / "patch.safetensors"
        said = write_patch(args.checkpoint, args.start, out)
    else:
        said = _checked(lambda: _apply(args.patch, args.start, args.out))
    if is_rank_zero():
        print(said)


def _checked(action: Callable[[], _T]) -> _T:
    try:
        return action()
    except ValueError as error:
        raise RecipeError(
            str(error).removeprefix("save_patch: ").removeprefix("apply_patch: ")
        ) from (None)


def _state(path: Path) -> dict[str, Tensor]:
    """A file's ResNet-50; 16-bit weights in float32, as `train --weights` reads them."""
    from .weights import read_state  # --help works without the extra

    state, *_ = read_state(path)
    return {
        name: value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
        for name, value in state.items()
    }


def write_patch(checkpoint: Path, start: Path, out: Path) -> str:
    """Writes a patch; returns what is to be told of it.

    Raises:
        RecipeError: a file is no ResNet-50, or the patch can't be written.
    """
    made = _checked(lambda: save_patch(out, _state(checkpoint), _state(start)))
    whole = checkpoint.stat().st_size
    return (
        f"{made.changed:,} of {made.size:,} values ({made.changed / made.size:.2%}) differ from "
        f"{start}\n{out}: {made.file_bytes:,} bytes, where {checkpoint} has {whole:,}"
    )


def _apply(patch: Path, start: Path, out: Path) -> str:
    if out.exists() and not out.is_file():
        raise RecipeError(f"--out {out} is not a regular file")
    result = apply_patch(_state(start), patch)
    with atomic_write(out) as temporary:
        if out.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file({name: t.contiguous() for name, t in result.items()}, temporary)
        else:
            torch.save(result, temporary)
    return f"{out}: {len(result)} tensors, {os.path.getsize(out):,} bytes"
