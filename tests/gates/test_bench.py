"""The benchmarks, in the form in which the wheel brings them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from resnet_reg_ext.bench import baselines, measure, models, run
from resnet_reg_ext.bench.baselines import BASELINES, Checker

from resnet_reg_ext import cli

SCRIPT = Path(sysconfig.get_path("scripts")) / "resnet-reg"


def test_the_check_notices_a_wrong_step() -> None:
    """A row that forgets the L1, or shrinks by lr·l1, is not the method and is not timed."""
    made = run.Inputs([(5000,), (64, 3, 3, 3)], models.Layout())
    for key, wrong in (("sgd_fused", 1.0), ("softshrink", 0.1)):
        right = made.problem(BASELINES[key])
        problem = baselines.Problem(right.params, l1=right.l1 * wrong)
        step = BASELINES[key].make(problem)
        check = Checker(made.values, made.grads).check(BASELINES["softshrink"], right, step, 0)
        assert not check.same
    # And the right ones are let through, with zeros to tell them apart from plain SGD.
    for key in (
        "prox",
        "prox_bfloat16_momentum",
        "prox_track_sparsity",
        "pure",
        "softshrink",
        "foreach_threshold",
    ):
        _, checked = run.prepare(BASELINES[key], made)
        assert checked["check"]["same"]
        assert 0.1 < checked["check"]["zeros"] < 0.9


def test_each_round_runs_every_step_once_and_none_always_after_the_same() -> None:
    """What a step leaves in the caches would else favour or burden always the same next one."""
    calls: list[str] = []
    keys = ("a", "b", "c", "d")
    rounds = 32
    measure.interleave(
        {key: partial(calls.append, key) for key in keys}, rounds, warm_ups=0, least=0.0
    )
    timed = calls[len(keys) :]  # the first call of each says how often to repeat it
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
        wanted = [tuple(p.shape) for p in getattr(torchvision.models, model)().parameters()]
    assert models.shapes(model) == wanted


def test_the_installed_command_prints_the_table_and_writes_what_it_measured(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    form = ["--device=cpu", "--model=resnet18", "--rounds=1", "--table-only"]
    result = subprocess.run(
        [SCRIPT, "bench", *form, f"--out={out}"],
        cwd=tmp_path,  # far from the source tree
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "ResNet-18, 62 tensors, 11,689,512 elements, float32" in result.stdout
    measured = json.loads((out / "cpu.json").read_text())
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
    for bar in measured["bars"]:
        assert any(line.startswith(bar["what"] + "  ") for line in lines), bar["what"]
    assert (out / "cpu.md").read_text().startswith("# What a step costs")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds=0"], "must be 1 or more"),
        (["--model=resnet51"], "resnet50"),
        pytest.param(
            ["--device=cuda"],
            "torch finds no GPU",
            marks=[] if not torch.cuda.is_available() else pytest.mark.skip("there is a GPU"),
        ),
    ],
    ids=["rounds", "model", "no-gpu"],
)
def test_wrong_arguments(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: resnet-reg bench")
    assert said in error


def test_a_package_without_its_native_module_says_what_is_missing(tmp_path: Path) -> None:
    blocked = (
        "import sys; sys.modules['resnet_reg_ext._C'] = None\n"
        "from resnet_reg_ext import cli\n"
        "sys.exit(cli.main(['bench']))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", blocked], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("resnet-reg bench: what is measured is the native step, but")
    assert "native module" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_installed_copy_has_no_commit() -> None:
    """Though it may lie in a repository, as the tests' environment does in this one."""
    assert measure.machine("cpu")["commit"] is None
