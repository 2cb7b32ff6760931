"""
HTTP to one or several equal servers: kept connections, timeouts, retries, failover.

What comes back is only passed on once the caller's `parse` has accepted it. Connection errors, answers that `parse`
finds damaged, 408, 429 and 5xx are tried again, elsewhere first where there is more than one server, then with growing
pauses, until the deadline. Anything else is an error at once.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
import tenacity

from trl_refplug.errors import RemoteError
from trl_refplug.serving.failover import Server, Servers
from trl_refplug.serving.http_errors import (
    DamagedAnswerError,
    UnreachableError,
    described,
    reason_of,
    refused,
    unreachable,
    untrusted,
)


logger = logging.getLogger("trl_refplug")

T = TypeVar("T")

_KEEP_ALIVE = 60  # seconds; less than servers do, so that no request meets a connection that is being closed
_LONGEST_PAUSE = 60.0  # seconds, whatever it asks for: a proxy's idea of when it will be back must not end the run
_NOT_NEEDED = ("accept", "accept-encoding", "connection", "user-agent")  # 100 bytes in every request


class _AttemptError(Exception):
    """One attempt has failed, and another may not. `pause` is how many seconds the server asks to be left alone."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


@dataclass
class TransportStats:
    """
    Args:
        retries (`int`): Attempts that failed and were made again.
        bytes_sent (`int`), bytes_received (`int`): Of answered requests, with HTTP's own lines.
    """

    retries: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    lock: Any = field(default_factory=threading.Lock, repr=False)


