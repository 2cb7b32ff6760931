"""What all commands have in common: they start fast, and they show an error as a message."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import trl_refplug
from tests.cli.processes import run_here, run_python, running


COMMAND = """
from trl_refplug import OptionsError, PluginError
from trl_refplug.cli import main

@main.app.command()
def fail():
    {body}

main.main()
"""


def run_command(body: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Add a command with this body to the application, and run it."""
    return run_python(sys.executable, "-c", COMMAND.format(body=body), "fail", **environment)


def test_help_and_version() -> None:
    completed = run_here("--help")
    assert completed.returncode == 0
    assert "plugins" in completed.stdout
    assert run_here("--version").stdout == f"trl-refplug {trl_refplug.__version__}\n"


def test_every_command_is_in_a_panel() -> None:
    panels = re.findall(r"─ (.+?) ─", run_here("--help").stdout)
    assert len(panels) == 5
    assert panels[:2] == ["Options", "Train"]
    assert "Commands" not in panels  # typer puts commands without a panel in this one


def test_mistyped_command() -> None:
    completed = run_here("pluginss")
    assert completed.returncode == 2
    assert "Did you mean 'plugins'" in completed.stderr


def test_error_is_a_message() -> None:
    message = "Found [red]7[/red]; expected 8. " + "Long messages are not wrapped, so that paths can be copied. " * 3
    completed = run_command(f"raise OptionsError({message!r})")
    assert completed.returncode == 2
    assert completed.stdout == ""
    assert completed.stderr == f"Error: {message}\n"


def test_error_with_traceback_on_request() -> None:
    completed = run_command("raise OptionsError('seven')", TRL_REFPLUG_TRACEBACK="1")
    assert completed.returncode == 2
    assert "Traceback (most recent call last)" in completed.stderr
    assert completed.stderr.rstrip().endswith("OptionsError: seven\nError: seven")


def test_error_of_a_plugin_comes_with_the_plugins_traceback() -> None:
    completed = run_command("""
    try:
        1 / 0
    except ZeroDivisionError as error:
        raise PluginError("broken") from error""")
    assert completed.returncode == 2
    assert "ZeroDivisionError: division by zero" in completed.stderr
    assert completed.stderr.endswith("Error: broken\n")
    assert "PluginError" not in completed.stderr


def test_warning_is_one_line() -> None:
    completed = run_command("""
    import warnings
    from trl_refplug import RefPlugWarning
    from trl_refplug.store import StoreWarning
    warnings.warn("a plugin is broken", RefPlugWarning)
    warnings.warn("a shard is damaged", StoreWarning)
    warnings.warn("not ours", UserWarning)""")
    *ours, theirs = completed.stderr.splitlines()[:3]
    assert ours == ["Warning: a plugin is broken", "Warning: a shard is damaged"]
    assert theirs.endswith("UserWarning: not ours")


def test_other_exceptions_are_not_hidden() -> None:
    completed = run_command("raise ValueError('a defect')")
    assert completed.returncode == 2  # 1 would mean that what was compared differs
    assert "Traceback" in completed.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_interrupted(tmp_path: Path) -> None:
    body = f"""
    import pathlib, time
    pathlib.Path({str(tmp_path / "started")!r}).touch()
    while True:
        time.sleep(0.1)  # a signal that comes just before a sleep is seen only after it, so each sleep is short
"""
    with running("-c", COMMAND.format(body=body), "fail", until=(tmp_path / "started").exists) as process:
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in stderr


def test_interrupted_while_a_c_extension_is_imported() -> None:
    completed = run_command("""
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as interrupt:
        raise ImportError("initialization failed") from interrupt""")
    assert completed.returncode == 130
    assert completed.stderr == ""


HEAVY = "{'torch', 'transformers', 'trl', 'peft', 'accelerate', 'datasets', 'numpy'}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["dpo", "--help"],
        ["compare", "--help"],
        ["plugins"],
        ["plugins", "--json"],
        ["--show-completion", "bash"],
    ],
)
def test_starts_fast(arguments: list[str]) -> None:
    code = f"""
import sys
from trl_refplug.cli.main import main
try:
    main()
finally:
    print("heavy:", sorted({HEAVY} & set(sys.modules)), file=sys.stderr)
"""
    completed = run_python(sys.executable, "-c", code, *arguments)
    assert completed.returncode == 0, completed.stderr
    assert completed.stderr.splitlines()[-1] == "heavy: []"
