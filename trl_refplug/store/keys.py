"""
The key of a row: everything that decides its log-probs, and nothing else, as 128 bits.

Facts that differ only in how a row is batched, shuffled or reduced are not part of a key, so they cannot cause a miss.
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

# Starts every encoding. A new encoding needs a new name: old rows are then missed, never mistaken for others.
_DOMAIN = b"trl-refplug row key 1\n"

Ids: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]


@dataclass(frozen=True)
class ScoringFacts:
    """
    How the rows of a run are scored: the part of a key that its rows share.

    Args:
        identity_digest (`str`): Digest of the reference's `ReferenceIdentity`.
        attention_implementation (`str`): `"eager"`, `"sdpa"`, ...
        scoring_mode (`str`): Name of the way rows are laid out and scored, where that changes the last digits.
        temperature (`float`): What logits are divided by.
        cast_lm_head_to_fp32 (`bool`): Whether the LM head runs in float32.
        autocast_dtype (`str` or `None`): `"bfloat16"`, ...; `"bfloat16 weights"` where DeepSpeed has rounded these,
            too; `"tf32"` where products of float32 matrices are rounded; `None` where nothing is.
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
        """The unambiguous encoding that every row key of the run starts with."""
        return _DOMAIN + b"".join(
            (
                _text(self.identity_digest),
                _real(self.temperature),
                _whole(int(self.cast_lm_head_to_fp32)),
                _text(self.autocast_dtype),
                _text(self.attention_implementation),
                _text(self.scoring_mode),
            )
        )


@dataclass(frozen=True, eq=False)
class RowKey:
    """
    What one row is. Two rows with the same digest have the same log-probs, up to the tolerance of rebatching.

    Args:
        facts ([`ScoringFacts`]): How the row is scored.
        token_ids (`Sequence[int]` or integer array `[tokens]`): The tokens the model attends to, without padding.
        scored_positions (`Sequence[int]` or integer array `[scored]`): Indices into `token_ids` of the tokens whose
            log-probs are wanted, ascending.
        multimodal_digest (`str` or `None`): Digest of all further model inputs; `None` for text alone.
        padding_offset (`int`): Position id of the first token where absolute positions make that matter, else 0.

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
        """The key: `KEY_BYTES` bytes, the same on every machine."""
        return xxhash.xxh3_128_digest(
            b"".join(
                (
                    self.facts.encoded,
                    _integers("token_ids", self.token_ids),
                    _integers("scored_positions", self.scored_positions),
                    _text(self.multimodal_digest),
                    _whole(self.padding_offset),
                )
            )
        )


def tail_scored_keys(
    facts: ScoringFacts, token_ids: NDArray[np.int64], offsets: Sequence[int], first_scored: Sequence[int]
) -> list[bytes]:
    """
    The digests of the [`RowKey`]s of many rows that are scored from some token to their end, ten times as fast.

    Args:
        facts ([`ScoringFacts`]): How the rows are scored.
        token_ids (`NDArray[np.int64]`): `[tokens]`, of all rows.
        offsets (`Sequence[int]`): `[rows + 1]`; row `i` is `token_ids[offsets[i] : offsets[i + 1]]`.
        first_scored (`Sequence[int]`): `[rows]`, index in its row of the first scored token.
    """
    longest = max((end - start for start, end in pairwise(offsets)), default=0)
    tokens = np.ascontiguousarray(token_ids, "<i8").data.cast("B") if len(token_ids) else b""
    positions = np.arange(longest + 1, dtype="<i8").data.cast("B")
    before, between, after = facts.encoded + b"ints", b"ints", _text(None) + _whole(0)
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


# Every field is a tag, a length and that many bytes, so no two lists of fields share an encoding.


def _tagged(tag: bytes, payload: bytes) -> bytes:
    return tag + len(payload).to_bytes(8, "little") + payload


def _text(value: str | None) -> bytes:
    return _tagged(b"none", b"") if value is None else _tagged(b"text", value.encode())


def _real(value: float) -> bytes:
    return _tagged(b"real", struct.pack("<d", value))


def _whole(value: int) -> bytes:
    return _tagged(b"whole", struct.pack("<q", value))


def _integers(name: str, values: Ids) -> bytes:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be a 1-D array of integers, got {array.dtype} of shape {list(array.shape)}")
    return _tagged(b"ints", array.astype("<i8").tobytes())


def as_key_array(keys: Sequence[bytes]) -> NDArray[np.uint64]:
    """`keys` as little-endian uint64 `[keys, 2]`, checked to be `KEY_BYTES` long each."""
    if any(map(KEY_BYTES.__ne__, map(len, keys))):
        wrong = next(key for key in keys if len(key) != KEY_BYTES)
        raise ValueError(f"a key has {KEY_BYTES} bytes, got one of {len(wrong)}: {wrong!r}")
    return np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2)
