"""A run in a process of its own: its peak memory is its own, and what it breaks is not the next one's."""

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
from typing import TYPE_CHECKING, Any

from trl_refplug.compare.contenders import Contender
from trl_refplug.compare.run import Job, Run


if TYPE_CHECKING:
    from trl_refplug.demo.job import Step

LOG = "log.txt"


class RunFailedError(Exception):
    """A run ended without a result. The message is its own error."""


def finished_run(job_facts: dict[str, Any], contender: Contender, folder: Path) -> Run | None:
    """An earlier run of the same job with the same provider, options, versions and files."""
    found = Run.load(folder)
    return found if found and found.contender.folder == contender.folder and found.facts == job_facts else None


def run_apart(
    job: Job, contender: Contender, folder: Path, on_phase: Callable[[str], None], on_step: Callable[[Step], None]
) -> Run:
    """
    Run the job with `contender` in a new process. What was in `folder` is replaced.

    Raises:
        RunFailedError: The run raised, or its process died. What it printed is in `folder / "log.txt"`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    spawn = multiprocessing.get_context("spawn")
    receiving, sending = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_work, args=(sending, job, contender, folder), name=contender.label)
    # Ctrl-C is ours to handle, from the first moment of the process, which inherits that it is ignored
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        sending.close()  # ours; the end of the process is then the end of the pipe
        return _received(receiving, on_phase, on_step)
    except EOFError:
        process.join()
        raise RunFailedError(_death(process.exitcode)) from None
    except KeyboardInterrupt:
        process.terminate()
        raise
    finally:
        process.join(timeout=10)
        process.kill()  # of no effect on one that has ended


def _received(receiving: Connection, on_phase: Callable[[str], None], on_step: Callable[[Step], None]) -> Run:
    while True:
        try:
            kind, content = receiving.recv()
        except OSError:  # the process ended in the middle of a message
            raise EOFError from None
        if kind == "phase":
            on_phase(content)
        elif kind == "step":
            on_step(content)
        elif kind == "finished":
            return content  # type: ignore[no-any-return]
        else:
            raise RunFailedError(content)


def _work(sending: Connection, job: Job, contender: Contender, folder: Path) -> None:
    """What the new process does."""
    from trl_refplug.compare.run import run

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Windows does not pass it on
    # How the parent ends this process: in order, which leaves no semaphores behind
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    try:
        finished = run(
            job,
            contender,
            folder,
            lambda phase: sending.send(("phase", phase)),
            lambda step: sending.send(("step", step)),
        )
    except Exception as error:
        traceback.print_exc()
        sending.send(("failed", f"{type(error).__name__}: {error}"))
    else:
        sending.send(("finished", finished))


def _death(exitcode: int | None) -> str:
    if exitcode == -9:  # SIGKILL
        return "its process was killed, most likely because memory ran out"
    return f"its process ended with exit status {exitcode}"
