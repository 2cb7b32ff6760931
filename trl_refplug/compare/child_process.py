"""Runs the job in a process of its own, which measures its peak memory alone and whose failure ends no other run."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from trl_refplug.compare.job import Job, Run, Step
from trl_refplug.compare.provider_choice import ProviderChoice


LOG = "log.txt"


class RunFailedError(Exception):
    """A run ended without a result. The message is the error of that run."""


def finished_run(facts: dict[str, Any], choice: ProviderChoice, folder: Path) -> Run | None:
    """Load the record in `folder`, if it is of the same provider, options, job, versions and files."""
    found = Run.load(folder)
    return found if found and found.choice.folder == choice.folder and found.facts == facts else None


def run_in_child(
    job: Job, choice: ProviderChoice, folder: Path, on_phase: Callable[[str], None], on_step: Callable[[Step], None]
) -> Run:
    """
    Run the job in a new process. Whatever was in `folder` is replaced.

    The arguments are those of [`run_job`]. `folder` need not exist.

    Raises:
        RunFailedError: The run raised an exception, or its process died. What it printed is in `folder / "log.txt"`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    spawn = multiprocessing.get_context("spawn")
    receiving, sending = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_child, args=(sending, job, choice, folder), name=choice.label)
    # This process handles Ctrl-C for both. The child inherits that the signal is ignored, so it ignores it from its
    # first moment on.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        sending.close()  # the child then holds the only sending end, so when the child ends the pipe ends
        return _receive(receiving, on_phase, on_step)
    except EOFError:
        process.join()
        raise RunFailedError(_cause_of_death(process.exitcode)) from None
    except KeyboardInterrupt:
        process.terminate()
        raise
    finally:
        process.join(timeout=10)
        process.kill()  # this does nothing if the process has ended


def _receive(receiving: Connection, on_phase: Callable[[str], None], on_step: Callable[[Step], None]) -> Run:
    """Pass on what the child reports, until it reports its end."""
    while True:
        try:
            kind, content = receiving.recv()
        except OSError:  # the child ended in the middle of a message
            raise EOFError from None
        if kind == "phase":
            on_phase(content)
        elif kind == "step":
            on_step(content)
        elif kind == "finished":
            return content  # type: ignore[no-any-return]
        else:
            raise RunFailedError(content)


def _child(sending: Connection, job: Job, choice: ProviderChoice, folder: Path) -> None:
    """What the new process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows a child does not inherit this
    # The parent ends this process with SIGTERM. An orderly exit leaves no semaphores behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    try:
        # This imports torch, whose messages belong in the log, so it comes only now.
        from trl_refplug.compare.training import run_job

        finished = run_job(
            job,
            choice,
            folder,
            lambda phase: sending.send(("phase", phase)),
            lambda step: sending.send(("step", step)),
        )
    except Exception as error:
        traceback.print_exc()
        sending.send(("failed", f"{type(error).__name__}: {error}"))
    else:
        sending.send(("finished", finished))


def _cause_of_death(exitcode: int | None) -> str:
    if exitcode == -9:  # SIGKILL
        return "its process was killed, most likely because memory ran out"
    return f"its process ended with exit status {exitcode}"
