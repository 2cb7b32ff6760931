"""
The HTTP server that runs the application: uvicorn, with deadlines for slow clients.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from trl_refplug.serving.server_limits import ServerLimits


_KEEP_ALIVE = 75
"""Seconds for which an idle connection is kept. Clients keep theirs for less time, so that they close it first."""

_CONNECTIONS = 2048


def protocol_with_deadlines(limits: ServerLimits) -> type[asyncio.Protocol]:
    """
    Uvicorn's HTTP protocol with two deadlines that uvicorn does not have: for receiving the head of a request, and for
    sending an answer to a client that does not read it. The deadline for the body of a request is in the application.

    The class depends on internals of uvicorn: it overrides methods of `H11Protocol` and reads `cycle` from it. None of
    uvicorn's options limits these times (`timeout_keep_alive` only counts between requests), and an application does
    not run before a head is complete. A wrapper around the protocol would be longer, because it does not know when a
    head is complete, and it could not abort idle TLS connections at shutdown.
    """

    class DeadlineProtocol(H11Protocol):
        _head_deadline: asyncio.TimerHandle | None = None
        _answer_deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._start_head_deadline()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._cancel_head_deadline()
            else:
                self._start_head_deadline()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel_head_deadline()
            super().connection_lost(exc)  # calls resume_writing(), which cancels the other deadline

        def pause_writing(self) -> None:
            super().pause_writing()
            self._answer_deadline = self.loop.call_later(limits.body_timeout, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._answer_deadline is not None:
                self._answer_deadline.cancel()
                self._answer_deadline = None

        def shutdown(self) -> None:
            super().shutdown()
            if self.transport.is_closing() and not self.transport.get_write_buffer_size():
                self.transport.abort()  # a TLS connection would wait for the idle client to close it

        def _start_head_deadline(self) -> None:
            if self._head_deadline is None:
                self._head_deadline = self.loop.call_later(limits.head_timeout, self.transport.abort)

        def _cancel_head_deadline(self) -> None:
            if self._head_deadline is not None:
                self._head_deadline.cancel()
                self._head_deadline = None

    return DeadlineProtocol


class ScoringServer(uvicorn.Server):
    """
    Serves an application on a socket until it is stopped (by SIGTERM, Ctrl-C or `should_exit`) or the device is lost.
    Then it answers the requests that it has accepted, and ends.

    Args:
        app: An ASGI application.
        limits ([`ServerLimits`]): Only `head_timeout` and `body_timeout` are used here.
        ready (`Callable`): Called once, when the server accepts connections.
        device_lost (`Callable`): Returns whether the device has stopped working for good.
        ssl (`dict`): The `ssl_*` arguments of uvicorn.
    """

    def __init__(
        self, app: Any, *, limits: ServerLimits, ready: Callable[[], None], device_lost: Callable[[], bool], **ssl: Any
    ) -> None:
        self._ready = ready
        self._device_lost = device_lost
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol_with_deadlines(limits),
                ws="none",
                lifespan="on",
                log_level="warning",
                access_log=False,
                server_header=False,
                date_header=False,
                proxy_headers=False,
                limit_concurrency=_CONNECTIONS,
                timeout_keep_alive=_KEEP_ALIVE,
                **ssl,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._device_lost()


def listen(host: str, port: int) -> socket.socket:
    """
    Open a socket for the server. Port 0 stands for any free port.

    Raises:
        OSError: The address does not belong to this machine, is in use, or is not allowed.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # on Windows this would let two servers use the same port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener
