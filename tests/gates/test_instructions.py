"""The native step needs no more instructions than are committed.

Where they can't be counted, or belong to another compiler, there is nothing to collect here, and
the run's header says why.
"""

from __future__ import annotations

import json

import instructions

from resnet_reg_ext.backends import native

if not instructions.why_not():

    def test_a_step_needs_the_committed_number_of_instructions() -> None:
        committed = json.loads(instructions.FIGURES.read_text())["instructions"]
        counted = instructions.measure(native._C.__file__, instructions.CASES)
        assert instructions.compare(counted, committed) == []


def test_what_is_off_by_more_than_the_slack_is_named() -> None:
    committed = {"float32": 1000, "float64": 1000, "float16": 1000, "bfloat16": 1000}
    counted = {"float32": 1029, "float64": 1031, "float16": 969, "baseline": 7}
    wrong = instructions.compare(counted, committed)
    assert [text.split(":")[0] for text in wrong] == ["baseline", "bfloat16", "float16", "float64"]
    assert "+3.1 % against the committed 1,000" in wrong[-1]


PROFILE = """\
events: Ir

ob=/usr/bin/python
fl=???
fn=call
0 5
cob=/lib/_C.so
cfi=???
cfn=step
calls=1 0
0 70
ob=/lib/_C.so
fn=step
0 40
cob=/lib/libc.so
cfn=memcpy
calls=3 0
0 20
0 10
fn=inner
0x7 100
"""


def test_only_the_modules_own_instructions_count() -> None:
    assert instructions.instructions_of("/lib/_C.so", PROFILE) == 150
    assert instructions.instructions_of("/lib/other.so", PROFILE) == 0
