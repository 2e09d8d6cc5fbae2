"""The benchmarks: checks, order, command, and the copy of the package that is measured."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import resnet_reg_ext
from bench import ROOT, against, coupled, measure, models, steps, tables
from bench.__main__ import main
from bench.baselines import BASELINES
from bench.checks import Checker
from bench.progress import Progress
from bench.steps import Problem

PACKAGE = Path(resnet_reg_ext.__file__).resolve().parent


def test_the_check_notices_a_wrong_step() -> None:
    """A row that forgets the L1, or shrinks by lr·l1, is another method and is not timed."""
    inputs = tables.Inputs([(5000,), (64, 3, 3, 3)], models.Layout())
    for key, factor in (("sgd_fused", 1.0), ("softshrink", 0.1)):
        right = inputs.problem(BASELINES[key])
        wrong = Problem(right.params, l1=right.l1 * factor)
        step = BASELINES[key].make(wrong)
        check = Checker(inputs.values, inputs.grads).check(BASELINES["softshrink"], right, step, 0)
        assert not check.same
    # The right steps pass, with zeros that plain SGD would not have.
    for key in (
        "prox",
        "prox_bfloat16_momentum",
        "prox_track_sparsity",
        "prox_start",
        "pure",
        "softshrink",
        "foreach_threshold",
    ):
        _, checked = tables.prepare(BASELINES[key], inputs)
        assert checked["check"]["same"]
        # Towards the start weights become what they were, which isn't 0.
        assert 0.1 < checked["check"]["zeros"] < 0.9 or key == "prox_start"
    assert tables.prepare(BASELINES["start_loss"], inputs)[1]["check"]["same"]


def test_each_round_runs_every_step_once_and_no_step_always_after_the_same() -> None:
    """A fixed predecessor would always leave a step the same caches."""
    calls: list[str] = []
    keys = ("a", "b", "c", "d")
    rounds = 32
    measure.interleave(
        {key: partial(calls.append, key) for key in keys}, rounds, warm_ups=0, least=0.0
    )
    timed = calls[len(keys) :]  # the first call of each step sets how often it is repeated
    assert len(timed) == rounds * len(keys)
    before: dict[str, set[str]] = {key: set() for key in keys}
    for start in range(0, len(timed), len(keys)):
        order = timed[start : start + len(keys)]
        assert sorted(order) == sorted(keys)
        for first, second in pairwise(order):
            before[second].add(first)
    assert before == {key: set(keys) - {key} for key in keys}


@pytest.mark.parametrize("model", ["resnet50", "resnet18", "vit_b_16"])
def test_shapes_are_torchvisions(model: str) -> None:
    import torchvision

    with torch.device("meta"):
        expected = [tuple(p.shape) for p in getattr(torchvision.models, model)().parameters()]
    assert models.shapes(model) == expected


def test_coupled_sets_are_those_of_torchvisions_model() -> None:
    import torchvision

    model = torchvision.models.resnet50()
    expected: dict[frozenset[str], int] = {}
    for one in resnet_reg_ext.channels(model, torch.rand(1, 3, 64, 64)):
        expected[frozenset(producer.tensor for producer in one.producers)] = one.size
    found: dict[int, set[str]] = {}
    for (name, _), number in zip(model.named_parameters(), models.coupled("resnet50"), strict=True):
        if number is not None:
            found.setdefault(number, set()).add(name)
    assert {frozenset(names) for names in found.values()} == set(expected)
    with pytest.raises(ValueError, match="model is 'resnet18'"):
        models.coupled("resnet18")


def test_coupled_rows_are_checked_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network of two sets; a step with another threshold isn't timed."""
    shapes: list[models.Shape] = [(6, 3, 3, 3), (6,), (8, 6, 1, 1), (8,), (8, 3, 1, 1), (4, 8)]
    monkeypatch.setattr(models, "shapes", lambda _: shapes)
    monkeypatch.setattr(models, "coupled", lambda _: [0, 0, 1, 1, 1, None])
    table = coupled.run(Progress(), 1, 1.0, compiles=False)
    rows = {row["key"]: row for row in table["rows"]}
    for key in ("prox", "groups_loop"):
        assert rows[key]["check"]["same"]
        assert 0.05 < rows[key]["check"]["zeros"] < 0.95
    assert "ms" in rows["prox_elementwise"]
    assert "missing" in rows["compile_rows"]
    assert table["ratios"]["prox/limit"]["q50"] > 0
    monkeypatch.setattr(steps.CoupledProblem, "weight", lambda self, _: 1.0, raising=True)
    native = coupled.run(Progress(), 1, 1.0, compiles=False)["rows"][0]
    assert "differ from the reference" in native["missing"]


