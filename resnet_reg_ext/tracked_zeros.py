"""Zeros that a step has counted, and whether its parameters are still as it left them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_Stamp = tuple[int, int, torch.UntypedStorage]


class TrackedZeros(NamedTuple):
    """The counts of one bucket."""

    params: list[Tensor]
    starts: list[Tensor] | None
    """Equal to which weights count; None: to zero."""
    num_zeros: Tensor
    found_inf: Tensor | None
    stamps: tuple[_Stamp | None, ...] = ()

    def stamped(self) -> TrackedZeros:
        """The counts with the parameters' versions and addresses of now, after the step."""
        return self._replace(stamps=tuple(map(_stamp, self.params)))

    def unchanged(self) -> list[tuple[Tensor, Tensor | None, Tensor]]:
        """The parameters that are as the step left them, with their starts and what was counted.

        Changes through ``p.data`` raise no version and aren't seen.
        """
        if self.found_inf is not None and self.found_inf.item() != 0:
            return []  # the kernel skipped the step, counting included
        starts: Sequence[Tensor | None] = self.starts or [None] * len(self.params)
        return [
            (param, start, num_zeros)
            for param, start, num_zeros, stamp in zip(
                self.params,
                starts,
                self.num_zeros,
                self.stamps,
                strict=True,
            )
            if _has_stamp(param, stamp)
        ]


def known_zeros(
    tracked: Sequence[TrackedZeros], starts: Mapping[Tensor, Tensor | None]
) -> dict[Tensor, Tensor]:
    """What was counted of the parameters that are still as the step left them.

    Args:
        tracked: what the last step counted.
        starts: of parameters whose penalties pull towards a start. Counts against another start, as
            before a checkpoint was loaded, aren't known.
    """
    return {
        param: num_zeros
        for counts in tracked
        for param, start, num_zeros in counts.unchanged()
        if starts.get(param) is start and (param in starts) is (start is not None)
    }


def _stamp(param: Tensor) -> _Stamp | None:
    """The version and place of a parameter's values; None for an inference tensor.

    The storage is held, as a freed one's address may become another's.
    """
    try:
        return param._version, param.data_ptr(), param.untyped_storage()
    except RuntimeError:  # an inference tensor has no version
        return None


def _has_stamp(param: Tensor, stamp: _Stamp | None) -> bool:
    now = _stamp(param)
    if now is None or stamp is None:
        return False
    return now[:2] == stamp[:2] and now[2] is stamp[2]
