"""JSON of a run to Markdown, plots and the README's table.

``python -m bench.report --readme README.md --json bench/results/cpu.json`` puts the tables between
the README's markers; with ``--check`` it only says whether they are there. Runs in the folder
``others`` beside the JSON stand beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
OURS = "prox"
COMMAND = "python -m bench.run --out bench/results"
UNMEASURED = "not measured"


# ---- Markdown -----------------------------------------------------------------------------------


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, all columns but the first aligned to the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def _spread(q: dict[str, float], digits: int = 2) -> str:
    return f"{q['q50']:.{digits}f} ({q['q20']:.{digits}f} to {q['q80']:.{digits}f})"


def _ms(q: dict[str, float]) -> str:
    return _spread(q, 1 if q["q50"] >= 10 else 2)


def machine_line(results: dict[str, Any]) -> str:
    """What ran, in a sentence."""
    m, versions = results["machine"], results["machine"]["versions"]
    device = "" if results["device"] == "cpu" else f"{m['device']}, "
    ids = f" ({m['cpu_ids']})" if m.get("cpu_ids") else ""
    peers = ", ".join(
        f"{name} {versions[name]}"
        for name in ("resnet_reg_ext", "torch", "torchao", "pytorch_optimizer", "proxtorch")
        if name in versions
    )
    form = ", quick form" if results["quick"] else ""
    form += f", commit {m['commit']}" if m.get("commit") else ""
    return (
        f"{device}{m['cpu']}{ids}, {m['cores']} cores, {m['threads']} threads, "
        f"{results['simd']} kernels, {peers}, {results['date']}{form}."
    )


def _digits(bar: dict[str, Any]) -> int:
    return 3 if bar["q50"] < 0.2 else 2


def side_by_side(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """Medians of several runs, a column each; in bold where the bar isn't met."""
    rows = []
    for name, *bars in zip(names, *(run["bars"] for run in runs), strict=True):
        rows.append((name, f"≤ {bars[0]['bar']:.2f}", *map(_median, bars)))
    heads = [
        f"{run['date']}, {run['machine']['cpu_ids'].split(',')[0]}, "
        f"{run['tables'][0]['limit']['gb_per_s']['q50']:.0f} GB/s"
        for run in runs
    ]
    return _grid(("what", "bar", *heads), rows)


def _median(bar: dict[str, Any]) -> str:
    if bar.get("missing"):
        return UNMEASURED
    text = f"{bar['q50']:.{_digits(bar)}f}"
    return text if bar["met"] else f"**{text}**"


def bars_table(results: dict[str, Any]) -> str:
    """What must be shown: ratio, bar, measured."""
    rows = []
    for bar in results["bars"]:
        if bar.get("missing"):
            measured, met = UNMEASURED, ""
        elif bar["unit"] == "MiB":
            measured, met = f"{bar['q50']:.2f} MiB", "yes" if bar["met"] else "**no**"
        else:
            measured, met = _spread(bar, _digits(bar)), "yes" if bar["met"] else "**no**"
        unit = " MiB" if bar["unit"] == "MiB" else ""
        rows.append((bar["what"], f"≤ {bar['bar']:.2f}{unit}", measured, met))
    return _grid(("what", "bar", "measured: median (20 % to 80 %)", "met"), rows)


def step_table(table: dict[str, Any]) -> str:
    """A table of steps: time, our time over it, memory."""
    rows = []
    for row in table["rows"]:
        if "missing" in row:
            rows.append((row["name"], "-", "-", "-", row["missing"]))
            continue
        extra = row.get("extra_mib")
        check = row["check"]
        if check is None:
            same = "another method"
        else:
            same = f"{check['steps']} step{'s' if check['steps'] > 1 else ''}"
        rows.append(
            (
                row["name"],
                _ms(row["ms"]),
                "1" if row["key"] == OURS else _spread(row["ours_over"]),
                "-" if extra is None else f"{extra:.1f}",
                same,
            )
        )
    limit = table["limit"]
    rows.append(
        (
            f"moving {limit['bytes_an_element']} bytes an element ({limit['operation']}, "
            f"{limit['gb_per_s']['q50']:.1f} GB/s)",
            _ms(limit["ms"]),
            _spread(table["ratios"]["prox/limit"]),
            "-",
            "-",
        )
    )
    head = ("step", "ms", "ProxSGD ÷ it", "extra memory, MiB", "weights checked over")
    return _grid(head, rows)


