"""
The wire format of requests and answers: msgpack with a checksum, two to six bytes per token.

```
body     = checksum (8 bytes, xxh3-64, seeded) + msgpack array
request  = [client, identity, temperature, width, padding id, lengths, lefts, spans of each row, id bytes, id planes]
answer   = [identity, {row: why it is refused}, value planes]
```

Rows are sent without padding, together with the numbers that are needed to restore it. Token ids and log-probs are
sent as byte planes: the first bytes of all numbers, then all second bytes, and so on. Each plane is compressed (by
zstd, without its magic number) if that makes it shorter; the sign and exponent of log-probs and the upper bytes of
token ids compress very well. No value is changed. Of the identity only 8 bytes are sent, which is enough to notice
that a server was restarted with other weights.

The checksum of an answer is seeded with that of the request, so that an answer to another request is not accepted.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import msgspec
import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from trl_refplug.rows import IGNORED, PaddedRows, Row, Values


PROTOCOL = 1
"""Version of the format. The server says which one it has, and a client with another version stops."""

_CHECKSUM = struct.Struct("<Q")
_ID_BYTES = (2, 4)
_IDENTITY_BYTES = 8
_MAGICLESS = zstandard.FORMAT_ZSTD1_MAGICLESS
_COMPRESSION = zstandard.ZstdCompressionParameters.from_level(1, format=_MAGICLESS)
_MAX_ROWS = msgspec.Meta(max_length=1 << 16)  # an empty list takes one byte here, and sixty in memory


class WireError(ValueError):
    """The bytes were changed on the way, or are not a request or an answer at all."""


class TooLargeError(WireError):
    """A request has more rows or tokens than the server accepts."""


@dataclass(frozen=True, eq=False)
class ScoringRequest:
    """
    A request to score rows.

    Args:
        rows ([`PaddedRows`]): The rows to score.
        identity (`str`): Digest of the reference that is asked for. The server receives only how it begins, and
            refuses the request if its own digest begins otherwise.
        temperature (`float`): Logits are divided by it.
        client (`int`): A random number of 32 bits that identifies the client, so that the server can be fair.
    """

    rows: PaddedRows
    identity: str
    temperature: float = 1.0
    client: int = 0


@dataclass(frozen=True, eq=False)
class ScoringAnswer:
    """
    The answer to a [`ScoringRequest`].

    Args:
        identity (`str`): Digest of the server's reference. The client receives only how it begins.
        values (`Sequence[Values | None]`): The log-probs of each row, or `None` if the row is in `refused`.
        refused (`Mapping[int, str]`): The indices of the rows that were not scored, each with the reason.
    """

    identity: str
    values: Sequence[Values | None]
    refused: Mapping[int, str]


class _Request(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    client: int
    identity: bytes
    temperature: float
    width: int
    padding_id: int
    lengths: list[int]
    lefts: list[int]
    spans: Annotated[list[list[int]], _MAX_ROWS]  # start and end of each run of scored tokens
    id_bytes: int
    ids: list[bytes]


class _Answer(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    identity: bytes
    refused: dict[int, str]
    values: list[bytes]


_request_decoder = msgspec.msgpack.Decoder(_Request)
_answer_decoder = msgspec.msgpack.Decoder(_Answer)


def encode_request(request: ScoringRequest) -> bytes:
    """
    The body of a request.

    Raises:
        WireError: A token id is negative or does not fit into 32 bits.
    """
    rows = request.rows
    ids = np.concatenate([row.input_ids for row in rows.rows]) if rows.rows else np.empty(0, np.int64)
    if len(ids) and not 0 <= ids.min() <= ids.max() < 1 << 32:
        raise WireError(f"token ids from {ids.min()} to {ids.max()}, expected 0 to {(1 << 32) - 1}")
    id_bytes = 2 if not len(ids) or ids.max() < 1 << 16 else 4
    return _with_checksum(
        _Request(
            client=request.client,
            identity=_identity_prefix(request.identity),
            temperature=_shortest_number(request.temperature),
            width=rows.width,
            padding_id=rows.padding_id,
            lengths=[len(row) for row in rows.rows],
            lefts=list(rows.lefts),
            spans=[_spans(row) for row in rows.rows],
            id_bytes=id_bytes,
            ids=_to_byte_planes(ids.astype(f"<u{id_bytes}")),
        )
    )


def decode_request(body: bytes, *, max_rows: int, max_tokens: int) -> ScoringRequest:
    """
    The inverse of [`encode_request`]. Rows may still be empty, or have token ids that the model does not know.

    Args:
        body (`bytes`): The body as it was received.
        max_rows (`int`), max_tokens (`int`): Larger requests are refused before they take memory. Padding counts as
            tokens.

    Raises:
        WireError: This is not a request, or ([`TooLargeError`]) a request that is too large.
    """
    found: _Request = _without_checksum(body, _request_decoder, seed=0)
    _require(len(found.identity) == _IDENTITY_BYTES, "identity")
    _require(math.isfinite(found.temperature) and found.temperature > 0, "temperature")
    _require(0 <= found.padding_id < 1 << 32 and 0 <= found.client < 1 << 64, "padding id or client")
    count = len(found.lengths)
    _require(len(found.lefts) == len(found.spans) == count > 0, "number of rows")
    if count > max_rows:
        raise TooLargeError(f"too many rows: {count}, at most {max_rows}")
    _require(found.width >= 1, "width")
    if count * found.width > max_tokens:
        raise TooLargeError(f"too many tokens: {count} rows of {found.width} with padding, at most {max_tokens}")
    for length, left, spans in zip(found.lengths, found.lefts, found.spans, strict=True):
        _require(length >= 0 and left >= 0 and left + length <= found.width, "length or padding of a row")
        _require(len(spans) % 2 == 0, "scored spans of a row")
        edges = [0, *spans]  # the first token is never scored
        _require(all(a < b for a, b in pairwise(edges)), "scored spans of a row")
        _require(edges[-1] <= length, "scored spans of a row")
    _require(found.id_bytes in _ID_BYTES, "size of token ids")
    ids = _from_byte_planes(found.ids, np.dtype(f"<u{found.id_bytes}"), sum(found.lengths)).astype(np.int64)
    cuts = np.cumsum(found.lengths)[:-1]
    rows = [_row_from_spans(part, spans) for part, spans in zip(np.split(ids, cuts), found.spans, strict=True)]
    return ScoringRequest(
        rows=PaddedRows(rows, found.lefts, found.width, found.padding_id),
        identity=found.identity.hex(),
        temperature=float(found.temperature),
        client=found.client,
    )


def encode_answer(answer: ScoringAnswer, request_body: bytes) -> bytes:
    """The body of the answer to the request that was received as `request_body`."""
    scored = [values for values in answer.values if values is not None]
    values = np.concatenate(scored) if scored else np.empty(0, np.float32)
    found = _Answer(_identity_prefix(answer.identity), dict(answer.refused), _to_byte_planes(values.astype("<f4")))
    return _with_checksum(found, seed=_checksum_of(request_body))


def decode_answer(body: bytes, request: ScoringRequest, request_body: bytes) -> ScoringAnswer:
    """
    The inverse of [`encode_answer`], for the answer to `request`, which was sent as `request_body`.

    Raises:
        WireError: This is not a complete and undamaged answer to that request, or a value is not finite.
    """
    found: _Answer = _without_checksum(body, _answer_decoder, seed=_checksum_of(request_body))
    rows = request.rows.rows
    _require(len(found.identity) == _IDENTITY_BYTES, "identity")
    _require(all(0 <= index < len(rows) for index in found.refused), "index of a refused row")
    counts = [0 if index in found.refused else len(row.scored) for index, row in enumerate(rows)]
    values = _from_byte_planes(found.values, np.dtype("<f4"), sum(counts)).astype(np.float32)
    _require(bool(np.isfinite(values).all()), "values that are not finite")
    parts = np.split(values, np.cumsum(counts)[:-1])
    return ScoringAnswer(
        identity=found.identity.hex(),
        values=[None if index in found.refused else part for index, part in enumerate(parts)],
        refused=found.refused,
    )


def _shortest_number(number: float) -> float:
    """The same number as an `int` if it is whole, because small ones are encoded in one byte."""
    return int(number) if float(number).is_integer() else number


def _identity_prefix(identity: str) -> bytes:
    return bytes.fromhex(identity)[:_IDENTITY_BYTES]


def _with_checksum(content: msgspec.Struct, seed: int = 0) -> bytes:
    payload = msgspec.msgpack.encode(content)
    return _CHECKSUM.pack(xxhash.xxh3_64_intdigest(payload, seed)) + payload


def _without_checksum(body: bytes, decoder: Any, seed: int) -> Any:
    payload = body[_CHECKSUM.size :]
    if len(body) < _CHECKSUM.size or _checksum_of(body) != xxhash.xxh3_64_intdigest(payload, seed):
        raise WireError("the checksum does not fit: the content was cut short or changed on its way")
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"not in the format of protocol {PROTOCOL}: {error}") from None


def _checksum_of(body: bytes) -> int:
    checksum: int = _CHECKSUM.unpack_from(body)[0]
    return checksum


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise WireError(f"malformed content: {what}")


def _spans(row: Row) -> list[int]:
    """The start and end of each run of scored tokens: `[start, end, start, end, ...]`."""
    scored = np.zeros(len(row) + 2, bool)
    scored[row.scored + 1] = True
    spans: list[int] = np.flatnonzero(np.diff(scored)).tolist()
    return spans


def _row_from_spans(ids: NDArray[np.int64], spans: Sequence[int]) -> Row:
    labels = np.full(len(ids), IGNORED, np.int64)
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        labels[start:end] = ids[start:end]
    return Row(ids, labels)


def _to_byte_planes(values: NDArray[Any]) -> list[bytes]:
    """The first bytes of all values, then all second bytes, and so on. Each is compressed if that makes it shorter."""
    table = values.view(np.uint8).reshape(-1, values.itemsize)
    compressor = zstandard.ZstdCompressor(compression_params=_COMPRESSION)
    planes = [column.tobytes() for column in table.T]
    return [min(plane, compressor.compress(plane), key=len) for plane in planes]


def _from_byte_planes(planes: Sequence[bytes], dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    _require(len(planes) == dtype.itemsize, "number of byte planes")
    table = np.empty((count, dtype.itemsize), np.uint8)
    for number, plane in enumerate(planes):
        table[:, number] = np.frombuffer(plane if len(plane) == count else _decompress_plane(plane, count), np.uint8)
    return table.view(dtype).reshape(count)


def _decompress_plane(plane: bytes, size: int) -> bytes:
    try:
        # zstd allocates the size that a frame announces, so this is checked first.
        announced = zstandard.get_frame_parameters(plane, format=_MAGICLESS).content_size
        _require(announced == size, "length of a byte plane")
        content: bytes = zstandard.ZstdDecompressor(format=_MAGICLESS).decompress(plane)
    except zstandard.ZstdError as error:
        raise WireError(f"a byte plane cannot be decompressed: {error}") from None
    _require(len(content) == size, "length of a byte plane")
    return content
