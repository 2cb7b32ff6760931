"""Requests in flight while the caller works on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar


T = TypeVar("T")


def in_background(work: Callable[[], T]) -> Future[T]:
    """
    Run `work` on a thread of its own. The caller bounds how many there are; an executor would instead hold up the end
    of the interpreter until the last request is answered.
    """
    future: Future[T] = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except BaseException as error:  # for whoever waits, whatever it is
            future.set_exception(error)

    threading.Thread(target=run, name="refplug-request", daemon=True).start()
    return future
