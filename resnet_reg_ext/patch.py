"""Fine-tuned models as patches of the model that they were tuned from: the changed weights only."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .atomic_write import atomic_write

_FORMAT = "resnet_reg_ext.patch"
_VERSION = 1
# What the tensors of a file are, before the name of the tensor that they belong to.
_VALUES, _INDICES, _MASK, _WHOLE = "values/", "indices/", "mask/", "whole/"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_State = Mapping[str, Tensor]


class PatchSize(NamedTuple):
    """What a patch holds."""

    changed: int
    """Elements whose bits differ from the start's, or that the start doesn't have."""
    size: int
    """Elements of the model."""
    file_bytes: int
    """Bytes of the file."""


def save_patch(
    file: str | os.PathLike[str], model: nn.Module | _State, start: nn.Module | _State
) -> PatchSize:
    """Writes what a fine-tuned model has otherwise than the model that it was tuned from.

    The file is a safetensors file with, for each tensor that differs from the start's of its name,
    the changed values and their places: a list of indices or a mask of one bit an element,
    whichever is smaller. Tensors that the start lacks, or has in another shape or dtype, are there
    whole. Digests of the start and of the result (SHA-256) are there too.

    Args:
        file: a path; a file that is there is replaced when the new one is complete.
        model: the fine-tuned model, or its state dict.
        start: the model before, or its state dict. Names that only it has are left out of the
            result.

    Returns:
        How much has changed, and the file's size.

    Raises:
        ValueError: a tensor isn't an ordinary one with values of its own, or its dtype is complex;
            it is named, and nothing is written.
        OSError: the file can't be written.
        ImportError: safetensors isn't installed.

    Example:
        >>> pretrained = {name: value.clone() for name, value in model.state_dict().items()}
        >>> optimizer.step()
        >>> size = save_patch("tuned.safetensors", model, pretrained)
    """
    from safetensors.torch import save_file

    path = _regular(file, "save_patch")
    new, old = _state_of(model, "save_patch: model"), _state_of(start, "save_patch: start")
    tensors: dict[str, Tensor] = {}
    changed, kept = 0, []
    for name, value in new.items():
        before = old.get(name)
        if before is None or before.shape != value.shape or before.dtype is not value.dtype:
            tensors[_WHOLE + name] = value.contiguous().clone()
            changed += value.numel()
            continue
        kept.append(name)
        differs = _bits(value) != _bits(before.to(value.device))
        count = int(differs.sum())
        if count:
            changed += count
            tensors[_VALUES + name] = value.reshape(-1)[differs]
            tensors |= _places(name, differs, count)
    description = {
        "format": _FORMAT,
        "version": _VERSION,
        "start": _digest(old, kept),
        "result": _digest(new, sorted(new)),
        "removed": sorted(old.keys() - new.keys()),
    }
    metadata = {_FORMAT: json.dumps(description), "format": "pt"}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata)
    size = sum(value.numel() for value in new.values())
    return PatchSize(changed, size, path.stat().st_size)


def apply_patch(start: nn.Module | _State, file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Makes the fine-tuned model of the model that it was tuned from, bit by bit.

    No code of the file's is run, and everything is checked before anything changes, the result's
    digest too.

    Args:
        start: a state dict, which is left as it is; or a model, which gets the result. It must
            have the result's names, shapes and dtypes: a new head replaces the old one before.
        file: what :func:`save_patch` wrote.

    Returns:
        The fine-tuned model's state dict, on the start's devices; tensors of its own.

    Raises:
        ValueError: the file is damaged or something else, is a patch of another start, or the model
            doesn't fit.
        OSError: it can't be read.
        ImportError: safetensors isn't installed.

    Example:
        >>> pretrained = {name: value.clone() for name, value in model.state_dict().items()}
        >>> optimizer.step()
        >>> size = save_patch("tuned.safetensors", model, pretrained)
        >>> tuned = apply_patch(pretrained, "tuned.safetensors")  # model's state dict, bit by bit
    """
    path = _regular(file, "apply_patch")
    with path.open("rb"):
        pass
    old = _state_of(start, "apply_patch: start")
    description, tensors = _read(path)
    result = _patched(path, old, description, tensors)
    if isinstance(start, nn.Module):
        _load(path, start, result)
    return result


def _regular(file: str | os.PathLike[str], who: str) -> Path:
    path = Path(file)
    if path.exists() and not path.is_file():
        raise ValueError(f"{who}: {path} is not a regular file")
    return path


def _state_of(source: nn.Module | _State, who: str) -> dict[str, Tensor]:
    """The tensors of a model or a state dict, checked."""
    state: Any = source.state_dict() if isinstance(source, nn.Module) else source
    if not isinstance(state, Mapping):
        raise ValueError(f"{who} is a {type(state).__name__}: must be a module or a state dict")
    for name, value in state.items():
        plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided
        if not isinstance(name, str) or not plain or value.is_meta or value.is_quantized:
            raise ValueError(
                f"{who}: {name!s:.100} isn't an ordinary tensor with values of its own"
            )
        if value.is_complex():
            raise ValueError(f"{who}: {name} is of {value.dtype}: must be of real numbers")
    return {name: value.detach().resolve_neg() for name, value in state.items()}


def _bits(tensor: Tensor) -> Tensor:
    """The elements in order, as whole numbers: NaNs and zeros of either sign are told apart."""
    return tensor.contiguous().reshape(-1).view(_BITS[tensor.element_size()])


