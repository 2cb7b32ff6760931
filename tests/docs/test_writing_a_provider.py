"""The tutorial, followed to the letter in an empty directory and a fresh environment."""

import os
import re
import subprocess

import pytest

from tests.cli.processes import ROOT, environment_with
from tests.docs.markdown import DOCS, blocks
from trl_refplug.provider import ReferenceProvider
from trl_refplug.testing import ReferenceProviderTests


PAGE = "writing-a-provider.md"
COMMANDS = {"pip": "pip", "pytest": "pytest", "trl-refplug": "trl_refplug"}


def environment(directory):
    """What the shell of the tutorial runs in; nothing is looked up on an index."""
    python = environment_with(directory=directory)
    for command, module in COMMANDS.items():
        script = python.parent / command
        script.write_text(f'#!/bin/sh\nexec "{python}" -m {module} "$@"\n')
        script.chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TRL_REFPLUG_", "PYTEST_"))}
    pip = {"PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1"}
    own = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    return {**inherited, **pip, **own, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}


def flat(text):
    return re.sub(r"\s+", " ", text)


@pytest.mark.timeout(1800)
def test_the_tutorial_works_as_written(tmp_path):
    variables = environment(tmp_path / "environment")
    start = directory = tmp_path / "empty"
    directory.mkdir()
    output, done = "", []
    for block in blocks(PAGE):
        if block.mark == "file":
            assert (start / block.value).is_file(), f"{block.value} is edited and was not generated"
            (start / block.value).write_text(block.code)
        elif block.mark == "run":
            code = block.code if block.language == "bash" else f"python - <<'EOF'\n{block.code}EOF"
            shell = subprocess.run(
                ["bash", "-euc", f"{code}\npwd > '{tmp_path}/here'"],
                cwd=directory,
                env=variables,
                capture_output=True,
                text=True,
                timeout=900,
            )
            output = shell.stdout + shell.stderr
            assert (shell.returncode != 0) == (block.value == "fails"), f"{block.code}\n{output[-5000:]}"
            if shell.returncode == 0:
                directory = type(tmp_path)((tmp_path / "here").read_text().strip())
        elif block.language == "text":
            for line in block.code.splitlines():
                assert flat(line).strip() in flat(output), f"{line}\n{output[-5000:]}"
        done.append(block.mark or block.language)
    assert done.count("run") == 7
    assert done.count("file") == 3
    assert (directory / "out" / "model.safetensors").is_file()


def test_every_conformance_test_is_documented():
    documented = set(re.findall(r"^\| `(test_\w+)` \|", (DOCS / PAGE).read_text(), re.M))
    assert documented == {name for name in dir(ReferenceProviderTests) if name.startswith("test_")}


def test_every_method_of_a_provider_is_documented():
    table = (DOCS / PAGE).read_text().partition("## What a provider is asked for")[2].partition("\n## ")[0]
    documented = set(re.findall(r"`(\w+)\(", table.partition("Everything but")[0])) - {"Capabilities"}
    methods = {name for name, value in vars(ReferenceProvider).items() if callable(value) and name[0] != "_"}
    assert documented == methods - {"Options"} | {"__init__"}
