"""Files that are damaged, foreign or written by hand: each gets one sentence, none a traceback.

Every part of a valid file is exchanged in turn for what it can't be. The checkpoints have a state
dict of one tensor: their description is refused before that is.
"""

import copy
import io
import json
import pickle
import warnings
import zipfile
from dataclasses import asdict

import pytest
import torch
import yaml
from test_recipe_runs import SHORT, Signal

from resnet_reg_ext import cli
from resnet_reg_ext.recipe import model
from resnet_reg_ext.recipe.files import RecipeError, Stopped
from resnet_reg_ext.recipe.model import Classifier
from resnet_reg_ext.recipe.results import ROW, Best, OnTest, Result
from resnet_reg_ext.recipe.settings import Run
from resnet_reg_ext.recipe.train import train
from resnet_reg_ext.recipe.weights import load_weights

pytestmark = pytest.mark.usefixtures("one_thread", "narrow")

FOREIGN = [None, "x", -1, 0.5, True, [], {}, [None], {"a": [1]}, float("inf"), "a\0b\nc", 10**400]
META = torch.zeros(2, device="meta")
SPARSE = torch.eye(2).to_sparse()
QUANTIZED = torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)


def variants(content, foreign=FOREIGN):
    """Copies of a nested file, each with one part exchanged, left out or added; and their names."""
    yield from (("the whole file", value) for value in foreign)
    parts = [((), content)]
    while parts:
        path, part = parts.pop()
        items = part.items() if isinstance(part, dict) else enumerate(part)
        for key, value in items:
            where = (*path, key)
            if isinstance(value, dict | list) and value:
                parts.append((where, value))
            for other in foreign:
                yield f"{where} = {other!r:.20}", changed(content, where, other)
            yield f"{where} left out", changed(content, where)
        if isinstance(part, dict):
            yield f"{path} has fly", changed(content, (*path, "fly"), 1)


def changed(content, path, *value):
    content = copy.deepcopy(content)
    part = content
    for key in path[:-1]:
        part = part[key]
    if value:
        part[path[-1]] = value[0]
    else:
        del part[path[-1]]
    return content


