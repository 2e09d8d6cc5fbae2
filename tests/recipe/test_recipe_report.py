"""``report.html``: one file without a network, for any name and any version's results.

`make report-check` opens reports in a browser.
"""

import base64
import io
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image
from test_recipe_data import make_images

from resnet_reg_ext import cli
from resnet_reg_ext.recipe.files import RecipeError
from resnet_reg_ext.recipe.report import write_report
from resnet_reg_ext.recipe.run_folders import read_run_folder

pytestmark = pytest.mark.usefixtures("one_thread", "narrow")

HOSTILE = ["<img src=x onerror=alert(1)>", "a\"><b>&amp;{{ 7*7 }}'"]
DIGITS = Path(__file__).resolve().parents[2] / "docs" / "results" / "digits-wrong-labels"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Refuses what isn't well formed; keeps elements, attributes and text."""

    def __init__(self, path):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attributes), list(self.open)))
        if tag not in VOID:
            self.open.append((tag, dict(attributes).get("class")))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), list(self.open)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes, _ in self.elements if name == tag]

    def words(self):
        return " ".join(" ".join(self.text).split())


def check(path):
    """What holds for every report."""
    page = Page(path)
    assert page.source.startswith("<!DOCTYPE html>\n<html")
    # Nothing runs and nothing is fetched, whatever the names; the policy says so too.
    assert not {"script", "iframe", "object", "link", "base", "form"} & {
        e[0] for e in page.elements
    }
    (policy,) = (a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for _, attributes, _ in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (name, value)
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("data:image/png;base64,", "#")), value
            assert re.findall(r"url\((?!#)", value or "") == []
    ids = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    referred = re.findall(r'(?:href="|url\()#([^")]+)', page.source)
    assert set(referred) <= set(ids)
    # At 360 px: pictures shrink, tables scroll in boxes of their own, long words break.
    for tag, attributes, around in page.elements:
        if tag == "svg":
            assert "width" not in attributes
            assert "viewbox" in attributes
        if tag == "table":
            assert ("div", "scroll") in around
    (style,) = re.findall(r"<style>([\s\S]*?)</style>", page.source)
    assert re.search(r"\.scroll \{ overflow-x: auto; max-width: 100%", style)
    assert re.search(r"figure svg \{[^}]*width: 100%[^}]*max-width", style)
    assert re.search(r"pre \{[^}]*pre-wrap[^}]*overflow-wrap: anywhere", style)
    assert re.search(r"body \{[^}]*overflow-wrap: anywhere", style)
    for size, unit in re.findall(r"(?<!-)\b(?:min-)?width: ([\d.]+)(px|rem)", style):
        assert float(size) * (16 if unit == "rem" else 1) <= 340
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style
    # Every colour of a plot is the style sheet's, or it would be lost in the dark.
    for svg in re.findall(r"<svg[\s\S]*?</svg>", page.source):
        assert re.findall(r"#[0-9a-f]{6}\b", svg) == []
        assert set(re.findall(r"var\((--\w+)\)", svg)) <= set(re.findall(r"(--\w+):", style))
    return page


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on two classes with hostile names, and an evaluation of it."""
    root = tmp_path_factory.mktemp("hostile")
    for split in ("train", "val"):
        make_images(root / "<data>" / split, HOSTILE, count=5, size=80)
    options = ["--data", str(root / "<data>"), "--image-size", "8", "--batch-size", "5"]
    options += ["--epochs", "2", "--evaluate-every", "1", "--accelerator", "cpu", "--l1", "0.01"]
    assert cli.main(["train", *options, "--out", str(root / "out")]) == 0
    assert cli.main(["evaluate", str(root / "out" / "best.ckpt")]) == 0
    return root


def test_a_run_is_reported_with_its_mistakes_and_its_command(trained, tmp_path):
    out = trained / "out"
    page = check(out / "report.html")
    result = json.loads((out / "result.json").read_text())
    last, words = result["history"][-1], page.words()
    assert f"{last['train_accuracy']:.3f}" in words
    assert "validation accuracy" in words
    for name in HOSTILE:
        assert name in words
    mistakes = json.loads((out / "mistakes.json").read_text())
    wrong = 10 - sum(result["confusion"][c][c] for c in (0, 1))
    assert len(page.all("img")) == len(mistakes) == wrong > 0
    assert len(page.all("svg")) == 5
    # The command repeats the run: it is the file that repeats it, spelt out.
    shell = re.findall(r"<pre>([\s\S]*?)</pre>", page.source)
    assert len(shell) == 1
    text = words[words.index("resnet-reg train --data") :]
    arguments = shlex.split(text[: text.index(" NEW-FOLDER")])[2:-1]
    again = [*arguments, "--epochs", "1", "--out", str(tmp_path / "again")]
    assert cli.main(["train", *again]) == 0
    first, second = (
        yaml.safe_load((folder / "run.yaml").read_text()) for folder in (out, tmp_path / "again")
    )
    assert second == {**first, "epochs": 1}


def test_an_evaluation_is_reported(trained):
    folder = trained / "out" / "evaluate"
    page = check(folder / "report.html")
    told, words = json.loads((folder / "evaluation.json").read_text()), page.words()
    low, high = told["intervals"]["loss"]
    assert f"{told['loss']:.3f} {low:.3f} to {high:.3f}" in words
    assert "These images chose the epoch of this checkpoint" in words
    assert "resnet-reg evaluate" in words
    counts = [n for row in told["confusion"] for n in row if n]
    cells = re.findall(r"--s: [\d.]+\">(\d+)</td>", page.source)
    assert [int(cell) for cell in cells] == counts


def test_a_comparison_of_an_earlier_version_is_reported(tmp_path):
    shutil.copytree(DIGITS, tmp_path / "compare")
    page = check(write_report(tmp_path / "compare"))
    words = page.words()
    verdict = words.index("L1 against none: test accuracy: higher (+0.068 ± 0.050)")
    assert verdict < words.index("0.692 ± 0.021") < words.index("resnet-reg compare --data digits")
    assert len(page.all("svg")) == 5
    before = (tmp_path / "compare" / "report.html").read_bytes()
    assert write_report(tmp_path / "compare").read_bytes() == before


def test_the_names_of_files_old_and_new_are_read_alike(trained, tmp_path):
    """Validation apart from test, and the best weights' figures."""
    shutil.copytree(trained / "out", tmp_path / "new", ignore=shutil.ignore_patterns("*.ckpt"))
    path = tmp_path / "new" / "result.json"
    content = json.loads(path.read_text())
    if "test_accuracy" in content["history"][0]:
        content["history"] = [
            {name.replace("test_", "validation_"): value for name, value in row.items()}
            for row in content["history"]
        ]
    (old,) = read_run_folder(trained / "out").arms[""]
    test = {"test_accuracy": 0.25, "test_loss": 3.5, "test_f1": 0.2, "right": [1] * 4}
    content |= {"test": test, "best": None}
    path.write_text(json.dumps(content))
    (new,) = read_run_folder(tmp_path / "new").arms[""]
    assert new.history == old.history
    assert (new.watched, new.held_out) == ("validation", "test")
    assert new.final["held_out_accuracy"] == 0.25
    assert new.final["gap"] == new.final["train_accuracy"] - 0.25
    words = check(write_report(tmp_path / "new")).words()
    assert "Test accuracy 0.250" in words
    assert "validation images solid" in words
    # A run that stops early is told by the weights that it stopped for.
    content["run"]["early_stopping"] = 3
    content["best"] = {
        "epoch": 1.0,
        "zeros_by_layer": dict.fromkeys(content["zeros_by_layer"], 0.5),
        "confusion": [[1, 0], [0, 2]],
        "test": {**test, "test_accuracy": 0.75},
    }
    path.write_text(json.dumps(content))
    (new,) = read_run_folder(tmp_path / "new").arms[""]
    assert (len(new.history), new.final["held_out_accuracy"]) == (1, 0.75)
    assert (new.confusion, new.held_out_images) == ([[1, 0], [0, 2]], 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "result.json").unlink(), "`train` hasn't finished; to go on: "),
        (lambda folder: (folder / "run.yaml").unlink(), "is not the output folder of a resnet-reg"),
        (lambda folder: (folder / "result.json").write_text("{"), "result.json is damaged: "),
        (lambda folder: (folder / "result.json").write_text("{}"), "or another version's: KeyErr"),
        (
            lambda folder: (folder / "mistakes.json").write_text(
                '[{"image": "", "true": "", "predicted": "", "probability": 1, '
                '"thumbnail": "https://example.org/x.png"}]'
            ),
            "mistakes.json is damaged: a thumbnail must be a data URI",
        ),
    ],
)
def test_a_folder_that_cannot_be_reported_is_named(change, words, trained, tmp_path):
    folder = tmp_path / "out"
    ignored = shutil.ignore_patterns("*.ckpt", "evaluate", "tensorboard")
    shutil.copytree(trained / "out", folder, ignore=ignored)
    change(folder)
    with pytest.raises(RecipeError) as error:
        write_report(folder)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_not_finite_and_many_classes_are_shown(trained, tmp_path):
    """As after training that diverged, in a run of 30 classes."""
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy(trained / "out" / "run.yaml", folder)
    content = json.loads((trained / "out" / "result.json").read_text())
    for name in ("train_loss", "test_loss", "validation_loss"):
        content["history"][-1] |= {name: None} if name in content["history"][-1] else {}
    classes = [f"class {i}" for i in range(30)]
    content["data"]["classes"] = classes
    content["confusion"] = [[int(j in (i, 7)) * (j + 1) for j in range(30)] for i in range(30)]
    (folder / "result.json").write_text(json.dumps(content))
    page = check(write_report(folder))
    words = page.words()
    assert "The loss is not finite: training has diverged" in words
    assert "The most frequent mistakes of 30 classes:" in words
    assert "class 0 taken for class 7: 8" in words
    assert "nan" not in words.lower()


def test_thumbnails_are_small(tmp_path, trained):
    mistakes = json.loads((trained / "out" / "mistakes.json").read_text())
    assert all(len(m["thumbnail"]) < 20_000 for m in mistakes)
    for mistake in mistakes:
        data = base64.b64decode(mistake["thumbnail"].partition(",")[2])
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        source = Image.open(mistake["image"])
        assert max(picture.size) <= 112
        assert picture.getpixel((3, 3)) == source.getpixel((3, 3))  # of one grey level
