"""Memory for intermediate values of the update in pure PyTorch, on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of a chunk: what one operation leaves is still in the CPU's cache when the next reads it
# (bench/README.md).
CHUNK = 1 << 18


class Workspace:
    """Memory on a CPU for intermediate values, the same for all chunks of a step.

    New memory for each chunk would be given back to the operating system and taken from it each
    time, which clears it page by page: that took as long as the arithmetic (bench/README.md).
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}

    def like(self, use: str, model: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of the model's shape, for one use at a time."""
        size = model.numel()
        memory = self._memory.get((use, dtype))
        if memory is None or memory.numel() < size:
            # On the model's device, whatever the default device is.
            memory = torch.empty(max(size, CHUNK), dtype=dtype, device=model.device)
            self._memory[use, dtype] = memory
        shape = model.shape
        if len(shape) == 1:
            return memory if memory.numel() == size else memory[:size]
        if len(shape) == 4 and model.is_contiguous(memory_format=torch.channels_last):
            return memory.as_strided(shape, model.stride())
        return memory[:size].view(shape)

    def widened(self, use: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor in another dtype; itself where it has it."""
        return tensor if tensor.dtype is dtype else self.like(use, tensor, dtype).copy_(tensor)
