"""Every planted fault is caught by the tests of the kit that name it, and by no other."""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest

from . import planted_faults


ROOT = Path(__file__).parents[2]
RANKS = "test_two_ranks"


def failures(area, junit, *, whole):
    """
    Run the tests that a fault names, or the `whole` kit, on every provider with a planted fault.

    Returns:
        The tests that failed, by provider; all tests that ran, by provider; and the messages of the failures.
    """
    faults = planted_faults.FAULTS[area]
    file = "tests/testing/planted_faults.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-W", "ignore"]
    command += [f"--junitxml={junit}"]
    for fault, tests in faults.items():
        name = f"{file}::Test{fault.__name__}"
        if whole or not tests:  # without a fault, the whole kit passes
            command.append(name)
            # Starting two processes for each fault would take an hour, so only faults that are about ranks start them.
            if RANKS not in tests and fault is not planted_faults.NoFault:
                command.append(f"--deselect={name}::{RANKS}")
        else:
            command += [f"{name}::{test}" for test in sorted(tests)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]
    failed, ran, messages = defaultdict(set), defaultdict(set), []
    for case in ElementTree.parse(junit).iter("testcase"):
        name = case.get("classname").rpartition("Test")[2]
        if case.find("skipped") is None:
            ran[name].add(case.get("name"))
        for problem in (*case.findall("failure"), *case.findall("error")):
            failed[name].add(case.get("name"))
            messages.append(f"{name}.{case.get('name')}: {problem.get('message')}\n{(problem.text or '')[-1500:]}")
    return failed, ran, "\n\n".join(messages)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["named", "whole"])
@pytest.mark.parametrize("area", planted_faults.FAULTS)
def test_each_fault_is_caught_by_the_tests_that_name_it_alone(area, whole, tmp_path):
    failed, ran, messages = failures(area, tmp_path / "report.xml", whole=whole)
    faults = {fault.__name__: tests for fault, tests in planted_faults.FAULTS[area].items()}
    assert ran.keys() == faults.keys()
    wrong = {
        name: {"missed": sorted(tests - failed[name]), "too many": sorted(failed[name] - tests)}
        for name, tests in faults.items()
        if failed[name] != tests
    }
    assert not wrong, f"{wrong}\n{messages}"


def test_each_test_of_the_kit_catches_a_fault():
    tests = {name for name in dir(planted_faults.ReferenceProviderTests) if name.startswith("test_")}
    assert tests == set().union(*(named for faults in planted_faults.FAULTS.values() for named in faults.values()))
