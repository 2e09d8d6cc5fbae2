"""Measures everything: ``python -m bench.run [--quick] [--device cuda] [--out DIR]``.

Prints progress and the table, and writes DIR/cpu.json (or cuda.json), report.md and the plots.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from . import baselines, measure, models, report
from .baselines import BASELINES, COMPILED, OURS, Baseline, Checker, Problem
from .measure import Limit, Samples, Step
from .models import Layout, Missing

LIMIT = "limit"
# Seconds for compiling; a row that would go beyond them, as the one before tells, is left out.
COMPILE_BUDGET = 250.0
VALUE_SCALE, GRAD_SCALE = 0.02, 1e-3
MANY = 10_000_000

ALL = tuple(BASELINES)
EAGER = tuple(key for key in ALL if key not in COMPILED)
FAST = (OURS, "prox_no_l1", "pure", "sgd_foreach", "sgd_fused", "softshrink", "foreach_threshold")
FEW = (OURS, "prox_no_l1", "sgd_fused", "softshrink")


@dataclass(frozen=True)
class Table:
    """One round-robin: rows that step the same model."""

    key: str
    model: str = "resnet50"
    rows: tuple[str, ...] = ALL
    layout: Layout = field(default_factory=Layout)
    threads: int | None = None
    momentum: float = 0.9
    rounds: int = 31
    budget: float = 12.0


MAIN = Table("main", rounds=61, budget=80.0)
TABLES = (
    MAIN,
    Table("one_thread", rows=FAST, threads=1),
    Table("bfloat16", rows=FAST, layout=Layout(dtype=torch.bfloat16)),
    Table("channels_last", rows=FEW, layout=Layout(channels_last=True)),
    Table("no_momentum", rows=FEW, momentum=0.0),
    Table("resnet18", "resnet18", rows=EAGER),
    Table("vit_b_16", "vit_b_16", rows=EAGER, rounds=7, budget=25.0),
    Table("flat", models.FLAT, rows=EAGER),
)
QUICK_TABLES = (replace(MAIN, rounds=9, budget=40.0),)


@dataclass(frozen=True)
class Scale:
    """How long a form of the run takes."""

    tables: tuple[Table, ...]
    left_out: tuple[str, ...]
    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    rounds: int
    budget: float
    images: tuple[tuple[int, int, int], ...]
    """(pixels, batch, rounds) of a whole training step."""
    cold_starts: int


FULL = Scale(
    TABLES,
    (),
    (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000),
    (1, 10, 100, 1_000, 10_000),
    rounds=41,
    budget=15.0,
    images=((32, 32, 11), (224, 8, 5)),
    cold_starts=7,
)
QUICK = Scale(
    QUICK_TABLES,
    COMPILED,
    (1_000, 100_000, 10_000_000),
    (1, 100, 10_000),
    rounds=15,
    budget=6.0,
    images=(),
    cold_starts=0,
)


class Progress:
    """One line for each thing that begins, with the seconds since the start."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def __call__(self, what: str) -> None:
        print(f"[{self.seconds():5.0f} s] {what}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Runs torch on so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- tables of steps ----------------------------------------------------------------------------


class Inputs:
    """Values and gradients that all rows of a table start from."""

    def __init__(
        self, sizes: Sequence[models.Shape], layout: Layout, momentum: float = 0.9
    ) -> None:
        self.values = models.tensors(sizes, layout, VALUE_SCALE, seed=0)
        self.grads = models.tensors(sizes, layout, GRAD_SCALE, seed=1)
        self.elements = models.numel(sizes)
        self.momentum = momentum
        self.checker = Checker(self.values, self.grads)

    def problem(self, baseline: Baseline) -> Problem:
        """A row's own parameters; the gradients are shared, as steps only read them."""
        grads = [g.clone() for g in self.grads] if baseline.changes_grads else self.grads
        return Problem(models.parameters(self.values, grads), momentum=self.momentum)


def prepare(
    baseline: Baseline, inputs: Inputs, shared: Problem | None = None
) -> tuple[Step, dict[str, Any]]:
    """A row's step, made and checked; on the parameters of `shared`, if that is given, afterwards.

    Raises:
        Missing: the row's library isn't there, or its weights aren't what its method gives.
    """
    problem = inputs.problem(baseline)
    step = baseline.make(problem)
    if not baseline.checked_steps:
        step()
        return step, {"check": None}
    # A compiled step has run once when it is made.
    done = 1 if baseline.key in COMPILED else 0
    check = inputs.checker.check(baseline, problem, step, done)
    if not check.same:
        raise Missing(
            f"after {check.steps} steps its weights differ from the reference by "
            f"{check.deviation:.1e}, so it is not timed"
        )
    if shared is not None:
        step = baseline.make(shared)
    return step, {"check": check.as_dict()}


def run_table(table: Table, left_out: Sequence[str], progress: Progress) -> dict[str, Any]:
    """Checks, times and describes the rows of a table."""
    layout = table.layout
    result: dict[str, Any] = {
        "key": table.key,
        "model": models.TITLES[table.model],
        "device": layout.device,
        "dtype": str(layout.dtype).removeprefix("torch."),
        "format": "channels_last" if layout.channels_last else "contiguous",
        "momentum": table.momentum,
        "rows": [],
        "ratios": {},
    }
    progress(f"{table.key}: {result['model']}, {result['dtype']}, {result['format']}")
    sizes = models.shapes(table.model)
    with threads(table.threads):
        inputs = Inputs(sizes, layout, table.momentum)
        result |= {
            "threads": torch.get_num_threads(),
            "tensors": len(sizes),
            "elements": inputs.elements,
        }
        steps: dict[str, Step] = {}
        shared = inputs.problem(BASELINES[OURS])
        compiling = last = 0.0
        for key in table.rows:
            baseline = BASELINES[key]
            row: dict[str, Any] = {"key": key, "name": baseline.name, "method": baseline.method}
            result["rows"].append(row)
            if key in left_out:
                row["missing"] = "left out in the quick form"
                continue
            if key in COMPILED and compiling + last > COMPILE_BUDGET:
                row["missing"] = f"left out: compiling those before took {compiling:.0f} s"
                continue
            progress(f"  {baseline.name}")
            start = progress.seconds()
            try:
                of_ours = key == OURS or baseline.same_parameters
                steps[key], checked = prepare(baseline, inputs, shared if of_ours else None)
                row |= checked
            except Missing as missing:
                row["missing"] = str(missing)
            if key in COMPILED:
                last = progress.seconds() - start
                compiling += last
                row["compile_s"] = last
        for key in steps:
            if OURS in steps and (option := BASELINES[key].option):
                steps[key] = baselines.switched(steps[OURS], option)
        limit = Limit(inputs.elements, layout.device, torch.float32)
        progress(f"  {len(steps)} rows in turn")
        samples = measure.interleave(
            {**steps, LIMIT: limit},
            table.rounds,
            budget=table.budget,
            sync=measure.synchronise(layout.device),
        )
        _fill(result, samples, limit, layout, table.momentum)
        for row in result["rows"]:
            if row["key"] in steps:
                peaks = [measure.extra_memory(steps[row["key"]], layout.device) for _ in range(3)]
                known = [peak for peak in peaks if peak is not None]
                row["extra_mib"] = max(known) / 2**20 if known else None
    return result


def _fill(
    result: dict[str, Any], samples: Samples, limit: Limit, layout: Layout, momentum: float
) -> None:
    """Puts times and ratios into a table."""
    moved = measure.bytes_an_element(layout.dtype, momentum != 0)
    result["rounds"] = len(samples.seconds[LIMIT])
    result["limit"] = {
        "operation": limit.name,
        "bytes_an_element": moved,
        "gb_per_s": measure.quantiles(
            [limit.bytes_an_element * result["elements"] / s / 1e9 for s in samples.seconds[LIMIT]]
        ),
        "ms": measure.quantiles(
            [1e3 * s * moved / limit.bytes_an_element for s in samples.seconds[LIMIT]]
        ),
    }
    for row in result["rows"]:
        if row["key"] in samples:
            row["ms"] = samples.time(row["key"])
            row["ours_over"] = samples.ratio(OURS, row["key"])
    ratios = result["ratios"]
    ratios["prox/limit"] = samples.ratio(OURS, LIMIT, limit.bytes_an_element / moved)
    for key, over in (
        ("pure", "foreach_threshold"),
        ("prox_bfloat16_momentum", OURS),
        ("prox_track_sparsity", OURS),
    ):
        if key in samples and over in samples:
            ratios[f"{key}/{over}"] = samples.ratio(key, over)


# ---- sizes, counts, host time -------------------------------------------------------------------


def _steps(keys: Sequence[str], inputs: Inputs) -> dict[str, Step]:
    return {key: prepare(BASELINES[key], inputs)[0] for key in keys}


def run_sizes(scale: Scale, device: str, progress: Progress) -> dict[str, Any]:
    """Cost against the size of one tensor."""
    keys = (OURS, "sgd_fused", "foreach_threshold")
    points = []
    for elements in scale.sizes:
        # Values, gradients, three rows' weights and momentum, the limit's three, temporaries.
        need = 4 * elements * (2 + 2 * len(keys) + 3 + 2)
        if need > 0.6 * _free_memory(device):
            points.append({"elements": elements, "missing": f"needs {need / 2**30:.1f} GiB"})
            continue
        progress(f"one tensor of {elements:,} elements")
        inputs = Inputs([(elements,)], Layout(device))
        limit = Limit(elements, device, torch.float32)
        samples = measure.interleave(
            {**_steps(keys, inputs), LIMIT: limit},
            scale.rounds,
            budget=scale.budget,
            sync=measure.synchronise(device),
        )
        moved = measure.bytes_an_element(torch.float32, momentum=True)
        points.append(
            {
                "elements": elements,
                "us": {key: samples.time(key, 1e-6) for key in keys},
                "limit_us": measure.quantiles(
                    [1e6 * s * moved / limit.bytes_an_element for s in samples.seconds[LIMIT]]
                ),
            }
        )
    return {"threads": torch.get_num_threads(), "points": points}


def run_counts(scale: Scale, device: str, progress: Progress) -> dict[str, Any]:
    """Cost against the number of tensors that the same elements are in."""
    keys = (OURS, "sgd_fused")
    steps: dict[str, Step] = {}
    for count in scale.counts:
        progress(f"{MANY:,} elements in {count:,} tensors")
        inputs = Inputs(models.split(MANY, count), Layout(device))
        steps |= {f"{k}/{count}": s for k, s in _steps(keys, inputs).items()}
    samples = measure.interleave(
        steps, scale.rounds, budget=2 * scale.budget, sync=measure.synchronise(device)
    )
    return {
        "threads": torch.get_num_threads(),
        "elements": MANY,
        "points": [
            {
                "tensors": count,
                "us": {key: samples.time(f"{key}/{count}", 1e-6) for key in keys},
                "over_one": {key: samples.ratio(f"{key}/{count}", f"{key}/1") for key in keys},
            }
            for count in scale.counts
        ],
    }


def run_host(scale: Scale, device: str, progress: Progress) -> dict[str, Any]:
    """Time on the host alone: 161 tensors of one element, as many as ResNet-50 has.

    On a GPU what is timed is the queueing of the work, not the work.
    """
    progress("host time on one-element tensors")
    keys = (OURS, "pure", "sgd_foreach", "sgd_fused", "foreach_threshold")
    inputs = Inputs([(1,)] * 161, Layout(device))
    # Short, so many rounds cost little.
    samples = measure.interleave(_steps(keys, inputs), 10 * scale.rounds, budget=scale.budget)
    if device == "cuda":
        torch.cuda.synchronize()
    return {
        "threads": torch.get_num_threads(),
        "tensors": 161,
        **_host_rows(samples, keys),
    }


def _host_rows(samples: Samples, keys: Sequence[str]) -> dict[str, Any]:
    """Microseconds of each row, and how ours compares."""
    return {
        "rounds": len(samples.seconds[OURS]),
        "rows": [
            {
                "key": key,
                "name": BASELINES[key].name,
                "us": samples.time(key, 1e-6),
                "ours_over": samples.ratio(OURS, key),
            }
            for key in keys
        ],
    }


def run_dtensors(scale: Scale, progress: Progress) -> dict[str, Any]:
    """Host time on 161 DTensors of one element, as FSDP2 has parameters, in one gloo process."""
    progress("host time on DTensors")
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "tensors": 161}
    try:
        with _mesh() as mesh:
            samples = measure.interleave(
                {"sgd_foreach": _dtensor_step(mesh, ours=False), OURS: _dtensor_step(mesh)},
                scale.rounds,
                budget=scale.budget,
            )
    except Missing as missing:
        return {**result, "missing": str(missing)}
    return {
        **result,
        **_host_rows(samples, (OURS, "sgd_foreach")),
    }


