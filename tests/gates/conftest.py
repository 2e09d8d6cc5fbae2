"""Makes the clone's ``bench`` importable, which takes the clone's root off sys.path again."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
import bench  # noqa: F401
