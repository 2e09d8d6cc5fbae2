"""What every optimizer's step is wrapped in: its hooks, and a range for profilers.

``torch.optim.Optimizer`` wraps the ``step`` of each class in :meth:`profile_hook_step`, which opens
a range for profilers by a dispatched operator: on 161 small tensors that took a sixth of our step.
Here the same range is opened by a plain call where there is nothing else to do; torch's own wrapper
is entered where there is a hook, a closure or a compiler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

try:
    from torch._C._autograd import _record_function_with_args_enter as _enter
    from torch._C._autograd import _record_function_with_args_exit as _exit
    from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
except ImportError:  # a torch that has them no longer, or not yet
    KNOWN = False
else:
    KNOWN = hasattr(Optimizer, "_optimizer_step_code")

Step = Callable[..., Any]


def profile_hook_step(step: Step) -> Step:
    """Wraps a class's ``step`` as torch does, at less cost.

    Profilers and execution traces see the same range either way.
    """
    by_torch: Step = Optimizer.profile_hook_step(step)
    if not KNOWN:
        return by_torch

    @functools.wraps(step)
    def wrapper(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        # A closure may register a hook; a compiler knows torch's own wrapper.
        if (
            args
            or "closure" in kwargs
            or torch.compiler.is_compiling()
            or getattr(self, "_optimizer_step_pre_hooks", True)
            or getattr(self, "_optimizer_step_post_hooks", True)
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        ):
            return by_torch(self, *args, **kwargs)
        profiled = _enter(f"Optimizer.step#{type(self).__name__}.step")
        try:
            out = step(self, **kwargs)
            self._optimizer_step_code()
        finally:
            _exit(profiled)
        return out

    return wrapper
