"""What a plugin raised, as people should be told: what and what to do in one line, and where in its own code."""

from __future__ import annotations

from types import TracebackType

from trl_refplug.errors import RefPlugError


_IMPORTERS = {"trl_refplug", "importlib", "pkgutil"}  # whose frames lead to a plugin's code


def told(error: BaseException) -> str:
    """An exception as a sentence."""
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    return text if text.endswith((".", "!", "?")) else f"{text}."


def told_with_remedy(error: BaseException, distribution: str) -> str:
    """
    What went wrong when something of a distribution was loaded, and what to do. Of the exception's traceback only what
    is in the plugin's own code is left: nothing where none of it ran, or where the exception is a finding of ours.
    """
    own = None if isinstance(error, RefPlugError) else _own_frames(error)
    if own is None:
        drop_frames(error)
    error.__traceback__ = own
    if isinstance(error, RefPlugError):
        return str(error)
    if own is None and isinstance(error, (ModuleNotFoundError, AttributeError)):
        remedy = f"The registration is stale: reinstall {distribution}, or uninstall it."
    else:
        remedy = f"Upgrade or reinstall {distribution}, or report this to its authors."
    return f"{told(error)} {remedy}"


def drop_frames(error: BaseException | None) -> None:
    """Forget the traceback of an exception, of its cause and of its context."""
    while error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        drop_frames(error.__cause__)
        error = error.__context__


def _own_frames(error: BaseException) -> TracebackType | None:
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_globals.get("__name__", "").partition(".")[0] in _IMPORTERS:
        frames = frames.tb_next
    return frames
