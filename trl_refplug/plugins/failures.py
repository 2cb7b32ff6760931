"""
Exceptions that plugins raise, turned into messages.

A message says in one line what went wrong and what the user can do about it. The traceback that is kept shows only the
plugin's own code.
"""

from __future__ import annotations

from types import TracebackType

from trl_refplug.errors import RefPlugError


_IMPORTERS = {"trl_refplug", "importlib", "pkgutil"}  # their frames in a traceback only lead to the plugin's code


def exception_sentence(error: BaseException) -> str:
    """The exception's type and message as one sentence, with a full stop at its end."""
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    return text if text.endswith((".", "!", "?")) else f"{text}."


def load_failure_reason(error: BaseException, distribution: str) -> str:
    """
    Say why something of a distribution could not be loaded, and what the user can do about it.

    The exception's traceback is cut down to the frames of the plugin's own code. None are left if none of its code
    ran, or if the exception is one of ours, about something we found wrong with the plugin.
    """
    own = None if isinstance(error, RefPlugError) else _own_frames(error)
    if own is None:
        clear_tracebacks(error)
    error.__traceback__ = own
    if isinstance(error, RefPlugError):
        return str(error)
    if own is None and isinstance(error, (ModuleNotFoundError, AttributeError)):
        remedy = f"The registration is stale: reinstall {distribution}, or uninstall it."
    else:
        remedy = f"Upgrade or reinstall {distribution}, or report this to its authors."
    return f"{exception_sentence(error)} {remedy}"


def clear_tracebacks(error: BaseException | None) -> None:
    """Remove the traceback of an exception, of its cause and of its context."""
    while error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        clear_tracebacks(error.__cause__)
        error = error.__context__


def _own_frames(error: BaseException) -> TracebackType | None:
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_globals.get("__name__", "").partition(".")[0] in _IMPORTERS:
        frames = frames.tb_next
    return frames
