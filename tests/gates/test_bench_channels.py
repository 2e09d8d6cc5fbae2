"""The figures of docs/channels.md are those of the committed JSON, and computed right."""

from __future__ import annotations

import pytest

from bench import ROOT, channels_report, markdown

pytestmark = pytest.mark.one_torch

WAYS = ("eager", "folded", "onnxruntime")


def model(name: str, factor: float) -> dict[str, object]:
    took = {way: {"1": 80.0 / factor, "8": 640.0 / factor} for way in WAYS}
    return {
        "name": name,
        "parameters": 23_000_000,
        "multiply_adds": 4_000_000_000,
        "milliseconds": took,
    }


def run(variant: str, seed: int, accuracy: float, seconds: float) -> dict[str, object]:
    return {
        "variant": variant,
        "seed": seed,
        "test_accuracy": accuracy,
        "cpu_seconds": seconds,
    }


RESULTS = {
    "runs": [
        run("dense", 0, 0.9, 100),
        run("0.5", 0, 0.8, 50),
        run("dense", 1, 0.7, 100),
        run("0.5", 1, 0.9, 30),
    ],
    "latency": {
        "models": [model("dense, seed 0", 1), model("0.5, seed 0", 2), model("0.5, seed 1", 4)],
        "image_size": 224,
        "threads": 1,
        "rounds": 3,
    },
    "run": {
        "image_size": 32,
        "epochs": 4,
        "batch_size": 20,
        "lr": 0.1,
        "weight_decay": 0,
        "momentum": 0,
    },
    "conditions": "ResNet-50 from scratch",
    "verdicts": ["0.5 against dense: test accuracy: higher (+0.1 ± 0.05)"],
    "machine": {"cpu": "a processor", "versions": {"torch": "2"}},
    "date": "today",
}


def test_the_page_has_the_committed_figures() -> None:
    page = (ROOT / "docs" / "channels.md").read_text(encoding="utf-8")
    figures = channels_report.read(ROOT / "docs" / "results" / "channels")
    assert markdown.with_block(page, "channels", channels_report.block(figures)) == page


def test_tables_and_plot(tmp_path) -> None:
    dense, half = channels_report.summary(RESULTS)
    assert dense["accuracy"] == [0.9, 0.7]
    assert dense["onnxruntime 8"] == 640
    assert half["eager 1 ratio"] == pytest.approx(3)  # the mean of 2 and 4
    text = channels_report.block({"digits": RESULTS})
    assert "| 50 % | 0.850 ± 0.071 | 4.00 G | 23.00 M | 0.40 of dense |" in text
    assert "- 50 % off against dense: test accuracy: higher (+0.1 ± 0.05)." in text
    runs = [{"asked": 0.5, "share": share, "test_accuracy": 0.9} for share in (0.5, 0.4987, 0.502)]
    target = {**RESULTS, "runs": runs, "channels": 11456}
    text = channels_report.block({"digits": RESULTS, "target": target})
    assert "| 50 % | 50.00 %, 49.87 %, 50.20 % | 0.20 points | 0.900 ± 0.000 |" in text
    pytest.importorskip("matplotlib")
    drawn = channels_report._draw({"digits": RESULTS, "frontier": RESULTS}, tmp_path / "a.svg")
    assert "50 % off" in drawn.read_text()
