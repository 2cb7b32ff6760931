"""
How rows and log-probs travel: msgpack in a checksum, two to six bytes a token.

```
body     = checksum (8 bytes, xxh3-64, seeded) + msgpack array
request  = [client, identity, temperature, width, padding id, lengths, lefts, spans of each row, id bytes, id planes]
answer   = [identity, {row: why it is refused}, value planes]
```

Rows travel without padding, and with what it takes to restore it. Numbers travel as planes, all first bytes, then all
second bytes and so on, each compressed (zstd, without its magic number) where that helps: of log-probs the sign and
exponent shrink to next to nothing, of token ids in use the upper byte. No value is changed. Of the identity 8 bytes go
along, enough to notice a server that was restarted with other weights.

An answer's checksum is seeded with its request's, so that the answer to another request is no answer.
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
"""Version of the format. The server names it; a client that speaks another does not go on."""

_CHECKSUM = struct.Struct("<Q")
_ID_BYTES = (2, 4)
_IDENTITY_BYTES = 8
_MAGICLESS = zstandard.FORMAT_ZSTD1_MAGICLESS
_COMPRESSION = zstandard.ZstdCompressionParameters.from_level(1, format=_MAGICLESS)
_MOST_ROWS = msgspec.Meta(max_length=1 << 16)  # an empty list is one byte on its way, and sixty in memory


class WireError(ValueError):
    """Bytes that are not what was sent, or are no request or answer at all."""


class TooLargeError(WireError):
    """A request for more than the server does at a time."""


@dataclass(frozen=True, eq=False)
class ScoringRequest:
    """
    Args:
        rows ([`PaddedRows`]): What to score.
        identity (`str`): Digest of the reference that is asked for; on arrival, how it begins. Another one does not
            answer.
        temperature (`float`): Logits are divided by it.
        client (`int`): Who asks, for the server to be fair: a random number of 32 bits.
    """

    rows: PaddedRows
    identity: str
    temperature: float = 1.0
    client: int = 0


@dataclass(frozen=True, eq=False)
class ScoringAnswer:
    """
    Args:
        identity (`str`): Digest of the reference that answers; on arrival, how it begins.
        values (`Sequence[Values | None]`): One a row; `None` for those in `refused`.
        refused (`Mapping[int, str]`): Why rows are not scored, by index.
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
    spans: Annotated[list[list[int]], _MOST_ROWS]  # start and end of each run of scored tokens
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
    Raises:
        WireError: Token ids that no model has.
    """
    rows = request.rows
    ids = np.concatenate([row.input_ids for row in rows.rows]) if rows.rows else np.empty(0, np.int64)
    if len(ids) and not 0 <= ids.min() <= ids.max() < 1 << 32:
        raise WireError(f"token ids from {ids.min()} to {ids.max()}, expected 0 to {(1 << 32) - 1}")
    id_bytes = 2 if not len(ids) or ids.max() < 1 << 16 else 4
    return _seal(
        _Request(
            client=request.client,
            identity=_shortened(request.identity),
            temperature=_short(request.temperature),
            width=rows.width,
            padding_id=rows.padding_id,
            lengths=[len(row) for row in rows.rows],
            lefts=list(rows.lefts),
            spans=[_spans(row) for row in rows.rows],
            id_bytes=id_bytes,
            ids=_planes(ids.astype(f"<u{id_bytes}")),
        )
    )


def decode_request(body: bytes, *, max_rows: int, max_tokens: int) -> ScoringRequest:
    """
    Args:
        body (`bytes`): As it came.
        max_rows (`int`), max_tokens (`int`): More is refused before it takes memory; padding counts as tokens.

    Raises:
        WireError: It is not a request, or ([`TooLargeError`]) too large a one. Rows may still be empty or
            have ids that no model has.
    """
    found: _Request = _open(body, _request_decoder, seed=0)
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
    ids = _from_planes(found.ids, np.dtype(f"<u{found.id_bytes}"), sum(found.lengths)).astype(np.int64)
    cuts = np.cumsum(found.lengths)[:-1]
    rows = [_row(part, spans) for part, spans in zip(np.split(ids, cuts), found.spans, strict=True)]
    return ScoringRequest(
        rows=PaddedRows(rows, found.lefts, found.width, found.padding_id),
        identity=found.identity.hex(),
        temperature=float(found.temperature),
        client=found.client,
    )


def encode_answer(answer: ScoringAnswer, request_body: bytes) -> bytes:
    """The answer to what came as `request_body`."""
    scored = [values for values in answer.values if values is not None]
    values = np.concatenate(scored) if scored else np.empty(0, np.float32)
    found = _Answer(_shortened(answer.identity), dict(answer.refused), _planes(values.astype("<f4")))
    return _seal(found, seed=_checksum_of(request_body))


def decode_answer(body: bytes, request: ScoringRequest, request_body: bytes) -> ScoringAnswer:
    """
    Raises:
        WireError: It is not the whole and undamaged answer to `request`, which was sent as `request_body`, or has a
            value that is not finite.
    """
    found: _Answer = _open(body, _answer_decoder, seed=_checksum_of(request_body))
    rows = request.rows.rows
    _require(len(found.identity) == _IDENTITY_BYTES, "identity")
    _require(all(0 <= index < len(rows) for index in found.refused), "index of a refused row")
    counts = [0 if index in found.refused else len(row.scored) for index, row in enumerate(rows)]
    values = _from_planes(found.values, np.dtype("<f4"), sum(counts)).astype(np.float32)
    _require(bool(np.isfinite(values).all()), "values that are not finite")
    parts = np.split(values, np.cumsum(counts)[:-1])
    return ScoringAnswer(
        identity=found.identity.hex(),
        values=[None if index in found.refused else part for index, part in enumerate(parts)],
        refused=found.refused,
    )


def _short(number: float) -> float:
    """The same number, in a byte where it is 1, 2, ..."""
    return int(number) if float(number).is_integer() else number


def _shortened(identity: str) -> bytes:
    return bytes.fromhex(identity)[:_IDENTITY_BYTES]


def _seal(content: msgspec.Struct, seed: int = 0) -> bytes:
    payload = msgspec.msgpack.encode(content)
    return _CHECKSUM.pack(xxhash.xxh3_64_intdigest(payload, seed)) + payload


def _open(body: bytes, decoder: Any, seed: int) -> Any:
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
    """`[start, end, start, end, ...]` of the runs of scored tokens."""
    scored = np.zeros(len(row) + 2, bool)
    scored[row.scored + 1] = True
    spans: list[int] = np.flatnonzero(np.diff(scored)).tolist()
    return spans


def _row(ids: NDArray[np.int64], spans: Sequence[int]) -> Row:
    labels = np.full(len(ids), IGNORED, np.int64)
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        labels[start:end] = ids[start:end]
    return Row(ids, labels)


def _planes(values: NDArray[Any]) -> list[bytes]:
    """The first bytes of all values, their second bytes and so on, compressed where that makes them shorter."""
    table = values.view(np.uint8).reshape(-1, values.itemsize)
    compressor = zstandard.ZstdCompressor(compression_params=_COMPRESSION)
    planes = [column.tobytes() for column in table.T]
    return [min(plane, compressor.compress(plane), key=len) for plane in planes]


def _from_planes(planes: Sequence[bytes], dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    _require(len(planes) == dtype.itemsize, "number of byte planes")
    table = np.empty((count, dtype.itemsize), np.uint8)
    for number, plane in enumerate(planes):
        table[:, number] = np.frombuffer(plane if len(plane) == count else _decompressed(plane, count), np.uint8)
    return table.view(dtype).reshape(count)


def _decompressed(plane: bytes, size: int) -> bytes:
    try:
        # A frame announces its size, and that much memory is taken
        announced = zstandard.get_frame_parameters(plane, format=_MAGICLESS).content_size
        _require(announced == size, "length of a byte plane")
        content: bytes = zstandard.ZstdDecompressor(format=_MAGICLESS).decompress(plane)
    except zstandard.ZstdError as error:
        raise WireError(f"a byte plane cannot be decompressed: {error}") from None
    _require(len(content) == size, "length of a byte plane")
    return content
