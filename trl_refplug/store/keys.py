"""
The key of a row: a 128-bit digest of everything that its log-probs depend on, and of nothing else.

How rows are batched, shuffled or reduced is not part of a key, so it cannot cause a miss.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray


KEY_BYTES = 16

# Every encoding starts with this. If the encoding changes, this has to change too, so that keys of an old encoding are
# not found, instead of being taken for other rows.
_DOMAIN = b"trl-refplug row key 1\n"

Ids: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]


@dataclass(frozen=True)
class ScoringFacts:
    """
    How the rows of a run are scored. This is the part of a key that all rows of the run share.

    Args:
        identity_digest (`str`): Digest of the reference's `ReferenceIdentity`.
        attention_implementation (`str`): `"eager"`, `"sdpa"` and so on.
        scoring_mode (`str`): How rows are laid out and scored, because that changes the last digits of log-probs.
        temperature (`float`): Logits are divided by it.
        cast_lm_head_to_fp32 (`bool`): Whether the LM head runs in float32.
        autocast_dtype (`str` or `None`): The reduced precision of the forward pass: `"bfloat16"` and so on under
            autocast; `"bfloat16 weights"` if DeepSpeed has rounded the weights as well; `"tf32"` if products of
            float32 matrices are rounded; `None` if nothing is rounded.
    """

    identity_digest: str
    attention_implementation: str
    scoring_mode: str
    temperature: float = 1.0
    cast_lm_head_to_fp32: bool = False
    autocast_dtype: str | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")

    @cached_property
    def encoded(self) -> bytes:
        """The bytes that the encoding of every row of the run starts with."""
        return _DOMAIN + b"".join(
            (
                _encode_text(self.identity_digest),
                _encode_float(self.temperature),
                _encode_int(int(self.cast_lm_head_to_fp32)),
                _encode_text(self.autocast_dtype),
                _encode_text(self.attention_implementation),
                _encode_text(self.scoring_mode),
            )
        )


@dataclass(frozen=True, eq=False)
class RowKey:
    """
    What identifies one row. Two rows with the same digest have the same log-probs, except for the rounding differences
    between batches of other shapes.

    Args:
        facts ([`ScoringFacts`]): How the row is scored.
        token_ids (`Sequence[int]` or integer array `[tokens]`): The tokens the model attends to, without padding.
        scored_positions (`Sequence[int]` or integer array `[scored]`): Indices into `token_ids` of the tokens whose
            log-probs are wanted, in ascending order.
        multimodal_digest (`str` or `None`): Digest of all other model inputs; `None` if there is only text.
        padding_offset (`int`): Position id of the first token, if the model has absolute positions. Otherwise 0.

    Example:

    ```python
    >>> facts = ScoringFacts("frozen-1234", attention_implementation="sdpa", scoring_mode="exact")
    >>> RowKey(facts, token_ids=[5, 6, 7], scored_positions=[1, 2]).digest().hex()
    'c629a1779e19c0a030d7902d3db70f6d'
    ```
    """

    facts: ScoringFacts
    token_ids: Ids = field(repr=False)
    scored_positions: Ids = field(repr=False)
    multimodal_digest: str | None = None
    padding_offset: int = 0

    def digest(self) -> bytes:
        """The key, which has `KEY_BYTES` bytes and is the same on every machine."""
        return xxhash.xxh3_128_digest(
            b"".join(
                (
                    self.facts.encoded,
                    _encode_ints("token_ids", self.token_ids),
                    _encode_ints("scored_positions", self.scored_positions),
                    _encode_text(self.multimodal_digest),
                    _encode_int(self.padding_offset),
                )
            )
        )


def tail_scored_keys(
    facts: ScoringFacts, token_ids: NDArray[np.int64], offsets: Sequence[int], first_scored: Sequence[int]
) -> list[bytes]:
    """
    The keys of many rows that are each scored from some token to their end. The result is that of [`RowKey`] for each
    row, and takes a tenth of the time.

    Args:
        facts ([`ScoringFacts`]): How the rows are scored.
        token_ids (`NDArray[np.int64]`): `[tokens]`, the tokens of all rows, one row after the other.
        offsets (`Sequence[int]`): `[rows + 1]`; row `i` is `token_ids[offsets[i] : offsets[i + 1]]`.
        first_scored (`Sequence[int]`): `[rows]`, the index of the first scored token in each row.
    """
    longest = max((end - start for start, end in pairwise(offsets)), default=0)
    tokens = np.ascontiguousarray(token_ids, "<i8").data.cast("B") if len(token_ids) else b""
    positions = np.arange(longest + 1, dtype="<i8").data.cast("B")
    before, between, after = facts.encoded + b"ints", b"ints", _encode_text(None) + _encode_int(0)
    sizes = [(8 * length).to_bytes(8, "little") for length in range(longest + 1)]
    digest = xxhash.xxh3_128_digest
    keys = []
    for (start, end), first in zip(pairwise(offsets), first_scored, strict=True):
        length = end - start
        scored = max(length - first, 0)
        keys.append(
            digest(
                b"".join(
                    (
                        before,
                        sizes[length],
                        tokens[8 * start : 8 * end],
                        between,
                        sizes[scored],
                        positions[8 * (length - scored) : 8 * length],
                        after,
                    )
                )
            )
        )
    return keys


# Each field is encoded as a tag, a length and that many bytes. So no two different lists of fields have one encoding.


def _tagged(tag: bytes, payload: bytes) -> bytes:
    return tag + len(payload).to_bytes(8, "little") + payload


def _encode_text(value: str | None) -> bytes:
    return _tagged(b"none", b"") if value is None else _tagged(b"text", value.encode())


def _encode_float(value: float) -> bytes:
    return _tagged(b"real", struct.pack("<d", value))


def _encode_int(value: int) -> bytes:
    return _tagged(b"whole", struct.pack("<q", value))


def _encode_ints(name: str, values: Ids) -> bytes:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be a 1-D array of integers, got {array.dtype} of shape {list(array.shape)}")
    return _tagged(b"ints", array.astype("<i8").tobytes())


def as_key_array(keys: Sequence[bytes]) -> NDArray[np.uint64]:
    """Check that each key has `KEY_BYTES` bytes, and return all as little-endian uint64 `[keys, 2]`."""
    if any(map(KEY_BYTES.__ne__, map(len, keys))):
        wrong = next(key for key in keys if len(key) != KEY_BYTES)
        raise ValueError(f"a key has {KEY_BYTES} bytes, got one of {len(wrong)}: {wrong!r}")
    return np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2)
