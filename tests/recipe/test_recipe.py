"""The commands of the recipe, on real images and a whole ResNet-50."""

import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import sysconfig
from dataclasses import asdict

import pytest
import torch
import torchvision
import yaml
from test_recipe_data import make_images

from resnet_reg_ext import cli
from resnet_reg_ext.recipe.callbacks import WholeFiles
from resnet_reg_ext.recipe.files import RecipeError, prepare_folder
from resnet_reg_ext.recipe.results import Result
from resnet_reg_ext.recipe.settings import Run, save_options

TINY = ["--image-size", "16", "--train-size", "40", "--val-size", "30", "--batch-size", "10"]
TINY += ["--test-size", "20", "--accelerator", "cpu"]
PNG = b"\x89PNG\r\n\x1a\n"
# One thread each: small layers make threads wait for each other.
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}
RESNET_REG = pathlib.Path(sysconfig.get_path("scripts")) / "resnet-reg"


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tensors(value, name=""):
    """All tensors of a checkpoint's part, by name."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = {}
    for key, item in items:
        if isinstance(item, (torch.Tensor, dict, list)):
            found |= tensors(item, f"{name}/{key}")
    return found


def assert_same_state(first, second):
    for part in ("state_dict", "optimizer_states"):
        a, b = tensors(first[part]), tensors(second[part])
        assert len(a) > 150
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def refused(arguments, capsys):
    """The one sentence that a command answers bad input with."""
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"resnet-reg {arguments[0]}: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run that was stopped by SIGINT in its second epoch and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    options = [*TINY, "--l1", "1e-2", "--weight-decay", "1e-3", "--label-noise", "0.2"]
    options += ["--epochs", "3", "--evaluate-every", "1", "--augment", "shift", "--seed", "5"]
    options += ["--target-sparsity", "0.5"]
    train = [RESNET_REG, "train", *options, "--out"]
    whole = subprocess.Popen([*train, folder / "whole"], env=ALONE, stdout=subprocess.DEVNULL)
    stopped = subprocess.Popen(
        [*train, folder / "stopped"],
        env=ALONE,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    # Something is said before the libraries are loaded, which takes seconds.
    assert stopped.stdout.readline() == "resnet-reg train: loading PyTorch and Lightning\n"
    for line in stopped.stdout:
        if "epoch 1:" in line:
            stopped.send_signal(signal.SIGINT)
            break
    _, error = stopped.communicate()
    assert whole.wait() == 0
    return folder, stopped.returncode, error


def test_ctrl_c_and_resume_give_the_bits_of_a_run_that_went_through(trained, capsys):
    folder, code, error = trained
    assert code == 128 + signal.SIGINT
    assert f"resnet-reg train --resume {folder / 'stopped'}" in error
    assert "Traceback" not in error
    left = torch.load(folder / "stopped" / "last.ckpt", weights_only=True)
    assert 4 < left["global_step"] < 12
    assert left["global_step"] % 4 != 0
    assert not (folder / "stopped" / "result.json").exists()

    assert cli.main(["train", "--resume", str(folder / "stopped")]) == 0
    assert "resumed from" in capsys.readouterr().out
    whole, resumed = (
        torch.load(folder / name / "last.ckpt", weights_only=True) for name in ("whole", "stopped")
    )
    assert_same_state(whole, resumed)
    first, second = (Result.load(folder / name) for name in ("whole", "stopped"))
    assert first.history == second.history
    assert first.confusion == second.confusion
    assert [row["epoch"] for row in first.history] == [1, 2, 3]
    assert 0 < first.last["zeros"] < 1
    assert whole["optimizer_states"][0]["param_groups"][0]["l1"] != 1e-2  # it has been steered


def test_a_run_writes_the_file_that_repeats_it(trained, capsys, tmp_path):
    folder = trained[0] / "whole"
    text = (folder / "run.yaml").read_text()
    assert yaml.safe_load(text)["l1"] == 1e-2
    config = tmp_path / "run.yaml"
    config.write_text(text)
    out = tmp_path / "again"
    # What is given on the command line wins over the file.
    assert cli.main(["train", "--config", str(config), "--epochs", "1", "--out", str(out)]) == 0
    again = yaml.safe_load((out / "run.yaml").read_text())
    assert again == {**yaml.safe_load(text), "epochs": 1}
    said = capsys.readouterr().out
    assert "8 of them with a label made wrong on purpose" in said
    assert list((out / "tensorboard").glob("events.out.tfevents.*"))
    (metrics,) = out.glob("csv/*/metrics.csv")
    assert "validation_accuracy" in metrics.read_text()
    assert "test_accuracy" not in metrics.read_text()
    assert not list(out.rglob("*.part"))


def test_evaluate_measures_a_checkpoint_from_its_file_alone(trained, tmp_path, capsys):
    folder = trained[0] / "whole"
    checkpoint = str(folder / "last.ckpt")
    assert cli.main(["evaluate", checkpoint, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    told = json.loads((tmp_path / "evaluation.json").read_text())
    known = Result.load(folder)
    assert told["accuracy"] == pytest.approx(known.last["test_accuracy"], abs=1e-6)
    assert told["confusion"] == known.confusion
    for c, name in enumerate(known.classes):
        column = sum(row[c] for row in known.confusion)
        right = known.confusion[c][c]
        assert told["classes"][name]["recall"] == pytest.approx(right / sum(known.confusion[c]))
        assert told["classes"][name]["precision"] == pytest.approx(right / column if column else 0)
    for name in ("confusion", "features", "sparsity_by_layer"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)
    assert "layer4.2.conv3.weight" in said
    zeros = (torch.load(checkpoint, weights_only=True)["state_dict"]["model.fc.weight"] == 0).sum()
    assert told["sparsity"]["layers"]["fc.weight"]["zeros"] == zeros


def test_evaluate_refuses_what_is_no_checkpoint_of_these_classes(trained, tmp_path, capsys):
    folder = trained[0] / "whole"
    content = torch.load(folder / "last.ckpt", weights_only=True)
    out = tmp_path / "out"

    def said(changed):
        torch.save(changed, tmp_path / "x.ckpt")
        return refused(["evaluate", str(tmp_path / "x.ckpt"), "--out", str(out)], capsys)

    slim = {key: content[key] for key in ("run", "classes", "state_dict")}
    other = torchvision.models.resnet18(num_classes=10).state_dict()
    other = {f"model.{name}": value for name, value in other.items()}
    assert "not a ResNet-50's" in said({**slim, "state_dict": other})
    assert "class count" in said({**slim, "classes": ["a", "b"]})
    assert "other classes than the training" in said({**slim, "classes": list("abcdefghij")})
    assert "not a checkpoint" in said(slim["state_dict"])
    (tmp_path / "x.ckpt").write_bytes(b"nothing")
    assert "holds no weights" in refused(["evaluate", str(tmp_path / "x.ckpt")], capsys)
    assert "is not a file" in refused(["evaluate", str(tmp_path / "y.ckpt")], capsys)
    assert not out.exists()


def test_compare_prints_a_verdict_and_writes_its_plots(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    options = [*TINY, "--train-size", "20", "--epochs", "1", "--l1", "1e-2"]
    options += ["--weight-decay", "2e-3"]
    assert cli.main(["compare", *options, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "This is one seed" in said
    first = said.partition("[1 of 4]")[0]
    assert "4 runs of 2 steps, one after the other: about 1 minute if nothing else" in first
    assert "GB of memory" in first
    assert "no unbiased" not in said
    for name in ("training_curves", "gap_bars", "confusion", "sparsity_by_layer"):
        assert (out / f"{name}.png").read_bytes().startswith(PNG)
        assert f"{out / name}.png" in said
    # The report has each arm's mistakes, from the run's own folder.
    report = (out / "report.html").read_text()
    assert report.count('<ul class="mistakes">') == 4
    assert report.index("against none: test accuracy") < report.index("<table>")
    told = json.loads((out / "compare.json").read_text())["runs"]
    assert list(told) == ["none", "L2", "L1", "elastic net"]
    # The control costs no run of its own.
    assert "| none, stopped early |" in said
    assert "- L1 against none, stopped early: test accuracy: " in said
    # They differ in regularisation alone.
    shared = told["none"][0]["run"]
    assert {name: run["run"] for name, (run,) in told.items()} == {
        "none": {**shared, "l1": 0, "weight_decay": 0},
        "L2": {**shared, "l1": 0, "weight_decay": 2e-3},
        "L1": {**shared, "l1": 1e-2, "weight_decay": 0},
        "elastic net": {**shared, "l1": 1e-2, "weight_decay": 2e-3},
    }
    for name, (run,) in told.items():
        # Of 23 million random weights a few may be 0 by chance.
        assert (run["history"][-1]["zeros"] > 1e-5) == (name in ("L1", "elastic net"))
        assert sum(map(sum, run["confusion"])) == len(run["test"]["right"]) == 20
        assert (out / "seed0" / name.replace(" ", "-") / "best.ckpt").is_file()
        assert re.search(rf"^\| {name} ", said, re.M)
    # Finished runs are kept as weights alone, and are not trained again.
    kept = out / "seed0" / "L1" / "last.ckpt"
    assert "optimizer_states" not in torch.load(kept, weights_only=True)
    before = kept.stat().st_mtime_ns
    assert cli.main(["compare", "--resume", str(out)]) == 0
    assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize("command", ["train", "compare", "path"])
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--data", "/no/where"], "--data /no/where is not a folder"),
        (["--weights", "/no/where"], "is not a file"),
        (["--train-size", "1000000"], "--train-size 1000000"),
        (["--batch-size", "1000000"], "--batch-size"),
    ],
    ids=["data", "weights", "train-size", "batch-size"],
)
def test_bad_input_leaves_nothing_so_that_the_right_command_runs(
    command, wrong, words, tmp_path, capsys
):
    out = tmp_path / "out"
    assert words in refused([command, *TINY, *wrong, "--out", str(out)], capsys)
    assert not out.exists()


def test_the_commands_of_the_readme_in_their_order(tmp_path, capsys, monkeypatch):
    """On a folder with all three sets; labels stay as they are, images are of ImageNet's size."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val", "test"):
        make_images(tmp_path / "DIR" / split, ["cat", "dog"], count=4)
    few = ["--data", "DIR", "--batch-size", "4", "--epochs", "1", "--accelerator", "cpu"]
    assert cli.main(["train", *few, "--l1", "1e-4", "--out", "out/run"]) == 0
    said = capsys.readouterr().out
    assert "2 classes (cat, dog), 224 px" in said
    assert "trained on: 8 images\n" in said
    assert "1 epoch of 2 steps" in said
    assert cli.main(["evaluate", "out/run/best.ckpt", "--data", "DIR"]) == 0
    assert "on 8 images of DIR (test)" in capsys.readouterr().out
    assert (tmp_path / "out" / "run" / "evaluate" / "confusion.png").is_file()
    small = ["--image-size", "16"]
    assert cli.main(["compare", *few, *small, "--out", "out/compare"]) == 0
    said = capsys.readouterr().out
    assert "label made wrong" not in said
    (l1,) = re.findall(r"strengths by the initial weights: --l1 (\S+), --weight-decay", said)
    assert re.findall(rf"l1 {l1} reaches (33\.|32\.|34\.)", said)
    assert "`compare`'s: resnet-reg compare --resume out/compare" in refused(
        ["train", "--resume", "out/compare"], capsys
    )
    before = (tmp_path / "out" / "run" / "result.json").read_bytes()
    assert cli.main(["train", "--resume", "out/run"]) == 0
    assert "out/run is finished" in capsys.readouterr().out
    assert (tmp_path / "out" / "run" / "result.json").read_bytes() == before


