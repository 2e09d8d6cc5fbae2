"""Checks and times the kernels on this machine's GPU, from a source tree and without a network.

    python tests/cuda/gpu_check.py [--out FOLDER] [--minutes N]

Needs a driver, nvcc, a C++ compiler, and in this Python torch, pytest, pybind11, ninja and
setuptools. It builds the package for the one GPU into a folder of its own, and every part tests
that build, never the source tree. Each part is written to report.md in the folder as soon as it is
done: --out, or the variable OUT, or out/gpu-check. Exits with 0 if there is a GPU and every part
passed; without a GPU the parts that need one say so, and it exits with 1.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
SITE = ROOT / "build" / "gpu-check" / "site"
PYTHON = [sys.executable, "-P"]  # -P: no folder of the source tree on the path
# Which package is tested; the parts stop here if it isn't the one that was built.
WHICH = (
    "import pathlib, sys, torch, resnet_reg_ext\n"
    "from resnet_reg_ext.backends import native\n"
    "site = pathlib.Path(sys.argv[1]).resolve()\n"
    "files = [resnet_reg_ext.__file__, getattr(native._C, '__file__', None)]\n"
    "print('package:', *files)\n"
    "assert all(f and site in pathlib.Path(f).resolve().parents for f in files), site\n"
    "print('build:', native._C.build_info())\n"
    "print('exchange API:', native.has_exchange_api(), 'torch:', torch.__version__)\n"
)


class Report:
    """The report, which grows part by part, and the time that is left."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.path = folder / "report.md"
        self.end = time.monotonic() + 60 * minutes
        self.failed: list[str] = []
        self.path.write_text("# GPU check of resnet_reg_ext\n\n")

    def add(self, text: str) -> None:
        """Appends a text, at once."""
        with self.path.open("a") as stream:
            stream.write(text + "\n")

    def part(
        self, title: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> bool:
        """Runs a command, and writes what it prints and how it ended."""
        print(f"... {title}", flush=True)
        left = self.end - time.monotonic()
        began = time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError("no time was left")
            result = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(SITE), **(environment or {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=left,
            )
            code, output = result.returncode, result.stdout
        except subprocess.TimeoutExpired as error:
            printed = error.stdout or b""
            text = printed if isinstance(printed, str) else printed.decode(errors="replace")
            code, output = 124, f"{text}\nstopped: no time was left"
        except (OSError, TimeoutError) as error:
            code, output = 127, str(error)
        if code:
            self.failed.append(title)
        took = time.monotonic() - began
        line = " ".join(command).replace(sys.executable, "python").replace("\n", "; ")
        shown = line if len(line) < 300 else line[:300] + " ..."
        self.add(f"## {title}\n\n`{shown}` (exit code {code}, {took:.0f} s)\n")
        self.add(f"```\n{output.strip()}\n```\n")
        return code == 0


def build(report: Report, capability: tuple[int, int] | None) -> bool:
    """Installs the source tree into SITE, for the one architecture."""
    shutil.rmtree(SITE, ignore_errors=True)
    environment = {"PYTHONPATH": "", "RESNET_REG_EXT_CUDA": "1" if capability else "0"}
    if capability:
        environment["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*capability)
    install = [sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation"]
    install += ["--no-deps", "--disable-pip-version-check", "--target", str(SITE), str(ROOT)]
    return report.part("Build", install, environment) and report.part(
        "Package", [*PYTHON, "-c", WHICH, str(SITE)]
    )


def check(report: Report, gpu: bool) -> None:
    """The parts that test and time the build."""
    if gpu:
        report.part("GPU", ["nvidia-smi"])
    # --noconftest: the suite's own needs programs beyond those listed above.
    tests = [*PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "--noconftest", "-c", os.devnull]
    tests += ["--rootdir", str(HERE), "--import-mode", "importlib", "-q", "-ra"]
    files = [str(HERE / name) for name in ("test_cuda.py", "test_cuda_rows.py")]
    report.part("Tests", [*tests, *files])
    speed = [*PYTHON, str(HERE / "gpu_speed.py")]
    report.part("Kernels and whole steps", [*speed, "--rehearse"] if not gpu else speed)
    for tool in ("memcheck", "racecheck"):
        program = shutil.which("compute-sanitizer")
        if not gpu or program is None:
            report.add(f"## {tool}\n\nnot run: {'no GPU' if not gpu else 'no compute-sanitizer'}\n")
            continue
        command = [program, "--tool", tool, "--error-exitcode", "9", *PYTHON]
        # With torch's caching allocator it takes an overrun for an access to a known block.
        report.part(
            tool,
            [*command, str(HERE / "gpu_steps.py")],
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
    ncu = shutil.which("ncu")
    if gpu and ncu:
        command = [ncu, "--launch-count", "1", "--kernel-name", "regex:prox_sgd", "--set", "full"]
        report.part("ncu", [*command, *PYTHON, str(HERE / "gpu_steps.py"), "--one"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report; 0 if a GPU was there and every part passed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(os.environ.get("OUT") or ROOT / "out" / "gpu-check")
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--minutes", type=float, default=8.0, help="after which parts are left out")
    options = parser.parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        report = Report(options.out, options.minutes)
    except OSError as error:
        print(f"gpu_check: can't write to {options.out}: {error.strerror}", file=sys.stderr)
        return 2

    import torch

    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else "no GPU: what needs one is left out"
    date = datetime.datetime.now(datetime.timezone.utc).date()
    report.add(f"{date}, {name}, Python {sys.version.split()[0]}, torch {torch.__version__}\n")
    if build(report, torch.cuda.get_device_capability() if gpu else None):
        check(report, gpu)
    passed = gpu and not report.failed
    verdict = "passed" if passed else "failed: " + ", ".join(report.failed or ["no GPU"])
    report.add(f"## Verdict\n\n{verdict}\n")
    print(f"{verdict}: {report.path}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
