"""Zeros that a step has counted, and whether its parameters are still as it left them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_Stamp = tuple[int, int, torch.UntypedStorage]


class TrackedZeros(NamedTuple):
    """The counts of one bucket."""

    params: list[Tensor]
    num_zeros: Tensor
    found_inf: Tensor | None
    stamps: tuple[_Stamp | None, ...] = ()

    def stamped(self) -> TrackedZeros:
        """The counts with the parameters' versions and addresses of now, after the step."""
        return self._replace(stamps=tuple(map(_stamp, self.params)))

    def unchanged(self) -> list[tuple[Tensor, Tensor]]:
        """The parameters that are as the step left them, with their zeros.

        Changes through ``p.data`` raise no version and aren't seen.
        """
        if self.found_inf is not None and self.found_inf.item() != 0:
            return []  # the kernel skipped the step, counting included
        return [
            (param, num_zeros)
            for param, num_zeros, stamp in zip(
                self.params, self.num_zeros, self.stamps, strict=True
            )
            if _has_stamp(param, stamp)
        ]


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
