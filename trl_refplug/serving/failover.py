"""
Which of several equal servers to ask next, and when one that has failed may be asked again.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass


_PAUSE = 5.0  # longest between two attempts at a server, in seconds, unless it asks for more


@dataclass(eq=False)
class Server:
    """
    Args:
        url (`str`): Its address.
        in_flight (`int`): Requests that it has not answered.
        failures (`int`): Since it last answered.
        not_before (`float`): When to try again (`time.monotonic`).
    """

    url: str
    in_flight: int = 0
    failures: int = 0
    not_before: float = 0.0

    def __str__(self) -> str:
        return self.url


class Servers:
    """
    Safe to use from any number of threads.

    Args:
        urls (`Sequence[str]`): Of equal servers.
        longest_pause (`float`): Most seconds for which one that fails is left alone while another answers.
    """

    def __init__(self, urls: Sequence[str], longest_pause: float) -> None:
        self.all = [Server(url.rstrip("/")) for url in urls]
        self._longest_pause = max(_PAUSE, longest_pause)
        self._random = random.Random()  # the global stream is training's
        self.begin()

    def begin(self) -> None:
        """Start anew, in a process that was forked: with locks as they were, and nothing of its own in flight."""
        self._lock = threading.Lock()
        for server in self.all:
            server.in_flight = 0

    def take(self, among: Sequence[Server]) -> Server:
        """The one of these that has the least to do, which has one request more from now on, until [`give_back`]."""
        now = time.monotonic()
        with self._lock:
            best = min(among, key=lambda s: (max(s.not_before - now, 0.0), s.in_flight))
            best.in_flight += 1
        return best

    def give_back(self, server: Server) -> None:
        """The request is over."""
        with self._lock:
            server.in_flight -= 1

    def answered(self, server: Server) -> None:
        """It may be asked at any time."""
        server.failures, server.not_before = 0, 0.0

    def failed(self, server: Server, asked: float) -> None:
        """Leave it alone for a while, for at least as many seconds as it has `asked` for."""
        with self._lock:
            server.failures += 1
            spare = any(not other.failures for other in self.all)
            # While another answers, this one is asked less and less often: each time can cost `connect_timeout`
            longest = self._longest_pause if spare else _PAUSE
            pause = self._random.uniform(0.5, 1.0) * min(0.1 * 2 ** min(server.failures, 10), longest)
            asked *= self._random.uniform(1.0, 1.2)  # or all clients of a full queue would be back at once
            server.not_before = time.monotonic() + max(pause, asked)
