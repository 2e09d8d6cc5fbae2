"""What the commands are given: paths, leftovers in the environment, terminals, wrong options."""

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from test_recipe_data import make_images
from test_recipe_input import measure, save
from test_recipe_runs import SHORT

from resnet_reg_ext import cli
from resnet_reg_ext.recipe import plots, processes
from resnet_reg_ext.recipe.data import load_images
from resnet_reg_ext.recipe.evaluate import evaluate
from resnet_reg_ext.recipe.files import RecipeError
from resnet_reg_ext.recipe.loaders import ImageData
from resnet_reg_ext.recipe.model import Classifier
from resnet_reg_ext.recipe.results import Result
from resnet_reg_ext.recipe.settings import Run
from resnet_reg_ext.recipe.train import be_quiet, train

pytestmark = pytest.mark.usefixtures("one_thread", "narrow")


def refused(arguments, capsys):
    assert cli.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


# Paths


def test_a_run_is_recorded_with_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "hard", ["a", "b"], count=4)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("hard", "~/hard"):
        (tmp_path / "x.yaml").write_text(yaml.safe_dump({"data": given, "val_fraction": 0.5}))
        out = f"~/out-{given[0]}"
        options = ["--batch-size", "4", "--image-size", "8", "--epochs", "1"]
        assert cli.main(["train", "--config", "~/x.yaml", "--out", out, *options]) == 0
        folder = tmp_path / f"out-{given[0]}"
        assert yaml.safe_load((folder / "run.yaml").read_text())["data"] == str(tmp_path / "hard")
        assert Result.load(folder).run.data == str(tmp_path / "hard")
        content = torch.load(folder / "best.ckpt", weights_only=True)
        assert content["run"]["data"] == str(tmp_path / "hard")


@pytest.mark.parametrize("layout", ["split", "one folder"])
def test_evaluate_measures_the_run_s_images_from_another_project(layout, tmp_path, monkeypatch):
    """The checkpoint is of version 0.1.0, which kept the path as it was typed."""
    for project, count in (("A", 4), ("B", 6)):
        roots = [tmp_path / project / "data"]
        if layout == "split":
            roots = [roots[0] / split for split in ("train", "val")]
        for root in roots:
            make_images(root, ["a", "b"], count=count)
    monkeypatch.chdir(tmp_path / "A")
    fraction = None if layout == "split" else 0.5
    run = Run(data="data", image_size=8, batch_size=4, val_fraction=fraction)
    path = save(tmp_path / "x.ckpt", run)
    images = 8 if layout == "split" else 4
    for place in ("A", "B", "."):
        monkeypatch.chdir(tmp_path / place)
        _, text = measure(path, tmp_path / "e")
        assert f"on {images} images of {tmp_path / 'A' / 'data'} (" in text
    (tmp_path / "A" / "data").rename(tmp_path / "gone")
    monkeypatch.chdir(tmp_path / "B")
    with pytest.raises(RecipeError, match=r"were in .*/A/data, which is not there: give --data"):
        evaluate(path, None, None, "refuse", tmp_path / "e2")


