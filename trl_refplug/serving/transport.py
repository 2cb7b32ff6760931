"""
HTTP requests to one or several equal servers, with persistent connections, timeouts, retries and failover.

A request is tried again after a connection error, after an answer that the caller's `parse` finds damaged, and after
status 408, 429 or 5xx: first at another server if there is one, then with growing pauses, until the deadline. Every
other error ends the request at once.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import tenacity

from trl_refplug.errors import RemoteError
from trl_refplug.serving.endpoints import Endpoint, EndpointPool
from trl_refplug.serving.http_errors import (
    DamagedAnswerError,
    UnreachableError,
    certificate_error,
    describe_error,
    reason_in,
    refusal_error,
    unreachable_error,
)


logger = logging.getLogger("trl_refplug")

T = TypeVar("T")

_KEEP_ALIVE = 60
"""Seconds for which an idle connection is kept. Servers keep it for longer, so that they do not close one in use."""
_MAX_RETRY_AFTER = 60.0
"""The longest pause, in seconds, that a server can ask for. A proxy may ask for one that would end the run."""
_UNNEEDED_HEADERS = (
    "accept",
    "accept-encoding",
    "connection",
    "user-agent",
)  # these would add 100 bytes to every request


class _AttemptError(Exception):
    """An attempt has failed, and another may succeed. `retry_after` is the pause that the server asks for (s)."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


@dataclass
class TransportStats:
    """
    What a transport has done so far.

    Args:
        retries (`int`): Number of attempts that failed and were followed by another one.
        bytes_sent (`int`), bytes_received (`int`): Size of all answered requests and their answers, with headers.
    """

    retries: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


