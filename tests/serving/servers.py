"""Servers on real sockets: in this process, because that is fast, or in another process, which can be killed."""

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

from trl_refplug.serving import Engine, ScoringServer, ServerLimits, Transport, listen, make_app

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
    limits: ServerLimits | None = None,
    port: int = 0,
    around: Callable[[Any], Any] = lambda app: app,
    **ssl: Any,
) -> Iterator[str]:
    """Serve an engine, and yield the URL. `around` can wrap the application."""
    limits = limits or ServerLimits()
    ready = threading.Event()
    with listen("127.0.0.1", port) as listener:
        app = make_app(served, key=key, limits=limits)
        server = ScoringServer(around(app), limits=limits, ready=ready.set, device_lost=app.state.device_lost, **ssl)
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
    """A transport with short timeouts, which is closed at the end of the block."""
    made = Transport(urls, **{"connect_timeout": 2.0, "read_timeout": 20.0, "deadline": 20.0, **options})
    try:
        yield made
    finally:
        made.close()


class LifespanOf:
    """An application that passes requests to `app`, and startup and shutdown to `ours`."""

    def __init__(self, ours: Any, app: Any) -> None:
        self._ours, self._app = ours, app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await (self._ours if scope["type"] == "lifespan" else self._app)(scope, receive, send)


_reserved: list[socket.socket] = []


def free_port() -> int:
    """A port that nothing listens on. It stays reserved: only a server that asks for its number can get it."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # so that the server can bind it, too
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
    """A process that runs `trl-refplug serve`. Call `wait` until it serves."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trl_refplug", "serve", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )

    def wait(self) -> str:
        """Wait until the server has printed its URL, and return that."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.match(r"serving .* at (http\S+) identity [0-9a-f]{32}$", line)
        assert found, (line, self.process.stderr and self.process.stderr.read())
        return found[1]

    def end(self, how: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal, wait for the end of the process, and return its exit status."""
        self.process.send_signal(how)
        return self.process.wait(30)

    @contextmanager
    def killed_mid_request(self, number: int, then: Callable[[], object] = lambda: None) -> Iterator[list[float]]:
        """
        Within this block, kill the server when it has received request `number` and before it can answer. Requests are
        counted from 1 over all that this process sends. Then call `then`. The list that is yielded gets the time of
        death (`time.monotonic`).
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
