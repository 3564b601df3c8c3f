"""Whatever ends the tests' process, no process that it started is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.children import PATIENCE, Children, run

ROOT = Path(__file__).resolve().parents[1]
# A child with a child of its own, which both would go on for an hour.
CHILD = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(3600)"])
print("started", flush=True)
time.sleep(3600)
"""
TESTS = """
import signal, sys, time
from tests.children import Children, interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, interrupt)
with Children() as children:
    children.start([sys.executable, "-S", "-c", sys.argv[1]])
    print("told the guard", flush=True)
    time.sleep(3600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_child_outlives_the_tests(children: Children, number: signal.Signals) -> None:
    command = [sys.executable, "-c", TESTS, CHILD]
    tests = children.start(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    # A child that the guard hasn't been told of yet survives a SIGKILL.
    assert {tests.stdout.readline() for _ in range(2)} == {"started\n", "told the guard\n"}
    tests.send_signal(number)
    # All of them hold this pipe, which ends with the last one.
    assert tests.communicate(timeout=PATIENCE)[0] == ""
    assert tests.returncode != 0


def test_a_child_is_ended_with_its_children_where_a_test_fails() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading) as told:

        def fail() -> None:
            with Children() as children:
                children.start([sys.executable, "-S", "-c", CHILD], stdout=writing)
                os.close(writing)
                assert told.readline() == "started\n"
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert told.read() == ""


def test_a_child_that_fails_is_told_with_what_it_said() -> None:
    command = [sys.executable, "-S", "-c", "import sys; print(input()); sys.exit('no such thing')"]
    with pytest.raises(AssertionError, match="exit code 1: no such thing"):
        run(command, input="some")
    answer = run(command, input="some", check=False)
    assert (answer.returncode, answer.stdout, answer.stderr) == (1, "some\n", "no such thing\n")
