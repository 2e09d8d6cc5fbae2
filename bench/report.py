"""Files from a run: its page and plots, README's figures, and the tables of bench/README.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import markdown, plots, readme_plots

COMMAND = "python -m bench --out bench/results"
PAGE = Path(__file__).resolve().with_name("README.md")
README_ROWS = {
    "sgd_fused": ", without L1",
    "compile_whole": "",
    "compile_tensor": "",
    "softshrink": "",
    "pat": "",
}


def write(path: Path) -> list[Path]:
    """Writes page and plots beside a run's JSON; returns their paths."""
    results = _read(path)
    page = path.with_suffix(".md")
    drawn = plots.plots(results, path.parent)
    images = "".join(f"\n![{p.stem}]({p.name})\n" for p in drawn)
    page.write_text(markdown.page(results) + images, encoding="utf-8")
    return [page, *drawn]


def draw_readme(path: Path) -> list[Path]:
    """Draws README's plots from a run's JSON; returns their paths."""
    return readme_plots.draw(_read(path))


def is_current(file: Path, path: Path) -> bool:
    """Whether the block in README.md, or in this folder's, is the one that a run's JSON gives.

    Raises:
        ValueError: the file has no place for the block.
    """
    text = file.read_text(encoding="utf-8")
    return markdown.with_block(text, "bench", _block_for(file, path)) == text


def update(file: Path, path: Path) -> bool:
    """Replaces the block by that of a run's JSON; returns whether it changed.

    Raises:
        ValueError: the file has no place for the block.
    """
    text = file.read_text(encoding="utf-8")
    new = markdown.with_block(text, "bench", _block_for(file, path))
    if new != text:
        file.write_text(new, encoding="utf-8")
    return new != text


def _read(path: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results


def _block_for(file: Path, path: Path) -> str:
    """Few rows for README.md; for this folder's the whole, with the runs in ``others``."""
    results = _read(path)
    if file.resolve() != PAGE:
        return _few_rows(results)
    others = sorted((path.parent / "others").glob("*.json"))
    return _block(results, [_read(other) for other in others])


def _few_rows(results: dict[str, Any]) -> str:
    """The main table's rows that most readers would write instead, the machine and the command."""
    main = results["tables"][0]
    return "\n\n".join(
        (
            markdown.few_rows(main, README_ROWS),
            f"{markdown.title(main)}. Median (20 % to 80 %). {markdown.machine_line(results)} "
            f"Made by `{COMMAND}{' --quick' if results['quick'] else ''}`.",
        )
    )


def _block(results: dict[str, Any], others: Sequence[dict[str, Any]]) -> str:
    """Targets in this run and in others, the main table, machine and command."""
    main = results["tables"][0]
    parts = [markdown.targets_table(results)]
    if others:
        parts += [
            f"Medians of other runs, bold where a target is missed; GB/s are what `addcmul_` moved "
            f"meanwhile, in the run above {main['limit']['gb_per_s']['q50']:.0f}:",
            markdown.side_by_side(others, results["targets"]),
        ]
    parts += [
        f"One step: {markdown.title(main)}. Median (20 % to 80 %).",
        markdown.step_table(main),
        f"{markdown.machine_line(results)} Ratios are formed within rounds in which all rows run "
        f"in turn. Made by `{COMMAND}{' --quick' if results['quick'] else ''}`.",
    ]
    return "\n\n".join(parts)