def answer(arguments, capsys, name):
    """The sentence that a command answers with; anything that it raises fails the test."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except Exception as error:
        raise AssertionError(f"{name}: a traceback") from error
    error = capsys.readouterr().err
    if code == 0:
        return ""
    assert code == 2, name
    assert error.count("\n") == 1, f"{name}: {error}"
    assert error.startswith(f"resnet-reg {arguments[0]}: "), name
    return error


def description():
    run = {**asdict(Run()), "val_fraction": 0.5, "target_sparsity": 0.5}
    return {
        "run": run,
        "classes": ["a", "b"],
        "state_dict": {"model.conv1.weight": 1},
        "source": {"folder": "/no/where", "digest": "0"},
    }


def with_tensor(content):
    """The 1 in a state dict becomes a tensor."""
    state = content.get("state_dict") if isinstance(content, dict) else None
    if isinstance(state, dict) and repr(state.get("model.conv1.weight")) == "1":
        state["model.conv1.weight"] = torch.zeros(1)
    return content


def test_checkpoints(tmp_path, capsys):
    path, count = tmp_path / "x.ckpt", 0
    for name, content in variants(description(), [None, -1, [], 10**400]):
        torch.save(with_tensor(content), path)
        words = answer(["evaluate", path], capsys, name)
        assert words, name
        assert str(path) in words, f"{name}: {words}"
        count += 1
    assert count > 150
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("text", "is a str"),
        (META, "meta device"),
        (SPARSE, "layout torch.sparse_coo"),
        (QUANTIZED, "torch.qint8"),
        (torch.zeros(1, dtype=torch.complex64), "torch.complex64"),
        (torch.zeros(1), "is another architecture's"),
    ],
)
def test_checkpoints_with_odd_weights(value, words, tmp_path, capsys):
    state = Classifier(Run(), ["a", "b"]).state_dict()
    state["model.layer1.0.conv1.weight"] = value
    content = {"run": asdict(Run()), "classes": ["a", "b"], "state_dict": state}
    torch.save(content, tmp_path / "x.ckpt")
    assert words in answer(["evaluate", tmp_path / "x.ckpt"], capsys, words)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({"fly": 1}, "has a run with an unknown setting: 'fly'"),
        ({"epochs": 2.0}, "--epochs: must be a whole number, got 2.0"),
        ({"momentum": 1.5}, "--momentum: must be at least 0 and below 1, got 1.5"),
        ({"freeze": "layer9"}, "--freeze: must be one of none, conv1"),
        ({"lr": float("nan")}, "--lr: must be at least 0, got nan"),
    ],
)
def test_the_setting_that_cannot_be_is_named(run, words, tmp_path, capsys):
    content = {**description(), "run": run}
    torch.save(with_tensor(content), tmp_path / "x.ckpt")
    assert words in answer(["evaluate", tmp_path / "x.ckpt"], capsys, words)


def a_result():
    rows = [{**dict.fromkeys(ROW, 0.5), "epoch": float(epoch)} for epoch in (1, 2)]
    data = {"classes": ["a", "b"], "train_images": 4, "wrong_labels": 0}
    data |= {"validation_images": 3, "test_images": 4}
    test = OnTest(0.75, 0.5, 0.7, [1, 0, 1, 1], [0, 0, 1, 1])
    zeros, matrix = {"conv1.weight": 0.5}, [[1, 1], [0, 2]]
    best = Best(1.0, zeros, matrix, test)
    return Result(Run(), data, rows, 9.0, zeros, matrix, {"torch": "2"}, test, best)


def test_result_files(tmp_path, capsys):
    a_result().save(tmp_path)
    path, count, refused = tmp_path / "result.json", 0, 0
    (tmp_path / "run.yaml").write_text("epochs: 2\n")
    valid = json.loads(path.read_text())
    assert not answer(["train", "--resume", tmp_path], capsys, "valid")
    for name, content in variants(valid):
        path.write_text(json.dumps(content))
        words = answer(["train", "--resume", tmp_path], capsys, name)
        assert not words or str(path) in words, f"{name}: {words}"
        count, refused = count + 1, refused + bool(words)
    # Numbers may be other numbers; null stands for NaN in the history.
    assert count > 400
    assert refused > 0.8 * count
    for text in ("", "[", "{}", "[]", "1", "[" * 10**5, '{"run": {}}', "\xff"):
        path.write_bytes(text.encode("latin-1"))
        assert str(path) in answer(["train", "--resume", tmp_path], capsys, text[:9])


YAMLS = [
    *(
        "",
        "- 1",
        "1",
        "a: [",
        "\t",
        "? [a]\n: 1",
        "[" * 20_000,
        "x: &a [*a]",
        "!!python/object:a {}",
    ),
    *("seed: 2024-13-45", "seed: 2024-01-02", f"seed: {'9' * 5000}", "seed: 1e3", "seed: [1]"),
    *("epochs: yes", "lr: no", "data: off", "data: {a: 1}", "data: [a, b]", "data: ''"),
    *('data: "a\\0b"', "weights: [none]", "resume: x", "config: x", "help: yes", "fly: 1"),
    *('"a\\nb": 1', "out: ''", "out: s3://bucket/x", "out: {}", "data: ~nobody_has_this_name/x"),
    *("l1: [1]", "lr: .inf", "lr: .nan", "momentum: 1", "precision: 16", "null: 1", "devices: 0"),
]


def test_files_of_options(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.yaml"
    for text in YAMLS:
        path.write_text(text)
        assert answer(["train", "--config", path], capsys, text[:30]), text[:30]
    options = {**asdict(Run()), "val_fraction": 0.5}
    for name, content in variants(options, [[], {}, True, "x\0y", [[]], {"a": 1}, float("inf")]):
        path.write_text(yaml.safe_dump(content))
        # Without that a valid file would begin a run. A folder is looked for before weights are.
        missing = "--weights" if "data" in name else "--data"
        assert answer(["train", "--config", path, missing, "/no/where"], capsys, name), name
    path.write_bytes(b"data: caf\xe9")
    assert "is not YAML" in answer(["train", "--config", path], capsys, "latin-1")
    assert [p.name for p in tmp_path.iterdir()] == ["x.yaml"]


def test_a_flag_and_a_list_are_read_from_yaml(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("cold: yes\nl1: [2, 1]\n")
    words = answer(["path", "--config", tmp_path / "x.yaml"], capsys, "")
    assert "--l1 must increase, got 2 1" in words
    for text in ("cold: 1", "cold: 'yes'", "l1: []", "l1: [yes]", "l1: [[1]]"):
        (tmp_path / "x.yaml").write_text(text)
        assert answer(["path", "--config", tmp_path / "x.yaml"], capsys, text), text


def archive(names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name in names:
            made.writestr(name, b"x")
    return file.getvalue()


def test_files_of_weights(tmp_path):
    """None of these is a ResNet-50's."""
    classifier = Classifier(Run(), ["a", "b"])
    files = {
        "empty.pt": b"",
        "text.pt": b"import torch\n",
        "damaged.pt": archive(["a/data.pkl", "a/version"]),
        "script.pt": archive(["a/constants.pkl", "a/data.pkl"]),
        "pickle.pt": pickle.dumps(print),
        "x.safetensors": b"\x08\0\0\0\0\0\0\0{}",
    }
    plain = {"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}
    contents = [
        *FOREIGN[:11],
        torch.zeros(2),
        [torch.zeros(2)],
        {"conv1.weight": "text"},
        {"conv1.weight": {"a": torch.zeros(1)}},
        {"model": None},
        {"model": {}, "state_dict": {}},
        {"model": "text", "epoch": 3},
        {"state_dict": [torch.zeros(1)]},
        {1: torch.zeros(1)},
        {("a",): {"conv1.weight": torch.zeros(1)}},
        *({**plain, "conv1.weight": odd} for odd in (META, SPARSE, QUANTIZED, "text", None)),
        {
            f"{side}.{name}": value
            for side in ("student", "teacher")
            for name, value in plain.items()
        },
        plain,
    ]
    for index, content in enumerate(contents):
        file = io.BytesIO()
        torch.save(content, file)
        files[f"{index}.pt"] = file.getvalue()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RecipeError) as error:
            load_weights(classifier, str(tmp_path / name))
        assert name in str(error.value)
        assert "weights_only" not in str(error.value)
        if name == f"{len(contents) - 2}.pt":
            assert "several networks, under student. and teacher." in str(error.value)