# ---- the command, and what it measures ----------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone whose source tree fails to import, unpacked inside another project's repository."""
    outer = tmp_path_factory.mktemp("repository")
    if shutil.which("git"):
        author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "init", "-q", outer], check=True)
        commit = ["commit", "-q", "--allow-empty", "-m", "x"]
        subprocess.run(["git", "-C", outer, *author, *commit], check=True)
    root = outer / "clone"
    shutil.copytree(ROOT / "bench", root / "bench", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "resnet_reg_ext").mkdir()
    (root / "resnet_reg_ext" / "__init__.py").write_text("raise SystemExit('the source tree')\n")
    return root


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive", **environment},
        check=False,
    )


def test_the_command_measures_the_installed_package(clone: Path, tmp_path: Path) -> None:
    """It prints the table and writes the same figures."""
    form = ["--quick", "--table-only", "--model=resnet18", "--rounds=1"]
    result = run(["-m", "bench", *form, f"--out={tmp_path}"], clone)
    assert result.returncode == 0, result.stderr
    assert "ResNet-18, 62 tensors, 11,689,512 elements, float32" in result.stdout
    measured = json.loads((tmp_path / "cpu.json").read_text())
    assert measured["machine"]["commit"] is None  # the outer repository's would be another's
    (table,) = measured["tables"]
    assert [row["key"] for row in table["rows"]] == list(BASELINES)
    lines = result.stdout.splitlines()
    for row in table["rows"]:
        (line,) = (line for line in lines if re.match(re.escape(row["name"]) + "  ", line))
        if "missing" in row:
            assert line.endswith(row["missing"])
        else:
            assert f"{row['ms']['q50']:.1f} (" in line or f"{row['ms']['q50']:.2f} (" in line
    timed = {row["key"] for row in table["rows"] if "ms" in row}
    assert timed >= {"prox", "prox_no_l1", "pure", "sgd_loop", "sgd_foreach", "sgd_fused"}
    for target in measured["targets"]:
        assert any(line.startswith(target["what"] + "  ") for line in lines), target["what"]
    assert (tmp_path / "cpu.md").read_text().startswith("# What a step costs")


