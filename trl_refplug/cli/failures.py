"""
What a command says when it fails, and its exit status.

0: it did what was asked, and what it compared agrees. 1: what it compared differs. 2: it cannot be done. 130: Ctrl-C.
"""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Iterator

from trl_refplug.cli.checks import no_chat_template
from trl_refplug.cli.common import traceback_wanted
from trl_refplug.errors import PluginError, RefPlugError


DIFFERS = 1
CANNOT_BE_DONE = 2
INTERRUPTED = 130
LAUNCHED_DIFFERS = 3  # how a launched process says DIFFERS, as Python itself ends with 1 after a defect

_DATA_COLUMNS = ("prompt", "chosen", "rejected", "completion", "label")
_LOOKS_FOR_FILES = ("huggingface_hub.", "datasets.", "transformers.")  # libraries whose errors users can understand
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


def report(error: Exception) -> int:
    """
    Print what went wrong, to the error stream. Returns the exit status.

    A mistake of the user is one line. A defect of a program is shown with its traceback. `TRL_REFPLUG_TRACEBACK=1`
    shows the traceback of everything.
    """
    if was_interrupted(error):
        return INTERRUPTED
    message = in_one_line(error)
    if message is None or traceback_wanted():
        traceback.print_exception(error)
    elif isinstance(error, PluginError) and error.__cause__ is not None and error.__cause__.__traceback__ is not None:
        traceback.print_exception(error.__cause__)  # it shows the plugin's author where the plugin failed
    if message is not None:
        _print_error(message)
    return CANNOT_BE_DONE


def was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C caused this error. While a C extension is imported, it comes out as an `ImportError`."""
    return any(isinstance(cause, KeyboardInterrupt) for cause in _chain(error))


def concerns_data(error: BaseException) -> bool:
    """Whether a data set that could not be read, or a column that it lacks, caused this error."""
    return any(
        type(cause).__module__.startswith("datasets.") or (isinstance(cause, KeyError) and _names_a_column(cause))
        for cause in _chain(error)
    )


def _names_a_column(error: KeyError) -> bool:
    return bool(error.args) and error.args[0] in _DATA_COLUMNS


def in_one_line(error: BaseException) -> str | None:
    """The message for a mistake of data, paths or the machine, in one line; `None` for any other exception."""
    if isinstance(error, RefPlugError):
        return str(error)
    for cause in _chain(error):
        if message := _explained(cause):
            return message
    return None


def _explained(error: BaseException) -> str | None:
    text = " ".join(str(error).split())
    if isinstance(error, RefPlugError):
        return str(error)
    if isinstance(error, ValueError) and "chat_template" in text:
        return no_chat_template("The model")
    if isinstance(error, KeyError) and _names_a_column(error):
        return (
            f"The data have no column {error.args[0]!r}, which this trainer needs. Data formats of TRL: "
            "https://huggingface.co/docs/trl/dataset_formats."
        )
    if isinstance(error, OSError) and error.errno in _DISK_IS_FULL:
        return f"The disk is full: {text}. Make room, or choose another directory."
    if type(error).__name__ == "OutOfMemoryError":
        return f"{text.split('. ')[0]}. Use smaller batches, or a reference that needs less memory."
    if isinstance(error, OSError) or type(error).__module__.startswith(_LOOKS_FOR_FILES):
        return f"{type(error).__name__}: {text}"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _print_error(message: str) -> None:
    if not sys.stderr.isatty():
        print(f"Error: {message}", file=sys.stderr)
        return
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    console.print(f"Error: {message}", style="red")