@pytest.fixture(scope="module")
def resnet(narrow):
    return model.resnet50(num_classes=5).state_dict()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: {"net": {f"module.{n}": v for n, v in s.items()}},
            "(under net.module); its head",
        ),
        (lambda s: {"ema": s, "model": {"a": s["fc.bias"]}}, "(under ema); its head for 5 classes"),
        (
            lambda s: {
                "state_dict": {
                    **{f"module.encoder_q.{n}": v for n, v in s.items() if n[:3] != "fc."},
                    "module.encoder_q.fc.0.weight": s["fc.weight"],
                    "module.queue": s["fc.weight"],
                }
            },
            "(under state_dict.module.encoder_q); its head is replaced by a random one for 2",
        ),
        (
            lambda s: {
                n.replace("layer1.0.", "layer1.0._fsdp_wrapped_module._orig_mod."): v
                for n, v in s.items()
                if n != "fc.bias"
            },
            "its head is replaced",
        ),
        (
            lambda s: {f"backbone.{n}": v for n, v in s.items() if n[:3] != "fc."},
            "has no class head",
        ),
    ],
)
def test_published_weights_are_found_in_the_file(change, words, resnet, tmp_path):
    torch.save({**change(resnet), "epoch": 3}, tmp_path / "w.pth")
    classifier = Classifier(Run(), ["a", "b"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert words in load_weights(classifier, str(tmp_path / "w.pth"))
    own = classifier.model.state_dict()
    assert all(torch.equal(own[n], v) for n, v in resnet.items() if n[:3] != "fc.")


@pytest.mark.parametrize("name", ["bn1.running_var", "layer4.2.conv3.weight"])
def test_weights_that_are_not_finite_are_named(name, resnet, tmp_path):
    state = {n: v.clone() for n, v in resnet.items()}
    state[name].view(-1)[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(
        RecipeError, match=rf"3 of the \d+ values of its {name} are NaN or infinite"
    ):
        load_weights(Classifier(Run(), ["a", "b"]), str(tmp_path / "w.pth"))
    # A head that is replaced may be anything.
    state = {**resnet, "fc.bias": torch.full((5,), torch.nan)}
    torch.save(state, tmp_path / "w.pth")
    load_weights(Classifier(Run(), ["a", "b"]), str(tmp_path / "w.pth"))


TRAINING_STATE = [
    ("global_step", ["x", -1]),
    ("epoch", [99]),
    ("loops", [None, [1]]),
    ("optimizer_states", [[{}], ["x"]]),
    ("lr_schedulers", [{}]),
    ("callbacks", [{"History": {"rows": [{"epoch": 1}]}}]),
]


def test_checkpoints_to_resume_from(tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        train(SHORT, out, keep="weights", callbacks=[Signal(2, 2)])
    capsys.readouterr()
    valid = torch.load(out / "last.ckpt", weights_only=True)
    for part, values in TRAINING_STATE:
        for value in values:
            torch.save({**valid, part: value}, out / "last.ckpt")
            words = answer(["train", "--resume", out], capsys, f"{part} = {value!r:.60}")
            assert "last.ckpt" in words or "checkpoint is damaged" in words, (part, value)
    assert not (out / "result.json").exists()
