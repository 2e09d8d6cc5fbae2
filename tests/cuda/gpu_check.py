"""Checks a machine's GPU and writes one report to attach to an issue.

Runs tests/cuda/test_cuda.py (compute-sanitizer included, where installed) and the GPU benchmarks.
On a machine without a GPU it says so in the same report and exits with 1.

    python tests/cuda/gpu_check.py [--out FILE] [--no-benchmarks]
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def section(title: str, command: Sequence[str]) -> tuple[str, int]:
    """A part of the report: a command, what it printed, and its exit code."""
    print(f"... {title}", flush=True)
    try:
        result = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1800
        )
        code, output = result.returncode, result.stdout + result.stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        code, output = 127, str(error)
    line = " ".join(command).replace(sys.executable, "python")
    return f"## {title}\n\n`{line}` (exit code {code})\n\n```\n{output.strip()}\n```\n", code


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report; 0 if a GPU was there and every check passed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu-report.md")
    parser.add_argument("--no-benchmarks", action="store_true")
    options = parser.parse_args(arguments)
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.touch()
    except OSError as error:
        print(f"gpu_check: can't write {options.out}: {error.strerror}", file=sys.stderr)
        return 2

    import torch

    gpu = torch.cuda.is_available()
    python = [sys.executable, "-P"]
    parts = [
        ("Build", [*python, "-m", "resnet_reg_ext.cli", "info"]),
        ("GPU", ["nvidia-smi"]),
        ("Tests", [sys.executable, "-m", "pytest", "-ra", "tests/cuda/test_cuda.py"]),
    ]
    if gpu and not options.no_benchmarks:
        parts.append(("Benchmarks", [sys.executable, "-m", "bench", "--device", "cuda"]))
    texts, codes = [], []
    for title, command in parts:
        text, code = section(title, command)
        texts.append(text)
        codes.append(code)
    passed = gpu and not any(codes)
    name = torch.cuda.get_device_name() if gpu else "no GPU: its tests were skipped"
    date = datetime.datetime.now(datetime.timezone.utc).date()
    verdict = "passed" if passed else "failed" if gpu else "not run"
    head = f"# GPU check of resnet_reg_ext\n\n{date}, {name}: {verdict}\n"
    options.out.write_text("\n".join([head, *texts]))
    print(f"{verdict}: {options.out}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
