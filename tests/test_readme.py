"""The README's figures are those of the committed measurement."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_table_is_generated_from_the_committed_json() -> None:
    command = [sys.executable, "-m", "bench.report", "--readme", "README.md", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_changed_figure_is_noticed(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    begin = text.index("<!-- bench:begin -->")
    digit = next(i for i in range(begin, len(text)) if text[i].isdigit())
    changed = tmp_path / "README.md"
    changed.write_text(text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :])
    command = [sys.executable, "-m", "bench.report", "--readme", str(changed), "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode != 0