def _places(name: str, differs: Tensor, count: int) -> dict[str, Tensor]:
    """Where a tensor has changed: a mask, an index list, or nothing where all of it has."""
    size = differs.numel()
    if count == size:
        return {}
    dtype = torch.int32 if size <= 2**31 else torch.int64
    if count * dtype.itemsize < (size + 7) // 8:
        return {_INDICES + name: differs.nonzero()[:, 0].to(dtype)}
    padded = torch.zeros((size + 7) // 8 * 8, dtype=torch.uint8, device=differs.device)
    padded[:size] = differs
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=differs.device)
    return {_MASK + name: (padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8)}


def _indices(name: str, tensors: _State, size: int) -> Tensor:
    """The places that a file says, as indices in increasing order.

    Raises:
        ValueError: they aren't places in a tensor of this size.
    """
    if _INDICES + name in tensors:
        indices = tensors[_INDICES + name]
        if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name}'s indices are no list of whole numbers")
        indices = indices.long()
        if len(indices) and (indices[0] < 0 or indices[-1] >= size or (indices.diff() <= 0).any()):
            raise ValueError(f"{name}'s indices aren't places among {size}, in order")
        return indices
    if _MASK + name not in tensors:
        return torch.arange(size)
    mask = tensors[_MASK + name]
    if mask.dim() != 1 or mask.dtype is not torch.uint8 or len(mask) != (size + 7) // 8:
        raise ValueError(f"{name}'s mask isn't one of {size} elements")
    bits = (mask[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    indices = bits.reshape(-1).nonzero()[:, 0]
    if len(indices) and indices[-1] >= size:
        raise ValueError(f"{name}'s mask has bits beyond its {size} elements")
    return indices


def _digest(state: _State, names: Sequence[str]) -> str:
    """SHA-256 of tensors with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name in sorted(names):
        value = state[name]
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(_bits(value.cpu()).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a file.

    Raises:
        ValueError: it is no patch, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as content:
            text = (content.metadata() or {}).get(_FORMAT)
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        description = None if text is None else json.loads(text)
    except (SafetensorError, ValueError, RuntimeError, RecursionError, KeyError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"apply_patch: {path} isn't a patch or is damaged: {reason:.200}"
        ) from None
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise ValueError(f"apply_patch: {path} isn't a patch: it has no description of one")
    if description.get("version") != _VERSION:
        raise ValueError(
            f"apply_patch: {path} has version {description.get('version')!r:.50} of the format: "
            f"must be {_VERSION}"
        )
    removed = description.get("removed")
    texts = [description.get("start"), description.get("result")]
    if not isinstance(removed, list) or not all(isinstance(t, str) for t in [*texts, *removed]):
        raise ValueError(f"apply_patch: {path} is damaged: its description isn't one of a patch")
    return description, tensors


def _patched(
    path: Path, old: _State, description: Mapping[str, Any], tensors: _State
) -> dict[str, Tensor]:
    """The fine-tuned state dict, checked against its digest.

    Raises:
        ValueError: the start is another one, or the file is damaged.
    """
    whole = {n.removeprefix(_WHOLE): t for n, t in tensors.items() if n.startswith(_WHOLE)}
    removed = set(description["removed"])
    kept = [name for name in old if name not in whole and name not in removed]
    if _digest(old, kept) != description["start"]:
        raise ValueError(
            f"apply_patch: {path} is a patch of another start: the tensors that it changes or "
            "leaves as they are must be those it was saved with, to the bit"
        )
    result = {name: old[name].clone() for name in kept}
    try:
        for key, values in tensors.items():
            kind, _, name = key.partition("/")
            if f"{kind}/" == _WHOLE:
                there = old[name].device if name in old else torch.device("cpu")
                result[name] = values.clone().to(there)
            elif f"{kind}/" not in (_VALUES, _INDICES, _MASK) or name not in kept:
                raise ValueError(f"{key!r:.100} belongs to no tensor of the start")
            elif _VALUES + name not in tensors:
                raise ValueError(f"{name} has places without values")
            elif f"{kind}/" == _VALUES:
                _put(name, result, values, _indices(name, tensors, result[name].numel()))
    except ValueError as error:
        raise ValueError(f"apply_patch: {path} is damaged: {error}") from None
    if _digest(result, list(result)) != description["result"]:
        raise ValueError(
            f"apply_patch: {path} is damaged: what it makes of the start isn't what was saved"
        )
    return result


def _put(name: str, result: dict[str, Tensor], values: Tensor, indices: Tensor) -> None:
    """Writes a tensor's changed values.

    Raises:
        ValueError: there are more or fewer than places, or of another dtype.
    """
    target = result[name]
    if values.dtype is not target.dtype or values.shape != indices.shape:
        raise ValueError(
            f"{name} has values of {values.dtype} and shape {tuple(values.shape)}: must be "
            f"{target.dtype}, one for each of {len(indices)} places"
        )
    flat = target.contiguous().view(-1)
    flat[indices.to(target.device)] = values.to(target.device)
    target.copy_(flat.view(target.shape))


@torch.no_grad()
def _load(path: Path, model: nn.Module, result: _State) -> None:
    """Copies the result into a model that fits.

    Raises:
        ValueError: it doesn't fit; names the tensor. Nothing has changed then.
    """
    own = model.state_dict()
    for name in sorted(own.keys() ^ result.keys()):
        only = "the model" if name in own else "the patch's result"
        raise ValueError(f"apply_patch: {path} doesn't fit the model: only {only} has {name}")
    for name, value in result.items():
        if own[name].shape != value.shape or own[name].dtype is not value.dtype:
            raise ValueError(
                f"apply_patch: {path} doesn't fit the model: {name} is {own[name].dtype} of shape "
                f"{tuple(own[name].shape)} there, and {value.dtype} of {tuple(value.shape)} here"
            )
    model.load_state_dict(result)
