"""Results as Markdown: tables, and the page of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .keys import COUPLED, MAIN, OURS

UNMEASURED = "not measured"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, all columns but the first aligned to the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def with_block(text: str, name: str, block: str) -> str:
    """The text with everything between the markers of a name replaced.

    Raises:
        ValueError: a marker is missing.
    """
    first, last = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"it needs a line {first} and, below it, a line {last}")
    return f"{before}{first}\n\n{block}\n\n{last}{after}"


def spread(q: dict[str, float], digits: int = 2) -> str:
    return f"{q['q50']:.{digits}f} ({q['q20']:.{digits}f} to {q['q80']:.{digits}f})"


def time(q: dict[str, float]) -> str:
    return spread(q, 1 if q["q50"] >= 10 else 2)


def machine_line(results: dict[str, Any]) -> str:
    """Processor, versions, date and commit, in a sentence."""
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


def _digits(target: dict[str, Any]) -> int:
    return 3 if target["q50"] < 0.2 else 2


def side_by_side(runs: Sequence[dict[str, Any]], targets: Sequence[dict[str, Any]]) -> str:
    """Medians of several runs, a column each; in bold where one of these targets is missed."""
    rows = []
    measured = [{entry["what"]: entry for entry in run["targets"]} for run in runs]
    for target in targets:
        name, limit = target["what"], target["target"]
        medians = [_median(of_run.get(name, {"missing": True}), limit) for of_run in measured]
        rows.append((name, f"≤ {limit:.2f}", *medians))
    heads = [
        f"{run['date']}, {run['machine']['cpu_ids'].split(',')[0]}, "
        f"{run['tables'][0]['limit']['gb_per_s']['q50']:.0f} GB/s"
        for run in runs
    ]
    return grid(("what", "target", *heads), rows)


def _median(measured: dict[str, Any], limit: float) -> str:
    if measured.get("missing"):
        return "-"
    text = f"{measured['q50']:.{_digits(measured)}f}"
    return text if measured["q50"] <= limit else f"**{text}**"


def targets_table(results: dict[str, Any]) -> str:
    """Each target with the measured quantiles and whether it is met."""
    rows = []
    for target in results["targets"]:
        if target.get("missing"):
            measured, met = UNMEASURED, ""
        elif target["unit"] == "MiB":
            measured, met = f"{target['q50']:.2f} MiB", "yes" if target["met"] else "**no**"
        else:
            measured, met = spread(target, _digits(target)), "yes" if target["met"] else "**no**"
        unit = " MiB" if target["unit"] == "MiB" else ""
        rows.append((target["what"], f"≤ {target['target']:.2f}{unit}", measured, met))
    return grid(("what", "target", "measured: median (20 % to 80 %)", "met"), rows)


def step_table(table: dict[str, Any]) -> str:
    """A table of steps: time, ProxSGD's time over it, memory."""
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
                time(row["ms"]),
                "1" if row["key"] == OURS else spread(row["ours_over"]),
                "-" if extra is None else f"{extra:.1f}",
                same,
            )
        )
    limit = table["limit"]
    rows.append(
        (
            f"moving {limit['bytes_an_element']} bytes an element ({limit['operation']}, "
            f"{limit['gb_per_s']['q50']:.1f} GB/s)",
            time(limit["ms"]),
            spread(table["ratios"]["prox/limit"]),
            "-",
            "-",
        )
    )
    head = ("step", "ms", "ProxSGD ÷ it", "extra memory, MiB", "weights checked over")
    return grid(head, rows)


def few_rows(table: dict[str, Any], remarks: dict[str, str]) -> str:
    """Some rows of a table of steps, with remarks: time, and ProxSGD's time over it."""
    rows = {row["key"]: row for row in table["rows"]}
    chosen = [
        (rows[key]["name"] + remark, time(rows[key]["ms"]), spread(rows[key]["ours_over"]))
        for key, remark in remarks.items()
    ]
    own = (f"**{rows[OURS]['name']}, with L1**", f"**{time(rows[OURS]['ms'])}**", "1")
    return grid(("step", "ms", "ProxSGD ÷ it"), [own, *chosen])


def title(table: dict[str, Any]) -> str:
    """Model, dtype, format, threads and rounds of a table."""
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


def short(results: dict[str, Any]) -> str:
    """The main table, the targets and the machine, for a terminal."""
    main = results["tables"][0]
    parts = (
        f"One step: {title(main)}. Median (20 % to 80 %).",
        _aligned(step_table(main)),
        _aligned(targets_table(results)).replace("**no**", "no    "),
        machine_line(results),
    )
    return "\n\n".join(parts)


