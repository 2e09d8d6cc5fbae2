"""The README's figures are those of the committed measurement."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from bare import BARE
from scipy.stats import t as student

pytestmark = pytest.mark.one_torch

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_is_generated_from_the_committed_json() -> None:
    command = [sys.executable, "-m", "bench", "report", "--readme", "README.md", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_changed_figure_is_noticed(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    begin = text.index("<!-- bench:begin -->")
    digit = next(i for i in range(begin, len(text)) if text[i].isdigit())
    changed = tmp_path / "README.md"
    changed.write_text(text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :])
    command = [sys.executable, "-m", "bench", "report", "--readme", str(changed), "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode != 0


def test_the_usage_example_needs_what_is_installed(tmp_path: Path) -> None:
    """As it stands there, where `pip install .` has brought torch and no more."""
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"^## Usage\n\n```python\n([\s\S]*?)^```$", text, re.MULTILINE)
    (tmp_path / "example.py").write_text(BARE + code)
    done = subprocess.run(
        [sys.executable, tmp_path / "example.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "resnet_reg_ext" not in done.stderr  # torch warns that there is no NumPy
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()[1:4]}
    parameters, zeros, size, share = rows["regularised"]
    assert (parameters, size) == ("3", "19,936")
    assert 20 < float(share) < 100
    assert rows["others"][1] == "0"
    assert rows["total"][:2] == ["8", zeros]


def test_the_comparison_is_that_of_the_committed_runs() -> None:
    """Every figure in the README's and the page's table, from the runs' own results."""
    content = json.loads((ROOT / "docs" / "results" / "digits" / "compare.json").read_text())
    texts = [(ROOT / name).read_text() for name in ("README.md", "docs/recipe.md")]
    for name, runs in content["runs"].items():
        last = [run["history"][-1] for run in runs]
        assert len(last) == 5
        for metric in ("train_accuracy", "test_accuracy", "gap"):
            values = [
                r[metric] if metric in r else r["train_accuracy"] - r["test_accuracy"] for r in last
            ]
            figure = f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
            for text in texts:
                (row,) = (line for line in text.splitlines() if line.startswith(f"| {name} | "))
                assert figure in row
        zeros = 100 * statistics.mean(r["zeros"] for r in last)
        for text in texts:
            (row,) = (line for line in text.splitlines() if line.startswith(f"| {name} | "))
            share = row.split("|")[-2].split()[0]
            assert share == (f"{zeros:.1f}" if zeros > 1 else "0")


def test_what_is_said_of_the_seeds_that_nothing_was_tuned_on() -> None:
    """From the runs' own results: paired differences, Student's t."""
    runs = json.loads((ROOT / "docs" / "results" / "digits" / "compare.json").read_text())["runs"]
    text = (ROOT / "docs" / "recipe.md").read_text().replace("\n", " ")

    def last(name: str, metric: str) -> list[float]:
        ends = [run["history"][-1] for run in runs[name][1:]]
        if metric == "gap":
            return [end["train_accuracy"] - end["test_accuracy"] for end in ends]
        return [end[metric] for end in ends]

    for name in ("L1", "elastic net"):
        for metric, sign in (("test_accuracy", "+"), ("gap", "\N{MINUS SIGN}")):
            pairs = zip(last(name, metric), last("none", metric), strict=True)
            differences = [a - b for a, b in pairs]
            mean = statistics.mean(differences)
            margin = student.ppf(0.975, 3) * statistics.stdev(differences) / 2
            assert abs(mean) > margin
            assert f"{sign}{abs(mean):.3f} ± {margin:.3f}" in text