class Transport:
    """
    Sends each request to the server with the fewest requests in flight. It can be used from any number of threads, and
    after a fork.

    Args:
        urls (`Sequence[str]`): The addresses of equal servers.
        key (`str`, *optional*): Bearer token. It is in no message, log or `repr`.
        connect_timeout (`float`): Seconds to wait for a connection.
        read_timeout (`float`): Seconds to wait for an answer.
        deadline (`float`): Seconds after which a request that is not answered raises an error.
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
        self._pool = EndpointPool(urls, max_pause=deadline / 5)
        self._key = key
        self._timeout = httpx.Timeout(read_timeout, connect=connect_timeout)
        self._deadline = deadline
        self._closing = threading.Event()
        self._client: httpx.Client | None = None
        self._reset_for_this_process()

    def __repr__(self) -> str:
        return f"Transport({', '.join(self.urls)})"

    @property
    def urls(self) -> list[str]:
        """The addresses of the servers."""
        return [endpoint.url for endpoint in self._pool.endpoints]

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
        Send a request until it is answered.

        Args:
            method (`str`), path (`str`), content (`bytes`), content_type (`str`): The request.
            parse (`Callable`): Turns a response with status 200 into the result. If it raises [`DamagedAnswerError`],
                the request is sent again.
            url (`str`, *optional*): If given, only this server is asked.
            deadline (`float`, *optional*): Seconds to wait, in place of the transport's own deadline.

        Raises:
            RemoteError: The request was refused, or not answered before the deadline.
            ReferenceMismatchError: The server has another reference than the one asked for.
        """
        if self._process != os.getpid():
            self._reset_for_this_process()
        seconds = self._deadline if deadline is None else deadline
        endpoints = [endpoint for endpoint in self._pool.endpoints if url is None or endpoint.url == url]
        deadline_at = time.monotonic() + seconds
        last: Endpoint | None = None

        def attempt() -> T:
            nonlocal last
            last = self._pool.acquire(endpoints)
            try:
                result = self._attempt(last, method, path, parse, content, content_type, deadline_at)
            except _AttemptError as error:
                self._pool.record_failure(last, error.retry_after)
                raise
            finally:
                self._pool.release(last)
            self._pool.record_success(last)
            return result

        def wait(state: tenacity.RetryCallState) -> float:
            return max(0.0, min(endpoint.not_before for endpoint in endpoints) - time.monotonic())

        def stop(state: tenacity.RetryCallState) -> bool:
            # Do not wait if the pause would end after the deadline.
            return self._closing.is_set() or time.monotonic() + state.upcoming_sleep >= deadline_at

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_AttemptError),
            wait=wait,
            stop=stop,
            sleep=lambda length: self._closing.wait(length),  # type: ignore[arg-type]
            before_sleep=lambda state: self._log_retry(state, last),
            reraise=True,
        )
        try:
            return retrying(attempt)
        except _AttemptError as error:
            if self._closing.is_set():
                raise RemoteError("The connection to the reference server was closed.") from None
            attempts = f"{retrying.statistics.get('attempt_number', 1)} times "
            urls = [endpoint.url for endpoint in endpoints]
            raise unreachable_error(
                f"{method} {path}", seconds, urls, attempts, f"{last}: {error}"
            ) from error.__cause__

    def send_to_all(self, method: str, path: str, parse: Callable[[httpx.Response], T]) -> dict[str, T]:
        """
        Send a request to every server, again and again until at least one has answered. Servers that cannot be reached
        are left out.

        Returns:
            `dict[str, T]`: The answers by URL, at least one.

        Raises:
            RemoteError: No server could be reached before the deadline, or one has refused the request.
        """
        if len(self.urls) == 1:
            return {url: self.send(method, path, parse) for url in self.urls}
        deadline_at = time.monotonic() + self._deadline
        found: dict[str, T] = {}
        while not found:
            for url in self.urls:
                try:
                    found[url] = self.send(method, path, parse, url=url, deadline=self._timeout.connect)
                except UnreachableError as error:
                    if time.monotonic() >= deadline_at and not found:
                        what = f"{method} {path}"
                        raise unreachable_error(
                            what, self._deadline, self.urls, "", error.last_failure
                        ) from error.__cause__
                    logger.warning("Reference server %s. It is tried again when it is needed.", error.last_failure)
        return found

    def close(self) -> None:
        """Stop waiting and retrying, and close all connections. This may be called more than once."""
        if self._process != os.getpid():
            self._reset_for_this_process()
        self._closing.set()
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _reset_for_this_process(self) -> None:
        """
        Make new locks and connections. A forked process must not use its parent's sockets, and its locks may be held
        by threads that it does not have.
        """
        self._process = os.getpid()
        closed = self._closing.is_set()
        self._closing = threading.Event()
        if closed:
            self._closing.set()
        self._lock = threading.Lock()  # for the client and the counters
        self._client = None
        self._pool.reset_after_fork()

    # One attempt

    def _attempt(
        self,
        endpoint: Endpoint,
        method: str,
        path: str,
        parse: Callable[[httpx.Response], T],
        content: bytes | None,
        content_type: str | None,
        deadline_at: float,
    ) -> T:
        client = self._http_client()
        headers = {"content-type": content_type} if content_type else {}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        request = client.build_request(method, endpoint.url + path, content=content, headers=headers)
        for name in _UNNEEDED_HEADERS:
            request.headers.pop(name, None)
        left = max(deadline_at - time.monotonic(), 0.1)
        request.extensions["timeout"] = {
            name: min(value, left) for name, value in self._timeout.as_dict().items() if value is not None
        }
        try:
            response = client.send(request, stream=True)
            with closing(response):
                response.stream = _StreamWithDeadline(response.stream, deadline_at)
                response.read()
            if response.status_code in (408, 429) or response.status_code >= 500:
                raise self._retry_later(response)
            if response.status_code != 200:
                raise refusal_error(endpoint.url, path, response)
            result = parse(response)
        except (httpx.RequestError, DamagedAnswerError) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise certificate_error(endpoint.url, error) from None
            raise _AttemptError(describe_error(error)) from error
        except RuntimeError:  # httpx raises this if another thread has closed the client
            if not self._closing.is_set():
                raise
            raise RemoteError("The connection to the reference server was closed.") from None
        self._count_bytes(request, response)
        return result

    def _http_client(self) -> httpx.Client:
        with self._lock:
            if self._closing.is_set():
                raise RemoteError("The connection to the reference server is closed.")
            if self._client is None:
                self._client = httpx.Client(
                    limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE), follow_redirects=False
                )
            return self._client

    @staticmethod
    def _retry_later(response: httpx.Response) -> _AttemptError:
        seconds = response.headers.get("retry-after", "")
        pause = min(float(seconds), _MAX_RETRY_AFTER) if seconds.isdecimal() else 0.0
        return _AttemptError(f"it answered {response.status_code}{reason_in(response)}", pause)

    def _count_bytes(self, request: httpx.Request, response: httpx.Response) -> None:
        sent, received = (
            _size_on_the_wire(request.headers, request.content),
            _size_on_the_wire(response.headers, response.content),
        )
        with self._lock:
            self.stats.bytes_sent += sent + len(f"{request.method}  HTTP/1.1\r\n") + len(request.url.raw_path)
            self.stats.bytes_received += received + len(f"HTTP/1.1 200 {response.reason_phrase}\r\n")

    def _log_retry(self, state: tenacity.RetryCallState, endpoint: Endpoint | None) -> None:
        with self._lock:
            self.stats.retries += 1
        assert state.outcome is not None
        logger.warning(
            "Reference server %s: %s. Trying again in %.1f s.",
            endpoint,
            state.outcome.exception(),
            state.upcoming_sleep,
        )


class _StreamWithDeadline(httpx.SyncByteStream):
    """The body of an answer, all of which has to arrive by the deadline. A read timeout only limits each part."""

    def __init__(self, stream: Any, deadline_at: float) -> None:
        self._stream, self._deadline_at = stream, deadline_at

    def __iter__(self) -> Iterator[bytes]:
        for part in self._stream:
            if time.monotonic() > self._deadline_at:
                raise httpx.ReadTimeout("it came too slowly")
            yield part

    def close(self) -> None:
        self._stream.close()


def _size_on_the_wire(headers: httpx.Headers, content: bytes) -> int:
    return sum(len(name) + len(value) + 4 for name, value in headers.raw) + 2 + len(content)
