"""The recipe: data, one training run, the demo. Needs the ``demo`` extra."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from resnet_reg_ext.recipe import demo
from resnet_reg_ext.recipe.data import CLASSES, load_digits
from resnet_reg_ext.recipe.train import Epoch, Result, Settings, train

TINY = Settings(l1=1e-2, weight_decay=1e-4, epochs=2, batch_size=10, evaluate_every=2)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def one_thread():
    """A busy machine makes two threads wait for each other at every small layer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_data(**options):
    return load_digits(**{"image_size": 16, "train_size": 10, "test_size": 10, **options})


def make_result(train_accuracy, test_accuracy, zeros=0.0):
    last = Epoch(1, 0.1, train_accuracy, 0.5, test_accuracy, zeros)
    return Result(Settings(), [last], {"conv1.weight": zeros}, 1.0, 10.0, 1.0, torch.nn.Identity())


def test_split_is_stratified_and_disjoint():
    data = load_digits(image_size=32, train_size=200, test_size=500)
    assert data.train_images.shape == (200, 3, 32, 32)
    assert data.test_images.shape == (500, 3, 32, 32)
    assert data.train_images.dtype == torch.float32
    assert not set(data.train_rows) & set(data.test_rows)
    assert len(set(data.train_rows)) == 200
    assert len(set(data.test_rows)) == 500
    # The classes have 174 to 183 of the 1,797 images.
    for labels, count in ((data.train_labels, 200), (data.test_labels, 500)):
        shares = torch.bincount(labels, minlength=CLASSES) / count
        assert shares.min() >= 174 / 1797 - 1 / count
        assert shares.max() <= 183 / 1797 + 1 / count


def test_split_follows_the_seed():
    first, again, other = tiny_data(seed=3), tiny_data(seed=3), tiny_data(seed=4)
    assert first.train_rows == again.train_rows
    assert torch.equal(first.train_images, again.train_images)
    assert first.train_rows != other.train_rows


def test_label_noise_changes_as_many_labels_as_asked_and_no_test_label():
    options = {"image_size": 8, "train_size": 100, "test_size": 100}
    clean, noisy = load_digits(**options), load_digits(**options, label_noise=0.3)
    assert noisy.wrong_labels == 30
    assert (clean.train_labels != noisy.train_labels).sum() == 30
    assert torch.equal(clean.test_labels, noisy.test_labels)
    assert clean.wrong_labels == 0


def test_label_noise_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"label_noise must be in \[0, 1\], got 1.5"):
        tiny_data(label_noise=1.5)


def test_same_seed_gives_the_same_weights():
    data = tiny_data()
    first, again = (train("t", data, TINY, progress=False) for _ in range(2))
    weights, weights_again = first.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
    assert first.history == again.history
    # Evaluated after the second epoch only, and after the last in any case.
    assert [e.epoch for e in first.history] == [2]
    assert 0 < first.last.zeros < 1
    assert "fc.weight" in first.zeros_by_layer
    assert "fc.bias" not in first.zeros_by_layer
    assert "bn1.weight" not in first.zeros_by_layer
    assert first.optimizer_ms < first.step_ms


def test_quick_demo_writes_its_files_and_prints_a_table(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert demo.main(["--quick", "--out", str(out), "--seed", "5"]) == 0
    text = capsys.readouterr().out
    assert "seed             5, for the split" in text
    assert "it is one seed" in text
    for name in demo.SHORT:
        assert f"\n{name} " in text
    for name in ("training_curves", "gap_bars", "sparsity_by_layer"):
        assert (out / f"{name}.png").read_bytes().startswith(PNG)
    report = json.loads((out / "results.json").read_text())
    assert list(report["runs"]) == list(demo.SHORT)
    for name, run in report["runs"].items():
        assert run["settings"]["seed"] == 5
        assert run["gap"] == run["train_accuracy"] - run["test_accuracy"]
        assert (run["zeros"] > 0) == (demo.RUNS[name].l1 > 0)


def test_unwritable_out_is_refused_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "train", lambda *_, **__: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    assert demo.main(["--out", str(tmp_path / "file" / "demo")]) == 2
    error = capsys.readouterr().err
    assert error == f"demo: can't write to --out {tmp_path / 'file' / 'demo'}: Not a directory\n"


@pytest.mark.parametrize("module", ["torchvision", "sklearn", "tqdm", "matplotlib"])
def test_missing_extra_is_named(module, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert demo.main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"demo: {module} can't be imported")
    assert error.endswith("pip install 'resnet_reg_ext[demo]'\n")


def test_missing_cuda_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert demo.main(["--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "torch finds no CUDA device here" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--seed", "-1"], ["--seed", "x"]])
def test_bad_number_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_verdict_says_where_no_difference_is_seen():
    base = make_result(1.0, 0.80)
    (close,) = demo.verdicts({"none": base, "L1": make_result(1.0, 0.81, 0.6)}, 400)
    assert close.count("no difference seen") == 2
    assert "60.0% of the regularised weights are exactly zero" in close
    (better,) = demo.verdicts({"none": base, "L1": make_result(0.95, 0.90)}, 400)
    assert "test accuracy: higher (+0.100" in better
    assert "gap: smaller (-0.150" in better
    (worse,) = demo.verdicts({"none": base, "L1": make_result(1.0, 0.60)}, 400)
    assert "test accuracy: lower (-0.200" in worse
    assert "gap: larger (+0.200" in worse


def test_label_noise_is_said():
    data = replace(tiny_data(), wrong_labels=4)
    assert "4 of them with a label made wrong on purpose" in demo.describe(data, TINY, "cpu")
    assert "wrong" not in demo.describe(tiny_data(), TINY, "cpu")
