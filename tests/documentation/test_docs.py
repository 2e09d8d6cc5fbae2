"""The documentation: every public name is in the reference, and every example runs as it stands."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch.optim import lr_scheduler

import resnet_reg_ext
from resnet_reg_ext import functional, structure

pytestmark = pytest.mark.one_torch

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
NAMES = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (resnet_reg_ext, functional, structure)
    for name in module.__all__
    if not inspect.ismodule(getattr(module, name))
}
OBJECTS = {f"{thing.__module__}.{thing.__qualname__}": thing for thing in NAMES.values()}
PAGES = [
    page
    for page in (DOCS / "index.md", DOCS / "get-started.md", *sorted(DOCS.glob("*/*.md")))
    if "```python" in page.read_text()
]


@pytest.fixture(autouse=True)
def _few_threads(one_thread: None) -> None:
    """See tests/conftest.py."""


def namespace() -> dict[str, Any]:
    """What the examples take for given: a ResNet, images, an optimizer, gradients."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    groups = resnet_reg_ext.param_groups(model, l1=1e-4)
    optimizer = resnet_reg_ext.ProxSGD(groups, lr=0.01)
    loss_fn = torch.nn.CrossEntropyLoss()
    loss_fn(model(images), labels).backward()
    public = {name: getattr(resnet_reg_ext, name) for name in resnet_reg_ext.__all__}
    public |= {name: getattr(functional, name) for name in functional.__all__}
    return {
        **vars(lr_scheduler),
        **public,
        "torch": torch,
        "resnet18": torchvision.models.resnet18,
        "model": model,
        "loss_fn": loss_fn,
        "images": images,
        "labels": labels,
        "input": images,
        "target": labels,
        "loader": [(images, labels)] * 2,
        "optimizer": optimizer,
    }


def test_every_public_name_is_in_the_reference() -> None:
    entries = {
        entry.rpartition(".")[2]
        for page in (DOCS / "reference").glob("*.md")
        for entry in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    }
    assert {name.rpartition(".")[2] for name in NAMES} == entries


@pytest.mark.parametrize("path", sorted(OBJECTS))
def test_a_docstring_says_what_a_user_needs(path: str) -> None:
    """Every argument, what is returned and raised, and an example; of plain data every field."""
    thing = OBJECTS[path]
    text = inspect.getdoc(thing) or ""
    if hasattr(thing, "__dataclass_fields__"):
        for field in thing.__dataclass_fields__:
            assert re.search(rf"^    {field}: ", text, re.MULTILINE), field
        return
    signature = inspect.signature(thing)
    for name, parameter in signature.parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            assert re.search(rf"^    {name}: ", text, re.MULTILINE), name
    needed = {"Args:", "Raises:", "Example:"}
    if not inspect.isclass(thing) and signature.return_annotation not in (None, "None"):
        needed.add("Returns:")
    assert not {section for section in needed if f"\n{section}\n" not in text}


@pytest.mark.parametrize("path", sorted(p for p in OBJECTS if ">>> " in (OBJECTS[p].__doc__ or "")))
def test_the_example_in_a_docstring_runs(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(OBJECTS[path])
    assert text is not None
    example = doctest.DocTestParser().get_doctest(text, namespace(), path, None, 0)
    failures: list[str] = []
    runner = doctest.DocTestRunner()
    runner.run(example, out=failures.append)
    assert runner.failures == 0, "".join(failures)


@pytest.mark.filterwarnings("ignore:TargetSparsity")  # four steps don't reach a target
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path) -> None:
    """Its blocks one after the other, as a reader would paste them."""
    names = namespace()
    for code in re.findall(r"^```python\n([\s\S]*?)^```$", page.read_text(), re.MULTILINE):
        exec(compile(code, str(page.relative_to(ROOT)), "exec"), names)