def _title(table: dict[str, Any]) -> str:
    parts = [table["model"]]
    if "tensors" in table:
        parts += [f"{table['tensors']:,} tensors", f"{table['elements']:,} elements"]
    parts += [table["dtype"], table["format"]]
    if not table["momentum"]:
        parts.append("no momentum")
    if "threads" in table and table["device"] == "cpu":
        parts.append(f"{table['threads']} thread{'s' if table['threads'] > 1 else ''}")
    if "rounds" in table:
        parts.append(f"{table['rounds']} round{'s' if table['rounds'] > 1 else ''}")
    return ", ".join(parts)


def readme_block(results: dict[str, Any], others: Sequence[dict[str, Any]]) -> str:
    """The README's part: the bars, here and in other runs, the main table, what ran it and how."""
    main = results["tables"][0]
    return "\n\n".join(
        (
            bars_table(results),
            f"Medians of other runs, bold where a bar is missed; GB/s are what `addcmul_` moved "
            f"meanwhile, in the run above {main['limit']['gb_per_s']['q50']:.0f}:",
            side_by_side(others, [bar["what"] for bar in results["bars"]]),
            f"One step: {_title(main)}. Median (20 % to 80 %).",
            step_table(main),
            f"{machine_line(results)} Ratios are formed within rounds in which all rows run in "
            f"turn. Made by `{COMMAND}{' --quick' if results['quick'] else ''}`.",
        )
    )


def short(results: dict[str, Any]) -> str:
    """The bars, the main table and what ran it, to be read in a terminal."""
    main = results["tables"][0]
    parts = (
        f"One step: {_title(main)}. Median (20 % to 80 %).",
        _aligned(step_table(main)),
        _aligned(bars_table(results)).replace("**no**", "no    "),
        machine_line(results),
    )
    return "\n\n".join(parts)


