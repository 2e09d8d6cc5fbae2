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
    for name, seeds in measured("digits").items():
        if name == "none, stopped early":
            continue
        train, test, loss, zeros = (
            statistics.mean(seed[key] for seed in seeds)
            for key in ("train_accuracy", "test_accuracy", "test_loss", "zeros")
        )
        beside = f"loss {loss:.2f}, {100 * zeros:.0f} % zeros"
        assert {name, f"{test:.3f}", f"gap {train - test:.3f}", beside} <= set(accuracy)
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


def measured(experiment: str) -> dict[str, list[dict[str, float]]]:
    """What each seed of each arm of a committed comparison ends with, on its test images."""
    path = ROOT / "docs" / "results" / experiment / "compare.json"
    runs = json.loads(path.read_text())["runs"]
    ends = {
        name: [{**seed["history"][-1], **seed["test"]} for seed in seeds]
        for name, seeds in runs.items()
    }
    ends["none, stopped early"] = []
    for seed in runs["none"]:
        best = seed["best"]
        (chosen,) = (row for row in seed["history"] if row["epoch"] == best["epoch"])
        ends["none, stopped early"].append({**chosen, **best["test"]})
    for seeds in ends.values():
        for seed in seeds:
            seed["gap"] = seed["train_accuracy"] - seed["test_accuracy"]
    return ends


@pytest.mark.parametrize(
    ("experiment", "page", "seeds"),
    [
        ("digits", "README.md", 5),
        ("digits", "docs/recipe.md", 5),
        ("towards-start", "docs/recipe.md", 3),
    ],
)
def test_the_comparison_is_that_of_the_committed_runs(
    experiment: str, page: str, seeds: int
) -> None:
    """Every figure in a page's table, from the runs' own results."""
    lines = (ROOT / page).read_text().splitlines()
    for name, ends in measured(experiment).items():
        assert len(ends) == seeds
        figures = []
        for metric in ("train_accuracy", "test_accuracy", "gap", "test_loss"):
            values = [end[metric] for end in ends]
            figures.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
        rows = [line for line in lines if line.startswith(f"| {name} | ")]
        (row,) = (row for row in rows if all(figure in row for figure in figures))
        zeros = 100 * statistics.mean(end["zeros"] for end in ends)
        share = row.split("|")[-2].split()[0]
        assert share == (f"{zeros:.1f}" if zeros > 1 else "0")


@pytest.mark.parametrize("experiment", ["digits", "towards-start"])
def test_what_is_said_of_differences_over_seeds(experiment: str) -> None:
    """From the runs' own results: paired differences, Student's t; each is said as it came out."""
    text = (ROOT / "docs" / "recipe.md").read_text().replace("\n", " ")
    ends = measured(experiment)
    for name, of_name in ends.items():
        for control in ("none", "none, stopped early"):
            if name == control or name == "none":
                continue
            pairs = zip(of_name, ends[control], strict=True)
            found = [a["test_loss"] - b["test_loss"] for a, b in pairs]
            mean, count = statistics.mean(found), len(found)
            margin = student.ppf(0.975, count - 1) * statistics.stdev(found) / count**0.5
            sign = "+" if mean > 0 else "\N{MINUS SIGN}"
            assert f"{sign}{abs(mean):.3f} ± {margin:.3f}" in text, (name, control)


def test_the_frontier_of_l1_towards_the_start_is_that_of_the_committed_runs() -> None:
    path = ROOT / "docs" / "results" / "towards-start" / "frontier.json"
    runs = json.loads(path.read_text())["runs"]
    lines = (ROOT / "docs" / "recipe.md").read_text().splitlines()
    for l1 in {run["l1"] for run in runs}:
        seeds = [run for run in runs if run["l1"] == l1]
        assert [run["seed"] for run in seeds] == [0, 1, 2]
        accuracies = [run["test_accuracy"] for run in seeds]
        kept = sorted(100 * (1 - run["changed_values"] / run["values"]) for run in seeds)
        sizes = sorted(run["patch_bytes"] / 1e6 for run in seeds)
        (row,) = (line for line in lines if line.startswith(f"| {l1:g} | "))
        assert f"{statistics.mean(accuracies):.3f} ± {statistics.stdev(accuracies):.3f}" in row
        assert f"{kept[0]:.1f} to {kept[-1]:.1f} %" in row
        assert f"{sizes[0]:.1f} to {sizes[-1]:.1f}" in row
