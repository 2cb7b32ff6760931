"""Servers on real sockets: of this process, for speed, and processes of their own, to be killed."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl_refplug.serving.app import make_app
from trl_refplug.serving.engine import Engine
from trl_refplug.serving.http_server import Server, listen
from trl_refplug.serving.limits import Limits
from trl_refplug.serving.transport import Transport

from .. import tiny


ROOT = Path(__file__).parents[2]


def engine(architecture: str = "llama", seed: int = 0, *, scoring: Any = "packed", **options: Any) -> Engine:
    """An engine with a tiny model and the tokenizer of the tests."""
    model = tiny.model(architecture, seed).eval()
    return Engine(model, architecture, scoring=scoring, tokenizer=tiny.tokenizer(), **options)


@contextmanager
def serving(
    served: Engine,
    *,
    key: str | None = None,
    limits: Limits | None = None,
    port: int = 0,
    around: Callable[[Any], Any] = lambda app: app,
    **ssl: Any,
) -> Iterator[str]:
    """The URL at which an engine is served; `around` wraps the application."""
    limits = limits or Limits()
    ready = threading.Event()
    with listen("127.0.0.1", port) as listener:
        app = make_app(served, key=key, limits=limits)
        server = Server(around(app), limits=limits, ready=ready.set, lost=app.state.lost, **ssl)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        assert ready.wait(30)
        try:
            yield f"{'https' if ssl else 'http'}://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@contextmanager
def transport(*urls: str, **options: Any) -> Iterator[Transport]:
    """A transport that is closed at the end, with timeouts for tests."""
    made = Transport(urls, **{"connect_timeout": 2.0, "read_timeout": 20.0, "deadline": 20.0, **options})
    try:
        yield made
    finally:
        made.close()


class LifespanOf:
    """`app` for requests, and the start and end of `ours`."""

    def __init__(self, ours: Any, app: Any) -> None:
        self._ours, self._app = ours, app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await (self._ours if scope["type"] == "lifespan" else self._app)(scope, receive, send)


_reserved: list[socket.socket] = []


def free_port() -> int:
    """A port that nothing listens on, and that nobody is given from now on; only who asks for it by number gets it."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # so that a server that sets it, too, can bind it
    reserved.bind(("127.0.0.1", 0))
    _reserved.append(reserved)
    port: int = reserved.getsockname()[1]
    return port


SENDING, SENT = "send_request_headers.started", "send_request_body.complete"


@contextmanager
def watched(act: Callable[[str], None]) -> Iterator[None]:
    """Call `act` with each event of a request of this process, as it happens: `SENDING`, `SENT` and others."""

    class Watcher(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            act(record.getMessage().split(" ")[0])

    events, watcher = logging.getLogger("httpcore.http11"), Watcher()
    level = events.level
    events.addHandler(watcher)
    events.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        events.removeHandler(watcher)
        events.setLevel(level)


class ServerProcess:
    """`trl-refplug serve` in a process of its own; `wait` until it serves."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trl_refplug", "serve", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )

    def wait(self) -> str:
        """The URL, once the server says it."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.match(r"serving .* at (http\S+) identity [0-9a-f]{32}$", line)
        assert found, (line, self.process.stderr and self.process.stderr.read())
        return found[1]

    def end(self, how: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal and wait; the exit status."""
        self.process.send_signal(how)
        return self.process.wait(30)

    @contextmanager
    def killed_mid_request(self, number: int, then: Callable[[], object] = lambda: None) -> Iterator[list[float]]:
        """
        While this lasts, the request of that number, counted from 1 over all that this process sends, is taken by the
        server's machine, and the server is killed before it can answer; `then` comes right after. Gives a list that
        gets the time of death (`time.monotonic`).
        """
        died: list[float] = []
        asked = 0

        def act(event: str) -> None:
            nonlocal asked
            if event == SENDING:
                asked += 1
                if asked == number:
                    self.process.send_signal(signal.SIGSTOP)
                    os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)
            elif event == SENT and asked >= number and not died:
                self.end()
                died.append(time.monotonic())
                then()

        with watched(act):
            yield died

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()
