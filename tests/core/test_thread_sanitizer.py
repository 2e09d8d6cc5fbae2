"""Threads that count zeros of one parameter must not write to its counter at the same time."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COUNT = "__atomic_fetch_add(o.num_zeros, zeros, __ATOMIC_RELAXED);"

pytestmark = pytest.mark.one_torch


@pytest.mark.parametrize("atomic", [True, False])
def test_the_counter_of_zeros_is_written_without_a_race(tmp_path: Path, atomic: bool) -> None:
    """By ThreadSanitizer. It sees no end of a parallel region: only one line is looked at."""
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc, ignore=shutil.ignore_patterns("__pycache__"))
    launcher = csrc / "cpu" / "launch.cpp"
    source = launcher.read_text()
    assert source.count(COUNT) == 1
    if not atomic:
        launcher.write_text(source.replace(COUNT, "*o.num_zeros += zeros;"))
    program = tmp_path / "two_threads"
    sources = [launcher, csrc / "cpu" / "plan.cpp", Path(__file__).with_name("two_threads.cpp")]
    flags = ["-std=c++17", "-O1", "-g1", "-fopenmp", "-fsanitize=thread", f"-I{csrc}"]
    subprocess.run(["c++", *flags, *sources, "-ldl", "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    line = source[: source.index(COUNT)].count("\n") + 1
    assert "stepped" in result.stdout, result.stderr
    summaries = [text for text in result.stderr.splitlines() if text.startswith("SUMMARY")]
    assert any(f"launch.cpp:{line} " in summary for summary in summaries) != atomic, result.stderr
