"""Threads must not write to the same counter, scratch memory or rows at the same time."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("two_threads.cpp")

pytestmark = pytest.mark.one_torch


class Race(NamedTuple):
    """A bug to plant, the program's argument that shows it, and the line that it shows in."""

    argument: str
    file: str
    old: str
    new: str
    where: str = ""  # in the program; else in the file


ATOMIC = "__atomic_fetch_add({}, zeros, __ATOMIC_RELAXED)"
WRITE = "theirs[row * width] = 1.0f;"
RACES = {
    "zeros of elements": Race(
        "elements", "launch.cpp", ATOMIC.format("o.num_zeros"), "*o.num_zeros += zeros"
    ),
    "zeros of rows": Race(
        "rows", "row_launch.cpp", ATOMIC.format("num_zeros"), "*num_zeros += zeros"
    ),
    "scratch of rows": Race(
        "scratch", "row_launch.cpp", "scratch.data() + thread * scratch_size", "scratch.data()",
        WRITE,
    ),
    "pieces of rows": Race(
        "rows", "row_launch.cpp", "std::min(begin + rows, set.rows)",
        "std::min(begin + rows + 1, set.rows)", WRITE,
    ),
}  # fmt: skip


def build(folder: Path, races: Iterable[Race]) -> Path:
    """The program with the launchers as they are, or with bugs."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc, ignore=shutil.ignore_patterns("__pycache__"))
    for race in races:
        path = csrc / "cpu" / race.file
        source = path.read_text()
        assert source.count(race.old) == 1, "the edit no longer applies"
        path.write_text(source.replace(race.old, race.new))
    program = folder / "two_threads"
    sources = [csrc / "cpu" / name for name in ("launch.cpp", "row_launch.cpp", "plan.cpp")]
    flags = ["-std=c++17", "-O1", "-g1", "-fopenmp", "-fsanitize=thread", f"-I{csrc}"]
    subprocess.run(["c++", *flags, *sources, PROGRAM, "-ldl", "-o", program], check=True)
    return program


def has_race(program: Path, race: Race) -> bool:
    """Whether ThreadSanitizer sees it. It sees no end of a parallel region: one line is looked at.

    Reports end with a summary that names the line.
    """
    result = subprocess.run([program, race.argument], capture_output=True, text=True, check=False)
    assert "stepped" in result.stdout, result.stderr
    path = PROGRAM if race.where else ROOT / "csrc" / "cpu" / race.file
    source = path.read_text()
    line = source[: source.index(race.where or race.old)].count("\n") + 1
    summaries = [text for text in result.stderr.splitlines() if text.startswith("SUMMARY")]
    return any(f"{path.name}:{line} " in summary for summary in summaries)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Without bugs, and with all of them: each shows in a line or a run of its own."""
    return {
        planted: build(tmp_path_factory.mktemp("threads"), RACES.values() if planted else ())
        for planted in (False, True)
    }


@pytest.mark.parametrize("planted", [False, True])
@pytest.mark.parametrize("name", RACES)
def test_threads_do_not_write_to_the_same_place(
    name: str, planted: bool, programs: dict[bool, Path]
) -> None:
    assert has_race(programs[planted], RACES[name]) == planted