def test_training_that_diverges_says_so(tmp_path, capsys):
    options = [*TINY, "--train-size", "20", "--epochs", "1", "--lr", "1e30"]
    assert cli.main(["train", *options, "--out", str(tmp_path / "out")]) == 0
    assert "training has diverged" in capsys.readouterr().out


@pytest.mark.parametrize("way", ["again", "resumed"])
def test_a_run_killed_before_its_first_checkpoint_can_begin_again(way, tmp_path, capsys):
    """What is there then is the file of settings and the beginning of a log."""
    out = tmp_path / "out"
    sizes = {"image_size": 16, "train_size": 20, "val_size": 30, "test_size": 20, "batch_size": 10}
    run = Run(**sizes, epochs=1, accelerator="cpu")
    out.mkdir()
    save_options(asdict(run), out / "run.yaml")
    again = ["train", *TINY, "--train-size", "20", "--epochs", "1", "--out", str(out)]
    resumed = ["train", "--resume", str(out)]
    assert cli.main(again if way == "again" else resumed) == 0
    assert ("from the beginning" in capsys.readouterr().out) == (way == "resumed")
    assert Result.load(out).run == run
    assert "holds a run already" in refused(again, capsys)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_a_path_starts_each_strength_alike_unless_warm(warm, tmp_path, capsys):
    out = tmp_path / "path"
    # With a learning rate of 0 the weights stay: all are the first one's, head and all.
    options = [*TINY, "--train-size", "20", "--epochs", "1", "--lr", "0", "--l1", "0", "1e-3"]
    options += ["--warm" if warm else "--cold"]
    assert cli.main(["path", *options, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert ("with its class head" in said) == warm
    assert ("each from the start" in said) == (not warm)
    first, second = (
        torch.load(out / "seed0" / name / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("l1-0", "l1-0.001")
    )
    assert torch.equal(first["model.fc.weight"], second["model.fc.weight"])
    # Batch norm's statistics went on from the first run's, or began anew.
    batches = [state["model.bn1.num_batches_tracked"] for state in (first, second)]
    assert batches == ([2, 4] if warm else [2, 2])
    assert yaml.safe_load((out / "path.yaml").read_text())["warm"] is warm
    assert (out / "path.png").read_bytes().startswith(PNG)
    assert "against the strength" in (out / "report.html").read_text()


def test_an_output_folder_that_cannot_be_used_is_refused(trained, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    error = refused(["train", *TINY, "--out", str(tmp_path / "file" / "run")], capsys)
    assert error.endswith("Not a directory\n")
    used = str(trained[0] / "whole")
    assert "holds a run already" in refused(["train", *TINY, "--out", used], capsys)
    with pytest.raises(RecipeError, match=r"MB free; this needs 1000000000000 MB"):
        prepare_folder(tmp_path, 10**18)


def test_a_checkpoint_that_cannot_be_written_leaves_the_former(tmp_path):
    path = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint({"x": torch.ones(3)}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(RecipeError, match=rf"can't write {path}: File too large"):
            WholeFiles().save_checkpoint({"x": torch.ones(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_extra_is_named(tmp_path):
    code = "import sys; sys.modules['lightning'] = None; from resnet_reg_ext import cli; "
    code += "sys.exit(cli.main(['train']))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert "it needs the extra 'train': pip install '.[train]'" in done.stderr
    assert not list(tmp_path.iterdir())
