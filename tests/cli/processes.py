"""Helpers that run Python or `trl-refplug` in a process of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


ROOT = Path(__file__).parents[2]


def run_python(python: Path | str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run an interpreter that finds this source tree, with output 80 columns wide and no colors or plugin settings."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRL_REFPLUG_")}
    environment = inherited | {"PYTHONPATH": str(ROOT), "COLUMNS": "80", "NO_COLOR": "1"} | environment
    return subprocess.run([str(python), *arguments], capture_output=True, text=True, env=environment, timeout=1200)


def run_here(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run `trl-refplug` in the environment of the tests."""
    return run_python(sys.executable, "-m", "trl_refplug", *arguments, **environment)


@contextmanager
def running(*arguments: str, until: Callable[[], object], **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """Start an interpreter and wait until a condition holds. At the end of this context, the process is killed."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 600
        while not until():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        yield process
    finally:
        process.kill()


def environment_with(*packages: Path, directory: Path) -> Path:
    """Make an environment with our dependencies, and install `packages` in it with pip. Returns its interpreter."""
    venv.create(directory / "venv", with_pip=False, symlinks=os.name != "nt")
    python = directory / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    purelib = run_python(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    (Path(purelib) / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    # These are copies, because setuptools writes its build files beside the sources.
    copies = [str(shutil.copytree(package, directory / "packages" / package.name)) for package in packages]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    if packages:
        subprocess.run([*pip, "--no-build-isolation", *copies], check=True, timeout=1200)
    return python
