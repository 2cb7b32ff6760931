"""
Running the application: uvicorn, with a deadline for the heads of requests.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from trl_refplug.serving.limits import Limits


KEEP_ALIVE = 75
"""Seconds for which an idle connection is kept: longer than clients keep theirs, so that they close first."""

_CONNECTIONS = 2048


def http_protocol(limits: Limits) -> type[asyncio.Protocol]:
    """
    Uvicorn's HTTP protocol, which waits for ever for the head of a request and for a client to take its answer, with
    deadlines for both. Bodies have theirs in the application.
    """

    class DeadlineProtocol(H11Protocol):
        _head_deadline: asyncio.TimerHandle | None = None
        _taking_deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._forget_deadline()
            else:
                self._expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget_deadline()
            super().connection_lost(exc)  # resumes writing

        def pause_writing(self) -> None:
            super().pause_writing()
            self._taking_deadline = self.loop.call_later(limits.body_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._taking_deadline is not None:
                self._taking_deadline.cancel()
                self._taking_deadline = None

        def shutdown(self) -> None:
            super().shutdown()
            if self.transport.is_closing() and not self.transport.get_write_buffer_size():
                self.transport.abort()  # closing TLS would wait for an idle client's goodbye

        def _expect_head(self) -> None:
            if self._head_deadline is None:
                self._head_deadline = self.loop.call_later(limits.head_seconds, self.transport.abort)

        def _forget_deadline(self) -> None:
            if self._head_deadline is not None:
                self._head_deadline.cancel()
                self._head_deadline = None

    return DeadlineProtocol


class Server(uvicorn.Server):
    """
    Serves an application on a socket until it is told to stop (SIGTERM, Ctrl-C, `should_exit`) or is lost, and then
    finishes what it took.

    Args:
        app: An ASGI application.
        limits ([`Limits`]): Of which the deadlines are uvicorn's part.
        ready (`Callable`): Called once, when connections are taken.
        lost (`Callable`): Whether there is no use in going on.
        ssl (`dict`): uvicorn's `ssl_*` arguments.
    """

    def __init__(
        self, app: Any, *, limits: Limits, ready: Callable[[], None], lost: Callable[[], bool], **ssl: Any
    ) -> None:
        self._ready = ready
        self._lost = lost
        super().__init__(
            uvicorn.Config(
                app,
                http=http_protocol(limits),
                ws="none",
                lifespan="on",
                log_level="warning",
                access_log=False,
                server_header=False,
                date_header=False,
                proxy_headers=False,
                limit_concurrency=_CONNECTIONS,
                timeout_keep_alive=KEEP_ALIVE,
                **ssl,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._lost()


def listen(host: str, port: int) -> socket.socket:
    """
    A listening socket; port 0 is any free one.

    Raises:
        OSError: The address is not this machine's, is taken, or may not be used.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would let two servers have one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener
