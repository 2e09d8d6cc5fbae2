"""Runs that are killed, hung up on, interrupted while they write, or begun twice."""

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from test_recipe_runs import SHORT, Signal

from resnet_reg_ext import cli
from resnet_reg_ext.atomic_write import atomic_write
from resnet_reg_ext.recipe import compare
from resnet_reg_ext.recipe.callbacks import WholeFiles
from resnet_reg_ext.recipe.evaluate import evaluate
from resnet_reg_ext.recipe.files import RecipeError, Stopped, locked, write_text
from resnet_reg_ext.recipe.results import Result
from resnet_reg_ext.recipe.settings import save_options
from resnet_reg_ext.recipe.train import train

pytestmark = pytest.mark.usefixtures("one_thread", "narrow")

ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}
HOLD = """
import sys
from pathlib import Path
from resnet_reg_ext.recipe.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
# The command, killed when it is about to give a file its name for the nth time.
KILLED = """
import os, sys
sys.path.append(sys.argv.pop(1))
import narrow_resnet
from resnet_reg_ext import cli
narrow_resnet.install()
left, rename = int(sys.argv[1]), os.replace
def replace(*paths):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), 9)
    rename(*paths)
os.replace = replace
sys.exit(cli.main(sys.argv[2:]))
"""


def arguments(run):
    return [f"--{name.replace('_', '-')}={v}" for name, v in asdict(run).items() if v is not None]


def parts(folder):
    return list(folder.rglob("*.part"))


# Two runs at once


def test_a_second_run_on_one_folder_gets_one_sentence(tmp_path, capsys):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    for command in ("train", "compare", "path"):
        run = replace(SHORT, epochs=1, l1=0.1 if command == "compare" else 0.0, weight_decay=0.1)
        given = [a for a in arguments(run) if command != "path" or not a.startswith("--l1")]
        assert cli.main([command, *given, "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert f"--out {tmp_path} is in use by another run (process {holder.pid} on " in error
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    # However the other one ends, the folder is free then.
    holder.kill()
    holder.communicate()
    with locked(tmp_path), pytest.raises(RecipeError, match="in use"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_an_evaluation_holds_its_folder_too(tmp_path):
    train(replace(SHORT, epochs=1), tmp_path / "run", keep="weights")
    out = tmp_path / "evaluation"
    out.mkdir()
    with locked(out), pytest.raises(RecipeError, match="in use by another run"):
        evaluate(tmp_path / "run" / "last.ckpt", None, None, "refuse", out)
    with locked(tmp_path / "run"):
        # Another folder: reading a checkpoint takes no lock.
        evaluate(tmp_path / "run" / "last.ckpt", None, None, "refuse", out)


def test_two_writers_of_a_file_leave_one_of_both_whole(tmp_path):
    path = tmp_path / "last.ckpt"
    with atomic_write(path) as first:
        first.write_text("first")
        with atomic_write(path) as second:
            second.write_text("second, longer")
        assert path.read_text() == "second, longer"
        write_text(path, "third")
        assert first.read_text() == "first"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_removes_what_a_killed_one_left_half_written(tmp_path):
    (tmp_path / ".last.ckpt.part").write_text("of version 0.1.0")
    (tmp_path / ".run.yaml.0123abcd.part").write_text("x")
    (tmp_path / "mine.part").write_text("x")
    train(replace(SHORT, epochs=1), tmp_path, keep="weights")
    assert parts(tmp_path) == [tmp_path / "mine.part"]


# Signals


def test_a_second_hang_up_does_not_kill(tmp_path):
    """The kernel and the shell send one each."""

    class Twice(Signal):
        def on_train_batch_start(self, *arguments):
            super().on_train_batch_start(*arguments)
            super().on_train_batch_start(*arguments)

    with pytest.raises(Stopped, match="SIGHUP"):
        train(SHORT, tmp_path / "out", callbacks=[Twice(signal.SIGHUP, 1)])
    assert torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)["global_step"] == 1


def test_nohup_is_respected(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = train(SHORT, tmp_path, keep="weights", callbacks=[Signal(signal.SIGHUP, 1)])
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(result.history) == 2


def test_a_closed_terminal_leaves_a_checkpoint(tmp_path):
    """Writing to it fails from then on."""
    run = replace(SHORT, epochs=500, evaluate_every=500)
    master, slave = pty.openpty()
    # The bar is as wide as the terminal.
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = subprocess.Popen(
        # setsid and the first terminal opened make it the controlling one, as a login does.
        [
            *("setsid", "--ctty", sys.executable, "-m", "resnet_reg_ext.cli", "train"),
            *(*arguments(run), "--out", str(tmp_path / "out")),
        ],
        env=ALONE,
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    seen = b""
    while b"/500" not in seen:
        seen += os.read(master, 1000)
    os.close(master)
    assert process.wait() == 128 + signal.SIGHUP
    left = torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)
    assert 0 < left["global_step"] < 500
    assert not parts(tmp_path)


def test_ctrl_c_while_a_checkpoint_is_written_is_no_full_disk(tmp_path, request):
    # A shell starts a background job with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    path = tmp_path / "best.ckpt"
    WholeFiles().save_checkpoint({"x": torch.ones(3)}, path)
    content = path.read_bytes()

    child = os.fork()
    if child == 0:
        while not parts(tmp_path) or parts(tmp_path)[0].stat().st_size == 0:
            pass
        os.kill(os.getppid(), signal.SIGINT)
        os._exit(0)
    try:
        with pytest.raises(KeyboardInterrupt):
            WholeFiles().save_checkpoint({str(i): torch.ones(10**6) for i in range(200)}, path)
    finally:
        os.waitpid(child, 0)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


# Kills


@pytest.mark.parametrize("left", [[], [".lock"], [".compare.yaml.0123abcd.part", ".lock"]])
def test_a_folder_without_settings_can_be_begun_again(left, tmp_path, capsys):
    for name in left:
        (tmp_path / name).write_text("")
    run = replace(SHORT, epochs=1, weights="/no/where", l1=1e-3, weight_decay=1e-3)
    command = ["compare", *arguments(run), "--out", str(tmp_path)]
    assert cli.main(command) == 2
    assert "/no/where is not a file" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("")
    assert cli.main(command) == 2
    assert "isn't empty" in capsys.readouterr().err


def test_a_comparison_killed_at_any_write_ends_as_one_that_went_through(tmp_path, capsys):
    run = replace(SHORT, epochs=1, l1=1e-3, weight_decay=1e-3)
    compare.compare(run, 1, tmp_path / "whole")
    out = tmp_path / "killed"
    begin = ["compare", *arguments(run), "--out", str(out)]
    resume = ["compare", "--resume", str(out)]
    # compare.yaml; the first run's run.yaml, best.ckpt, last.ckpt, predictions.csv, mistakes.json,
    # result.json and last.ckpt cut down.
    for nth, command in ((1, begin), (5, begin), (6, resume)):
        if (out / "compare.yaml").exists() and command is begin:
            command = resume
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(nth), *command],
            env=ALONE,
            capture_output=True,
            text=True,
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert parts(out)
    assert cli.main(resume) == 0
    assert not parts(out)
    for name in ("none", "L2", "L1", "elastic-net"):
        whole, resumed = (
            torch.load(tmp_path / place / "seed0" / name / "last.ckpt", weights_only=True)
            for place in ("whole", "killed")
        )
        assert whole.keys() == resumed.keys()
        first, second = whole.pop("state_dict"), resumed.pop("state_dict")
        assert whole == resumed
        assert all(torch.equal(first[key], second[key]) for key in first)
        results = [
            Result.load(tmp_path / place / "seed0" / name).history for place in ("whole", "killed")
        ]
        assert results[0] == results[1]


def test_a_result_of_other_settings_is_not_taken_for_this_run_s(tmp_path):
    run = replace(SHORT, epochs=1, l1=1e-3, weight_decay=1e-3)
    folder = tmp_path / "seed0" / "none"
    train(replace(run, l1=0.0, weight_decay=0.0, lr=0.5), folder, keep="weights")
    save_options({**asdict(run), "seeds": 1}, tmp_path / "compare.yaml")
    with pytest.raises(RecipeError, match=r"holds the result of another run: --lr 0.5, not 0.02"):
        compare.compare(run, 1, Path(tmp_path), resume=True)
