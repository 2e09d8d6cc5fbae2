"""DTensors (FSDP2, tensor parallelism): each process steps its own shards.

The update is elementwise, so shards need no communication, as long as parameter, gradient and state
have the same placements.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .bucket import Bucket


def _dtensor_type() -> Any:
    """The class DTensor, or None where nothing has imported it: then there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def has_dtensors(*lists: Iterable[Tensor]) -> bool:
    """Whether a DTensor is in one of the lists."""
    dtensor = _dtensor_type()
    if dtensor is None:
        return False
    types = set().union(*(map(type, tensors) for tensors in lists))
    return any(issubclass(t, dtensor) for t in types - {Tensor, torch.nn.Parameter})


def full_tensor(tensor: Any) -> Any:
    """A DTensor's value as an ordinary tensor, the same in every process; all must take part."""
    dtensor = _dtensor_type()
    return tensor.full_tensor() if dtensor is not None and isinstance(tensor, dtensor) else tensor


def countable(tensor: Any) -> Any:
    """The elements that a process counts: a DTensor's shard, or all of a partial sum."""
    dtensor = _dtensor_type()
    if dtensor is None or not isinstance(tensor, dtensor):
        return tensor
    return (
        full_tensor(tensor)
        if _has_partial(tensor.placements)
        else _local_shards([tensor], dtensor)[0]
    )


def local_bucket(bucket: Bucket) -> Bucket:
    """The bucket of this process's shards.

    A gradient with other placements than its parameter is redistributed: all processes must take
    part.

    Raises:
        ValueError: the gradient or the state of a DTensor can't be divided as the parameter is.
    """
    dtensor = _dtensor_type()
    grads: list[Any] = list(bucket.grads)
    for key, tensors in (
        ("gradient", grads),
        ("momentum_buffer", bucket.momentum_buffers),
        ("master_weight", bucket.master_params),
        ("start", bucket.starts),
    ):
        for i, (param, operand) in enumerate(zip(bucket.params, tensors or (), strict=False)):
            if not _alike(param, operand, dtensor):
                _check(param, operand, key, bucket.name(i))
                placements: Any = param.placements  # type: ignore[attr-defined]
                grads[i] = grads[i].redistribute(placements=placements)
    return bucket.replace(grads=grads).map(lambda tensors: _local_shards(tensors, dtensor))


def local_rows(params: Sequence[Any], names: Sequence[str]) -> tuple[int, int]:
    """Which rows of DTensors with coupled rows are this process's: the first, and how many.

    Raises:
        ValueError: a parameter isn't divided by rows, or not as the others are, so a process would
            hold parts of a row, or rows without those that they are coupled with.
    """
    dtensor = _dtensor_type()
    first = params[0]
    for param, name in zip(params, names, strict=True):
        if isinstance(param, dtensor) is not isinstance(first, dtensor):
            raise ValueError(
                f"{name}: must be a DTensor like the other parameters that its rows are coupled "
                "with, or none of them must be one"
            )
        by_rows = all(p.is_replicate() or p.is_shard(0) for p in param.placements)
        alike = param.placements == first.placements and param.device_mesh == first.device_mesh
        if not by_rows or not alike:
            raise ValueError(
                f"{name}: its placements are {param.placements}: must divide nothing but "
                "dimension 0, and be those of the other parameters that its rows are coupled with"
            )
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        first.shape, first.device_mesh, first.placements
    )
    return int(offset[0]), int(shape[0])


def _local_shards(tensors: Sequence[Any], dtensor: Any) -> list[Tensor]:
    parts = [t._local_tensor if isinstance(t, dtensor) else t for t in tensors]
    # Where a collective is under way, its result must be waited for.
    return [p if type(p) is Tensor else p.wait() if hasattr(p, "wait") else p for p in parts]


def _alike(param: Any, operand: Any, dtensor: Any) -> bool:
    """Whether both are ordinary tensors, or DTensors of one shape that are divided alike.

    Read from their specs: a DTensor's own shape takes ten times as long.
    """
    if not (isinstance(param, dtensor) and isinstance(operand, dtensor)):
        return isinstance(param, dtensor) is isinstance(operand, dtensor)
    ours, theirs = param._spec, operand._spec
    return bool(
        (theirs.placements is ours.placements or theirs.placements == ours.placements)
        and (theirs.mesh is ours.mesh or theirs.mesh == ours.mesh)
        and theirs.tensor_meta.shape == ours.tensor_meta.shape
        and not _has_partial(ours.placements)
    )


@functools.lru_cache
def _has_partial(placements: tuple[Any, ...]) -> bool:
    return any(placement.is_partial() for placement in placements)


def check_alike(param: Tensor, operand: Tensor, what: str, name: str) -> None:
    """Refuses a DTensor beside an ordinary tensor.

    Raises:
        ValueError: says which is which.
    """
    divided = [has_dtensors([tensor]) for tensor in (param, operand)]
    if divided == [True, False]:
        raise ValueError(f"{name}: the parameter is a DTensor and its {what} is not")
    if divided == [False, True]:
        raise ValueError(f"{name}: the {what} is a DTensor and its parameter is not")


def _check(param: Any, operand: Any, what: str, name: str) -> None:
    """Refuses what can't be made alike: only a gradient's placements can.

    Raises:
        ValueError: says what is wrong.
    """
    check_alike(param, operand, what, name)
    if _has_partial(param.placements):
        raise ValueError(
            f"{name}: the parameter's placements are {param.placements}: a sum that is still to be "
            "made can't be stepped; redistribute it"
        )
    if operand.shape != param.shape:
        raise ValueError(
            f"{name}: the {what}'s shape is {tuple(operand.shape)}: must be the parameter's, "
            f"{tuple(param.shape)}"
        )
    if operand.device_mesh != param.device_mesh:
        raise ValueError(
            f"{name}: the {what} is on {operand.device_mesh}: must be on the parameter's, "
            f"{param.device_mesh}"
        )
    if what != "gradient":
        raise ValueError(
            f"{name}: {what}'s placements are {operand.placements}: must be the parameter's, "
            f"{param.placements}"
        )


def summed(counts: Sequence[Tensor], params: Sequence[Any]) -> list[Tensor]:
    """Counts of each process's shards, summed over the processes that hold other shards.

    One exchange for all parameters with the same placements; all processes must take part.
    """
    dtensor = _dtensor_type()
    result = list(counts)
    alike: dict[Any, list[int]] = {}
    for i, param in enumerate(params):
        if dtensor is not None and isinstance(param, dtensor):
            shards = tuple(not placement.is_replicate() for placement in param.placements)
            if any(shards) and not _has_partial(param.placements):
                alike.setdefault((param.device_mesh, shards), []).append(i)
    for (mesh, shards), members in alike.items():
        from torch.distributed.tensor import Partial, Replicate

        placements = [Partial() if shard else Replicate() for shard in shards]
        stacked = torch.stack([counts[i].to(mesh.device_type) for i in members])
        total = dtensor.from_local(stacked, mesh, placements, run_check=False).full_tensor()
        for i, count in zip(members, total, strict=True):
            result[i] = count
    return result