class Transport:
    """
    Requests to whichever server has the least to do. Safe to use from any number of threads, and after a fork.

    Args:
        urls (`Sequence[str]`): Of equal servers.
        key (`str`, *optional*): Bearer token. In no message, log or `repr`.
        connect_timeout (`float`), read_timeout (`float`): Seconds to connect, and to wait for an answer.
        deadline (`float`): Seconds after which a request that was not answered is an error.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        key: str | None = None,
        connect_timeout: float = 5.0,
        read_timeout: float = 120.0,
        deadline: float = 300.0,
    ) -> None:
        self.stats = TransportStats()
        self._servers = Servers(urls, longest_pause=deadline / 5)
        self._key = key
        self._timeout = httpx.Timeout(read_timeout, connect=connect_timeout)
        self._deadline = deadline
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._client: httpx.Client | None = None
        self._begin()

    def __repr__(self) -> str:
        return f"Transport({', '.join(self.urls)})"

    @property
    def urls(self) -> list[str]:
        """The servers."""
        return [server.url for server in self._servers.all]

    def send(
        self,
        method: str,
        path: str,
        parse: Callable[[httpx.Response], T],
        *,
        content: bytes | None = None,
        content_type: str | None = None,
        url: str | None = None,
        deadline: float | None = None,
    ) -> T:
        """
        Make a request until it is answered.

        Args:
            method (`str`), path (`str`), content (`bytes`), content_type (`str`): The request.
            parse (`Callable`): Makes the result of a response with status 200; raises [`DamagedAnswerError`].
            url (`str`, *optional*): The only server to ask.
            deadline (`float`, *optional*): Seconds, instead of the transport's own.

        Raises:
            RemoteError: The request was refused, or not answered before the deadline.
            ReferenceMismatchError: The server has another reference than the one asked for.
        """
        if self._process != os.getpid():
            self._begin()
        seconds = self._deadline if deadline is None else deadline
        servers = [server for server in self._servers.all if url is None or server.url == url]
        ends = time.monotonic() + seconds
        last: Server | None = None

        def attempt() -> T:
            nonlocal last
            last = self._servers.take(servers)
            try:
                result = self._attempt(last, method, path, parse, content, content_type, ends)
            except _AttemptError as error:
                self._servers.failed(last, error.pause)
                raise
            finally:
                self._servers.give_back(last)
            self._servers.answered(last)
            return result

        def wait(state: tenacity.RetryCallState) -> float:
            return max(0.0, min(server.not_before for server in servers) - time.monotonic())

        def stop(state: tenacity.RetryCallState) -> bool:
            # A pause that would end after the deadline is not made
            return self._closing.is_set() or time.monotonic() + state.upcoming_sleep >= ends

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_AttemptError),
            wait=wait,
            stop=stop,
            sleep=lambda length: self._closing.wait(length),  # type: ignore[arg-type]
            before_sleep=lambda state: self._note(state, last),
            reraise=True,
        )
        try:
            return retrying(attempt)
        except _AttemptError as error:
            if self._closing.is_set():
                raise RemoteError("The connection to the reference server was closed.") from None
            attempts = f"{retrying.statistics.get('attempt_number', 1)} times "
            urls = [server.url for server in servers]
            raise unreachable(f"{method} {path}", seconds, urls, attempts, f"{last}: {error}") from error.__cause__

    def each(self, method: str, path: str, parse: Callable[[httpx.Response], T]) -> dict[str, T]:
        """
        Ask every server, until one has answered. Those that cannot be reached by then are left out.

        Returns:
            `dict[str, T]`: What they answered, by URL; at least one.

        Raises:
            RemoteError: None could be reached before the deadline, or one refuses.
        """
        if len(self.urls) == 1:
            return {url: self.send(method, path, parse) for url in self.urls}
        ends = time.monotonic() + self._deadline
        found: dict[str, T] = {}
        while not found:
            for url in self.urls:
                try:
                    found[url] = self.send(method, path, parse, url=url, deadline=self._timeout.connect)
                except UnreachableError as error:
                    if time.monotonic() >= ends and not found:
                        what = f"{method} {path}"
                        raise unreachable(what, self._deadline, self.urls, "", error.last) from error.__cause__
                    logger.warning("Reference server %s. It is tried again when it is needed.", error.last)
        return found

    def close(self) -> None:
        """End waiting and retries, and close all connections. May be called more than once."""
        if self._process != os.getpid():
            self._begin()
        self._closing.set()
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _begin(self) -> None:
        """Start anew in this process. A fork must not use its parent's sockets, and has its locks as they were."""
        self._process = os.getpid()
        before, self._closing = self._closing, threading.Event()
        if before.is_set():
            self._closing.set()
        self._lock, self.stats.lock = threading.Lock(), threading.Lock()
        self._client = None
        self._servers.begin()

    # One attempt

    def _attempt(
        self,
        server: Server,
        method: str,
        path: str,
        parse: Callable[[httpx.Response], T],
        content: bytes | None,
        content_type: str | None,
        ends: float,
    ) -> T:
        client = self._open()
        headers = {"content-type": content_type} if content_type else {}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        request = client.build_request(method, server.url + path, content=content, headers=headers)
        for name in _NOT_NEEDED:
            request.headers.pop(name, None)
        left = max(ends - time.monotonic(), 0.1)
        request.extensions["timeout"] = {
            name: min(value, left) for name, value in self._timeout.as_dict().items() if value is not None
        }
        try:
            response = client.send(request, stream=True)
            with closing(response):
                response.stream = _Timely(response.stream, ends)
                response.read()
            if response.status_code in (408, 429) or response.status_code >= 500:
                raise self._later(response)
            if response.status_code != 200:
                raise refused(server.url, path, response)
            result = parse(response)
        except (httpx.RequestError, DamagedAnswerError) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise untrusted(server.url, error) from None
            raise _AttemptError(described(error)) from error
        except RuntimeError:  # of a client that another thread has closed
            if not self._closing.is_set():
                raise
            raise RemoteError("The connection to the reference server was closed.") from None
        self._count(request, response)
        return result

    def _open(self) -> httpx.Client:
        with self._lock:
            if self._closing.is_set():
                raise RemoteError("The connection to the reference server is closed.")
            if self._client is None:
                self._client = httpx.Client(
                    limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE), follow_redirects=False
                )
            return self._client

    @staticmethod
    def _later(response: httpx.Response) -> _AttemptError:
        seconds = response.headers.get("retry-after", "")
        pause = min(float(seconds), _LONGEST_PAUSE) if seconds.isdecimal() else 0.0
        return _AttemptError(f"it answered {response.status_code}{reason_of(response)}", pause)

    def _count(self, request: httpx.Request, response: httpx.Response) -> None:
        sent, received = _size(request.headers, request.content), _size(response.headers, response.content)
        with self.stats.lock:
            self.stats.bytes_sent += sent + len(f"{request.method}  HTTP/1.1\r\n") + len(request.url.raw_path)
            self.stats.bytes_received += received + len(f"HTTP/1.1 200 {response.reason_phrase}\r\n")

    def _note(self, state: tenacity.RetryCallState, server: Server | None) -> None:
        with self.stats.lock:
            self.stats.retries += 1
        assert state.outcome is not None
        logger.warning(
            "Reference server %s: %s. Trying again in %.1f s.", server, state.outcome.exception(), state.upcoming_sleep
        )


class _Timely(httpx.SyncByteStream):
    """The body of an answer, which has to be there by then: a timeout to read is one for each part of it."""

    def __init__(self, stream: Any, ends: float) -> None:
        self._stream, self._ends = stream, ends

    def __iter__(self) -> Iterator[bytes]:
        for part in self._stream:
            if time.monotonic() > self._ends:
                raise httpx.ReadTimeout("it came too slowly")
            yield part

    def close(self) -> None:
        self._stream.close()


def _size(headers: httpx.Headers, content: bytes) -> int:
    return sum(len(name) + len(value) + 4 for name, value in headers.raw) + 2 + len(content)