def _aligned(table: str) -> str:
    """A Markdown table as columns of equal width for a terminal, numbers to the right."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    del rows[1]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if position == 0 else cell.rjust(width)
            for position, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def page(results: dict[str, Any]) -> str:
    """The page of a run."""
    parts = ["# What a step costs", machine_line(results), targets_table(results), "## The step"]
    for table in results["tables"]:
        parts += [f"### {title(table)}", step_table(table)]
    for table in results["tables"]:
        if table["key"] in (MAIN, COUPLED):
            parts += _methods(table)
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
    return [f"### What the rows are: {table['model']}", "\n".join(lines)]


def _host(host: dict[str, Any]) -> list[str]:
    return [f"## Host time: {host['tensors']} tensors of one element", _host_table(host)]


def _dtensors(host: dict[str, Any]) -> list[str]:
    title = f"## Host time: {host['tensors']} DTensors of one element, one gloo process"
    return [title, f"Not run: {host['missing']}." if "missing" in host else _host_table(host)]


def _host_table(host: dict[str, Any]) -> str:
    rows = [
        (row["name"], time(row["us"]), "1" if row["key"] == OURS else spread(row["ours_over"]))
        for row in host["rows"]
    ]
    return grid(("step", "µs", "ProxSGD ÷ it"), rows)


SCALING_NAMES = {
    OURS: "ProxSGD, native",
    "sgd_fused": "SGD(fused), no L1",
    "foreach_threshold": "SGD(foreach) + foreach soft-threshold",
}


def _sizes(sizes: dict[str, Any]) -> list[str]:
    rows = []
    for point in sizes["points"]:
        count = f"{point['elements']:,}"
        if "missing" in point:
            rows.append((count, point["missing"], *("-" for _ in range(len(SCALING_NAMES)))))
            continue
        rows.append(
            (count, *(time(point["us"][k]) for k in SCALING_NAMES), time(point["limit_us"]))
        )
    return [
        "## Cost against size: one tensor",
        grid(
            ("elements", *(f"{name}, µs" for name in SCALING_NAMES.values()), "20 bytes each, µs"),
            rows,
        ),
    ]


def _counts(counts: dict[str, Any]) -> list[str]:
    keys = [key for key in SCALING_NAMES if key in counts["points"][0]["us"]]
    rows = [
        (
            f"{point['tensors']:,}",
            *(time({q: v / 1e3 for q, v in point["us"][k].items()}) for k in keys),
            *(spread(point["over_one"][k]) for k in keys),
        )
        for point in counts["points"]
    ]
    head = (
        "tensors",
        *(f"{SCALING_NAMES[k]}, ms" for k in keys),
        *(f"{SCALING_NAMES[k]}, over one tensor" for k in keys),
    )
    return [f"## Cost against number: {counts['elements']:,} elements in all", grid(head, rows)]


def _training(training: dict[str, Any]) -> list[str]:
    title = (
        f"## A whole ResNet-50 training step: {training['pixels']} px, batch {training['batch']}"
    )
    if "missing" in training:
        return [title, f"Not run: {training['missing']}."]
    rows = [
        (row["name"], time(row["ms"]), spread({q: 100 * v for q, v in row["share"].items()}))
        for row in training["rows"]
    ]
    return [
        title,
        f"Forward and backward: {time(training['forward_and_backward_ms'])} ms.",
        grid(("step", "ms", "share of the whole, %"), rows),
    ]


def _cold_start(cold: dict[str, Any]) -> list[str]:
    if not cold:
        return []
    rows = [(what, time(q)) for what, q in cold["ms"].items()]
    return [f"## Cold start: {cold['processes']} new processes", grid(("what", "ms"), rows)]


def against(results: dict[str, Any]) -> str:
    """The comparison of two copies of the package, for a terminal."""
    installed, other = (results["copies"][name] for name in ("installed", "other"))
    step, host = results["times"]["step_ms"], results["times"]["host_us"]
    rows = [
        (f"{name}, time", time(step[key]), time(host[key]))
        for name, key in (
            ("installed", f"installed/{OURS}"),
            ("other", f"other/{OURS}"),
            ("SGD(fused) beside installed", "installed/sgd_fused"),
            ("SGD(fused) beside other", "other/sgd_fused"),
        )
    ]
    step, host = results["ratios"]["step"], results["ratios"]["host"]
    rows += [
        (name, spread(step[key], 3), spread(host[key], 3))
        for name, key in (
            ("installed over other", "installed/other"),
            ("installed over SGD(fused)", "installed/sgd_fused"),
            ("other over SGD(fused)", "other/sgd_fused"),
            ("control: SGD(fused), beside installed over beside other", "control"),
        )
    ]
    head = ("median (20 % to 80 %)", "step, ms", "host time on one-element tensors, µs")
    parts = (
        f"{results['model']}, {results['tensors']:,} tensors, {results['elements']:,} elements, "
        f"float32; momentum, coupled weight decay, L1. {results['pairs']} pairs of processes with "
        f"{results['rounds']} rounds each, {installed['threads']} threads.",
        f"installed: {installed['version']}, {installed['package']}\n"
        f"other: {other['version']}, {other['package']}\n"
        f"weights of the two after ten steps: "
        f"{'the same bits' if results['same_bits'] else 'DIFFERENT BITS'}",
        _aligned(grid(head, rows)),
    )
    return "\n\n".join(parts)