@contextlib.contextmanager
def _mesh() -> Iterator[Any]:
    """A mesh of this process alone."""
    try:
        from torch import distributed
        from torch.distributed.device_mesh import init_device_mesh

        folder = tempfile.mkdtemp()
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
    except (ImportError, AttributeError, RuntimeError) as error:
        raise Missing(f"torch.distributed with gloo: {baselines.first_line(error)}") from None
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()
        shutil.rmtree(folder, ignore_errors=True)


def _dtensor_step(mesh: Any, ours: bool = True) -> Step:
    """A step on 161 sharded parameters of one element."""
    from torch.distributed.tensor import Shard, distribute_tensor

    params = []
    for _ in range(161):
        parameter = torch.nn.Parameter(distribute_tensor(torch.full((1,), 0.02), mesh, [Shard(0)]))
        parameter.grad = distribute_tensor(torch.full((1,), 1e-3), mesh, [Shard(0)])
        params.append(parameter)
    problem = Problem(params)
    try:
        step = BASELINES[OURS if ours else "sgd_foreach"].make(problem)
        step()
    except Exception as error:
        raise Missing(
            f"{'ProxSGD' if ours else 'SGD(foreach)'} takes no DTensors here: "
            f"{baselines.first_line(error)}"
        ) from error
    return step


