"""What a server puts up with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """
    Bounds on what one client can ask of a server, and all of them together.

    Args:
        body_bytes (`int`): Largest body of a request.
        rows (`int`): Most rows of a request.
        tokens (`int`): Most tokens of a request, with padding.
        queue_tokens (`int`): Tokens that may wait before no more requests are taken.
        head_seconds (`float`): How long a client may take to send the head of a request.
        body_seconds (`float`): How long it may take to send its body, and to take what is too long for the buffers of
            an answer.
    """

    body_bytes: int = 16 << 20
    rows: int = 4096
    tokens: int = 1 << 20
    queue_tokens: int = 4 << 20
    head_seconds: float = 10.0
    body_seconds: float = 30.0
