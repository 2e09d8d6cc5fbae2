"""Benchmarks: what a regularised step costs, against what one would use instead.

``python -m bench.run`` from the repository's root measures, prints and writes; ``bench.report``
turns what was written into the README's table and the plots. The wheel brings the same modules as
``resnet_reg_ext.bench``, for ``resnet-reg bench``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def load_package() -> ModuleType:
    """Imports the installed ``resnet_reg_ext``, never the source tree that bench/ lies beside.

    As ``resnet_reg_ext.bench`` this is part of it. A source tree has no compiled module unless it
    was installed with ``pip install -e``; then it is what's installed, and found at the second
    attempt.

    Raises:
        ImportError: the package isn't installed, or its native module isn't there.
    """
    path = sys.path[:]
    if __name__ == "bench":
        sys.path[:] = [p for p in path if Path(os.path.abspath(p)).resolve() != ROOT]
    try:
        import resnet_reg_ext
    except ModuleNotFoundError as error:
        if error.name != "resnet_reg_ext":
            raise
        sys.path[:] = path
        import resnet_reg_ext
    finally:
        sys.path[:] = path
    from resnet_reg_ext import _native

    if not _native.available():
        raise ImportError(
            "what is measured is the native step, but in "
            f"{Path(resnet_reg_ext.__file__).parent} {_native.missing}"
        )
    return resnet_reg_ext
