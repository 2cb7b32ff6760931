"""
The client of a server that was started by `trl-refplug serve`.
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
from trl_refplug.serving.served_model import ServedModel
from trl_refplug.serving.transport import Transport


class ScoringClient(Protocol):
    """A client that has rows scored by a server. It can be called from any thread."""

    transport: Transport

    def score(self, rows: PaddedRows, temperature: float) -> Sequence[Values]:
        """
        The log-probs of the scored tokens of each row. It is checked that there is one for each token, that all are
        finite, and that they come from the reference of the start.

        Raises:
            RemoteError: No server has answered, or not with a valid answer.
            ReferenceMismatchError: The server has another reference now.
            UnsupportedInputError: A row cannot be scored.
        """


class RefPlugClient:
    """
    A client of one or several equal servers of `trl-refplug serve`.

    Args:
        transport ([`Transport`]): The connection to the servers.

    Attributes:
        served_model ([`ServedModel`]): The model that all of them serve.

    Raises:
        RemoteError: No server can be reached, or it is a server of another kind or version.
        ReferenceMismatchError: The servers have different references.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._client = secrets.randbits(32)
        self.served_model = _common_model(transport.send_to_all("GET", "/v1/identity", _parse_served_model))
        if self.served_model.protocol != wire.PROTOCOL:
            raise RemoteError(
                f"{', '.join(transport.urls)}: speaks version {self.served_model.protocol} of the protocol, and this "
                f"release of trl-refplug version {wire.PROTOCOL}. Use the same release on both ends."
            )

    def score(self, rows: PaddedRows, temperature: float) -> Sequence[Values]:
        request = wire.ScoringRequest(rows, self.served_model.digest, temperature, self._client)
        body = wire.encode_request(request)

        def parse(response: httpx.Response) -> wire.ScoringAnswer:
            try:
                return wire.decode_answer(response.content, request, body)
            except wire.WireError as error:
                raise DamagedAnswerError(str(error)) from None

        answer = self.transport.send("POST", "/v1/score", parse, content=body)
        if not self.served_model.digest.startswith(answer.identity):
            raise ReferenceMismatchError(
                f"A reference server answered for {answer.identity}, and this run's reference is "
                f"{self.served_model.digest}. Serve the model of before, or start a new run."
            )
        if answer.refused:
            shown = "; ".join(f"row {index}: {reason}" for index, reason in sorted(answer.refused.items())[:5])
            raise UnsupportedInputError(
                f"The reference server cannot score {len(answer.refused)} of {len(rows)} rows of a batch: {shown}. "
                "Leave such rows out, shorten them (`max_length`), or serve a model that takes them."
            )
        return [values for values in answer.values if values is not None]


def _common_model(found: Mapping[str, ServedModel]) -> ServedModel:
    (first, model), *others = found.items()
    for url, other in others:
        if other.digest != model.digest:
            raise ReferenceMismatchError(
                f"The servers of option 'url' have different references: {first} has {model.model} ({model.dtype}, "
                f"{model.digest}), {url} has {other.model} ({other.dtype}, {other.digest}). All must serve the same "
                "model, adapter and dtype."
            )
    return model


def _parse_served_model(response: httpx.Response) -> ServedModel:
    try:
        return msgspec.json.decode(response.content, type=ServedModel)
    except msgspec.DecodeError as error:
        raise RemoteError(
            f"{response.url} does not speak the protocol of `trl-refplug serve` ({error}). For an OpenAI-compatible "
            "server use option protocol='vllm'."
        ) from None