def _aligned(table: str) -> str:
    """A Markdown table with columns padded to one width, numbers to the right."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    del rows[1]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown(results: dict[str, Any]) -> str:
    """Everything, as a page."""
    parts = ["# What a step costs", machine_line(results), bars_table(results), "## The step"]
    for table in results["tables"]:
        parts += [f"### {_title(table)}", step_table(table)]
    parts += _methods(results["tables"][0])
    sections = {
        "host": _host,
        "dtensors": _dtensors,
        "sizes": _sizes,
        "counts": _counts,
        "cold_start": _cold_start,
    }
    for key, section in sections.items():
        parts += section(results[key]) if key in results else []
    for training in results.get("training", ()):
        parts += _training(training)
    return "\n\n".join(parts) + "\n"


def _methods(table: dict[str, Any]) -> list[str]:
    lines = [
        f"- {row['name']}: {row['method']}."
        + (f" Compiled and checked in {row['compile_s']:.0f} s." if "compile_s" in row else "")
        for row in table["rows"]
    ]
    return ["### What the rows are", "\n".join(lines)]


def _host(host: dict[str, Any]) -> list[str]:
    return [f"## Host time: {host['tensors']} tensors of one element", _host_table(host)]


def _dtensors(host: dict[str, Any]) -> list[str]:
    title = f"## Host time: {host['tensors']} DTensors of one element, one gloo process"
    return [title, f"Not run: {host['missing']}." if "missing" in host else _host_table(host)]


def _host_table(host: dict[str, Any]) -> str:
    rows = [
        (row["name"], _ms(row["us"]), "1" if row["key"] == OURS else _spread(row["ours_over"]))
        for row in host["rows"]
    ]
    return _grid(("step", "µs", "ProxSGD ÷ it"), rows)


NAMES = {
    OURS: "ProxSGD, native",
    "sgd_fused": "SGD(fused), no L1",
    "foreach_threshold": "SGD(foreach) + foreach soft-threshold",
}


def _sizes(sizes: dict[str, Any]) -> list[str]:
    rows = []
    for point in sizes["points"]:
        count = f"{point['elements']:,}"
        if "missing" in point:
            rows.append((count, point["missing"], *("-" for _ in range(len(NAMES)))))
            continue
        rows.append((count, *(_ms(point["us"][k]) for k in NAMES), _ms(point["limit_us"])))
    return [
        "## Cost against size: one tensor",
        _grid(("elements", *(f"{name}, µs" for name in NAMES.values()), "20 bytes each, µs"), rows),
    ]


def _counts(counts: dict[str, Any]) -> list[str]:
    keys = [key for key in NAMES if key in counts["points"][0]["us"]]
    rows = [
        (
            f"{point['tensors']:,}",
            *(_ms({q: v / 1e3 for q, v in point["us"][k].items()}) for k in keys),
            *(_spread(point["over_one"][k]) for k in keys),
        )
        for point in counts["points"]
    ]
    head = (
        "tensors",
        *(f"{NAMES[k]}, ms" for k in keys),
        *(f"{NAMES[k]}, over one tensor" for k in keys),
    )
    return [f"## Cost against number: {counts['elements']:,} elements in all", _grid(head, rows)]


def _training(training: dict[str, Any]) -> list[str]:
    title = (
        f"## A whole ResNet-50 training step: {training['pixels']} px, batch {training['batch']}"
    )
    if "missing" in training:
        return [title, f"Not run: {training['missing']}."]
    rows = [
        (row["name"], _ms(row["ms"]), _spread({q: 100 * v for q, v in row["share"].items()}))
        for row in training["rows"]
    ]
    return [
        title,
        f"Forward and backward: {_ms(training['forward_and_backward_ms'])} ms.",
        _grid(("step", "ms", "share of the whole, %"), rows),
    ]


def _cold_start(cold: dict[str, Any]) -> list[str]:
    if not cold:
        return []
    rows = [(what, _ms(q)) for what, q in cold["ms"].items()]
    return [f"## Cold start: {cold['processes']} new processes", _grid(("what", "ms"), rows)]


# ---- the README ---------------------------------------------------------------------------------


def update_readme(path: Path, block: str) -> bool:
    """Puts the table between the README's markers; returns whether that changed anything.

    Raises:
        ValueError: the markers aren't there.
    """
    text = path.read_text(encoding="utf-8")
    new = with_block(text, block)
    if new != text:
        path.write_text(new, encoding="utf-8")
    return new != text


def with_block(text: str, block: str) -> str:
    """The text with what is between its markers replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README needs a line {BEGIN} and, below it, a line {END}")
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


# ---- plots --------------------------------------------------------------------------------------

# Grey for what is written and saturated colours for what is drawn: both can be read on white and on
# black, and the background is left out.
INK = "#7a8087"
COLOURS = {OURS: "#2f81f7", "sgd_fused": "#e8830c", "foreach_threshold": "#a05ad6"}
OTHERS, LIMIT_COLOUR = "#e8830c", "#e5534b"
STYLE: dict[Any, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.framealpha": 0,
    "font.size": 10,
    "svg.hashsalt": "bench",
    "svg.fonttype": "none",
}


def plots(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draws the ratios and the cost against size as SVG; nothing without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plots: matplotlib isn't installed", file=sys.stderr)
        return []
    made = []
    drawings = {"ratios": _draw_ratios, "size": _draw_sizes}
    with plt.rc_context(STYLE):
        for name, draw in drawings.items():
            if name == "size" and "sizes" not in results:
                continue
            figure = draw(plt, results)
            path = folder / f"{results['device']}-{name}.svg"
            figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)
            made.append(path)
    return made


