"""Initial weights: torchvision's, a published file's, or another run's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models import ResNet50_Weights

from .checkpoints import check_tensor, read_file, shapes_in
from .files import RecipeError
from .model import Classifier
from .shapes import give_shapes

# What torch's wrappers of a module put into its parameters' names: torch.compile, FSDP,
# activation checkpointing.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Where training scripts keep the state dict in their checkpoints, the usual first.
_PLACES = ("state_dict", "model", "model_state_dict", "model_ema", "state_dict_ema", "ema")
_INPUT = "conv1.weight"  # a ResNet-50's first parameter


def load_weights(classifier: Classifier, source: str, *, must_be_finite: bool = True) -> str:
    """Fills in initial weights.

    Args:
        classifier: whose model gets them.
        source: "none", "imagenet" (torchvision's, downloaded once), or a file with a state dict
            of torchvision's ResNet-50, a checkpoint of this recipe, or a compact model as
            ``save_compact`` writes it, whose shapes the model gets.
        must_be_finite: refuse NaN and infinity.

    Returns:
        What was done, for the user.

    Raises:
        RecipeError: they can't be read, or are another architecture's.
    """
    if source == "none":
        return "initial weights: random"
    if source == "imagenet":
        weights = ResNet50_Weights.DEFAULT
        try:
            found = weights.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise RecipeError(
                f"can't download ImageNet weights from {weights.url} ({error}); fetch the file "
                "elsewhere and give --weights FILE"
            ) from None
        source = f"ImageNet ({weights})"
        state, place = dict(found), ""
    else:
        state, place, shapes = read_state(Path(source))
        if shapes is not None:
            give_shapes(classifier.model, shapes, state, source)
            place += ", a compact model"
    own, classes = classifier.model.state_dict(), len(classifier.classes)
    head = {name: value for name, value in state.items() if name.startswith("fc.")}
    fits = {name: value.shape for name, value in head.items()} == {
        name: own[name].shape for name in ("fc.weight", "fc.bias")
    }
    body = state if fits else {n: v for n, v in state.items() if n not in head}
    _check_body(own, body, head_too=fits, source=source)
    if must_be_finite:
        _check_finite(body, source)
    # load_state_dict converts half precision.
    classifier.model.load_state_dict(body, strict=False)
    said = f"initial weights: {source}{place}"
    if fits:
        return f"{said}, with its class head (its {classes} classes fit)"
    if not head:
        return f"{said}; it has no class head: a random one for {classes} classes"
    bias = head.get("fc.bias")
    of = f" for {len(bias)} classes" if bias is not None and bias.dim() else ""
    return f"{said}; its head{of} is replaced by a random one for {classes}"


def _check_body(
    own: Mapping[str, Tensor], body: Mapping[str, Tensor], *, head_too: bool, source: str
) -> None:
    """Refuses other names and shapes than torchvision's ResNet-50 has."""
    wanted = {name for name in own if head_too or not name.startswith("fc.")}
    misfits = [
        *sorted(wanted ^ set(body)),
        *(name for name in own if name in body and body[name].shape != own[name].shape),
    ]
    # Files from before torch 0.4.1 have no such counters.
    misfits = [name for name in misfits if not name.endswith("num_batches_tracked")]
    if misfits:
        raise RecipeError(
            f"--weights {source} is not a ResNet-50's state dict as torchvision names it: "
            f"{misfits[0]} is missing, unknown or of another shape"
        )


def _check_finite(body: Mapping[str, Tensor], source: str) -> None:
    for name, value in body.items():
        count = int((~torch.isfinite(value)).sum())
        if count:
            raise RecipeError(
                f"--weights {source} can't be used: {count} of the {value.numel()} values of its "
                f"{name} are NaN or infinite"
            )


def read_state(path: Path) -> tuple[dict[str, Tensor], str, dict[str, Any] | None]:
    """The ResNet-50's part of a file.

    Returns:
        Its tensors under torchvision's names, where in the file it was, and its shapes where it is
        a compact model.

    Raises:
        RecipeError: the file can't be read, or holds no such network, or several.
    """
    content = read_file(path)
    if not isinstance(content, Mapping):
        raise RecipeError(f"{path} holds no state dict but a {type(content).__name__}")
    shapes = shapes_in(path, content)
    found = {place: _networks(state) for place, state in _state_dicts(content)}
    place = next((place for place, networks in found.items() if networks), None)
    if place is None:
        tensors = next((s for _, s in _state_dicts(content)), None)
        if tensors is None:
            raise RecipeError(f"{path} holds no tensors{_instead(content)}")
        raise RecipeError(
            f"{path} is not a ResNet-50's state dict as torchvision names it: it has no {_INPUT}, "
            f"but {next(iter(tensors))!s:.100}"
        )
    networks = found[place]
    if len(networks) > 1:
        raise RecipeError(
            f"{path} holds several networks, under {' and '.join(sorted(networks))}: save the "
            "state dict of one of them alone"
        )
    ((prefix, content),) = networks.items()
    # Some files hold an epoch or a version among the tensors.
    state = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    for name, value in state.items():
        check_tensor(path, name, value)
    usual = place in ("", "state_dict") and prefix in ("", "module.", "model.")
    said = "" if usual else f" (under {'.'.join(filter(None, (place, prefix[:-1])))})"
    return state, said, shapes


def _state_dicts(content: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Mappings of names to tensors in a file, each with its place: "" is the file itself."""
    if _holds_tensors(content):
        yield "", content
    inside = [key for key in content if isinstance(key, str) and _holds_tensors(content[key])]
    for key in sorted(inside, key=lambda k: _PLACES.index(k) if k in _PLACES else len(_PLACES)):
        yield key, content[key]


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


def _networks(content: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """The ResNets among the names of a state dict, by what stands before their names."""
    plain: dict[str, Any] = {}
    for name, value in content.items():
        key = str(name)
        for wrapper in _WRAPPERS:
            key = key.replace(wrapper, "")
        plain[key] = value
    prefixes = [name.removesuffix(_INPUT) for name in plain if f".{name}".endswith(f".{_INPUT}")]
    # A block's first convolution has that name too.
    roots = [p for p in prefixes if f"{p}layer1.0.{_INPUT}" in plain]
    return {
        root: {name.removeprefix(root): v for name, v in plain.items() if name.startswith(root)}
        for root in roots
    }


def _instead(content: Mapping[Any, Any]) -> str:
    names = [str(name) for name in content]
    return f" but {', '.join(names[:3])}"[:200] if names else ""
