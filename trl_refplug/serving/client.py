"""
Asking a server of `trl-refplug serve`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Protocol

import httpx
import msgspec

from trl_refplug.errors import ReferenceMismatchError, RemoteError, UnsupportedInputError
from trl_refplug.rows import PaddedRows, Values
from trl_refplug.serving import wire
from trl_refplug.serving.http_errors import DamagedAnswerError
from trl_refplug.serving.served_model import ServerFacts
from trl_refplug.serving.transport import Transport


class ScoringClient(Protocol):
    """What scores rows elsewhere. Callable from any thread."""

    transport: Transport

    def score(self, rows: PaddedRows, temperature: float) -> Sequence[Values]:
        """
        The log-probs of the scored tokens of each row, checked: as many as there are, finite, of the same reference.

        Raises:
            RemoteError: No server answered, or none may be trusted.
            ReferenceMismatchError: The reference has changed.
            UnsupportedInputError: A row cannot be scored.
        """


class RefPlugClient:
    """
    Args:
        transport ([`Transport`]): To equal servers.

    Attributes:
        facts ([`ServerFacts`]): What they serve.

    Raises:
        RemoteError: No server can be reached, or what is reached is something else.
        ReferenceMismatchError: The servers have different references.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._client = secrets.randbits(32)
        self.facts = _agreed(transport.each("GET", "/v1/identity", _parse_facts))
        if self.facts.protocol != wire.PROTOCOL:
            raise RemoteError(
                f"{', '.join(transport.urls)}: speaks version {self.facts.protocol} of the protocol, and this release "
                f"of trl-refplug version {wire.PROTOCOL}. Use the same release on both ends."
            )

    def score(self, rows: PaddedRows, temperature: float) -> Sequence[Values]:
        request = wire.ScoringRequest(rows, self.facts.digest, temperature, self._client)
        body = wire.encode_request(request)

        def parse(response: httpx.Response) -> wire.ScoringAnswer:
            try:
                return wire.decode_answer(response.content, request, body)
            except wire.WireError as error:
                raise DamagedAnswerError(str(error)) from None

        answer = self.transport.send("POST", "/v1/score", parse, content=body)
        if not self.facts.digest.startswith(answer.identity):
            raise ReferenceMismatchError(
                f"A reference server answered for {answer.identity}, and this run's reference is {self.facts.digest}. "
                "Serve the model of before, or start anew."
            )
        if answer.refused:
            shown = "; ".join(f"row {index}: {reason}" for index, reason in sorted(answer.refused.items())[:5])
            raise UnsupportedInputError(
                f"The reference server cannot score {len(answer.refused)} of {len(rows)} rows of a batch: {shown}. "
                "Leave such rows out, shorten them (`max_length`), or serve a model that takes them."
            )
        return [values for values in answer.values if values is not None]


def _agreed(found: Mapping[str, ServerFacts]) -> ServerFacts:
    (first, facts), *others = found.items()
    for url, other in others:
        if other.digest != facts.digest:
            raise ReferenceMismatchError(
                f"The servers of option 'url' have different references: {first} has {facts.model} ({facts.dtype}, "
                f"{facts.digest}), {url} has {other.model} ({other.dtype}, {other.digest}). All must serve the same "
                "model, adapter and dtype."
            )
    return facts


def _parse_facts(response: httpx.Response) -> ServerFacts:
    try:
        return msgspec.json.decode(response.content, type=ServerFacts)
    except msgspec.DecodeError as error:
        raise RemoteError(
            f"{response.url} does not speak the protocol of `trl-refplug serve` ({error}). For an OpenAI-compatible "
            "server use option protocol='vllm'."
        ) from None
