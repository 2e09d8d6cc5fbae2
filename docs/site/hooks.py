"""What the documentation site needs beyond mkdocs' plugins.

- Docstrings use the roles and directives that torch's docstrings use (``:func:``, ``.. math::``);
  they become links and formulas.
- Formulas, in fences named "math" as on GitHub, become MathML, which needs no script.
- ``<!-- cli: train -->`` is replaced by what the command's parser prints, and
  ``<!-- include: FILE -->`` by a file of the repository.
"""

from __future__ import annotations

import io
import os
import re
import textwrap
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import griffe
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ROLE = re.compile(r":(?:func|class|meth|attr|mod):`~?([\w.]+)`")
MATH = re.compile(r"^\.\. math:: *(.*(?:\n(?:[ \t]+\S.*))*)", re.MULTILINE)
CODE = re.compile(r"^\.\. code-block:: (\w+)\n\n((?:(?:[ \t]+.*)?\n)+)", re.MULTILINE)
PACKAGE = "resnet_reg_ext"
# Functions with the name of their module, which would hide them.
SAME_NAME = {
    f"{PACKAGE}.{name}": f"{PACKAGE}.{folder}{name}.{name}"
    for folder, names in {
        "": ("param_groups", "sparsity"),
        "structure.": ("channels", "compact", "importance"),
    }.items()
    for name in names
}


def mathml(latex: str) -> str:
    """A formula as MathML, on a line of its own."""
    # The converter knows neither.
    latex = latex.replace(r"\arg", r"\operatorname{arg}").replace(r"\_", "_")
    formula = str(convert(latex, display="block"))
    # Bars would stretch to their subscripts and stand apart like operators.
    for bar in ("&#x02016;", "&#x0007C;"):
        for mark in (f"<mo>{bar}", f'<mo stretchy="false">{bar}'):
            formula = formula.replace(mark, f'<mo stretchy="false" lspace="0" rspace="0">{bar}')
    return formula


def as_markdown(docstring: str, path: str) -> str:
    """A docstring's roles as links, and its directives as fences."""

    def link(match: re.Match[str]) -> str:
        name = match[1]
        if not name.startswith(f"{PACKAGE}."):
            owner = path if match[0].startswith(":meth:") else PACKAGE
            if owner == PACKAGE and ".functional" in path:
                owner = f"{PACKAGE}.functional"
            name = f"{owner}.{name}"
        return f"[`{match[1].removeprefix(f'{PACKAGE}.')}`][{SAME_NAME.get(name, name)}]"

    def fence(kind: str, body: str) -> str:
        return f"```{kind}\n{textwrap.dedent(body).strip()}\n```\n"

    # Of the two headings only this one makes a code block of a session.
    docstring = re.sub(r"^Example:$", "Examples:", docstring, flags=re.MULTILINE)
    docstring = MATH.sub(lambda m: fence("math", " ".join(m[1].split())), docstring)
    docstring = CODE.sub(lambda m: fence(m[1], m[2]) + "\n", docstring)
    return ROLE.sub(link, docstring)


class Docstrings(griffe.Extension):  # type: ignore[misc]
    """Makes Markdown of every docstring that mkdocstrings reads."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            owner = obj.path if obj.is_class else obj.path.rpartition(".")[0]
            obj.docstring.value = as_markdown(obj.docstring.value, owner)


def math_fence(source: str, *_: Any, **__: Any) -> str:
    """The formatter of a fence named "math"."""
    return f'<div class="formula">{mathml(source)}</div>'


def on_config(config: Any) -> Any:
    """Registers the fence."""
    fences = config["mdx_configs"]["pymdownx.superfences"].setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "formula", "format": math_fence})
    return config


def help_of(command: str) -> str:
    """What ``resnet-reg COMMAND --help`` prints."""
    from resnet_reg_ext import cli

    arguments = [*command.split(), "--help"]
    printed = io.StringIO()
    with (
        redirect_stdout(printed),
        suppress(SystemExit),
        patch.dict(os.environ, {"COLUMNS": "80", "NO_COLOR": "1"}),
    ):
        cli.main(arguments)
    return f"```text\n{printed.getvalue().strip()}\n```"


def included(name: str, page: str) -> str:
    """A file of the repository, or the part of it between two marks, with links from a page."""
    file, _, part = name.partition("#")
    text = (ROOT / file).read_text(encoding="utf-8")
    if part:
        text = text.split(f"<!-- {part}:begin -->")[1].split(f"<!-- {part}:end -->")[0]

    def moved(match: re.Match[str]) -> str:
        target = (ROOT / file).parent / match[1]
        return f"]({os.path.relpath(target, (DOCS / page).parent)})"

    return re.sub(r"\]\((?!https?:|#|mailto:)([^)\s]+)\)", moved, text).strip()


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fills in what a page includes."""
    markdown = re.sub(r"<!-- cli: ?(.*?) -->", lambda m: help_of(m[1]), markdown)
    source = page.file.src_uri
    return re.sub(r"<!-- include: (\S+) -->", lambda m: included(m[1], source), markdown)
