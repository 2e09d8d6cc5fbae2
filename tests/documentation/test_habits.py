"""Files that repeat what pyproject.toml says agree with it."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.one_torch

ROOT = Path(__file__).resolve().parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text()


def test_pre_commit_has_the_linters_of_make_lint() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    pinned = {tool for hook in hooks for tool in hook.get("additional_dependencies", [])}
    (lint,) = re.findall(r"^lint = \[(.*)\]$", PROJECT, re.MULTILINE)
    known = set(re.findall(r'"([^"]+)"', lint))
    assert pinned == {tool for tool in known if not tool.startswith("mypy")}
    (commands,) = re.findall(
        r"^lint: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    for hook in hooks:
        assert hook["entry"].removeprefix(".venv/bin/") in commands


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert f'version = "{citation["version"]}"' in PROJECT
    assert citation["version"] == importlib.metadata.version("resnet_reg_ext")
    assert f'license = "{citation["license"]}"' in PROJECT


def test_ci_runs_what_developers_run() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step.get("run", "") for step in workflow["jobs"]["test"]["steps"]]
    assert "bash .ci/run" in steps
    script = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in script
    *lines, last = re.findall(r"^(?:make|\$two) (.*)", script, re.MULTILINE)
    made = set(" ".join(lines).split())
    (beside,) = re.findall(r"^test-beside: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert made >= {"lint", "docs", *beside.split()}
    assert last == "test-main"  # its summary is the last thing printed


def test_a_bug_report_asks_for_the_installation() -> None:
    template = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text()
    form = yaml.safe_load(template)
    (info,) = (field for field in form["body"] if field["id"] == "info")
    assert "resnet-reg info" in info["attributes"]["label"]
    assert info["validations"]["required"]