def _draw_ratios(plt: Any, results: dict[str, Any]) -> Any:
    """Times of a step over ours, with their spread."""
    table = results["tables"][0]
    rows = [r for r in table["rows"] if "ms" in r and r["key"] != OURS]
    # A ratio of ours over theirs of q is theirs over ours of 1/q.
    rows.sort(key=lambda r: r["ours_over"]["q50"])
    medians = [1 / r["ours_over"]["q50"] for r in rows]
    low = [m - 1 / r["ours_over"]["q80"] for m, r in zip(medians, rows, strict=True)]
    high = [1 / r["ours_over"]["q20"] - m for m, r in zip(medians, rows, strict=True)]
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(rows) + 1.2))
    colours = [COLOURS[OURS] if r["name"].startswith("ProxSGD") else OTHERS for r in rows]
    names = [r["name"] for r in rows]
    axes.barh(names, medians, xerr=(low, high), color=colours, ecolor=INK, capsize=3)
    for place, (median, more) in enumerate(zip(medians, high, strict=True)):
        # Right of the whisker, and of the line where the bar ends before it.
        axes.text(1.04 * max(median + more, 1), place, f"{median:.2f}", va="center")
    axes.axvline(1, color=LIMIT_COLOUR, linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(0.5, 2 * max(m + h for m, h in zip(medians, high, strict=True)))
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100) if t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel(
        "time of a step over that of ProxSGD, native, with L1 (red line)\n"
        "median; whiskers: 20 % to 80 %; blue: other forms of ProxSGD"
    )
    axes.set_title(_title(table), fontsize=10)
    return figure


def _draw_sizes(plt: Any, results: dict[str, Any]) -> Any:
    """Nanoseconds an element against elements, with the line that memory draws."""
    points = [p for p in results["sizes"]["points"] if "us" in p]
    sizes = [p["elements"] for p in points]
    figure, axes = plt.subplots(figsize=(8, 4.5))

    def ns(key: str, q: str) -> list[float]:
        return [1e3 * p["us"][key][q] / p["elements"] for p in points]

    for key, name in NAMES.items():
        axes.plot(sizes, ns(key, "q50"), marker="o", color=COLOURS[key], label=name)
        axes.fill_between(sizes, ns(key, "q20"), ns(key, "q80"), color=COLOURS[key], alpha=0.2)
    main = results["tables"][0]
    if "limit" in main:
        floor = 1e6 * main["limit"]["ms"]["q50"] / main["elements"]
        axes.axhline(
            floor,
            color=LIMIT_COLOUR,
            linestyle="--",
            label=f"memory: {main['limit']['bytes_an_element']} bytes an element at "
            f"{main['limit']['gb_per_s']['q50']:.1f} GB/s",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_plain)
    threads = results["sizes"]["threads"]
    axes.set_title(
        f"One float32 tensor, {threads} thread{'s' if threads > 1 else ''}: median; "
        "shaded: 20 % to 80 %",
        fontsize=10,
    )
    axes.set_xlabel("elements of the tensor")
    axes.set_ylabel("time of a step, ns an element")
    axes.legend()
    return figure


def _plain(value: float, _place: int) -> str:
    """A power of ten as one reads it: 0.1, 10, 10 K, 10 M."""
    for unit, name in ((1e6, " M"), (1e3, " K")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


# ---- the command --------------------------------------------------------------------------------


def write(path: Path) -> list[Path]:
    """Writes report and plots beside a run's JSON."""
    results = json.loads(path.read_text(encoding="utf-8"))
    page = path.with_suffix(".md")
    drawn = plots(results, path.parent)
    images = "".join(f"\n![{p.stem}]({p.name})\n" for p in drawn)
    page.write_text(markdown(results) + images, encoding="utf-8")
    return [page, *drawn]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("bench/results/cpu.json"))
    parser.add_argument("--readme", type=Path, help="the file to put the table into")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    options = parser.parse_args(arguments)
    results = json.loads(options.json.read_text(encoding="utf-8"))
    others = sorted((options.json.parent / "others").glob("*.json"))
    block = readme_block(results, [json.loads(p.read_text(encoding="utf-8")) for p in others])
    if options.check:
        if not options.readme:
            parser.error("--check needs --readme")
        text = options.readme.read_text(encoding="utf-8")
        current = with_block(text, block) == text
        print(f"{options.readme} and {options.json} {'agree' if current else 'differ'}")
        return 0 if current else 1
    if options.readme:
        changed = update_readme(options.readme, block)
        print(f"{options.readme}: {'updated' if changed else 'is up to date'}")
    for path in write(options.json):
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
