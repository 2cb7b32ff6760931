"""The limits that keep clients from overloading a server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerLimits:
    """
    What one client, and all clients together, may ask of a server.

    Args:
        max_body_bytes (`int`): Largest body of a request.
        max_rows (`int`): Most rows in a request.
        max_tokens (`int`): Most tokens in a request, including padding.
        max_queued_tokens (`int`): When this many tokens are in the queue, new requests are refused.
        head_timeout (`float`): Seconds that a client may take to send the head of a request.
        body_timeout (`float`): Seconds that a client may take to send the body of a request. The same time is allowed
            for receiving the part of an answer that does not fit into the buffers of the network.
    """

    max_body_bytes: int = 16 << 20
    max_rows: int = 4096
    max_tokens: int = 1 << 20
    max_queued_tokens: int = 4 << 20
    head_timeout: float = 10.0
    body_timeout: float = 30.0
