"""Running a request in the background while the caller goes on working."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar


T = TypeVar("T")


def in_background(work: Callable[[], T]) -> Future[T]:
    """
    Run `work` on a new thread. The caller has to limit the number of threads.

    An executor would do that, but it keeps the interpreter from exiting until the last request is answered.
    """
    future: Future[T] = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except BaseException as error:  # passed on to the thread that waits for the result
            future.set_exception(error)

    threading.Thread(target=run, name="refplug-request", daemon=True).start()
    return future
