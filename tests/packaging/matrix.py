"""Runs one wheel on every torch version that is supported and writes docs/torch-matrix.md.

    python tests/packaging/matrix.py WHEEL [--only VERSION ...] [--environments FOLDER]

Each version gets a virtual environment of its own (some gigabytes each), in a temporary folder or,
to be used again, in FOLDER.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("2.5.1", "2.6.0", "2.13.0", "2.14.1", "2.15.0")
NEEDS = ("numpy", "scipy", "scikit-learn", "pytest", "hypothesis")
# Leaves out what doesn't depend on torch, needs a GPU, or needs torchvision or other people's
# programs, which come with a torch of their own.
SELECTED = ("tests/core", "tests/distributed", "tests/packaging", "-m", "not one_torch")
# FSDP2 doesn't run on a CPU there.
WITHOUT_FSDP = ("2.5.1", "2.6.0")
FSDP = "tests/distributed/test_dtensor.py"


def run_on(version: str, wheel: Path, folder: Path) -> str:
    """A row of the table: the version and pytest's last line."""
    python = str(folder / version / "bin" / "python")
    quiet = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    environment = {**os.environ, "PIP_CONSTRAINT": os.devnull}
    if not (folder / version).exists():
        subprocess.run([sys.executable, "-m", "venv", folder / version], check=True)
    install = (f"torch=={version}", *NEEDS), ("--no-deps", "--force-reinstall", str(wheel))
    for arguments in install:
        subprocess.run([python, *quiet, *arguments], check=True, env=environment)
    ignored = [f"--ignore={FSDP}"] if version in WITHOUT_FSDP else []
    result = subprocess.run(
        # Not by -m, which would put the source tree before what is installed.
        [str(folder / version / "bin" / "pytest"), "-q", *SELECTED, *ignored],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    last = result.stdout.strip().splitlines()[-1]
    build = subprocess.run(
        [python, "-P", "-c", "import torch; print(torch.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    print(version, last, flush=True)
    if result.returncode != 0:
        print(result.stdout[-4000:], file=sys.stderr)
    return f"| {build} | {re.sub(r' in .*', '', last)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the matrix."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--only", nargs="+", default=VERSIONS)
    parser.add_argument("--environments", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.environments or Path(temporary)).absolute()
        rows = [run_on(v, options.wheel.resolve(), folder) for v in options.only]
    text = [
        "# One wheel on every torch",
        "",
        f"`make test-matrix`, {datetime.date.today()}, Python {platform.python_version()}, "
        f"{platform.machine()}, wheel `{options.wheel.name}`.",
        "",
        "| torch | suite |",
        "| --- | --- |",
        *rows,
        "",
        f"`pytest {' '.join(SELECTED[:-1])} '{SELECTED[-1]}'`: not what needs a GPU, torchvision "
        "or other people's programs, which bring a torch of their own, and what doesn't depend on "
        f"torch. `{FSDP}` is left out on {' and '.join(WITHOUT_FSDP)}, where FSDP2 doesn't run on "
        "a CPU.",
        "",
    ]
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs" / "torch-matrix.md").write_text("\n".join(text))
    return 0 if all("failed" not in row and "error" not in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
