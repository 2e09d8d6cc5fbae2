"""`make gpu-check`, rehearsed where there is no GPU: in an environment with little in it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import caching_compiler
import pytest
import torch

SCRIPT = Path(__file__).with_name("gpu_check.py")
# What gpu_check.py says that it needs.
NEEDS = ("torch", "pytest", "pybind11", "ninja", "setuptools", "pip")

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="rehearses a machine without a GPU"
)


def closure(names: tuple[str, ...]) -> set[str]:
    """Distributions with all that they require here, extras left out."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another system
            continue
        found.add(name)
        plain = [line for line in required if "extra ==" not in line]
        waiting += [match[0] for line in plain if (match := re.match(r"[\w.-]+", line))]
    return found


def bare_environment(folder: Path) -> Path:
    """A Python that has those distributions and no others."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in closure(NEEDS):
        distribution = importlib.metadata.distribution(name)
        base = Path(str(distribution.locate_file("")))
        for file in distribution.files or ():
            top = file.parts[0]
            if top in ("..", "__pycache__") or (packages / top).exists():
                continue
            (packages / top).symlink_to(base / top)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("gpu_check")
    python = bare_environment(folder / "bare")
    dead = "http://127.0.0.1:9"  # no network
    environment = {
        "PATH": f"{folder}/bare/bin:/usr/bin:/bin",
        "HOME": str(folder),
        "OUT": str(folder / "out"),
        "http_proxy": dead,
        "https_proxy": dead,
        "OMP_WAIT_POLICY": "passive",
        "CXX": str(caching_compiler.wrapper(folder / "c++")),
    }
    result = subprocess.run(
        [python, SCRIPT], env=environment, cwd=folder, capture_output=True, text=True
    )
    report = folder / "out" / "report.md"
    assert report.exists(), result.stdout + result.stderr
    assert result.returncode == 1, report.read_text()
    return report.read_text(), folder


def test_every_part_is_reported_and_passes_but_for_the_gpu(rehearsal: tuple[str, Path]) -> None:
    text, _ = rehearsal
    ended = re.findall(r"^## (.*)\n\n`.*` \(exit code (\d+),", text, re.MULTILINE)
    names = ["Build", "Package", "Tests", "Kernels and whole steps"]
    assert ended == [(name, "0") for name in names], text
    assert re.search(r"## memcheck\n\nnot run: no GPU", text)
    assert text.rstrip().endswith("failed: no GPU")
    assert "no GPU: what needs one is left out" in text
    assert "needs an NVIDIA GPU" in text
    assert "float16 with master" in text
    assert "torch SGD, foreach" in text


def test_what_is_tested_is_the_package_that_was_built(rehearsal: tuple[str, Path]) -> None:
    text, _ = rehearsal
    root = SCRIPT.parents[2]
    (line,) = re.findall(r"^package: (.*)$", text, re.MULTILINE)
    for file in line.split():
        assert Path(file).is_relative_to(root / "build" / "gpu-check" / "site"), file
    assert "_C" in line
    # So do the tests: without the source tree's folder on the path, and without its settings.
    assert f"{sys.version.split()[0]}, torch {torch.__version__}" in text


def test_an_unwritable_folder_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    result = subprocess.run(
        [sys.executable, SCRIPT, "--out", file / "report"],
        env={**os.environ, "OUT": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("gpu_check: can't write")
    assert "Traceback" not in result.stderr
