"""Networks and servers that fail when a test wants it."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit


Change = Callable[[bytes], bytes]


@contextmanager
def proxied(url: str, change: Change) -> Iterator[str]:
    """
    The URL of a proxy before `url`. What the server answers to a scoring request is passed through `change`, head and
    body, and the connection is closed after it.
    """
    target = (urlsplit(url).hostname, urlsplit(url).port)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=relay, args=(client,), daemon=True).start()

    def relay(client: socket.socket) -> None:
        with client, suppress(ConnectionError):
            head, body = read_message(client)
            head = head.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
            with socket.create_connection(target) as server:
                server.sendall(head + body)
                answer = b""
                while part := server.recv(1 << 16):
                    answer += part
            client.sendall(change(answer) if head.startswith(b"POST") else answer)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def read_message(connection: socket.socket) -> tuple[bytes, bytes]:
    """Read the head and the body of a request that has a content length."""

    def part() -> bytes:
        received = connection.recv(1 << 16)
        if not received:
            raise ConnectionError("closed before the end of a request")
        return received

    received = b""
    while b"\r\n\r\n" not in received:
        received += part()
    head, body = received.split(b"\r\n\r\n", 1)
    lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
    while len(body) < (int(lengths[0]) if lengths else 0):
        body += part()
    return head + b"\r\n\r\n", body


def sometimes(probability: float, change: Change, seed: int = 0) -> Change:
    """Apply `change` only to some answers, at random."""
    generator = random.Random(seed)
    return lambda answer: change(answer) if generator.random() < probability else answer


def cut_short(answer: bytes) -> bytes:
    """Remove half of the body."""
    return answer[: -(len(answer) - answer.index(b"\r\n\r\n") - 4) // 2]


def flipped(answer: bytes) -> bytes:
    """Flip one bit of the body."""
    changed = bytearray(answer)
    changed[-len(answer) // 4] ^= 16
    return bytes(changed)


def shortened(answer: bytes) -> bytes:
    """Shorten the body and the length in the head, so that HTTP finds nothing wrong."""
    head, body = answer.split(b"\r\n\r\n", 1)
    lines = [
        b"content-length: %d" % (len(body) - 9) if b"content-length" in line else line for line in head.split(b"\r\n")
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body[:-9]


class Failing:
    """An application that answers some of the scoring requests with a random status 5xx."""

    def __init__(self, app: Any, probability: float) -> None:
        self._app, self._probability, self._random = app, probability, random.Random(0)
        self.failed = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] == "/v1/score" and self._random.random() < self._probability:
            self.failed += 1
            status = self._random.choice([500, 502, 503, 504, 520])
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return
        await self._app(scope, receive, send)
