"""The OpenMP runtime: the native module shares torch's libgomp.

Two libgomps in a process keep a pool of threads each, and the pools compete for the cores. torch's
copy has different names in different releases (``libgomp.so.1``, ``libgomp-a34b3233.so.1``), and a
machine without a compiler may have no other. So the native module isn't linked to a libgomp; this
module makes torch's symbols visible before the native module is loaded.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch


def load() -> str:
    """Makes the symbols of torch's libgomp visible, or of the system's where torch brings none.

    Returns:
        What was loaded: a path, ``"libgomp.so.1"`` for the system's, or an empty string for none.
    """
    package = Path(torch.__file__).parent
    folders = (package / "lib", package.parent / "torch.libs")
    brought = [str(path) for folder in folders for path in sorted(folder.glob("libgomp*.so*"))]
    for library in [*brought, "libgomp.so.1"]:
        try:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return library
    return ""