def _free_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(dict(line.split(":", 1) for line in lines)["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 8 * 2**30


# ---- a whole training step, cold start ----------------------------------------------------------


def run_training(scale: Scale, device: str, progress: Progress) -> list[dict[str, Any]]:
    """The optimizer's share of a whole ResNet-50 training step."""
    return [_training(*image, device, progress) for image in scale.images]


def _training(
    pixels: int, batch: int, rounds: int, device: str, progress: Progress
) -> dict[str, Any]:
    progress(f"a whole training step at {pixels} px, batch {batch}")
    result: dict[str, Any] = {"pixels": pixels, "batch": batch, "threads": torch.get_num_threads()}
    try:
        import torchvision
    except ImportError as error:
        return {**result, "missing": f"torchvision: {error}"}
    torch.manual_seed(0)
    model = torchvision.models.resnet50().to(device)
    images = torch.randn(batch, 3, pixels, pixels, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)
    sync = measure.synchronise(device) or (lambda: None)

    def forward_and_backward() -> None:
        model.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]

    forward_and_backward()
    # All optimizers step the same model in turn; so small a learning rate keeps it sound.
    problem = Problem(list(model.parameters()), lr=1e-6)
    keys = (OURS, "sgd_fused", "softshrink", "foreach_threshold")
    steps = {key: BASELINES[key].make(problem) for key in keys}
    for step in steps.values():
        step()
    samples = Samples(["forward_and_backward", *keys])
    for _ in range(rounds):
        for key, work in (("forward_and_backward", forward_and_backward), *steps.items()):
            sync()
            start = time.perf_counter()
            work()
            sync()
            samples.seconds[key].append(time.perf_counter() - start)
    passes = samples.seconds["forward_and_backward"]
    result["forward_and_backward_ms"] = samples.time("forward_and_backward")
    result["rows"] = [
        {
            "key": key,
            "name": BASELINES[key].name,
            "ms": samples.time(key),
            "share": measure.quantiles(
                [s / (s + rest) for s, rest in zip(samples.seconds[key], passes, strict=True)]
            ),
        }
        for key in keys
    ]
    return result


COLD_START = """
import json, time
def timed(work):
    start = time.perf_counter(); result = work(); return time.perf_counter() - start, result
times = {}
times["import torch"], torch = timed(lambda: __import__("torch"))
times["import resnet_reg_ext"], package = timed(lambda: __import__("resnet_reg_ext"))
def parameters():
    made = [torch.nn.Parameter(torch.zeros(1000)) for _ in range(161)]
    for p in made: p.grad = torch.ones_like(p)
    return made
torch.optim.SGD(parameters(), lr=0.1).step()
ours = package.ProxSGD(parameters(), fused=True)
fused = torch.optim.SGD(parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)
times["first step, ProxSGD"], _ = timed(ours.step)
times["first step, SGD(fused)"], _ = timed(fused.step)
print(json.dumps(times))
"""


def run_cold_start(scale: Scale, progress: Progress) -> dict[str, Any]:
    """Importing the package, after torch, and the first step: each in a new process."""
    if not scale.cold_starts:
        return {}
    progress("cold start")
    runs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as elsewhere:
        # From another folder, so that the source tree isn't what is imported.
        for _ in range(scale.cold_starts + 1):
            out = subprocess.run(
                [sys.executable, "-c", COLD_START],
                cwd=elsewhere,
                check=True,
                capture_output=True,
                text=True,
            )
            runs.append(json.loads(out.stdout.strip().splitlines()[-1]))
    # The first run reads files from the disk.
    return {
        "processes": scale.cold_starts,
        "ms": {key: measure.quantiles([1e3 * r[key] for r in runs[1:]]) for key in runs[0]},
    }


# ---- the bars -----------------------------------------------------------------------------------


def bars(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What must be shown, from the results: text, bar and the measured quantiles."""
    table = next(t for t in results["tables"] if t["key"] == MAIN.key)
    rows = {row["key"]: row for row in table["rows"]}

    def over(key: str) -> Callable[[], Any]:
        return lambda: rows[key]["ours_over"]

    def host(part: str, over: str) -> Callable[[], Any]:
        return lambda: next(r for r in results[part]["rows"] if r["key"] == over)["ours_over"]

    def ratio(name: str) -> Callable[[], Any]:
        return lambda: table["ratios"][name]

    def many() -> Any:
        return results["counts"]["points"][-1]["over_one"][OURS]

    def memory() -> Any:
        extra = rows[OURS]["extra_mib"]
        return {"q20": extra, "q50": extra, "q80": extra}

    step = "ProxSGD with L1 over "
    wanted: list[tuple[str, float, str, Callable[[], Any]]] = [
        (step + "SGD(fused) without L1", 0.90, "ratio", over("sgd_fused")),
        (
            step + "torch.compile(SGD + soft-threshold), tensor lr",
            0.60,
            "ratio",
            over("compile_tensor"),
        ),
        (step + "SGD(fused) + softshrink loop", 0.45, "ratio", over("softshrink")),
        (step + "torchao PAT, lasso", 0.12, "ratio", over("pat")),
        (
            "ProxSGD with L1 over addcmul_ moving as many bytes (20 an element)",
            1.10,
            "ratio",
            ratio("prox/limit"),
        ),
        (
            "pure-PyTorch fallback over SGD(foreach) + foreach soft-threshold",
            0.60,
            "ratio",
            ratio("pure/foreach_threshold"),
        ),
        ("10,000 tensors over one tensor, 10 M elements both", 2.5, "ratio", many),
        (
            "host time on 161 one-element tensors over SGD(fused)'s",
            0.45,
            "ratio",
            host("host", "sgd_fused"),
        ),
        (
            "host time on 161 one-element DTensors, one process, over SGD(foreach)'s",
            0.5,
            "ratio",
            host("dtensors", "sgd_foreach"),
        ),
        ("the L1 itself: l1 > 0 over l1 = 0", 1.03, "ratio", over("prox_no_l1")),
        (
            "momentum in bfloat16 over momentum in float32",
            0.85,
            "ratio",
            ratio("prox_bfloat16_momentum/prox"),
        ),
        ("zeros counted over not counted", 1.03, "ratio", ratio("prox_track_sparsity/prox")),
        ("peak extra memory of a step", 1.0, "MiB", memory),
    ]
    made = []
    for text, bar, unit, find in wanted:
        entry: dict[str, Any] = {"what": text, "bar": bar, "unit": unit}
        try:
            measured = find()
            entry |= {key: measured[key] for key in ("q20", "q50", "q80")}
            entry["met"] = measured["q50"] <= bar
        except (KeyError, TypeError):
            entry["missing"] = True
        made.append(entry)
    return made


def run(
    scale: Scale, device: str, quick: bool, progress: Progress, table_only: bool = False
) -> dict[str, Any]:
    """Everything, or the first table alone, as one dict that JSON takes."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    results: dict[str, Any] = {
        "quick": quick,
        "device": device,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": measure.machine(device),
        "simd": baselines.prox._native._C.simd_level(),
    }

    def tables(chosen: Sequence[Table]) -> list[dict[str, Any]]:
        return [
            run_table(replace(t, layout=replace(t.layout, device=device)), scale.left_out, progress)
            for t in chosen
            if device == "cpu" or t.threads is None
        ]

    if table_only:
        results["tables"] = tables(scale.tables[:1])
    else:
        # First what is sensitive to a heap in pieces.
        results["host"] = run_host(scale, device, progress)
        results["tables"] = tables(scale.tables)
        results["sizes"] = run_sizes(scale, device, progress)
        results["counts"] = run_counts(scale, device, progress)
        results["dtensors"] = run_dtensors(scale, progress)
        results["training"] = run_training(scale, device, progress)
        results["cold_start"] = run_cold_start(scale, progress)
    results["bars"] = bars(results)
    progress("done")
    results["seconds"] = round(progress.seconds())
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two minutes instead of twelve")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="where to write")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    scale = QUICK if options.quick else FULL
    results = rounded(run(scale, options.device, options.quick, Progress()))
    print(report.markdown(results))
    save(results, options.out)
    return 0


def save(results: dict[str, Any], folder: Path) -> None:
    """Writes JSON, page and plots."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{results['device']}.json"
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    for written in (path, *report.write(path)):
        print(f"written: {written}", file=sys.stderr)


def rounded(value: Any) -> Any:
    """Numbers to five digits, so that the file can be read."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return value


if __name__ == "__main__":
    sys.exit(main())