@pytest.mark.parametrize("out", ["a::b", "lr::0.1", "s3://bucket/a", "file:///tmp/x", "a\0b"])
def test_output_goes_to_a_folder_of_this_machine(out, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ("train", "compare", "path"):
        assert "--out" in refused([command, "--train-size", "20", "--out", out], capsys)
    assert not list(tmp_path.iterdir())


def test_output_may_be_called_like_a_protocol(tmp_path, monkeypatch):
    """Relative to the current folder Lightning would read the checkpoint from the network."""
    monkeypatch.chdir(tmp_path)
    train(replace(SHORT, epochs=1), Path("http:x"), keep="weights")
    assert (tmp_path / "http:x" / "result.json").is_file()


# Leftovers of launchers


@pytest.mark.parametrize(
    "left",
    [
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"LOCAL_RANK": "1", "NODE_RANK": "1"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_JOB_NAME": "x"},
        {"RANK": "x", "LOCAL_RANK": ""},
        {
            **{"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            **{"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_USE_AGENT_STORE": "True"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
        },
    ],
)
def test_leftovers_of_a_launcher_make_no_other_process_of_this(left, monkeypatch):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert processes.is_rank_zero()
    assert processes.count_processes(Run()) == 1
    options, environment = processes.trainer_processes(Run())
    trainer = pl.Trainer(**options, plugins=[environment], accelerator="cpu", logger=False)
    assert trainer.is_global_zero
    assert trainer.world_size == 1
    numbers = [name for name, value in left.items() if value.isdigit() and "NODE" not in name]
    assert ("ignored" in processes.ignored_ranks()) == bool(numbers)


def test_a_run_with_a_leftover_rank_writes_its_result(tmp_path, capsys):
    """In a process of its own: Lightning reads RANK when it is imported."""
    command = [sys.executable, "-m", "resnet_reg_ext.cli", "train", "--out", str(tmp_path / "out")]
    command += ["--train-size", "10", "--test-size", "10", "--batch-size", "10", "--epochs", "1"]
    done = subprocess.run(
        [*command, "--image-size", "8"],
        env={**os.environ, "RANK": "1", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "RANK=1, WORLD_SIZE=2 in the environment ignored" in done.stdout
    assert len(Result.load(tmp_path / "out").history) == 1
    assert list((tmp_path / "out").glob("csv/*/metrics.csv"))


def test_a_child_of_a_first_process_is_no_other_process(monkeypatch):
    """A program that a run starts inherits its variables."""
    monkeypatch.setenv("RESNET_REG_STARTED_BY", str(os.getppid()))
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert processes.launch().by == ""
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert processes.launch().rank == 1
    monkeypatch.setenv("RESNET_REG_STARTED_BY", "1")
    assert processes.launch() == processes.Launch()


@pytest.mark.parametrize(("devices", "images", "size"), [(3, 2, 12), (4, 1, 12)])
def test_fewer_images_than_processes_are_refused(devices, images, size, tmp_path, capsys):
    make_images(tmp_path / "data" / "train", ["a", "b"], count=6)
    make_images(tmp_path / "data" / "val", ["a"], count=images)
    options = ["--data", tmp_path / "data", "--devices", devices, "--batch-size", size]
    options += ["--accelerator", "cpu", "--out", tmp_path / "out"]
    words = refused(["train", *options], capsys)
    assert f"{devices} processes need a validation image each, and have {images}" in words
    assert not (tmp_path / "out").exists()


# Wrong options


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--epochs", "0"], "--epochs: must be at least 1, got 0"),
        (["train", "--lr", "nan"], "--lr: must be at least 0, got nan"),
        (["train", "--momentum", "1"], "--momentum: must be at least 0 and below 1, got 1"),
        (["train", "--label-noise", "1.5"], "--label-noise: must be at least 0 and at most 1"),
        (["train", "--seed", "x"], "--seed: must be a whole number, got 'x'"),
        (["train", "--target-sparsity", "0.5"], "--target-sparsity needs an --l1 above 0"),
        (["train", "--target-sparsity", "1"], "--target-sparsity: must be at least 0.01 and below"),
        (["train", "--fly"], "unrecognized arguments: --fly"),
        (["train", "--data", "/no/where"], "--data /no/where is not a folder"),
        (["train", "--resume", "/no/where"], "nothing to resume in /no/where"),
        (["train", "--resume", "/no/where", "--lr", "1"], "give no other option"),
        (["train", "--config", "/no/where"], "can't read --config /no/where"),
        (["train", "--devices", "3"], "--batch-size 20 can't be shared evenly by 3 processes"),
        (["train", "--group-by", "("], "--group-by: must be a regular expression, got '('"),
        (
            ["train", "--val-fraction", "0.6", "--test-fraction", "0.5"],
            "--val-fraction 0.6 and --test-fraction 0.5 leave nothing to train on",
        ),
        (["compare", "--l1", "0"], "compare needs --l1 and --weight-decay above 0"),
        (["path", "--l1", "1", "0"], "--l1 must increase, got 1 0"),
        (["compare", "--tune", "--l1", "1"], "--l1 can't be given with --tune, which finds it"),
        (["compare", "--points", "3"], "--points is for --tune"),
        (["tune", "--weight-decay", "1"], "--weight-decay can't be given"),
        (["tune", "--target-sparsity", "0.5"], "there is nothing to tune"),
        (["tune", "--lr", "0", "--accelerator", "cpu"], "--lr 0 has nothing to tune"),
    ],
)
def test_wrong_options_are_named(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused(arguments, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fly: 1", "no such option: fly"),
        ("epochs: many", "--epochs: must be a whole number"),
        ("- 1", "must map options to values"),
        ("a: [", "is not YAML"),
    ],
)
def test_wrong_run_files_are_named(text, words, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text)
    assert words in refused(["train", "--config", str(tmp_path / "run.yaml")], capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--num-workers", "3"], "did you mean --workers"),
        (["train", "--batchsize=3"], "did you mean --batch-size"),
        (["compare", "--weight_decay", "3"], "did you mean --weight-decay"),
        (["path", "--seed-s", "3"], "did you mean --seeds or --seed?"),
        (["evaluate", "x.ckpt", "--outdir", "3"], "did you mean --out"),
        (["train", "--precision", "16-mixed", "--accelerator", "cpu"], "give bf16-mixed on a CPU"),
        (["compare", "--seed", "4294967295", "--seeds", "2"], "the largest is 4294967295"),
        (["path", "--seed", "4294967290", "--seeds", "9"], "the largest is 4294967295"),
        (["path", "--l1", "0.1", "0.10000001"], "same: each needs a folder"),
    ],
)
def test_what_would_be_right_is_said(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused(arguments, capsys)
    assert not list(tmp_path.iterdir())


def test_an_unknown_option_of_yaml_is_compared_with_the_known(tmp_path, capsys):
    for key, option in (("num_workers", "--workers"), ("learning-rate", ""), ("Momentum", "--mom")):
        (tmp_path / "x.yaml").write_text(f"{key}: 1")
        words = refused(["train", "--config", tmp_path / "x.yaml"], capsys)
        assert f"no such option: {key}" in words
        assert f"did you mean {option}" in words or not option


# Terminals


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_that_the_terminal_cannot_show_are_escaped(encoding, tmp_path, monkeypatch):
    names = ["苹果", "\udce9t\udce9", "plain"]
    with contextlib.ExitStack() as stack:
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
        stack.enter_context(contextlib.redirect_stdout(stream))
        stack.enter_context(contextlib.redirect_stderr(stream))
        for name in names:
            assert cli.main(["train", "--data", name]) == 2
            assert cli.main(["evaluate", f"{name}\n.ckpt"]) == 2
        make_images(tmp_path / "data", names, count=2)
        run = Run(data=str(tmp_path / "data"), val_fraction=0.5, image_size=8, batch_size=2)
        path = save(tmp_path / "\udce9苹.ckpt", run)
        assert cli.main(["evaluate", str(path), "--out", str(tmp_path / "\udce9")]) == 0
        stream.flush()
        shown = raw.getvalue().decode(encoding)
    assert "\\udce9t\\udce9 is not a folder" in shown
    assert ("苹果 is not a folder" in shown) == (encoding == "utf-8")
    assert shown.count(".ckpt is not a file") == 3
    text = (tmp_path / "\udce9" / "evaluation.txt").read_text(encoding="utf-8")
    assert "苹果" in text
    assert "\\udce9t" in text


def test_plots_show_what_they_can_of_a_name(tmp_path):
    names = ["\udcff", "b\udce9" * 20]
    for title in ("\udce9.ckpt", "$\udce9$"):
        plots.confusion({"": [[1, 0], [0, 1]]}, names, tmp_path / "\udce9.png", title)
        points = torch.rand(2, 2).numpy()
        plots.features({"PCA": points, "t-SNE": points}, [0, 1], names, tmp_path / "f.png", title)


# What a run says and logs


def test_a_missed_target_is_said_with_its_reason(tmp_path, capsys):
    run = replace(SHORT, l1=1e-6, target_sparsity=0.9)
    train(replace(run, epochs=1), tmp_path / "a", keep="weights")
    said = capsys.readouterr().out
    assert "--target-sparsity 0.9 was missed: zeros 0.0%; give more --epochs" in said
    stopping = replace(run, lr=0.0, momentum=0.0, evaluate_every=1, early_stopping=1, epochs=8)
    result = train(stopping, tmp_path / "b", keep="weights")
    assert len(result.history) < 8
    words = f"--early-stopping ended the run after {len(result.history)} of 8 epochs"
    assert words in capsys.readouterr().out


def test_logs_name_lr_and_l1_by_what_they_are(tmp_path):
    be_quiet()
    run = replace(SHORT, l1=1e-3, target_sparsity=0.5, epochs=2)
    images = load_images(run)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[LearningRateMonitor("step")],
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    trainer.fit(Classifier(run, images.classes), datamodule=ImageData(images, run))
    assert trainer.callback_metrics["lr"] == pytest.approx(0.01)
    assert 0 < float(trainer.callback_metrics["l1"]) < 0.1
    # What the monitor logs under l1 would be lr.
    assert not [name for name in trainer.logged_metrics if name.startswith("l1/")]
    monitor = trainer.callbacks[0]
    assert list(monitor.lrs) == ["lr/pg1", "lr/pg2"]
