"""The README's figures are those of the committed measurement."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
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


def test_the_diff_changes_the_optimizer_and_nothing_else() -> None:
    """Its two sides, run: SGD's options, and the weights of SGD's step without L1."""
    text = (ROOT / "README.md").read_text()
    (diff,) = re.findall(r"^```diff\n([\s\S]*?)^```$", text, re.MULTILINE)
    after = []
    for sign in "-+":
        torch.manual_seed(0)
        model = torchvision.models.resnet18()
        names: dict[str, Any] = {"torch": torch, "model": model}
        lines = [line[1:] for line in diff.splitlines() if line.startswith(sign)]
        exec(compile("\n".join(lines), "README.md", "exec"), names)
        for group in names["optimizer"].param_groups:
            assert (group["lr"], group["momentum"]) == (0.1, 0.9)
            if sign == "+":
                assert group.pop("l1") == group["weight_decay"]
                group["l1"] = 0.0
            group["weight_decay"] = 1e-4
        model(torch.ones(2, 3, 32, 32)).sum().backward()
        names["optimizer"].step()
        after.append([param.detach() for param in model.parameters()])
    for before, now in zip(*after, strict=True):
        torch.testing.assert_close(now, before, rtol=1e-6, atol=1e-6)


def test_it_is_short_and_its_links_lead_somewhere() -> None:
    for name in ("README.md", "bench/README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text()
        links = re.findall(r"\]\((?!http)([^)#]+)", text) + re.findall(
            r'src(?:set)?="([^"]+)', text
        )
        assert links
        for link in links:
            assert (ROOT / name).parent.joinpath(link).exists(), f"{name}: {link}"
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_plots_show_the_committed_figures(theme: str) -> None:
    folder = ROOT / "docs" / "images"
    accuracy, speed = (
        re.findall(r">([^<>]+)</text>", (folder / f"{name}-{theme}.svg").read_text())
        for name in ("accuracy", "speed")
    )
    runs = json.loads((ROOT / "docs" / "results" / "digits" / "compare.json").read_text())["runs"]
    for name, seeds in runs.items():
        ends = [seed["history"][-1] for seed in seeds]
        train, test, zeros = (
            statistics.mean(end[key] for end in ends)
            for key in ("train_accuracy", "test_accuracy", "zeros")
        )
        shown = {name, f"{test:.3f}", f"gap {train - test:.3f}", f"{100 * zeros:.0f} % zeros"}
        assert shown <= set(accuracy)
    rows = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text())["tables"][0]["rows"]
    medians = {row["key"]: f"{row['ms']['q50']:.1f}" for row in rows}
    for key in ("prox", "sgd_fused", "compile_whole", "compile_tensor", "softshrink", "pat"):
        assert medians[key] in speed


def test_the_first_example_needs_what_is_installed(tmp_path: Path) -> None:
    """As it stands there, where `pip install .` has brought torch and no more."""
    text = (ROOT / "docs" / "get-started.md").read_text()
    (code,) = re.findall(r"^## Try it\n\n.*\n\n```python\n([\s\S]*?)^```$", text, re.MULTILINE)
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
