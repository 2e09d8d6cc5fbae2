"""Benchmarks: the time of a regularised step against the time of its alternatives.

``python -m bench`` in a clone's root measures the installed ``resnet_reg_ext``.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# `python -m` puts the clone's root on sys.path, where Python would find the source tree before the
# installed package. bench's own modules are found through bench.__path__.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
