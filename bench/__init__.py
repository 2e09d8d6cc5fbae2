"""Benchmarks: what a regularised step costs, against what one would use instead.

``python -m bench.run`` from the repository's root measures, prints and writes; ``bench.report``
turns what was written into the README's table and the plots.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def load_package() -> ModuleType:
    """Imports the installed ``resnet_reg_ext``, never the source tree that bench/ lies beside.

    A source tree has no compiled module unless it was installed with ``pip install -e``; then it
    is what's installed, and found at the second attempt.

    Raises:
        ImportError: the package isn't installed, or its native module isn't there.
    """
    path = sys.path[:]
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
            f"bench measures the installed package, but in {Path(resnet_reg_ext.__file__).parent} "
            f"{_native.missing}: run `pip install .` first"
        )
    return resnet_reg_ext
