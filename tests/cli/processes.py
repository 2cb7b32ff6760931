"""Python, and `trl-refplug`, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]


def run_python(python: Path | str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run an interpreter that finds this source tree, 80 columns wide, without colours and without plugin settings."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRL_REFPLUG_")}
    environment = inherited | {"PYTHONPATH": str(ROOT), "COLUMNS": "80", "NO_COLOR": "1"} | environment
    return subprocess.run([str(python), *arguments], capture_output=True, text=True, env=environment, timeout=300)


def run_here(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run `trl-refplug` in the environment of the tests."""
    return run_python(sys.executable, "-m", "trl_refplug", *arguments, **environment)
