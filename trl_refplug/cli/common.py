"""What several commands share. It is imported before `--help`, so it imports nothing slow."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Literal

import typer

from trl_refplug.errors import ConfigurationError, RefPlugWarning


if TYPE_CHECKING:
    import torch

Dtype = Literal["float32", "bfloat16", "float16"]


def torch_dtype(name: Dtype) -> torch.dtype:
    """The torch dtype of that name. This imports torch."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def traceback_wanted() -> bool:
    """Whether the user asked for tracebacks, with `TRL_REFPLUG_TRACEBACK=1`."""
    return os.environ.get("TRL_REFPLUG_TRACEBACK", "0") not in ("", "0")


def make_output_directory(option: str, path: Path) -> None:
    """
    Create a directory for a command's results, and check that files can be written to it.

    Raises:
        ConfigurationError: They cannot. The message names the option that the path was given with.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=path).close()
    except OSError as error:
        raise ConfigurationError(f"{option} {path} cannot be written to: {error}") from None


@contextmanager
def exit_on_interrupt(message: str, *, err: bool = False) -> Iterator[None]:
    """Inside this context, Ctrl-C ends the command with exit code 130 and a message, which `err` sends to stderr."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\nInterrupted. {message}", err=err)
        raise typer.Exit(130) from None


_python_format = warnings.formatwarning


def show_own_warnings_in_one_line() -> None:
    """Show the warnings of this package without the place in the code, which would tell a user nothing."""
    warnings.formatwarning = _formatted_warning


def _formatted_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
    """Format a warning of this package as one line, and any other as Python does."""
    if issubclass(category, RefPlugWarning):
        return f"Warning: {message}\n"
    return _python_format(message, category, *place, **more)
