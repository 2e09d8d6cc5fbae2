"""`make gpu-check`, rehearsed where there is no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("gpu_check.py")


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses a machine without a GPU")
def test_without_a_gpu_the_report_says_so(tmp_path: Path) -> None:
    report = tmp_path / "new" / "report.md"
    result = check("--out", str(report), "--no-benchmarks")
    assert result.returncode == 1
    text = report.read_text()
    assert "no GPU: its tests were skipped" in text
    assert "not run" in text.splitlines()[2]
    assert "needs an NVIDIA GPU" in text
    assert "resnet_reg_ext" in text
    assert "CUDA architectures" in text


def test_an_unwritable_report_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    result = check("--out", str(file / "report.md"))
    assert result.returncode == 2
    assert result.stderr.startswith("gpu_check: can't write")
    assert "Traceback" not in result.stderr
