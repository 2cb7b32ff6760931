"""
The equal servers that a client can ask: which of them to ask next, and when to try a failed one again.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass


_MAX_PAUSE = 5.0
"""The longest pause, in seconds, before a failed server is tried again, unless it asks for more or others answer."""


@dataclass(eq=False)
class Endpoint:
    """
    One server.

    Args:
        url (`str`): Its address.
        in_flight (`int`): Number of requests that it has not answered yet.
        failures (`int`): Number of failed requests since its last answer.
        not_before (`float`): When it may be tried again, on the clock of `time.monotonic`.
    """

    url: str
    in_flight: int = 0
    failures: int = 0
    not_before: float = 0.0

    def __str__(self) -> str:
        return self.url


class EndpointPool:
    """
    All servers of a client. It can be used from any number of threads.

    Args:
        urls (`Sequence[str]`): The addresses of the servers.
        max_pause (`float`): Longest pause, in seconds, before a failed server is tried again while another answers.
    """

    def __init__(self, urls: Sequence[str], max_pause: float) -> None:
        self.endpoints = [Endpoint(url.rstrip("/")) for url in urls]
        self._max_pause = max(_MAX_PAUSE, max_pause)
        self._random = random.Random()  # a generator of its own, because the global one belongs to the training
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """
        Make the pool usable in a forked process. A lock may be held by a thread that the fork does not have, and the
        requests in flight are those of the parent process.
        """
        self._lock = threading.Lock()
        for endpoint in self.endpoints:
            endpoint.in_flight = 0

    def acquire(self, among: Sequence[Endpoint]) -> Endpoint:
        """Choose the server with the fewest requests in flight, and count one more for it until [`release`]."""
        now = time.monotonic()
        with self._lock:
            best = min(among, key=lambda endpoint: (max(endpoint.not_before - now, 0.0), endpoint.in_flight))
            best.in_flight += 1
        return best

    def release(self, endpoint: Endpoint) -> None:
        """Count one request less for a server."""
        with self._lock:
            endpoint.in_flight -= 1

    def record_success(self, endpoint: Endpoint) -> None:
        """Note that a server has answered, so that it may be asked again without a pause."""
        endpoint.failures, endpoint.not_before = 0, 0.0

    def record_failure(self, endpoint: Endpoint, retry_after: float) -> None:
        """Note that a server has failed, and do not ask it for a while: for `retry_after` seconds or longer."""
        with self._lock:
            endpoint.failures += 1
            another_answers = any(not other.failures for other in self.endpoints)
            # If another server answers, pauses grow further, because each attempt can cost `connect_timeout`.
            longest = self._max_pause if another_answers else _MAX_PAUSE
            pause = self._random.uniform(0.5, 1.0) * min(0.1 * 2 ** min(endpoint.failures, 10), longest)
            # The factor keeps the clients of a server with a full queue from coming back all at once.
            retry_after *= self._random.uniform(1.0, 1.2)
            endpoint.not_before = time.monotonic() + max(pause, retry_after)