@pytest.mark.parametrize("path", ["", ".", "{clone}", "{clone}/../clone/"])
def test_the_source_tree_is_never_imported(clone: Path, path: str) -> None:
    paths = [path.format(clone=clone), os.environ.get("PYTHONPATH", "")]
    code = (
        "import bench\nfrom importlib.util import find_spec\n"
        "print(find_spec('resnet_reg_ext').origin)"
    )
    result = run(["-c", code], clone, PYTHONPATH=os.pathsep.join(filter(None, paths)))
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).resolve().parent == PACKAGE


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds=0"], "must be 1 or more"),
        (["--model=resnet51"], "resnet50"),
        (["--table-only", "--against=somewhere"], "not allowed with"),
        (["report", "--check"], "needs --readme"),
        pytest.param(
            ["--device=cuda"],
            "torch finds no GPU",
            marks=[] if not torch.cuda.is_available() else pytest.mark.skip("there is a GPU"),
        ),
    ],
    ids=["rounds", "model", "two-parts", "check-of-nothing", "no-gpu"],
)
def test_wrong_arguments(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: python -m bench")
    assert said in error


@pytest.mark.parametrize("missing", ["resnet_reg_ext", "resnet_reg_ext._C"])
def test_a_missing_package_or_native_module_is_one_sentence(clone: Path, missing: str) -> None:
    blocked = (
        f"import sys; sys.modules['{missing}'] = None\n"
        "from bench.__main__ import main\n"
        "sys.exit(main([]))\n"
    )
    result = run(["-c", blocked], clone)
    assert result.returncode == 2
    assert result.stderr.startswith("python -m bench: it measures the installed native step, which")
    assert missing in result.stderr
    assert len(result.stderr.splitlines()) == 1


# ---- another build beside the installed one -----------------------------------------------------

SIZES = [(64, 3, 3, 3), (100,)]
ADDITION = """
import torch as _torch
class ProxSGD(ProxSGD):
    def step(self, *arguments):
        super().step(*arguments)
        with _torch.no_grad():
            for p in self.param_groups[0]["params"]:
                {addition}
"""


def another_build(folder: Path, addition: str = "") -> Path:
    """A copy of the installed package, whose step also runs ``addition`` on each parameter."""
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    if addition:
        with (folder / PACKAGE.name / "__init__.py").open("a") as file:
            file.write(ADDITION.format(addition=addition))
    return folder


def compare(site: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """``python -m bench --against`` on small tensors, with one pair of processes."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setattr(models, "shapes", lambda model: SIZES)
    monkeypatch.setattr(against, "QUICK", against.Effort(pairs=1, rounds=9))
    return main(["--quick", f"--against={site}", "--rounds=5", f"--out={out}"])


def test_a_slower_build_is_seen_to_be_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A microsecond's step becomes one of milliseconds, which no noise hides.
    site = another_build(tmp_path / "site", "sum(range(100_000))")
    assert compare(site, tmp_path, monkeypatch) == 0
    results = json.loads((tmp_path / "against.json").read_text())
    assert results["copies"]["installed"]["package"] == str(PACKAGE)
    assert results["copies"]["other"]["package"] == str((site / PACKAGE.name).resolve())
    assert results["same_bits"] is True
    assert (results["tensors"], results["elements"], results["rounds"]) == (2, 1828, 5)
    for part in ("step", "host"):
        ratios = results["ratios"][part]
        assert ratios["installed/other"]["q80"] < 0.5
        assert ratios["other/sgd_fused"]["q50"] > ratios["installed/sgd_fused"]["q50"]
    printed = capsys.readouterr().out
    assert "the same bits" in printed
    assert f"{results['ratios']['host']['installed/other']['q50']:.3f} (" in printed


def test_other_bits_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within the tolerance of the check, but not the installed package's."""
    site = another_build(tmp_path / "site", "p.mul_(1 + 2**-23)")
    assert compare(site, tmp_path, monkeypatch) == 0
    assert json.loads((tmp_path / "against.json").read_text())["same_bits"] is False
    assert "DIFFERENT BITS" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["no package", "no native module", "wrong weights"])
def test_a_build_that_cannot_be_compared_is_refused(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site"
    if fault == "no package":
        site.mkdir()
        said = "there is no resnet_reg_ext in it"
    elif fault == "no native module":
        another_build(site)
        (core,) = (site / PACKAGE.name).glob("_C.*")
        core.unlink()
        said = "native module"
    else:
        another_build(site, "p.add_(1e-3)")
        said = "after 10 steps its weights differ from the reference"
    assert compare(site, tmp_path, monkeypatch) == 2
    (error,) = (line for line in capfd.readouterr().err.splitlines() if "python -m bench:" in line)
    assert str(site) in error
    assert said in error
    assert not (tmp_path / "against.json").exists()
