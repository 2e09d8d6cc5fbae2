"""Files from a run's JSON: its page and plots, and the README's block of tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import markdown, plots

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
COMMAND = "python -m bench --out bench/results"


def write(path: Path) -> list[Path]:
    """Writes page and plots beside a run's JSON; returns their paths."""
    results = _read(path)
    page = path.with_suffix(".md")
    drawn = plots.plots(results, path.parent)
    images = "".join(f"\n![{p.stem}]({p.name})\n" for p in drawn)
    page.write_text(markdown.page(results) + images, encoding="utf-8")
    return [page, *drawn]


def readme_is_current(readme: Path, path: Path) -> bool:
    """Whether the README's block is the one that a run's JSON gives.

    Raises:
        ValueError: the README has no place for the block.
    """
    text = readme.read_text(encoding="utf-8")
    return _with_block(text, _block_of(path)) == text


def update_readme(readme: Path, path: Path) -> bool:
    """Replaces the README's block by that of a run's JSON; returns whether it changed.

    Raises:
        ValueError: the README has no place for the block.
    """
    text = readme.read_text(encoding="utf-8")
    new = _with_block(text, _block_of(path))
    if new != text:
        readme.write_text(new, encoding="utf-8")
    return new != text


def _read(path: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results


def _block_of(path: Path) -> str:
    """The README's block for a run and the runs in the folder ``others`` beside its JSON."""
    others = sorted((path.parent / "others").glob("*.json"))
    return _block(_read(path), [_read(other) for other in others])


def _block(results: dict[str, Any], others: Sequence[dict[str, Any]]) -> str:
    """Targets in this run and in others, the main table, machine and command."""
    main = results["tables"][0]
    parts = [markdown.targets_table(results)]
    if others:
        parts += [
            f"Medians of other runs, bold where a target is missed; GB/s are what `addcmul_` moved "
            f"meanwhile, in the run above {main['limit']['gb_per_s']['q50']:.0f}:",
            markdown.side_by_side(others, [target["what"] for target in results["targets"]]),
        ]
    parts += [
        f"One step: {markdown.title(main)}. Median (20 % to 80 %).",
        markdown.step_table(main),
        f"{markdown.machine_line(results)} Ratios are formed within rounds in which all rows run "
        f"in turn. Made by `{COMMAND}{' --quick' if results['quick'] else ''}`.",
    ]
    return "\n\n".join(parts)


def _with_block(text: str, block: str) -> str:
    """The text with everything between its markers replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README needs a line {BEGIN} and, below it, a line {END}")
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"
